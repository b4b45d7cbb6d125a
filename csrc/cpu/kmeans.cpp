// k-means++ seeds on a running minimum of distances, and Lloyd iterations: rows are prepared once for all of them.
#include "kernels.h"
#include "merge.h"

namespace mmcompress::cpu {

void kmeans_pp(Tensor x_tensor, Tensor uniform_tensor, bool cosine, double eps, bool check, Tensor picks_tensor, Tensor bad) {
  const Matrix x{Rows(x_tensor)};
  report(bad, 0, check ? x.first_bad() : -1);
  if (check && x.first_bad() >= 0) return;
  const auto* uniform = in<double>(uniform_tensor);
  auto* picks = out<int64_t>(picks_tensor);
  const int64_t n = x.num(), k = picks_tensor.size(0);
  Buffer<float> minimum(n);
  std::fill(minimum.data(), minimum.data() + n, std::numeric_limits<float>::infinity());
  int64_t pick = std::min<int64_t>(static_cast<int64_t>(uniform[0] * static_cast<double>(n)), n - 1);
  for (int64_t step = 0; step < k; ++step) {
    if (step > 0) {
      double total = 0;
      for (int64_t i = 0; i < n; ++i) total += static_cast<double>(minimum[i]) + eps;
      const double target = uniform[step] * total;
      pick = static_cast<int64_t>(uniform[step] * static_cast<double>(n));
      if (total > 0) {
        double sum = 0;
        for (pick = 0; pick < n; ++pick) {
          sum += static_cast<double>(minimum[pick]) + eps;
          if (sum > target) break;
        }
      }
      pick = std::min(pick, n - 1);
    }
    picks[step] = pick;
    const float* to = x.row(pick);
    parallel_for(0, (n + kDots - 1) / kDots, 16, [&](int64_t begin, int64_t end) {
      const float* rows[kDots];
      float dot[kDots];
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kDots;
        const int count = static_cast<int>(std::min<int64_t>(kDots, n - first));
        for (int i = 0; i < count; ++i) rows[i] = x.row(first + i);
        x.products().dots(rows, count, &to, 1, x.words(), dot, 1);
        for (int i = 0; i < count; ++i) {
          const int64_t row = first + i;
          const float limit = cosine ? 1.0f : (x.square(row) + x.square(pick)) / 2;
          const float half = limit - (cosine ? dot[i] * (x.reciprocal(pick) * x.reciprocal(row)) : dot[i]);
          minimum[row] = std::min(minimum[row], 2 * snap(half, limit));
        }
      }
    });
    minimum[pick] = 0;
  }
}

void kmeans_lloyd(Tensor x_tensor, Tensor offsets, int64_t iterations, bool cosine, bool check, Tensor centroid_tensor,
                  Tensor assignment_tensor, Tensor size_tensor, Tensor bad) {
  const Rows rows(x_tensor);
  const Matrix x(rows, false);  // centroids are floats, so rows are too
  report(bad, 0, check ? x.first_bad() : -1);
  if (check && x.first_bad() >= 0) return;
  const auto* ends = in<int64_t>(offsets);
  auto* centroids = out<float>(centroid_tensor);
  auto *assignment = out<int64_t>(assignment_tensor), *size = out<int64_t>(size_tensor);
  const int64_t width = rows.width, num_items = offsets.size(0) - 1, k = num_items ? centroid_tensor.size(0) / num_items : 0;
  const Level& use = level();
  Buffer<float> best(x.num());
  for_items(num_items, [&](int64_t item) {
    const int64_t first = ends[item], n = ends[item + 1] - first;
    float* centroid = centroids + item * k * width;
    Columns columns(x.products(), x.words(), k);
    for (int64_t step = 0; step < iterations; ++step) {
      std::vector<float> square(k);
      for (int64_t j = 0; j < k; ++j) square[j] = use.square(centroid + j * width, Element::f32, width);
      columns.fill(
          k, [&](int64_t j) { return centroid + j * width; },
          [&](int64_t j) { return !cosine                  ? 1.0f
                                  : square[j] > kMinSquare ? 1 / std::sqrt(square[j])
                                                           : 0.0f; },
          [&](int64_t j) { return cosine ? 0.0f : -square[j] / 2; });
      tiles(x, first, first + n, columns, [&](int64_t row, int count, int64_t group, const float* c) {
        for (int r = 0; r < count; ++r) {
          if (group == 0) {
            best[row + r] = -std::numeric_limits<float>::infinity();
            assignment[row + r] = 0;
          }
          use.argmax(c + r * kCols, columns.scale(group), columns.bias(group), columns.columns(group), group * kCols, &best[row + r],
                     &assignment[row + r]);
        }
      });
      const Groups groups(assignment + first, n, k);
      parallel_for(0, k, 1, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
          const int64_t from = groups.start[j], to = groups.start[j + 1];
          size[item * k + j] = to - from;
          if (from == to) continue;  // an empty cluster keeps its centroid
          float* sum = centroid + j * width;
          std::memset(sum, 0, width * sizeof(float));
          for (int64_t i = from; i < to; ++i) {
            const int64_t row = first + groups.row[i];
            use.add(x.row(row), Element::f32, width, cosine ? x.reciprocal(row) : 1.0f, sum);
          }
          use.round(sum, 1.0f / static_cast<float>(to - from), Element::f32, width, sum);
        }
      });
    }
  });
}

}  // namespace mmcompress::cpu
