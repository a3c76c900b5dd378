// SPDX-License-Identifier: MIT
#pragma once

// What programs/hash_*.cpp have in common: hashes of results, which are to be the same on every
// instruction set with FMA, on plain scalars, and from every compiler. So they are written down.
// Where a change means to alter bits, the program says what they are now.

#include <bit>
#include <cinttypes>
#include <cstddef>
#include <cstdint>
#include <cstdio>

#include <perdita/core/simd.hpp>

namespace perdita_tests {

class fnv1a {
public:
  template <class T>
  requires requires(T x) { static_cast<double>(x); }
  void add(T x) {
    const auto wide = static_cast<double>(x);
    const std::uint64_t bits = wide != wide ? 1 : std::bit_cast<std::uint64_t>(wide); // any NaN
    for (int byte = 0; byte < 8; ++byte)
      hash_ = (hash_ ^ (bits >> (8 * byte) & 0xff)) * 0x100000001b3U;
  }
  template <class Numbers>
  requires requires(const Numbers& x) { x.begin(); }
  void add(const Numbers& numbers) {
    for (const auto& x : numbers)
      add(x);
  }
  std::uint64_t value() const { return hash_; }

private:
  std::uint64_t hash_ = 0xcbf29ce484222325U;
};

/// Numbers that no machine rounds: multiples of unit / 2^23 between -unit and unit.
class exact_numbers {
public:
  explicit exact_numbers(std::uint64_t seed) : state_(seed) {}
  double operator()(double unit) {
    state_ = state_ * 6364136223846793005U + 1442695040888963407U;
    return unit * static_cast<double>(static_cast<std::int64_t>(state_ >> 40) - (1 << 23)) *
           0x1p-23;
  }

private:
  std::uint64_t state_;
};

/// Hashes beside what they should be.
class hash_table {
public:
  template <class T> void row(const char* name, std::uint64_t expected, std::uint64_t found) {
    const bool same = found == expected;
    std::printf("%-20s %zu bits  0x%016" PRIx64 "%s\n", name, 8 * sizeof(T), found,
                same ? "" : "  differs");
    differ_ += !same;
  }
  /// The exit status.
  int end() const {
    if (!perdita::core::fused)
      std::printf("Without FMA they may differ.\n");
    return differ_ > 0 && perdita::core::fused;
  }

private:
  int differ_ = 0;
};

} // namespace perdita_tests
