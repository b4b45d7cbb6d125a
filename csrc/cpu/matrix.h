// Rows prepared for products, packed columns, and the tiled product with an epilogue. Results never depend on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <utility>
#include <vector>

#include "../common.h"
#include "level.h"

namespace mmcompress::cpu {

using torch::stable::parallel_for;

inline Element element_of(Type type) { return static_cast<Element>(type); }

// Memory that is not cleared first.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(static_cast<T*>(::operator new[](std::max<int64_t>(n, 1) * sizeof(T), std::align_val_t(64)))) {}
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() {
    if (data_) ::operator delete[](data_, std::align_val_t(64));
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

// Rows as 32-bit words (floats, or bfloat16 pairs where the level multiplies them): used in place if possible, else widened into a
// copy.
class Matrix {
 public:
  // `pairs` false: always floats. `norms` false: reciprocal norms and squares are not computed.
  explicit Matrix(const Rows& x, bool pairs = true, bool norms = true);

  const float* row(int64_t i) const { return data_ + i * stride_; }
  int64_t num() const { return num_; }
  int64_t stride() const { return stride_; }
  int64_t words() const { return words_; }
  const Products& products() const { return *products_; }
  float reciprocal(int64_t i) const { return reciprocal_[i]; }  // 1 / norm, 0 for a zero row
  float square(int64_t i) const { return square_[i]; }
  int64_t first_bad() const { return first_bad_; }  // lowest row that is not finite, or -1

 private:
  const Products* products_;
  const float* data_;
  int64_t num_, stride_, words_, first_bad_ = -1;
  Buffer<float> copy_, square_, reciprocal_;
};

// Rows packed as columns: groups of kCols columns in panels, with a scale and a bias per column (beyond the last one 0 and -infinity).
class Columns {
 public:
  Columns(const Products& products, int64_t words, int64_t capacity);
  // row(j), scale(j), bias(j) for j < num; columns before `from` are there already.
  template <class Row, class Scale, class Bias>
  void fill(int64_t num, Row row, Scale scale, Bias bias, int64_t from = 0) {
    num_ = num;
    const int64_t panel = products_->panel, panels = (num + panel - 1) / panel;
    parallel_for(from / panel, panels, 1, [&](int64_t begin, int64_t end) {
      std::vector<const float*> rows(panel);
      for (int64_t p = begin; p < end; ++p) {
        const int64_t count = std::min(panel, num - p * panel);
        for (int64_t j = 0; j < count; ++j) rows[j] = row(p * panel + j);
        pack(rows.data(), count, p);
      }
    });
    for (int64_t j = from; j < (num + kCols - 1) / kCols * kCols; ++j) {
      scale_[j] = j < num ? scale(j) : 0;
      bias_[j] = j < num ? bias(j) : -std::numeric_limits<float>::infinity();
    }
  }
  int64_t num() const { return num_; }
  int64_t groups() const { return (num_ + kCols - 1) / kCols; }
  int columns(int64_t group) const {  // of whole panels
    const int64_t left = num_ - group * kCols, panel = products_->panel;
    return static_cast<int>(std::min<int64_t>(kCols, (left + panel - 1) / panel * panel));
  }
  const float* group(int64_t group) const { return packed_.data() + group * kCols * words_; }
  const float* scale(int64_t group) const { return scale_.data() + group * kCols; }
  const float* bias(int64_t group) const { return bias_.data() + group * kCols; }

 private:
  void pack(const float* const* rows, int64_t count, int64_t panel);
  const Products* products_;
  int64_t words_, num_ = 0;
  Buffer<float> packed_, scale_, bias_;
};

// Rows as strips of kStrip rows, [strip][word][row].
void pack_strips(const float* const* rows, int num, int64_t words, float* packed);
template <class A>
void strips_of(const A& a, int64_t first, int num, float* packed) {
  const float* rows[kRows];
  for (int r = 0; r < num; ++r) rows[r] = a.row(first + r);
  pack_strips(rows, num, a.words(), packed);
}

// For tiles of rows [begin, end) by groups of columns: f(first row, rows, group, products [rows][kCols]). Parallel over blocks of
// rows; a block sees its groups from left to right, starting at first_group(first row).
template <class A, class F, class G>
void tiles(const A& a, int64_t begin, int64_t end, const Columns& b, G first_group, F f) {
  const bool strips = b.groups() >= 4;  // packing the rows pays when they are read several times
  parallel_for(0, (end - begin + kRows - 1) / kRows, 1, [&](int64_t first, int64_t last) {
    alignas(64) float c[kRows * kCols];
    Buffer<float> packed(strips ? kRows * a.words() : 0);
    for (int64_t block = first; block < last; ++block) {
      const int64_t row = begin + block * kRows;
      const int rows = static_cast<int>(std::min<int64_t>(kRows, end - row));
      if (strips) strips_of(a, row, rows, packed.data());
      for (int64_t group = first_group(row); group < b.groups(); ++group) {
        a.products().tile(strips ? packed.data() : a.row(row), a.stride(), strips, rows, b.group(group),
                          b.columns(group) / a.products().panel, a.words(), c);
        f(row, rows, group, c);
      }
    }
  });
}
template <class A, class F>
void tiles(const A& a, int64_t begin, int64_t end, const Columns& b, F f) {
  tiles(a, begin, end, b, [](int64_t) { return int64_t{0}; }, f);
}

// f(item) for all items: parallel over them if there are several, else left to the loops inside.
template <class F>
void for_items(int64_t num, F f) {
  if (num == 1) return f(int64_t{0});
  parallel_for(0, num, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) f(item);
  });
}

// A squared distance (or half of one) below this share of the squared norms is rounding noise.
inline float snap(float distance, float limit) { return distance > kTie * limit ? distance : 0.0f; }

inline void report(const Tensor& bad, int64_t position, int64_t row) { out<int64_t>(bad)[position] = row; }

}  // namespace mmcompress::cpu
