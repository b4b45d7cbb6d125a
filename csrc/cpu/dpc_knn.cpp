// Density peaks: a Gram matrix, then two passes over its rows (the k smallest distances; the nearest denser row).
#include "gram.h"
#include "kernels.h"

namespace mmcompress::cpu {

void dpc_knn(Tensor x_tensor, Tensor offsets, int64_t k, bool check, Tensor density_tensor, Tensor delta_tensor, Tensor bad) {
  const Rows rows(x_tensor);
  const Matrix x(rows);
  report(bad, 0, check ? x.first_bad() : -1);
  if (check && x.first_bad() >= 0) return;
  const auto* ends = in<int64_t>(offsets);
  const auto width = static_cast<float>(rows.width);
  for_items(offsets.size(0) - 1, [&](int64_t item) {
    const int64_t first = ends[item], n = ends[item + 1] - first;
    if (n == 0) return;
    float *density = out<float>(density_tensor) + first, *delta = out<float>(delta_tensor) + first;
    Gram gram(x, first, n);
    Buffer<float> square(n);
    for (int64_t i = 0; i < n; ++i) square[i] = x.square(first + i);
    const auto distance = [&](int64_t i, int64_t j, float dot) {  // symmetric to the last bit
      const float limit = x.square(first + i) + x.square(first + j);
      return i == j ? 0.0f : snap(limit - 2 * dot, limit) / width;
    };
    constexpr int64_t kLanes = 16;  // loops over fixed lanes become vector instructions
    Buffer<float> largest(n);
    gram.each([&](int64_t i, float* row) {
      const float mine = x.square(first + i);
      float most[kLanes] = {};
      int64_t j = 0;
      for (; j + kLanes <= n; j += kLanes)
        for (int64_t t = 0; t < kLanes; ++t) {
          const float limit = mine + square[j + t], d = limit - 2 * row[j + t];
          row[j + t] = (d > kTie * limit ? d : 0.0f) / width;
          most[t] = row[j + t] > most[t] ? row[j + t] : most[t];
        }
      for (; j < n; ++j) {
        row[j] = distance(i, j, row[j]);
        most[0] = std::max(most[0], row[j]);
      }
      row[i] = 0;
      largest[i] = *std::max_element(most, most + kLanes);
      std::vector<float> nearest;  // ascending
      nearest.reserve(k + 1);
      for (j = 0; j < n; ++j) {
        if (static_cast<int64_t>(nearest.size()) == k && !(row[j] < nearest.back())) continue;
        nearest.insert(std::upper_bound(nearest.begin(), nearest.end(), row[j]), row[j]);
        if (static_cast<int64_t>(nearest.size()) > k) nearest.pop_back();
      }
      double sum = 0;
      for (const float d : nearest) sum += d;
      density[i] = static_cast<float>(-sum / static_cast<double>(k));
    });
    const float most = *std::max_element(largest.data(), largest.data() + n);
    const bool stored = gram.whole();  // then the rows hold distances since the first pass
    gram.each([&](int64_t i, float* row) {
      if (!stored)
        for (int64_t j = 0; j < n; ++j) row[j] = distance(i, j, row[j]);
      const float infinity = std::numeric_limits<float>::infinity(), mine = density[i];
      float least[kLanes];
      std::fill(least, least + kLanes, infinity);
      const auto scan = [&](int64_t begin, int64_t end, auto denser) {
        int64_t j = begin;
        for (; j + kLanes <= end; j += kLanes)
          for (int64_t t = 0; t < kLanes; ++t) {
            const float d = denser(density[j + t]) ? row[j + t] : infinity;
            least[t] = d < least[t] ? d : least[t];
          }
        for (; j < end; ++j)
          if (denser(density[j]) && row[j] < least[0]) least[0] = row[j];
      };
      scan(0, i, [mine](float other) { return other >= mine; });  // equal densities: the lower row counts as denser
      scan(i + 1, n, [mine](float other) { return other > mine; });
      const float nearest = *std::min_element(least, least + kLanes);
      delta[i] = std::sqrt(std::isinf(nearest) ? most : nearest);
    });
  });
}

}  // namespace mmcompress::cpu
