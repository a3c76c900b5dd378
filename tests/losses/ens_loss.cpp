// SPDX-License-Identifier: MIT

// EnsLoss: formula sheet 5. Draws are compared with ones made from std::erfc and 113 bits.

#include <perdita/ens_loss.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/numbers.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

using perdita::binary_labels;
using perdita::reduction;
constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

template <class T> struct batch { std::vector<T> x, y; };

/// Scores without ties, of both labels; margins on both sides of 1.
template <class T> batch<T> make_batch(std::size_t n, std::uint64_t seed = 3) {
  random_numbers random(seed);
  batch<T> b;
  for (std::size_t i = 0; i < n; ++i) {
    b.x.push_back(static_cast<T>(2 * random.normal()));
    b.y.push_back(random.below(2) ? T(1) : T(-1));
  }
  return b;
}

/// g of every element.
template <class T>
std::vector<T> derivatives(const perdita::ens_loss<T>& loss, const batch<T>& b,
                           std::uint64_t step) {
  std::vector<T> g(b.x.size());
  loss(b.x, b.y, g, step);
  for (std::size_t i = 0; i < g.size(); ++i)
    g[i] *= b.y[i];
  return g;
}
template <class T> perdita::ens_loss<T> make_loss(std::uint64_t seed, double lambda) {
  return perdita::ens_loss<T>({.seed = seed, .lambda = lambda, .reduction = reduction::sum});
}

// SplitMix64 as its authors write it: a state that moves on with every number.
struct split_mix_64 {
  std::uint64_t x;
  std::uint64_t next() {
    std::uint64_t z = (x += UINT64_C(0x9E3779B97F4A7C15));
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
  }
  std::uint64_t skip(std::uint64_t n) {
    for (std::uint64_t i = 0; i < n; ++i)
      next();
    return next();
  }
  double uniform() { return (static_cast<double>(next() / 4096) + 0.5) / 4503599627370496.0; }
};

/// Where the normal distribution reaches u: by bisection.
double normal_quantile(double u) {
  const double tail = std::min(u, 1 - u); // exact
  double low = -9, high = 0;
  for (int i = 0; i < 60; ++i) {
    const double z = (low + high) / 2;
    (std::erfc(-z / std::sqrt(2.0)) / 2 < tail ? low : high) = z;
  }
  return u < 0.5 ? low : -low;
}

wide inverse_box_cox(wide z, wide lambda) {
  if (lambda == 0)
    return exp(z);
  if (1 + lambda * z <= 0)
    return lambda < 0 ? infinity() : wide(0);
  return exp(wide(log1p(wide(lambda * z)) / lambda));
}

/// The derivatives, in the order of the margins, by the sheet's six steps.
std::vector<wide> expected_slopes(std::vector<double> margins, std::uint64_t seed,
                                  std::uint64_t step, double lambda) {
  split_mix_64 root{seed};
  split_mix_64 of_slopes{root.next()};
  split_mix_64 steps{of_slopes.next()};
  split_mix_64 numbers{steps.skip(step)};
  std::vector<wide> g;
  for (std::size_t i = 0; i < margins.size(); ++i) {
    const wide r = inverse_box_cox(normal_quantile(numbers.uniform()), lambda);
    g.push_back(larger(-r, -1));
  }
  std::sort(g.begin(), g.end());
  std::sort(margins.begin(), margins.end());
  for (std::size_t k = 0; k < g.size(); ++k) {
    if (margins[k] > 1)
      g[k] /= margins[k];
    g[k] -= wide(1) / 1000000;
  }
  return g;
}

template <class T> std::vector<std::size_t> by_margin(const batch<T>& b) {
  std::vector<std::size_t> order(b.x.size());
  std::iota(order.begin(), order.end(), std::size_t(0));
  std::stable_sort(order.begin(), order.end(),
                   [&](auto i, auto j) { return b.x[i] * b.y[i] < b.x[j] * b.y[j]; });
  return order;
}

} // namespace

TEST_CASE("ens_loss: normal quantiles", "[ens_loss]") {
  using W = perdita::core::pack<double>;
  random_numbers random(1);
  for (int i = 0; i < 2000; ++i) {
    double u = random.uniform(0, 1);
    if (i % 3 == 1)
      u = std::pow(10.0, -16 * u);
    if (i % 6 == 4)
      u = 1 - u;
    if (i < 4)
      u = std::vector<double>{0x1p-53, 1 - 0x1p-53, 0.5, 0.925}[static_cast<std::size_t>(i)];
    alignas(64) double z[perdita::core::lanes<double>];
    perdita::core::normal_quantile(W(u)).store(z);
    const double expected = normal_quantile(u);
    INFO("u = " << u << ": " << z[0] << ", expected " << expected);
    CHECK(std::abs(z[0] - expected) / std::max(std::abs(expected), 0.25) <= 4e-15);
  }
}

TEMPLATE_TEST_CASE("ens_loss: every number", "[ens_loss]", float, double) {
  using T = TestType;
  const double epsilon = static_cast<double>(std::numeric_limits<T>::epsilon());
  error_judge of_values, of_slopes;
  for (const std::size_t n : {1U, 2U, 7U, 64U, 301U})
    for (const double lambda : {-1.0, -0.6, -1e-9, 0.0, 1e-300, 1e-18, 1e-3, 0.35, 1.0})
      for (const std::uint64_t step : {0U, 1U, 77U}) {
        const auto b = make_batch<T>(n, n);
        const perdita::ens_loss<T> loss(
            {.seed = 40 + n, .lambda = lambda, .reduction = reduction::none});
        std::vector<T> g(n), values(n);
        const T sum = loss(b.x, b.y, g, step, {.values = values});
        const auto order = by_margin(b);
        std::vector<double> margins;
        for (std::size_t i = 0; i < n; ++i)
          margins.push_back(static_cast<double>(b.x[i] * b.y[i]));
        const auto expected = expected_slopes(margins, 40 + n, step, lambda);
        wide expected_sum = 0, size = 0;
        for (std::size_t k = 0; k < n; ++k) {
          const std::size_t i = order[k];
          const wide slope = expected[k] * static_cast<double>(b.y[i]),
                     value = expected[k] * margins[i];
          // Where r is next to 0, 1 + λz is a difference.
          const wide slack = 0.75 * epsilon * size_of(slope) + 2e-15;
          INFO("n = " << n << ", lambda = " << lambda << ", element " << i << ": " << g[i]
                      << ", expected " << text(slope));
          REQUIRE(
              of_slopes.within(size_of(wide(wide(static_cast<double>(g[i])) - slope)), 1, slack));
          REQUIRE(of_values.within(size_of(wide(wide(static_cast<double>(values[i])) - value)), 2,
                                   slack * (1 + size_of(wide(margins[i])))));
          expected_sum += value;
          size += size_of(value);
        }
        CHECK(size_of(wide(wide(static_cast<double>(sum)) - expected_sum)) <=
              (4 * epsilon + 1e-14) * (size + 1));
      }
  report_accuracy<T>(
      "ens_loss", "", in_allowances,
      {of_values.share(), of_slopes.share(), std::max(of_values.share(), of_slopes.share())});
}

TEMPLATE_TEST_CASE("ens_loss: what every draw keeps to", "[ens_loss]", float, double) {
  using T = TestType;
  const double epsilon = static_cast<double>(std::numeric_limits<T>::epsilon());
  int steep = 0, flat = 0;
  for (std::uint64_t step = 0; step < 3000; ++step) {
    const auto b = make_batch<T>(1 + step % 41, step);
    const perdita::ens_loss<T> loss({.seed = step / 100, .period = 1, .reduction = reduction::sum});
    const auto g = derivatives(loss, b, step);
    const auto order = by_margin(b);
    T before = -2;
    bool monotone = true, negative = true, bounded = true;
    for (const std::size_t i : order) {
      const double m = static_cast<double>(b.x[i] * b.y[i]), size = -static_cast<double>(g[i]);
      monotone = monotone && g[i] >= before;
      before = g[i];
      negative = negative && g[i] <= T(-1e-6);
      bounded = bounded && size <= (1 / std::max(1.0, m) + 1e-6) * (1 + epsilon);
      steep += m < 1 && size >= 1;
      flat += m < 1 && size < 0.5;
    }
    INFO("step " << step);
    REQUIRE(monotone);
    REQUIRE(negative);
    REQUIRE(bounded);
  }
  CHECK(steep > 1000);
  CHECK(flat > 1000);
}

TEST_CASE("ens_loss: the distribution of what is drawn", "[ens_loss]") {
  // With all margins equal and below 1, g is −min(1, e^z): −1 half of the time, and above −t with
  // the probability that z is below log t.
  const std::size_t n = 20000;
  const batch<double> b{std::vector<double>(n, 0.5), std::vector<double>(n, 1)};
  const auto g = derivatives(make_loss<double>(11, 0), b, 5);
  const auto share_above = [&](double bound) {
    return double(std::count_if(g.begin(), g.end(), [=](double x) { return x > bound - 1e-6; })) /
           double(n);
  };
  const double tolerance = 4 * 0.5 / std::sqrt(double(n));
  CHECK(std::abs(share_above(-1) - 0.5) < tolerance);
  for (const double t : {0.1, 0.5, 0.8})
    CHECK(std::abs(share_above(-t) - std::erfc(-std::log(t) / std::sqrt(2.0)) / 2) < tolerance);

  // λ of each period is uniform in (−1, 1), and the same throughout the period.
  const perdita::ens_loss<double> loss({.seed = 2, .period = 10});
  double sum = 0, squares = 0;
  for (std::uint64_t p = 0; p < 20000; ++p) {
    const double lambda = loss.lambda(10 * p);
    CHECK(std::abs(lambda) < 1);
    CHECK(lambda == loss.lambda(10 * p + 9));
    CHECK(lambda != loss.lambda(10 * p + 10));
    sum += lambda;
    squares += lambda * lambda;
  }
  CHECK(std::abs(sum / 20000) < 4 * std::sqrt(1.0 / 3 / 20000));
  CHECK(std::abs(squares / 20000 - 1.0 / 3) < 4 * std::sqrt(4.0 / 45 / 20000));
  // And it is the λ that a call uses.
  const auto batch_of_100 = make_batch<double>(100);
  const perdita::ens_loss<double> periodic({.seed = 2, .period = 10, .reduction = reduction::sum});
  CHECK(derivatives(periodic, batch_of_100, 35) ==
        derivatives(make_loss<double>(2, loss.lambda(30)), batch_of_100, 35));
  CHECK(make_loss<double>(2, 0.25).lambda(99) == 0.25);
}

TEMPLATE_TEST_CASE("ens_loss: seed and step, and nothing else", "[ens_loss]", float, double) {
  using T = TestType;
  const std::size_t n = 40000; // several tasks
  const auto b = make_batch<T>(n);
  const auto loss = make_loss<T>(5, 0.5);
  const auto run = [&](const perdita::executor& on) {
    std::vector<T> g(n + 1);
    g[n] = loss(b.x, b.y, perdita::vector_view<T>(g.data(), perdita::index(n)), 9, {.run_on = on});
    return g;
  };
  const auto expected = run(perdita::serial);
  const threads_executor threads(3, task_order::shuffled);
  CHECK(run(threads) == expected);
  CHECK(run(one_thread_executor(task_order::reversed)) == expected);
  CHECK(loss(b.x, b.y, 9) == expected[n]);

  const auto small = make_batch<T>(50);
  const auto g = derivatives(make_loss<T>(5, 0.5), small, 9);
  CHECK(derivatives(make_loss<T>(5, 0.5), small, 9) == g);
  CHECK(derivatives(make_loss<T>(5, 0.5), small, 10) != g);
  CHECK(derivatives(make_loss<T>(6, 0.5), small, 9) != g);
  CHECK(derivatives(make_loss<T>(5, 0.4), small, 9) != g);

  // In another order, every element has what its rank has.
  batch<T> turned = small;
  std::rotate(turned.x.begin(), turned.x.begin() + 17, turned.x.end());
  std::rotate(turned.y.begin(), turned.y.begin() + 17, turned.y.end());
  std::vector<T> turned_g = g;
  std::rotate(turned_g.begin(), turned_g.begin() + 17, turned_g.end());
  CHECK(derivatives(make_loss<T>(5, 0.5), turned, 9) == turned_g);

  // Equal margins are ranked by their place.
  const batch<T> ties{std::vector<T>(50, T(0.25)), std::vector<T>(50, T(1))};
  const auto of_ties = derivatives(make_loss<T>(5, 0.5), ties, 9);
  CHECK(std::is_sorted(of_ties.begin(), of_ties.end()));
  CHECK(of_ties.front() < of_ties.back());
}

TEMPLATE_TEST_CASE("ens_loss: call options, layouts and labels", "[ens_loss]", float, double) {
  using T = TestType;
  const std::size_t n = 60;
  const auto b = make_batch<T>(n);
  const auto sum = make_loss<T>(1, 0);
  std::vector<T> g(n), values(n);
  sum(b.x, b.y, g, 4, {.values = values});

  // 0 and 1, in integers: the same bits.
  std::vector<std::int64_t> labels;
  for (const T y : b.y)
    labels.push_back(y > 0 ? 1 : 0);
  std::vector<T> other(n);
  perdita::ens_loss<T>({.seed = 1, .labels = binary_labels::zero_one, .reduction = reduction::sum})(
      b.x, labels, other, 4);
  CHECK(other == g);

  // The mean is one n-th, and may be scaled.
  const T mean = perdita::ens_loss<T>({.seed = 1})(b.x, b.y, other, 4, {.scale = 2});
  wide total = 0;
  const double epsilon = static_cast<double>(std::numeric_limits<T>::epsilon());
  for (std::size_t i = 0; i < n; ++i) {
    total += wide(static_cast<double>(values[i])) / double(n);
    CHECK(std::abs(double(other[i]) - double(g[i]) * 2 / double(n)) <= 2 * epsilon / double(n));
  }
  CHECK(std::abs(double(mean) - static_cast<double>(total)) <= 2 * epsilon);

  // Weights multiply, and change no rank; in place; added to what is there.
  std::vector<T> weights(n, T(1)), in_place = b.x, added(n, T(3));
  weights[5] = 0, weights[6] = 4;
  sum(b.x, b.y, other, 4, {.weights = weights});
  sum(in_place, b.y, in_place, 4);
  sum(b.x, b.y, added, 4, {.accumulate = true});
  CHECK(in_place == g);
  for (std::size_t i = 0; i < n; ++i) {
    CHECK(other[i] == g[i] * weights[i]);
    CHECK(added[i] == T(3) + g[i]);
  }

  // A matrix, its elements numbered row by row however they lie.
  std::vector<T> x_columns(n), y_columns(n), g_columns(n);
  for (std::size_t i = 0; i < n; ++i) {
    x_columns[i % 10 * 6 + i / 10] = b.x[i];
    y_columns[i % 10 * 6 + i / 10] = b.y[i];
  }
  const auto columns = [](std::vector<T>& v) {
    return perdita::matrix_view<T>(v.data(), 6, 10, 1, 6);
  };
  sum(columns(x_columns), columns(y_columns), columns(g_columns), 4);
  for (std::size_t i = 0; i < n; ++i)
    CHECK(g_columns[i % 10 * 6 + i / 10] == g[i]);
}

TEMPLATE_TEST_CASE("ens_loss: special values", "[ens_loss]", float, double) {
  using T = TestType;
  const auto loss = make_loss<T>(1, 0);
  const std::vector<T> nothing;
  std::vector<T> no_gradient;
  CHECK(loss(nothing, nothing, no_gradient, 1) == 0);

  const T infinite = static_cast<T>(inf), not_a_number = static_cast<T>(nan);
  const std::vector<T> x{1, not_a_number, infinite, -infinite, T(0), T(-2), 3},
      y{1, 1, 1, 1, 1, 1, not_a_number};
  std::vector<T> g(7), values(7);
  loss(x, y, g, 0, {.values = values});
  for (const std::size_t i : {1U, 6U}) {
    CHECK(std::isnan(g[i]));
    CHECK(std::isnan(values[i]));
  }
  CHECK(g[2] == T(-1e-6));
  CHECK(values[2] == -infinite);
  CHECK(g[3] < 0);
  CHECK(g[3] <= g[5]);
  CHECK(g[5] <= g[4]);
  CHECK(g[4] <= g[0]);
  CHECK(g[0] <= T(-1e-6));
  CHECK(values[3] == infinite);
  CHECK(values[4] == 0);
  CHECK(values[0] == g[0]);
}

TEST_CASE("ens_loss: what is refused", "[ens_loss]") {
  using Catch::Matchers::ContainsSubstring;
  for (const double lambda : {-1.5, 1.0000001, nan, inf})
    CHECK_THROWS_WITH(perdita::ens_loss<float>({.lambda = lambda}), ContainsSubstring("lambda is"));
  CHECK_THROWS_WITH(perdita::ens_loss<float>({.labels = static_cast<binary_labels>(7)}),
                    ContainsSubstring("labels is 7"));
  CHECK_THROWS_WITH(perdita::ens_loss<float>({.reduction = static_cast<reduction>(7)}),
                    ContainsSubstring("reduction"));
  const std::vector<float> x(3, 1), y(3, 1), two(2, 1);
  std::vector<float> g(3, 7), small(2, 7);
  const perdita::ens_loss<float> loss;
  CHECK_THROWS_WITH(loss(x, two, g, 0), ContainsSubstring("shape of targets is 1 x 2"));
  CHECK_THROWS_WITH(loss(x, y, small, 0), ContainsSubstring("shape of gradient is 1 x 2"));
  CHECK_THROWS_WITH(loss(x, y, g, 0, {.weights = two}), ContainsSubstring("shape of weights"));
  CHECK_THROWS_WITH(loss(x, y, g, 0, {.normaliser = -1}), ContainsSubstring("normaliser is -1"));
  CHECK(g == std::vector<float>(3, 7));
  CHECK(small == std::vector<float>(2, 7));
}

} // namespace perdita_tests
