// What the CUDA kernels share: element access, norms, items of a ragged batch, and the tile of products that all of them are built on.
// Everything is launched on the current stream, nothing waits for the device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include "../common.h"

namespace mmcompress::cuda {

constexpr int kThreads = 256;
constexpr int kTile = 64;   // rows and columns of a tile
constexpr int kDepth = 16;  // width of a slice of it

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline Tensor scratch(const Tensor& like, int64_t n, torch::headeronly::ScalarType type) {
  return torch::stable::new_empty(like, {n < 1 ? int64_t{1} : n}, type);
}

// Calls f with a pointer of x's element type.
template <class F>
void with_type(const Tensor& x, F f) {
  switch (type_of(x)) {
    case Type::f32: return f(in<float>(x));
    case Type::bf16: return f(in<__nv_bfloat16>(x));
    case Type::f16: return f(in<__half>(x));
  }
}

__device__ inline float as_float(float x) { return x; }
__device__ inline float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float as_float(__half x) { return __half2float(x); }
__device__ inline void round_to(float x, float* out) { *out = x; }
__device__ inline void round_to(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
__device__ inline void round_to(float x, __half* out) { *out = __float2half_rn(x); }

__device__ inline float snap(float distance, float limit) { return distance > kTie * limit ? distance : 0.0f; }

// Unsigned integers in the order of the floats.
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float unordered(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }
// The largest key: the largest value, the lowest index among equal ones.
__device__ inline unsigned long long key_of(float value, uint32_t index) {
  return static_cast<unsigned long long>(ordered(value)) << 32 | static_cast<uint32_t>(~index);
}
__device__ inline int64_t index_of(unsigned long long key) { return static_cast<uint32_t>(~static_cast<uint32_t>(key)); }

// The item that row i belongs to: the last one that starts at or before it (empty items are passed over).
__device__ inline int64_t item_of(const int64_t* offsets, int64_t num_items, int64_t i) {
  int64_t low = 0, high = num_items - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (offsets[middle] <= i) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

__device__ inline float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Dot product of two rows by one warp; every lane gets it. Commutative to the last bit.
template <class T>
__device__ float warp_dot(const T* a, const T* b, int64_t width) {
  float sum = 0;
  for (int64_t w = threadIdx.x % 32; w < width; w += 32) sum = fmaf(as_float(a[w]), as_float(b[w]), sum);
  return warp_sum(sum);
}

// Squares and reciprocal norms of all rows, one warp each; the lowest row that is not finite goes to *bad (-1 is the largest
// unsigned).
template <class T>
__global__ void norms_kernel(const T* x, int64_t num, int64_t width, int64_t stride, float* square, float* reciprocal,
                             unsigned long long* bad) {
  const int64_t i = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) / 32;
  if (i >= num) return;
  const float s = warp_dot(x + i * stride, x + i * stride, width);
  if (threadIdx.x % 32) return;
  square[i] = s;
  reciprocal[i] = s > kMinSquare ? 1.0f / sqrtf(s) : 0.0f;
  if (bad && !isfinite(s)) atomicMin(bad, static_cast<unsigned long long>(i));
}

inline unsigned int blocks_for(int64_t threads) { return static_cast<unsigned int>((threads + kThreads - 1) / kThreads); }

struct Norms {
  Tensor square, reciprocal;
  Norms(const Tensor& x, const Tensor& bad, int64_t position, bool check, cudaStream_t stream)
      : square(scratch(x, x.size(0), torch::headeronly::ScalarType::Float)),
        reciprocal(scratch(x, x.size(0), torch::headeronly::ScalarType::Float)) {
    const int64_t num = x.size(0), width = x.size(1), stride = x.stride(0);
    if (num == 0) return;
    auto* flag = check ? reinterpret_cast<unsigned long long*>(out<int64_t>(bad)) + position : nullptr;
    auto *s = out<float>(square), *r = out<float>(reciprocal);
    with_type(x,
              [&](auto* data) { norms_kernel<<<blocks_for(num * 32), kThreads, 0, stream>>>(data, num, width, stride, s, r, flag); });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

// A block of up to kTile rows of one item. There are at most M / kTile + B of them; `find` returns false beyond the last one.
struct RowBlock {
  int64_t item, first, count;
  __device__ bool find(const int64_t* offsets, int64_t num_items, int64_t block) {
    for (item = 0; item < num_items; ++item) {
      const int64_t rows = offsets[item + 1] - offsets[item], blocks = (rows + kTile - 1) / kTile;
      if (block < blocks) {
        first = offsets[item] + block * kTile;
        count = min(static_cast<int64_t>(kTile), offsets[item + 1] - first);
        return true;
      }
      block -= blocks;
    }
    return false;
  }
};
inline unsigned int row_blocks(int64_t num, int64_t num_items) { return static_cast<unsigned int>(num / kTile + num_items); }

struct TileMemory {
  float a[kDepth][kTile + 4], b[kDepth][kTile + 4];
  float product[kTile][kTile + 1];
};

// products[i][j] = a_i . b_j, float32 sums in the order of the width; rows beyond the counts give 0. All kThreads threads take part;
// the result is complete for all of them on return. The sum of a pair does not depend on its place in the tile.
template <class T>
__device__ void tile_products(const T* a, int64_t num_a, int64_t a_stride, const T* b, int64_t num_b, int64_t b_stride, int64_t width,
                              TileMemory& memory) {
  const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
  float sum[4][4] = {};
  for (int64_t w0 = 0; w0 < width; w0 += kDepth) {
    for (int t = threadIdx.x; t < kTile * kDepth; t += kThreads) {
      const int i = t / kDepth, w = t % kDepth;
      const bool inside = w0 + w < width;
      memory.a[w][i] = inside && i < num_a ? as_float(a[i * a_stride + w0 + w]) : 0.0f;
      memory.b[w][i] = inside && i < num_b ? as_float(b[i * b_stride + w0 + w]) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kDepth; ++w) {
      float left[4], right[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        left[i] = memory.a[w][row + i];
        right[i] = memory.b[w][column + i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(left[i], right[j], sum[i][j]);
    }
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) memory.product[row + i][column + j] = sum[i][j];
  __syncthreads();
}

}  // namespace mmcompress::cuda
