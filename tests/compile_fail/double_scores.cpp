// expect: scores_like
// SPDX-License-Identifier: MIT

#include <vector>

#include <perdita/cross_entropy.hpp>

// The compute type is the loss's, never silently another.
float f(perdita::matrix_view<const double> scores, const std::vector<int>& labels) {
  return perdita::cross_entropy<float>()(scores, labels);
}
