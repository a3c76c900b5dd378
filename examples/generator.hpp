// SPDX-License-Identifier: MIT
#pragma once

/// The random numbers of the examples.

#include <cstdint>

/// SplitMix64. The engines of <random> are the same everywhere, but its distributions and
/// std::shuffle are not, and the examples should train the same model everywhere.
class generator {
public:
  explicit generator(std::uint64_t start) : state_(start) {}

  float symmetric() { return static_cast<float>(bits() >> 40) * 0x1p-23f - 1; } // in [-1, 1)
  int below(int n) {
    return static_cast<int>(((bits() >> 32) * static_cast<std::uint64_t>(n)) >> 32);
  }

private:
  std::uint64_t bits() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  std::uint64_t state_;
};
