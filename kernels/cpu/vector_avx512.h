// Sixteen floats in one AVX-512 register, and products of bf16 pairs by the processor's own
// instruction.

#pragma once

constexpr int kBlock = 4;         // vectors of outputs side by side in packed weights
constexpr int kAccumulators = 24; // vectors of sums that leave registers for all else
constexpr int kRows = 6;          // rows that share what is read

struct Floats {
  __m512 v;
};
using Mask = __mmask16;
using Factor = bf16;  // what rows are multiplied with pairs as
using Pairs = __m512bh;
using Pair = __m512bh;

inline Floats zero() { return {_mm512_setzero_ps()}; }
inline Floats all(float x) { return {_mm512_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Floats load(const bf16* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x.v); }
inline void store(bf16* p, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x.v));
}

// Lanes from .. to - 1.
inline Mask lanes(int64_t from, int64_t to) {
  const auto below = [](int64_t n) { return n >= 16 ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1; };
  return Mask(below(to) & ~below(from));
}
inline Mask both(Mask a, Mask b) { return a & b; }
inline Mask without(Mask a, Mask b) { return a & Mask(~b); }
inline Mask no_less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
inline Mask equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
inline Floats choose(Mask m, Floats yes, Floats no) { return {_mm512_mask_blend_ps(m, no.v, yes.v)}; }
inline Floats load_some(const float* p, Mask m, float rest) {
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(rest), m, p)};
}
inline void store_some(float* p, Floats x, Mask m) { _mm512_mask_storeu_ps(p, m, x.v); }
inline void store_some(bf16* p, Floats x, Mask m) {
  _mm256_mask_storeu_epi16(p, m, (__m256i)_mm512_cvtneps_pbh(x.v));
}

inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats fms(Floats a, Floats b, Floats c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline float sum(Floats x) { return _mm512_reduce_add_ps(x.v); }
inline float most(Floats x) { return _mm512_reduce_max_ps(x.v); }

// e^x to about 2 ulp; 0 below the smallest normal number, -inf included.
inline Floats exp(Floats x) {
  const __mmask16 some = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-87.0f), _CMP_GT_OQ);
  const __m512 y = _mm512_min_ps(x.v, _mm512_set1_ps(88.7f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(y, _mm512_set1_ps(1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), y);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(kExp[0]);
  for (int i = 1; i < 6; ++i) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kExp[i]));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return {_mm512_maskz_scalef_ps(some, p, n)};
}

inline Pairs load_pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline Pair pair(const Factor* p) {
  int two;
  __builtin_memcpy(&two, p, 4);
  return (__m512bh)_mm512_set1_epi32(two);
}
inline Floats dot(Floats sums, Pairs pairs, Pair two) {
  return {_mm512_dpbf16_ps(sums.v, pairs, two)};
}
// sums[r][i] += pairs[i][0] · x[r][0] + pairs[i][1] · x[r][1], rows of x `stride` apart.
template <int R>
inline void accumulate(Floats (&sums)[R], const bf16* pairs, const Factor* x, int64_t stride) {
  const Pairs w = load_pairs(pairs);
  for (int r = 0; r < R; ++r) sums[r] = dot(sums[r], w, pair(x + r * stride));
}
inline void to_factors(const bf16* from, Factor* to, int64_t n) { std::copy(from, from + n, to); }
