// Products of rows with packed weights. Weights [N, K] lie as [⌈N/64⌉·4/kBlock][K/2][16·kBlock][2],
// zero past N: blocks of 16·kBlock outputs, each one stream from the first k to the last.

#pragma once

constexpr int kWidth = 16 * kBlock;  // outputs of a block
constexpr int kChunk = kBlock > 1 ? 6 : 4;  // rows at once: their sums fit the registers
constexpr int kAhead = 512;          // elements of a vector's weights that are fetched in advance

// Blocks at once: with few rows, one block's sums are too few to hide the latency of their additions.
constexpr int blocks_at_once(int64_t rows) {
  return kBlock > 1 || rows > 2 ? 1 : rows > 1 ? 2 : 4;
}

struct Product {
  const bf16 *x, *weights;  // [T, K], packed
  const float* bias;        // [⌈N/64⌉·64] or null
  void* out;                // [T, N], fp32 or bf16
  bool fp32;
  int64_t T, N, K;
  int64_t stride;  // from one row of the result to the next
  bool add;        // to what the result holds (fp32 only)

  int64_t blocks() const { return (N + kWidth - 1) / kWidth; }
};

// The rows as factors: themselves, or a copy for each thread.
inline const Factor* factors(const Product& p) {
  if constexpr (std::is_same_v<Factor, bf16>) {
    return reinterpret_cast<const Factor*>(p.x);
  } else {
    static thread_local std::vector<Factor> copy;
    if (int64_t(copy.size()) < p.T * p.K) copy.resize(p.T * p.K);
    to_factors(p.x, copy.data(), p.T * p.K);
    return copy.data();
  }
}

// R rows from `row` times S blocks from `block`: one accumulator for each row and vector, from the
// first k to the last, so that no result depends on R, S or who computes it.
//
// One chunk of rows streams its weights from memory. Where several share a block, all but the first
// would work from the cache while memory rests: each fetches a share of the block that comes next.
template <int R, int S>
void multiply(const Product& p, const Factor* factors, int64_t row, int64_t block, const bf16* next,
              int64_t chunks) {
  constexpr int B = kBlock, W = S * B;
  const int64_t K = p.K, size = kWidth * K, column = block * kWidth;
  const Factor* x = factors + row * K;
  const bf16* weights = p.weights + block * size;
  Floats sums[W][R];
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) {
      const int64_t from = column + w * 16;
      if (p.add)
        sums[w][r] = load_some(static_cast<const float*>(p.out) + (row + r) * p.stride + from,
                               lanes(0, p.N - from), 0.0f);
      else
        sums[w][r] = p.bias ? load(p.bias + from) : zero();
    }
  int64_t until_fetch = 1;
  for (int64_t k = 0; k < K; k += 2, weights += B * 32) {
    if (!next) {
      for (int s = 0; s < S; ++s)
        for (int b = 0; b < B; ++b)
          _mm_prefetch(reinterpret_cast<const char*>(weights + s * size + b * 32 + kAhead * B),
                       _MM_HINT_T0);
    } else if (--until_fetch == 0) {
      for (int b = 0; b < B; ++b)
        _mm_prefetch(reinterpret_cast<const char*>(next + b * 32), _MM_HINT_T1);
      next += B * 32;
      until_fetch = chunks;
    }
#ifdef DSPARK_AVX512  // one row's pair is read once for all blocks
    Pairs w[W];
    for (int i = 0; i < W; ++i) w[i] = load_pairs(weights + i * 32);
    for (int r = 0; r < R; ++r) {
      const Pair two = pair(x + r * K + k);
      for (int i = 0; i < W; ++i) sums[i][r] = dot(sums[i][r], w[i], two);
    }
#else
    for (int s = 0; s < S; ++s) accumulate<R>(sums[s], weights + s * size, x + k, K);
#endif
  }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) {
      const int64_t from = column + w * 16, to = (row + r) * p.stride + from;
      const Mask kept = lanes(0, p.N - from);
      if (p.fp32)
        store_some(static_cast<float*>(p.out) + to, sums[w][r], kept);
      else
        store_some(static_cast<bf16*>(p.out) + to, sums[w][r], kept);
    }
}

template <int N>
constexpr std::integral_constant<int, N> count{};

inline void multiply_some(const Product& p, const Factor* x, int64_t row, int64_t rows,
                          int64_t block, int blocks, const bf16* next, int64_t chunks) {
  const auto go = [&](auto rows, auto blocks) {
    multiply<rows(), blocks()>(p, x, row, block, next, chunks);
  };
  if constexpr (kBlock > 1) {
    switch (rows) {
      case 1: return go(count<1>, count<1>);
      case 2: return go(count<2>, count<1>);
      case 3: return go(count<3>, count<1>);
      case 4: return go(count<4>, count<1>);
      case 5: return go(count<5>, count<1>);
      case 6: return go(count<6>, count<1>);
    }
  } else {
    switch (rows) {
      case 1: return blocks == 4 ? go(count<1>, count<4>) : go(count<1>, count<1>);
      case 2: return blocks == 2 ? go(count<2>, count<2>) : go(count<2>, count<1>);
      case 3: return go(count<3>, count<1>);
      case 4: return go(count<4>, count<1>);
    }
  }
}

// Blocks first .. last - 1, for all rows.
inline void multiply_range(const Product& p, const Factor* x, int64_t first, int64_t last) {
  const int64_t chunks = (p.T + kChunk - 1) / kChunk;  // of equal size: none is left with few rows
  const int at_once = blocks_at_once((p.T + chunks - 1) / chunks);
  int blocks;
  for (int64_t block = first; block < last; block += blocks) {
    blocks = last - block >= at_once ? at_once : 1;
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t row = p.T * c / chunks;
      const bf16* next = nullptr;
      if (chunks > 1 && block + 1 < last)
        next = p.weights + ((block + 1) * p.K + p.K / 2 * c / chunks * 2) * kWidth;
      multiply_some(p, x, row, p.T * (c + 1) / chunks - row, block, blocks, next, chunks);
    }
  }
}

#ifdef DSPARK_AMX
#include "tiles_amx.h"
#endif

inline void multiply_all(const Product& p) {
  if (p.T == 0) return;  // a step in which nobody emits has no rows for the head
#pragma omp parallel
  {
    const int64_t blocks = p.blocks(), i = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t first = blocks * i / threads, last = blocks * (i + 1) / threads;
#ifdef DSPARK_AMX
    // Which of the two computes a row must not depend on the rows beside it: K alone decides.
    if (p.K % kTileDepth == 0)
      multiply_tiles(p, first, last);
    else
#endif
      multiply_range(p, factors(p), first, last);
  }
}
