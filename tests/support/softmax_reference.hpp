// SPDX-License-Identifier: MIT
#pragma once

// Soft-max of a row in wide arithmetic, with everything that must not be formed by subtraction.

#include <cstddef>
#include <vector>

#include "wide.hpp"

namespace perdita_tests {

/// p = softmax(z). What is near 1 is kept as its distance to 1, what is near the largest score as
/// its distance to that.
struct softmax_row {
  explicit softmax_row(const std::vector<wide>& scores) : z(scores) {
    for (std::size_t j = 1; j < z.size(); ++j)
      if (z[j] > z[top])
        top = j;
    all_masked = z[top] == -infinity();
    for (std::size_t j = 0; j < z.size(); ++j) {
      const bool counts = z[j] > -infinity();
      image.push_back(counts ? wide(exp(wide(z[j] - z[top]))) : wide(0));
      if (j != top)
        rest += image[j];
    }
    excess = log1p(rest);
    log_sum_exp = z[top] + excess;
  }
  wide p(std::size_t j) const { return image[j] / (1 + rest); }
  wide miss(std::size_t j) const { // 1 - p
    return j == top ? wide(rest / (1 + rest)) : wide((1 + rest - image[j]) / (1 + rest));
  }
  wide surprise(std::size_t j) const { // -log p
    return z[j] == -infinity() ? infinity() : wide(z[top] - z[j] + excess);
  }

  std::vector<wide> z;
  std::size_t top = 0;
  bool all_masked = false;
  std::vector<wide> image; ///< e^{z - largest}
  wide rest = 0;           ///< their sum, without that of the largest
  wide excess, log_sum_exp;
};

} // namespace perdita_tests
