// SPDX-License-Identifier: MIT
#include <cstdio>
#include <vector>

#include <perdita/cross_entropy.hpp>

int main() {
  const std::vector<float> logits = {2.0f, 0.5f, -1.0f,  // two rows of three classes,
                                     0.0f, 3.0f, 0.25f}; // one after the other
  const std::vector<int> labels = {0, 2};
  std::vector<float> gradient(logits.size());

  const perdita::cross_entropy<float> loss;
  const float value = loss(perdita::matrix_view(logits.data(), 2, 3), labels,
                           perdita::matrix_view(gradient.data(), 2, 3));

  std::printf("loss %.6f\n", static_cast<double>(value));
  for (const float g : gradient)
    std::printf("%9.6f\n", static_cast<double>(g));
}
