// SPDX-License-Identifier: MIT

// VICReg: formula sheet "contrastive", 6.2.

#include <perdita/vicreg.hpp>

#include <array>
#include <cmath>
#include <limits>

#include "support/embeddings.hpp"

namespace perdita_tests {
namespace {

using perdita::index;

/// Variance and covariance terms of one view, from the definition; the slopes are added.
template <class Options> wide spread(const wide_matrix& x, const Options& o, wide_matrix& slopes) {
  const wide degrees = x.rows - 1, d = x.cols, weight = wide(o.variance) / (2 * d);
  wide_matrix centred = x;
  wide value = 0;
  for (index c = 0; c < x.cols; ++c) {
    wide mean = 0, variance = 0;
    for (index r = 0; r < x.rows; ++r)
      mean += x(r, c) / x.rows;
    for (index r = 0; r < x.rows; ++r) {
      centred(r, c) -= mean;
      variance += centred(r, c) * centred(r, c) / degrees;
    }
    const wide deviation = sqrt(wide(variance + o.epsilon));
    if (!(deviation < o.deviation))
      continue;
    value += weight * (o.deviation - deviation);
    for (index r = 0; r < x.rows; ++r)
      slopes(r, c) -= weight * centred(r, c) / (degrees * deviation);
  }
  for (index l = 0; l < x.cols; ++l)
    for (index m = 0; m < x.cols; ++m) {
      if (l == m)
        continue;
      wide covariance = 0;
      for (index r = 0; r < x.rows; ++r)
        covariance += centred(r, l) * centred(r, m) / degrees;
      value += o.covariance / d * covariance * covariance;
      for (index r = 0; r < x.rows; ++r)
        slopes(r, l) += o.covariance * 4 / d * covariance * centred(r, m) / degrees;
    }
  return value;
}

} // namespace

TEMPLATE_TEST_CASE("vicreg: value and gradients against the formula", "[vicreg]", float, double) {
  using T = TestType;
  using loss = perdita::vicreg<T>;
  constexpr double epsilon = std::numeric_limits<T>::epsilon();
  const double value_budget = sizeof(T) == 4 ? 1 : 12, slope_budget = sizeof(T) == 4 ? 1 : 12;
  error_judge of_values, of_slopes;
  struct shape {
    index rows, cols;
    double offset;
  };
  for (const shape s : {shape{2, 3, 0}, {37, 11, 0}, {70, 19, 0.5}, {300, 5, -1}, {9, 40, 0}})
    for (const typename loss::options o :
         {typename loss::options{}, typename loss::options{1, 3, 7, 2, 0.1},
          typename loss::options{0, 0, 2}, typename loss::options{0, 5, 0}}) {
      // Some features spread more than enough, some less.
      auto x = random_batch<T>(s.rows, s.cols, 3, 1.2, s.offset), y = x;
      const auto noise = random_batch<T>(s.rows, s.cols, 4, 0.5);
      for (std::size_t i = 0; i < y.x.size(); ++i)
        y.x[i] += noise.x[i];
      wide_matrix dx(s.rows, s.cols), dy = dx;
      const wide_matrix wx(x), wy(y);
      wide expected = spread(wx, o, dx) + spread(wy, o, dy);
      const wide share = wide(o.invariance) / (s.rows * s.cols);
      for (std::size_t i = 0; i < wx.x.size(); ++i) {
        const wide apart = wx.x[i] - wy.x[i];
        expected += share * apart * apart;
        dx.x[i] += 2 * share * apart;
        dy.x[i] -= 2 * share * apart;
      }
      batch<T> gx(s.rows, s.cols), gy = gx;
      const T value = loss(o)(x.view(), y.view(), gx.view(), gy.view());
      CHECK(of_values.within(size_of(wide(value - expected)), value_budget, epsilon * expected));
      CHECK(slopes_within(of_slopes, gx, dx, slope_budget));
      CHECK(slopes_within(of_slopes, gy, dy, slope_budget));
    }
  report_accuracy<T>(
      "vicreg", "", in_epsilons,
      {of_values.worst(), of_slopes.worst(), std::max(of_values.share(), of_slopes.share())});
}

TEST_CASE("vicreg: the formula sheet's values", "[vicreg]") {
  const auto x = sheet_x(), y = sheet_y();
  auto dx = x, dy = y;
  const double value = perdita::vicreg<double>()(x.view(), y.view(), dx.view(), dy.view());
  CHECK(near(value, 29.3356504878, 1e-11));
  CHECK(near(length_of(dx.x), 8.1059558, 1e-8));
  CHECK(near(length_of(dy.x), 8.10517129, 1e-8));
}

TEST_CASE("vicreg: the gradients are the derivatives", "[vicreg]") {
  check_derivative<2>(
      perdita::vicreg<double>({.invariance = 2, .variance = 3, .covariance = 2, .deviation = 4}),
      std::array{random_batch<double>(7, 5, 1), random_batch<double>(7, 5, 2)});
}

TEST_CASE("vicreg: collapse, one row, enough spread, features too large", "[vicreg]") {
  const perdita::vicreg<double> loss;
  const batch<double> flat(10, 4, 0.1);
  batch<double> g(10, 4, 1), h(10, 4, 1);
  CHECK(near(loss(flat.view(), flat.view(), g.view(), h.view()), 25 * 0.99, 1e-15));
  CHECK(g.x == std::vector<double>(40, 0));
  CHECK(h.x == std::vector<double>(40, 0));

  const batch<double> one(1, 4, 3);
  batch<double> a(1, 4, 5), b(1, 4, 5);
  CHECK_THROWS_WITH(loss(one.view(), one.view(), a.view(), b.view()),
                    Catch::Matchers::ContainsSubstring("rows is 1"));
  CHECK(a.x == std::vector<double>(4, 5));

  // One feature that spreads enough has nothing to mend.
  const auto wide_spread = random_batch<double>(20, 1, 3, 5);
  batch<double> c(20, 1, 5), d(20, 1, 5);
  CHECK(loss(wide_spread.view(), wide_spread.view(), c.view(), d.view()) == 0);
  CHECK(c.x == std::vector<double>(20, 0));

  // s = γ exactly: the little that the feature spreads vanishes beside ε.
  batch<double> kink(2, 1);
  kink(0, 0) = 6, kink(1, 0) = 6 + 0x1p-40;
  batch<double> e(2, 1, 5), f(2, 1, 5);
  CHECK(perdita::vicreg<double>({.deviation = 2, .epsilon = 4})(kink.view(), kink.view(), e.view(),
                                                                f.view()) == 0);
  CHECK(e.x == std::vector<double>(2, 0));

  auto large = random_batch<double>(10, 4, 2);
  large(3, 1) = 1e200;
  CHECK(std::isnan(loss(large.view(), flat.view(), g.view(), h.view())));
  CHECK((std::isnan(g(0, 0)) && std::isnan(h(0, 0))));
  check_special_calls<2>(loss, 5, 3);
}

TEMPLATE_TEST_CASE("vicreg: layouts, threads, calls, refusals", "[vicreg][threads]", float,
                   double) {
  using Catch::Matchers::ContainsSubstring;
  check_calls<2>(perdita::vicreg<TestType>(), 150, 21);
  using loss = perdita::vicreg<TestType>;
  CHECK_THROWS_WITH(loss({.epsilon = 0}), ContainsSubstring("epsilon is 0"));
  CHECK_THROWS_WITH(loss({.covariance = std::nan("")}), ContainsSubstring("covariance is"));
}

} // namespace perdita_tests
