// SPDX-License-Identifier: MIT

// RankMe: formula sheet "contrastive", 6.7.

#include <perdita/rank_me.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "support/embeddings.hpp"

namespace perdita_tests {

using perdita::index;

TEMPLATE_TEST_CASE("rank_me: value and gradient against the formula", "[rank_me]", float, double) {
  using T = TestType;
  constexpr double epsilon = std::numeric_limits<T>::epsilon();
  error_judge of_values, of_slopes;
  struct shape {
    index rows, cols;
  };
  for (const shape s : {shape{1, 4}, {4, 5}, {12, 33}, {9, 9}, {20, 3}}) {
    const auto x = random_batch<T>(s.rows, s.cols, 3);
    const wide_spectrum spectrum{wide_matrix(x)};
    // Of more rows than columns the rest of the eigenvalues are 0 but for rounding.
    const auto count = static_cast<std::size_t>(std::min(s.rows, s.cols));
    std::vector<wide> sorted = spectrum.sigma;
    std::sort(sorted.begin(), sorted.end(), [](const wide& a, const wide& b) { return a > b; });
    wide total = 0, entropy = 0, mean = 0;
    for (std::size_t k = 0; k < count; ++k)
      total += sorted[k];
    const auto share = [&](const wide& sigma) { return wide(sigma / total + wide(1e-7)); };
    for (std::size_t k = 0; k < count; ++k) {
      const wide p = share(sorted[k]);
      entropy -= p * log(p);
      mean -= (log(p) + 1) * sorted[k] / total;
    }
    const wide rank = exp(entropy);
    const wide_matrix slopes = spectrum.combine([&](std::size_t k) {
      return rank / total * (-(log(share(spectrum.sigma[k])) + 1) - mean);
    });
    batch<T> g(s.rows, s.cols);
    const T value = perdita::rank_me<T>()(x.view(), g.view());
    CHECK(of_values.within(size_of(wide(value - rank)), sizeof(T) == 4 ? 1 : 6, epsilon * rank));
    if (count > 1)
      CHECK(slopes_within(of_slopes, g, slopes, sizeof(T) == 4 ? 1 : 24));
  }
  report_accuracy<T>(
      "rank_me", "", in_epsilons,
      {of_values.worst(), of_slopes.worst(), std::max(of_values.share(), of_slopes.share())});
}

TEST_CASE("rank_me: the formula sheet's values", "[rank_me]") {
  const auto x = sheet_x();
  auto g = x;
  CHECK(near(perdita::rank_me<double>()(x.view(), g.view()), 3.88039595428, 1e-11));
  CHECK(near(length_of(g.x), 0.304459192, 1e-8));
}

TEST_CASE("rank_me: the gradient is the derivative", "[rank_me]") {
  for (const index cols : {3, 8})
    check_derivative<1>(perdita::rank_me<double>(), std::array{random_batch<double>(5, cols, 1)});
}

TEST_CASE("rank_me: orthogonal, equal and zero rows, and any scale", "[rank_me]") {
  const perdita::rank_me<double> metric({.epsilon = 0});
  batch<double> x(7, 4), g(7, 4, 5);
  for (index c = 0; c < 4; ++c)
    x(c + 2, c) = 0.3;
  CHECK(near(metric(x.view(), g.view()), 4, 1e-15));
  for (const double slope : g.x)
    CHECK(std::abs(slope) < 1e-14);
  const batch<double> equal(7, 4, 0.3);
  CHECK(near(metric(equal.view(), g.view()), 1, 1e-14));
  for (const double slope : g.x)
    CHECK(std::abs(slope) < 1e-13);
  const batch<double> zeros(7, 4);
  CHECK(metric(zeros.view(), g.view()) == 0);
  CHECK(g.x == std::vector<double>(28, 0));

  // R(c X) = R(X); to the bit, of powers of two.
  const auto y = random_batch<double>(7, 4, 2);
  const double rank = perdita::rank_me<double>()(y.view(), g.view());
  auto scaled = y, h = g;
  for (const int power : {-900, 900}) {
    for (std::size_t i = 0; i < y.x.size(); ++i)
      scaled.x[i] = std::ldexp(y.x[i], power);
    CHECK(perdita::rank_me<double>()(scaled.view(), h.view()) == rank);
    for (std::size_t i = 0; i < y.x.size(); ++i)
      REQUIRE(std::ldexp(h.x[i], power) == g.x[i]);
  }
  check_special_calls<1>(metric, 4, 3);
}

TEST_CASE("rank_me: singular values of many sizes", "[rank_me]") {
  // Orthogonal columns of the lengths 1, 10^-3, …, 10^-9; their rows are not orthogonal.
  batch<double> x(4, 4);
  const double c = 0.6, s = 0.8;
  const double sigma[] = {1, 1e-3, 1e-6, 1e-9};
  for (index k = 0; k < 4; ++k) {
    x(k, k) = c * sigma[k];
    x(k ^ 1, k) = (k % 2 == 0 ? s : -s) * sigma[k];
  }
  double total = 0, entropy = 0;
  for (const double v : sigma)
    total += v;
  for (const double v : sigma)
    entropy -= v / total * std::log(v / total);
  CHECK(near(perdita::rank_me<double>({.epsilon = 0})(x.view()), std::exp(entropy), 1e-14));
}

TEMPLATE_TEST_CASE("rank_me: layouts, threads, calls, refusals", "[rank_me][threads]", float,
                   double) {
  check_calls<1>(perdita::rank_me<TestType>(), 150, 21);
  CHECK_THROWS_WITH(perdita::rank_me<TestType>({.epsilon = -1}),
                    Catch::Matchers::ContainsSubstring("epsilon is -1"));
}

} // namespace perdita_tests
