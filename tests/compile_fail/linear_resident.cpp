// expect: this loss needs a whole row of scores at once, and the linear head never holds one
// SPDX-License-Identifier: MIT

#include <vector>

#include <perdita/linear.hpp>
#include <perdita/sparsemax.hpp>

float f(perdita::matrix_view<const float> hidden, perdita::matrix_view<const float> weights,
        const std::vector<int>& labels) {
  return perdita::linear(perdita::sparsemax_loss<float>())(hidden, weights, labels);
}
