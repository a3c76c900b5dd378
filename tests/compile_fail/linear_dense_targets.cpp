// expect: the target must be a vector of integral labels, or perdita::sparse_targets
// SPDX-License-Identifier: MIT

#include <perdita/cross_entropy.hpp>
#include <perdita/linear.hpp>

float f(perdita::matrix_view<const float> hidden, perdita::matrix_view<const float> weights,
        perdita::matrix_view<const float> targets) {
  return perdita::linear(perdita::cross_entropy<float>())(hidden, weights, targets);
}
