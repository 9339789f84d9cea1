// The operators of a decoder layer around its matrix products, in bf16 with fp32 arithmetic, for
// x86-64 with AVX-512 BF16. Called through a C interface (dspark.kernels.cpu.operators), which has
// checked every shape: nothing is checked again here.
//
// Every output row is a function of its own inputs alone: the order of its additions depends
// neither on the rows beside it nor on the number of threads. Decoding a token alone and verifying
// it in a block of drafts therefore give the same bits.
//
// Pages hold 16 tokens, laid out for the bf16 dot product (pairs of neighbours in a 32-bit lane):
//   keys   [page][G][D/2][16][2]   16 tokens side by side, width in pairs
//   values [page][G][8][D][2]      width side by side, tokens in pairs
// Symbols: T rows, d width of the model, H query heads, G KV heads, D head width, I MLP width,
// S sequences.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

extern "C" int dspark_supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16");
}

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")

namespace {

using bf16 = uint16_t;

constexpr int kPage = 16;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

inline __m512 load(const bf16* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

inline void store(bf16* p, __m512 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
}


// e^x to about 2 ulp; 0 below the smallest normal number, -inf included.
inline __m512 exp512(__m512 x) {
  const __mmask16 some = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GT_OQ);
  x = _mm512_min_ps(x, _mm512_set1_ps(88.7f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_maskz_scalef_ps(some, p, n);
}

// x[0..width) times 1/rms(x) times weight; width is a multiple of 16.
inline void rms_norm(const bf16* x, const bf16* weight, bf16* out, int64_t width, float eps) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < width; i += 16) {
    const __m512 v = load(x + i);
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  const float mean = _mm512_reduce_add_ps(squares) / float(width);
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(mean + eps));
  for (int64_t i = 0; i < width; i += 16)
    store(out + i, _mm512_mul_ps(_mm512_mul_ps(load(x + i), scale), load(weight + i)));
}

inline void rotate(bf16* x, const float* cos, const float* sin, int64_t width) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const __m512 a = load(x + i), b = load(x + half + i);
    const __m512 c = _mm512_loadu_ps(cos + i), s = _mm512_loadu_ps(sin + i);
    store(x + i, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
    store(x + half + i, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
  }
}

inline void write_kv(const bf16* key, const bf16* value, bf16* keys, bf16* values, int64_t slot,
                     int64_t g, int64_t G, int64_t D) {
  const int64_t page = slot / kPage, at = slot % kPage;
  uint32_t* k = reinterpret_cast<uint32_t*>(keys) + (page * G + g) * (D / 2) * kPage + at;
  for (int64_t i = 0; i < D / 2; ++i) {
    uint32_t pair;
    __builtin_memcpy(&pair, key + 2 * i, 4);
    k[i * kPage] = pair;
  }
  bf16* v = values + ((page * G + g) * (kPage / 2) + at / 2) * D * 2 + at % 2;
  for (int64_t i = 0; i < D; ++i) v[2 * i] = value[i];
}

constexpr int kBlocks = 4;  // vectors of 16 outputs in one group of packed weights [K/2][64][2]
constexpr int64_t kColumns = 16 * kBlocks;

struct Product {
  const bf16 *x, *weights;  // [T, K], [⌈N/64⌉][K/2][64][2]
  const float* bias;        // [⌈N/64⌉·64] or null
  void* out;                // [T, N], fp32 or bf16
  bool fp32;
  int64_t N, K;
  int64_t stride;  // from one row of the result to the next
  bool add;        // to what the result holds (fp32 only)
};

// R rows from `row` times group `g`: one accumulator for each row and vector, from the first k to the
// last.
//
// One chunk of rows streams its weights from memory. Where several share a group, all but the first
// would work from the cache while memory rests: each fetches a share of the group that comes next.
template <int R>
void multiply(const Product& p, int64_t row, int64_t g, const bf16* next, int64_t chunks) {
  constexpr int B = kBlocks;
  const bf16* x = p.x + row * p.K;
  const bf16* weights = p.weights + g * kColumns * p.K;
  const int64_t column = g * kColumns;
  __m512 sum[R][B];
  __mmask16 kept[B];
  for (int b = 0; b < B; ++b) {
    const int64_t left = std::clamp<int64_t>(p.N - column - b * 16, 0, 16);
    kept[b] = __mmask16((1u << left) - 1);
  }
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) {
      const float* so_far = static_cast<const float*>(p.out) + (row + r) * p.stride + column + b * 16;
      sum[r][b] = p.add    ? _mm512_maskz_loadu_ps(kept[b], so_far)
                  : p.bias ? _mm512_loadu_ps(p.bias + column + b * 16)
                           : _mm512_setzero_ps();
    }
  int64_t until_fetch = 1;
  for (int64_t k = 0; k < p.K; k += 2, weights += B * 32) {
    if (!next) {
      for (int b = 0; b < B; ++b)
        _mm_prefetch(reinterpret_cast<const char*>(weights + b * 32 + 2048), _MM_HINT_T0);
    } else if (--until_fetch == 0) {
      for (int b = 0; b < B; ++b)
        _mm_prefetch(reinterpret_cast<const char*>(next + b * 32), _MM_HINT_T1);
      next += B * 32;
      until_fetch = chunks;
    }
    __m512bh w[B];
    for (int b = 0; b < B; ++b) w[b] = (__m512bh)_mm512_loadu_si512(weights + b * 32);
    for (int r = 0; r < R; ++r) {
      int pair;
      __builtin_memcpy(&pair, x + r * p.K + k, 4);
      const __m512bh two = (__m512bh)_mm512_set1_epi32(pair);
      for (int b = 0; b < B; ++b) sum[r][b] = _mm512_dpbf16_ps(sum[r][b], w[b], two);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) {
      const int64_t to = (row + r) * p.stride + column + b * 16;
      if (p.fp32)
        _mm512_mask_storeu_ps(static_cast<float*>(p.out) + to, kept[b], sum[r][b]);
      else
        _mm256_mask_storeu_epi16(static_cast<bf16*>(p.out) + to, kept[b],
                                 (__m256i)_mm512_cvtneps_pbh(sum[r][b]));
    }
}

// The accumulators of 6 rows fill 24 of the 32 registers.
void multiply_group(const Product& p, int64_t T, int64_t g, bool more) {
  const int64_t chunks = (T + 5) / 6;  // of equal size: none is left with few rows
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t row = T * c / chunks;
    const bf16* next = nullptr;
    if (more && chunks > 1)
      next = p.weights + (g + 1) * kColumns * p.K + p.K / 2 * c / chunks * 2 * kColumns;
    switch (T * (c + 1) / chunks - row) {
      case 1: multiply<1>(p, row, g, next, chunks); break;
      case 2: multiply<2>(p, row, g, next, chunks); break;
      case 3: multiply<3>(p, row, g, next, chunks); break;
      case 4: multiply<4>(p, row, g, next, chunks); break;
      case 5: multiply<5>(p, row, g, next, chunks); break;
      case 6: multiply<6>(p, row, g, next, chunks); break;
    }
  }
}

struct Attention {
  const bf16* query;  // row t, head h at query + t * query_stride + h * D
  int64_t query_stride;
  const bf16 *keys, *values;
  bf16* out;                 // [T, H, D]
  const int64_t* reach;      // [T] the last position that a row sees
  const float* sinks;        // [H] or null
  int64_t H, G;
  float scale, softcap;  // softcap 0: none
  int64_t window;        // 0: none
};

// R query rows of one sequence and one KV head: (row, head) pairs that share their keys.
template <int D, int R>
void attend(const Attention& a, const int32_t* pages, const int64_t* rows, const int64_t* heads,
            int64_t g, std::vector<float>& scores, std::vector<bf16>& weights) {
  const uint32_t* query[R];
  int64_t low[R], high[R];
  int64_t first = std::numeric_limits<int64_t>::max(), last = 0;
  for (int r = 0; r < R; ++r) {
    query[r] = reinterpret_cast<const uint32_t*>(a.query + rows[r] * a.query_stride + heads[r] * D);
    high[r] = a.reach[rows[r]] + 1;
    low[r] = a.window ? std::max<int64_t>(0, high[r] - a.window) : 0;
    first = std::min(first, low[r]);
    last = std::max(last, high[r]);
  }
  const int64_t begin = first / kPage, end = (last + kPage - 1) / kPage;
  const int64_t length = (end - begin) * kPage;
  if (int64_t(scores.size()) < R * length) {
    scores.resize(R * length);
    weights.resize(R * length);
  }
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t p = begin; p < end; ++p) {
    const bf16* k = a.keys + (int64_t(pages[p]) * a.G + g) * D * kPage;
    __m512 dot[R];
    for (int r = 0; r < R; ++r) dot[r] = _mm512_setzero_ps();
    for (int i = 0; i < D / 2; ++i) {
      const __m512bh key = (__m512bh)_mm512_loadu_si512(k + i * 2 * kPage);
      for (int r = 0; r < R; ++r)
        dot[r] = _mm512_dpbf16_ps(dot[r], key, (__m512bh)_mm512_set1_epi32(int(query[r][i])));
    }
    const __m512i key = _mm512_add_epi32(lane, _mm512_set1_epi32(int(p * kPage)));
    for (int r = 0; r < R; ++r) {
      __m512 s = _mm512_mul_ps(dot[r], _mm512_set1_ps(a.scale));
      if (a.softcap > 0.0f) {  // cap · tanh(s / cap), tanh x = 1 - 2 / (e^2x + 1)
        const __m512 two = _mm512_set1_ps(2.0f), one = _mm512_set1_ps(1.0f);
        const __m512 e = exp512(_mm512_mul_ps(s, _mm512_set1_ps(2.0f / a.softcap)));
        s = _mm512_mul_ps(_mm512_set1_ps(a.softcap),
                          _mm512_sub_ps(one, _mm512_div_ps(two, _mm512_add_ps(e, one))));
      }
      const __mmask16 seen =
          _mm512_cmpge_epi32_mask(key, _mm512_set1_epi32(int(low[r]))) &
          _mm512_cmplt_epi32_mask(key, _mm512_set1_epi32(int(high[r])));
      s = _mm512_mask_blend_ps(seen, _mm512_set1_ps(kNothing), s);
      _mm512_storeu_ps(scores.data() + r * length + (p - begin) * kPage, s);
    }
  }
  float total[R];
  for (int r = 0; r < R; ++r) {
    float* s = scores.data() + r * length;
    __m512 most = _mm512_set1_ps(kNothing);
    for (int64_t i = 0; i < length; i += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(s + i));
    float top = _mm512_reduce_max_ps(most);
    if (a.sinks) top = std::max(top, a.sinks[heads[r]]);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < length; i += 16) {
      const __m512 e = exp512(_mm512_sub_ps(_mm512_loadu_ps(s + i), _mm512_set1_ps(top)));
      sum = _mm512_add_ps(sum, e);
      store(weights.data() + r * length + i, e);
    }
    total[r] = _mm512_reduce_add_ps(sum);
    if (a.sinks) total[r] += std::exp(a.sinks[heads[r]] - top);
  }
  __m512 out[R][D / 16];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < D / 16; ++c) out[r][c] = _mm512_setzero_ps();
  for (int64_t p = begin; p < end; ++p) {
    const bf16* v = a.values + (int64_t(pages[p]) * a.G + g) * D * kPage;
    for (int j = 0; j < kPage / 2; ++j) {
      __m512bh pair[R];
      for (int r = 0; r < R; ++r) {
        uint32_t two;
        __builtin_memcpy(&two, weights.data() + r * length + (p - begin) * kPage + 2 * j, 4);
        pair[r] = (__m512bh)_mm512_set1_epi32(int(two));
      }
      for (int c = 0; c < D / 16; ++c) {
        const __m512bh value = (__m512bh)_mm512_loadu_si512(v + (j * D + c * 16) * 2);
        for (int r = 0; r < R; ++r) out[r][c] = _mm512_dpbf16_ps(out[r][c], value, pair[r]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    const __m512 scale = _mm512_set1_ps(1.0f / total[r]);
    bf16* to = a.out + (rows[r] * a.H + heads[r]) * D;
    for (int c = 0; c < D / 16; ++c) store(to + c * 16, _mm512_mul_ps(out[r][c], scale));
  }
}

// Accumulators of R rows fill 24 of the 32 registers.
template <int D>
constexpr int kRows = std::max(1, std::min(6, 24 / (D / 16)));

template <int D>
void attend_some(const Attention& a, const int32_t* pages, const int64_t* rows,
                 const int64_t* heads, int count, int64_t g, std::vector<float>& scores,
                 std::vector<bf16>& weights) {
  while (count > 0) {
    int took = 1;
    if (count >= 6 && kRows<D> >= 6) {
      attend<D, std::min(6, kRows<D>)>(a, pages, rows, heads, g, scores, weights);
      took = 6;
    } else if (count >= 3 && kRows<D> >= 3) {
      attend<D, std::min(3, kRows<D>)>(a, pages, rows, heads, g, scores, weights);
      took = 3;
    } else if (count >= 2 && kRows<D> >= 2) {
      attend<D, std::min(2, kRows<D>)>(a, pages, rows, heads, g, scores, weights);
      took = 2;
    } else {
      attend<D, 1>(a, pages, rows, heads, g, scores, weights);
    }
    rows += took;
    heads += took;
    count -= took;
  }
}

constexpr int kTask = 12;  // (row, head) pairs that one thread takes at a time

struct Task {
  int64_t sequence, g, first, count;  // pairs first .. first + count - 1 of the sequence
};

template <int D>
void attend_all(const Attention& a, const int64_t* row_starts, const int32_t* tables,
                int64_t table_width, int64_t S) {
  const int64_t fold = a.H / a.G;
  std::vector<Task> tasks;
  for (int64_t s = 0; s < S; ++s) {
    const int64_t pairs = (row_starts[s + 1] - row_starts[s]) * fold;
    for (int64_t g = 0; g < a.G; ++g)
      for (int64_t first = 0; first < pairs; first += kTask)
        tasks.push_back({s, g, first, std::min<int64_t>(kTask, pairs - first)});
  }
  const int64_t count = int64_t(tasks.size());
#pragma omp parallel if (count > 1)
  {
    std::vector<float> scores;
    std::vector<bf16> weights;
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < count; ++t) {
      const Task& task = tasks[t];
      int64_t rows[kTask], heads[kTask];
      for (int64_t i = 0; i < task.count; ++i) {
        rows[i] = row_starts[task.sequence] + (task.first + i) / fold;
        heads[i] = task.g * fold + (task.first + i) % fold;
      }
      attend_some<D>(a, tables + task.sequence * table_width, rows, heads, int(task.count), task.g,
                     scores, weights);
    }
  }
}

// Index of the first of the greatest of x[0..n), which lie in groups of kColumns with these maxima.
int64_t argmax(const float* x, const float* maxima, int64_t n) {
  const int64_t groups = (n + kColumns - 1) / kColumns;
  const int64_t g = std::max_element(maxima, maxima + groups) - maxima;
  int64_t i = g * kColumns;
  while (x[i] != maxima[g] && i + 1 < n) ++i;
  return i;
}

float group_max(const float* x, int64_t n) {
  __m512 most = _mm512_set1_ps(kNothing);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 kept = n - i >= 16 ? 0xffff : __mmask16((1u << (n - i)) - 1);
    most = _mm512_max_ps(most, _mm512_mask_loadu_ps(most, kept, x + i));
  }
  return _mm512_reduce_max_ps(most);
}

using Entry = std::pair<float, int64_t>;  // value, index

inline bool before(const Entry& a, const Entry& b) {
  return a.first > b.first || (a.first == b.first && a.second < b.second);
}

// The K greatest of x[0..n), greatest first. No group whose maximum is below the K-th greatest
// maximum holds one of them.
void top(const float* x, const float* maxima, int64_t n, int64_t K, std::vector<Entry>& out) {
  const int64_t groups = (n + kColumns - 1) / kColumns;
  float least = kNothing;
  if (K <= groups) {
    std::vector<float> sorted(maxima, maxima + groups);
    std::nth_element(sorted.begin(), sorted.begin() + (K - 1), sorted.end(), std::greater<float>());
    least = sorted[K - 1];
  }
  out.clear();
  for (int64_t g = 0; g < groups; ++g) {
    if (!(maxima[g] >= least)) continue;
    const int64_t end = std::min(n, (g + 1) * kColumns);
    for (int64_t i = g * kColumns; i < end; ++i)
      if (x[i] >= least) out.emplace_back(x[i], i);
  }
  if (out.empty()) out.emplace_back(x[0], 0);  // nothing but NaN
  const int64_t kept = std::min<int64_t>(K, int64_t(out.size()));
  std::partial_sort(out.begin(), out.begin() + kept, out.end(), before);
  out.resize(kept);
}

// The noise of dspark.decoding.noise: SplitMix64, and the centre of the cell that a word names.
inline uint64_t mix(uint64_t word) {
  word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9ull;
  word = (word ^ (word >> 27)) * 0x94D049BB133111EBull;
  return word ^ (word >> 31);
}

inline double unit(uint64_t word) { return (double(word >> 12) + 0.5) * 0x1p-52; }

inline double gumbel(uint64_t key, int64_t token) {
  return -std::log(-std::log(unit(mix(key + uint64_t(token + 1) * 0x9E3779B97F4A7C15ull))));
}


// One row of logits as a law after temperature, top-k and top-p (dspark.decoding.law): token i is
// kept if x[i] > least, or x[i] = least and i <= tie, and then weighs exp((x[i] - most) / T) / sum.
struct Law {
  const float* x;
  int64_t V;
  float scale, most;  // 1 / T, the greatest logit
  float least = kNothing;
  int64_t tie;
  double sum;
  std::vector<float> maxima;  // of groups of kColumns

  bool keeps(int64_t i) const { return x[i] > least || (x[i] == least && i <= tie); }
  double weight(int64_t i) const {
    return keeps(i) ? std::exp((double(x[i]) - most) * scale) / sum : 0.0;
  }
  // Lanes i .. i + 15 that are kept, and their exponentials.
  __m512 exponentials(int64_t i) const {
    const __mmask16 inside = V - i >= 16 ? 0xffff : __mmask16((1u << (V - i)) - 1);
    const __m512 v = _mm512_mask_loadu_ps(_mm512_set1_ps(kNothing), inside, x + i);
    __mmask16 kept = _mm512_cmp_ps_mask(v, _mm512_set1_ps(least), _CMP_GE_OQ) & inside;
    if (tie < V) {
      const __mmask16 equal = _mm512_cmp_ps_mask(v, _mm512_set1_ps(least), _CMP_EQ_OQ);
      const __mmask16 early =
          tie < i ? __mmask16(0) : tie - i >= 15 ? __mmask16(0xffff) : __mmask16((2u << (tie - i)) - 1);
      kept &= __mmask16(~equal | early);
    }
    const __m512 e = exp512(
        _mm512_mul_ps(_mm512_sub_ps(v, _mm512_set1_ps(most)), _mm512_set1_ps(scale)));
    return _mm512_maskz_mov_ps(kept, e);
  }
  double group_sum(int64_t g) const {
    __m512 total = _mm512_setzero_ps();
    const int64_t end = std::min(V, (g + 1) * kColumns);
    for (int64_t i = g * kColumns; i < end; i += 16)
      total = _mm512_add_ps(total, exponentials(i));
    return _mm512_reduce_add_ps(total);
  }

  Law(const float* logits, int64_t size, float temperature, int64_t top_k, float top_p)
      : x(logits), V(size), scale(1.0f / temperature), tie(size) {
    const int64_t groups = (V + kColumns - 1) / kColumns;
    maxima.resize(groups);
    for (int64_t g = 0; g < groups; ++g)
      maxima[g] = group_max(x + g * kColumns, std::min(kColumns, V - g * kColumns));
    most = *std::max_element(maxima.begin(), maxima.end());
    if (top_k > 0 && top_k < V) {
      std::vector<float> sorted;
      if (top_k <= groups) {
        std::vector<Entry> best;
        top(x, maxima.data(), V, top_k, best);
        least = best.back().first;
      } else {
        sorted.assign(x, x + V);
        std::nth_element(sorted.begin(), sorted.begin() + (top_k - 1), sorted.end(),
                         std::greater<float>());
        least = sorted[top_k - 1];
      }
    }
    sum = 0.0;
    for (int64_t g = 0; g < groups; ++g)
      if (maxima[g] >= least) sum += group_sum(g);
    if (top_p < 1.0f) cut_top_p(top_p);
  }

  // Keeps the smallest set of likeliest tokens whose weight reaches top_p of the sum; of equal ones,
  // the first. Nearly always it lies within a few hundred tokens; if not, its edge is bisected.
  void cut_top_p(float top_p) {
    const double enough = double(top_p) * sum;
    std::vector<Entry> best;
    top(x, maxima.data(), V, std::min<int64_t>(256, int64_t(maxima.size())), best);
    double mass = 0.0;
    for (const Entry& entry : best) {
      if (entry.first < least) return;
      mass += std::exp((double(entry.first) - most) * scale);
      if (mass >= enough) {
        least = entry.first, tie = entry.second, sum = mass;
        return;
      }
    }
    std::vector<float> weights((V + 15) / 16 * 16), values(weights.size(), kNothing);
    std::copy(x, x + V, values.begin());
    for (int64_t i = 0; i < V; i += 16) _mm512_storeu_ps(weights.data() + i, exponentials(i));
    const auto from = [&](float edge) {  // weight of what is no less than the edge
      double total = 0.0;
      for (size_t i = 0; i < values.size(); i += 1024) {
        __m512 some = _mm512_setzero_ps();
        for (size_t k = i; k < std::min(i + 1024, values.size()); k += 16) {
          const __mmask16 in = _mm512_cmp_ps_mask(_mm512_loadu_ps(values.data() + k),
                                                  _mm512_set1_ps(edge), _CMP_GE_OQ);
          some = _mm512_mask_add_ps(some, in, some, _mm512_loadu_ps(weights.data() + k));
        }
        total += _mm512_reduce_add_ps(some);
      }
      return total;
    };
    // Floats in order as integers: from(low) is enough, from(high) is not.
    int32_t high = ordered(best.back().first) + 1;
    int32_t low = ordered(std::max(least, most - 100.0f / scale));
    while (int64_t(high) - low > 1) {
      const int32_t middle = int32_t((int64_t(high) + low) / 2);
      (from(unordered(middle)) >= enough ? low : high) = middle;
    }
    const float edge = unordered(low);
    mass = from(unordered(high));
    for (int64_t i = 0; i < V; ++i) {
      if (x[i] != edge) continue;
      tie = i;
      mass += weights[i];
      if (mass >= enough) break;
    }
    least = edge, sum = mass;
  }
  static int32_t ordered(float value) {
    int32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits >= 0 ? bits : int32_t(0x80000000u - uint32_t(bits));
  }
  static float unordered(int32_t bits) {
    if (bits < 0) bits = int32_t(0x80000000u - uint32_t(bits));
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
  }

  // The token at which the running sum of max(p - q, 0) passes `draw` of its total, in the order of
  // token ids. `taken` holds (token, min(p, q)) by token; empty for p itself.
  int64_t invert(double draw, const std::vector<std::pair<int64_t, double>>& taken) const {
    double total = 1.0;
    for (const auto& [token, share] : taken) total -= share;
    // p = q up to rounding leaves nothing: then p itself is the residual's limit
    static const std::vector<std::pair<int64_t, double>> nothing;
    const auto& minus = total > 1e-9 ? taken : nothing;
    const double until = draw * (total > 1e-9 ? total : 1.0);
    double so_far = 0.0;
    int64_t last = -1;
    auto next = minus.begin();
    for (int64_t g = 0; g < int64_t(maxima.size()); ++g) {
      const int64_t end = std::min(V, (g + 1) * kColumns);
      auto after = next;
      double share = 0.0;
      while (after != minus.end() && after->first < end) share += (after++)->second;
      const double here = maxima[g] >= least ? group_sum(g) / sum - share : 0.0;
      if (here > 0.0 && so_far + here > until) {
        for (int64_t i = g * kColumns; i < end; ++i) {
          double p = weight(i);
          while (next != after && next->first < i) ++next;
          if (next != after && next->first == i) p -= next->second;
          if (p <= 0.0) continue;
          last = i;
          so_far += p;
          if (so_far > until) return i;
        }
        if (last >= 0) return last;
      }
      so_far += std::max(here, 0.0);
      next = after;
    }
    if (last >= 0) return last;
    return argmax(x, maxima.data(), V);  // rounding left the draw past the end
  }

  // argmax of log p + gumbel noise. The likeliest tokens set a score that the noise of nearly all
  // others cannot reach, which their random bits tell without a logarithm.
  int64_t perturbed(uint64_t key) const {
    std::vector<Entry> best;
    top(x, maxima.data(), V, std::min<int64_t>(32, V), best);
    double highest = -std::numeric_limits<double>::infinity();
    int64_t winner = best[0].second;
    auto look = [&](int64_t i) {
      if (!keeps(i)) return;
      const double score = (double(x[i]) - most) * scale + gumbel(key, i);
      if (score > highest || (score == highest && i < winner)) highest = score, winner = i;
    };
    for (const Entry& entry : best) look(entry.second);
    const __m512i golden = _mm512_set1_epi64(int64_t(0x9E3779B97F4A7C15ull));
    const __m512i lane = _mm512_setr_epi64(1, 2, 3, 4, 5, 6, 7, 8);
    for (int64_t g = 0; g < int64_t(maxima.size()); ++g) {
      if (maxima[g] < least) continue;
      const double need = highest - (double(maxima[g]) - most) * scale;
      const double bound = std::exp(-std::exp(-need)) * 0x1p52;  // of the 52 bits
      if (bound >= 0x1p52) continue;
      const __m512i floor = _mm512_set1_epi64(std::max<int64_t>(0, int64_t(bound) - 4096));
      const int64_t end = std::min(V, (g + 1) * kColumns);
      for (int64_t i = g * kColumns; i < end; i += 8) {
        const __m512i count = _mm512_add_epi64(lane, _mm512_set1_epi64(i));
        __m512i w =
            _mm512_add_epi64(_mm512_set1_epi64(int64_t(key)), _mm512_mullo_epi64(count, golden));
        w = _mm512_mullo_epi64(_mm512_xor_si512(w, _mm512_srli_epi64(w, 30)),
                               _mm512_set1_epi64(int64_t(0xBF58476D1CE4E5B9ull)));
        w = _mm512_mullo_epi64(_mm512_xor_si512(w, _mm512_srli_epi64(w, 27)),
                               _mm512_set1_epi64(int64_t(0x94D049BB133111EBull)));
        w = _mm512_xor_si512(w, _mm512_srli_epi64(w, 31));
        unsigned can = _mm512_cmpge_epu64_mask(_mm512_srli_epi64(w, 12), floor);
        for (; can; can &= can - 1) {
          const int64_t token = i + __builtin_ctz(can);
          if (token < end) look(token);
        }
      }
    }
    return winner;
  }
};

}  // namespace

extern "C" {

// A block's sequential head (paper §3.1, §3.2). Symbols: S sessions, B block size, V draft
// vocabulary, r Markov rank, K candidates.
struct DsparkBlock {
  float* logits;                      // [S, B, V]: the head's; the Markov bias is added in place
  const bf16* hidden;                 // [S, B, d]
  const bf16 *w1, *w2;                // [vocabulary, r]; W2 packed as in dspark_linear
  const bf16* confidence;             // [d + r]
  const int64_t *vocabulary;          // [V] draft id -> target id
  const int64_t *anchors, *rules;     // [S]; 0 greedy, 1 independent draws, 2 coupled
  const float *temperature, *top_p;   // [S]
  const int64_t* top_k;               // [S], 0: off
  const uint64_t* keys;               // [S, B] of the draws
  int64_t* tokens;                    // [S, B] out: target ids
  float* scores;                      // [S, B] out: confidence logits
  int64_t* candidate_ids;             // [S, B, K] out, for independent draws
  float* candidate_probs;             // [S, B, K] out
  int64_t S, B, V, d, r, K;
  float confidence_bias;
};

// Position by position: bias, draw, confidence; all sessions side by side.
void dspark_block(const DsparkBlock* block) {
  const DsparkBlock& b = *block;
  const int64_t groups = (b.V + kColumns - 1) / kColumns;
  std::vector<bf16> embedded(b.S * b.r);
  std::vector<float> maxima(b.S * groups);
  for (int64_t k = 0; k < b.B; ++k) {
    for (int64_t s = 0; s < b.S; ++s) {
      const int64_t previous = k ? b.tokens[s * b.B + k - 1] : b.anchors[s];
      const bf16* row = b.w1 + previous * b.r;
      std::copy(row, row + b.r, embedded.data() + s * b.r);
    }
    const Product product{embedded.data(), b.w2, nullptr, b.logits + k * b.V, true, b.V, b.r,
                          b.B * b.V, true};
#pragma omp parallel for schedule(static)
    for (int64_t g = 0; g < groups; ++g) {
      multiply_group(product, b.S, g, g + 1 < groups);
      const int64_t column = g * kColumns, width = std::min(kColumns, b.V - column);
      for (int64_t s = 0; s < b.S; ++s)
        maxima[s * groups + g] = group_max(b.logits + (s * b.B + k) * b.V + column, width);
    }
#pragma omp parallel for schedule(static) if (b.S > 1)
    for (int64_t s = 0; s < b.S; ++s) {
      const int64_t at = s * b.B + k;
      const float* logits = b.logits + at * b.V;
      const float* most = maxima.data() + s * groups;
      const bf16 *hidden = b.hidden + at * b.d, *from = embedded.data() + s * b.r;
      __m512 sum = _mm512_setzero_ps();
      for (int64_t i = 0; i < b.d; i += 16)
        sum = _mm512_fmadd_ps(load(hidden + i), load(b.confidence + i), sum);
      for (int64_t i = 0; i < b.r; i += 16)
        sum = _mm512_fmadd_ps(load(from + i), load(b.confidence + b.d + i), sum);
      b.scores[at] = _mm512_reduce_add_ps(sum) + b.confidence_bias;
      if (b.rules[s] == 0) {
        b.tokens[at] = b.vocabulary[argmax(logits, most, b.V)];
        continue;
      }
      std::vector<Entry> best;
      top(logits, most, b.V, b.K, best);
      std::vector<double> probs(best.size());
      double total = 0.0;
      for (size_t i = 0; i < best.size(); ++i) {
        const bool cut = b.top_k[s] > 0 && int64_t(i) >= b.top_k[s];
        probs[i] = cut ? 0.0 : std::exp((double(best[i].first) - best[0].first) / b.temperature[s]);
        total += probs[i];
      }
      double mass = 0.0, kept = 0.0;  // top-p: the smallest set whose mass reaches p
      for (size_t i = 0; i < best.size(); ++i) {
        const double p = probs[i] / total;
        if (i && mass >= b.top_p[s]) probs[i] = 0.0;
        mass += p;
        kept += probs[i];
      }
      size_t chosen = 0;
      if (b.rules[s] == 2) {
        double highest = -std::numeric_limits<double>::infinity();
        for (size_t i = 0; i < best.size(); ++i) {
          if (probs[i] == 0.0) continue;
          const double score =
              std::log(probs[i] / kept) + gumbel(b.keys[at], b.vocabulary[best[i].second]);
          if (score > highest) highest = score, chosen = i;
        }
      } else {
        // The law is what is shipped: drawn from as it is after rounding to float.
        float* law = b.candidate_probs + at * b.K;
        double sum_law = 0.0;
        for (size_t i = 0; i < best.size(); ++i) {
          b.candidate_ids[at * b.K + i] = b.vocabulary[best[i].second];
          law[i] = float(probs[i] / kept);
          sum_law += law[i];
        }
        const double draw = unit(mix(b.keys[at])) * sum_law;
        double below = 0.0;
        for (size_t i = 0; i < best.size(); ++i) {
          if (law[i] == 0.0f) continue;
          chosen = i;
          below += law[i];
          if (below > draw) break;
        }
      }
      b.tokens[at] = b.vocabulary[best[chosen].second];
    }
  }
}

// A step's verdicts (dspark.decoding.acceptance). Symbols: N rows with logits, S sequences, D drafts,
// K candidates. Sequence s has rows row_starts[s] .. row_starts[s + 1] - 1, one more than drafts.
struct DsparkJudge {
  const float* logits;                // [N, V]
  const int64_t *row_starts, *rules;  // [S + 1], [S]; 0 greedy, 1 rejection, 2 coupled
  const float *temperature, *top_p;   // [S]
  const int64_t* top_k;               // [S], 0: off
  const int64_t *drafts, *candidate_ids;  // [D], [D, K]
  const float* candidate_probs;           // [D, K]
  const uint64_t *accept_keys, *recover_keys, *noise_keys;  // [D], [S], [N]
  int64_t *accepted, *next;                                 // [S] out
  int64_t S, V, K;
};

void dspark_judge(const DsparkJudge* judge) {
  const DsparkJudge& j = *judge;
#pragma omp parallel for schedule(dynamic, 1) if (j.row_starts[j.S] > 1)
  for (int64_t s = 0; s < j.S; ++s) {
    const int64_t first = j.row_starts[s], rows = j.row_starts[s + 1] - first;
    int64_t stand = 0, token = 0;
    for (; stand < rows; ++stand) {
      const float* x = j.logits + (first + stand) * j.V;
      const bool drafted = stand + 1 < rows;
      const int64_t d = first - s + stand;
      if (j.rules[s] == 1) {
        const Law law(x, j.V, j.temperature[s], j.top_k[s], j.top_p[s]);
        std::vector<std::pair<int64_t, double>> taken;
        if (drafted) {
          double q = 0.0;
          for (int64_t k = 0; k < j.K; ++k) {
            const int64_t id = j.candidate_ids[d * j.K + k];
            const double share = j.candidate_probs[d * j.K + k];
            if (id == j.drafts[d]) q += share;
            if (share > 0.0) taken.emplace_back(id, share);
          }
          // u·q < p rather than u < p/q: the same test, and q = 0 needs no special case
          if (unit(mix(j.accept_keys[d])) * q < law.weight(j.drafts[d])) continue;
          std::sort(taken.begin(), taken.end());
          size_t kept = 0;  // an id that comes twice counts once, with all of its probability
          for (size_t k = 1; k < taken.size(); ++k)
            if (taken[k].first == taken[kept].first)
              taken[kept].second += taken[k].second;
            else
              taken[++kept] = taken[k];
          taken.resize(std::min(taken.size(), kept + 1));
          for (auto& [id, share] : taken) share = std::min(share, law.weight(id));
        }
        token = law.invert(unit(mix(j.recover_keys[s])), taken);
        break;
      }
      if (j.rules[s] == 0) {
        std::vector<float> maxima((j.V + kColumns - 1) / kColumns);
        for (int64_t g = 0; g < int64_t(maxima.size()); ++g)
          maxima[g] = group_max(x + g * kColumns, std::min(kColumns, j.V - g * kColumns));
        token = argmax(x, maxima.data(), j.V);
      } else {
        const Law law(x, j.V, j.temperature[s], j.top_k[s], j.top_p[s]);
        token = law.perturbed(j.noise_keys[first + stand]);
      }
      if (!drafted || token != j.drafts[d]) break;
    }
    j.accepted[s] = stand;
    j.next[s] = token;
  }
}

// residual += delta (unless null), then out = rms_norm(residual) · weight.  All [T, d].
void dspark_add_rms_norm(bf16* residual, const bf16* delta, const bf16* weight, bf16* out,
                         int64_t T, int64_t d, float eps) {
#pragma omp parallel for if (T * d > 16384)
  for (int64_t t = 0; t < T; ++t) {
    bf16* x = residual + t * d;
    if (delta)
      for (int64_t i = 0; i < d; i += 16)
        store(x + i, _mm512_add_ps(load(x + i), load(delta + t * d + i)));
    rms_norm(x, weight, out + t * d, d, eps);
  }
}

// out = x Wᵀ + bias, from [T, K] to [T, N]: W packed as [⌈N/64⌉][K/2][64][2], zero past N.
void dspark_linear(const bf16* x, const bf16* weights, const float* bias, void* out, int64_t fp32,
                   int64_t T, int64_t N, int64_t K) {
  const Product product{x, weights, bias, out, fp32 != 0, N, K, N, false};
  const int64_t groups = (N + kColumns - 1) / kColumns;
#pragma omp parallel for schedule(static)
  for (int64_t g = 0; g < groups; ++g) multiply_group(product, T, g, g + 1 < groups);
}

// out = silu(gate) · up, from [T, 2I] to [T, I].
void dspark_silu_mul(const bf16* gate_up, bf16* out, int64_t T, int64_t I) {
#pragma omp parallel for if (T * I > 16384)
  for (int64_t t = 0; t < T; ++t) {
    const bf16 *gate = gate_up + t * 2 * I, *up = gate + I;
    for (int64_t i = 0; i < I; i += 16) {
      const __m512 x = load(gate + i), one = _mm512_set1_ps(1.0f);
      const __m512 e = exp512(_mm512_sub_ps(_mm512_setzero_ps(), x));
      const __m512 silu = _mm512_div_ps(x, _mm512_add_ps(one, e));
      store(out + t * I + i, _mm512_mul_ps(silu, load(up + i)));
    }
  }
}

// Rotates queries in place, and writes rotated keys and values to their slots. Rows of qkv are
// [H·D | G·D | G·D]; with norm weights (else null), heads are normalised first (Qwen3).
void dspark_rotate_write(bf16* qkv, const float* cos, const float* sin, const bf16* q_norm,
                         const bf16* k_norm, float eps, bf16* keys, bf16* values,
                         const int64_t* slots, int64_t T, int64_t H, int64_t G, int64_t D) {
#pragma omp parallel for if (T > 8)
  for (int64_t t = 0; t < T; ++t) {
    bf16* row = qkv + t * (H + 2 * G) * D;
    const float *c = cos + t * (D / 2), *s = sin + t * (D / 2);
    for (int64_t h = 0; h < H + G; ++h) {
      bf16* head = row + h * D;
      const bf16* norm = h < H ? q_norm : k_norm;
      if (norm) rms_norm(head, norm, head, D, eps);
      rotate(head, c, s, D);
    }
    for (int64_t g = 0; g < G; ++g)
      write_kv(row + (H + g) * D, row + (H + G + g) * D, keys, values, slots[t], g, G, D);
  }
}

// Writes keys and values [T, G, D] to their slots.
void dspark_write(const bf16* key, const bf16* value, bf16* keys, bf16* values,
                  const int64_t* slots, int64_t T, int64_t G, int64_t D) {
#pragma omp parallel for if (T > 8)
  for (int64_t t = 0; t < T; ++t)
    for (int64_t g = 0; g < G; ++g)
      write_kv(key + (t * G + g) * D, value + (t * G + g) * D, keys, values, slots[t], g, G, D);
}

// Attention of T rows of S sequences over their pages; tables is [S, table_width]. Returns 0, or 1
// for a head width that was not compiled.
int dspark_attention(const bf16* query, int64_t query_stride, const bf16* keys, const bf16* values,
                     bf16* out, const int64_t* reach, const int64_t* row_starts,
                     const int32_t* tables, int64_t table_width, const float* sinks, int64_t S,
                     int64_t H, int64_t G, int64_t D, float scale, float softcap, int64_t window) {
  const Attention a{query, query_stride, keys, values, out, reach, sinks, H, G, scale, softcap,
                    window};
  switch (D) {
    case 32: attend_all<32>(a, row_starts, tables, table_width, S); return 0;
    case 64: attend_all<64>(a, row_starts, tables, table_width, S); return 0;
    case 96: attend_all<96>(a, row_starts, tables, table_width, S); return 0;
    case 128: attend_all<128>(a, row_starts, tables, table_width, S); return 0;
    case 256: attend_all<256>(a, row_starts, tables, table_width, S); return 0;
  }
  return 1;
}

// One decoder layer of Llama's shape. Linear weights as in dspark_linear.
struct DsparkLayer {
  const bf16 *input_norm, *qkv, *q_norm, *k_norm, *out, *mlp_norm, *gate_up, *down;
  const float *qkv_bias, *out_bias, *gate_up_bias, *down_bias;
  bf16 *keys, *values;
  int64_t window;
};

// What all layers of one step share. Scratch: h [T, d], qkv [T, (H+2G)·D], mixed [T, H·D],
// gate_up [T, 2I], act [T, I].
struct DsparkStep {
  bf16 *x, *delta, *h, *qkv, *mixed, *gate_up, *act;  // x, delta [T, d]
  const float *cos, *sin;                             // [T, D/2]
  const int64_t *reach, *slots, *row_starts;
  const int32_t* tables;
  int64_t table_width, T, S, d, H, G, D, I;
  float eps, scale;
};

// Runs `count` layers. x holds the residual; delta what the layer before has yet to add to it
// (fresh: nothing), and afterwards what the last layer here has.
int dspark_layers(const DsparkStep* step, const DsparkLayer* layers, int64_t count, int64_t fresh) {
  const DsparkStep& s = *step;
  for (int64_t i = 0; i < count; ++i) {
    const DsparkLayer& l = layers[i];
    dspark_add_rms_norm(s.x, fresh && i == 0 ? nullptr : s.delta, l.input_norm, s.h, s.T, s.d,
                        s.eps);
    dspark_linear(s.h, l.qkv, l.qkv_bias, s.qkv, 0, s.T, (s.H + 2 * s.G) * s.D, s.d);
    dspark_rotate_write(s.qkv, s.cos, s.sin, l.q_norm, l.k_norm, s.eps, l.keys, l.values, s.slots,
                        s.T, s.H, s.G, s.D);
    if (dspark_attention(s.qkv, (s.H + 2 * s.G) * s.D, l.keys, l.values, s.mixed, s.reach,
                         s.row_starts, s.tables, s.table_width, nullptr, s.S, s.H, s.G, s.D,
                         s.scale, 0.0f, l.window))
      return 1;
    dspark_linear(s.mixed, l.out, l.out_bias, s.delta, 0, s.T, s.d, s.H * s.D);
    dspark_add_rms_norm(s.x, s.delta, l.mlp_norm, s.h, s.T, s.d, s.eps);
    dspark_linear(s.h, l.gate_up, l.gate_up_bias, s.gate_up, 0, s.T, 2 * s.I, s.d);
    dspark_silu_mul(s.gate_up, s.act, s.T, s.I);
    dspark_linear(s.act, l.down, l.down_bias, s.delta, 0, s.T, s.d, s.I);
  }
  return 0;
}

}  // extern "C"
