// Products of rows with packed weights (linear.h) by the processor's matrix unit: AMX with bf16.
//
// A block of packed weights is what the unit reads: sixteen pairs of k by sixteen outputs are a
// tile. Sixteen rows are multiplied in the time of one, so that a step of some dozen rows takes
// little longer than reading the weights does.
//
// The unit adds up each row for itself, from the first k to the last: no result depends on how many
// rows there are or on how they are divided among tiles.

#pragma once

constexpr int kTileRows = 16;
constexpr int kTileDepth = 32;  // k of one tile
constexpr int kLine = 32;       // elements of a cache line
static_assert(kWidth == 64, "a block is four tiles wide");

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 hold the sums of `rows` rows, 4 the rows' factors, 5 to 7 weights.
inline void configure_tiles(int64_t rows) {
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) {
    shapes.bytes[tile] = 64;
    shapes.rows[tile] = tile < 5 ? uint8_t(rows) : kTileRows;
  }
  _tile_loadconfig(&shapes);
}

// Rows from `row` times one block, fetching `lines` cache lines from `next` on meanwhile.
inline void multiply_tile(const Product& p, int64_t row, int64_t rows, int64_t block,
                          const bf16* next, int64_t lines) {
  const bf16* x = p.x + row * p.K;
  const bf16* weights = p.weights + block * kWidth * p.K;
  const int64_t steps = p.K / kTileDepth, stride = 2 * kWidth * sizeof(bf16);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < steps; ++i, x += kTileDepth, weights += kWidth * kTileDepth) {
    for (int64_t l = lines * i / steps; l < lines * (i + 1) / steps; ++l)
      _mm_prefetch(reinterpret_cast<const char*>(next + l * kLine), _MM_HINT_T1);
    _tile_loadd(4, x, p.K * int64_t(sizeof(bf16)));
    _tile_loadd(5, weights, stride);
    _tile_loadd(6, weights + 32, stride);
    _tile_loadd(7, weights + 64, stride);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(5, weights + 96, stride);
    _tile_dpbf16ps(1, 4, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 4, 5);
  }
  alignas(64) float sums[kTileRows * kWidth];
  _tile_stored(0, sums, kWidth * sizeof(float));
  _tile_stored(1, sums + 16, kWidth * sizeof(float));
  _tile_stored(2, sums + 32, kWidth * sizeof(float));
  _tile_stored(3, sums + 48, kWidth * sizeof(float));
  for (int64_t r = 0; r < rows; ++r)
    for (int w = 0; w < kWidth; w += 16) {
      const int64_t from = block * kWidth + w, to = (row + r) * p.stride + from;
      const Mask kept = lanes(0, p.N - from);
      Floats sum = load(sums + r * kWidth + w);
      if (p.add) sum = sum + load_some(static_cast<const float*>(p.out) + to, kept, 0.0f);
      if (p.bias) sum = sum + load(p.bias + from);
      if (p.fp32)
        store_some(static_cast<float*>(p.out) + to, sum, kept);
      else
        store_some(static_cast<bf16*>(p.out) + to, sum, kept);
    }
}

// Blocks first .. last - 1, for all rows. Rows that fit one tile stream the weights from memory, for
// which the processor's own look-ahead is enough. Where several tiles of rows share a block, all but
// the first work from the cache: each fetches a share of the block that comes next.
inline void multiply_tiles(const Product& p, int64_t first, int64_t last) {
  const int64_t size = kWidth * p.K, all_lines = size / kLine;
  const int64_t chunks = (p.T + kTileRows - 1) / kTileRows;  // of equal size, but for one row
  int64_t configured = 0;
  for (int64_t block = first; block < last; ++block)
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t row = p.T * c / chunks, rows = p.T * (c + 1) / chunks - row;
      if (rows != configured) configure_tiles(configured = rows);
      const bool ahead = chunks > 1 && block + 1 < last;
      const int64_t from = ahead ? all_lines * c / chunks : 0;
      const int64_t lines = ahead ? all_lines * (c + 1) / chunks - from : 0;
      multiply_tile(p, row, rows, block, p.weights + (block + 1) * size + from * kLine, lines);
    }
  _tile_release();
}
