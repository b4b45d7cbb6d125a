// Screening: rows in eight bits give every dot product within a proven bound at a quarter of the cost of floats; only the products
// that the bound leaves open are computed exactly, so the decisions are those of the exact products.
//
// A row x with weight w (its reciprocal norm, or 1) is z = w x - center = scale q + rest. With Cauchy and Schwarz
//   |z_i . z_j - scale_i scale_j q_i . q_j| <= |z_i| |rest_j| + |rest_i| (|z_j| + |rest_j|),
// and w_i x_i . w_j x_j = z_i . z_j + z_i . center + z_j . center + |center|^2. Any center is right; near the mean the rests are
// small.
#pragma once

#include "matrix.h"

namespace mmcompress::cpu {

class Coarse {
 public:
  // Does screening pay for products of so many rows?
  static bool pays(int64_t num_a, int64_t num_b, int64_t width) {
    return level().bytes && num_a >= 64 && num_b >= 64 && width >= 64 && width <= (1 << 16);  // integer sums within 31 bits
  }
  // Minus the mean of some weighted rows.
  template <class Weight>
  static std::vector<float> center(const Rows& x, Weight weight) {
    const int64_t step = std::max<int64_t>(1, x.num / 64), padded = (x.width + kMultiple - 1) / kMultiple * kMultiple;
    std::vector<float> sum(padded);
    for (int64_t i = 0; i < x.num; i += step) level().add(x.row(i), element_of(x.type), x.width, weight(i), sum.data());
    for (float& s : sum) s /= -static_cast<float>(std::max<int64_t>(1, (x.num + step - 1) / step));
    return sum;
  }
  // `flip` kLeft for the left side of products, kRight for the right one.
  static constexpr uint8_t kLeft = 0x80, kRight = 0;
  template <class Weight>
  Coarse(const Rows& x, Weight weight, const std::vector<float>& less, uint8_t flip)
      : num_(x.num), words_((x.width + 3) / 4), bytes_(num_ * words_), codes_(num_) {
    center_ = std::sqrt(level().square(less.data(), Element::f32, x.width));
    rounding_ = static_cast<float>(x.width / 16 + 64) * 1.2e-7f;
    parallel_for(0, num_, std::max<int64_t>(1, (1 << 16) / x.width), [&](int64_t begin, int64_t end) {
      Buffer<float> work(static_cast<int64_t>(less.size()));
      for (int64_t i = begin; i < end; ++i)
        codes_[i] = level().code(x.row(i), element_of(x.type), x.width, weight(i), less.data(), work.data(), flip,
                                 reinterpret_cast<uint8_t*>(bytes_.data() + i * words_));
    });
  }
  const float* row(int64_t i) const { return bytes_.data() + i * words_; }
  const Code& code(int64_t i) const { return codes_[i]; }
  int64_t num() const { return num_; }
  int64_t stride() const { return words_; }
  int64_t words() const { return words_; }
  const Products& products() const { return *level().bytes; }
  float length(int64_t i) const { return codes_[i].length + center_; }  // at least that of the weighted row
  float longest() const {
    float most = 0;
    for (int64_t i = 0; i < num_; ++i) most = std::max(most, length(i));
    return most;
  }
  RowTerms terms(int64_t i, float weight, float slack) const {
    const Code& code = codes_[i];
    return {code.scale, code.length, code.error, weight, code.lift + center_ * center_ + slack};
  }
  // What float rounding may add to a product of rows of these lengths, here and in the exact one.
  float slack(float a, float b) const { return rounding_ * (a + b) * b; }

 private:
  static constexpr int64_t kMultiple = 16;
  int64_t num_, words_;
  Buffer<float> bytes_;
  Buffer<Code> codes_;
  float center_, rounding_;
};

// The terms of column j of [group][kTerms][kCols].
inline void set_terms(float* terms, int64_t j, const Code& code, float bias) {
  float* to = terms + j / kCols * kTerms * kCols + j % kCols;
  const int32_t less = 128 * code.sum;
  std::memcpy(to, &less, sizeof less);
  const float term[] = {code.scale, code.lift, code.error, code.length + code.error, bias};
  for (int t = 1; t < kTerms; ++t) to[t * kCols] = term[t - 1];
}

// A coded row for the other side of products.
inline void flip_side(const float* row, int64_t words, float* out, int64_t stride = 1) {
  for (int64_t w = 0; w < words; ++w) {
    uint32_t bytes;
    std::memcpy(&bytes, row + w, sizeof bytes);
    bytes ^= 0x01010101u * Coarse::kLeft;
    std::memcpy(out + w * stride, &bytes, sizeof bytes);
  }
}

// All rows of a Coarse as packed columns with their terms.
class CoarseColumns {
 public:
  template <class Bias>
  CoarseColumns(const Coarse& x, Bias bias)
      : columns_(x.products(), x.words(), x.num()), terms_((x.num() + kCols - 1) / kCols * kTerms * kCols), longest_(x.longest()) {
    columns_.fill(x.num(), [&](int64_t j) { return x.row(j); }, [](int64_t) { return 0.0f; }, [](int64_t) { return 0.0f; });
    for (int64_t j = 0; j < groups() * kCols; ++j)
      set_terms(terms_.data(), j, j < x.num() ? x.code(j) : Code{}, j < x.num() ? bias(j) : -std::numeric_limits<float>::infinity());
  }
  int64_t groups() const { return columns_.groups(); }
  float longest() const { return longest_; }
  // c = integer products of a group with rows packed in strips.
  void products(const float* strips, int rows, int64_t words, int64_t group, float* c) const {
    level().bytes->tile(strips, 0, true, rows, columns_.group(group), columns_.columns(group) / level().bytes->panel, words, c);
  }
  // up[j] >= (product of a weighted row with column j) + weight bias_j; returns the largest.
  float bound(const float* c, const RowTerms& row, int64_t group, float* up) const {
    return level().bound(c, terms_.data() + group * kTerms * kCols, row, kCols, up);
  }

 private:
  Columns columns_;
  Buffer<float> terms_;
  float longest_;
};

// Rows of a Coarse (made with kLeft) that became, one by one, the right side of products with its other rows.
class Picks {
 public:
  Picks(const Coarse& x, int64_t capacity)
      : x_(x),
        rows_(capacity * x.words()),
        panels_((capacity + kNarrow - 1) / kNarrow * kNarrow * x.words()),
        terms_((capacity + kCols - 1) / kCols * kTerms * kCols),
        longest_(x.longest()) {
    std::fill(panels_.data(), panels_.data() + (capacity + kNarrow - 1) / kNarrow * kNarrow * x.words(), 0.0f);
    std::fill(terms_.data(), terms_.data() + (capacity + kCols - 1) / kCols * kTerms * kCols, 0.0f);
  }
  void add(int64_t row, float bias) {
    flip_side(x_.row(row), x_.words(), rows_.data() + num_ * x_.words());
    flip_side(x_.row(row), x_.words(), panels_.data() + num_ / kNarrow * kNarrow * x_.words() + num_ % kNarrow, kNarrow);
    set_terms(terms_.data(), num_++, x_.code(row), bias);
  }
  // up[i * kNarrow + j - begin] >= (product of the weighted row i and pick j) + its bias, for up to kStrip rows and the picks
  // [from, end) of the panel that starts at `begin`; other elements of up are undefined.
  void bounds(const int64_t* row, int rows, int64_t from, int64_t end, float* up) const {
    const int64_t begin = from / kNarrow * kNarrow;
    const float *bytes[kStrip], *picks[kFew];
    for (int i = 0; i < rows; ++i) bytes[i] = x_.row(row[i]);
    if (end - from <= kFew) {
      for (int64_t j = from; j < end; ++j) picks[j - from] = rows_.data() + j * x_.words();
      std::fill(up, up + rows * kNarrow, 0.0f);
      x_.products().dots(bytes, rows, picks, static_cast<int>(end - from), x_.words(), up + (from - begin), kNarrow);
    } else {
      level().narrow(bytes, rows, panels_.data() + begin * x_.words(), x_.words(), up);
    }
    for (int i = 0; i < rows; ++i)
      level().bound(up + i * kNarrow, terms_.data() + begin / kCols * kTerms * kCols + begin % kCols,
                    x_.terms(row[i], 1, x_.slack(x_.length(row[i]), longest_)), kNarrow, up + i * kNarrow);
  }

 private:
  static constexpr int kFew = 6;
  const Coarse& x_;
  Buffer<float> rows_, panels_, terms_;
  float longest_;
  int64_t num_ = 0;
};

// The right side of a row argmax: value_ij = (a_i . row_j) scale_j + bias_j.
struct Targets {
  std::vector<const float*> row;  // as words of a's products
  std::vector<float> scale, bias;
  explicit Targets(int64_t num) : row(num), scale(num), bias(num) {}
  int64_t num() const { return static_cast<int64_t>(row.size()); }
};

// best[i], index[i] = largest value of rows [begin, end) of a, and its first target.
void argmax_rows(const Matrix& a, int64_t begin, int64_t end, const Targets& targets, float* best, int64_t* index);

// The left side of a screened row argmax: rows [begin, begin + rows.num) of a with their weights, coded and packed in strips.
struct Left {
  const Matrix& a;
  int64_t begin;
  std::vector<float> weight;
  Coarse codes;
  Buffer<float> strips;
  Left(const Matrix& matrix, int64_t first, const Rows& rows, std::vector<float> weights, const std::vector<float>& less)
      : a(matrix),
        begin(first),
        weight(std::move(weights)),
        codes(
            rows, [&](int64_t i) { return weight[i]; }, less, Coarse::kLeft),
        strips((rows.num + kStrip - 1) / kStrip * kStrip * codes.words()) {
    parallel_for(0, (rows.num + kRows - 1) / kRows, 1, [&](int64_t from, int64_t to) {
      for (int64_t row = from * kRows; row < std::min(to * kRows, rows.num); row += kRows)
        strips_of(codes, row, static_cast<int>(std::min<int64_t>(kRows, rows.num - row)), strips.data() + row * codes.words());
    });
  }
};

// Reciprocal norms of rows, 1 for zero rows (and if not cosine): the weights of rows to screen.
inline std::vector<float> weights(const Matrix& x, int64_t first, int64_t num, bool cosine) {
  std::vector<float> weight(num, 1);
  for (int64_t i = 0; cosine && i < num; ++i)
    if (x.reciprocal(first + i) > 0) weight[i] = x.reciprocal(first + i);
  return weight;
}

// The same, screened. `right` holds the rows of the targets with their scales as weights.
void argmax_rows(const Left& left, const Targets& targets, const Coarse& right, float* best, int64_t* index);

}  // namespace mmcompress::cpu
