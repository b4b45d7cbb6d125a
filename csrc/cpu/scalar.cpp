// Portable: plain loops over four lanes, which any compiler may vectorise. For correctness everywhere, not for speed.
#include "level.h"

namespace mmcompress::cpu {
namespace {

struct Four {
  float lane[4];
};

struct Scalar {
  using Sum = Four;
  using Data = Four;
  static constexpr int kLanes = 4, kVectors = 2;
  static Sum zero() { return {}; }
  static Sum set(float x) { return {{x, x, x, x}}; }
  static Data load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static Data broadcast(const float* p) { return set(*p); }
  static Sum load_sum(const float* p) { return load(p); }
  static void store(float* p, Sum x) { __builtin_memcpy(p, x.lane, sizeof x.lane); }
  template <class F>
  static Sum each(F f) {
    return {{f(0), f(1), f(2), f(3)}};
  }
  static Sum multiply_add(Data a, Data b, Sum sum) {
    return each([&](int i) { return a.lane[i] * b.lane[i] + sum.lane[i]; });
  }
  static Sum plus(Sum a, Sum b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Sum times(Sum a, Sum b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static Sum larger(Sum a, Sum b) {
    return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static float total(Sum x) { return (x.lane[0] + x.lane[2]) + (x.lane[1] + x.lane[3]); }
  static float largest(Sum x) {
    const float a = x.lane[0] > x.lane[1] ? x.lane[0] : x.lane[1], b = x.lane[2] > x.lane[3] ? x.lane[2] : x.lane[3];
    return a > b ? a : b;
  }
  template <Element T>
  static Sum as_float(const void* row, int64_t i);
  template <Element T>
  static void from_float(void* row, int64_t i, Sum x);
};

#include "level_impl.h"

template <Element T>
Four Scalar::as_float(const void* row, int64_t i) {
  return each([&](int lane) { return element(row, T, i + lane); });
}
template <Element T>
void Scalar::from_float(void* row, int64_t i, Four x) {
  for (int lane = 0; lane < 4; ++lane) set_element(row, T, i + lane, x.lane[lane]);
}

constexpr Level kLevel = make_level<Scalar>("scalar");

}  // namespace

const Level& scalar_level() { return kLevel; }

}  // namespace mmcompress::cpu
