// SPDX-License-Identifier: MIT

// Entropy of predictions, of rows and of their mean: formula sheet 14.10. Functional entropy:
// formula sheet "contrastive", 7.15.

#include <perdita/functional_entropy.hpp>
#include <perdita/prediction_entropy.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include <perdita/testing/gradient_check.hpp>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/numbers.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

constexpr double inf = std::numeric_limits<double>::infinity();

template <class T> perdita::matrix_view<T> matrix(std::vector<T>& v, std::size_t cols) {
  return {v.data(), static_cast<std::ptrdiff_t>(v.size() / cols),
          static_cast<std::ptrdiff_t>(cols)};
}
template <class T> perdita::matrix_view<const T> matrix(const std::vector<T>& v, std::size_t cols) {
  return {v.data(), static_cast<std::ptrdiff_t>(v.size() / cols),
          static_cast<std::ptrdiff_t>(cols)};
}
template <class T> std::vector<T> scores(std::size_t n, double width) {
  random_numbers random(n);
  std::vector<T> x(n);
  for (T& v : x)
    v = static_cast<T>(width * random.normal());
  return x;
}

struct expectation {
  wide value = 0;
  std::vector<wide> entropy, gradient, sizes; // sizes: of the terms of the gradient
};
/// The formula as it is printed.
template <class T>
expectation expect(const std::vector<T>& x, std::size_t cols, const std::vector<T>& weights,
                   const typename perdita::prediction_entropy<T>::options& o) {
  const std::size_t rows = weights.size();
  expectation e;
  std::vector<wide> p(x.size()), log_p(x.size()), mean(cols);
  wide n = 0, rows_part = 0, of_mean = 0;
  for (std::size_t i = 0; i < rows; ++i)
    n += weights[i];
  for (std::size_t i = 0; i < rows; ++i) {
    std::vector<wide> z;
    for (std::size_t j = 0; j < cols; ++j)
      z.push_back(wide(x[i * cols + j]) / o.temperature);
    const wide lse = log_sum_exp(z, [](std::size_t) { return true; });
    wide h = 0;
    for (std::size_t j = 0; j < cols; ++j) {
      log_p[i * cols + j] = z[j] - lse;
      p[i * cols + j] = exp(wide(z[j] - lse));
      h -= weighted(p[i * cols + j], log_p[i * cols + j]);
      mean[j] += weights[i] * p[i * cols + j] / n;
    }
    e.entropy.push_back(h);
    rows_part += weights[i] * h / n;
  }
  for (const wide& q : mean)
    of_mean -= weighted(q, log(q));
  const wide classes = static_cast<double>(cols);
  e.value = o.row * rows_part + o.batch * (log(classes) - of_mean);
  for (std::size_t i = 0; i < rows; ++i) {
    wide cross = 0;
    for (std::size_t j = 0; j < cols; ++j)
      cross += weighted(p[i * cols + j], log(mean[j]));
    for (std::size_t j = 0; j < cols; ++j) {
      const wide q = p[i * cols + j], factor = weights[i] * q / (n * o.temperature);
      const wide of_row = q == 0 ? wide(0) : wide(log_p[i * cols + j] + e.entropy[i]);
      const wide of_batch = q == 0 ? wide(0) : wide(log(mean[j]) - cross);
      e.gradient.push_back(factor * (o.batch * of_batch - o.row * of_row));
      e.sizes.push_back(factor * (size_of(wide(o.row)) * (1 + size_of(of_row) + e.entropy[i]) +
                                  size_of(wide(o.batch)) * (size_of(cross) + size_of(of_batch))));
    }
  }
  return e;
}

} // namespace

TEMPLATE_TEST_CASE("prediction_entropy: value and gradient against the formula", "[entropy]", float,
                   double) {
  using T = TestType;
  using loss_type = perdita::prediction_entropy<T>;
  const double epsilon = std::numeric_limits<T>::epsilon();
  error_judge of_values, of_slopes;
  for (const std::size_t cols : {1U, 3U, 8U, 21U})
    for (const double width : {0.1, 2.0, 12.0})
      for (const typename loss_type::options o :
           {typename loss_type::options{}, typename loss_type::options{.row = 0, .batch = 2},
            typename loss_type::options{.row = T(-0.5), .batch = 1, .temperature = T(0.5)}}) {
        constexpr std::size_t rows = 9;
        const auto x = scores<T>(rows * cols, width);
        std::vector<T> weights(rows), values(rows), g(x.size(), 9);
        for (std::size_t i = 0; i < rows; ++i)
          weights[i] = static_cast<T>(static_cast<double>(i % 3) / 2);
        const auto e = expect(x, cols, weights, o);
        const loss_type loss(o);
        const T value = loss(matrix(x, cols), matrix(g, cols),
                             {.row_weights = weights, .scale = 3, .values = values});
        CHECK(loss(matrix(x, cols), {.row_weights = weights}) == value);
        INFO(cols << " classes, width " << width << ", a " << o.row << ": " << text(value)
                  << " for " << text(e.value));
        CHECK(of_values.within(size_of(wide(value - e.value)), 1,
                               epsilon * size_of(e.value) +
                                   16 * std::numeric_limits<double>::epsilon() *
                                       (log(wide(static_cast<double>(cols))) + size_of(e.value)) +
                                   wide(1e-30L)));
        for (std::size_t i = 0; i < rows; ++i)
          CHECK(of_values.within(size_of(wide(values[i] - weights[i] * e.entropy[i])),
                                 4 + 40 * width * (epsilon < 1e-10),
                                 epsilon * weights[i] * e.entropy[i]));
        wide worst = 0;
        for (std::size_t k = 0; k < g.size(); ++k)
          worst = worse(worst,
                        size_of(wide(g[k] - 3 * e.gradient[k])) / (3 * e.sizes[k] + wide(1e-40L)));
        CHECK(of_slopes.within(worst, 2 + 8 * (1 + 4 * width) * (epsilon < 1e-10), epsilon));
      }
  report_accuracy<T>(
      "prediction_entropy", "", in_allowances,
      {of_values.share(), of_slopes.share(), std::max(of_values.share(), of_slopes.share())});
}

TEST_CASE("prediction_entropy: the gradient is the derivative", "[entropy]") {
  auto x = scores<double>(28, 1.5);
  for (const perdita::prediction_entropy<double>::options o :
       {perdita::prediction_entropy<double>::options{.temperature = 0.7},
        perdita::prediction_entropy<double>::options{.row = 0, .batch = 1},
        perdita::prediction_entropy<double>::options{.row = 1, .batch = 1}}) {
    const perdita::prediction_entropy<double> loss(o);
    std::vector<double> g(x.size());
    loss(matrix(x, 4), matrix(g, 4));
    const auto report = perdita::testing::check_gradient([&] { return loss(matrix(x, 4)); }, x, g);
    INFO(report.message());
    CHECK(report.ok);
  }
}

TEST_CASE("prediction_entropy: known values", "[entropy]") {
  const std::vector<double> equal(8, 3), sure{50, 0, 0, 50}, one_class{50, 0, 50, 0};
  const double log2 = std::log(2.0);
  const perdita::prediction_entropy<double> rows, batch({.row = 0, .batch = 1}),
      both({.row = 1, .batch = 1});
  CHECK(std::abs(rows(matrix(equal, 4)) - 2 * log2) < 1e-15);
  CHECK(std::abs(batch(matrix(equal, 4))) < 1e-15);
  CHECK(std::abs(both(matrix(equal, 4)) - 2 * log2) < 1e-15);
  CHECK(std::abs(batch(matrix(sure, 2))) < 1e-15);
  CHECK(std::abs(batch(matrix(one_class, 2)) - log2) < 1e-15);
  // H of a sure row: (1 + 50) e^-50, to its last digits.
  CHECK(std::abs(rows(matrix(sure, 2)) / (51 * std::exp(-50.0)) - 1) < 1e-14);
}

TEST_CASE("prediction_entropy: masked classes, lost rows, nothing", "[entropy]") {
  const double log2 = std::log(2.0);
  const std::vector<double> x{0, 0, -inf, 1, std::nan(""), 1, -inf, -inf, -inf, 0, inf, 0};
  std::vector<double> g(12), values(4);
  const perdita::prediction_entropy<double> loss({.row = 0, .batch = 1});
  CHECK(std::isnan(loss(matrix(x, 3), matrix(g, 3), {.values = values})));
  CHECK(std::abs(values[0] - log2) < 1e-15);
  for (std::size_t k = 0; k < 12; ++k)
    CHECK(std::isnan(g[k]) == (k >= 3));
  const std::vector<double> masked{0, 1, -inf, 2, 1, -inf};
  std::vector<double> of_masked(6);
  const perdita::prediction_entropy<double> both({.row = 1, .batch = 1});
  CHECK(std::isfinite(both(matrix(masked, 3), matrix(of_masked, 3))));
  CHECK((of_masked[2] == 0 && of_masked[5] == 0));
  CHECK(std::abs(of_masked[0] + of_masked[1]) < 1e-16);
  CHECK(of_masked[0] != 0);
  // Weight 0: the lost rows are gone.
  const std::vector<double> first{1, 0, 0, 0};
  CHECK(std::abs(loss(matrix(x, 3), matrix(g, 3), {.row_weights = first}) - std::log(1.5)) < 1e-15);
  for (const double v : g)
    CHECK(std::abs(v) < 1e-16);
  const std::vector<double> none(4, 0);
  CHECK(loss(matrix(x, 3), matrix(g, 3), {.row_weights = none}) == 0);
  CHECK(g == std::vector<double>(12, 0));
  CHECK(loss(perdita::matrix_view<const double>(nullptr, 0, 3)) == 0);
}

TEST_CASE("prediction_entropy: in place, added, on any threads", "[entropy][threads]") {
  const auto x = scores<float>(1000 * 7, 2);
  const perdita::prediction_entropy<float> loss({.row = 1, .batch = 1});
  std::vector<float> g(x.size());
  const float value = loss(matrix(x, 7), matrix(g, 7), {.run_on = perdita::serial});
  for (const std::size_t n : {2U, 7U}) {
    const threads_executor pool(n, task_order::shuffled);
    std::vector<float> many(x.size());
    CHECK(loss(matrix(x, 7), matrix(many, 7), {.run_on = pool}) == value);
    CHECK(many == g);
  }
  auto place = x;
  loss(matrix(place, 7), matrix(place, 7));
  CHECK(place == g);
  std::vector<float> added(x.size(), 1);
  loss(matrix(x, 7), matrix(added, 7), {.accumulate = true});
  for (std::size_t k = 0; k < g.size(); ++k)
    REQUIRE(std::abs(added[k] - 1 - g[k]) <= 1.2e-7f);
}

TEST_CASE("prediction_entropy: bad input is refused, and nothing written", "[entropy]") {
  using Catch::Matchers::ContainsSubstring;
  using loss_type = perdita::prediction_entropy<double>;
  CHECK_THROWS_WITH(loss_type({.row = inf}), ContainsSubstring("row is inf"));
  CHECK_THROWS_WITH(loss_type({.batch = inf}), ContainsSubstring("batch is inf"));
  CHECK_THROWS_WITH(loss_type({.temperature = 0}), ContainsSubstring("temperature is 0"));
  CHECK_THROWS_WITH(loss_type({.temperature = 1e-310}),
                    ContainsSubstring("whose inverse is finite"));
  const loss_type loss;
  std::vector<double> x(6, 1), g(6, 5), two(2, 5);
  const std::vector<double> three(3, 1);
  CHECK_THROWS_WITH(loss(matrix(x, 2), matrix(g, 3)), ContainsSubstring("gradient rows is 2"));
  CHECK_THROWS_WITH(loss(matrix(x, 2), matrix(g, 2), {.values = two}),
                    ContainsSubstring("values is 2"));
  CHECK_THROWS_WITH(loss(matrix(x, 2), matrix(g, 2), {.upstream = three}),
                    ContainsSubstring("upstream"));
  CHECK_THROWS_WITH(loss(matrix(x, 2), matrix(x, 2), {.accumulate = true}),
                    ContainsSubstring("accumulate"));
  CHECK(g == std::vector<double>(6, 5));
  CHECK(two == std::vector<double>(2, 5));
}

// --- Functional entropy --------------------------------------------------------------------------

TEMPLATE_TEST_CASE("Functional entropy and information are their formulas", "[functional_entropy]",
                   float, double) {
  using T = TestType;
  const wide epsilon = std::numeric_limits<T>::epsilon();
  error_judge values, slopes, of_information, slopes_of_information;
  for (const double width : {1e-6, 0.1, 3.0}) { // about 1, nearly constant and not at all
    std::vector<T> f = scores<T>(24, width), g(24, 9);
    for (T& x : f)
      x = std::exp(x);
    wide mean = 0, entropy = 0, away = 0;
    for (const T x : f)
      mean += wide(x) / 24;
    for (const T x : f) {
      entropy += wide(x) * log(wide(x)) / 24;
      away += size_of(wide(x - mean)) / 24;
    }
    entropy -= mean * log(mean);
    const perdita::functional_entropy<T> loss;
    const T got = loss(f, g, {.scale = 2});
    CHECK(loss(f) == got);
    const wide fine = std::numeric_limits<double>::epsilon();
    CHECK(values.within(size_of(wide(got - entropy)), 4,
                        fine * (away + mean / 8) + epsilon * entropy));
    for (std::size_t i = 0; i < 24; ++i) {
      const wide slope = 2 * log(wide(f[i] / mean)) / 24;
      CHECK(slopes.within(size_of(wide(g[i] - slope)), 4, fine / 24 + epsilon * size_of(slope)));
    }

    const auto derivatives = scores<T>(24 * 3, 1);
    std::vector<T> d_g(72), d_f(24), of_one(1);
    const perdita::fisher_information<T> information;
    for (const bool shared : {false, true}) {
      const std::vector<T> by = shared ? std::vector<T>(f.begin(), f.begin() + 1) : f;
      const auto to = perdita::vector_view<T>(shared ? of_one : d_f);
      const T found = information(matrix(derivatives, 3), by, matrix(d_g, 3), to);
      CHECK(information(matrix(derivatives, 3), by) == found);
      wide expected = 0, of_all = 0;
      for (std::size_t b = 0; b < 24; ++b) {
        wide squares = 0;
        const wide at = by[shared ? 0 : b];
        for (std::size_t j = 0; j < 3; ++j) {
          const wide x = derivatives[3 * b + j];
          squares += x * x;
          CHECK(slopes_of_information.within(size_of(wide(d_g[3 * b + j] - 2 * x / (24 * at))), 2,
                                             epsilon * size_of(wide(x / (12 * at)))));
        }
        expected += squares / at / 24;
        of_all -= squares / (at * at * 24);
        if (!shared)
          CHECK(slopes_of_information.within(size_of(wide(d_f[b] + squares / (at * at * 24))), 2,
                                             epsilon * squares / (at * at * 24)));
      }
      CHECK(of_information.within(size_of(wide(found - expected)), 2, epsilon * expected));
      if (shared)
        CHECK(size_of(wide(of_one[0] - of_all)) <= 2 * epsilon * size_of(of_all));
    }

    std::vector<T> d_i(24);
    wide squares = 0;
    for (const T x : f)
      squares += 1 / (wide(x) * x);
    const wide r = sqrt(squares);
    const perdita::inverse_information<T> regulariser;
    CHECK(size_of(wide(regulariser(f, d_i) - r)) <= 2 * epsilon * r);
    for (std::size_t k = 0; k < 24; ++k) {
      const wide x = f[k], slope = -1 / (x * x * x * r);
      CHECK(size_of(wide(d_i[k] - slope)) <= 4 * epsilon * size_of(slope));
    }
  }
  report_accuracy<T>("functional_entropy", "", in_epsilons, values, slopes);
  report_accuracy<T>("fisher_information", "", in_epsilons, of_information, slopes_of_information);
}

TEST_CASE("Functional entropy: what has a stated result", "[functional_entropy]") {
  using Catch::Matchers::ContainsSubstring;
  const perdita::functional_entropy<double> loss;
  const perdita::inverse_information<double> regulariser;
  const perdita::fisher_information<double> information;
  std::vector<double> f(6, 0.3), g(6, 9), one{7};
  CHECK(loss(f, g) == 0);
  CHECK(g == std::vector<double>(6, 0));
  CHECK(loss(one) == 0);
  CHECK(loss(std::vector<double>{}) == 0);
  CHECK(loss(std::vector<double>(3, 0)) == 0);
  // All in one of n: m log n.
  f = {0, 0, 5, 0, 0, 0};
  CHECK(std::abs(loss(f, g) - 5.0 / 6 * std::log(6.0)) < 1e-15);
  CHECK((g[0] == -inf && std::abs(g[2] - std::log(6.0) / 6) < 1e-15));
  f = {1, 2, 3, 1.5, 0.5, 4};
  const auto check = [&](const auto& functor) {
    functor(f, g);
    const auto report = perdita::testing::check_gradient([&] { return functor(f); }, f, g);
    INFO(report.message());
    CHECK(report.ok);
    std::vector<double> added(6, 1);
    functor(f, added, {.scale = 2, .accumulate = true});
    CHECK(std::abs(added[1] - (1 + 2 * g[1])) < 1e-15);
    f[3] = -1;
    CHECK(std::isnan(functor(f, g)));
    CHECK((std::isnan(g[0]) && std::isnan(g[3])));
    f[3] = 1.5;
    CHECK_THROWS_WITH(functor(f, one), ContainsSubstring("is 1, expected 6"));
    CHECK_THROWS_WITH(functor(f, f), ContainsSubstring("overlaps"));
  };
  check(loss);
  check(regulariser);
  const perdita::matrix_view<const double> slopes(f.data(), 3, 2);
  CHECK_THROWS_WITH(information(slopes, std::span(f).first(3),
                                perdita::matrix_view<double>(g.data(), 3, 2),
                                std::span(g).first(3)),
                    ContainsSubstring("overlaps"));
  f[0] = inf;
  CHECK(std::isnan(loss(f)));
  // Tiny and infinite information.
  std::vector<double> i{1e-200, inf, 1e-200}, d(3);
  CHECK(std::abs(regulariser(i, d) / (std::sqrt(2.0) * 1e200) - 1) < 1e-15);
  CHECK(d[1] == 0);
  CHECK(regulariser(std::vector<double>{}) == 0);
  CHECK(regulariser(std::vector<double>{inf, inf}) == 0);
  // A sample whose f is 0; no samples.
  const std::vector<double> rows{1, 2, 3, 4}, zero{0, 1};
  std::vector<double> d_g(4), d_f(2);
  CHECK(std::isnan(information(matrix(rows, 2), zero, matrix(d_g, 2), d_f)));
  CHECK((std::isnan(d_g[0]) && d_g[2] == 3 && std::isnan(d_f[0]) && d_f[1] == -12.5));
  CHECK(information(perdita::matrix_view<const double>(nullptr, 0, 2), std::vector<double>{}) == 0);
  CHECK_THROWS_WITH(information(matrix(rows, 2), f), ContainsSubstring("f is 6, expected 2"));
}

} // namespace perdita_tests
