// AVX2, FMA and F16C: tiles of 6 rows by 16 columns.
#include <immintrin.h>

#include "level.h"

namespace mmcompress::cpu {

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace {

struct Avx2 {
  using Sum = __m256;
  using Data = __m256;
  static constexpr int kLanes = 8, kVectors = 2;
  static Sum zero() { return _mm256_setzero_ps(); }
  static Sum set(float x) { return _mm256_set1_ps(x); }
  static Data load(const float* p) { return _mm256_loadu_ps(p); }
  static Data broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Sum load_sum(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Sum x) { _mm256_storeu_ps(p, x); }
  static Sum multiply_add(Data a, Data b, Sum sum) { return _mm256_fmadd_ps(a, b, sum); }
  static Sum plus(Sum a, Sum b) { return _mm256_add_ps(a, b); }
  static Sum times(Sum a, Sum b) { return _mm256_mul_ps(a, b); }
  static Sum larger(Sum a, Sum b) { return _mm256_max_ps(a, b); }
  static float total(Sum x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static float largest(Sum x) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
  template <Element T>
  static Sum as_float(const void* row, int64_t i) {
    if constexpr (T == Element::f32) return _mm256_loadu_ps(static_cast<const float*>(row) + i);
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(row) + 2 * i));
    if constexpr (T == Element::f16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  template <Element T>
  static void from_float(void* row, int64_t i, Sum x) {
    if constexpr (T == Element::f32) {
      _mm256_storeu_ps(static_cast<float*>(row) + i, x);
    } else {
      __m128i half;
      if constexpr (T == Element::f16) {
        half = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
      } else {
        const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
        half = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
      }
      _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<char*>(row) + 2 * i), half);
    }
  }
};

#include "level_impl.h"

constexpr Level kLevel = make_level<Avx2>("avx2");

}  // namespace
#pragma GCC pop_options

const Level* avx2_level() {
  const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return has ? &kLevel : nullptr;
}

}  // namespace mmcompress::cpu
