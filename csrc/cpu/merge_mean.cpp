// Weighted mean per output: a counting sort of the assignment, then one pass per output in row order. Every row is read once.
#include "merge.h"

#include "kernels.h"

namespace mmcompress::cpu {

Groups::Groups(const int64_t* assignment, int64_t num_rows, int64_t num_out) : start(num_out + 1, 0), row(num_rows) {
  for (int64_t i = 0; i < num_rows; ++i)
    if (assignment[i] >= 0) ++start[assignment[i] + 1];
  for (int64_t j = 0; j < num_out; ++j) start[j + 1] += start[j];
  std::vector<int64_t> next(start.begin(), start.end() - 1);
  for (int64_t i = 0; i < num_rows; ++i)
    if (assignment[i] >= 0) row[next[assignment[i]]++] = i;
}

void merge_mean(Tensor x_tensor, Tensor assignment_tensor, Optional size_tensor, bool check, Tensor mean_tensor, Tensor total_tensor,
                Tensor bad_tensor) {
  const Rows x(x_tensor), mean(mean_tensor);
  auto* to = out<char>(mean_tensor);
  auto* total = out<float>(total_tensor);
  const auto* size = in<float>(size_tensor);
  const auto assignment = assignment_tensor;
  const Groups groups(in<int64_t>(assignment), x.num, mean.num);
  const Level& use = level();
  const Element type = element_of(x.type);
  std::atomic<int64_t> bad{mean.num};
  parallel_for(0, mean.num, std::max<int64_t>(1, (1 << 15) / x.width), [&](int64_t begin, int64_t end) {
    Buffer<float> sum(x.width);
    for (int64_t j = begin; j < end; ++j) {
      const int64_t first = groups.start[j], last = groups.start[j + 1];
      char* here = to + j * mean.stride;
      double weight = 0;
      for (int64_t i = first; i < last; ++i) weight += size ? size[groups.row[i]] : 1.0f;
      total[j] = static_cast<float>(weight);
      float square = 0;
      if (weight == 0) {
        std::memset(here, 0, x.width * x.element());
      } else if (last - first == 1) {
        const char* row = x.row(groups.row[first]);
        std::memcpy(here, row, x.width * x.element());
        if (check) square = use.square(row, type, x.width);
      } else {
        std::memset(sum.data(), 0, x.width * sizeof(float));
        for (int64_t i = first; i < last; ++i)
          use.add(x.row(groups.row[i]), type, x.width, size ? size[groups.row[i]] : 1.0f, sum.data());
        const auto factor = static_cast<float>(1 / weight);
        if (check) square = use.square(sum.data(), Element::f32, x.width) * factor * factor;
        use.round(sum.data(), factor, type, x.width, here);
      }
      if (!std::isfinite(square)) {
        int64_t lowest = bad.load();
        while (j < lowest && !bad.compare_exchange_weak(lowest, j)) {
        }
      }
    }
  });
  report(bad_tensor, 0, bad < mean.num ? bad.load() : -1);
}

}  // namespace mmcompress::cpu
