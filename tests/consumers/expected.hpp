// SPDX-License-Identifier: MIT
#pragma once

// Two rows of three scores, and their mean cross-entropy by the formula.

#include <cmath>
#include <cstdio>

inline constexpr float scores[6] = {0.5f, -1.0f, 2.0f, 3.0f, 0.25f, -0.75f};
inline constexpr int labels[2] = {2, 1};

inline bool is_right(const char* who, float value) {
  double sum = 0;
  for (int row = 0; row < 2; ++row) {
    const float* x = scores + 3 * row;
    sum += std::log(std::exp(double(x[0])) + std::exp(double(x[1])) + std::exp(double(x[2]))) -
           double(x[labels[row]]);
  }
  const double expected = sum / 2;
  const bool right = std::abs(double(value) - expected) < 1e-6;
  if (!right) {
    std::printf("%s: %.9g, and should be %.9g\n", who, double(value), expected);
  }
  return right;
}
