// SPDX-License-Identifier: MIT
#pragma once

// What the tests found of each loss's accuracy. With PERDITA_TEST_REPORT set in the environment,
// every report is a line of the output, and the worst of all reports of a loss a row of the table
// in Markdown that ends it: the target `accuracy` prints that table alone.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <utility>

#include "wide.hpp"

namespace perdita_tests {

inline bool reporting() {
  static const bool wanted = std::getenv("PERDITA_TEST_REPORT") != nullptr;
  return wanted;
}

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

/// The worst errors of each loss, as a table when the program ends.
class accuracy_table {
public:
  static accuracy_table& instance() {
    static accuracy_table table;
    return table;
  }
  accuracy_table(const accuracy_table&) = delete;
  accuracy_table& operator=(const accuracy_table&) = delete;
  ~accuracy_table() {
    if (rows_.empty())
      return;
    std::printf("| | float: value | gradient | double: value | gradient | in | of the bound |\n"
                "|---|---|---|---|---|---|---|\n");
    for (const auto& [name, r] : rows_)
      std::printf("| `%s` | %s | %s | %s | %s | %s | %s |\n", name.c_str(),
                  digits(r.narrow.value).c_str(), digits(r.narrow.gradient).c_str(),
                  digits(r.full.value).c_str(), digits(r.full.gradient).c_str(), r.unit,
                  digits(std::max(r.narrow.share, r.full.share)).c_str());
  }

  template <class T>
  void add(const std::string& loss, const std::string& detail, const char* in,
           const accuracy& found) {
    std::printf("%s<%s> %s: value %.2f, gradient %.2f %s; %.3f of the bound\n", loss.c_str(),
                sizeof(T) == 4 ? "float" : "double", detail.c_str(), found.value, found.gradient,
                in, found.share);
    row& r = rows_[loss];
    r.unit = in;
    accuracy& worst = sizeof(T) == 4 ? r.narrow : r.full;
    worst.value = std::max(worst.value, found.value);
    worst.gradient = std::max(worst.gradient, found.gradient);
    worst.share = std::max(worst.share, found.share);
  }

private:
  accuracy_table() = default;
  struct row {
    accuracy narrow, full;
    const char* unit = "";
  };
  static std::string digits(double x) {
    char text[32] = "";
    if (x >= 0)
      std::snprintf(text, sizeof text, "%.*f", x == 0 || x >= 9.95 ? 0 : x >= 0.95 ? 1 : 2, x);
    return text;
  }

  std::map<std::string, row> rows_;
};

/// Reports what a test found of a loss in the type T; `detail`: which of its settings, or where.
template <class T>
void report_accuracy(const std::string& loss, const std::string& detail, const char* in,
                     const accuracy& found) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if (reporting())
    accuracy_table::instance().add<T>(loss, detail, in, found);
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
