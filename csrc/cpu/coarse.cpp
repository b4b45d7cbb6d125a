// Row argmax, exact and screened.
#include "coarse.h"

namespace mmcompress::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Gathered {  // rows copied together
  const Matrix& x;
  Buffer<float> data;
  Gathered(const Matrix& matrix, int64_t first, const std::vector<int64_t>& rows)
      : x(matrix), data(static_cast<int64_t>(rows.size()) * matrix.words()) {
    for (size_t i = 0; i < rows.size(); ++i)
      std::memcpy(data.data() + i * x.words(), x.row(first + rows[i]), x.words() * sizeof(float));
  }
  const float* row(int64_t i) const { return data.data() + i * x.words(); }
  int64_t stride() const { return x.words(); }
  int64_t words() const { return x.words(); }
  const Products& products() const { return x.products(); }
};

template <class A, class Place>
void exact(const A& a, int64_t begin, int64_t end, const Targets& targets, Place place, float* best, int64_t* index) {
  Columns columns(a.products(), a.words(), targets.num());
  columns.fill(
      targets.num(), [&](int64_t j) { return targets.row[j]; }, [&](int64_t j) { return targets.scale[j]; },
      [&](int64_t j) { return targets.bias[j]; });
  tiles(a, begin, end, columns, [&](int64_t row, int rows, int64_t group, const float* c) {
    for (int r = 0; r < rows; ++r) {
      const int64_t to = place(row + r);
      if (group == 0) {
        best[to] = -kInfinity;
        index[to] = 0;
      }
      level().argmax(c + r * kCols, columns.scale(group), columns.bias(group), columns.columns(group), group * kCols, &best[to],
                     &index[to]);
    }
  });
}

// The exact best target of one row: first the one with the highest bound, then all whose bound reaches the best so far. False where
// they are so many that tiles are faster.
bool refine(const Matrix& a, int64_t row, float weight, const Targets& targets, const float* up, const float* group_up, int64_t groups,
            float* best, int64_t* index) {
  const int64_t most = targets.num() / 8 + 8;
  *best = -kInfinity;
  *index = 0;
  const float* mine = a.row(row);
  const float* rows[kDots];
  int64_t ids[kDots];
  int count = 0;
  const auto compute = [&] {
    float dot[kDots];
    a.products().dots(&mine, 1, rows, count, a.words(), dot, kDots);
    for (int i = 0; i < count; ++i) {
      const float value = dot[i] * targets.scale[ids[i]] + targets.bias[ids[i]];
      if (value > *best || (value == *best && ids[i] < *index)) {
        *best = value;
        *index = ids[i];
      }
    }
    count = 0;
  };
  const auto add = [&](int64_t j) {
    rows[count] = targets.row[j];
    ids[count++] = j;
  };
  const int64_t top = std::max_element(group_up, group_up + groups) - group_up;
  const int64_t first = std::max_element(up + top * kCols, up + (top + 1) * kCols) - up;
  if (!(up[first] > -kInfinity)) return true;
  add(first);
  compute();
  const float limit = *best * weight;
  int64_t candidates = 0;
  for (int64_t group = 0; group < groups; ++group)
    if (group_up[group] >= limit)
      candidates += std::count_if(up + group * kCols, up + (group + 1) * kCols, [&](float bound) { return bound >= limit; });
  if (candidates > most) return false;
  for (int64_t group = 0; group < groups; ++group) {
    if (!(group_up[group] >= *best * weight)) continue;
    for (int64_t j = group * kCols; j < (group + 1) * kCols; ++j) {
      if (j == first || !(up[j] >= *best * weight)) continue;
      add(j);
      if (count == 6) compute();
    }
  }
  if (count) compute();
  return true;
}

}  // namespace

void argmax_rows(const Matrix& a, int64_t begin, int64_t end, const Targets& targets, float* best, int64_t* index) {
  exact(a, begin, end, targets, [](int64_t row) { return row; }, best, index);
}

void argmax_rows(const Left& left, const Targets& targets, const Coarse& right, float* best, int64_t* index) {
  const CoarseColumns columns(right, [&](int64_t j) { return targets.bias[j]; });
  const Coarse& codes = left.codes;
  const int64_t groups = columns.groups(), num = codes.num();
  float largest_bias = 0;
  for (const float bias : targets.bias)
    if (std::isfinite(bias)) largest_bias = std::max(largest_bias, std::abs(bias));
  std::vector<char> crowded(num, 0);
  parallel_for(0, (num + kRows - 1) / kRows, 1, [&](int64_t first_block, int64_t last_block) {
    alignas(64) float c[kRows * kCols];
    Buffer<float> up(kRows * groups * kCols), group_up(kRows * groups);
    for (int64_t first = first_block * kRows; first < std::min(last_block * kRows, num); first += kRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kRows, num - first));
      for (int64_t group = 0; group < groups; ++group) {
        columns.products(left.strips.data() + first * codes.words(), rows, codes.words(), group, c);
        for (int r = 0; r < rows; ++r) {
          const float w = left.weight[first + r];
          const float slack = codes.slack(codes.length(first + r), columns.longest()) + largest_bias * w * 1e-6f;
          group_up[r * groups + group] =
              columns.bound(c + r * kCols, codes.terms(first + r, w, slack), group, up.data() + (r * groups + group) * kCols);
        }
      }
      for (int r = 0; r < rows; ++r) {
        const int64_t to = left.begin + first + r;
        crowded[first + r] = !refine(left.a, to, left.weight[first + r], targets, up.data() + r * groups * kCols,
                                     group_up.data() + r * groups, groups, &best[to], &index[to]);
      }
    }
  });
  std::vector<int64_t> left_over;
  for (int64_t i = 0; i < num; ++i)
    if (crowded[i]) left_over.push_back(i);
  if (left_over.empty()) return;
  const Gathered rows(left.a, left.begin, left_over);
  const auto place = [&](int64_t i) { return left.begin + left_over[i]; };
  exact(rows, 0, static_cast<int64_t>(left_over.size()), targets, place, best, index);
}

}  // namespace mmcompress::cpu
