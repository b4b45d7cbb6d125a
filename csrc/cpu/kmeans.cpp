// k-means++ seeds on a running minimum of distances, and Lloyd iterations: rows are prepared once for all of them.
#include "coarse.h"
#include "kernels.h"
#include "merge.h"

namespace mmcompress::cpu {

void kmeans_pp(Tensor x_tensor, Tensor uniform_tensor, bool cosine, double eps, bool check, Tensor picks_tensor, Tensor bad) {
  const Rows rows(x_tensor);
  const Matrix x(rows);
  report(bad, 0, check ? x.first_bad() : -1);
  if (check && x.first_bad() >= 0) return;
  const auto* uniform = in<double>(uniform_tensor);
  auto* picks = out<int64_t>(picks_tensor);
  const int64_t n = x.num(), k = picks_tensor.size(0);
  Buffer<float> minimum(n);
  std::fill(minimum.data(), minimum.data() + n, std::numeric_limits<float>::infinity());
  std::optional<Coarse> coarse;
  std::optional<CoarseColumns> columns;
  if (k > 2 && Coarse::pays(n, n, rows.width)) {
    const std::vector<float> all = weights(x, 0, n, cosine);
    const auto weight = [&](int64_t i) { return all[i]; };
    coarse.emplace(rows, weight, Coarse::center(rows, weight), Coarse::kRight);
    columns.emplace(*coarse, [](int64_t) { return 0.0f; });
  }
  Buffer<float> strip(coarse ? kStrip * coarse->words() : 0);
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
    const auto limit = [&](int64_t row) { return cosine ? 1.0f : (x.square(row) + x.square(pick)) / 2; };
    if (coarse) flip_side(coarse->row(pick), coarse->words(), strip.data(), kStrip);
    const RowTerms terms = coarse ? coarse->terms(pick, 1, coarse->slack(coarse->length(pick), columns->longest())) : RowTerms{};
    parallel_for(0, (n + kCols - 1) / kCols, 4, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        const int64_t first = group * kCols, last = std::min(n, first + kCols);
        float up[kCols];
        if (coarse) {
          columns->products(strip.data(), 1, coarse->words(), group, up);
          columns->bound(up, terms, group, up);
        }
        const float* row[kDots];
        int64_t ids[kDots];
        int count = 0;
        for (int64_t i = first; i < last; ++i) {
          const float least = coarse ? limit(i) - up[i - first] : 0;  // half the distance is at least this
          if (!coarse || !(2 * least >= minimum[i] && least > kTie * limit(i))) {
            row[count] = x.row(i);
            ids[count++] = i;
          }
          if (count < kDots && i + 1 < last) continue;
          float dot[kDots];
          x.products().dots(row, count, &to, 1, x.words(), dot, 1);
          for (int t = 0; t < count; ++t) {
            const float half = limit(ids[t]) - (cosine ? dot[t] * (x.reciprocal(pick) * x.reciprocal(ids[t])) : dot[t]);
            minimum[ids[t]] = std::min(minimum[ids[t]], 2 * snap(half, limit(ids[t])));
          }
          count = 0;
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
    Targets targets(k);
    std::vector<int64_t> last;
    const bool screened = Coarse::pays(n, k, width);
    std::optional<Left> left;
    std::vector<float> less;
    if (screened) {
      const Rows mine = rows.part(first, n);
      std::vector<float> weight = weights(x, first, n, cosine);
      less = Coarse::center(mine, [&](int64_t i) { return weight[i]; });
      left.emplace(x, first, mine, std::move(weight), less);
    }
    for (int64_t step = 0; step < iterations; ++step) {
      for (int64_t j = 0; j < k; ++j) {
        const float square = use.square(centroid + j * width, Element::f32, width);
        targets.row[j] = centroid + j * width;
        targets.scale[j] = !cosine ? 1.0f : square > kMinSquare ? 1 / std::sqrt(square) : 0.0f;
        targets.bias[j] = cosine ? 0.0f : -square / 2;
      }
      if (screened) {
        const Coarse right(Rows(centroid, Type::f32, k, width), [&](int64_t j) { return targets.scale[j]; }, less, Coarse::kRight);
        argmax_rows(*left, targets, right, best.data(), assignment);
      } else {
        argmax_rows(x, first, first + n, targets, best.data(), assignment);
      }
      const Groups groups(assignment + first, n, k);
      std::vector<char> changed(k, step == 0);  // a cluster with the same rows keeps its centroid
      for (int64_t i = 0; i < n && step > 0; ++i)
        if (assignment[first + i] != last[i]) changed[assignment[first + i]] = changed[last[i]] = 1;
      last.assign(assignment + first, assignment + first + n);
      parallel_for(0, k, 1, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
          const int64_t from = groups.start[j], to = groups.start[j + 1];
          size[item * k + j] = to - from;
          if (from == to || !changed[j]) continue;  // an empty cluster keeps its centroid
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
