// The inner loops, once per instruction set. Everything else in this folder is portable C++ that calls them through these tables.
#pragma once

#include <cstdint>

namespace mmcompress::cpu {

constexpr int kRows = 96;  // rows of a tile of products
constexpr int kCols = 64;  // columns of a tile of products
constexpr int kStrip = 6;  // rows that share the registers
constexpr int kDots = 16;  // rows that one call of `dots` may take

enum class Element { f32, bf16, f16 };  // the order of mmcompress::Type

// Dot products of rows that are given as 32-bit words: a float, or a pair of bfloat16.
struct Products {
  int panel;  // columns per packed panel; packed layout [panel][word][column]
  // c[i * kCols + j] = a_i . b_j for up to kRows rows and `panels` panels of b. With `strips` a is packed as [strip][word][kStrip
  // rows].
  void (*tile)(const float* a, int64_t a_stride, bool strips, int rows, const float* b, int panels, int64_t words, float* c);
  // out[i * out_stride + j] = a_i . b_j for rows at any address, without packing.
  void (*dots)(const float* const* a, int num_a, const float* const* b, int num_b, int64_t words, float* out, int64_t out_stride);
};

struct Level {
  const char* name;
  Products f32;
  const Products* bf16;  // null: bfloat16 rows are widened to float first
  // value_j = c_j scale_j + bias_j; where the largest exceeds *best, it and its column (the first) are written.
  void (*argmax)(const float* c, const float* scale, const float* bias, int columns, int64_t first_column, float* best,
                 int64_t* index);
  float (*square)(const void* row, Element type, int64_t width);                          // sum of squares
  void (*widen)(const void* row, Element type, int64_t width, float* out);                // to float
  void (*add)(const void* row, Element type, int64_t width, float weight, float* sum);    // sum += weight row
  void (*round)(const float* sum, float factor, Element type, int64_t width, void* out);  // out = sum factor, nearest even
};

const Level& scalar_level();
const Level* avx2_level();  // null where the processor lacks it
const Level* avx512_level();
const Level& level();        // the one in use
int set_level(int highest);  // 0 scalar, 1 AVX2, 2 AVX-512; returns what is in use

}  // namespace mmcompress::cpu
