// The inner loops, once per instruction set. Everything else in this folder is portable C++ that calls them through these tables.
#pragma once

#include <cstdint>

namespace mmcompress::cpu {

constexpr int kRows = 96;  // rows of a tile of products
constexpr int kCols = 64;  // columns of a tile of products
constexpr int kStrip = 6;  // rows that share the registers
constexpr int kDots = 16;  // rows that one call of `dots` may take
constexpr int kNarrow = 16;

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

// A row in eight bits (coarse.h): z = weight row - center is near scale q, with q in -127 … 127.
struct Code {
  float scale, length, error, lift;  // length |z|, error |z - scale q|, lift z . center
  int32_t sum;                       // of q
};

constexpr int kTerms = 6;  // arrays of kCols per group of coded columns: 128 sum (int32), scale, lift, error, length, bias
struct RowTerms {
  float scale, length, error, weight, slack;
};

struct Level {
  const char* name;
  Products f32;
  const Products* bf16;   // null: bfloat16 rows are widened to float first
  const Products* bytes;  // of codes, four to a word, a with q + 128 and b with q; results are int32 bits. Null: no fast instruction
  // The code of a row; its bytes are q xor flip. `less` is -center; it and `work` are as long as whole vectors of the row.
  Code (*code)(const void* row, Element type, int64_t width, float weight, const float* less, float* work, uint8_t flip,
               uint8_t* bytes);
  // c[i * kNarrow + j] = a_i . b_j for up to kStrip rows of codes at any address and one panel [word][kNarrow] of columns.
  void (*narrow)(const float* const* a, int rows, const float* panel, int64_t words, float* c);
  // Upper bounds of `columns` values (whole vectors) from products of codes; returns the largest.
  float (*bound)(const float* c, const float* terms, const RowTerms& row, int columns, float* up);
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
