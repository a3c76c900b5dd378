// expect: gradient_like
// SPDX-License-Identifier: MIT

#include <vector>

#include <perdita/cross_entropy.hpp>

float f(perdita::matrix_view<const float> scores, const std::vector<int>& labels,
        perdita::matrix_view<const float> gradient) {
  return perdita::cross_entropy<float>()(scores, labels, gradient);
}
