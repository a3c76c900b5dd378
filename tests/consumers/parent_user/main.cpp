// SPDX-License-Identifier: MIT
#include <middle.hpp>

#include "../two_by_three.hpp"

int main() {
  const bool ln_2 = std::abs(middle(perdita::cross_entropy<float>()) - 0.693147181f) < 1e-6f;
  return ln_2 && is_right("perdita", by_perdita()) ? 0 : 1;
}
