// SPDX-License-Identifier: MIT

// Dynamic reweighting by the losses: formula sheet 14.1.

#include <perdita/reweighting.hpp>

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

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/numbers.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

using strategy = perdita::reweighting_strategy;
constexpr strategy strategies[] = {strategy::lin_upper, strategy::quadratic, strategy::extremes,
                                   strategy::upper};
constexpr double inf = std::numeric_limits<double>::infinity();

/// The formula as it is printed; multiplicities of 0 do not count.
std::vector<wide> reference_weights(const std::vector<wide>& losses,
                                    const std::vector<wide>& multiplicity,
                                    const perdita::reweighting_options& o) {
  wide low = infinity(), high = -infinity();
  for (std::size_t i = 0; i < losses.size(); ++i)
    if (multiplicity[i] > 0) {
      low = smaller(low, losses[i]);
      high = larger(high, losses[i]);
    }
  const wide d = o.delta;
  std::vector<wide> w;
  wide sum = 0;
  for (std::size_t i = 0; i < losses.size(); ++i) {
    const wide h = (2 * losses[i] - low - high) / larger(high - low, 1e-6L) * d;
    const wide f = o.strategy == strategy::lin_upper   ? smaller(h + d, d)
                   : o.strategy == strategy::quadratic ? wide(1 - h * h / (d * d))
                   : o.strategy == strategy::extremes  ? size_of(h)
                                                       : wide((h + d) / 2);
    w.push_back(multiplicity[i] > 0 ? wide(multiplicity[i] * exp(wide(f / o.temperature)))
                                    : wide(0));
    sum += w.back();
  }
  for (wide& x : w)
    x /= sum;
  return w;
}

template <class T> struct batch {
  static constexpr std::size_t rows = 11, cols = 4;
  std::vector<T> scores, row_weights;
  std::vector<std::int64_t> labels;
  batch() {
    random_numbers random(7);
    for (std::size_t i = 0; i < rows * cols; ++i)
      scores.push_back(static_cast<T>(2 * random.normal()));
    for (std::size_t i = 0; i < rows; ++i) {
      labels.push_back(static_cast<std::int64_t>(random.below(cols)));
      row_weights.push_back(static_cast<T>(i % 3 == 0 ? 1 : 0.5 * static_cast<double>(i)));
    }
    labels[2] = -100;
    row_weights[4] = 0;
    // The rows that do not count have the most extreme losses.
    for (const std::size_t i : {2U, 4U})
      scores[i * cols] += T(20);
    labels[4] = 1;
  }
  auto view() const { return perdita::matrix_view<const T>(scores.data(), rows, cols); }
  auto writable(std::vector<T>& g) const { return perdita::matrix_view<T>(g.data(), rows, cols); }
};

/// Cross-entropy's value and gradient of a row.
template <class T> wide cross_entropy_row(const T* x, std::size_t n, std::size_t y, wide* g) {
  std::vector<wide> z(x, x + n);
  const wide lse = log_sum_exp(z, [](std::size_t) { return true; });
  for (std::size_t j = 0; j < n; ++j)
    g[j] = exp(wide(z[j] - lse)) - (j == y);
  return lse - z[y];
}

} // namespace

TEMPLATE_TEST_CASE("loss_based_weights: the formula", "[reweighting]", float, double) {
  using T = TestType;
  error_judge errors;
  random_numbers random(3);
  for (const std::size_t n : {1U, 2U, 5U, 300U})
    for (const strategy s : strategies)
      for (const double r : {0.1, 0.4, 3.0})
        for (const double delta : {1.0, 0.25}) {
          const perdita::reweighting_options o{.strategy = s, .temperature = r, .delta = delta};
          std::vector<T> losses(n), weights(n);
          std::vector<wide> exact;
          for (T& x : losses) {
            x = static_cast<T>(random.uniform(0, 9));
            exact.push_back(x);
          }
          const auto expected = reference_weights(exact, std::vector<wide>(n, 1), o);
          perdita::loss_based_weights(losses, weights, o);
          wide worst = 0, sum = 0;
          for (std::size_t i = 0; i < n; ++i) {
            worst = worse(worst, size_of(wide(weights[i] / expected[i] - 1)));
            sum += weights[i];
          }
          // Of h, a few epsilons of double, and 1/r of them in the exponent.
          const double epsilon = std::numeric_limits<T>::epsilon();
          const double noise = std::numeric_limits<double>::epsilon();
          CHECK(errors.within(worst, 0.51 + (4 + 4 * (1 + delta) / r) * noise / epsilon, epsilon));
          CHECK(size_of(wide(sum - 1)) <= epsilon * (1 + 4 / r));
        }
  report_accuracy<T>("loss_based_weights", "", in_epsilons, {errors.worst(), -1, errors.share()});
}

TEST_CASE("loss_based_weights: equal, infinite, huge losses and NaN", "[reweighting]") {
  const auto weigh = [](std::vector<double> losses, strategy s) {
    perdita::loss_based_weights(losses, losses, {.strategy = s, .temperature = 1});
    return losses;
  };
  const double e = std::exp(1.0);
  for (const strategy s : strategies)
    CHECK(weigh({3, 3, 3, 3}, s) == std::vector<double>{0.25, 0.25, 0.25, 0.25});
  CHECK(weigh({inf, inf}, strategy::upper) == std::vector<double>{0.5, 0.5});
  CHECK(weigh({}, strategy::upper).empty());
  const auto near = [](const std::vector<double>& got, const std::vector<double>& expected) {
    REQUIRE(got.size() == expected.size());
    for (std::size_t i = 0; i < got.size(); ++i)
      CHECK(std::abs(got[i] - expected[i]) <= 1e-15);
  };
  near(weigh({1, inf, 2}, strategy::upper), {1 / (2 + e), e / (2 + e), 1 / (2 + e)});
  near(weigh({-inf, 7}, strategy::upper), {1 / (1 + e), e / (1 + e)});
  near(weigh({-inf, 7, inf}, strategy::quadratic), {1 / (2 + e), e / (2 + e), 1 / (2 + e)});
  near(weigh({-1.7e308, 0, 1.7e308}, strategy::quadratic), {1 / (2 + e), e / (2 + e), 1 / (2 + e)});
  // The floor of the range: h = ±0.1 for losses 1e-7 apart.
  const double up = std::exp(0.05), down = std::exp(-0.05);
  near(weigh({0, 1e-7}, strategy::upper), {down / (up + down), up / (up + down)});
  const auto lost = weigh({1, std::nan(""), 2}, strategy::upper);
  CHECK(std::isnan(lost[1]));
  near({lost[0], lost[2]}, {1 / (1 + e), e / (1 + e)});
}

TEMPLATE_TEST_CASE("reweighted: value, gradient and by-products against the formula",
                   "[reweighting]", float, double) {
  using T = TestType;
  const batch<T> b;
  constexpr std::size_t rows = batch<T>::rows, cols = batch<T>::cols;
  const double epsilon = std::numeric_limits<T>::epsilon();
  error_judge of_values, of_slopes;
  std::vector<wide> losses(rows), slopes(rows * cols), counts(rows);
  wide number = 0;
  for (std::size_t i = 0; i < rows; ++i) {
    counts[i] = b.labels[i] < 0 ? wide(0) : wide(b.row_weights[i]);
    number += counts[i];
    if (b.labels[i] >= 0)
      losses[i] = cross_entropy_row(&b.scores[i * cols], cols,
                                    static_cast<std::size_t>(b.labels[i]), &slopes[i * cols]);
  }
  for (const strategy s : strategies)
    for (const auto how :
         {perdita::reduction::mean, perdita::reduction::sum, perdita::reduction::none}) {
      const perdita::reweighting_options o{.strategy = s, .temperature = 0.5, .delta = 1};
      const auto w = reference_weights(losses, counts, o);
      const wide size = how == perdita::reduction::mean ? wide(1) : number;
      wide expected = 0;
      for (std::size_t i = 0; i < rows; ++i)
        expected += size * w[i] * losses[i];

      const perdita::reweighted loss(perdita::cross_entropy<T>({.reduction = how}), o);
      std::vector<T> g(rows * cols), values(rows), lse(rows);
      const perdita::call_options<T> call{
          .row_weights = b.row_weights, .values = values, .log_sum_exp = lse};
      const T value = loss(b.view(), b.labels, b.writable(g), call);
      CHECK(of_values.within(size_of(wide(value / expected - 1)), 8, epsilon));
      CHECK(loss(b.view(), b.labels, {.row_weights = b.row_weights}) == value);
      wide worst = 0;
      for (std::size_t i = 0; i < rows; ++i) {
        CHECK(of_values.within(size_of(wide(values[i] - number * w[i] * losses[i])), 16,
                               epsilon * (values[i] + number * w[i])));
        CHECK((lse[i] != 0) == (counts[i] != 0));
        for (std::size_t j = 0; j < cols; ++j) {
          const wide exact = size * w[i] * slopes[i * cols + j];
          worst = worse(worst,
                        size_of(wide(g[i * cols + j] - exact)) / larger(size * w[i], wide(1e-30L)));
        }
      }
      CHECK(of_slopes.within(worst, 16, epsilon));
    }
  report_accuracy<T>(
      "reweighted", "cross_entropy", in_epsilons_of_terms,
      {of_values.worst(), of_slopes.worst(), std::max(of_values.share(), of_slopes.share())});
}

TEMPLATE_TEST_CASE("reweighted: any loss, with its weights held fixed", "[reweighting]", float,
                   double) {
  using T = TestType;
  const batch<T> b;
  constexpr std::size_t rows = batch<T>::rows, cols = batch<T>::cols;
  const auto check = [&](const auto& plain) {
    std::vector<T> values(rows), w(rows), g(rows * cols), expected(rows * cols);
    plain(b.view(), b.labels, {.values = values});
    std::vector<T> counted, of_counted;
    for (std::size_t i = 0; i < rows; ++i)
      if (b.labels[i] >= 0)
        counted.push_back(values[i]);
    of_counted.resize(counted.size());
    perdita::loss_based_weights(counted, of_counted);
    for (std::size_t i = 0, k = 0; i < rows; ++i)
      w[i] = b.labels[i] >= 0 ? of_counted[k++] : T(0);
    const perdita::reweighted loss(plain);
    const T value = loss(b.view(), b.labels, b.writable(g), {.scale = 3});
    const T other = plain(b.view(), b.labels, b.writable(expected), {.row_weights = w, .scale = 3});
    const double epsilon = std::numeric_limits<T>::epsilon();
    CHECK(std::abs(value - other) <= 8 * epsilon * std::abs(other));
    for (std::size_t k = 0; k < g.size(); ++k)
      CHECK(std::abs(g[k] - expected[k]) <= 8 * epsilon * std::abs(expected[k]));
  };
  check(perdita::cross_entropy<T>());
  check(perdita::ldr_kl<T>());
  check(perdita::comp_sum<T>({.tau = 2}));
  check(perdita::sparsemax_loss<T>());
}

TEST_CASE("reweighted: soft targets", "[reweighting]") {
  const std::vector<double> x{1, 2, 0, -1, 0.5, 0.5}, q{0.5, 0.5, 1, 0, 0.25, 0.75};
  const perdita::matrix_view<const double> scores(x.data(), 3, 2), target(q.data(), 3, 2);
  std::vector<double> values(3), w(3), g(6), expected(6);
  const perdita::cross_entropy<double> plain;
  plain(scores, target, {.values = values});
  perdita::loss_based_weights(values, w);
  const double value =
      perdita::reweighted(plain)(scores, target, perdita::matrix_view<double>(g.data(), 3, 2));
  CHECK(std::abs(value - plain(scores, target, perdita::matrix_view<double>(expected.data(), 3, 2),
                               {.row_weights = w})) < 1e-15);
  for (std::size_t k = 0; k < 6; ++k)
    CHECK(std::abs(g[k] - expected[k]) < 1e-15);
}

TEMPLATE_TEST_CASE("reweighted: limits", "[reweighting]", float, double) {
  using T = TestType;
  const batch<T> b;
  constexpr std::size_t rows = batch<T>::rows, cols = batch<T>::cols;
  SECTION("an infinite temperature is the plain loss, bit for bit") {
    const perdita::cross_entropy<T> plain({.class_weights = std::vector<T>{1, 2, 3, 4}});
    std::vector<T> g(rows * cols), expected(rows * cols);
    CHECK(perdita::reweighted(plain, {.temperature = inf})(b.view(), b.labels, b.writable(g)) ==
          plain(b.view(), b.labels, b.writable(expected)));
    CHECK(g == expected);
  }
  SECTION("a weight of 2 is the row twice") {
    auto twice = b.scores;
    auto labels = b.labels;
    twice.insert(twice.end(), b.scores.begin(), b.scores.begin() + cols);
    labels.push_back(labels[0]);
    std::vector<T> weights(rows, T(1));
    weights[0] = 2;
    const perdita::reweighted loss(perdita::cross_entropy<T>{});
    const T value = loss(b.view(), b.labels, {.row_weights = weights});
    const T other = loss(perdita::matrix_view<const T>(twice.data(), rows + 1, cols), labels);
    CHECK(std::abs(value - other) <= 4 * std::numeric_limits<T>::epsilon() * value);
  }
  SECTION("weights that underflow remove rows, but not their by-products") {
    std::vector<unsigned char> hits(rows), expected(rows);
    std::vector<T> g(rows * cols);
    const perdita::cross_entropy<T> plain;
    plain(b.view(), b.labels, {.hits = expected});
    perdita::reweighted(plain, {.strategy = strategy::upper, .temperature = 1e-320})(
        b.view(), b.labels, b.writable(g), {.hits = hits});
    CHECK(hits == expected);
    std::size_t rows_with_gradient = 0;
    for (std::size_t i = 0; i < rows; ++i)
      rows_with_gradient += g[i * cols] != 0;
    CHECK(rows_with_gradient == 1);
  }
  SECTION("a row that is not a number leaves the others alone") {
    auto x = b.scores;
    x[3 * cols] = std::numeric_limits<T>::quiet_NaN();
    std::vector<T> g(rows * cols);
    CHECK(std::isnan(perdita::reweighted(perdita::cross_entropy<T>())(
        perdita::matrix_view<const T>(x.data(), rows, cols), b.labels, b.writable(g))));
    for (std::size_t k = 0; k < g.size(); ++k)
      CHECK(std::isnan(g[k]) == (k / cols == 3));
  }
  SECTION("nothing counts, nothing there") {
    const perdita::reweighted loss(perdita::cross_entropy<T>{});
    const std::vector<int> ignored(rows, -100);
    std::vector<T> g(rows * cols, 1), zero(rows * cols, 0);
    CHECK(loss(b.view(), ignored, b.writable(g)) == 0);
    CHECK(g == zero);
    CHECK(loss(perdita::matrix_view<const T>(nullptr, 0, cols), std::vector<int>()) == 0);
  }
}

TEST_CASE("reweighted: in place, added, on any threads", "[reweighting][threads]") {
  constexpr std::size_t rows = 3000, cols = 5;
  random_numbers random(11);
  std::vector<float> x(rows * cols), g(rows * cols);
  std::vector<int> labels(rows);
  for (float& v : x)
    v = static_cast<float>(random.normal());
  for (int& y : labels)
    y = static_cast<int>(random.below(cols));
  const auto at = [&](std::vector<float>& v) {
    return perdita::matrix_view<float>(v.data(), rows, cols);
  };
  const perdita::reweighted loss(perdita::cross_entropy<float>{});
  const float value = loss(at(x), labels, at(g), {.run_on = perdita::serial});
  for (const std::size_t n : {2U, 7U}) {
    const threads_executor pool(n, task_order::shuffled);
    std::vector<float> many(rows * cols);
    CHECK(loss(at(x), labels, at(many), {.run_on = pool}) == value);
    CHECK(many == g);
  }
  std::vector<float> added(rows * cols, 1);
  perdita::workspace memory;
  loss(at(x), labels, at(added), {.accumulate = true, .memory = &memory});
  for (std::size_t k = 0; k < added.size(); ++k)
    REQUIRE(std::abs(added[k] - 1 - g[k]) <= 1.2e-7f);
  loss(at(x), labels, at(x));
  CHECK(x == g);
}

TEST_CASE("reweighted: bad input is refused, and nothing written", "[reweighting]") {
  using Catch::Matchers::ContainsSubstring;
  const perdita::cross_entropy<double> plain;
  using weighed = perdita::reweighted<perdita::cross_entropy<double>>;
  CHECK_THROWS_WITH(weighed(plain, {.temperature = 0}), ContainsSubstring("temperature is 0"));
  CHECK_THROWS_WITH(weighed(plain, {.delta = inf}), ContainsSubstring("delta is inf"));
  CHECK_THROWS_WITH(weighed(plain, {.strategy = static_cast<strategy>(9)}),
                    ContainsSubstring("strategy is 9"));
  const weighed loss(plain);
  const std::vector<double> x(6, 1);
  const perdita::matrix_view<const double> scores(x.data(), 3, 2);
  const std::vector<int> labels{0, 1, 0};
  std::vector<double> lse(3, 5), g(6, 5), weights{1, -1, 1};
  const auto refused = [&](perdita::matrix_view<double> gradient,
                           perdita::call_options<double> call, const char* why) {
    call.log_sum_exp = lse;
    CHECK_THROWS_WITH(loss(scores, labels, gradient, call), ContainsSubstring(why));
    CHECK(lse == std::vector<double>(3, 5));
    CHECK(g == std::vector<double>(6, 5));
  };
  const perdita::matrix_view<double> good(g.data(), 3, 2);
  refused({g.data(), 2, 2}, {}, "gradient rows is 2, expected 3");
  refused({g.data(), 3, 1}, {}, "gradient columns is 1, expected 2");
  refused({nullptr, 3, 2}, {}, "gradient is null");
  refused({const_cast<double*>(x.data()) + 1, 3, 2}, {}, "gradient overlaps the scores");
  refused({const_cast<double*>(x.data()), 3, 2}, {.accumulate = true}, "accumulate is true");
  refused(good, {.row_weights = weights}, "row_weights[1] is -1");
  weights.resize(2);
  refused(good, {.row_weights = weights}, "row_weights is 2, expected 3");
  refused(good, {.values = weights}, "values is 2, expected 3");
  refused(good, {.upstream = weights}, "upstream is 2, expected 3");
  CHECK_THROWS_WITH(loss(scores, std::vector<int>{0, 2, 0}, good),
                    ContainsSubstring("labels[1] is 2"));
  CHECK_THROWS_WITH(perdita::loss_based_weights(x, lse), ContainsSubstring("size of weights is 3"));
  std::vector<double> losses{1, 2, 3, 4, 5, 6};
  const auto before = losses;
  using view = perdita::vector_view<double>;
  const auto overlap_refused = [&](view from, view to) {
    CHECK_THROWS_WITH(perdita::loss_based_weights(from, to),
                      ContainsSubstring("weights is memory of the losses"));
    CHECK(losses == before);
  };
  overlap_refused({losses.data(), 3}, {losses.data() + 1, 3});
  overlap_refused({losses.data(), 3, 2}, {losses.data(), 3});
  overlap_refused({losses.data(), 3}, {losses.data() + 2, 3, -1});
  CHECK_NOTHROW(perdita::loss_based_weights(view(losses.data(), 3), view(losses.data() + 3, 3)));
}

TEST_CASE("reweighted: slopes upstream", "[reweighting]") {
  const batch<double> b;
  constexpr std::size_t rows = batch<double>::rows, cols = batch<double>::cols;
  const perdita::reweighted loss(perdita::cross_entropy<double>{});
  std::vector<double> g(rows * cols), h(rows * cols), upstream;
  for (std::size_t i = 0; i < rows; ++i)
    upstream.push_back(0.5 * static_cast<double>(i) - 1);
  loss(b.view(), b.labels, b.writable(g));
  loss(b.view(), b.labels, b.writable(h), {.upstream = upstream});
  for (std::size_t k = 0; k < g.size(); ++k)
    CHECK(std::abs(h[k] - upstream[k / cols] * g[k]) < 1e-15);
}

} // namespace perdita_tests
