// expect: the target must be a vector of integral labels
// SPDX-License-Identifier: MIT

#include <vector>

#include <perdita/cross_entropy.hpp>

float f(perdita::matrix_view<const float> scores, const std::vector<float>& labels) {
  return perdita::cross_entropy<float>()(scores, labels);
}
