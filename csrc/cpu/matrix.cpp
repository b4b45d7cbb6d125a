// Preparation of rows, packing, and the choice of the instruction set.
#include "matrix.h"

namespace mmcompress::cpu {
namespace {

int highest = 2;

const Level& pick() {
  if (highest >= 2 && avx512_level()) return *avx512_level();
  if (highest >= 1 && avx2_level()) return *avx2_level();
  return scalar_level();
}

std::atomic<const Level*> current{nullptr};

bool in_place(const Rows& x, bool as_pairs) {
  if (reinterpret_cast<uintptr_t>(x.data) % 4 || x.stride % 4) return false;
  return as_pairs ? x.width % 2 == 0 : x.type == Type::f32;
}

}  // namespace

const Level& level() {
  const Level* chosen = current.load();
  if (!chosen) current = chosen = &pick();
  return *chosen;
}

int set_level(int limit) {
  highest = limit;
  const Level& chosen = pick();
  current = &chosen;
  return &chosen == &scalar_level() ? 0 : &chosen == avx2_level() ? 1 : 2;
}

Matrix::Matrix(const Rows& x, bool pairs, bool norms)
    : products_(&level().f32),
      data_(reinterpret_cast<const float*>(x.data)),
      num_(x.num),
      stride_(x.stride / 4),
      words_(x.width),
      copy_(0),
      square_(norms ? x.num : 0),
      reciprocal_(norms ? x.num : 0) {
  const Level& use = level();
  const bool as_pairs = pairs && x.type == Type::bf16 && use.bf16 != nullptr;
  const bool copy = !in_place(x, as_pairs);
  if (as_pairs) {
    products_ = use.bf16;
    words_ = (x.width + 1) / 2;
  }
  if (copy) {
    stride_ = words_;
    copy_ = Buffer<float>(num_ * words_);
    data_ = copy_.data();
  }
  if (!copy && !norms) return;
  std::atomic<int64_t> bad{num_};
  parallel_for(0, num_, std::max<int64_t>(1, (1 << 17) / x.width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (norms) {
        const float s = use.square(x.row(i), element_of(x.type), x.width);
        square_[i] = s;
        reciprocal_[i] = s > kMinSquare ? 1 / std::sqrt(s) : 0;
        if (!std::isfinite(s)) {
          int64_t lowest = bad.load();
          while (i < lowest && !bad.compare_exchange_weak(lowest, i)) {
          }
        }
      }
      if (!copy) continue;
      float* to = copy_.data() + i * words_;
      if (as_pairs) {
        to[words_ - 1] = 0;  // an odd row is filled up with a zero
        std::memcpy(to, x.row(i), 2 * x.width);
      } else {
        use.widen(x.row(i), element_of(x.type), x.width, to);
      }
    }
  });
  if (bad < num_) first_bad_ = bad;
}

Columns::Columns(const Products& products, int64_t words, int64_t capacity)
    : products_(&products),
      words_(words),
      packed_((capacity + kCols - 1) / kCols * kCols * words),
      scale_((capacity + kCols - 1) / kCols * kCols),
      bias_((capacity + kCols - 1) / kCols * kCols) {}

void Columns::pack(const float* const* rows, int64_t count, int64_t panel) {
  const int64_t width = products_->panel;
  float* to = packed_.data() + panel * words_ * width;
  constexpr int64_t kBlock = 16;  // words: one cache line of every row
  for (int64_t w = 0; w < words_; w += kBlock) {
    const int64_t block = std::min(kBlock, words_ - w);
    for (int64_t j = 0; j < width; ++j)
      for (int64_t i = 0; i < block; ++i) to[(w + i) * width + j] = j < count ? rows[j][w + i] : 0.0f;
  }
}

void pack_strips(const float* const* rows, int num, int64_t words, float* packed) {
  constexpr int64_t kBlock = 16;
  for (int r = 0; r < num; r += kStrip) {
    const int count = std::min(kStrip, num - r);
    float* to = packed + r * words;
    for (int64_t w = 0; w < words; w += kBlock) {
      const int64_t block = std::min(kBlock, words - w);
      for (int i = 0; i < count; ++i)
        for (int64_t j = 0; j < block; ++j) to[(w + j) * kStrip + i] = rows[r + i][w + j];
    }
  }
}

}  // namespace mmcompress::cpu
