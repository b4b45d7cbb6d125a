// The CPU kernels, as the schemas of mmcompress_kernels name them. The last tensors are outputs; `bad` takes the lowest row that is
// not finite, or -1 (always -1 without `check`).
#pragma once

#include "../common.h"

namespace mmcompress::cpu {

using Optional = std::optional<Tensor>;

void k_center(Tensor x, Tensor offsets, Tensor out_offsets, Optional start, bool cosine, bool check, Tensor picks, Tensor bad);
void max_sum(Tensor x, Tensor offsets, Tensor out_offsets, Optional start, bool check, Tensor picks, Tensor bad);
void similarity_argmax(Tensor a, Tensor b, Tensor a_offsets, Tensor b_offsets, bool cosine, Optional bias, bool check, Tensor value,
                       Tensor index, Tensor bad);
void merge_mean(Tensor x, Tensor assignment, Optional size, bool check, Tensor mean, Tensor total, Tensor bad);
void top_rows(Tensor score, Tensor offsets, Tensor out_offsets, bool check, Tensor rows, Tensor bad);
void gather_rows(Tensor x, Tensor positions, Tensor index, Tensor rows, Tensor out_positions);
void dpc_knn(Tensor x, Tensor offsets, int64_t k, bool check, Tensor density, Tensor delta, Tensor bad);
void cosine_top_k(Tensor x, Tensor offsets, int64_t k, bool check, Tensor value, Tensor index, Tensor bad);
void kmeans_pp(Tensor x, Tensor uniform, bool cosine, double eps, bool check, Tensor picks, Tensor bad);
void kmeans_lloyd(Tensor x, Tensor offsets, int64_t iterations, bool cosine, bool check, Tensor centroid, Tensor assignment,
                  Tensor size, Tensor bad);

}  // namespace mmcompress::cpu
