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

/// What an arithmetic of T does to u = log Σ_{j≠y} e^{z_j} − z_y and to the shares of the rivals,
/// when each z_j comes with a relative error of `of_scores` epsilons: the differences z_j − z_top
/// are rounded, which costs up to half an epsilon of themselves.
struct rival_errors {
  template <class T>
  rival_errors(const std::vector<wide>& z, std::size_t y, const wide& of_scores, T)
      : behind(z.size(), wide(0)), of_z(z.size(), wide(0)) {
    for (std::size_t j = 0; j < z.size(); ++j) {
      if (z[j] > -infinity())
        of_z[j] = of_scores * size_of(z[j]);
      if (j != y && z[j] > top)
        top = z[j];
    }
    if (top == -infinity())
      return;
    any = true;
    wide sum = 0;
    for (std::size_t j = 0; j < z.size(); ++j)
      if (j != y && z[j] > -infinity()) {
        behind[j] = top - z[j];
        const wide e = exp(wide(-behind[j]));
        sum += e;
        distance += e * behind[j];
        noise += e * of_z[j];
      }
    distance /= sum;
    noise /= sum;
    u = top - z[y] + log(sum);
    of_u = distance / 2 + noise + of_z[y];
    if (sizeof(T) == 8 && is_finite(u)) // for float, u is formed in double
      of_u += size_of(u);
  }
  /// Relative error of a rival's share, beyond a budget for the arithmetic itself.
  wide of_share(std::size_t j) const { return (behind[j] + distance) / 2 + of_z[j] + noise; }

  bool any = false;
  wide top = -infinity();   ///< the largest rival
  std::vector<wide> behind; ///< how far behind it each is
  std::vector<wide> of_z;   ///< error of each score
  wide distance = 0;        ///< mean of `behind`, by shares
  wide noise = 0;           ///< mean of `of_z`, by shares
  wide u = -infinity(), of_u = 0;
};

} // namespace perdita_tests
