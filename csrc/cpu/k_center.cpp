// Farthest-first traversal, exact, by two algorithms that make the same picks.
//
// Lazy: minimum distances only fall, so a stale one is an upper bound. A heap holds them; only what reaches its top is brought up to
// date, several rows by several picks at a time, and a row is left as soon as it falls below the best one that is up to date. Block:
// the picks since the last update are applied to all rows by one matrix product; the next picks come from a set of candidates whose
// mutual distances are known, for as long as the best of them lies above every row outside the set.
#include <algorithm>

#include "coarse.h"
#include "kernels.h"

namespace mmcompress::cpu {
namespace {

// distance(i, c) = base_i - (dot scale_c + bias_c) factor_i: 1 - cos, or half the squared Euclidean distance.
struct Metric {
  const Matrix& x;
  bool cosine;
  float base(int64_t i) const { return cosine ? 1.0f : x.square(i) / 2; }
  float scale(int64_t c) const { return cosine ? x.reciprocal(c) : 1.0f; }
  float bias(int64_t c) const { return cosine ? 0.0f : -x.square(c) / 2; }
  float factor(int64_t i) const { return cosine ? x.reciprocal(i) : 1.0f; }
  float limit(int64_t i) const { return cosine ? 1.0f : x.square(i); }
  const float* row(int64_t i) const { return x.row(i); }
  float distance(int64_t i, float best) const { return snap(base(i) - best * factor(i), limit(i)); }
};

struct Entry {
  float distance;
  int64_t row;
  bool operator<(const Entry& other) const { return distance < other.distance || (distance == other.distance && row > other.row); }
};

// Distances of all rows to one pick.
void distances_to(const Metric& metric, int64_t n, int64_t pick, float* distance) {
  const float* to = metric.row(pick);
  const float scale = metric.scale(pick), bias = metric.bias(pick);
  parallel_for(0, (n + kDots - 1) / kDots, 16, [&](int64_t begin, int64_t end) {
    const float* rows[kDots];
    float dot[kDots];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kDots;
      const int count = static_cast<int>(std::min<int64_t>(kDots, n - first));
      for (int i = 0; i < count; ++i) rows[i] = metric.row(first + i);
      metric.x.products().dots(rows, count, &to, 1, metric.x.words(), dot, 1);
      for (int i = 0; i < count; ++i) distance[first + i] = metric.distance(first + i, dot[i] * scale + bias);
    }
  });
}

void lazy(const Metric& metric, const Coarse* coarse, int64_t n, int64_t k, int64_t start, int64_t* picks) {
  constexpr int kBatch = 18, kExact = 4, kStep = 6;  // rows popped; rows by picks that are computed together, without screening
  const int group = coarse ? kStrip : kExact;
  std::optional<Picks> codes;
  if (coarse) codes.emplace(*coarse, k);
  Buffer<float> distance(n);
  std::vector<int64_t> seen(n, 1);  // how many picks a row's distance knows
  std::vector<const float*> pick_rows(k);
  std::vector<float> scale(k), bias(k);
  std::vector<Entry> heap;
  heap.reserve(n);
  int64_t num = 0;
  auto take = [&](int64_t row) {
    picks[num] = row;
    pick_rows[num] = metric.row(row);
    scale[num] = metric.scale(row);
    bias[num++] = metric.bias(row);
    if (codes) codes->add(row, metric.bias(row));
  };
  take(start);
  distances_to(metric, n, start, distance.data());
  for (int64_t i = 0; i < n; ++i)
    if (i != start) heap.push_back({distance[i], i});
  std::make_heap(heap.begin(), heap.end());
  const auto lower = [&](Entry& entry, int64_t pick, float product) {
    entry.distance = std::min(entry.distance, metric.distance(entry.row, product * scale[pick] + bias[pick]));
  };
  // Picks [from, end) for some rows: all of them,
  const auto compute = [&](Entry* entry, const float* const* row, int rows, int64_t from, int64_t end) {
    float dot[kExact * kStep];
    metric.x.products().dots(row, rows, pick_rows.data() + from, static_cast<int>(end - from), metric.x.words(), dot, kStep);
    for (int i = 0; i < rows; ++i)
      for (int64_t j = from; j < end; ++j) lower(entry[i], j, dot[i * kStep + (j - from)]);
  };
  // or those that may be nearer than the row's distance, the most promising first.
  const auto screen = [&](Entry* entry, const float* const* row, int rows, int64_t from, int64_t end) {
    float up[kStrip * kNarrow];
    int64_t ids[kStrip];
    for (int i = 0; i < rows; ++i) ids[i] = entry[i].row;
    const int64_t offset = from / kNarrow * kNarrow;
    codes->bounds(ids, rows, from, end, up);
    for (int i = 0; i < rows; ++i) {
      const float base = metric.base(entry[i].row);
      float* mine = up + i * kNarrow;
      while (true) {
        const int64_t best = std::max_element(mine + (from - offset), mine + (end - offset)) - mine;
        if (!(base - mine[best] < entry[i].distance)) break;
        mine[best] = -std::numeric_limits<float>::infinity();
        float product;
        metric.x.products().dots(row + i, 1, &pick_rows[offset + best], 1, metric.x.words(), &product, 1);
        lower(entry[i], offset + best, product);
      }
    }
  };
  float known = -1;  // the largest distance that is up to date
  while (num < k) {
    if (seen[heap.front().row] == num) {
      std::pop_heap(heap.begin(), heap.end());
      take(heap.back().row);
      heap.pop_back();
      known = -1;
      continue;
    }
    Entry batch[kBatch];
    int count = 0;
    while (count < kBatch && !heap.empty() && seen[heap.front().row] < num && heap.front().distance >= known) {
      std::pop_heap(heap.begin(), heap.end());
      batch[count++] = heap.back();
      heap.pop_back();
    }
    // rows that lag equally far behind are computed together
    std::sort(batch, batch + count, [&](const Entry& a, const Entry& b) { return seen[a.row] < seen[b.row]; });
    for (int first = 0; first < count; first += group) {
      const int rows = std::min(group, count - first);
      const float* row[kStrip];
      int64_t from = num;
      for (int i = 0; i < rows; ++i) {
        row[i] = metric.row(batch[first + i].row);
        from = std::min(from, seen[batch[first + i].row]);
      }
      while (from < num) {
        const int64_t end = std::min(num, codes ? (from / kNarrow + 1) * kNarrow : from + kStep);
        if (codes) {
          screen(batch + first, row, rows, from, end);
        } else {
          compute(batch + first, row, rows, from, end);
        }
        from = end;
        if (std::none_of(batch + first, batch + first + rows, [&](const Entry& entry) { return entry.distance >= known; })) break;
      }
      for (int i = 0; i < rows; ++i) {
        seen[batch[first + i].row] = std::max(seen[batch[first + i].row], from);
        if (seen[batch[first + i].row] == num) known = std::max(known, batch[first + i].distance);
      }
    }
    for (int i = 0; i < count; ++i) {
      heap.push_back(batch[i]);
      std::push_heap(heap.begin(), heap.end());
    }
  }
}

void blocks(const Metric& metric, int64_t n, int64_t k, int64_t start, int64_t* picks) {
  constexpr int64_t kMost = 512;
  const Matrix& x = metric.x;
  Buffer<float> distance(n), gram(kMost * kMost), candidate_distance(kMost), copies(std::min(kMost, n) * x.words());
  std::vector<int64_t> order(n), fresh{start}, candidate;
  std::vector<char> taken(n, 0);
  std::fill(distance.data(), distance.data() + n, std::numeric_limits<float>::infinity());
  taken[start] = 1;
  picks[0] = start;
  int64_t num = 1, m = 64;
  Columns columns(x.products(), x.words(), kMost);
  auto fill = [&](const std::vector<int64_t>& rows) {
    columns.fill(
        static_cast<int64_t>(rows.size()), [&](int64_t j) { return metric.row(rows[j]); },
        [&](int64_t j) { return metric.scale(rows[j]); }, [&](int64_t j) { return metric.bias(rows[j]); });
  };
  const auto before = [&](int64_t a, int64_t b) { return distance[a] > distance[b] || (distance[a] == distance[b] && a < b); };
  while (num < k) {
    fill(fresh);
    tiles(x, 0, n, columns, [&](int64_t row, int rows, int64_t group, const float* c) {
      for (int r = 0; r < rows; ++r) {
        const int64_t i = row + r;
        if (taken[i]) {
          distance[i] = -1;
          continue;
        }
        float best = -std::numeric_limits<float>::infinity();
        int64_t unused;
        level().argmax(c + r * kCols, columns.scale(group), columns.bias(group), columns.columns(group), 0, &best, &unused);
        distance[i] = std::min(distance[i], metric.distance(i, best));
      }
    });
    order.clear();
    for (int64_t i = 0; i < n; ++i)
      if (!taken[i]) order.push_back(i);
    const int64_t count = std::min<int64_t>(m, static_cast<int64_t>(order.size()));
    float outside = -1;  // the largest distance that is not among the candidates
    if (count < static_cast<int64_t>(order.size())) {
      std::nth_element(order.begin(), order.begin() + count, order.end(), before);
      outside = distance[order[count]];
    }
    candidate.assign(order.begin(), order.begin() + count);
    std::sort(candidate.begin(), candidate.end());  // ascending rows: the first maximum is the lowest row
    fresh.clear();
    // Mutual distances, in the arithmetic of the update above: row i is the token, column j the pick.
    fill(candidate);
    const int64_t gram_stride = columns.groups() * kCols;
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(copies.data() + i * x.words(), metric.row(candidate[i]), x.words() * sizeof(float));
    parallel_for(0, (count + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
      alignas(64) float c[kRows * kCols];
      for (int64_t first = begin * kRows; first < std::min(end * kRows, count); first += kRows) {
        const int rows = static_cast<int>(std::min<int64_t>(kRows, count - first));
        for (int64_t group = 0; group < columns.groups(); ++group) {
          const int width = columns.columns(group);
          x.products().tile(copies.data() + first * x.words(), x.words(), false, rows, columns.group(group),
                            width / x.products().panel, x.words(), c);
          for (int r = 0; r < rows; ++r)
            for (int j = 0; j < width; ++j)
              gram[(first + r) * gram_stride + group * kCols + j] =
                  c[r * kCols + j] * columns.scale(group)[j] + columns.bias(group)[j];
        }
      }
    });
    for (int64_t i = 0; i < count; ++i) candidate_distance[i] = distance[candidate[i]];
    while (num < k) {
      int64_t best = 0;
      for (int64_t i = 1; i < count; ++i)
        if (candidate_distance[i] > candidate_distance[best]) best = i;
      if (!(candidate_distance[best] > outside) && !fresh.empty()) break;
      const int64_t row = candidate[best];
      picks[num++] = row;
      fresh.push_back(row);
      taken[row] = 1;
      for (int64_t i = 0; i < count; ++i)
        candidate_distance[i] = std::min(candidate_distance[i], metric.distance(candidate[i], gram[i * gram_stride + best]));
      candidate_distance[best] = -1;
    }
    const auto used = static_cast<double>(fresh.size());
    if (used > 0.6 * static_cast<double>(m)) {
      m = std::min(2 * m, kMost);
    } else if (used < 0.15 * static_cast<double>(m)) {
      m = std::max<int64_t>(m / 2, 64);
    }
  }
}

}  // namespace

void k_center(Tensor x_tensor, Tensor offsets, Tensor out_offsets, Optional start_tensor, bool cosine, bool check, Tensor picks_tensor,
              Tensor bad) {
  const Rows rows(x_tensor);
  const auto *ends = in<int64_t>(offsets), *out_ends = in<int64_t>(out_offsets), *start = in<int64_t>(start_tensor);
  auto* picks = out<int64_t>(picks_tensor);
  std::vector<int64_t> first_bad(offsets.size(0) - 1, -1);
  for_items(offsets.size(0) - 1, [&](int64_t item) {  // an item at a time: it stays in the cache
    const int64_t n = ends[item + 1] - ends[item], k = out_ends[item + 1] - out_ends[item];
    const Rows mine = rows.part(ends[item], n);
    const Matrix x(mine);
    if (check && x.first_bad() >= 0) {
      first_bad[item] = ends[item] + x.first_bad();
      return;
    }
    if (k == 0) return;
    const Metric metric{x, cosine};
    int64_t* chosen = picks + out_ends[item];
    const int64_t first = start ? start[item] : 0;
    if (k * 7 < n) {
      std::optional<Coarse> coarse;
      if (Coarse::pays(n, k, rows.width)) {
        const std::vector<float> all = weights(x, 0, n, cosine);
        const auto weight = [&](int64_t i) { return all[i]; };
        coarse.emplace(mine, weight, Coarse::center(mine, weight), Coarse::kLeft);
      }
      lazy(metric, coarse ? &*coarse : nullptr, n, k, first, chosen);
    } else {
      blocks(metric, n, k, first, chosen);
    }
    for (int64_t i = 0; i < k; ++i) chosen[i] += ends[item];
  });
  const auto found = std::find_if(first_bad.begin(), first_bad.end(), [](int64_t row) { return row >= 0; });
  report(bad, 0, found == first_bad.end() ? -1 : *found);
}

}  // namespace mmcompress::cpu
