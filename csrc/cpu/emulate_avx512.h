// The 512-bit intrinsics that avx512.cpp uses, from two 256-bit halves. For tests only.

struct Wide {
  __m256 low, high;
};
struct WideInt {
  __m256i low, high;
};
struct WidePairs {
  __m256i low, high;
  WidePairs() = default;
  explicit WidePairs(Wide x) : low(_mm256_castps_si256(x.low)), high(_mm256_castps_si256(x.high)) {}
};
#define __m512 Wide
#define __m512i WideInt
#define __m512bh WidePairs
#define _mm512_setzero_ps e_zero
#define _mm512_set1_ps e_set1
#define _mm512_loadu_ps e_load
#define _mm512_storeu_ps e_store
#define _mm512_fmadd_ps e_fmadd
#define _mm512_add_ps e_add
#define _mm512_mul_ps e_mul
#define _mm512_max_ps e_max
#define _mm512_reduce_add_ps e_reduce_add
#define _mm512_reduce_max_ps e_reduce_max
#define _mm512_cvtph_ps e_cvtph
#define _mm512_cvtps_ph e_cvtps_ph
#define _mm512_cvtepu16_epi32 e_cvtepu16
#define _mm512_cvtepi32_epi16 e_cvtepi32_epi16
#define _mm512_castsi512_ps e_as_float
#define _mm512_castps_si512 e_as_int
#define _mm512_slli_epi32 e_slli
#define _mm512_srli_epi32 e_srli
#define _mm512_and_si512 e_and
#define _mm512_add_epi32 e_add_int
#define _mm512_set1_epi32 e_set1_int
#define _mm512_dpbf16_ps e_dpbf16
#define _mm512_dpbusd_epi32 e_dpbusd
#define _mm512_sub_epi32 e_sub_int
#define _mm512_cvtepi32_ps e_cvt
#define _mm512_reduce_add_epi32 e_reduce_add_int

inline Wide e_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Wide e_set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Wide e_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void e_store(float* p, Wide x) {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}
inline Wide e_fmadd(Wide a, Wide b, Wide c) { return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)}; }
inline Wide e_add(Wide a, Wide b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Wide e_mul(Wide a, Wide b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Wide e_max(Wide a, Wide b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline float e_reduce_add(Wide x) {
  float v[8], s = 0;
  _mm256_storeu_ps(v, _mm256_add_ps(x.low, x.high));
  for (float f : v) s += f;
  return s;
}
inline float e_reduce_max(Wide x) {
  float v[8];
  _mm256_storeu_ps(v, _mm256_max_ps(x.low, x.high));
  float s = v[0];
  for (float f : v) s = f > s ? f : s;
  return s;
}
inline Wide e_cvtph(__m256i h) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
}
#define e_cvtps_ph(x, mode) _mm256_set_m128i(_mm256_cvtps_ph((x).high, mode), _mm256_cvtps_ph((x).low, mode))
inline WideInt e_cvtepu16(__m256i h) {
  return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(h)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(h, 1))};
}
inline __m256i e_cvtepi32_epi16(WideInt x) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(x.low, x.high), 0xd8); }
inline Wide e_as_float(WideInt x) { return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)}; }
inline WideInt e_as_int(Wide x) { return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }
inline WideInt e_slli(WideInt x, int n) { return {_mm256_slli_epi32(x.low, n), _mm256_slli_epi32(x.high, n)}; }
inline WideInt e_srli(WideInt x, int n) { return {_mm256_srli_epi32(x.low, n), _mm256_srli_epi32(x.high, n)}; }
inline WideInt e_and(WideInt a, WideInt b) { return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)}; }
inline WideInt e_add_int(WideInt a, WideInt b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
inline WideInt e_set1_int(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline __m256 e_half_pairs(__m256 sum, __m256i a, __m256i b) {
  const __m256i top = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  const __m256 a0 = _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), a1 = _mm256_castsi256_ps(_mm256_and_si256(a, top));
  const __m256 b0 = _mm256_castsi256_ps(_mm256_slli_epi32(b, 16)), b1 = _mm256_castsi256_ps(_mm256_and_si256(b, top));
  return _mm256_fmadd_ps(a0, b0, _mm256_fmadd_ps(a1, b1, sum));
}
inline Wide e_dpbf16(Wide sum, WidePairs a, WidePairs b) {
  return {e_half_pairs(sum.low, a.low, b.low), e_half_pairs(sum.high, a.high, b.high)};
}
inline WideInt e_sub_int(WideInt a, WideInt b) { return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)}; }
inline Wide e_cvt(WideInt x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
inline int32_t e_reduce_add_int(WideInt x) {
  int32_t v[8], s = 0;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(v), _mm256_add_epi32(x.low, x.high));
  for (int32_t i : v) s += i;
  return s;
}
inline __m256i e_half_bytes(__m256i sum, __m256i a, __m256i b) {  // a unsigned, b signed
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8))));
}
inline WideInt e_dpbusd(WideInt sum, WideInt a, WideInt b) {
  return {e_half_bytes(sum.low, a.low, b.low), e_half_bytes(sum.high, a.high, b.high)};
}
