// SPDX-License-Identifier: MIT
#include "middle.hpp"

float middle(const perdita::cross_entropy<float>& loss, const float* scores, const int* labels) {
  return loss(perdita::matrix_view<const float>(scores, 2, 3),
              perdita::vector_view<const int>(labels, 2));
}
