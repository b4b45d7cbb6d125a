// Weighted means of groups of rows, the best rows of every item, and the copy of rows with their positions.
#include "common.cuh"
#include "kernels.h"

namespace mmcompress::cuda {
namespace {

// One block per output; the rows of output j are order[start[j]] ... order[start[j + 1] - 1], ascending.
template <class T>
__global__ void merge_kernel(const T* x, int64_t width, int64_t stride, const int64_t* order, const int64_t* start, const float* size,
                             T* mean, float* total, unsigned long long* bad) {
  const int64_t j = blockIdx.x, first = start[j], last = start[j + 1];
  double weight = 0;
  for (int64_t i = first; i < last; ++i) weight += size ? size[order[i]] : 1.0f;
  if (threadIdx.x == 0) total[j] = static_cast<float>(weight);
  const float factor = weight != 0 ? static_cast<float>(1 / weight) : 0.0f;
  float square = 0;
  for (int64_t w = threadIdx.x; w < width; w += blockDim.x) {
    float sum = 0;
    for (int64_t i = first; i < last; ++i) sum = fmaf(size ? size[order[i]] : 1.0f, as_float(x[order[i] * stride + w]), sum);
    const bool copy = last - first == 1 && weight != 0;  // exact, whatever the weight
    if (copy) sum = as_float(x[order[first] * stride + w]);
    const float value = copy ? sum : weight != 0 ? sum * factor : 0.0f;
    square = fmaf(value, value, square);
    round_to(value, mean + j * width + w);
  }
  if (!bad) return;
  square = warp_sum(square);
  if (threadIdx.x % 32 == 0 && !isfinite(square)) atomicMin(bad, static_cast<unsigned long long>(j));
}

// rank of a row = how many rows of its item come before it by (score descending, row ascending); one warp per row.
template <class T>
__global__ void rank_kernel(const T* score, int64_t num, const int64_t* offsets, const int64_t* out_offsets, int64_t num_items,
                            int* chosen, unsigned long long* bad) {
  const int64_t i = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) / 32;
  if (i >= num) return;
  const int64_t item = item_of(offsets, num_items, i), k = out_offsets[item + 1] - out_offsets[item];
  const auto value = [&](int64_t row) {
    const float s = as_float(score[row]);
    return isnan(s) ? -INFINITY : s;
  };
  const float mine = value(i);
  int64_t before = 0;
  for (int64_t j = offsets[item] + threadIdx.x % 32; j < offsets[item + 1]; j += 32) {
    const float other = value(j);
    before += other > mine || (other == mine && j < i);
  }
  for (int step = 16; step > 0; step /= 2) before += __shfl_xor_sync(0xffffffffu, before, step);
  if (threadIdx.x % 32) return;
  chosen[i] = before < k;
  if (bad && isnan(as_float(score[i]))) atomicMin(bad, static_cast<unsigned long long>(i));
}

// A chosen row goes to the place that is the number of chosen rows of its item before it; one warp per row.
__global__ void place_kernel(const int* chosen, int64_t num, const int64_t* offsets, const int64_t* out_offsets, int64_t num_items,
                             int64_t* rows) {
  const int64_t i = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) / 32;
  if (i >= num || !chosen[i]) return;
  const int64_t item = item_of(offsets, num_items, i);
  int64_t before = 0;
  for (int64_t j = offsets[item] + threadIdx.x % 32; j < i; j += 32) before += chosen[j];
  for (int step = 16; step > 0; step /= 2) before += __shfl_xor_sync(0xffffffffu, before, step);
  if (threadIdx.x % 32 == 0) rows[out_offsets[item] + before] = i;
}

template <class T>
__global__ void gather_kernel(const T* x, int64_t width, int64_t stride, const int64_t* index, int64_t num_rows, T* rows,
                              const int64_t* positions, int64_t axes, int64_t axis_stride, int64_t position_stride,
                              int64_t* out_positions) {
  const int64_t i = blockIdx.x;
  const int64_t from = min(max(index[i], static_cast<int64_t>(0)), num_rows - 1);  // never out of range
  for (int64_t w = threadIdx.x; w < width; w += blockDim.x) rows[i * width + w] = x[from * stride + w];
  for (int64_t axis = threadIdx.x; axis < axes; axis += blockDim.x)
    out_positions[axis * gridDim.x + i] = positions[axis * axis_stride + from * position_stride];
}

}  // namespace

void merge_mean(Tensor x, Tensor order, Tensor start, Optional size, bool check, Tensor mean, Tensor total, Tensor bad) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const auto stream = current_stream(x);
  const int64_t num_out = mean.size(0), width = x.size(1), stride = x.stride(0);
  if (num_out == 0) return;
  const auto *rows = in<int64_t>(order), *first = in<int64_t>(start);
  const auto* weight = in<float>(size);
  auto* sizes = out<float>(total);
  auto* flag = check ? reinterpret_cast<unsigned long long*>(out<int64_t>(bad)) : nullptr;
  void* to = mean.mutable_data_ptr();
  with_type(x, [&](auto* data) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    merge_kernel<<<static_cast<unsigned int>(num_out), kThreads, 0, stream>>>(data, width, stride, rows, first, weight,
                                                                              static_cast<T*>(to), sizes, flag);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void top_rows(Tensor score, Tensor offsets, Tensor out_offsets, bool check, Tensor rows, Tensor bad) {
  const torch::stable::accelerator::DeviceGuard guard(score.get_device_index());
  const auto stream = current_stream(score);
  const int64_t num = score.size(0), num_items = offsets.size(0) - 1;
  if (num == 0) return;
  const Tensor flags = scratch(score, num, torch::headeronly::ScalarType::Int);
  auto* chosen = out<int>(flags);
  const auto *ends = in<int64_t>(offsets), *out_ends = in<int64_t>(out_offsets);
  auto* flag = check ? reinterpret_cast<unsigned long long*>(out<int64_t>(bad)) : nullptr;
  with_type(score, [&](auto* data) {
    rank_kernel<<<blocks_for(num * 32), kThreads, 0, stream>>>(data, num, ends, out_ends, num_items, chosen, flag);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  place_kernel<<<blocks_for(num * 32), kThreads, 0, stream>>>(chosen, num, ends, out_ends, num_items, out<int64_t>(rows));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void gather_rows(Tensor x, Tensor positions, Tensor index, Tensor rows, Tensor out_positions) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const auto stream = current_stream(x);
  const int64_t num = index.size(0), width = x.size(1), stride = x.stride(0), num_rows = x.size(0), dims = positions.dim();
  if (num == 0) return;
  const int64_t axes = dims == 2 ? positions.size(0) : 1, axis_stride = dims == 2 ? positions.stride(0) : 0;
  const int64_t position_stride = positions.stride(dims - 1);
  const auto *from = in<int64_t>(positions), *which = in<int64_t>(index);
  auto* places = out<int64_t>(out_positions);
  void* to = rows.mutable_data_ptr();
  with_type(x, [&](auto* data) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    gather_kernel<<<static_cast<unsigned int>(num), kThreads, 0, stream>>>(data, width, stride, which, num_rows, static_cast<T*>(to),
                                                                           from, axes, axis_stride, position_stride, places);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace mmcompress::cuda
