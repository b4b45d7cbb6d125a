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
    const auto distance = [&](int64_t i, int64_t j, float dot) {  // symmetric to the last bit
      const float limit = x.square(first + i) + x.square(first + j);
      return i == j ? 0.0f : snap(limit - 2 * dot, limit) / width;
    };
    Buffer<float> largest(n);
    gram.each([&](int64_t i, float* row) {
      std::vector<float> nearest;  // ascending
      nearest.reserve(k + 1);
      float most = 0;
      for (int64_t j = 0; j < n; ++j) {
        const float d = distance(i, j, row[j]);
        row[j] = d;
        most = std::max(most, d);
        if (static_cast<int64_t>(nearest.size()) == k && !(d < nearest.back())) continue;
        nearest.insert(std::upper_bound(nearest.begin(), nearest.end(), d), d);
        if (static_cast<int64_t>(nearest.size()) > k) nearest.pop_back();
      }
      double sum = 0;
      for (const float d : nearest) sum += d;
      density[i] = static_cast<float>(-sum / static_cast<double>(k));
      largest[i] = most;
    });
    const float most = *std::max_element(largest.data(), largest.data() + n);
    const bool stored = gram.whole();  // then the rows hold distances since the first pass
    gram.each([&](int64_t i, float* row) {
      float least = std::numeric_limits<float>::infinity();
      for (int64_t j = 0; j < n; ++j)
        if (density[j] > density[i] || (density[j] == density[i] && j < i)) least = std::min(least, stored ? row[j] : distance(i, j, row[j]));
      delta[i] = std::sqrt(std::isinf(least) ? most : least);
    });
  });
}

}  // namespace mmcompress::cpu
