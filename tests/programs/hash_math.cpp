// SPDX-License-Identifier: MIT

// Hashes of what core/math.hpp returns.

#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

#include <perdita/core/math.hpp>

#include "support/hash.hpp"

namespace core = perdita::core;

namespace {

/// Points from integer arithmetic alone: any bit pattern, and in turn 2^-12 <= |x| < 2^8.
template <class T> T point(std::uint64_t i) {
  using U = std::make_unsigned_t<core::bits_of<T>>;
  constexpr int mantissa = std::numeric_limits<T>::digits - 1;
  constexpr U bias = std::numeric_limits<T>::max_exponent - 1;
  constexpr U sign = U(1) << (8 * sizeof(T) - 1);
  std::uint64_t h = i * 0x9e3779b97f4a7c15U;
  h ^= h >> 32;
  const U any = static_cast<U>(h * 0xd6e8feb86659fd93U >> (64 - 8 * sizeof(T)));
  if (i % 2 == 0)
    return std::bit_cast<T>(any);
  const U usual = static_cast<U>(((bias - 12) << mantissa) + (any & ~sign) % (U(20) << mantissa));
  return std::bit_cast<T>(static_cast<U>(usual | (any & sign)));
}

perdita_tests::hash_table table;

template <class T, class F> void print(const char* name, std::uint64_t expected, F f) {
  constexpr std::uint64_t lanes = core::pack<T>::size;
  perdita_tests::fnv1a h;
  for (std::uint64_t i = 0; i < 1 << 18; i += lanes) {
    T values[lanes];
    for (std::uint64_t j = 0; j < lanes; ++j)
      values[j] = point<T>(i + j);
    f(core::pack<T>::load(values)).store(values);
    for (const T value : values)
      h.add(value);
  }
  table.row<T>(name, expected, h.value());
}

template <class T> void print_all() {
  using V = core::pack<T>;
  constexpr bool f = sizeof(T) == 4;
  print<T>("exp_shifted", f ? 0x3bbf90e13a7b6f1b : 0x99a170f14484ad11,
           [](const V& x) { return core::exp_shifted(min(x, V(20))); });
  print<T>("exp", f ? 0x18099c11e6049fe8 : 0x4a30c385cd7d4ca5,
           [](const V& x) { return core::exp(x); });
  print<T>("expm1", f ? 0xdfc499ba826e7f17 : 0x86879a735ecebff4,
           [](const V& x) { return core::expm1(x); });
  print<T>("log", f ? 0x3cf017487b0d16e8 : 0x9aee2adba1d85bfd,
           [](const V& x) { return core::log(x); });
  print<T>("log1p", f ? 0x7ccedc0e6648cdac : 0xb768845532555935,
           [](const V& x) { return core::log1p(x); });
  print<T>("softplus", f ? 0x1b1dd14529ba174b : 0xcc0dce1ee94932a8,
           [](const V& x) { return core::softplus(x); });
  print<T>("sigmoid", f ? 0x7e1e14f73f18bee8 : 0xf0356d2d120f27fb,
           [](const V& x) { return core::sigmoid(x); });
  print<T>("tanh", f ? 0x6e9bbcda99bb5ea2 : 0x6b41d50dd91cdcc2,
           [](const V& x) { return core::tanh(x); });
  print<T>("tanh_slope", f ? 0xff125439cba2ef15 : 0x31eb1d1fca4d025e,
           [](const V& x) { return core::tanh_with_slope(x).slope; });
  print<T>("exp_minus", f ? 0xfdf115b910b1d5be : 0x0221ce788468a59a,
           [](const V& x) { return core::exp_minus(abs(x)); });
  print<T>("one_minus_exp_minus", f ? 0x518b4cd71c20c148 : 0xec626d0d6ff591df,
           [](const V& x) { return core::one_minus_exp_minus(abs(x)); });
  print<T>("log1p_of_positive", f ? 0x8e2b1e6f2450f205 : 0xe519de01691a4b09,
           [](const V& x) { return core::log1p_of_positive(abs(x)); });
}

} // namespace

int main() {
  print_all<float>();
  print_all<double>();
  return table.end();
}
