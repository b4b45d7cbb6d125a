// Registration of the CUDA kernels; see cpu/register.cpp.
#include "kernels.h"

STABLE_TORCH_LIBRARY_IMPL(mmcompress_kernels, CUDA, m) {
  using namespace mmcompress::cuda;
  m.impl("k_center", TORCH_BOX(&k_center));
  m.impl("max_sum", TORCH_BOX(&max_sum));
  m.impl("similarity_argmax", TORCH_BOX(&similarity_argmax));
  m.impl("merge_mean_sorted", TORCH_BOX(&merge_mean));
  m.impl("top_rows", TORCH_BOX(&top_rows));
  m.impl("gather_rows", TORCH_BOX(&gather_rows));
  m.impl("dpc_knn", TORCH_BOX(&dpc_knn));
  m.impl("cosine_top_k", TORCH_BOX(&cosine_top_k));
}
