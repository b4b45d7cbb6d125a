// The k most similar other rows of every row: Gram matrix and a selection per row.
#include "gram.h"
#include "kernels.h"

namespace mmcompress::cpu {

void cosine_top_k(Tensor x_tensor, Tensor offsets, int64_t k, bool check, Tensor value_tensor, Tensor index_tensor, Tensor bad) {
  const Matrix x{Rows(x_tensor)};
  report(bad, 0, check ? x.first_bad() : -1);
  if (check && x.first_bad() >= 0) return;
  const auto* ends = in<int64_t>(offsets);
  auto* value = out<float>(value_tensor);
  auto* index = out<int64_t>(index_tensor);
  struct Candidate {
    float value;
    int64_t column;
    bool operator<(const Candidate& other) const { return value > other.value || (value == other.value && column < other.column); }
  };
  for_items(offsets.size(0) - 1, [&](int64_t item) {
    const int64_t first = ends[item], n = ends[item + 1] - first;
    if (n == 0) return;
    Gram gram(x, first, n);
    gram.each([&](int64_t i, const float* row) {
      std::vector<Candidate> best;  // small k: sorted as it grows; large k: everything, sorted once
      const bool small = k <= 64;
      best.reserve(small ? k + 1 : n);
      const float mine = x.reciprocal(first + i);
      for (int64_t j = 0; j < n; ++j) {
        if (j == i) continue;
        const Candidate c{row[j] * (mine * x.reciprocal(first + j)), j};
        if (!small) {
          best.push_back(c);
          continue;
        }
        if (static_cast<int64_t>(best.size()) == k && !(c.value > best.back().value)) continue;
        best.insert(std::upper_bound(best.begin(), best.end(), c), c);
        if (static_cast<int64_t>(best.size()) > k) best.pop_back();
      }
      if (!small) std::partial_sort(best.begin(), best.begin() + k, best.end());
      for (int64_t t = 0; t < k; ++t) {
        value[(first + i) * k + t] = best[t].value;
        index[(first + i) * k + t] = best[t].column;
      }
    });
  });
}

}  // namespace mmcompress::cpu
