// SPDX-License-Identifier: MIT

// Feasible learning: formula sheet 14.2.

#include <perdita/feasible.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include <perdita/brier.hpp>
#include <perdita/comp_sum.hpp>
#include <perdita/cross_entropy.hpp>
#include <perdita/ldr.hpp>
#include <perdita/sparsemax.hpp>
#include <perdita/testing/gradient_check.hpp>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/numbers.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

constexpr double inf = std::numeric_limits<double>::infinity();

template <class T> struct batch {
  static constexpr std::size_t rows = 9, cols = 4;
  std::vector<T> scores, row_weights;
  std::vector<double> multipliers;
  std::vector<std::int64_t> labels;
  batch() {
    random_numbers random(5);
    for (std::size_t i = 0; i < rows * cols; ++i)
      scores.push_back(static_cast<T>(random.normal()));
    for (std::size_t i = 0; i < rows; ++i) {
      labels.push_back(static_cast<std::int64_t>(random.below(cols)));
      multipliers.push_back(0.25 * static_cast<double>(i % 4));
      row_weights.push_back(static_cast<T>(0.5 * static_cast<double>(i % 3)));
    }
    labels[1] = -100;
  }
  auto view() const { return perdita::matrix_view<const T>(scores.data(), rows, cols); }
  auto writable(std::vector<T>& g) const { return perdita::matrix_view<T>(g.data(), rows, cols); }
};

} // namespace

TEMPLATE_TEST_CASE("feasible: one step of both players against the formula", "[feasible]", float,
                   double) {
  using T = TestType;
  const batch<T> b;
  constexpr std::size_t rows = batch<T>::rows, cols = batch<T>::cols;
  const double epsilon = std::numeric_limits<T>::epsilon();
  error_judge of_values, of_slopes;
  for (const double slack_cost : {inf, 2.0})
    for (const auto how :
         {perdita::reduction::mean, perdita::reduction::sum, perdita::reduction::none})
      for (const double normaliser : {0.0, 5.0}) {
        const double level = 0.7, rate = 0.3;
        wide value = 0, count = 0;
        std::vector<wide> lambda(rows), part(rows), slopes(rows * cols);
        for (std::size_t i = 0; i < rows; ++i) {
          lambda[i] = b.multipliers[i];
          if (b.labels[i] < 0 || b.row_weights[i] == 0)
            continue;
          const std::vector<wide> z(&b.scores[i * cols], &b.scores[i * cols] + cols);
          const wide lse = log_sum_exp(z, [](std::size_t) { return true; });
          const auto y = static_cast<std::size_t>(b.labels[i]);
          const wide loss = lse - z[y], slack = slack_cost == inf ? 0 : lambda[i] / slack_cost;
          lambda[i] = larger(0, lambda[i] + rate * (loss - level - slack));
          const wide quadratic =
              slack_cost == inf ? wide(0) : wide(lambda[i] * lambda[i] / (2 * slack_cost));
          const wide weight = b.row_weights[i];
          part[i] = weight * (lambda[i] * (loss - level) - quadratic);
          value += part[i];
          count += weight;
          for (std::size_t j = 0; j < cols; ++j)
            slopes[i * cols + j] = weight * lambda[i] * (exp(wide(z[j] - lse)) - (j == y));
        }
        const wide share = how != perdita::reduction::mean ? wide(1)
                           : normaliser != 0               ? wide(1 / wide(normaliser))
                                                           : wide(1 / count);
        const perdita::feasible loss(perdita::cross_entropy<T>({.reduction = how}),
                                     {.level = level, .dual_rate = rate, .slack_cost = slack_cost});
        auto multipliers = b.multipliers;
        std::vector<T> g(rows * cols), values(rows);
        std::vector<unsigned char> hits(rows), expected_hits(rows);
        const T got = loss(b.view(), b.labels, multipliers, b.writable(g),
                           {.row_weights = b.row_weights,
                            .scale = 2,
                            .normaliser = normaliser,
                            .values = values,
                            .hits = hits});
        CHECK(of_values.within(size_of(wide(got - value * share)), 8, epsilon));
        for (std::size_t i = 0; i < rows; ++i) {
          CHECK(size_of(wide(multipliers[i] - lambda[i])) <= 2 * epsilon);
          CHECK(of_values.within(size_of(wide(values[i] - part[i])), 8, epsilon));
        }
        wide worst = 0;
        for (std::size_t k = 0; k < g.size(); ++k)
          worst = worse(worst, size_of(wide(g[k] - 2 * share * slopes[k])));
        CHECK(of_slopes.within(worst, 8, epsilon));
        perdita::cross_entropy<T>()(b.view(), b.labels,
                                    {.row_weights = b.row_weights, .hits = expected_hits});
        CHECK(hits == expected_hits);
        // Without a gradient nothing moves, and the value is that of the multipliers given.
        const auto before = multipliers;
        CHECK(loss(b.view(), b.labels, multipliers,
                   {.row_weights = b.row_weights, .normaliser = normaliser}) == got);
        CHECK(multipliers == before);
      }
  report_accuracy<T>(
      "feasible", "cross_entropy", in_epsilons_absolute,
      {of_values.worst(), of_slopes.worst(), std::max(of_values.share(), of_slopes.share())});
}

TEST_CASE("feasible: class weights do not enter the mean", "[feasible]") {
  const batch<double> b;
  std::vector<double> ones(batch<double>::rows, 1), values(batch<double>::rows);
  const perdita::cross_entropy<double> plain({.class_weights = std::vector<double>{1, 2, 3, 4}});
  plain(b.view(), b.labels, {.values = values});
  double sum = 0;
  for (std::size_t i = 0; i < values.size(); ++i)
    sum += b.labels[i] < 0 ? 0 : values[i] - 0.5;
  const double mean = sum / static_cast<double>(values.size() - 1);
  CHECK(std::abs(perdita::feasible(plain, {.level = 0.5})(b.view(), b.labels, ones) - mean) <
        1e-14);
}

TEMPLATE_TEST_CASE("feasible: multipliers eliminated, half the squared excess is left",
                   "[feasible]", float, double) {
  using T = TestType;
  const batch<T> b;
  constexpr std::size_t rows = batch<T>::rows, cols = batch<T>::cols;
  const double epsilon = std::numeric_limits<T>::epsilon();
  const auto check = [&](const auto& plain) {
    const double cost = 1.75;
    std::vector<T> values(rows), slopes(rows * cols), g(rows * cols);
    plain(b.view(), b.labels, b.writable(slopes), {.values = values});
    auto sorted = values;
    std::sort(sorted.begin(), sorted.end());
    const double level = (static_cast<double>(sorted[4]) + static_cast<double>(sorted[5])) / 2;
    double expected = 0;
    int violated = 0;
    std::vector<double> excess(rows);
    for (std::size_t i = 0; i < rows; ++i) {
      excess[i] = b.labels[i] < 0 ? 0 : std::max(0.0, static_cast<double>(values[i]) - level);
      expected += cost / 2 * excess[i] * excess[i];
      violated += excess[i] > 0;
    }
    REQUIRE(violated > 1);
    // A step of η = α arrives at once; smaller ones in the end.
    for (const double rate : {cost, 0.5 * cost}) {
      auto multipliers = b.multipliers;
      const perdita::feasible loss(plain, {.level = level, .dual_rate = rate, .slack_cost = cost});
      T value = 0;
      for (int step = 0; step < (rate == cost ? 1 : 60); ++step)
        value = loss(b.view(), b.labels, multipliers, b.writable(g));
      CHECK(std::abs(static_cast<double>(value) - expected) <= 8 * epsilon * expected);
      for (std::size_t k = 0; k < g.size(); ++k)
        CHECK(std::abs(static_cast<double>(g[k]) -
                       cost * excess[k / cols] * static_cast<double>(slopes[k])) <= 8 * epsilon);
    }
  };
  const auto sum = perdita::reduction::sum;
  check(perdita::cross_entropy<T>({.reduction = sum}));
  check(perdita::ldr_kl<T>({.reduction = sum}));
  check(perdita::comp_sum<T>({.tau = 2, .reduction = sum}));
  check(perdita::sparsemax_loss<T>({.reduction = sum}));
}

TEST_CASE("feasible: the gradient is that of L at the new multipliers", "[feasible]") {
  const batch<double> b;
  constexpr std::size_t rows = batch<double>::rows, cols = batch<double>::cols;
  const auto check = [&](const auto& plain) {
    const perdita::feasible loss(plain, {.level = 0.4, .dual_rate = 0.5, .slack_cost = 3});
    auto multipliers = b.multipliers;
    std::vector<double> g(rows * cols);
    loss(b.view(), b.labels, multipliers, b.writable(g), {.row_weights = b.row_weights});
    auto x = b.scores;
    const auto report = perdita::testing::check_gradient(
        [&] {
          return loss(perdita::matrix_view<const double>(x.data(), rows, cols), b.labels,
                      multipliers, {.row_weights = b.row_weights});
        },
        x, g);
    INFO(report.message());
    CHECK(report.ok);
  };
  check(perdita::cross_entropy<double>());
  check(perdita::brier<double>());
}

TEST_CASE("feasible: multipliers of losses that are no rows", "[feasible]") {
  const std::vector<double> losses{1, 0.25, 0.5, 3};
  std::vector<double> lambda{0.5, 0.25, 0, 1};
  perdita::update_multipliers(losses, lambda, {.level = 0.5, .dual_rate = 0.5, .slack_cost = 2});
  CHECK(lambda == std::vector<double>{0.625, 0.0625, 0, 2});
  std::vector<float> narrow(4, 1);
  perdita::update_multipliers(losses, narrow, {.level = 9, .dual_rate = 1});
  CHECK(narrow == std::vector<float>(4));
  using Catch::Matchers::ContainsSubstring;
  CHECK_THROWS_WITH(perdita::update_multipliers(losses, narrow, {.dual_rate = -1}),
                    ContainsSubstring("dual_rate is -1"));
  narrow.resize(3);
  CHECK_THROWS_WITH(perdita::update_multipliers(losses, narrow, {}),
                    ContainsSubstring("size of multipliers is 3, expected"));
  CHECK_THROWS_WITH(
      perdita::update_multipliers(losses, perdita::vector_view<float>(nullptr, 4), {}),
      ContainsSubstring("multipliers is null"));
}

TEST_CASE("feasible: infinite values, NaN, and rows that do not count", "[feasible]") {
  const std::vector<double> x{0, -inf, 1, 2, std::nan(""), 0, 3, 1};
  const perdita::matrix_view<const double> scores(x.data(), 4, 2);
  const std::vector<int> labels{1, 0, 0, -100};
  std::vector<double> g(8), multipliers{1, 1, 1, 1};
  const perdita::feasible loss(perdita::cross_entropy<double>{}, {.level = 1, .dual_rate = 0.5});
  loss(scores, labels, multipliers, perdita::matrix_view<double>(g.data(), 4, 2));
  CHECK(multipliers[0] == inf);
  CHECK(std::abs(multipliers[1] - 1.1566308444) < 1e-9); // 1 + (log(1 + e) − 1)/2
  CHECK(std::isnan(multipliers[2]));
  CHECK(multipliers[3] == 1);
  CHECK((std::isfinite(g[2]) && g[2] < 0 && g[3] > 0));
  CHECK((g[6] == 0 && g[7] == 0));
  // And the next step leaves it so; what it adds to L is infinite, not NaN.
  std::vector<double> parts(4);
  loss(scores, labels, multipliers, perdita::matrix_view<double>(g.data(), 4, 2),
       {.values = parts});
  CHECK(multipliers[0] == inf);
  CHECK(parts[0] == inf);
  std::vector<double> of_losses{inf}, one{inf};
  perdita::update_multipliers(of_losses, one, {.dual_rate = 0.5});
  CHECK(one[0] == inf);

  const std::vector<int> none(4, -100);
  CHECK(loss(scores, none, multipliers, perdita::matrix_view<double>(g.data(), 4, 2)) == 0);
  CHECK(g == std::vector<double>(8, 0));
  std::vector<float> empty;
  CHECK(loss(perdita::matrix_view<const double>(nullptr, 0, 2), std::vector<int>(), empty) == 0);
}

TEST_CASE("feasible: float multipliers, in place, on any threads", "[feasible][threads]") {
  constexpr std::size_t rows = 3000, cols = 5;
  random_numbers random(11);
  std::vector<float> x(rows * cols), g(rows * cols), start(rows);
  std::vector<int> labels(rows);
  for (float& v : x)
    v = static_cast<float>(random.normal());
  for (float& v : start)
    v = static_cast<float>(random.uniform(0, 1));
  for (int& y : labels)
    y = static_cast<int>(random.below(cols));
  const auto at = [&](std::vector<float>& v) {
    return perdita::matrix_view<float>(v.data(), rows, cols);
  };
  const perdita::feasible loss(perdita::cross_entropy<float>{}, {.level = 1, .dual_rate = 0.1});
  auto lambda = start;
  const float value = loss(at(x), labels, lambda, at(g), {.run_on = perdita::serial});
  for (const std::size_t n : {2U, 7U}) {
    const threads_executor pool(n, task_order::shuffled);
    auto others = start;
    std::vector<float> many(rows * cols);
    CHECK(loss(at(x), labels, others, at(many), {.run_on = pool}) == value);
    CHECK(many == g);
    CHECK(others == lambda);
  }
  auto again = start;
  loss(at(x), labels, again, at(x));
  CHECK(x == g);
}

TEST_CASE("feasible: bad input is refused, and nothing written", "[feasible]") {
  using Catch::Matchers::ContainsSubstring;
  const perdita::cross_entropy<double> plain;
  using wrapped = perdita::feasible<perdita::cross_entropy<double>>;
  CHECK_THROWS_WITH(wrapped(plain, {.level = inf}), ContainsSubstring("level is inf"));
  CHECK_THROWS_WITH(wrapped(plain, {.dual_rate = -1}), ContainsSubstring("dual_rate is -1"));
  CHECK_THROWS_WITH(wrapped(plain, {.slack_cost = 0}), ContainsSubstring("slack_cost is 0"));
  const wrapped loss(plain);
  const std::vector<double> x(6, 1);
  const perdita::matrix_view<const double> scores(x.data(), 3, 2);
  std::vector<double> g(6, 5), lambda(3, 5), weights{1, 1, -1};
  const perdita::matrix_view<double> good(g.data(), 3, 2);
  const std::vector<int> labels{0, 1, 0};
  CHECK_THROWS_WITH(loss(scores, std::vector<int>{0, 1, 2}, lambda, good),
                    ContainsSubstring("labels[2] is 2"));
  CHECK_THROWS_WITH(loss(scores, labels, perdita::vector_view<double>(lambda.data(), 2), good),
                    ContainsSubstring("multipliers is 2, expected 3"));
  CHECK_THROWS_WITH(loss(scores, labels, perdita::vector_view<double>(nullptr, 3)),
                    ContainsSubstring("multipliers is null"));
  CHECK_THROWS_WITH(loss(scores, labels, lambda, perdita::matrix_view<double>(g.data(), 3, 1)),
                    ContainsSubstring("gradient columns is 1"));
  CHECK_THROWS_WITH(loss(scores, labels, lambda, good, {.row_weights = weights}),
                    ContainsSubstring("row_weights[2] is -1"));
  CHECK_THROWS_WITH(loss(scores, labels, lambda, good, {.normaliser = -1}),
                    ContainsSubstring("normaliser is -1"));
  CHECK(g == std::vector<double>(6, 5));
  CHECK(lambda == std::vector<double>(3, 5));
}

TEST_CASE("feasible: slopes upstream, and added", "[feasible]") {
  const batch<double> b;
  constexpr std::size_t rows = batch<double>::rows, cols = batch<double>::cols;
  const perdita::feasible loss(perdita::cross_entropy<double>{}, {.level = 0.4, .dual_rate = 0.5});
  std::vector<double> g(rows * cols), h(rows * cols, 1), upstream;
  for (std::size_t i = 0; i < rows; ++i)
    upstream.push_back(0.5 * static_cast<double>(i) - 1);
  auto multipliers = b.multipliers, others = b.multipliers;
  loss(b.view(), b.labels, multipliers, b.writable(g));
  loss(b.view(), b.labels, others, b.writable(h), {.upstream = upstream, .accumulate = true});
  for (std::size_t k = 0; k < g.size(); ++k)
    CHECK(std::abs(h[k] - 1 - upstream[k / cols] * g[k]) < 1e-15);
}

} // namespace perdita_tests
