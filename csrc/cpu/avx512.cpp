// AVX-512: tiles of 6 rows by 64 columns; with AVX512_BF16 pairs of bfloat16 are multiplied as they are, with float sums.
// MMCOMPRESS_EMULATE_AVX512 builds the same code from AVX2 halves, to test it on processors without AVX-512.
#include <immintrin.h>

#include "level.h"

namespace mmcompress::cpu {

#pragma GCC push_options
#ifdef MMCOMPRESS_EMULATE_AVX512
#pragma GCC target("avx2,fma,f16c")
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#endif
namespace {

#ifdef MMCOMPRESS_EMULATE_AVX512
#include "emulate_avx512.h"
#endif

struct Avx512 {
  using Sum = __m512;
  using Data = __m512;
  static constexpr int kLanes = 16, kVectors = 4;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum set(float x) { return _mm512_set1_ps(x); }
  static Data load(const float* p) { return _mm512_loadu_ps(p); }
  static Data broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Sum load_sum(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Sum x) { _mm512_storeu_ps(p, x); }
  static Sum multiply_add(Data a, Data b, Sum sum) { return _mm512_fmadd_ps(a, b, sum); }
  static Sum plus(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  static Sum times(Sum a, Sum b) { return _mm512_mul_ps(a, b); }
  static Sum larger(Sum a, Sum b) { return _mm512_max_ps(a, b); }
  static float total(Sum x) { return _mm512_reduce_add_ps(x); }
  static float largest(Sum x) { return _mm512_reduce_max_ps(x); }
  template <Element T>
  static Sum as_float(const void* row, int64_t i) {
    if constexpr (T == Element::f32) return _mm512_loadu_ps(static_cast<const float*>(row) + i);
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const char*>(row) + 2 * i));
    if constexpr (T == Element::f16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  template <Element T>
  static void from_float(void* row, int64_t i, Sum x) {
    if constexpr (T == Element::f32) {
      _mm512_storeu_ps(static_cast<float*>(row) + i, x);
    } else {
      __m256i half;
      if constexpr (T == Element::f16) {
        half = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
      } else {
        const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<char*>(row) + 2 * i), half);
    }
  }
};

struct Avx512Bf16 : Avx512 {  // words are pairs of bfloat16
  using Data = __m512bh;
  static Data load(const float* p) { return (__m512bh)_mm512_loadu_ps(p); }
  static Data broadcast(const float* p) { return (__m512bh)_mm512_set1_ps(*p); }
  static Sum multiply_add(Data a, Data b, Sum sum) { return _mm512_dpbf16_ps(sum, a, b); }
};

#include "level_impl.h"

constexpr Products kBf16 = products<Avx512Bf16>();
constexpr Level kLevel = make_level<Avx512>("avx512");
constexpr Level kLevelBf16 = make_level<Avx512>("avx512", &kBf16);

}  // namespace
#pragma GCC pop_options

const Level* avx512_level() {
#ifdef MMCOMPRESS_EMULATE_AVX512
  return &kLevelBf16;
#else
  const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512dq") && avx2_level() != nullptr;
  return !has ? nullptr : __builtin_cpu_supports("avx512bf16") ? &kLevelBf16 : &kLevel;
#endif
}

}  // namespace mmcompress::cpu
