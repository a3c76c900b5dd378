// expect: the target must be a vector of integral labels
// SPDX-License-Identifier: MIT

#include <perdita/brier.hpp>

// A loss that takes labels only.
float f(perdita::matrix_view<const float> scores, perdita::matrix_view<const float> target) {
  return perdita::brier<float>()(scores, target);
}
