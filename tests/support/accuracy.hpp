// SPDX-License-Identifier: MIT
#pragma once

// What the tests found of each loss's accuracy. With PERDITA_TEST_REPORT set in the environment,
// every report is a line of the output, and the worst of all reports of a loss a row of the table
// in Markdown that ends it: the target `accuracy` prints that table alone.

#include <algorithm>
#include <string>

#include "wide.hpp"

namespace perdita_tests {

/// Whether reports are wanted.
bool reporting();

// What errors are given in.
inline constexpr const char* in_ulp = "ulp";
inline constexpr const char* in_ulp_of_rows = "ulp, ordinary rows";
inline constexpr const char* in_epsilons = "ε";
inline constexpr const char* in_epsilons_of_terms = "ε of the terms"; // that add up to the number
inline constexpr const char* in_allowances = "the allowance";
inline constexpr const char* in_epsilons_absolute = "ε, absolute";

/// Largest errors; negative: not measured.
struct accuracy {
  double value = -1, gradient = -1;
  double share = 0; ///< of what the test allows, over everything that it compares
};

/// Reports what a test found of a loss; `detail`: which of its settings, or where.
void report_accuracy(const std::string& loss, const std::string& detail, const char* in,
                     const accuracy& found, bool in_float);
template <class T>
void report_accuracy(const std::string& loss, const std::string& detail, const char* in,
                     const accuracy& found) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  report_accuracy(loss, detail, in, found, sizeof(T) == 4);
}

/// Judges the errors of one kind of number and keeps the worst.
class error_judge {
public:
  /// Whether an error is at most `budget` units.
  bool within(const wide& error, double budget, const wide& unit) {
    if (error > 0) {
      worst_ = std::max(worst_, static_cast<double>(wide(error / unit)));
      share_ = std::max(share_, static_cast<double>(wide(error / (budget * unit))));
    }
    const bool right = error <= budget * unit; // not if it is NaN
    all_within_ = all_within_ && right;
    return right;
  }
  bool all_within() const { return all_within_; }
  double worst() const { return worst_; }
  double share() const { return share_; }

private:
  double worst_ = 0, share_ = 0;
  bool all_within_ = true;
};

template <class T>
void report_accuracy(const std::string& loss, const std::string& detail, const char* in,
                     const error_judge& values, const error_judge& gradient) {
  report_accuracy<T>(
      loss, detail, in,
      {values.worst(), gradient.worst(), std::max(values.share(), gradient.share())});
}

} // namespace perdita_tests
