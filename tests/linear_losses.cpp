// SPDX-License-Identifier: MIT

// Losses that know nothing of the linear head, on it: one of each kind of formula.

#include <perdita/linear.hpp>

#include <cmath>
#include <cstddef>
#include <vector>

#include <perdita/active_passive.hpp>
#include <perdita/brier.hpp>
#include <perdita/comp_sum.hpp>
#include <perdita/robust.hpp>

#include "support/catch.hpp"

namespace perdita_tests {
namespace {

using perdita::index;
using perdita::matrix_view;
constexpr index rows = 21, features = 3, classes = 150;

std::vector<double> numbers(index n, double scale) {
  std::vector<double> x(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < x.size(); ++i)
    x[i] = scale * std::sin(1.7 * static_cast<double>(i) + 0.3 * scale);
  return x;
}
double largest(const std::vector<double>& x) {
  double most = 0;
  for (const double v : x)
    most = std::max(most, std::abs(v));
  return most;
}

template <class Loss> void check_head(const Loss& loss) {
  const std::vector<double> x = numbers(rows * features, 1.5), w = numbers(classes * features, 2);
  std::vector<int> labels;
  for (index r = 0; r < rows; ++r)
    labels.push_back(r == 4 ? -100 : static_cast<int>(r * 7 % classes));
  const auto at = [](index r, index c, index cols) {
    return static_cast<std::size_t>(r * cols + c);
  };

  std::vector<double> scores(static_cast<std::size_t>(rows * classes)), slopes = scores;
  for (index r = 0; r < rows; ++r)
    for (index c = 0; c < classes; ++c)
      for (index d = 0; d < features; ++d)
        scores[at(r, c, classes)] += x[at(r, d, features)] * w[at(c, d, features)];
  const double value = loss(matrix_view<const double>(scores.data(), rows, classes), labels,
                            matrix_view<double>(slopes.data(), rows, classes));
  std::vector<double> d_hidden(x.size(), 0), d_weights(w.size(), 0);
  for (index r = 0; r < rows; ++r)
    for (index c = 0; c < classes; ++c)
      for (index d = 0; d < features; ++d) {
        const double g = slopes[at(r, c, classes)];
        d_hidden[at(r, d, features)] += g * w[at(c, d, features)];
        d_weights[at(c, d, features)] += g * x[at(r, d, features)];
      }

  const std::size_t one_piece = std::size_t{40} << 10;
  for (const std::size_t budget : {std::size_t{0}, one_piece}) {
    std::vector<double> hidden(x.size(), 7), weights(w.size(), 7);
    const perdita::linear head(loss, {.budget = budget});
    const double got = head(matrix_view<const double>(x.data(), rows, features),
                            matrix_view<const double>(w.data(), classes, features), labels,
                            matrix_view<double>(hidden.data(), rows, features),
                            matrix_view<double>(weights.data(), classes, features));
    INFO(Loss::name << ", budget " << budget);
    CHECK(std::abs(got - value) <= 1e-13 * std::abs(value));
    for (std::size_t i = 0; i < x.size(); ++i)
      CHECK(std::abs(hidden[i] - d_hidden[i]) <= 1e-12 * largest(d_hidden));
    for (std::size_t i = 0; i < w.size(); ++i)
      CHECK(std::abs(weights[i] - d_weights[i]) <= 1e-12 * largest(d_weights));
  }
}

} // namespace

TEST_CASE("linear: a function of the label's probability", "[linear]") {
  check_head(perdita::comp_sum<double>({.tau = 1.5}));
}

TEST_CASE("linear: a loss with sums over all classes", "[linear]") {
  check_head(perdita::active_passive(perdita::asymmetric_gce<double>(), {.beta = 0.5}));
}

TEST_CASE("linear: a loss whose slopes are not linear in the probabilities", "[linear]") {
  check_head(perdita::brier<double>());
}

} // namespace perdita_tests
