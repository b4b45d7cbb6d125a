// The CUDA kernels, as the schemas of mmcompress_kernels name them (see cpu/kernels.h). Seeding is left to the PyTorch form, k-means
// is composed of the kernels below.
#pragma once

#include "../common.h"

namespace mmcompress::cuda {

using Optional = std::optional<Tensor>;
constexpr int kMost = 32;  // neighbours per row that dpc_knn and cosine_top_k keep; Python sends larger k to the reference

void k_center(Tensor x, Tensor offsets, Tensor out_offsets, Optional start, bool cosine, bool check, Tensor picks, Tensor bad);
void max_sum(Tensor x, Tensor offsets, Tensor out_offsets, Optional start, bool check, Tensor picks, Tensor bad);
void similarity_argmax(Tensor a, Tensor b, Tensor a_offsets, Tensor b_offsets, bool cosine, Optional bias, bool check, Tensor value,
                       Tensor index, Tensor bad);
// `order` is the stable argsort of the assignment, `start` [num_out + 1] where each output begins in it.
void merge_mean(Tensor x, Tensor order, Tensor start, Optional size, bool check, Tensor mean, Tensor total, Tensor bad);
void top_rows(Tensor score, Tensor offsets, Tensor out_offsets, bool check, Tensor rows, Tensor bad);
void gather_rows(Tensor x, Tensor positions, Tensor index, Tensor rows, Tensor out_positions);
void dpc_knn(Tensor x, Tensor offsets, int64_t k, bool check, Tensor density, Tensor delta, Tensor bad);
void cosine_top_k(Tensor x, Tensor offsets, int64_t k, bool check, Tensor value, Tensor index, Tensor bad);

}  // namespace mmcompress::cuda
