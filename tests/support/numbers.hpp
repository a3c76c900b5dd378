// SPDX-License-Identifier: MIT
#pragma once

// Inputs from integer arithmetic, the same on every machine.

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "row_descriptor.hpp"

namespace perdita_tests {

/// SplitMix64 (Steele, Lea and Flood 2014).
class random_numbers {
public:
  explicit random_numbers(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15U) {}
  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15U;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    return z ^ (z >> 31);
  }
  std::uint64_t below(std::uint64_t n) { return next() % n; }
  double uniform(double low, double high) {
    return low + (high - low) * static_cast<double>(next() >> 11) * 0x1p-53;
  }
  /// Close enough to normal: what matters is that rows have a few large scores.
  double normal() {
    double sum = -6;
    for (int i = 0; i < 12; ++i)
      sum += uniform(0, 1);
    return sum;
  }

private:
  std::uint64_t state_;
};

inline std::vector<double> make_scores(row_kind kind, index cols, index label,
                                       random_numbers& random) {
  std::vector<double> x(static_cast<std::size_t>(cols));
  const auto fill = [&](auto f) {
    for (std::size_t j = 0; j < x.size(); ++j)
      x[j] = f(j);
  };
  const auto y = static_cast<std::size_t>(label);
  const auto gap = [&](double offset, double width) {
    fill([&](std::size_t) { return offset + random.uniform(-1, 0); });
    if (width == 0 && cols > 1)
      x[(y + 1) % x.size()] = offset;
    x[y] = offset + width;
  };
  const double n = static_cast<double>(cols);
  switch (kind) {
  case row_kind::normal:
    fill([&](std::size_t) { return 3 * random.normal(); });
    break;
  case row_kind::normal_wide:
    fill([&](std::size_t) { return 8 * random.normal() - 2; });
    break;
  case row_kind::spread_500:
    fill([&](std::size_t) { return random.uniform(-250, 250); });
    break;
  case row_kind::huge:
    fill([&](std::size_t) { return random.uniform(-1e30, 1e30); });
    break;
  case row_kind::tiny:
    fill([&](std::size_t) { return random.uniform(-1e-30, 1e-30); });
    break;
  case row_kind::ties:
    fill([&](std::size_t) { return static_cast<double>(random.below(4)) - 2; });
    if (cols > 1)
      x[0] = 2, x[1] = -2;
    break;
  case row_kind::equal: {
    const double c = random.uniform(-5, 5);
    fill([&](std::size_t) { return c; });
    break;
  }
  case row_kind::all_minus_200:
    fill([](std::size_t) { return -200; });
    break;
  case row_kind::all_minus_1000:
    fill([](std::size_t) { return -1000; });
    break;
  case row_kind::offset_1e4:
    fill([&](std::size_t) { return 1e4 + 3 * random.normal(); });
    break;
  case row_kind::ascending:
    fill([&](std::size_t j) { return 40 * static_cast<double>(j) / n - 20; });
    break;
  case row_kind::descending:
    fill([&](std::size_t j) { return 20 - 40 * static_cast<double>(j) / n; });
    break;
  case row_kind::gap_0:
    gap(0, 0);
    break;
  case row_kind::gap_5:
    gap(0, 5);
    break;
  case row_kind::gap_20:
    gap(0, 20);
    break;
  case row_kind::gap_60:
    gap(0, 60);
    break;
  case row_kind::gap_5_at_100:
    gap(100, 5);
    break;
  case row_kind::gap_20_at_100:
    gap(100, 20);
    break;
  case row_kind::gap_60_at_100:
    gap(100, 60);
    break;
  case row_kind::gap_20_at_1e4:
    gap(1e4, 20);
    break;
  case row_kind::behind_20:
    gap(0, -20);
    break;
  case row_kind::masked:
    fill([&](std::size_t j) {
      return j != y && (j + y) % 3 == 1 ? -std::numeric_limits<double>::infinity()
                                        : 3 * random.normal();
    });
    break;
  case row_kind::count:
    break;
  }
  return x;
}

/// A soft target that favours the label; for masked rows, nothing where the mask is.
inline std::vector<double> make_distribution(row_kind kind, index cols, index label,
                                             random_numbers& random) {
  const auto y = static_cast<std::size_t>(label);
  std::vector<double> q(static_cast<std::size_t>(cols));
  double sum = 0;
  for (std::size_t j = 0; j < q.size(); ++j) {
    const bool masked = kind == row_kind::masked && j != y && (j + y) % 3 == 1;
    q[j] = masked || (j % 5 == 4 && j != y) ? 0 : random.uniform(0.05, 1);
    sum += q[j];
  }
  const double most = random.uniform(0.2, 0.9);
  for (double& x : q)
    x *= (1 - most) / sum;
  q[y] += most;
  return q;
}

} // namespace perdita_tests
