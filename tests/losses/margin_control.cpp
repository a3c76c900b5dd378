// SPDX-License-Identifier: MIT

// Formula sheet 14.3: the softmax's norm, of the batch or row by row.

#include <perdita/margin_control.hpp>

#include <algorithm>
#include <cmath>
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

using perdita::index;
using perdita::matrix_view;
constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

template <class T> matrix_view<T> matrix(std::vector<T>& v, std::size_t cols) {
  return {v.data(), static_cast<index>(v.size() / cols), static_cast<index>(cols)};
}

struct expectation {
  wide value = 0;
  std::vector<wide> gradient, sizes; ///< sizes: of the terms of a slope
};
/// As the formula is printed.
template <class T>
expectation expect(const std::vector<T>& x, std::size_t cols, const std::vector<T>& weights,
                   const wide& lambda, bool per_row) {
  const std::size_t rows = weights.size();
  std::vector<wide> p, behind, square(rows, 0); // behind: −log p, which an image's error grows with
  wide sum = 0, logs = 0, all = 0;
  for (std::size_t i = 0; i < rows; ++i) {
    const std::vector<wide> z(x.begin() + static_cast<std::ptrdiff_t>(i * cols),
                              x.begin() + static_cast<std::ptrdiff_t>((i + 1) * cols));
    const wide lse = log_sum_exp(z, [](std::size_t) { return true; });
    for (const wide& s : z) {
      p.push_back(exp(wide(s - lse)));
      behind.push_back(lse - s);
      square[i] += p.back() * p.back();
    }
    sum += weights[i] * square[i];
    logs += weights[i] * log1p(square[i]);
    all += weights[i];
  }
  expectation e;
  e.value = lambda * (per_row ? wide(logs / all) : log1p(sum));
  for (std::size_t i = 0; i < rows; ++i)
    for (std::size_t j = 0; j < cols; ++j) {
      const wide q = p[i * cols + j];
      wide apart = 0, size = 0;
      for (std::size_t k = 0; k < cols; ++k) {
        const wide d = p[i * cols + k] * (q - p[i * cols + k]);
        apart += d;
        size += size_of(d) * (1 + behind[i * cols + k]);
      }
      const wide factor =
          2 * lambda * weights[i] * q / (per_row ? wide((1 + square[i]) * all) : wide(1 + sum));
      e.gradient.push_back(factor * apart);
      // Of the largest, what its terms are; of the others, what is subtracted.
      const bool largest = std::none_of(p.begin() + static_cast<std::ptrdiff_t>(i * cols),
                                        p.begin() + static_cast<std::ptrdiff_t>((i + 1) * cols),
                                        [&](const wide& other) { return other > q; });
      e.sizes.push_back(factor *
                        (largest ? size : wide((q + square[i]) * (1 + behind[i * cols + j]))));
    }
  return e;
}

} // namespace

TEMPLATE_TEST_CASE("margin_control: value and gradient", "[margin_control]", float, double) {
  using T = TestType;
  random_numbers random(61);
  const wide epsilon = std::numeric_limits<T>::epsilon();
  const double budget = sizeof(T) == 4 ? 1 : 4;
  error_judge of_values, of_slopes;
  for (const bool per_row : {false, true})
    for (const std::size_t cols : {1U, 2U, 7U, 40U})
      for (const std::size_t rows : {1U, 5U})
        for (const double spread : {0.0, 1.0, 10.0, 60.0})
          for (const bool weighted_rows : {false, true}) {
            std::vector<T> x(rows * cols), g(rows * cols, T(7)), weights(rows, T(1));
            for (T& s : x)
              s = static_cast<T>(100 + spread * random.normal());
            for (std::size_t i = 0; weighted_rows && i < rows; ++i)
              weights[i] = static_cast<T>(i == 1 ? 0 : 0.5 * static_cast<double>(i + 1));
            perdita::call_options<T> call;
            call.row_weights = weights;
            const perdita::margin_control<T> loss({.weight = T(0.25), .per_row = per_row});
            const T value = loss(matrix(x, cols), matrix(g, cols), call);
            CHECK(value == loss(matrix(x, cols), call));
            const expectation e = expect(x, cols, weights, 0.25, per_row);
            of_values.within(size_of(wide(value - e.value)), budget, epsilon * e.value);
            for (std::size_t i = 0; i < g.size(); ++i) {
              const wide error = size_of(wide(g[i] - e.gradient[i])),
                         least = std::numeric_limits<T>::min();
              of_slopes.within(error, budget, epsilon * larger(e.sizes[i], least));
            }
          }
  report_accuracy<T>("margin_control", "", in_epsilons_of_terms, of_values, of_slopes);
  INFO(of_values.worst() << " and " << of_slopes.worst());
  CHECK(of_values.all_within());
  CHECK(of_slopes.all_within());
}

TEST_CASE("margin_control: the gradient is the value's derivative, and the limits are known",
          "[margin_control]") {
  random_numbers random(62);
  std::vector<double> x(20), g(20);
  for (double& s : x)
    s = random.normal();
  for (const bool per_row : {false, true}) {
    const perdita::margin_control<double> loss({.weight = 2, .per_row = per_row});
    loss(matrix(x, 5), matrix(g, 5));
    const auto report =
        perdita::testing::check_gradient([&](const auto&) { return loss(matrix(x, 5)); }, x, g);
    INFO(report.message());
    CHECK(report.ok);
  }
  using Catch::Matchers::WithinRel;
  const perdita::margin_control<double> batch({.weight = 1}), rows({.weight = 1, .per_row = true});
  std::vector<double> uniform(20, 3.0), sure(20, 0.0);
  for (std::size_t r = 0; r < 4; ++r)
    sure[5 * r + r] = 800;
  CHECK_THAT(batch(matrix(uniform, 5)), WithinRel(std::log(1.8), 1e-15));
  CHECK_THAT(rows(matrix(uniform, 5)), WithinRel(std::log(1.2), 1e-15));
  CHECK_THAT(batch(matrix(sure, 5)), WithinRel(std::log(5), 1e-15));
  CHECK_THAT(rows(matrix(sure, 5)), WithinRel(std::log(2), 1e-15));
}

TEST_CASE("margin_control: special rows, options and threads", "[margin_control]") {
  random_numbers random(63);
  const std::size_t rows = 300, cols = 9;
  std::vector<float> x(rows * cols), g(x.size(), 7.0F), h(x.size()), values(rows),
      weights(rows, 1.0F);
  for (float& s : x)
    s = static_cast<float>(2 * random.normal());
  for (std::size_t i = 0; i < rows; i += 3)
    weights[i] = 0;
  x[0] = static_cast<float>(nan); // of a row without weight
  for (const bool per_row : {false, true}) {
    const perdita::margin_control<float> loss({.per_row = per_row});
    perdita::call_options<float> call;
    call.row_weights = weights;
    call.values = values;
    call.run_on = perdita::serial;
    const float value = loss(matrix(x, cols), matrix(g, cols), call);
    CHECK(std::isfinite(value));
    CHECK((values[0] == 0 && g[0] == 0 && g[1] == 0));
    double sum = 0;
    for (const float v : values)
      sum += static_cast<double>(v);
    CHECK(std::abs(static_cast<double>(value) - 0.03 * (per_row ? sum / 200 : std::log1p(sum))) <
          1e-7);
    const threads_executor threads(3, task_order::shuffled);
    call.run_on = threads;
    CHECK(value == loss(matrix(x, cols), matrix(h, cols), call));
    CHECK(g == h);
    call.accumulate = true;
    call.scale = 2;
    loss(matrix(x, cols), matrix(h, cols), call);
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < g.size(); ++i)
      wrong += std::abs(h[i] - 3 * g[i]) > 1e-6F * std::abs(g[i]) + 1e-12F;
    CHECK(wrong == 0);

    std::vector<double> y{0, 1, 2, 5, 1, 1}, good(6), of(6);
    const perdita::margin_control<double> plain({.per_row = per_row});
    for (const double bad : {nan, inf, -inf}) {
      y[3] = bad;
      y[4] = y[5] = bad == -inf ? bad : 1;
      CHECK(std::isnan(plain(matrix(y, 3), matrix(of, 3))));
      for (std::size_t j = 0; j < 3; ++j)
        CHECK((std::isfinite(of[j]) && std::isnan(of[3 + j])));
    }
    y = {0, 1, 2, -inf, 1, 2}; // a masked class
    const double masked = plain(matrix(y, 3), matrix(of, 3));
    CHECK((std::isfinite(masked) && of[3] == 0));
    std::vector<double> in_place = y;
    CHECK(plain(matrix(in_place, 3), matrix(in_place, 3)) == masked);
    CHECK(in_place == of);
    CHECK(plain(matrix_view<const double>(y.data(), 0, 3)) == 0);
  }
}

TEST_CASE("margin_control: what is refused", "[margin_control]") {
  using Catch::Matchers::ContainsSubstring;
  for (const double bad : {inf, nan})
    CHECK_THROWS_WITH(perdita::margin_control<double>({.weight = bad}),
                      ContainsSubstring("weight is"));
  std::vector<double> x(6), g(6, 7.0), two(2);
  const perdita::margin_control<double> loss;
  perdita::call_options<double> call;
  call.upstream = two;
  CHECK_THROWS_WITH(loss(matrix(x, 3), matrix(g, 3), call), ContainsSubstring("upstream"));
  call = {};
  call.normaliser = 2;
  CHECK_THROWS_WITH(loss(matrix(x, 3), matrix(g, 3), call), ContainsSubstring("normaliser"));
  call = {};
  call.entropy = two;
  CHECK_THROWS(loss(matrix(x, 3), matrix(g, 3), call));
  CHECK_THROWS(loss(matrix(x, 3), matrix(g, 2)));
  CHECK_THROWS(loss(matrix_view<const double>(nullptr, 2, 3), matrix(g, 3)));
  CHECK_THROWS(loss(matrix_view<const double>(x.data(), 2, 0)));
  CHECK(g == std::vector<double>(6, 7.0));
}

} // namespace perdita_tests
