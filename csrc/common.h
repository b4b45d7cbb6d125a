// What the CPU and CUDA kernels share: tensor views. Arguments were checked in Python; outputs are allocated there.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

namespace mmcompress {

using torch::stable::Tensor;

constexpr float kTie = 1e-6f;         // distances below this share of the norms count as zero
constexpr float kMinSquare = 1e-24f;  // rows with norms up to 1e-12 count as zero rows

enum class Type { f32, bf16, f16 };

inline Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::BFloat16: return Type::bf16;
    case torch::headeronly::ScalarType::Half: return Type::f16;
    default: return Type::f32;
  }
}

// Rows of a tensor [M, D]: contiguous along D, any stride between rows. (Accessors of Tensor are C calls: read once.)
struct Rows {
  const char* data;
  Type type;
  int64_t num, width, stride;  // stride in bytes
  explicit Rows(const Tensor& x)
      : data(static_cast<const char*>(x.const_data_ptr())),
        type(type_of(x)),
        num(x.size(0)),
        width(x.size(1)),
        stride(x.stride(0) * element()) {}
  Rows(const void* rows, Type element_type, int64_t count, int64_t columns)
      : data(static_cast<const char*>(rows)), type(element_type), num(count), width(columns), stride(columns * element()) {}
  Rows part(int64_t first, int64_t count) const {
    Rows rows = *this;
    rows.data = row(first);
    rows.num = count;
    return rows;
  }
  int64_t element() const { return type == Type::f32 ? 4 : 2; }
  const char* row(int64_t i) const { return data + i * stride; }
};

template <class T>
const T* in(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
const T* in(const std::optional<Tensor>& x) {
  return x.has_value() ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}
template <class T>
T* out(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

}  // namespace mmcompress
