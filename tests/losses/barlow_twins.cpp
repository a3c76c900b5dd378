// SPDX-License-Identifier: MIT

// Barlow Twins: formula sheet "contrastive", 6.1.

#include <perdita/barlow_twins.hpp>

#include <array>
#include <cmath>
#include <limits>

#include "support/embeddings.hpp"

namespace perdita_tests {
namespace {

using perdita::index;

/// From the definition: correlations of columns, and their derivatives.
struct expectation {
  wide value = 0;
  wide_matrix of_a, of_b;

  expectation(const wide_matrix& x, const wide_matrix& y, const wide& lambda, const wide& epsilon)
      : of_a(x.rows, x.cols), of_b(x.rows, x.cols) {
    const index n = x.rows, d = x.cols;
    std::vector<wide> steep_a, steep_b;
    const wide_matrix a = standard(x, epsilon, steep_a), b = standard(y, epsilon, steep_b);
    wide_matrix slope_a(n, d), slope_b(n, d);
    for (index l = 0; l < d; ++l)
      for (index m = 0; m < d; ++m) {
        wide c = 0;
        for (index r = 0; r < n; ++r)
          c += a(r, l) * b(r, m) / n;
        value += l == m ? wide((c - 1) * (c - 1)) : wide(lambda * c * c);
        const wide h = l == m ? wide(2 * (c - 1)) : wide(2 * lambda * c);
        for (index r = 0; r < n; ++r) {
          slope_a(r, l) += h * b(r, m) / n;
          slope_b(r, m) += h * a(r, l) / n;
        }
      }
    back(slope_a, a, steep_a, of_a);
    back(slope_b, b, steep_b, of_b);
  }
  static wide_matrix standard(const wide_matrix& x, const wide& epsilon, std::vector<wide>& steep) {
    wide_matrix result(x.rows, x.cols);
    for (index c = 0; c < x.cols; ++c) {
      wide mean = 0, variance = 0;
      for (index r = 0; r < x.rows; ++r)
        mean += x(r, c) / x.rows;
      for (index r = 0; r < x.rows; ++r)
        variance += (x(r, c) - mean) * (x(r, c) - mean) / x.rows;
      steep.push_back(1 / sqrt(wide(variance + epsilon)));
      for (index r = 0; r < x.rows; ++r)
        result(r, c) = (x(r, c) - mean) * steep.back();
    }
    return result;
  }
  static void back(const wide_matrix& g, const wide_matrix& a, const std::vector<wide>& steep,
                   wide_matrix& to) {
    for (index c = 0; c < g.cols; ++c) {
      wide mean = 0, along = 0;
      for (index r = 0; r < g.rows; ++r) {
        mean += g(r, c) / g.rows;
        along += g(r, c) * a(r, c) / g.rows;
      }
      for (index r = 0; r < g.rows; ++r)
        to(r, c) = (g(r, c) - mean - a(r, c) * along) * steep[static_cast<std::size_t>(c)];
    }
  }
};

} // namespace

TEMPLATE_TEST_CASE("barlow_twins: value and gradients against the formula", "[barlow_twins]", float,
                   double) {
  using T = TestType;
  constexpr double epsilon = std::numeric_limits<T>::epsilon();
  // Sums over the rows, in which products round too where they are not fused.
  const double roundings = perdita::core::fused ? 1 : 2;
  const double value_budget = sizeof(T) == 4 ? 1 : 12 * roundings,
               slope_budget = sizeof(T) == 4 ? 1 : 24 * roundings;
  error_judge of_values, of_slopes;
  struct shape {
    index rows, cols;
    double offset;
  };
  for (const shape s : {shape{5, 3, 0}, {37, 11, 0}, {70, 19, 0.5}, {300, 5, -1}, {9, 40, 0}})
    for (const double lambda : {0.0051, 1.0}) {
      const auto a = random_batch<T>(s.rows, s.cols, 3, 1, s.offset);
      auto b = random_batch<T>(s.rows, s.cols, 4);
      for (std::size_t i = 0; i < b.x.size(); ++i)
        b.x[i] = static_cast<T>(0.7) * b.x[i] + a.x[i];
      const expectation expected(wide_matrix(a), wide_matrix(b), lambda, 1e-5);
      batch<T> da(s.rows, s.cols), db = da;
      const T value = perdita::barlow_twins<T>({.off_diagonal = lambda})(a.view(), b.view(),
                                                                         da.view(), db.view());
      CHECK(of_values.within(size_of(wide(value - expected.value)), value_budget,
                             epsilon * expected.value));
      CHECK(slopes_within(of_slopes, da, expected.of_a, slope_budget));
      CHECK(slopes_within(of_slopes, db, expected.of_b, slope_budget));
    }
  report_accuracy<T>(
      "barlow_twins", "", in_epsilons,
      {of_values.worst(), of_slopes.worst(), std::max(of_values.share(), of_slopes.share())});
}

TEST_CASE("barlow_twins: the formula sheet's values", "[barlow_twins]") {
  const auto x = sheet_x(), y = sheet_y();
  auto dx = x, dy = y;
  const double value = perdita::barlow_twins<double>()(x.view(), y.view(), dx.view(), dy.view());
  CHECK(near(value, 3.5801117501, 1e-11));
  CHECK(near(length_of(dx.x), 2.3594459, 1e-8));
  CHECK(near(length_of(dy.x), 2.95409184, 1e-8));
}

TEST_CASE("barlow_twins: equal views keep the digits of what is missing", "[barlow_twins]") {
  // Without the other features, (ε/(v + ε))² of each.
  const auto x = random_batch<double>(50, 6, 8);
  const double value =
      perdita::barlow_twins<double>({.off_diagonal = 0, .epsilon = 1e-12})(x.view(), x.view());
  wide expected = 0;
  for (index c = 0; c < x.cols; ++c) {
    wide mean = 0, variance = 0;
    for (index r = 0; r < x.rows; ++r)
      mean += wide(x(r, c)) / x.rows;
    for (index r = 0; r < x.rows; ++r)
      variance += (x(r, c) - mean) * (x(r, c) - mean) / x.rows;
    const wide missing = wide(1e-12) / (variance + wide(1e-12));
    expected += missing * missing;
  }
  CHECK(near(value, static_cast<double>(expected), 1e-14));
}

TEST_CASE("barlow_twins: the gradients are the derivatives", "[barlow_twins]") {
  check_derivative<2>(perdita::barlow_twins<double>({.off_diagonal = 0.3, .epsilon = 0.1}),
                      std::array{random_batch<double>(7, 5, 1), random_batch<double>(7, 5, 2)});
}

TEST_CASE("barlow_twins: one row, constant features, features too large", "[barlow_twins]") {
  const perdita::barlow_twins<double> loss;
  auto one = random_batch<double>(1, 9, 3), two = one, g = one, h = one;
  CHECK(loss(one.view(), two.view(), g.view(), h.view()) == 9);
  CHECK(g.x == std::vector<double>(9, 0));
  CHECK(h.x == std::vector<double>(9, 0));

  const batch<double> flat(10, 4, 0.1);
  batch<double> df(10, 4, 1), dg(10, 4, 1);
  const auto other = random_batch<double>(10, 4, 2);
  CHECK(loss(flat.view(), other.view(), df.view(), dg.view()) == 4);
  CHECK(dg.x == std::vector<double>(40, 0)); // of what has nothing to agree with
  for (const double slope : df.x)
    REQUIRE(std::isfinite(slope));

  auto large = other;
  large(3, 1) = 1e200;
  CHECK(std::isnan(loss(large.view(), other.view(), df.view(), dg.view())));
  CHECK((std::isnan(df(0, 0)) && std::isnan(dg(0, 0))));
  large(3, 1) = 1e100;
  CHECK(std::isfinite(loss(large.view(), other.view(), df.view(), dg.view())));
  CHECK(std::isfinite(df(3, 1)));
  check_special_calls<2>(loss, 5, 3);
}

TEMPLATE_TEST_CASE("barlow_twins: layouts, threads, calls, refusals", "[barlow_twins][threads]",
                   float, double) {
  using Catch::Matchers::ContainsSubstring;
  check_calls<2>(perdita::barlow_twins<TestType>(), 150, 21);
  using loss = perdita::barlow_twins<TestType>;
  CHECK_THROWS_WITH(loss({.epsilon = 0}), ContainsSubstring("epsilon is 0"));
  CHECK_THROWS_WITH(loss({.off_diagonal = std::nan("")}), ContainsSubstring("off_diagonal is"));
}

} // namespace perdita_tests
