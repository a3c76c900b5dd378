// SPDX-License-Identifier: MIT

// Kullback-Leibler divergence of Gaussians: formula sheet of contrastive losses, 7.10.

#include <perdita/gaussian_kl.hpp>

#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include <perdita/testing/gradient_check.hpp>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/normaliser.hpp"
#include "support/numbers.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

using perdita::matrix_view;

constexpr double inf = std::numeric_limits<double>::infinity();

template <class T> struct numbers {
  index rows, cols;
  std::vector<T> x[4], g[4];
  numbers(index n, index d, double spread) : rows(n), cols(d) {
    random_numbers random(17);
    for (int k = 0; k < 4; ++k)
      for (index i = 0; i < n * d; ++i) {
        x[k].push_back(static_cast<T>(spread * random.normal()));
        g[k].push_back(7);
      }
  }
  matrix_view<T> in(int k) { return {x[k].data(), rows, cols}; }
  matrix_view<T> out(int k) { return {g[k].data(), rows, cols}; }
};

} // namespace

TEMPLATE_TEST_CASE("gaussian_kl: value and gradient against the formula", "[gaussian_kl]", float,
                   double) {
  using T = TestType;
  const wide epsilon = std::numeric_limits<T>::epsilon();
  error_judge of_values, of_slopes;
  for (const bool two : {false, true})
    for (const double spread : {1e-7, 1e-3, 0.3, 3.0})
      for (const auto how :
           {perdita::reduction::mean, perdita::reduction::sum, perdita::reduction::none}) {
        numbers<T> data(5, 19, spread);
        const std::vector<T> weights{1, 0, T(0.5), 2, 1}, upstream{1, 2, -1, T(0.25), 3};
        std::vector<T> values(5);
        const perdita::gaussian_kl<T> loss({.reduction = how});
        const perdita::call_options<T> call{
            .row_weights = weights, .upstream = upstream, .scale = 2, .values = values};
        const T value = two ? loss.between(data.in(0), data.in(1), data.in(2), data.in(3),
                                           data.out(0), data.out(1), data.out(2), data.out(3), call)
                            : loss(data.in(0), data.in(1), data.out(0), data.out(1), call);
        CHECK((two ? loss.between(data.in(0), data.in(1), data.in(2), data.in(3), call)
                   : loss(data.in(0), data.in(1), call)) == value);
        const wide share = how == perdita::reduction::mean ? wide(wide(1) / wide(4.5)) : wide(1);
        wide total = 0;
        for (std::size_t i = 0; i < 5; ++i) {
          wide sum = 0;
          const wide factor = share * 2 * weights[i] * upstream[i];
          for (std::size_t j = i * 19; j < i * 19 + 19; ++j) {
            wide x[4];
            for (int k = 0; k < 4; ++k)
              x[k] = k < 2 || two ? wide(data.x[k][j]) : wide(0);
            const wide off = x[0] - x[2], ratio = x[1] - x[3], e = expm1(ratio);
            const wide pull = off * exp(-x[3]);
            sum += (off * pull + (e - ratio)) / 2; // 113 bits, of which this loses 24
            const wide slopes[4] = {pull, e / 2, -pull, -(e + off * pull) / 2};
            for (int k = 0; k < (two ? 4 : 2); ++k)
              CHECK(of_slopes.within(
                  size_of(wide(data.g[k][j] - factor * slopes[k])), 8,
                  epsilon * size_of(factor) *
                      (k < 3 ? size_of(slopes[k]) : wide((size_of(e) + off * pull) / 2))));
          }
          total += weights[i] * sum;
          CHECK(of_values.within(size_of(wide(values[i] - weights[i] * sum)), 4,
                                 epsilon * weights[i] * sum));
        }
        CHECK(of_values.within(size_of(wide(value - share * total)), 4, epsilon * share * total));
      }
  report_accuracy<T>(
      "gaussian_kl", "", in_epsilons_of_terms,
      {of_values.worst(), of_slopes.worst(), std::max(of_values.share(), of_slopes.share())});
}

TEST_CASE("gaussian_kl: golden values, derivatives", "[gaussian_kl]") {
  numbers<double> data(6, 4, 1);
  for (std::size_t k = 0; k < 24; ++k) { // formula sheet 11
    const auto at = static_cast<double>(k);
    data.x[0][k] = std::sin(.7 * at + .3 + .15 * at * at);
    data.x[1][k] = std::cos(.9 * at + .1 + .15 * at * at);
  }
  const perdita::gaussian_kl<double> loss;
  CHECK(std::abs(loss(data.in(0), data.in(1), data.out(0), data.out(1)) - 1.40491379722) < 1e-11);
  const auto norm = [](const std::vector<double>& g) {
    double squares = 0;
    for (const double x : g)
      squares += x * x;
    return std::sqrt(squares);
  };
  CHECK(std::abs(norm(data.g[0]) - 0.559273697) < 1e-9);
  CHECK(std::abs(norm(data.g[1]) - 0.315775834) < 1e-9);
  const double value = loss.between(data.in(0), data.in(1), data.in(2), data.in(3), data.out(0),
                                    data.out(1), data.out(2), data.out(3));
  CHECK(value > 0);
  for (int k = 0; k < 4; ++k) {
    const auto report = perdita::testing::check_gradient(
        [&] { return loss.between(data.in(0), data.in(1), data.in(2), data.in(3)); }, data.x[k],
        data.g[k]);
    INFO(report.message());
    CHECK(report.ok);
  }
  // Of a Gaussian from itself: nothing
  CHECK(loss.between(data.in(0), data.in(1), data.in(0), data.in(1)) == 0);
}

TEST_CASE("gaussian_kl: special values, threads, added, columns", "[gaussian_kl][threads]") {
  std::vector<double> m{0, 1, inf, 2}, v{-inf, inf, 0, std::nan("")}, values(4), dm(4), dv(4);
  const perdita::gaussian_kl<double> loss;
  const auto rows = [](std::vector<double>& x) { return matrix_view<double>(x.data(), 4, 1); };
  CHECK(std::isnan(loss(rows(m), rows(v), rows(dm), rows(dv), {.values = values})));
  CHECK((values[0] == inf && values[1] == inf && values[2] == inf && std::isnan(values[3])));
  CHECK((dv[0] == -0.125 && dm[1] == 0.25 && dm[3] == 0.5 && std::isnan(dv[3])));
  const std::vector<double> upstream{1, 0, 0, 1};
  loss(rows(m), rows(v), rows(dm), rows(dv), {.upstream = upstream});
  CHECK((dv[0] == -0.125 && dv[1] == 0 && dm[2] == 0 && dm[3] == 0.5));
  const std::vector<double> weights{0, 0, 0, 0};
  CHECK(loss(rows(m), rows(v), rows(dm), rows(dv), {.row_weights = weights}) == 0);
  CHECK(dv == std::vector<double>(4, 0.0));
  CHECK(loss(matrix_view<double>(nullptr, 0, 3), matrix_view<double>(nullptr, 0, 3)) == 0);

  numbers<float> data(900, 11, 1), other = data;
  const perdita::gaussian_kl<float> narrow;
  const float value =
      narrow(data.in(0), data.in(1), data.out(0), data.out(1), {.run_on = perdita::serial});
  const threads_executor pool(3, task_order::shuffled);
  CHECK(narrow(other.in(0), other.in(1), other.out(0), other.out(1), {.run_on = pool}) == value);
  CHECK((data.g[0] == other.g[0] && data.g[1] == other.g[1]));
  narrow(other.in(0), other.in(1), other.out(0), other.out(1), {.accumulate = true});
  for (std::size_t i = 0; i < other.g[0].size(); ++i)
    REQUIRE(std::abs(other.g[1][i] - 2 * data.g[1][i]) <= 2e-7f * std::abs(data.g[1][i]));
  const auto across = [&](std::vector<float>& x) {
    return matrix_view<float>(x.data(), 11, 900, 1, 11);
  };
  std::vector<float> d(data.x[0].size()), e(d);
  const perdita::gaussian_kl<float> sum({.reduction = perdita::reduction::sum});
  CHECK(std::abs(sum(across(data.x[0]), across(data.x[1]), across(d), across(e)) / 900 - value) <
        1e-6f * value);
  for (std::size_t i = 0; i < d.size(); ++i)
    REQUIRE(std::abs(e[i] / 900 - data.g[1][i]) <= 2e-7f * std::abs(data.g[1][i]));
}

TEST_CASE("gaussian_kl: what is refused", "[gaussian_kl]") {
  using Catch::Matchers::ContainsSubstring;
  const perdita::gaussian_kl<double> loss;
  std::vector<double> x(6, 1), y(6, 1), g(6, 5), h(6, 5);
  const auto view = [](std::vector<double>& v, index n) {
    return matrix_view<double>(v.data(), n, 2);
  };
  CHECK_THROWS_WITH(loss(view(x, 3), view(y, 2)), ContainsSubstring("rows of log-variances is 2"));
  CHECK_THROWS_WITH(loss(view(x, 3), view(y, 3), view(g, 2), view(h, 3)),
                    ContainsSubstring("rows of the gradient of means is 2"));
  CHECK_THROWS_WITH(loss(view(x, 3), view(y, 3), view(g, 3), view(y, 3)),
                    ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(loss(view(x, 3), matrix_view<double>(nullptr, 3, 2)),
                    ContainsSubstring("log-variances is null"));
  CHECK_THROWS_WITH(loss(view(x, 3), view(y, 3), view(g, 3), view(h, 3), {.row_weights = x}),
                    ContainsSubstring("row_weights is 6"));
  CHECK(g == std::vector<double>(6, 5));
  CHECK(h == std::vector<double>(6, 5));
}

TEST_CASE("gaussian_kl: what the mean divides by", "[gaussian_kl]") {
  numbers<double> data(5, 7, 1);
  check_normaliser<double>([&](perdita::reduction how, const perdita::call_options<double>& call) {
    const double value = perdita::gaussian_kl<double>({.reduction = how})(
        data.in(0), data.in(1), data.out(0), data.out(1), call);
    return all_of(value, data.g[0], data.g[1]);
  });
}

} // namespace perdita_tests
