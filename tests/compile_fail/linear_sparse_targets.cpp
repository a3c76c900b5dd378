// expect: perdita::linear: this loss takes labels only
// SPDX-License-Identifier: MIT

#include <perdita/linear.hpp>
#include <perdita/z_loss.hpp>

float f(perdita::matrix_view<const float> hidden, perdita::matrix_view<const float> weights,
        const perdita::sparse_targets<float>& targets) {
  return perdita::linear(perdita::z_loss<float>())(hidden, weights, targets);
}
