// expect: scores_like
// SPDX-License-Identifier: MIT

#include <vector>

#include <perdita/cross_entropy.hpp>

float f(perdita::matrix_view<const int> scores, const std::vector<int>& labels) {
  return perdita::cross_entropy<float>()(scores, labels);
}
