// Greedy picks of the smallest running sum of cosines. Sums of float32 cosines are kept in double, where they are exact enough to tie.
#include "kernels.h"
#include "matrix.h"

namespace mmcompress::cpu {

void max_sum(Tensor x_tensor, Tensor offsets, Tensor out_offsets, Optional start_tensor, bool check, Tensor picks_tensor, Tensor bad) {
  const Matrix x{Rows(x_tensor)};
  report(bad, 0, check ? x.first_bad() : -1);
  if (check && x.first_bad() >= 0) return;
  const auto *ends = in<int64_t>(offsets), *out_ends = in<int64_t>(out_offsets), *start = in<int64_t>(start_tensor);
  auto* picks = out<int64_t>(picks_tensor);
  for_items(offsets.size(0) - 1, [&](int64_t item) {
    const int64_t first = ends[item], n = ends[item + 1] - first, k = out_ends[item + 1] - out_ends[item];
    int64_t* mine = picks + out_ends[item];
    std::vector<double> sum(n, 0.0);
    int64_t pick = start ? start[item] : 0;
    for (int64_t step = 0; step < k; ++step) {
      mine[step] = first + pick;
      if (step + 1 == k) break;
      const float* to = x.row(first + pick);
      const float scale = x.reciprocal(first + pick);
      parallel_for(0, (n + kDots - 1) / kDots, 16, [&](int64_t begin, int64_t end) {
        const float* rows[kDots];
        float dot[kDots];
        for (int64_t block = begin; block < end; ++block) {
          const int64_t row = block * kDots;
          const int count = static_cast<int>(std::min<int64_t>(kDots, n - row));
          for (int i = 0; i < count; ++i) rows[i] = x.row(first + row + i);
          x.products().dots(rows, count, &to, 1, x.words(), dot, 1);
          for (int i = 0; i < count; ++i) {
            const float cosine = dot[i] * (scale * x.reciprocal(first + row + i));
            sum[row + i] += cosine > 1 - kTie ? 1.0f : cosine;
          }
        }
      });
      sum[pick] = std::numeric_limits<double>::infinity();
      pick = std::min_element(sum.begin(), sum.end()) - sum.begin();
    }
  });
}

}  // namespace mmcompress::cpu
