// Sixteen floats in two AVX2 registers. There is no bf16 arithmetic: the halves of a pair, which are
// the upper halves of floats, are widened and multiplied one after the other.

#pragma once

constexpr int kBlock = 1;        // vectors of outputs side by side in packed weights
constexpr int kAccumulators = 6; // vectors of sums that leave registers for all else
constexpr int kRows = 3;         // rows that share what is read

struct Floats {
  __m256 a, b;
};
struct Mask {
  __m256 a, b;
};
using Factor = float;  // what rows are multiplied with pairs as
struct Pairs {
  Floats first, second;
};

inline Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 widened(const bf16* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
inline Floats load(const bf16* p) { return {widened(p), widened(p + 8)}; }
inline void store(float* p, Floats x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
// To the nearest bf16, of two equally near to the even one; what is no number stays none.
inline __m256i rounded(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(up, nan, is_nan), 16);
}
inline void store(bf16* p, Floats x) {
  const __m256i packed = _mm256_packus_epi32(rounded(x.a), rounded(x.b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

// Lanes from .. to - 1.
inline Mask lanes(int64_t from, int64_t to) {
  const __m256i low = _mm256_set1_epi32(int(std::clamp<int64_t>(from, 0, 16)) - 1);
  const __m256i high = _mm256_set1_epi32(int(std::clamp<int64_t>(to, 0, 16)));
  const auto within = [&](__m256i lane) {
    return _mm256_castsi256_ps(
        _mm256_and_si256(_mm256_cmpgt_epi32(lane, low), _mm256_cmpgt_epi32(high, lane)));
  };
  return {within(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
          within(_mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15))};
}
inline Mask both(Mask m, Mask n) { return {_mm256_and_ps(m.a, n.a), _mm256_and_ps(m.b, n.b)}; }
inline Mask without(Mask m, Mask n) {
  return {_mm256_andnot_ps(n.a, m.a), _mm256_andnot_ps(n.b, m.b)};
}
inline Mask no_less(Floats x, Floats y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ)};
}
inline Mask equal(Floats x, Floats y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_EQ_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_EQ_OQ)};
}
inline Floats choose(Mask m, Floats yes, Floats no) {
  return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)};
}
inline Floats load_some(const float* p, Mask m, float rest) {
  const Floats read{_mm256_maskload_ps(p, _mm256_castps_si256(m.a)),
               _mm256_maskload_ps(p + 8, _mm256_castps_si256(m.b))};
  return choose(m, read, all(rest));
}
inline void store_some(float* p, Floats x, Mask m) {
  _mm256_maskstore_ps(p, _mm256_castps_si256(m.a), x.a);
  _mm256_maskstore_ps(p + 8, _mm256_castps_si256(m.b), x.b);
}
inline void store_some(bf16* p, Floats x, Mask m) {
  const int kept = _mm256_movemask_ps(m.a) | _mm256_movemask_ps(m.b) << 8;
  if (kept == 0xffff) return store(p, x);
  bf16 whole[16];
  store(whole, x);
  for (int i = 0; i < 16; ++i)
    if (kept >> i & 1) p[i] = whole[i];
}

inline Floats operator+(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats operator-(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats operator*(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats operator/(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats fma(Floats x, Floats y, Floats z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Floats fma(Floats x, float y, Floats z) { return fma(x, all(y), z); }
inline Floats fms(Floats x, Floats y, Floats z) {
  return {_mm256_fmsub_ps(x.a, y.a, z.a), _mm256_fmsub_ps(x.b, y.b, z.b)};
}
inline Floats max(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline float sum(Floats x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
inline float most(Floats x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

inline __m256 exp(__m256 x) {
  const __m256 some = _mm256_cmp_ps(x, _mm256_set1_ps(-87.0f), _CMP_GT_OQ);
  const __m256 y = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-87.0f)), _mm256_set1_ps(88.0f));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(y, _mm256_set1_ps(1.44269504f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), y);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(kExp[0]);
  for (int i = 1; i < 6; ++i) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(kExp[i]));
  p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
  const __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_and_ps(some,
                       _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23))));
}
// e^x to about 2 ulp; 0 below the smallest normal number, -inf included.
inline Floats exp(Floats x) { return {exp(x.a), exp(x.b)}; }

inline Pairs load_pairs(const bf16* p) {
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16));
  const __m256i upper = _mm256_set1_epi32(int(0xffff0000u));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)),
           _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(a, upper)),
           _mm256_castsi256_ps(_mm256_and_si256(b, upper))}};
}
// sums[r][i] += pairs[i][0] · x[r][0] + pairs[i][1] · x[r][1], rows of x `stride` apart. All first
// halves come before all second ones: additions to one sum then wait for each other the least.
template <int R>
inline void accumulate(Floats (&sums)[R], const bf16* pairs, const Factor* x, int64_t stride) {
  const Pairs w = load_pairs(pairs);
  for (int r = 0; r < R; ++r) sums[r] = fma(w.first, x[r * stride], sums[r]);
  for (int r = 0; r < R; ++r) sums[r] = fma(w.second, x[r * stride + 1], sums[r]);
}
inline void to_factors(const bf16* from, Factor* to, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(to + i, load(from + i));
  for (; i < n; ++i) {
    const uint32_t bits = uint32_t(from[i]) << 16;
    __builtin_memcpy(to + i, &bits, 4);
  }
}
