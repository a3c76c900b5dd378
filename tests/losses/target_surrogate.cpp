// SPDX-License-Identifier: MIT

// Target-based surrogate: formula sheet 14.5.

#include <perdita/target_surrogate.hpp>

#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include <perdita/cross_entropy.hpp>
#include <perdita/testing/gradient_check.hpp>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/numbers.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr std::size_t rows = 19, cols = 5;

template <class T> struct problem {
  std::vector<T> z, anchor, slopes, weights, upstream;
  problem() {
    random_numbers random(3);
    for (std::size_t k = 0; k < rows * cols; ++k) {
      anchor.push_back(static_cast<T>(random.normal()));
      z.push_back(static_cast<T>(random.normal()));
      slopes.push_back(static_cast<T>(random.uniform(-1, 1)));
    }
    for (std::size_t r = 0; r < rows; ++r) {
      weights.push_back(static_cast<T>(static_cast<double>(r % 3) / 2));
      upstream.push_back(static_cast<T>(random.uniform(-1, 1)));
    }
  }
  static auto view(const std::vector<T>& v) {
    return perdita::matrix_view<const T>(v.data(), rows, cols);
  }
  static auto writable(std::vector<T>& v) { return perdita::matrix_view<T>(v.data(), rows, cols); }
  perdita::surrogate_anchor<T> at(double value) const {
    return {value, view(anchor), view(slopes)};
  }
};

} // namespace

TEMPLATE_TEST_CASE("target_surrogate: value and gradient against the formula", "[surrogate]", float,
                   double) {
  using T = TestType;
  const problem<T> p;
  const double epsilon = std::numeric_limits<T>::epsilon();
  error_judge of_values, of_slopes;
  for (const double step : {0.25, 3.0}) {
    wide total = 1.5, terms = 1.5;
    std::vector<wide> shares(rows), shares_terms(rows), expected(rows * cols), sizes(rows * cols);
    for (std::size_t k = 0; k < rows * cols; ++k) {
      const std::size_t r = k / cols;
      const wide d = wide(p.z[k]) - p.anchor[k], g = p.slopes[k], w = p.weights[r];
      shares[r] += w * (g * d + d * d / (2 * step));
      shares_terms[r] += w * (size_of(wide(g * d)) + d * d / (2 * step));
      expected[k] = 3 * w * p.upstream[r] * (g + d / step);
      sizes[k] = size_of(wide(3 * w * p.upstream[r])) * (size_of(g) + size_of(wide(d / step)));
    }
    for (std::size_t r = 0; r < rows; ++r) {
      total += shares[r];
      terms += shares_terms[r];
    }
    const perdita::target_surrogate<T> surrogate({.step = step});
    std::vector<T> g(rows * cols, 7), values(rows);
    const perdita::call_options<T> call{
        .row_weights = p.weights, .upstream = p.upstream, .scale = 3, .values = values};
    const T value = surrogate(p.view(p.z), p.at(1.5), p.writable(g), call);
    CHECK(of_values.within(size_of(wide(value - total)), 1, epsilon * terms));
    CHECK(surrogate(p.view(p.z), p.at(1.5), call) == value);
    for (std::size_t r = 0; r < rows; ++r)
      CHECK(of_values.within(size_of(wide(values[r] - shares[r])), 2, epsilon * shares_terms[r]));
    for (std::size_t k = 0; k < g.size(); ++k)
      CHECK(of_slopes.within(size_of(wide(g[k] - expected[k])), 4, epsilon * sizes[k]));
  }
  report_accuracy<T>(
      "target_surrogate", "", in_epsilons_of_terms,
      {of_values.worst(), of_slopes.worst(), std::max(of_values.share(), of_slopes.share())});
}

TEMPLATE_TEST_CASE("target_surrogate: touches the loss, and is nowhere below cross-entropy",
                   "[surrogate]", float, double) {
  using T = TestType;
  problem<T> p;
  std::vector<int> labels(rows);
  for (std::size_t r = 0; r < rows; ++r)
    labels[r] = static_cast<int>(r % cols);
  for (const auto how : {perdita::reduction::sum, perdita::reduction::mean}) {
    const perdita::cross_entropy<T> loss({.reduction = how});
    const T value = loss(p.view(p.anchor), labels, p.writable(p.slopes));
    const double step = how == perdita::reduction::sum ? 2 : 2 * static_cast<double>(rows);
    const perdita::target_surrogate<T> surrogate({.step = step});
    const auto anchor = p.at(static_cast<double>(value));
    std::vector<T> g(rows * cols);
    CHECK(surrogate(p.view(p.anchor), anchor, p.writable(g)) == value);
    CHECK(g == p.slopes);
    random_numbers random(17);
    for (const double reach : {0.01, 1.0, 20.0}) {
      auto z = p.anchor;
      for (T& x : z)
        x += static_cast<T>(reach * random.normal());
      const T here = loss(p.view(z), labels);
      CHECK(surrogate(p.view(z), anchor) >=
            here - 8 * std::numeric_limits<T>::epsilon() * (here + value));
    }
    // Its minimum.
    auto least = p.anchor;
    double squares = 0;
    for (std::size_t k = 0; k < least.size(); ++k) {
      least[k] -= static_cast<T>(step) * p.slopes[k];
      squares += static_cast<double>(p.slopes[k]) * static_cast<double>(p.slopes[k]);
    }
    const double epsilon = std::numeric_limits<T>::epsilon();
    CHECK(std::abs(static_cast<double>(surrogate(p.view(least), anchor, p.writable(g))) -
                   (static_cast<double>(value) - step / 2 * squares)) <=
          4 * epsilon * static_cast<double>(value));
    for (const T x : g)
      CHECK(std::abs(static_cast<double>(x)) <= 8 * epsilon);
  }
}

TEST_CASE("target_surrogate: the gradient is the derivative", "[surrogate]") {
  const problem<double> p;
  for (const double step : {0.5, inf}) {
    const perdita::target_surrogate<double> surrogate({.step = step});
    std::vector<double> g(rows * cols);
    surrogate(p.view(p.z), p.at(2), p.writable(g), {.row_weights = p.weights});
    auto x = p.z;
    const auto report = perdita::testing::check_gradient(
        [&] { return surrogate(p.view(x), p.at(2), {.row_weights = p.weights}); }, x, g);
    INFO(report.message());
    CHECK(report.ok);
  }
}

TEST_CASE("target_surrogate: masked classes, infinity, NaN, nothing", "[surrogate]") {
  const std::vector<double> z{-inf, 1, 2, 3, inf, 0, std::nan(""), 1},
      then{-inf, 1, 2, 2, 1, 0, 0, 0}, slopes{0, 1, 2, 3, 1, 1, 1, 1};
  std::vector<double> g(8), values(4);
  const auto at = [](const std::vector<double>& v) {
    return perdita::matrix_view<const double>(v.data(), 4, 2);
  };
  const perdita::target_surrogate<double> surrogate;
  CHECK(std::isnan(surrogate(at(z), {0, at(then), at(slopes)},
                             perdita::matrix_view<double>(g.data(), 4, 2), {.values = values})));
  CHECK((values[0] == 0 && values[1] == 3.5 && values[2] == inf && std::isnan(values[3])));
  CHECK((g[0] == 0 && g[1] == 1 && g[2] == 2 && g[3] == 4 && g[4] == inf && g[5] == 1));
  CHECK((std::isnan(g[6]) && g[7] == 2));
  const std::vector<double> upstream{1, 1, 0, 0};
  surrogate(at(z), {0, at(then), at(slopes)}, perdita::matrix_view<double>(g.data(), 4, 2),
            {.upstream = upstream});
  CHECK((g[3] == 4 && g[4] == 0 && g[5] == 0 && g[6] == 0 && g[7] == 0));
  CHECK(surrogate({}, {4, {}, {}}) == 4);
}

TEST_CASE("target_surrogate: strides, in place, added, on any threads", "[surrogate][threads]") {
  const problem<float> p;
  const perdita::target_surrogate<float> surrogate({.step = 0.7});
  std::vector<float> g(rows * cols);
  const float value = surrogate(p.view(p.z), p.at(1), p.writable(g), {.run_on = perdita::serial});
  perdita::workspace memory;
  for (const std::size_t n : {2U, 7U}) {
    const threads_executor pool(n, task_order::shuffled);
    std::vector<float> many(rows * cols);
    CHECK(surrogate(p.view(p.z), p.at(1), p.writable(many), {.run_on = pool, .memory = &memory}) ==
          value);
    CHECK(many == g);
  }
  auto place = p.z;
  CHECK(surrogate(p.view(place), p.at(1), p.writable(place)) == value);
  CHECK(place == g);
  std::vector<float> added(rows * cols, 1);
  surrogate(p.view(p.z), p.at(1), p.writable(added), {.accumulate = true});
  for (std::size_t k = 0; k < g.size(); ++k)
    CHECK(std::abs(added[k] - 1 - g[k]) <= 1.2e-7f * (1 + std::abs(g[k])));
  // Columns first.
  std::vector<float> turned(rows * cols), turned_g(rows * cols);
  for (std::size_t k = 0; k < g.size(); ++k)
    turned[k % cols * rows + k / cols] = p.z[k];
  CHECK(surrogate(perdita::matrix_view<const float>(turned.data(), rows, cols, 1, rows), p.at(1),
                  perdita::matrix_view<float>(turned_g.data(), rows, cols, 1, rows)) == value);
  for (std::size_t k = 0; k < g.size(); ++k)
    CHECK(turned_g[k % cols * rows + k / cols] == g[k]);
}

TEST_CASE("target_surrogate: bad input is refused, and nothing written", "[surrogate]") {
  using Catch::Matchers::ContainsSubstring;
  using surrogates = perdita::target_surrogate<double>;
  CHECK_THROWS_WITH(surrogates({.step = 0}), ContainsSubstring("step is 0"));
  const surrogates surrogate;
  const problem<double> p;
  std::vector<double> g(rows * cols, 5), slopes = p.slopes, values(3, 5);
  const auto good = p.writable(g);
  CHECK_THROWS_WITH(surrogate(p.view(p.z), p.at(0), good, {.normaliser = 2}),
                    ContainsSubstring("target_surrogate: normaliser is 2, expected 0"));
  auto anchor = p.at(0);
  anchor.scores.rows = 3;
  CHECK_THROWS_WITH(surrogate(p.view(p.z), anchor, good),
                    ContainsSubstring("rows of the anchor's scores is 3, expected 19"));
  anchor = p.at(0);
  anchor.gradient.cols = 4;
  CHECK_THROWS_WITH(surrogate(p.view(p.z), anchor, good),
                    ContainsSubstring("columns of the anchor's gradient is 4, expected 5"));
  anchor = p.at(0);
  anchor.gradient.data = nullptr;
  CHECK_THROWS_WITH(surrogate(p.view(p.z), anchor, good),
                    ContainsSubstring("anchor gradient is null"));
  anchor = p.at(0);
  anchor.gradient = p.view(slopes);
  CHECK_THROWS_WITH(surrogate(p.view(p.z), anchor, p.writable(slopes)),
                    ContainsSubstring("gradient is a matrix of the anchor"));
  CHECK_THROWS_WITH(
      surrogate(p.view(p.z), anchor, perdita::matrix_view<double>(slopes.data() + 1, 19, 5, 5, 1)),
      ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(surrogate(p.view(p.z), p.at(0), good, {.values = values}),
                    ContainsSubstring("values is 3, expected 19"));
  CHECK_THROWS_WITH(surrogate(p.view(p.z), p.at(0), good, {.hits = std::vector<unsigned char>(19)}),
                    ContainsSubstring("by-product"));
  CHECK_THROWS_WITH(surrogate(p.view(p.z), p.at(0), perdita::matrix_view<double>(g.data(), 19, 4)),
                    ContainsSubstring("gradient columns is 4"));
  CHECK(g == std::vector<double>(rows * cols, 5));
  CHECK(values == std::vector<double>(3, 5));
  CHECK(slopes == p.slopes);
}

} // namespace perdita_tests
