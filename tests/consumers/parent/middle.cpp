// SPDX-License-Identifier: MIT
#include "middle.hpp"

float middle(const perdita::cross_entropy<float>& loss) {
  const float scores[2] = {1, 1};
  const int label = 0;
  return loss(perdita::matrix_view<const float>(scores, 1, 2),
              perdita::vector_view<const int>(&label, 1));
}
