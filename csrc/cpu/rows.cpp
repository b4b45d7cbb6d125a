// The best rows of every item by score, and the copy of rows with their positions.
#include "kernels.h"
#include "matrix.h"

namespace mmcompress::cpu {

void top_rows(Tensor score_tensor, Tensor offsets, Tensor out_offsets, bool check, Tensor rows_tensor, Tensor bad) {
  const int64_t num = score_tensor.size(0);
  const Type type = type_of(score_tensor);
  const auto* raw = in<char>(score_tensor);
  Buffer<float> wide(type == Type::f32 ? 0 : num);
  if (type != Type::f32) level().widen(raw, element_of(type), num, wide.data());
  const float* score = type == Type::f32 ? reinterpret_cast<const float*>(raw) : wide.data();
  report(bad, 0, -1);
  if (check)
    for (int64_t i = 0; i < num; ++i)
      if (std::isnan(score[i])) return report(bad, 0, i);
  const auto *ends = in<int64_t>(offsets), *out_ends = in<int64_t>(out_offsets);
  auto* rows = out<int64_t>(rows_tensor);
  for_items(offsets.size(0) - 1, [&](int64_t item) {
    const int64_t first = ends[item], n = ends[item + 1] - first, k = out_ends[item + 1] - out_ends[item];
    if (k == 0) return;
    int64_t* mine = rows + out_ends[item];
    // The k-th largest score, then all above it and the first ones equal to it. A NaN (without check) counts as -infinity.
    std::vector<float> order(score + first, score + first + n);
    const float lowest = -std::numeric_limits<float>::infinity();
    for (float& s : order) s = std::isnan(s) ? lowest : s;
    std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), std::greater<float>());
    const float limit = order[k - 1];
    int64_t equal = k;  // rows with score == limit that are taken
    for (int64_t i = 0; i < k; ++i) equal -= order[i] > limit;
    int64_t filled = 0;
    for (int64_t i = first; i < first + n && filled < k; ++i) {
      const float s = std::isnan(score[i]) ? lowest : score[i];
      if (s > limit || (s == limit && equal-- > 0)) mine[filled++] = i;
    }
  });
}

void gather_rows(Tensor x_tensor, Tensor positions, Tensor index_tensor, Tensor rows_tensor, Tensor out_positions) {
  const Rows x(x_tensor);
  const auto *index = in<int64_t>(index_tensor), *from = in<int64_t>(positions);
  auto* rows = out<char>(rows_tensor);
  auto* to = out<int64_t>(out_positions);
  const int64_t num = index_tensor.size(0), bytes = x.width * x.element(), axes = positions.dim() == 2 ? positions.size(0) : 1;
  const int64_t axis_stride = positions.dim() == 2 ? positions.stride(0) : 0, stride = positions.stride(positions.dim() - 1);
  parallel_for(0, num, std::max<int64_t>(1, (1 << 17) / bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::memcpy(rows + i * bytes, x.row(index[i]), bytes);
  });
  for (int64_t axis = 0; axis < axes; ++axis)
    for (int64_t i = 0; i < num; ++i) to[axis * num + i] = from[axis * axis_stride + index[i] * stride];
}

}  // namespace mmcompress::cpu
