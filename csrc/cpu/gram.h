// Products of all rows of an item with each other, a chunk of rows at a time where the whole matrix would be large.
#pragma once

#include "matrix.h"

namespace mmcompress::cpu {

constexpr int64_t kGramBytes = int64_t{256} << 20;

// A chunk [begin, end) of the Gram matrix of rows [first, first + n), stored row by row with stride n.
class Gram {
 public:
  Gram(const Matrix& x, int64_t first, int64_t n)
      : x_(x),
        first_(first),
        n_(n),
        chunk_(std::max<int64_t>(1, std::min(n, kGramBytes / (4 * n)))),
        data_(chunk_ * n),
        columns_(x.products(), x.words(), n) {
    columns_.fill(n, [&](int64_t j) { return x.row(first + j); }, [](int64_t) { return 1.0f; }, [](int64_t) { return 0.0f; });
  }
  bool whole() const { return chunk_ == n_; }

  // f(row, its products with all rows) for every row, in parallel; products are computed again in every call unless the matrix is
  // whole.
  template <class F>
  void each(F f) {
    for (int64_t begin = 0; begin < n_; begin += chunk_) {
      const int64_t end = std::min(n_, begin + chunk_);
      if (!whole()) {
        compute(begin, end);
      } else if (!done_) {
        compute_symmetric();
        done_ = true;
      }
      parallel_for(begin, end, 16, [&](int64_t a, int64_t b) {
        for (int64_t i = a; i < b; ++i) f(i, data_.data() + (i - begin) * n_);
      });
    }
  }

 private:
  void compute(int64_t begin, int64_t end) {
    tiles(x_, first_ + begin, first_ + end, columns_, [&](int64_t row, int rows, int64_t group, const float* c) {
      const int64_t count = std::min<int64_t>(kCols, n_ - group * kCols);
      for (int r = 0; r < rows; ++r)
        std::memcpy(data_.data() + (row - first_ - begin + r) * n_ + group * kCols, c + r * kCols, count * sizeof(float));
    });
  }
  // Only tiles on and right of the diagonal; each is also written to its mirror image. Products are commutative: both are the same
  // bits.
  void compute_symmetric() {
    const auto first_group = [&](int64_t row) { return (row - first_) / kCols; };
    tiles(x_, first_, first_ + n_, columns_, first_group, [&](int64_t row, int rows, int64_t group, const float* c) {
      const int64_t i0 = row - first_, j0 = group * kCols, count = std::min<int64_t>(kCols, n_ - j0);
      for (int64_t j = std::max(j0, i0); j < j0 + count; ++j)  // what lies left of i0 came from an earlier block of rows
        for (int r = 0; r < rows; ++r) data_[(i0 + r) * n_ + j] = c[r * kCols + (j - j0)];
      for (int64_t j = std::max(j0, i0 + rows); j < j0 + count; ++j)
        for (int r = 0; r < rows; ++r) data_[j * n_ + i0 + r] = c[r * kCols + (j - j0)];
    });
  }

  const Matrix& x_;
  int64_t first_, n_, chunk_;
  bool done_ = false;
  Buffer<float> data_;
  Columns columns_;
};

}  // namespace mmcompress::cpu
