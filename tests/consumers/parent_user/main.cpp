// SPDX-License-Identifier: MIT
#include <middle.hpp>

#include "../expected.hpp"

int main() {
  const perdita::cross_entropy<float> loss;
  return is_right("middle", middle(loss, scores, labels)) ? 0 : 1;
}
