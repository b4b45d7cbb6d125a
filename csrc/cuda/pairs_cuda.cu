// Density peaks and nearest neighbours: tiles of products, reduced row by row; the N x N matrix is never stored.
#include "common.cuh"
#include "kernels.h"

namespace mmcompress::cuda {
namespace {

struct Items {
  const int64_t* offsets;
  int64_t num;
};

// Squared distance over the width; symmetric to the last bit.
struct Distance {
  const float* square;
  float width;
  __device__ float operator()(int64_t i, int64_t j, float dot) const {
    const float limit = square[i] + square[j];
    return i == j ? 0.0f : snap(limit - 2 * dot, limit) / width;
  }
};

// The kMost smallest distances of every row (a thread of the first kTile each), and the largest of every item.
template <class T>
__global__ void density_kernel(const T* x, int64_t width, int64_t stride, Items items, Distance distance, int k, float* density,
                               unsigned int* largest) {
  __shared__ TileMemory memory;
  RowBlock rows;
  if (!rows.find(items.offsets, items.num, blockIdx.x)) return;
  const int64_t first = items.offsets[rows.item], num = items.offsets[rows.item + 1] - first, i = rows.first + threadIdx.x;
  float nearest[kMost];  // ascending
  for (int t = 0; t < k; ++t) nearest[t] = INFINITY;
  float most = 0;
  for (int64_t column = 0; column < num; column += kTile) {
    const int64_t count = min(static_cast<int64_t>(kTile), num - column);
    tile_products(x + rows.first * stride, rows.count, stride, x + (first + column) * stride, count, stride, width, memory);
    if (threadIdx.x < rows.count)
      for (int64_t j = 0; j < count; ++j) {
        const float d = distance(i, first + column + j, memory.product[threadIdx.x][j]);
        most = fmaxf(most, d);
        if (!(d < nearest[k - 1])) continue;
        int t = k - 1;
        for (; t > 0 && nearest[t - 1] > d; --t) nearest[t] = nearest[t - 1];
        nearest[t] = d;
      }
    __syncthreads();
  }
  if (threadIdx.x >= rows.count) return;
  double sum = 0;
  for (int t = 0; t < k; ++t) sum += nearest[t];
  density[i] = static_cast<float>(-sum / k);
  atomicMax(largest + rows.item, __float_as_uint(most));  // not negative: ordered as integers
}

template <class T>
__global__ void delta_kernel(const T* x, int64_t width, int64_t stride, Items items, Distance distance, const float* density,
                             const unsigned int* largest, float* delta) {
  __shared__ TileMemory memory;
  RowBlock rows;
  if (!rows.find(items.offsets, items.num, blockIdx.x)) return;
  const int64_t first = items.offsets[rows.item], num = items.offsets[rows.item + 1] - first, i = rows.first + threadIdx.x;
  float least = INFINITY;
  for (int64_t column = 0; column < num; column += kTile) {
    const int64_t count = min(static_cast<int64_t>(kTile), num - column);
    tile_products(x + rows.first * stride, rows.count, stride, x + (first + column) * stride, count, stride, width, memory);
    if (threadIdx.x < rows.count)
      for (int64_t c = 0; c < count; ++c) {
        const int64_t j = first + column + c;
        if (density[j] > density[i] || (density[j] == density[i] && j < i))
          least = fminf(least, distance(i, j, memory.product[threadIdx.x][c]));
      }
    __syncthreads();
  }
  if (threadIdx.x < rows.count) delta[i] = sqrtf(isinf(least) ? __uint_as_float(largest[rows.item]) : least);
}

template <class T>
__global__ void neighbor_kernel(const T* x, int64_t width, int64_t stride, Items items, const float* reciprocal, int k, float* value,
                                int64_t* index) {
  __shared__ TileMemory memory;
  RowBlock rows;
  if (!rows.find(items.offsets, items.num, blockIdx.x)) return;
  const int64_t first = items.offsets[rows.item], num = items.offsets[rows.item + 1] - first, i = rows.first + threadIdx.x;
  float best[kMost];  // descending; columns come in order, so a later equal value goes behind
  int64_t who[kMost];
  for (int t = 0; t < k; ++t) {
    best[t] = -INFINITY;
    who[t] = 0;
  }
  for (int64_t column = 0; column < num; column += kTile) {
    const int64_t count = min(static_cast<int64_t>(kTile), num - column);
    tile_products(x + rows.first * stride, rows.count, stride, x + (first + column) * stride, count, stride, width, memory);
    if (threadIdx.x < rows.count)
      for (int64_t j = 0; j < count; ++j) {
        const float s = memory.product[threadIdx.x][j] * (reciprocal[i] * reciprocal[first + column + j]);
        if (first + column + j == i || !(s > best[k - 1])) continue;
        int t = k - 1;
        for (; t > 0 && best[t - 1] < s; --t) {
          best[t] = best[t - 1];
          who[t] = who[t - 1];
        }
        best[t] = s;
        who[t] = column + j;
      }
    __syncthreads();
  }
  if (threadIdx.x >= rows.count) return;
  for (int t = 0; t < k; ++t) {
    value[i * k + t] = best[t];
    index[i * k + t] = who[t];
  }
}

}  // namespace

void dpc_knn(Tensor x, Tensor offsets, int64_t k, bool check, Tensor density, Tensor delta, Tensor bad) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const auto stream = current_stream(x);
  const Norms norms(x, bad, 0, check, stream);
  const int64_t num = x.size(0), width = x.size(1), stride = x.stride(0);
  if (num == 0) return;
  const Items items{in<int64_t>(offsets), offsets.size(0) - 1};
  const Distance distance{in<float>(norms.square), static_cast<float>(width)};
  const Tensor most = scratch(x, items.num, torch::headeronly::ScalarType::Int);
  auto* largest = reinterpret_cast<unsigned int*>(out<int>(most));
  STD_CUDA_CHECK(cudaMemsetAsync(largest, 0, items.num * sizeof(*largest), stream));
  auto *rho = out<float>(density), *separation = out<float>(delta);
  with_type(x, [&](auto* data) {
    const unsigned int blocks = row_blocks(num, items.num);
    density_kernel<<<blocks, kThreads, 0, stream>>>(data, width, stride, items, distance, static_cast<int>(k), rho, largest);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    delta_kernel<<<blocks, kThreads, 0, stream>>>(data, width, stride, items, distance, rho, largest, separation);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

void cosine_top_k(Tensor x, Tensor offsets, int64_t k, bool check, Tensor value, Tensor index, Tensor bad) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const auto stream = current_stream(x);
  const Norms norms(x, bad, 0, check, stream);
  const int64_t num = x.size(0), width = x.size(1), stride = x.stride(0);
  if (num == 0) return;
  const Items items{in<int64_t>(offsets), offsets.size(0) - 1};
  const auto* reciprocal = in<float>(norms.reciprocal);
  auto* best = out<float>(value);
  auto* who = out<int64_t>(index);
  with_type(x, [&](auto* data) {
    neighbor_kernel<<<row_blocks(num, items.num), kThreads, 0, stream>>>(data, width, stride, items, reciprocal, static_cast<int>(k),
                                                                         best, who);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace mmcompress::cuda
