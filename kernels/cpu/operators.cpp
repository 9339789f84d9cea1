// The operators of a decoder layer around its matrix products, and those products, in bf16 with fp32
// arithmetic, for x86-64: with AVX-512 BF16 (DSPARK_AVX512 is defined), with AMX besides (DSPARK_AMX
// too), or with AVX2. Called through a C interface (dspark.kernels.cpu.operators), which has checked
// every shape: nothing is checked again here.
//
// Every output row is a function of its own inputs alone: the order of its additions depends
// neither on the rows beside it nor on the number of threads. Decoding a token alone and verifying
// it in a block of drafts therefore give the same bits.
//
// Symbols: T rows, d width of the model, H query heads, G KV heads, D head width, I MLP width,
// S sequences.

#include <immintrin.h>
#include <omp.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

extern "C" int dspark_supported() {
  __builtin_cpu_init();
#ifdef DSPARK_AMX
  // Linux gives a process the tiles' registers when it asks, before its first use of them.
  constexpr long kRequest = 0x1023, kTiles = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequest, kTiles) != 0) return 0;
#endif
#ifdef DSPARK_AVX512
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16");
#else
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
}

#if defined(DSPARK_AMX)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16")
#elif defined(DSPARK_AVX512)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#else
#pragma GCC target("avx2,fma")
#endif

namespace {

using bf16 = uint16_t;

constexpr int kPage = 16;  // tokens
constexpr float kNothing = -std::numeric_limits<float>::infinity();
// e^r = 1 + r + r² · (polynomial), for |r| <= ln 2 / 2
constexpr float kExp[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                          4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};

#ifdef DSPARK_AVX512
#include "vector_avx512.h"
#else
#include "vector_avx2.h"
#endif

#include "attention.h"
#include "law.h"
#include "linear.h"

// x[0..width) times 1/rms(x) times weight; width is a multiple of 16.
inline void rms_norm(const bf16* x, const bf16* weight, bf16* out, int64_t width, float eps) {
  Floats squares = zero();
  for (int64_t i = 0; i < width; i += 16) {
    const Floats v = load(x + i);
    squares = fma(v, v, squares);
  }
  const Floats scale = all(1.0f / std::sqrt(sum(squares) / float(width) + eps));
  for (int64_t i = 0; i < width; i += 16) store(out + i, load(x + i) * scale * load(weight + i));
}

inline void rotate(bf16* x, const float* cos, const float* sin, int64_t width) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const Floats a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(x + i, fms(a, c, b * s));
    store(x + half + i, fma(b, c, a * s));
  }
}

}  // namespace

extern "C" {

// Puts the team's threads on CPUs of their own. They wait for each other hundreds of times in a step,
// spinning; two of them on one CPU turn each wait into a time slice of the kernel's, and some kernels
// (of small virtual machines) never move a thread that does not sleep. Nothing stays pinned.
void dspark_spread() {
  const int threads = omp_get_max_threads();
  cpu_set_t allowed;
  if (threads < 2 || sched_getaffinity(0, sizeof allowed, &allowed)) return;
  std::vector<int> at(threads, -1), to(threads, -1);
#pragma omp parallel
  at[omp_get_thread_num()] = sched_getcpu();
  bool crowded = false;
  cpu_set_t taken;
  CPU_ZERO(&taken);
  for (int i = 0; i < threads; ++i) {
    if (at[i] < 0) continue;
    if (CPU_ISSET(at[i], &taken)) {
      to[i] = 0;
      crowded = true;
    }
    CPU_SET(at[i], &taken);
  }
  if (!crowded) return;
  int cpu = 0;
  for (int i = 0; i < threads; ++i) {
    if (to[i] < 0) continue;
    while (cpu < CPU_SETSIZE && (CPU_ISSET(cpu, &taken) || !CPU_ISSET(cpu, &allowed))) ++cpu;
    to[i] = cpu < CPU_SETSIZE ? cpu++ : -1;  // with fewer CPUs than threads, some must share
  }
#pragma omp parallel
  {
    const int target = to[omp_get_thread_num()];
    cpu_set_t own, one;
    if (target >= 0 && !sched_getaffinity(0, sizeof own, &own)) {
      CPU_ZERO(&one);
      CPU_SET(target, &one);
      sched_setaffinity(0, sizeof one, &one);
      sched_setaffinity(0, sizeof own, &own);
    }
  }
}

// Vectors of outputs that lie side by side in packed weights.
int dspark_block_vectors() { return kBlock; }

// A block's sequential head (paper §3.1, §3.2). Symbols: S sessions, B block size, V draft
// vocabulary, r Markov rank, K candidates.
struct DsparkBlock {
  float* logits;                      // [S, B, V]: the head's; the Markov bias is added in place
  const bf16* hidden;                 // [S, B, d]
  const bf16 *w1, *w2;                // [vocabulary, r]; W2 packed (linear.h)
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
  std::vector<bf16> embedded(b.S * b.r);
  for (int64_t k = 0; k < b.B; ++k) {
    for (int64_t s = 0; s < b.S; ++s) {
      const int64_t previous = k ? b.tokens[s * b.B + k - 1] : b.anchors[s];
      const bf16* row = b.w1 + previous * b.r;
      std::copy(row, row + b.r, embedded.data() + s * b.r);
    }
    multiply_all({embedded.data(), b.w2, nullptr, b.logits + k * b.V, true, b.S, b.V, b.r,
                  b.B * b.V, true});
#pragma omp parallel for schedule(static) if (b.S > 1)
    for (int64_t s = 0; s < b.S; ++s) {
      const int64_t at = s * b.B + k;
      const float* logits = b.logits + at * b.V;
      const std::vector<float> maxima = group_maxima(logits, b.V);
      const bf16 *hidden = b.hidden + at * b.d, *from = embedded.data() + s * b.r;
      Floats score = zero();
      for (int64_t i = 0; i < b.d; i += 16)
        score = fma(load(hidden + i), load(b.confidence + i), score);
      for (int64_t i = 0; i < b.r; i += 16)
        score = fma(load(from + i), load(b.confidence + b.d + i), score);
      b.scores[at] = sum(score) + b.confidence_bias;
      if (b.rules[s] == 0) {
        b.tokens[at] = b.vocabulary[argmax(logits, maxima.data(), b.V)];
        continue;
      }
      std::vector<Entry> best;
      top(logits, maxima.data(), b.V, b.K, best);
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
        const std::vector<float> maxima = group_maxima(x, j.V);
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
        store(x + i, load(x + i) + load(delta + t * d + i));
    rms_norm(x, weight, out + t * d, d, eps);
  }
}

// out = x Wᵀ + bias, from [T, K] to [T, N], with W packed (linear.h).
void dspark_linear(const bf16* x, const bf16* weights, const float* bias, void* out, int64_t fp32,
                   int64_t T, int64_t N, int64_t K) {
  multiply_all({x, weights, bias, out, fp32 != 0, T, N, K, N, false});
}

// out = silu(gate) · up, from [T, 2I] to [T, I].
void dspark_silu_mul(const bf16* gate_up, bf16* out, int64_t T, int64_t I) {
#pragma omp parallel for if (T * I > 16384)
  for (int64_t t = 0; t < T; ++t) {
    const bf16 *gate = gate_up + t * 2 * I, *up = gate + I;
    for (int64_t i = 0; i < I; i += 16) {
      const Floats x = load(gate + i);
      const Floats silu = x / (all(1.0f) + exp(zero() - x));
      store(out + t * I + i, silu * load(up + i));
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
                     int64_t H, int64_t G, int64_t D, float scale, float softcap,
                     const int64_t* seen_from) {
  const Attention a{query, query_stride, keys, values, out, reach, sinks, H, G, scale, softcap,
                    seen_from};
  switch (D) {
    case 32: attend_all<32>(a, row_starts, tables, table_width, S); return 0;
    case 64: attend_all<64>(a, row_starts, tables, table_width, S); return 0;
    case 96: attend_all<96>(a, row_starts, tables, table_width, S); return 0;
    case 128: attend_all<128>(a, row_starts, tables, table_width, S); return 0;
    case 256: attend_all<256>(a, row_starts, tables, table_width, S); return 0;
  }
  return 1;
}

// One decoder layer of Llama's shape. Linear weights are packed (linear.h).
struct DsparkLayer {
  const bf16 *input_norm, *qkv, *q_norm, *k_norm, *out, *mlp_norm, *gate_up, *down;
  const float *qkv_bias, *out_bias, *gate_up_bias, *down_bias;
  bf16 *keys, *values;
  const int64_t* seen_from;  // [T] or null
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
                         s.scale, 0.0f, l.seen_from))
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
