// SPDX-License-Identifier: MIT
#pragma once

/// Random numbers by their place in a stream: the same on any number of threads.

#include <cstdint>

#include "../config.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// Number `at` of the stream of SplitMix64 (Steele, Lea and Flood 2014) that starts from `state`.
inline std::uint64_t split_mix(std::uint64_t state, std::uint64_t at) {
  std::uint64_t z = state + (at + 1) * 0x9e3779b97f4a7c15U;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
  return z ^ (z >> 31);
}
/// The same, in (0, 1) and symmetric about ½.
inline double uniform_at(std::uint64_t state, std::uint64_t at) {
  return (static_cast<double>(split_mix(state, at) >> 12) + 0.5) * 0x1p-52;
}

} // namespace perdita::inline PERDITA_ABI::core
