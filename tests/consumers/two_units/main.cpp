// SPDX-License-Identifier: MIT
#include "../expected.hpp"

float baseline();
float avx2();

int main() {
  const bool first = is_right("baseline", baseline());
  const bool second = is_right("avx2", avx2());
  return first && second ? 0 : 1;
}
