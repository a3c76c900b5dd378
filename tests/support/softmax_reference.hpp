// SPDX-License-Identifier: MIT
#pragma once

// Soft-max of a row in wide arithmetic, with everything that must not be formed by subtraction.

#include <cmath>
#include <cstddef>
#include <limits>
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
  rival_errors(const std::vector<wide>& scores, std::size_t y, const wide& of_scores, T)
      : behind(scores.size(), judged(0)), of_z(scores.size(), judged(0)) {
    const std::vector<judged> z(scores.begin(), scores.end());
    const auto counts = [&](std::size_t j) {
      return z[j] > -std::numeric_limits<judged>::infinity();
    };
    for (std::size_t j = 0; j < z.size(); ++j) {
      if (counts(j))
        of_z[j] = static_cast<judged>(of_scores) * std::abs(z[j]);
      if (j != y && z[j] > top)
        top = z[j];
    }
    if (!(top > -std::numeric_limits<judged>::infinity()))
      return;
    any = true;
    judged sum = 0;
    for (std::size_t j = 0; j < z.size(); ++j)
      if (j != y && counts(j)) {
        behind[j] = top - z[j];
        const judged e = std::exp(-behind[j]);
        sum += e;
        distance += e * behind[j];
        noise += e * of_z[j];
      }
    distance /= sum;
    noise /= sum;
    const judged u = top - z[y] + std::log(sum);
    of_u = distance / 2 + noise + of_z[y];
    if (sizeof(T) == 8 && std::isfinite(u)) // for float, u is formed in double
      of_u += std::abs(u);
  }
  /// Relative error of a rival's share, beyond a budget for the arithmetic itself.
  judged of_share(std::size_t j) const { return (behind[j] + distance) / 2 + of_z[j] + noise; }

  bool any = false;
  judged top = -std::numeric_limits<judged>::infinity(); ///< the largest rival
  std::vector<judged> behind;                            ///< how far behind it each is
  std::vector<judged> of_z;                              ///< error of each score
  judged distance = 0;                                   ///< mean of `behind`, by shares
  judged noise = 0;                                      ///< mean of `of_z`, by shares
  judged of_u = 0;                                       ///< error of u
};

} // namespace perdita_tests
