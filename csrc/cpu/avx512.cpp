// AVX-512: tiles of 6 rows by 64 columns; with AVX512_BF16 and AVX512_VNNI (which come together)
// pairs of bfloat16 are multiplied as they are, with float sums, and bytes with integer sums.
// MMCOMPRESS_EMULATE_AVX512 builds the same code from AVX2 halves, to test it on processors without AVX-512.
#include <immintrin.h>

#include "level.h"

namespace mmcompress::cpu {

#pragma GCC push_options
#ifdef MMCOMPRESS_EMULATE_AVX512
#pragma GCC target("avx2,fma,f16c")
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,f16c")
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

struct Avx512Bytes : Avx512 {  // words are four bytes, sums are integers
  using Sum = __m512i;
  using Data = __m512i;
  static Sum zero() { return _mm512_castps_si512(_mm512_setzero_ps()); }
  static Data load(const float* p) { return _mm512_castps_si512(_mm512_loadu_ps(p)); }
  static Data broadcast(const float* p) { return _mm512_castps_si512(_mm512_set1_ps(*p)); }
  static Sum load_sum(const float* p) { return load(p); }
  static void store(float* p, Sum x) { _mm512_storeu_ps(p, _mm512_castsi512_ps(x)); }
  static Sum multiply_add(Data a, Data b, Sum sum) { return _mm512_dpbusd_epi32(sum, a, b); }
  static Sum plus(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
  static float total(Sum x) {
    const int32_t sum = _mm512_reduce_add_epi32(x);
    float bits;
    __builtin_memcpy(&bits, &sum, 4);
    return bits;
  }
};

#include "level_impl.h"

float bound(const float* c, const float* terms, const RowTerms& row, int columns, float* up) {
  const __m512 scale = _mm512_set1_ps(row.scale), length = _mm512_set1_ps(row.length), error = _mm512_set1_ps(row.error);
  const __m512 weight = _mm512_set1_ps(row.weight), slack = _mm512_set1_ps(row.slack);
  __m512 most = _mm512_set1_ps(-__builtin_inff());
  for (int j = 0; j < columns; j += Avx512::kLanes) {
    const auto term = [&](int i) { return _mm512_loadu_ps(terms + i * kCols + j); };
    const __m512 q = _mm512_cvtepi32_ps(_mm512_sub_epi32(Avx512Bytes::load(c + j), _mm512_castps_si512(term(0))));
    __m512 v = _mm512_fmadd_ps(q, _mm512_mul_ps(scale, term(1)), _mm512_add_ps(term(2), slack));
    v = _mm512_fmadd_ps(length, term(3), v);
    v = _mm512_fmadd_ps(error, term(4), v);
    v = _mm512_fmadd_ps(weight, term(5), v);
    most = _mm512_max_ps(v, most);
    _mm512_storeu_ps(up + j, v);
  }
  return _mm512_reduce_max_ps(most);
}

constexpr Products kBf16 = products<Avx512Bf16>(), kBytes = products<Avx512Bytes>();
constexpr Level kLevel = make_level<Avx512>("avx512");
constexpr Level with_short_types() {
  Level level = kLevel;
  level.bf16 = &kBf16;
  level.bytes = &kBytes;
  level.code = code<Avx512>;
  level.narrow = narrow<Avx512Bytes>;
  level.bound = bound;
  return level;
}
constexpr Level kLevelShort = with_short_types();

}  // namespace
#pragma GCC pop_options

const Level* avx512_level() {
#ifdef MMCOMPRESS_EMULATE_AVX512
  return &kLevelShort;
#else
  const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512dq") && avx2_level() != nullptr;
  const bool more = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  return !has ? nullptr : more ? &kLevelShort : &kLevel;
#endif
}

}  // namespace mmcompress::cpu
