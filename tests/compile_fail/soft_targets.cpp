// expect: the target must be a vector of integral labels
// SPDX-License-Identifier: MIT

#include <perdita/sparsemax.hpp>

// A loss that takes labels only.
float f(perdita::matrix_view<const float> scores, perdita::matrix_view<const float> target) {
  return perdita::sparsemax_loss<float>()(scores, target);
}
