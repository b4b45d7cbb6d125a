// Fused product and row argmax: the scores of a tile are reduced while they are in the first-level cache.
#include "kernels.h"
#include "matrix.h"

namespace mmcompress::cpu {

void similarity_argmax(Tensor a_tensor, Tensor b_tensor, Tensor a_offsets, Tensor b_offsets, bool cosine, Optional bias_tensor,
                       bool check, Tensor value_tensor, Tensor index_tensor, Tensor bad) {
  const bool norms = cosine || check;
  const Matrix a(Rows(a_tensor), true, norms), b(Rows(b_tensor), true, norms);
  report(bad, 0, check ? a.first_bad() : -1);
  report(bad, 1, check ? b.first_bad() : -1);
  if (check && (a.first_bad() >= 0 || b.first_bad() >= 0)) return;
  const auto *a_ends = in<int64_t>(a_offsets), *b_ends = in<int64_t>(b_offsets);
  const auto* bias = in<float>(bias_tensor);
  auto* value = out<float>(value_tensor);
  auto* index = out<int64_t>(index_tensor);
  for_items(a_offsets.size(0) - 1, [&](int64_t item) {
    const int64_t first = b_ends[item], num = b_ends[item + 1] - first;
    if (a_ends[item] == a_ends[item + 1]) return;
    Columns columns(b.products(), b.words(), num);
    columns.fill(
        num, [&](int64_t j) { return b.row(first + j); }, [&](int64_t j) { return cosine ? b.reciprocal(first + j) : 1.0f; },
        [&](int64_t j) { return bias ? bias[first + j] : 0.0f; });
    const int64_t last_group = columns.groups() - 1;
    tiles(a, a_ends[item], a_ends[item + 1], columns, [&](int64_t row, int rows, int64_t group, const float* c) {
      for (int r = 0; r < rows; ++r) {
        float& best = value[row + r];
        if (group == 0) {
          best = -std::numeric_limits<float>::infinity();
          index[row + r] = 0;
        }
        level().argmax(c + r * kCols, columns.scale(group), columns.bias(group), columns.columns(group), group * kCols, &best,
                       &index[row + r]);
        if (cosine && group == last_group) best *= a.reciprocal(row + r);  // not negative: it never changes the argmax
      }
    });
  });
}

}  // namespace mmcompress::cpu
