// expect: scores_like
// SPDX-License-Identifier: MIT

#include <vector>

#include <perdita/cross_entropy.hpp>

double f(perdita::matrix_view<const perdita::half> scores, const std::vector<int>& labels) {
  return perdita::cross_entropy<double>()(scores, labels);
}
