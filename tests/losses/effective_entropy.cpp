// SPDX-License-Identifier: MIT

// E2MC, effective entropy maximisation: formula sheet "contrastive", 6.5.

#include <perdita/effective_entropy.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "support/embeddings.hpp"

namespace perdita_tests {
namespace {

using perdita::index;
using perdita::squash;

/// √(2π), by Machin's formula for π/4.
wide root_of_two_pi() {
  const auto arctangent_of_inverse = [](int k) {
    wide power = wide(1) / k, sum = 0;
    for (int i = 1; i < 200; i += 2, power /= -k * k)
      sum += power / i;
    return sum;
  };
  return sqrt(wide(8 * (4 * arctangent_of_inverse(5) - arctangent_of_inverse(239))));
}
/// P(X < x), x <= 0, of the standard normal distribution, and its density: Taylor at 0 near it, the
/// continued fraction beyond.
wide density(const wide& x) {
  static const wide root = root_of_two_pi();
  return exp(wide(-x * x / 2)) / root;
}
wide lower_tail(const wide& x) {
  const wide a = -x;
  if (a < 6) {
    wide term = a, sum = a;
    for (int k = 1; k < 300; ++k) {
      term *= a * a / (2 * k + 1);
      sum += term;
    }
    return wide(0.5) - density(a) * sum;
  }
  wide rest = a;
  for (int k = 400; k > 0; --k)
    rest = a + k / rest;
  return density(a) / rest;
}

/// u(x) and 1 − u(x), and u's derivative.
struct point {
  wide low, high, slope;
};
point squashed(squash by, const wide& x) {
  if (by == squash::sigmoid)
    return {logistic(x), logistic(wide(-x)), logistic(x) * logistic(wide(-x))};
  const wide tail = lower_tail(x < 0 ? x : wide(-x));
  return x < 0 ? point{tail, 1 - tail, density(x)} : point{1 - tail, tail, density(x)};
}

/// Of one view; the slopes with respect to x.
template <class T, class Options>
wide of_view(const batch<T>& x, const Options& o, const wide& weight, wide_matrix& slopes) {
  const index n = x.rows, d = x.cols;
  const wide columns = d;
  index m = 1; // √n, rounded
  while ((2 * m + 1) * (2 * m + 1) < 4 * n)
    ++m;
  const wide k = wide(n + 1) / m;
  wide value = 0;
  wide_matrix centred(n, d);
  for (index c = 0; c < d; ++c) {
    std::vector<index> order;
    wide mean = 0;
    for (index r = 0; r < n; ++r) {
      order.push_back(r);
      centred(r, c) = squashed(o.by, x(r, c)).low;
      mean += centred(r, c) / n;
    }
    for (index r = 0; r < n; ++r)
      centred(r, c) -= mean;
    std::stable_sort(order.begin(), order.end(),
                     [&](index r, index s) { return x(r, c) < x(s, c); });
    for (index i = 0; i + m < n; ++i) {
      const index low = order[static_cast<std::size_t>(i)],
                  high = order[static_cast<std::size_t>(i + m)];
      const point a = squashed(o.by, x(low, c)), b = squashed(o.by, x(high, c));
      const wide gap = a.high < wide(0.5) ? wide(a.high - b.high) : wide(b.low - a.low);
      const wide share = weight / ((n - m) * columns);
      value -= share * log(wide(k * gap + o.epsilon));
      slopes(high, c) -= share * k / (k * gap + o.epsilon);
      slopes(low, c) += share * k / (k * gap + o.epsilon);
    }
  }
  for (index l = 0; l < d; ++l)
    for (index j = 0; j < d; ++j) {
      if (l == j)
        continue;
      wide covariance = 0;
      for (index r = 0; r < n; ++r)
        covariance += centred(r, l) * centred(r, j) / (n - 1);
      value += o.covariance / columns * covariance * covariance;
      for (index r = 0; r < n; ++r)
        slopes(r, l) += 4 * o.covariance / columns * covariance * centred(r, j) / (n - 1);
    }
  for (index r = 0; r < n; ++r)
    for (index c = 0; c < d; ++c)
      slopes(r, c) *= squashed(o.by, x(r, c)).slope;
  return value;
}

} // namespace

TEMPLATE_TEST_CASE("effective_entropy: value and gradient against the formula",
                   "[effective_entropy]", float, double) {
  using T = TestType;
  using loss = perdita::effective_entropy<T>;
  constexpr double epsilon = std::numeric_limits<T>::epsilon();
  error_judge of_values, of_slopes;
  struct shape {
    index rows, cols;
    double spread, offset;
  };
  for (const squash by : {squash::sigmoid, squash::normal_cdf})
    for (const shape s : {shape{2, 3, 1, 0}, {3, 1, 1, 0}, {31, 9, 1, 0}, {20, 3, 4, 3}})
      for (const auto& [e, c] : {std::pair{10.0, 1.0}, {1.0, 25.0}, {0.0, 1.0}}) {
        const typename loss::options o{.entropy = e, .covariance = c, .by = by};
        const auto x = random_batch<T>(s.rows, s.cols, 3, s.spread, s.offset);
        wide_matrix slopes(s.rows, s.cols);
        const wide expected = of_view(x, o, e, slopes);
        batch<T> g(s.rows, s.cols);
        const T value = loss(o)(x.view(), g.view());
        CHECK(of_values.within(size_of(wide(value - expected)), sizeof(T) == 4 ? 1 : 8,
                               epsilon * larger(size_of(expected), e)));
        CHECK(slopes_within(of_slopes, g, slopes, sizeof(T) == 4 ? 1 : 30));
      }
  report_accuracy<T>(
      "effective_entropy", "", in_epsilons,
      {of_values.worst(), of_slopes.worst(), std::max(of_values.share(), of_slopes.share())});
}

TEST_CASE("effective_entropy: the formula sheet's values", "[effective_entropy]") {
  const auto x = sheet_x();
  auto g = x;
  const double value = perdita::effective_entropy<double>(
      {.entropy = 1, .covariance = 25, .by = squash::normal_cdf})(x.view(), g.view());
  CHECK(near(value, 0.189421792479, 1e-11));
  CHECK(near(length_of(g.x), 0.529335176, 1e-8));
}

TEST_CASE("effective_entropy: two views share the entropy and add covariances",
          "[effective_entropy]") {
  const auto x = random_batch<double>(30, 7, 1), y = random_batch<double>(30, 7, 2);
  for (const auto& [e, c] : {std::pair{10.0, 0.0}, {0.0, 3.0}, {2.0, 5.0}}) {
    auto dx = x, dy = y, gx = x, gy = y;
    const double both = perdita::effective_entropy<double>({.entropy = e, .covariance = c})(
        x.view(), y.view(), dx.view(), dy.view());
    const perdita::effective_entropy<double> half({.entropy = e / 2, .covariance = c});
    CHECK(near(both, half(x.view(), gx.view()) + half(y.view(), gy.view()), 1e-14));
    CHECK(dx.x == gx.x);
    CHECK(dy.x == gy.x);
  }
}

TEST_CASE("effective_entropy: the gradients are the derivatives", "[effective_entropy]") {
  for (const squash by : {squash::sigmoid, squash::normal_cdf}) {
    const perdita::effective_entropy<double> loss(
        {.entropy = 1, .covariance = 9, .by = by, .epsilon = 0.3});
    check_derivative<1>(loss, std::array{random_batch<double>(7, 5, 1, 2)});
    check_derivative<2>(
        loss, std::array{random_batch<double>(6, 3, 3, 2), random_batch<double>(6, 3, 2)});
  }
}

TEST_CASE("effective_entropy: evenly spread, equal, far out, one row", "[effective_entropy]") {
  // Evenly spread on (0, 1): each spacing is as it shall be, (n + 1)/m D = 1.
  const index n = 99;
  batch<double> even(n, 1), g(n, 1);
  for (index r = 0; r < n; ++r) {
    const double u = static_cast<double>(r + 1) / static_cast<double>(n + 1);
    even(r, 0) = std::log(u / (1 - u));
  }
  const perdita::effective_entropy<double> loss({.entropy = 1});
  CHECK(std::abs(loss(even.view())) < 2e-7);

  for (const squash by : {squash::sigmoid, squash::normal_cdf}) {
    const perdita::effective_entropy<double> of({.entropy = 1, .covariance = 0, .by = by});
    // Equals count in the order of their rows: first pair, second pair, … m = 2 of 4 rows.
    const batch<double> same(4, 2, 0.0);
    batch<double> d(4, 2);
    CHECK(near(of(same.view(), d.view()), -std::log(1e-7), 1e-15));
    const double slope = (by == squash::sigmoid ? 0.25 : 0.3989422804014327) * 2.5 / 1e-7 / 2 / 2;
    for (index c = 0; c < 2; ++c)
      CHECK((near(d(0, c), slope, 1e-14) && near(d(1, c), slope, 1e-14) &&
             near(d(2, c), -slope, 1e-14) && near(d(3, c), -slope, 1e-14)));
    // Far out on both sides nothing overflows, and nothing moves.
    batch<double> far(4, 1), f(4, 1, 5);
    far(0, 0) = -1e300, far(1, 0) = 1e300, far(2, 0) = -2000, far(3, 0) = 2000;
    CHECK(std::isfinite(of(far.view(), f.view())));
    CHECK(f.x == std::vector<double>(4, 0));
    check_special_calls<1>(of, 5, 3);
    check_special_calls<2>(of, 5, 3);
  }
  const batch<double> one(1, 2);
  CHECK_THROWS_WITH(loss(one.view()), Catch::Matchers::ContainsSubstring("rows is 1"));
}

TEMPLATE_TEST_CASE("effective_entropy: layouts, threads, calls, refusals",
                   "[effective_entropy][threads]", float, double) {
  using Catch::Matchers::ContainsSubstring;
  using loss = perdita::effective_entropy<TestType>;
  check_calls<1>(loss(), 150, 21);
  check_calls<2>(loss({.by = squash::normal_cdf}), 70, 5);
  CHECK_THROWS_WITH(loss({.epsilon = 0}), ContainsSubstring("epsilon is 0"));
  CHECK_THROWS_WITH(loss({.entropy = std::nan("")}), ContainsSubstring("entropy is"));
  CHECK_THROWS_WITH(loss({.by = static_cast<squash>(7)}), ContainsSubstring("by is 7"));
}

} // namespace perdita_tests
