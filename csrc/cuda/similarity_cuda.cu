// Fused product and row argmax. Columns are split over blocks; their results meet in a 64-bit maximum of (value, lowest index).
#include "common.cuh"
#include "kernels.h"

namespace mmcompress::cuda {
namespace {

constexpr int kSplits = 8;

template <class T>
__global__ void argmax_kernel(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t width, const int64_t* a_offsets,
                              const int64_t* b_offsets, int64_t num_items, const float* scale, const float* bias,
                              unsigned long long* best) {
  __shared__ TileMemory memory;
  RowBlock rows;
  if (!rows.find(a_offsets, num_items, blockIdx.x)) return;
  const int64_t first = b_offsets[rows.item], num = b_offsets[rows.item + 1] - first;
  unsigned long long mine = 0;  // below every key
  for (int64_t tile = blockIdx.y; tile * kTile < num; tile += gridDim.y) {
    const int64_t column = tile * kTile, count = min(static_cast<int64_t>(kTile), num - column);
    tile_products(a + rows.first * a_stride, rows.count, a_stride, b + (first + column) * b_stride, count, b_stride, width, memory);
    if (threadIdx.x < rows.count)
      for (int64_t j = 0; j < count; ++j) {
        float value = memory.product[threadIdx.x][j] * (scale ? scale[first + column + j] : 1.0f);
        if (bias) value += bias[first + column + j];
        const unsigned long long key = key_of(value, static_cast<uint32_t>(column + j));
        mine = key > mine ? key : mine;
      }
    __syncthreads();
  }
  if (threadIdx.x < rows.count && mine) atomicMax(best + rows.first + threadIdx.x, mine);
}

__global__ void decode_kernel(int64_t num, const float* factor, float* value, int64_t* index) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= num) return;
  const auto key = static_cast<unsigned long long>(index[i]);
  value[i] = unordered(static_cast<uint32_t>(key >> 32)) * (factor ? factor[i] : 1.0f);
  index[i] = index_of(key);
}

}  // namespace

void similarity_argmax(Tensor a, Tensor b, Tensor a_offsets, Tensor b_offsets, bool cosine, Optional bias, bool check, Tensor value,
                       Tensor index, Tensor bad) {
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  const auto stream = current_stream(a);
  const int64_t num = a.size(0), width = a.size(1), num_items = a_offsets.size(0) - 1, a_stride = a.stride(0), b_stride = b.stride(0);
  const Norms a_norms(a, bad, 0, check, stream), b_norms(b, bad, 1, check, stream);
  if (num == 0) return;
  auto* best = out<int64_t>(index);
  STD_CUDA_CHECK(cudaMemsetAsync(best, 0, num * sizeof(int64_t), stream));
  const auto *a_ends = in<int64_t>(a_offsets), *b_ends = in<int64_t>(b_offsets);
  const auto *scale = cosine ? in<float>(b_norms.reciprocal) : nullptr, *add = in<float>(bias);
  const auto* b_data = b.const_data_ptr();
  with_type(a, [&](auto* data) {
    argmax_kernel<<<dim3(row_blocks(num, num_items), kSplits), kThreads, 0, stream>>>(
        data, a_stride, static_cast<decltype(data)>(b_data), b_stride, width, a_ends, b_ends, num_items, scale, add,
        reinterpret_cast<unsigned long long*>(best));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  decode_kernel<<<blocks_for(num), kThreads, 0, stream>>>(num, cosine ? in<float>(a_norms.reciprocal) : nullptr, out<float>(value),
                                                          best);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace mmcompress::cuda
