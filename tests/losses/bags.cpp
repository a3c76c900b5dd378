// SPDX-License-Identifier: MIT

// Bag-level, instance-level and interpolated squared loss: formula sheet 14.4.

#include <perdita/bags.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
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

constexpr double inf = std::numeric_limits<double>::infinity();

template <class T> struct bags {
  std::vector<T> predictions, responses, weights, upstream;
  std::vector<std::int64_t> starts{0};
  /// Bags of `size`, or of 1 to 9 if that is 0.
  explicit bags(std::size_t count, std::size_t size, std::uint64_t seed) {
    random_numbers random(seed);
    for (std::size_t b = 0; b < count; ++b) {
      const std::size_t k = size ? size : 1 + random.below(9);
      for (std::size_t i = 0; i < k; ++i)
        predictions.push_back(static_cast<T>(10 + random.normal()));
      responses.push_back(static_cast<T>(10 + random.normal()));
      weights.push_back(static_cast<T>(static_cast<double>(b % 3) / 2));
      upstream.push_back(static_cast<T>(random.uniform(-1, 1)));
      starts.push_back(static_cast<std::int64_t>(predictions.size()));
    }
  }
};

} // namespace

TEMPLATE_TEST_CASE("bag_squared: value and gradient against the formula", "[bags]", float, double) {
  using T = TestType;
  const double epsilon = std::numeric_limits<T>::epsilon();
  error_judge of_values, of_slopes;
  for (const std::size_t size : {0U, 1U, 4U})
    for (const double rho : {0.0, 0.25, 1.0})
      for (const auto how :
           {perdita::reduction::mean, perdita::reduction::sum, perdita::reduction::none}) {
        const bags<T> data(13, size, 3 + size);
        std::vector<wide> slopes, values;
        std::vector<wide> sizes; // of the terms of a slope
        wide total = 0, count = 0;
        for (std::size_t b = 0; b < data.responses.size(); ++b) {
          const auto first = static_cast<std::size_t>(data.starts[b]),
                     last = static_cast<std::size_t>(data.starts[b + 1]);
          const wide k = static_cast<double>(last - first), y = data.responses[b];
          wide mean = 0, squares = 0;
          for (std::size_t i = first; i < last; ++i) {
            mean += data.predictions[i] / k;
            squares += (data.predictions[i] - y) * (data.predictions[i] - y) / k;
          }
          const wide w = data.weights[b];
          values.push_back(w * ((1 - rho) * (mean - y) * (mean - y) + rho * squares));
          total += values.back();
          count += w;
          for (std::size_t i = first; i < last; ++i) {
            const wide off = data.predictions[i] - y, factor = w * 2 / k * data.upstream[b];
            slopes.push_back(factor * ((1 - rho) * (mean - y) + rho * off));
            sizes.push_back(size_of(factor) * (size_of(wide(mean - y)) + size_of(off)));
          }
        }
        const wide share = how == perdita::reduction::mean ? wide(1 / count) : wide(1);
        const perdita::bag_squared<T> loss({.rho = static_cast<T>(rho), .reduction = how});
        std::vector<T> g(data.predictions.size(), 1), got_values(data.responses.size());
        const perdita::call_options<T> call{.row_weights = data.weights,
                                            .upstream = data.upstream,
                                            .scale = 3,
                                            .values = got_values};
        const T value = loss(data.predictions, data.responses, data.starts, g, call);
        CHECK(of_values.within(size_of(wide(value - share * total)), 1, epsilon * share * total));
        CHECK(loss(data.predictions, data.responses, data.starts, call) == value);
        for (std::size_t b = 0; b < values.size(); ++b)
          CHECK(of_values.within(size_of(wide(got_values[b] - values[b])), 4, epsilon * values[b]));
        for (std::size_t i = 0; i < g.size(); ++i)
          CHECK(of_slopes.within(size_of(wide(g[i] - 3 * share * slopes[i])), 4,
                                 3 * share * epsilon * sizes[i]));
        if (size > 0) {
          auto equal = g;
          CHECK(loss(data.predictions, data.responses, equal, call) == value);
          CHECK(equal == g);
          CHECK(loss(data.predictions, data.responses, call) == value);
        }
      }
  report_accuracy<T>("bag_squared", "", in_epsilons_of_terms, of_values, of_slopes);
}

TEST_CASE("bag_squared: the instance level is the bag level and the variance within", "[bags]") {
  const std::vector<double> f{1, 3, 5, 7, 2, 2}, y{1, 3};
  // Means 3 and 11/3 of bags of 3; variances 8/3 and 50/9.
  CHECK(std::abs(perdita::bag_squared<double>()(f, y) - (4 + 4.0 / 9) / 2) < 1e-15);
  CHECK(std::abs(perdita::bag_squared<double>({.rho = 1})(f, y) -
                 (4 + 4.0 / 9 + 8.0 / 3 + 50.0 / 9) / 2) < 2e-15);
}

TEST_CASE("bag_squared: the gradient is the derivative", "[bags]") {
  bags<double> data(7, 0, 5);
  for (const double rho : {0.0, 0.3, 1.0}) {
    const perdita::bag_squared<double> loss({.rho = rho});
    std::vector<double> g(data.predictions.size());
    loss(data.predictions, data.responses, data.starts, g);
    auto x = data.predictions;
    const auto report = perdita::testing::check_gradient(
        [&] { return loss(x, data.responses, data.starts); }, x, g);
    INFO(report.message());
    CHECK(report.ok);
  }
}

TEST_CASE("bag_squared: infinity, NaN, bags without weight, no bags", "[bags]") {
  const std::vector<double> f{inf, 1, std::nan(""), 1, 2, 4, -inf, 7}, y{0, 0, 1, 3};
  std::vector<double> values(4), g(8), weights{1, 1, 1, 0};
  const perdita::bag_squared<double> loss({.rho = 1});
  CHECK(std::isnan(loss(f, y, g, {.row_weights = weights, .values = values})));
  CHECK(values[0] == inf);
  CHECK(std::isnan(values[1]));
  CHECK((values[2] == 5 && values[3] == 0));
  CHECK((g[0] == inf && std::abs(g[1] - 1.0 / 3) < 1e-16));
  CHECK((std::isnan(g[2]) && std::isfinite(g[3])));
  CHECK((g[6] == 0 && g[7] == 0));
  const std::vector<double> upstream{0, 0, 1, 1};
  loss(f, y, g, {.row_weights = weights, .upstream = upstream});
  CHECK((g[0] == 0 && g[1] == 0 && g[2] == 0 && g[3] == 0 && std::isfinite(g[4]) && g[4] != 0));
  const std::vector<double> none;
  CHECK(loss(none, none) == 0);
  CHECK(loss(none, none, std::vector<int>{0}) == 0);
}

TEST_CASE("bag_squared: strides, in place, added, on any threads", "[bags][threads]") {
  const bags<float> data(1000, 0, 9);
  const perdita::bag_squared<float> loss({.rho = 0.5f});
  std::vector<float> g(data.predictions.size());
  const float value =
      loss(data.predictions, data.responses, data.starts, g, {.run_on = perdita::serial});
  perdita::workspace memory;
  for (const std::size_t n : {2U, 7U}) {
    const threads_executor pool(n, task_order::shuffled);
    std::vector<float> many(g.size());
    CHECK(loss(data.predictions, data.responses, data.starts, many,
               {.run_on = pool, .memory = &memory}) == value);
    CHECK(many == g);
  }
  std::vector<float> added(g.size(), 1);
  loss(data.predictions, data.responses, data.starts, added, {.accumulate = true});
  for (std::size_t i = 0; i < g.size(); ++i)
    REQUIRE(std::abs(added[i] - 1 - g[i]) <= 1.2e-7f);
  std::vector<float> apart(3 * g.size(), 8);
  const perdita::vector_view<float> strided(apart.data(), static_cast<std::ptrdiff_t>(g.size()), 3);
  for (std::size_t i = 0; i < g.size(); ++i)
    apart[3 * i] = data.predictions[i];
  CHECK(loss(strided, data.responses, data.starts, strided) == value);
  for (std::size_t i = 0; i < g.size(); ++i)
    REQUIRE((apart[3 * i] == g[i] && apart[3 * i + 1] == 8 && apart[3 * i + 2] == 8));
}

TEST_CASE("bag_squared: bad input is refused, and nothing written", "[bags]") {
  using Catch::Matchers::ContainsSubstring;
  CHECK_THROWS_WITH(perdita::bag_squared<double>({.rho = 2}), ContainsSubstring("rho is 2"));
  const perdita::bag_squared<double> loss;
  std::vector<double> f(6, 1), g(6, 5), y(4, 1), values(4, 5), short_g(5, 5);
  const auto starts_refused = [&](const std::vector<int>& starts, const char* why) {
    CHECK_THROWS_WITH(loss(f, y, starts, g, {.values = values}), ContainsSubstring(why));
  };
  CHECK_THROWS_WITH(loss(f, y, g), ContainsSubstring("predictions is 6"));
  CHECK_THROWS_WITH(loss(std::vector<double>(), y), ContainsSubstring("predictions is 0"));
  CHECK_THROWS_WITH(loss(f, std::vector<double>()), ContainsSubstring("predictions is 6"));
  starts_refused({0, 1, 2, 6}, "starts is 4, expected 5");
  starts_refused({1, 2, 3, 4, 6}, "starts[0] is 1");
  starts_refused({0, 2, 2, 4, 6}, "starts[2] is 2");
  starts_refused({0, 2, 7, 4, 6}, "starts[2] is 7");
  starts_refused({0, 1, 2, 3, 5}, "starts[4] is 5");
  starts_refused({0, 1, 2, 3, 7}, "starts[4] is 7");
  const std::vector<double> three(3, 1);
  CHECK_THROWS_WITH(loss(f, three, short_g), ContainsSubstring("gradient rows is 5"));
  CHECK_THROWS_WITH(loss(f, three, g, {.values = values}), ContainsSubstring("values is 4"));
  CHECK_THROWS_WITH(loss(f, three, f, {.accumulate = true}), ContainsSubstring("accumulate"));
  // Responses that the gradient of an earlier bag would overwrite
  using view = perdita::vector_view<double>;
  CHECK_THROWS_WITH(loss(f, view(g.data() + 1, 3), g), ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(loss(f, view(g.data() + 5, 3, -2), g), ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(loss(f, view(f.data(), 3), f), ContainsSubstring("overlaps"));
  alignas(double) unsigned char shared[6 * sizeof(double)]{};
  auto* const slopes = reinterpret_cast<double*>(shared);
  auto* const begin = reinterpret_cast<std::int64_t*>(shared);
  for (int b = 0; b < 4; ++b)
    begin[b] = 2 * b;
  CHECK_THROWS_WITH(
      loss(f, three, perdita::vector_view<const std::int64_t>(begin, 4), view(slopes, 6)),
      ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(loss(perdita::vector_view<const double>(nullptr, 6), three),
                    ContainsSubstring("predictions is null"));
  CHECK(g == std::vector<double>(6, 5));
  CHECK(short_g == std::vector<double>(5, 5));
  CHECK(values == std::vector<double>(4, 5));
}

TEST_CASE("bag_squared: what the mean divides by", "[bags]") {
  const bags<double> data(5, 3, 4);
  check_normaliser<double>([&](perdita::reduction how, const perdita::call_options<double>& call) {
    std::vector<double> g(15);
    const double value = perdita::bag_squared<double>({.rho = 0.5, .reduction = how})(
        data.predictions, data.responses, g, call);
    return all_of(value, g);
  });
}

} // namespace perdita_tests
