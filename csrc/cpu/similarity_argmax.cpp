// Fused product and row argmax: scores are reduced while they are in the first-level cache, and screened where that pays.
#include "coarse.h"
#include "kernels.h"

namespace mmcompress::cpu {

void similarity_argmax(Tensor a_tensor, Tensor b_tensor, Tensor a_offsets, Tensor b_offsets, bool cosine, Optional bias_tensor,
                       bool check, Tensor value_tensor, Tensor index_tensor, Tensor bad) {
  const bool norms = cosine || check;
  const Rows a_rows(a_tensor), b_rows(b_tensor);
  const Matrix a(a_rows, true, norms), b(b_rows, true, norms);
  report(bad, 0, check ? a.first_bad() : -1);
  report(bad, 1, check ? b.first_bad() : -1);
  if (check && (a.first_bad() >= 0 || b.first_bad() >= 0)) return;
  const auto *a_ends = in<int64_t>(a_offsets), *b_ends = in<int64_t>(b_offsets);
  const auto* bias = in<float>(bias_tensor);
  auto* value = out<float>(value_tensor);
  auto* index = out<int64_t>(index_tensor);
  for_items(a_offsets.size(0) - 1, [&](int64_t item) {
    const int64_t first = b_ends[item], num = b_ends[item + 1] - first, begin = a_ends[item], end = a_ends[item + 1];
    if (begin == end) return;
    Targets targets(num);
    for (int64_t j = 0; j < num; ++j) {
      targets.row[j] = b.row(first + j);
      targets.scale[j] = cosine ? b.reciprocal(first + j) : 1;
      targets.bias[j] = bias ? bias[first + j] : 0;
    }
    if (Coarse::pays(end - begin, num, a_rows.width)) {
      const Rows theirs = b_rows.part(first, num);
      const auto scale = [&](int64_t j) { return targets.scale[j]; };
      const std::vector<float> less = Coarse::center(theirs, scale);
      const Left left(a, begin, a_rows.part(begin, end - begin), weights(a, begin, end - begin, cosine), less);
      argmax_rows(left, targets, Coarse(theirs, scale, less, Coarse::kRight), value, index);
    } else {
      argmax_rows(a, begin, end, targets, value, index);
    }
    if (cosine)
      for (int64_t i = begin; i < end; ++i) value[i] *= a.reciprocal(i);  // not negative: it never changes the argmax
  });
}

}  // namespace mmcompress::cpu
