// SPDX-License-Identifier: MIT
#pragma once

// Losses that see each sequence by one number, against functions of that number in 113 bits.

#include <cstddef>
#include <limits>
#include <string>
#include <vector>

#include <perdita/preference/points.hpp>

#include "accuracy.hpp"
#include "catch.hpp"
#include "wide.hpp"

namespace perdita_tests {

/// Log-ratios at which every loss of sequences is looked at.
inline const std::vector<double> log_ratios{0, 1, -1, 50, -50, 500, -500, 5000, -5000};

inline wide sigma(const wide& x) { return logistic(x); }

/// (f(x − 2h) − 8 f(x − h) + 8 f(x + h) − f(x + 2h))/12h
template <class F> wide difference(F f, const wide& x, const wide& h = 1e-6) {
  return (f(wide(x - 2 * h)) - f(wide(x + 2 * h)) + 8 * (f(wide(x + h)) - f(wide(x - h)))) /
         (12 * h);
}

/// Value and slope of a loss whose argument is x/per, x a log-ratio (or a log-probability), at each
/// of these. run(scores, gradient, call) is the loss with reduction `sum`; value(x), slope(x) the
/// reference. `detached`: the slope is not the value's derivative.
template <class T, class Run, class Value, class Slope>
void check_points(const std::string& name, const std::string& detail,
                  const std::vector<double>& points, bool has_reference, double length, Run run,
                  Value value, Slope slope, bool detached = false) {
  const double epsilon = std::numeric_limits<T>::epsilon(),
               least = std::numeric_limits<T>::denorm_min();
  const std::size_t n = points.size();
  std::vector<T> policy(n), reference(n, T(-6000)), gradient(n, 7), values(n);
  const std::vector<int> lengths(n, static_cast<int>(length));
  for (std::size_t i = 0; i < n; ++i)
    policy[i] = static_cast<T>(has_reference ? points[i] - 6000 : points[i]);
  perdita::sequence_scores<T> scores{.policy = policy, .lengths = lengths};
  if (has_reference)
    scores.reference = reference;
  error_judge of_values, of_slopes;
  const T total =
      run(scores, perdita::vector_view<T>(gradient), perdita::call_options<T>{.values = values});
  wide sum = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const wide s = has_reference ? wide(policy[i]) - wide(reference[i]) : wide(policy[i]),
               x = s / length;
    const wide v = value(x), d = slope(x) / length;
    // What rounding x in double does to both.
    const wide sway = size_of(wide(x * slope(x))),
               bend = size_of(wide(x * difference(slope, x))) / length;
    INFO(name << " " << detail << " at " << text(x) << ": " << text(v) << ", " << text(d)
              << ", got " << values[i] << ", " << gradient[i]);
    CHECK(of_values.within(size_of(wide(values[i] - v)), 4, epsilon * (size_of(v) + sway) + least));
    CHECK(
        of_slopes.within(size_of(wide(gradient[i] - d)), 4, epsilon * (size_of(d) + bend) + least));
    if (!detached) {
      // Truncation and rounding of the difference: far below what a wrong term makes.
      const wide numeric = difference(value, x);
      CHECK(size_of(wide(numeric - slope(x))) <=
            1e-15 * size_of(slope(x)) + 1e-24 * (1 + size_of(v)));
    }
    sum += v;
  }
  CHECK(size_of(wide(total - sum)) <= 8 * epsilon * size_of(sum) + 1e-13);
  CHECK(run(scores, perdita::vector_view<T>(), perdita::call_options<T>{}) == total);
  report_accuracy<T>(name, detail, in_epsilons_of_terms, of_values, of_slopes);
}

/// A golden value: `got` to 1e-12 of 16 digits.
inline void check_golden(double got, double expected) {
  INFO("expected " << expected << ", got " << got);
  CHECK(std::abs(got - expected) <= 1e-12 * std::max(1.0, std::abs(expected)));
}

} // namespace perdita_tests
