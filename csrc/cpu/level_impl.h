// The inner loops as templates over a vector type S, included by one source file per instruction set, inside an anonymous namespace
// and that set's target pragma. (No other header may be included there: inline functions of the standard library would be compiled for
// it.)
//
// S has: Sum (float accumulator), Data (a vector of words), kLanes, kVectors (per panel), zero, load, broadcast, multiply_add, sum.

template <class S, int R, bool Strip>
void tile_rows(const float* a, int64_t a_stride, const float* b, int64_t words, float* c, bool add) {
  typename S::Sum sum[R][S::kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < S::kVectors; ++v) sum[r][v] = S::zero();
  for (int64_t w = 0; w < words; ++w) {
    typename S::Data column[S::kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < S::kVectors; ++v) column[v] = S::load(b + (w * S::kVectors + v) * S::kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const typename S::Data row = S::broadcast(Strip ? a + w * kStrip + r : a + r * a_stride + w);
#pragma GCC unroll 4
      for (int v = 0; v < S::kVectors; ++v) sum[r][v] = S::multiply_add(row, column[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < S::kVectors; ++v) {
      float* to = c + r * kCols + v * S::kLanes;
      S::store(to, add ? S::plus(S::load_sum(to), sum[r][v]) : sum[r][v]);
    }
}

template <class S, bool Strip>
void tile_strip(const float* a, int64_t a_stride, int rows, const float* b, int64_t words, float* c, bool add) {
  switch (rows) {
    case 1: return tile_rows<S, 1, Strip>(a, a_stride, b, words, c, add);
    case 2: return tile_rows<S, 2, Strip>(a, a_stride, b, words, c, add);
    case 3: return tile_rows<S, 3, Strip>(a, a_stride, b, words, c, add);
    case 4: return tile_rows<S, 4, Strip>(a, a_stride, b, words, c, add);
    case 5: return tile_rows<S, 5, Strip>(a, a_stride, b, words, c, add);
    default: return tile_rows<S, 6, Strip>(a, a_stride, b, words, c, add);
  }
}

template <class S>
void tile(const float* a, int64_t a_stride, bool strips, int rows, const float* b, int panels, int64_t words, float* c) {
  constexpr int64_t kBlock = 256;  // words: 16 KiB of a 16-column panel stay in the first-level cache
  constexpr int kPanel = S::kVectors * S::kLanes;
  for (int64_t w = 0; w < words; w += kBlock) {
    const int64_t block = words - w < kBlock ? words - w : kBlock;
    for (int p = 0; p < panels; ++p)
      for (int r = 0; r < rows; r += kStrip) {
        const int count = rows - r < kStrip ? rows - r : kStrip;
        const float* panel = b + (p * words + w) * kPanel;
        float* to = c + r * kCols + p * kPanel;
        if (strips) {
          tile_strip<S, true>(a + r * words + w * kStrip, 0, count, panel, block, to, w > 0);
        } else {
          tile_strip<S, false>(a + r * a_stride + w, a_stride, count, panel, block, to, w > 0);
        }
      }
  }
}

template <class S, int R>
void narrow_rows(const float* const* a, const float* panel, int64_t words, float* c) {
  static_assert(S::kLanes == kNarrow, "a panel is one vector wide");
  typename S::Sum sum[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sum[r] = S::zero();
  for (int64_t w = 0; w < words; ++w) {
    const typename S::Data column = S::load(panel + w * kNarrow);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r] = S::multiply_add(S::broadcast(a[r] + w), column, sum[r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) S::store(c + r * kNarrow, sum[r]);
}

template <class S>
void narrow(const float* const* a, int rows, const float* panel, int64_t words, float* c) {
  switch (rows) {
    case 1: return narrow_rows<S, 1>(a, panel, words, c);
    case 2: return narrow_rows<S, 2>(a, panel, words, c);
    case 3: return narrow_rows<S, 3>(a, panel, words, c);
    case 4: return narrow_rows<S, 4>(a, panel, words, c);
    case 5: return narrow_rows<S, 5>(a, panel, words, c);
    default: return narrow_rows<S, 6>(a, panel, words, c);
  }
}

template <class S, int A, int B>
void dot_rows(const float* const* a, const float* const* b, int64_t words, float* out, int64_t out_stride) {
  typename S::Sum sum[A][B];
#pragma GCC unroll 4
  for (int i = 0; i < A; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < B; ++j) sum[i][j] = S::zero();
  int64_t w = 0;
  for (; w + S::kLanes <= words; w += S::kLanes) {
    typename S::Data column[B];
#pragma GCC unroll 4
    for (int j = 0; j < B; ++j) column[j] = S::load(b[j] + w);
#pragma GCC unroll 4
    for (int i = 0; i < A; ++i) {
      const typename S::Data row = S::load(a[i] + w);
#pragma GCC unroll 4
      for (int j = 0; j < B; ++j) sum[i][j] = S::multiply_add(row, column[j], sum[i][j]);
    }
  }
  if (w < words) {  // the last, partial vector is filled up with zeros
    float padded[A + B][S::kLanes] = {};
    for (int i = 0; i < A; ++i) __builtin_memcpy(padded[i], a[i] + w, (words - w) * sizeof(float));
    for (int j = 0; j < B; ++j) __builtin_memcpy(padded[A + j], b[j] + w, (words - w) * sizeof(float));
    for (int i = 0; i < A; ++i)
      for (int j = 0; j < B; ++j) sum[i][j] = S::multiply_add(S::load(padded[i]), S::load(padded[A + j]), sum[i][j]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < A; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < B; ++j) out[i * out_stride + j] = S::total(sum[i][j]);
}

template <class S, int A>
void dot_columns(const float* const* a, const float* const* b, int num_b, int64_t words, float* out, int64_t out_stride) {
  int j = 0;
  for (; j + 3 <= num_b; j += 3) dot_rows<S, A, 3>(a, b + j, words, out + j, out_stride);
  if (num_b - j == 1) dot_rows<S, A, 1>(a, b + j, words, out + j, out_stride);
  if (num_b - j == 2) dot_rows<S, A, 2>(a, b + j, words, out + j, out_stride);
}

template <class S>
void dots(const float* const* a, int num_a, const float* const* b, int num_b, int64_t words, float* out, int64_t out_stride) {
  int i = 0;
  for (; i + 4 <= num_a; i += 4) dot_columns<S, 4>(a + i, b, num_b, words, out + i * out_stride, out_stride);
  switch (num_a - i) {
    case 1: dot_columns<S, 1>(a + i, b, num_b, words, out + i * out_stride, out_stride); break;
    case 2: dot_columns<S, 2>(a + i, b, num_b, words, out + i * out_stride, out_stride); break;
    case 3: dot_columns<S, 3>(a + i, b, num_b, words, out + i * out_stride, out_stride); break;
    default: break;
  }
}

template <class S>
void argmax(const float* c, const float* scale, const float* bias, int columns, int64_t first_column, float* best, int64_t* index) {
  float value[kCols];
  typename S::Sum largest = S::set(*best);
  for (int j = 0; j < columns; j += S::kLanes) {
    const typename S::Sum v = S::plus(S::times(S::load_sum(c + j), S::load_sum(scale + j)), S::load_sum(bias + j));
    S::store(value + j, v);
    largest = S::larger(v, largest);
  }
  const float top = S::largest(largest);
  if (!(top > *best)) return;
  for (int j = 0; j < columns; ++j)
    if (value[j] == top) {
      *best = top;
      *index = first_column + j;
      return;
    }
}

// Rows in their own type. Tails go through single elements.

inline float element(const void* row, Element type, int64_t i) {
  if (type == Element::f32) {
    float x;
    __builtin_memcpy(&x, static_cast<const char*>(row) + 4 * i, 4);
    return x;
  }
  uint16_t bits;
  __builtin_memcpy(&bits, static_cast<const char*>(row) + 2 * i, 2);
  uint32_t wide;
  float x;
  if (type == Element::bf16) {
    wide = static_cast<uint32_t>(bits) << 16;
    __builtin_memcpy(&x, &wide, 4);
    return x;
  }
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent == 0) {  // zero and subnormal numbers: fraction 2^-24
    x = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    return sign ? -x : x;
  }
  wide = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
  __builtin_memcpy(&x, &wide, 4);
  return x;
}

inline void set_element(void* row, Element type, int64_t i, float x) {
  if (type == Element::f32) {
    __builtin_memcpy(static_cast<char*>(row) + 4 * i, &x, 4);
    return;
  }
  uint32_t wide;
  __builtin_memcpy(&wide, &x, 4);
  uint16_t bits;
  if (type == Element::bf16) {
    bits = static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
  } else {
    const uint32_t sign = (wide >> 16) & 0x8000, magnitude = wide & 0x7fffffff;
    if (magnitude >= 0x47800000) {  // 65536 and above, infinity, NaN
      bits = static_cast<uint16_t>(sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00));
    } else if (magnitude < 0x38800000) {  // subnormal: adding 0.5 rounds to a multiple of 2^-24
      float positive;
      __builtin_memcpy(&positive, &magnitude, 4);
      positive += 0.5f;
      uint32_t shifted;
      __builtin_memcpy(&shifted, &positive, 4);
      bits = static_cast<uint16_t>(sign | (shifted - 0x3f000000));
    } else {
      const uint32_t rounded = magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1);
      bits = static_cast<uint16_t>(sign | (rounded >> 13));
    }
  }
  __builtin_memcpy(static_cast<char*>(row) + 2 * i, &bits, 2);
}

template <class S, Element T>
float square_as(const void* row, int64_t width) {
  constexpr int L = S::kLanes;
  typename S::Sum sum[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
  int64_t i = 0;
  for (; i + 4 * L <= width; i += 4 * L)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const typename S::Sum x = S::template as_float<T>(row, i + v * L);
      sum[v] = S::multiply_add(x, x, sum[v]);
    }
  float total = S::total(S::plus(S::plus(sum[0], sum[1]), S::plus(sum[2], sum[3])));
  for (; i < width; ++i) {
    const float x = element(row, T, i);
    total += x * x;
  }
  return total;
}

template <class S, Element T>
void widen_as(const void* row, int64_t width, float* out) {
  int64_t i = 0;
  for (; i + S::kLanes <= width; i += S::kLanes) S::store(out + i, S::template as_float<T>(row, i));
  for (; i < width; ++i) out[i] = element(row, T, i);
}

template <class S, Element T>
void add_as(const void* row, int64_t width, float weight, float* sum) {
  const typename S::Sum w = S::set(weight);
  int64_t i = 0;
  for (; i + S::kLanes <= width; i += S::kLanes)
    S::store(sum + i, S::plus(S::times(w, S::template as_float<T>(row, i)), S::load_sum(sum + i)));
  for (; i < width; ++i) sum[i] = weight * element(row, T, i) + sum[i];
}

template <class S, Element T>
void round_as(const float* sum, float factor, int64_t width, void* out) {
  const typename S::Sum f = S::set(factor);
  int64_t i = 0;
  for (; i + S::kLanes <= width; i += S::kLanes) S::template from_float<T>(out, i, S::times(f, S::load_sum(sum + i)));
  for (; i < width; ++i) set_element(out, T, i, sum[i] * factor);
}

template <class S>
float square(const void* row, Element type, int64_t width) {
  if (type == Element::f32) return square_as<S, Element::f32>(row, width);
  if (type == Element::bf16) return square_as<S, Element::bf16>(row, width);
  return square_as<S, Element::f16>(row, width);
}
template <class S>
void widen(const void* row, Element type, int64_t width, float* out) {
  if (type == Element::f32) widen_as<S, Element::f32>(row, width, out);
  if (type == Element::bf16) widen_as<S, Element::bf16>(row, width, out);
  if (type == Element::f16) widen_as<S, Element::f16>(row, width, out);
}
template <class S>
void add(const void* row, Element type, int64_t width, float weight, float* sum) {
  if (type == Element::f32) add_as<S, Element::f32>(row, width, weight, sum);
  if (type == Element::bf16) add_as<S, Element::bf16>(row, width, weight, sum);
  if (type == Element::f16) add_as<S, Element::f16>(row, width, weight, sum);
}
template <class S>
void round(const float* sum, float factor, Element type, int64_t width, void* out) {
  if (type == Element::f32) round_as<S, Element::f32>(sum, factor, width, out);
  if (type == Element::bf16) round_as<S, Element::bf16>(sum, factor, width, out);
  if (type == Element::f16) round_as<S, Element::f16>(sum, factor, width, out);
}

template <class S>
Code code(const void* row, Element type, int64_t width, float weight, const float* less, float* work, uint8_t flip, uint8_t* bytes) {
  constexpr float kMagic = 12582912.0f;  // adding it rounds to an integer, which stands in the lowest bits
  const int64_t padded = (width + S::kLanes - 1) / S::kLanes * S::kLanes;
  widen<S>(row, type, width, work);
  for (int64_t i = width; i < padded; ++i) work[i] = 0;
  const typename S::Sum w = S::set(weight), minus = S::set(-1);
  typename S::Sum most = S::zero(), square = S::zero(), lift = S::zero();
  for (int64_t i = 0; i < padded; i += S::kLanes) {
    const typename S::Sum to = S::load_sum(less + i), z = S::multiply_add(w, S::load_sum(work + i), to);
    most = S::larger(most, S::larger(z, S::times(z, minus)));
    square = S::multiply_add(z, z, square);
    lift = S::multiply_add(z, to, lift);
    S::store(work + i, z);
  }
  const float top = S::largest(most), inverse = top > 1e-30f ? 127 / top : 0, scale = top > 1e-30f ? top / 127 : 0;
  const typename S::Sum factor = S::set(inverse), back = S::set(-scale), magic = S::set(kMagic), unmagic = S::set(-kMagic);
  typename S::Sum error = S::zero(), sum = S::zero();
  for (int64_t i = 0; i < padded; i += S::kLanes) {
    const typename S::Sum z = S::load_sum(work + i), shifted = S::plus(S::times(z, factor), magic), q = S::plus(shifted, unmagic);
    const typename S::Sum e = S::multiply_add(back, q, z);
    error = S::multiply_add(e, e, error);
    sum = S::plus(sum, q);
    S::store(work + i, shifted);
  }
  for (int64_t i = 0; i < width; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, work + i, 4);
    bytes[i] = static_cast<uint8_t>(bits & 255) ^ flip;
  }
  for (int64_t i = width; i % 4; ++i) bytes[i] = 0;
  constexpr float kUp = 1.00001f;  // the rounding of the sums
  return {scale, __builtin_sqrtf(S::total(square)) * kUp, __builtin_sqrtf(S::total(error)) * kUp, -S::total(lift),
          top < 3e38f ? static_cast<int32_t>(S::total(sum)) : 0};
}

template <class S>
constexpr Products products() {
  return {S::kVectors * S::kLanes, tile<S>, dots<S>};
}
template <class S>
constexpr Level make_level(const char* name) {
  return {name, products<S>(), nullptr, nullptr, nullptr, nullptr, nullptr, argmax<S>, square<S>, widen<S>, add<S>, round<S>};
}
