// Registration: schemas are defined in Python (mmcompress/ops), which also checks the arguments and allocates the outputs.
#include "kernels.h"

#include "level.h"

namespace {

int64_t set_cpu_level(int64_t highest) { return mmcompress::cpu::set_level(static_cast<int>(highest)); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmcompress_kernels, CompositeExplicitAutograd, m) { m.impl("set_cpu_level", TORCH_BOX(&set_cpu_level)); }

STABLE_TORCH_LIBRARY_IMPL(mmcompress_kernels, CPU, m) {
  using namespace mmcompress::cpu;
  m.impl("k_center", TORCH_BOX(&k_center));
  m.impl("max_sum", TORCH_BOX(&max_sum));
  m.impl("similarity_argmax", TORCH_BOX(&similarity_argmax));
  m.impl("merge_mean", TORCH_BOX(&merge_mean));
  m.impl("top_rows", TORCH_BOX(&top_rows));
  m.impl("gather_rows", TORCH_BOX(&gather_rows));
  m.impl("dpc_knn", TORCH_BOX(&dpc_knn));
  m.impl("cosine_top_k", TORCH_BOX(&cosine_top_k));
  m.impl("kmeans_pp", TORCH_BOX(&kmeans_pp));
  m.impl("kmeans_lloyd", TORCH_BOX(&kmeans_lloyd));
}
