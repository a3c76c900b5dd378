// SPDX-License-Identifier: MIT

// One line of hashes of what core/math.hpp returns, to be the same on every instruction set with
// FMA, on plain scalars, and from every compiler.

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <type_traits>

#include <perdita/core/math.hpp>

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

template <class T, class F> void print(const char* name, F f) {
  using U = std::make_unsigned_t<core::bits_of<T>>;
  constexpr std::uint64_t lanes = core::pack<T>::size;
  std::uint64_t hash = 0xcbf29ce484222325U; // FNV-1a
  for (std::uint64_t i = 0; i < 1 << 18; i += lanes) {
    T values[lanes];
    for (std::uint64_t j = 0; j < lanes; ++j)
      values[j] = point<T>(i + j);
    f(core::pack<T>::load(values)).store(values);
    for (T value : values) {
      const U bits =
          value != value ? U(1) : std::bit_cast<U>(value); // one NaN is as good as another
      for (std::size_t byte = 0; byte < sizeof(T); ++byte)
        hash = (hash ^ (bits >> (8 * byte) & 0xff)) * 0x100000001b3U;
    }
  }
  std::printf(" %s%zu=%016llx", name, 8 * sizeof(T), static_cast<unsigned long long>(hash));
}

template <class T> void print_all() {
  using V = core::pack<T>;
  print<T>("exp_shifted", [](const V& x) { return core::exp_shifted(min(x, V(20))); });
  print<T>("exp", [](const V& x) { return core::exp(x); });
  print<T>("expm1", [](const V& x) { return core::expm1(x); });
  print<T>("log", [](const V& x) { return core::log(x); });
  print<T>("log1p", [](const V& x) { return core::log1p(x); });
  print<T>("softplus", [](const V& x) { return core::softplus(x); });
  print<T>("sigmoid", [](const V& x) { return core::sigmoid(x); });
  print<T>("tanh", [](const V& x) { return core::tanh(x); });
  print<T>("tanh_slope", [](const V& x) { return core::tanh_with_slope(x).slope; });
  print<T>("exp_minus", [](const V& x) { return core::exp_minus(abs(x)); });
  print<T>("one_minus_exp_minus", [](const V& x) { return core::one_minus_exp_minus(abs(x)); });
  print<T>("log1p_of_positive", [](const V& x) { return core::log1p_of_positive(abs(x)); });
}

} // namespace

int main() {
  std::printf("math");
  print_all<float>();
  print_all<double>();
  std::printf("\n");
}
