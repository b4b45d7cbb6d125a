// Farthest-first and max-sum picks of all items in one cooperative kernel: every step, one warp per row updates its distance (or sum)
// with the last pick of its item and proposes the row; a 64-bit maximum decides; the grid meets once (max-sum: twice) per step.
#include <cooperative_groups.h>

#include "common.cuh"
#include "kernels.h"

namespace mmcompress::cuda {
namespace {

struct Arguments {
  int64_t num, width, stride, num_items;
  const int64_t *offsets, *out_offsets, *start;
  const float *square, *reciprocal;
  bool cosine;
  int64_t* picks;
};

// The largest number of picks of any item: known to the device only.
__device__ int64_t most_picks(const Arguments& p) {
  int64_t most = 0;
  for (int64_t item = 0; item < p.num_items; ++item) most = max(most, p.out_offsets[item + 1] - p.out_offsets[item]);
  return most;
}

__device__ void first_picks(const Arguments& p, int64_t thread, int64_t threads) {
  for (int64_t item = thread; item < p.num_items; item += threads)
    if (p.out_offsets[item] < p.out_offsets[item + 1]) p.picks[p.out_offsets[item]] = p.offsets[item] + (p.start ? p.start[item] : 0);
}

template <class T>
__global__ void k_center_kernel(const T* x, Arguments p, float* distance,
                                unsigned long long* best) {  // best [2, B], zero at the start
  const auto grid = cooperative_groups::this_grid();
  const auto thread = static_cast<int64_t>(grid.thread_rank()), threads = static_cast<int64_t>(grid.size());
  const int64_t warp = thread / 32, warps = threads / 32, steps = most_picks(p);
  first_picks(p, thread, threads);
  grid.sync();
  for (int64_t step = 0; step + 1 < steps; ++step) {
    unsigned long long* now = best + (step % 2) * p.num_items;
    unsigned long long* next = best + ((step + 1) % 2) * p.num_items;
    for (int64_t i = warp; i < p.num; i += warps) {
      const int64_t item = item_of(p.offsets, p.num_items, i), first = p.out_offsets[item];
      if (first + step + 1 >= p.out_offsets[item + 1]) continue;
      const int64_t pick = p.picks[first + step];
      const float dot = warp_dot(x + i * p.stride, x + pick * p.stride, p.width);
      if (threadIdx.x % 32) continue;
      float d = p.cosine ? 1.0f - dot * (p.reciprocal[pick] * p.reciprocal[i]) : (p.square[i] + p.square[pick]) / 2 - dot;
      d = snap(d, p.cosine ? 1.0f : p.square[i]);
      if (step > 0) d = fminf(d, distance[i]);  // a taken row keeps -1
      if (i == pick) d = -1.0f;
      distance[i] = d;
      if (d >= 0) atomicMax(now + item, key_of(d, static_cast<uint32_t>(i - p.offsets[item])));
    }
    grid.sync();
    for (int64_t item = thread; item < p.num_items; item += threads) {
      const int64_t place = p.out_offsets[item] + step + 1;
      if (place < p.out_offsets[item + 1]) p.picks[place] = p.offsets[item] + index_of(now[item]);
      next[item] = 0;
    }
    grid.sync();
  }
}

__device__ inline unsigned long long ordered(double x) {
  const auto bits = static_cast<unsigned long long>(__double_as_longlong(x));
  return bits >> 63 ? ~bits : bits | 1ull << 63;
}

template <class T>
__global__ void max_sum_kernel(const T* x, Arguments p, double* sum, unsigned long long* best, unsigned long long* row) {
  // best [2, B] smallest sum as an ordered integer, row [2, B] the lowest row that has it; all bits set at the start
  const auto grid = cooperative_groups::this_grid();
  const auto thread = static_cast<int64_t>(grid.thread_rank()), threads = static_cast<int64_t>(grid.size());
  const int64_t warp = thread / 32, warps = threads / 32, steps = most_picks(p);
  first_picks(p, thread, threads);
  grid.sync();
  for (int64_t step = 0; step + 1 < steps; ++step) {
    const int64_t now = (step % 2) * p.num_items, next = ((step + 1) % 2) * p.num_items;
    for (int64_t i = warp; i < p.num; i += warps) {
      const int64_t item = item_of(p.offsets, p.num_items, i), first = p.out_offsets[item];
      if (first + step + 1 >= p.out_offsets[item + 1]) continue;
      const int64_t pick = p.picks[first + step];
      const float cosine = warp_dot(x + i * p.stride, x + pick * p.stride, p.width) * (p.reciprocal[pick] * p.reciprocal[i]);
      if (threadIdx.x % 32) continue;
      const double s = (step > 0 ? sum[i] : 0.0) + (cosine > 1 - kTie ? 1.0f : cosine);
      sum[i] = i == pick ? INFINITY : s;  // infinity stays infinity
      atomicMin(best + now + item, ordered(sum[i]));
    }
    grid.sync();
    for (int64_t i = thread; i < p.num; i += threads) {
      const int64_t item = item_of(p.offsets, p.num_items, i), first = p.out_offsets[item];
      if (first + step + 1 < p.out_offsets[item + 1] && ordered(sum[i]) == best[now + item])
        atomicMin(row + now + item, static_cast<unsigned long long>(i));
    }
    for (int64_t item = thread; item < p.num_items; item += threads) best[next + item] = row[next + item] = ~0ull;
    grid.sync();
    for (int64_t item = thread; item < p.num_items; item += threads) {
      const int64_t place = p.out_offsets[item] + step + 1;
      if (place < p.out_offsets[item + 1]) p.picks[place] = static_cast<int64_t>(row[now + item]);
    }
    grid.sync();
  }
}

// As many blocks as are resident at once, but no more than there is work for.
template <class Kernel>
void launch(Kernel kernel, int64_t num, void** arguments, cudaStream_t stream) {
  int device = 0, processors = 0, resident = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0));
  const int64_t most = static_cast<int64_t>(processors) * (resident < 2 ? resident : 2), wanted = blocks_for(num * 32);
  const auto blocks = static_cast<unsigned int>(wanted < most ? wanted : most);
  STD_CUDA_CHECK(
      cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(kThreads), arguments, 0, stream));
}

Arguments arguments_of(const Tensor& x, const Tensor& offsets, const Tensor& out_offsets, const Optional& start, const Norms& norms,
                       bool cosine, const Tensor& picks) {
  return {x.size(0),
          x.size(1),
          x.stride(0),
          offsets.size(0) - 1,
          in<int64_t>(offsets),
          in<int64_t>(out_offsets),
          in<int64_t>(start),
          in<float>(norms.square),
          in<float>(norms.reciprocal),
          cosine,
          out<int64_t>(picks)};
}

}  // namespace

void k_center(Tensor x, Tensor offsets, Tensor out_offsets, Optional start, bool cosine, bool check, Tensor picks, Tensor bad) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const auto stream = current_stream(x);
  const Norms norms(x, bad, 0, check, stream);
  if (x.size(0) == 0) return;
  Arguments p = arguments_of(x, offsets, out_offsets, start, norms, cosine, picks);
  const Tensor distances = scratch(x, p.num, torch::headeronly::ScalarType::Float);
  const Tensor keys = scratch(x, 2 * p.num_items, torch::headeronly::ScalarType::Long);
  auto* distance = out<float>(distances);
  auto* best = reinterpret_cast<unsigned long long*>(out<int64_t>(keys));
  STD_CUDA_CHECK(cudaMemsetAsync(best, 0, 2 * p.num_items * sizeof(*best), stream));
  with_type(x, [&](auto* data) {
    void* arguments[] = {&data, &p, &distance, &best};
    launch(k_center_kernel<std::remove_const_t<std::remove_pointer_t<decltype(data)>>>, p.num, arguments, stream);
  });
}

void max_sum(Tensor x, Tensor offsets, Tensor out_offsets, Optional start, bool check, Tensor picks, Tensor bad) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const auto stream = current_stream(x);
  const Norms norms(x, bad, 0, check, stream);
  if (x.size(0) == 0) return;
  Arguments p = arguments_of(x, offsets, out_offsets, start, norms, true, picks);
  const Tensor sums = scratch(x, p.num, torch::headeronly::ScalarType::Double);
  const Tensor keys = scratch(x, 4 * p.num_items, torch::headeronly::ScalarType::Long);
  auto* sum = out<double>(sums);
  auto* best = reinterpret_cast<unsigned long long*>(out<int64_t>(keys));
  auto* row = best + 2 * p.num_items;
  STD_CUDA_CHECK(cudaMemsetAsync(best, 0xff, 4 * p.num_items * sizeof(*best), stream));
  with_type(x, [&](auto* data) {
    void* arguments[] = {&data, &p, &sum, &best, &row};
    launch(max_sum_kernel<std::remove_const_t<std::remove_pointer_t<decltype(data)>>>, p.num, arguments, stream);
  });
}

}  // namespace mmcompress::cuda
