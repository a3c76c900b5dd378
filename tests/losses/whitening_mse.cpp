// SPDX-License-Identifier: MIT

// W-MSE: formula sheet "contrastive", 6.3.

#include <perdita/whitening_mse.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "support/embeddings.hpp"

namespace perdita_tests {
namespace {

using perdita::index;

/// Unit rows of what has the covariance I, sub-batch by sub-batch, by Gram-Schmidt on the columns:
/// with ε, on the columns continued by √(ε (m − 1)/(1 − ε)) I.
wide_matrix whitened(const wide_matrix& x, index m, const wide& epsilon) {
  const index d = x.cols;
  wide_matrix result(x.rows, d);
  for (index first = 0; first < x.rows; first += m) {
    wide_matrix tall(m + d, d);
    for (index c = 0; c < d; ++c) {
      wide mean = 0;
      for (index r = 0; r < m; ++r)
        mean += x(first + r, c) / m;
      for (index r = 0; r < m; ++r)
        tall(r, c) = (x(first + r, c) - mean) * sqrt(wide((1 - epsilon) / (m - 1)));
      tall(m + c, c) = sqrt(epsilon);
      for (int again = 0; again < 2; ++again)
        for (index k = 0; k < c; ++k) {
          wide along = 0;
          for (index r = 0; r < m + d; ++r)
            along += tall(r, k) * tall(r, c);
          for (index r = 0; r < m + d; ++r)
            tall(r, c) -= along * tall(r, k);
        }
      wide square = 0;
      for (index r = 0; r < m + d; ++r)
        square += tall(r, c) * tall(r, c);
      for (index r = 0; r < m + d; ++r)
        tall(r, c) /= sqrt(square);
    }
    for (index r = 0; r < m; ++r) {
      wide square = 0;
      for (index c = 0; c < d; ++c)
        square += tall(r, c) * tall(r, c);
      for (index c = 0; c < d; ++c)
        result(first + r, c) = tall(r, c) / sqrt(square);
    }
  }
  return result;
}
wide distance(const wide_matrix& x, const wide_matrix& y, index m, const wide& epsilon) {
  const wide_matrix u = whitened(x, m, epsilon), v = whitened(y, m, epsilon);
  wide sum = 0;
  for (std::size_t i = 0; i < u.x.size(); ++i)
    sum += u.x[i] * v.x[i] / u.rows;
  return 2 - 2 * sum;
}

} // namespace

TEMPLATE_TEST_CASE("whitening_mse: value and gradients against 113 bits", "[whitening_mse]", float,
                   double) {
  using T = TestType;
  constexpr double epsilon = std::numeric_limits<T>::epsilon();
  error_judge of_values, of_slopes;
  struct shape {
    index rows, cols, sub_batch;
    double epsilon;
  };
  for (const shape s : {shape{7, 1, 0, 0},
                        {12, 3, 0, 0},
                        {18, 2, 6, 0},
                        {8, 3, 4, 0.25},
                        {4, 5, 0, 0.125},
                        {4, 3, 0, 0.9}}) {
    const auto x = random_batch<T>(s.rows, s.cols, 3, 1, 1);
    auto y = random_batch<T>(s.rows, s.cols, 4, 2);
    for (std::size_t i = 0; i < y.x.size(); ++i)
      y.x[i] += x.x[i];
    wide_matrix wx(x), wy(y);
    const wide expected = distance(wx, wy, s.sub_batch ? s.sub_batch : s.rows, s.epsilon);
    // Slopes from differences, whose error is far below double's epsilon.
    const auto differentiate = [&](wide_matrix& m) {
      wide_matrix slopes(m.rows, m.cols);
      for (std::size_t i = 0; i < m.x.size(); ++i) {
        const wide before = m.x[i], step = 1e-11;
        const auto at = [&](const wide& place) {
          m.x[i] = place;
          return distance(wx, wy, s.sub_batch ? s.sub_batch : s.rows, s.epsilon);
        };
        slopes.x[i] = (at(before + step) - at(before - step)) / (2 * step);
        m.x[i] = before;
      }
      return slopes;
    };
    const wide_matrix dx = differentiate(wx), dy = differentiate(wy);
    batch<T> gx(s.rows, s.cols), gy = gx;
    const T value = perdita::whitening_mse<T>({.sub_batch = s.sub_batch, .epsilon = s.epsilon})(
        x.view(), y.view(), gx.view(), gy.view());
    CHECK(of_values.within(size_of(wide(value - expected)), sizeof(T) == 4 ? 1 : 12,
                           epsilon * expected));
    if (s.cols > 1) {
      CHECK(slopes_within(of_slopes, gx, dx, sizeof(T) == 4 ? 1 : 60));
      CHECK(slopes_within(of_slopes, gy, dy, sizeof(T) == 4 ? 1 : 60));
    }
  }
  report_accuracy<T>(
      "whitening_mse", "", in_epsilons,
      {of_values.worst(), of_slopes.worst(), std::max(of_values.share(), of_slopes.share())});
}

TEST_CASE("whitening_mse: the gradients are the derivatives", "[whitening_mse]") {
  check_derivative<2>(perdita::whitening_mse<double>({.sub_batch = 8, .epsilon = 0.1}),
                      std::array{random_batch<double>(16, 4, 1), random_batch<double>(16, 4, 2)});
}

TEST_CASE("whitening_mse: any stretch, singular covariances, rows at the mean", "[whitening_mse]") {
  const perdita::whitening_mse<double> loss({.sub_batch = 0});
  // Whitening undoes what triangular maps do to the features: equal but for rounding.
  const auto x = random_batch<double>(20, 3, 1);
  auto y = x, g = x, h = x;
  for (index r = 0; r < 20; ++r) {
    y(r, 0) = 7 * x(r, 0) + 3;
    y(r, 1) = 0.1 * x(r, 1) + 5 * x(r, 0);
    y(r, 2) = x(r, 2) - x(r, 1) + x(r, 0);
  }
  CHECK(loss(x.view(), x.view(), g.view(), h.view()) == 0);
  CHECK(std::abs(loss(x.view(), y.view(), g.view(), h.view())) < 1e-24);
  for (const double slope : g.x)
    CHECK(std::abs(slope) < 1e-13);

  // A constant feature, or one that repeats another.
  for (const bool constant : {true, false}) {
    auto flat = x;
    for (index r = 0; r < 20; ++r)
      flat(r, 2) = constant ? 0.1 : 3 * x(r, 0);
    CHECK(std::isnan(loss(flat.view(), x.view(), g.view(), h.view())));
    CHECK((std::isnan(g(0, 0)) && std::isnan(h(19, 2))));
    CHECK(std::isfinite(
        perdita::whitening_mse<double>({.sub_batch = 0, .epsilon = 0.01})(flat.view(), x.view())));
  }
  // All rows equal: with ε all are at the mean.
  const batch<double> equal(6, 2, 0.1);
  batch<double> a(6, 2, 5), b(6, 2, 5);
  CHECK(perdita::whitening_mse<double>({.sub_batch = 3, .epsilon = 0.5})(equal.view(), equal.view(),
                                                                         a.view(), b.view()) == 2);
  CHECK(a.x == std::vector<double>(12, 0));
  CHECK(b.x == std::vector<double>(12, 0));
  check_special_calls<2>(loss, 5, 3);
}

TEMPLATE_TEST_CASE("whitening_mse: layouts, threads, calls, refusals", "[whitening_mse][threads]",
                   float, double) {
  using Catch::Matchers::ContainsSubstring;
  using loss = perdita::whitening_mse<TestType>;
  check_calls<2>(loss({.sub_batch = 30}), 150, 21);
  CHECK_THROWS_WITH(loss({.sub_batch = 1}), ContainsSubstring("sub_batch is 1"));
  CHECK_THROWS_WITH(loss({.epsilon = 2}), ContainsSubstring("epsilon is 2"));
  const batch<TestType> x(9, 3);
  CHECK_THROWS_WITH(loss({.sub_batch = 4})(x.view(), x.view()), ContainsSubstring("rows is 9"));
  CHECK_THROWS_WITH(loss({.sub_batch = 3})(x.view(), x.view()), ContainsSubstring("epsilon is 0"));
  const batch<TestType> one(1, 3);
  CHECK_THROWS_WITH(loss({.sub_batch = 0})(one.view(), one.view()), ContainsSubstring("rows is 1"));
}

} // namespace perdita_tests
