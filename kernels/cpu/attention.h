// Attention of short runs of query rows over paged keys and values, and what writes the pages.
//
// Pages hold 16 tokens in pairs of neighbours, as `dot` wants them:
//   keys   [page][G][D/2][16][2]   16 tokens side by side, width in pairs
//   values [page][G][8][D][2]      width side by side, tokens in pairs

#pragma once

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

struct Attention {
  const bf16* query;  // row t, head h at query + t * query_stride + h * D
  int64_t query_stride;
  const bf16 *keys, *values;
  bf16* out;             // [T, H, D]
  const int64_t* reach;  // [T] the last position that a row sees
  const float* sinks;    // [H] or null
  int64_t H, G;
  float scale, softcap;  // softcap 0: none
  const int64_t* seen_from;  // [T] the first position that a row sees, or null: all
};

struct Scratch {
  std::vector<float> scores;    // [R, keys]
  std::vector<Factor> weights;  // [R, keys]

  void reserve(int64_t size) {
    if (int64_t(scores.size()) >= size) return;
    scores.resize(size);
    weights.resize(size);
  }
};

// Vectors of the output that R rows sum up together, a divisor of all D/16.
constexpr int output_chunk(int vectors, int rows) {
  int chunk = std::min(vectors, kAccumulators / rows);
  while (vectors % chunk) --chunk;
  return chunk;
}

// R query rows of one sequence and one KV head: (row, head) pairs that share their keys.
template <int D, int R>
void attend(const Attention& a, const int32_t* pages, const int64_t* rows, const int64_t* heads,
            int64_t g, Scratch& scratch) {
  Factor query[R][D];
  int64_t low[R], high[R];
  int64_t first = std::numeric_limits<int64_t>::max(), last = 0;
  for (int r = 0; r < R; ++r) {
    to_factors(a.query + rows[r] * a.query_stride + heads[r] * D, query[r], D);
    high[r] = a.reach[rows[r]] + 1;
    low[r] = a.seen_from ? a.seen_from[rows[r]] : 0;
    first = std::min(first, low[r]);
    last = std::max(last, high[r]);
  }
  const int64_t begin = first / kPage, end = (last + kPage - 1) / kPage;
  const int64_t length = (end - begin) * kPage;
  scratch.reserve(R * length);
  float* scores = scratch.scores.data();
  Factor* weights = scratch.weights.data();
  for (int64_t p = begin; p < end; ++p) {
    const bf16* k = a.keys + (int64_t(pages[p]) * a.G + g) * D * kPage;
    Floats dots[R];
    for (int r = 0; r < R; ++r) dots[r] = zero();
    const bf16* next = p + 1 < end ? a.keys + (int64_t(pages[p + 1]) * a.G + g) * D * kPage : k;
    for (int i = 0; i < D / 2; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(next + i * 2 * kPage), _MM_HINT_T0);
      accumulate<R>(dots, k + i * 2 * kPage, query[0] + 2 * i, D);
    }
    for (int r = 0; r < R; ++r) {
      Floats s = dots[r] * all(a.scale);
      if (a.softcap > 0.0f) {  // cap · tanh(s / cap), tanh x = 1 - 2 / (e^2x + 1)
        const Floats e = exp(s * all(2.0f / a.softcap));
        s = all(a.softcap) * (all(1.0f) - all(2.0f) / (e + all(1.0f)));
      }
      const Mask seen = lanes(low[r] - p * kPage, high[r] - p * kPage);
      store(scores + r * length + (p - begin) * kPage, choose(seen, s, all(kNothing)));
    }
  }
  float total[R];
  for (int r = 0; r < R; ++r) {
    const float* s = scores + r * length;
    Floats highest = all(kNothing);
    for (int64_t i = 0; i < length; i += 16) highest = max(highest, load(s + i));
    float top = most(highest);
    if (a.sinks) top = std::max(top, a.sinks[heads[r]]);
    Floats sums = zero();
    for (int64_t i = 0; i < length; i += 16) {
      const Floats e = exp(load(s + i) - all(top));
      sums = sums + e;
      store(weights + r * length + i, e);
    }
    total[r] = sum(sums);
    if (a.sinks) total[r] += std::exp(a.sinks[heads[r]] - top);
  }
  constexpr int C = output_chunk(D / 16, R);
  for (int from = 0; from < D / 16; from += C) {
    Floats out[C][R];
    for (int c = 0; c < C; ++c)
      for (int r = 0; r < R; ++r) out[c][r] = zero();
    for (int64_t p = begin; p < end; ++p) {
      const bf16* v = a.values + (int64_t(pages[p]) * a.G + g) * D * kPage + from * 32;
      const bf16* next = a.values + (int64_t(pages[std::min(p + 1, end - 1)]) * a.G + g) * D * kPage;
      for (int j = 0; j < kPage / 2; ++j) {
        if (from == 0)
          for (int c = 0; c < D / 16; ++c)
            _mm_prefetch(reinterpret_cast<const char*>(next + (j * D + c * 16) * 2), _MM_HINT_T0);
        for (int c = 0; c < C; ++c)
          accumulate<R>(out[c], v + (j * D + c * 16) * 2, weights + (p - begin) * kPage + 2 * j,
                        length);
      }
    }
    for (int r = 0; r < R; ++r) {
      bf16* to = a.out + (rows[r] * a.H + heads[r]) * D + from * 16;
      for (int c = 0; c < C; ++c) store(to + c * 16, out[c][r] * all(1.0f / total[r]));
    }
  }
}

template <int D>
void attend_some(const Attention& a, const int32_t* pages, const int64_t* rows,
                 const int64_t* heads, int64_t count, int64_t g, Scratch& scratch) {
  while (count > 0) {
    int64_t took = 1;
    if (count >= 6 && kRows >= 6) {
      attend<D, std::min(6, kRows)>(a, pages, rows, heads, g, scratch);
      took = 6;
    } else if (count >= 3) {
      attend<D, 3>(a, pages, rows, heads, g, scratch);
      took = 3;
    } else if (count >= 2) {
      attend<D, 2>(a, pages, rows, heads, g, scratch);
      took = 2;
    } else {
      attend<D, 1>(a, pages, rows, heads, g, scratch);
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
    static thread_local Scratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < count; ++t) {
      const Task& task = tasks[t];
      int64_t rows[kTask], heads[kTask];
      for (int64_t i = 0; i < task.count; ++i) {
        rows[i] = row_starts[task.sequence] + (task.first + i) / fold;
        heads[i] = task.g * fold + (task.first + i) % fold;
      }
      attend_some<D>(a, tables + task.sequence * table_width, rows, heads, task.count, task.g,
                     scratch);
    }
  }
}
