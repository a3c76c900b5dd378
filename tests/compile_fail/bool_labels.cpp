// expect: the target must be a vector of integral labels
// SPDX-License-Identifier: MIT

#include <array>

#include <perdita/cross_entropy.hpp>

float f(perdita::matrix_view<const float> scores, const std::array<bool, 4>& labels) {
  return perdita::cross_entropy<float>()(scores, labels);
}
