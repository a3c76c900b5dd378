// SPDX-License-Identifier: MIT
#pragma once

// What every consumer computes: the mean cross-entropy of two rows of three scores, by Perdita and
// by the formula. Static: each file that includes this is compiled with flags of its own.

#include <perdita/cross_entropy.hpp>

#include <cmath>
#include <cstdio>

static const float scores[6] = {0.5f, -1.0f, 2.0f, 3.0f, 0.25f, -0.75f};
static const int labels[2] = {2, 1};

[[maybe_unused]] static float by_perdita() {
  perdita::cross_entropy<float> loss;
  return loss(perdita::matrix_view<const float>(scores, 2, 3),
              perdita::vector_view<const int>(labels, 2));
}

[[maybe_unused]] static double by_formula() {
  double sum = 0;
  for (int row = 0; row < 2; ++row) {
    const float* x = scores + 3 * row;
    sum += std::log(std::exp(double(x[0])) + std::exp(double(x[1])) + std::exp(double(x[2]))) -
           double(x[labels[row]]);
  }
  return sum / 2;
}

[[maybe_unused]] static bool is_right(const char* who, float value) {
  const bool right = std::abs(double(value) - by_formula()) < 1e-6;
  if (!right) {
    std::printf("%s: %.9g, and should be %.9g\n", who, double(value), by_formula());
  }
  return right;
}
