// SPDX-License-Identifier: MIT

// PyTorch's triplet_margin_loss: formula sheet "contrastive", 9.3.

#include <perdita/triplet.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <string>
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

using perdita::index;
using perdita::matrix_view;
using perdita::reduction;
constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

/// Three matrices.
template <class T> struct triplets {
  index rows, cols;
  std::vector<T> part[3];

  triplets(index n, index d) : rows(n), cols(d) {
    for (auto& p : part)
      p.assign(static_cast<std::size_t>(n * d), T(0));
  }
  static triplets normal(index n, index d, double scale, std::uint64_t seed) {
    triplets result(n, d);
    random_numbers random(seed);
    for (auto& p : result.part)
      for (T& x : p)
        x = static_cast<T>(scale * random.normal());
    return result;
  }
  matrix_view<const T> view(int k) const { return {part[k].data(), rows, cols}; }
  matrix_view<T> view(int k) { return {part[k].data(), rows, cols}; }
};

template <class T, class Loss>
T run(const Loss& loss, const triplets<T>& x, triplets<T>& g,
      const perdita::call_options<T>& call = {}) {
  return loss(x.view(0), x.view(1), x.view(2), g.view(0), g.view(1), g.view(2), call);
}
template <class T, class Loss>
T value_of(const Loss& loss, const triplets<T>& x, const perdita::call_options<T>& call = {}) {
  return loss(x.view(0), x.view(1), x.view(2), call);
}

/// ‖x − y + ε‖_p and its slopes by x, from the definition.
struct norm_reference {
  wide norm = 0;
  std::vector<wide> slope;

  template <class T>
  norm_reference(const T* x, const T* y, std::size_t n, const wide& p, const wide& epsilon) {
    std::vector<wide> u;
    wide top = 0, sum = 0;
    for (std::size_t i = 0; i < n; ++i) {
      u.push_back(wide(x[i]) - wide(y[i]) + epsilon);
      top = larger(top, size_of(u.back()));
    }
    for (const wide& v : u)
      sum += pow(wide(size_of(v) / top), p);
    norm = p == infinity() ? top : wide(top * pow(sum, wide(1 / p)));
    for (const wide& v : u) {
      const wide share = size_of(v) / norm;
      const wide s = p == infinity() ? wide(share == 1 ? 1 : 0)
                                     : wide(p == 1 ? wide(1) : wide(pow(share, wide(p - 1))));
      slope.push_back(v < 0 ? wide(-s) : s);
    }
  }
};

struct setting {
  double power;
  bool swap;
  double epsilon;
};

/// Of one triplet.
struct expectation {
  wide value, size;
  std::vector<wide> slope[3], terms[3];

  template <class T>
  expectation(const triplets<T>& x, std::size_t r, const wide& margin, const setting& s) {
    const auto d = static_cast<std::size_t>(x.cols);
    const auto row = [&](int k) { return x.part[k].data() + r * d; };
    const wide p = s.power, epsilon = s.epsilon;
    const norm_reference near(row(0), row(1), d, p, epsilon), far(row(0), row(2), d, p, epsilon),
        between(row(1), row(2), d, p, epsilon);
    const bool swapped = s.swap && between.norm < far.norm;
    const norm_reference& other = swapped ? between : far;
    value = larger(0, wide(margin + near.norm - other.norm));
    size = size_of(margin) + near.norm + other.norm;
    const int from = swapped ? 1 : 0;
    for (int k = 0; k < 3; ++k)
      for (std::size_t i = 0; i < d; ++i) {
        wide g = 0, t = 0;
        if (value > 0 && k < 2) {
          g += k == 0 ? near.slope[i] : wide(-near.slope[i]);
          t += size_of(near.slope[i]);
        }
        if (value > 0 && (k == from || k == 2)) {
          g += k == 2 ? other.slope[i] : wide(-other.slope[i]);
          t += size_of(other.slope[i]);
        }
        slope[k].push_back(g);
        terms[k].push_back(t);
      }
  }
};

} // namespace

TEMPLATE_TEST_CASE("triplet_margin: value and gradients against the formula", "[triplet]", float,
                   double) {
  using T = TestType;
  const double epsilon = std::numeric_limits<T>::epsilon();
  const double huge = sizeof(T) == 4 ? 1e37 : 1e306, tiny = sizeof(T) == 4 ? 1e-30 : 1e-280;
  error_judge of_values, of_slopes;
  std::size_t swaps = 0, active = 0, all = 0;
  for (const index d : {1, 3, 16, 37})
    for (const double power : {1.0, 1.5, 2.0, 3.0, inf})
      for (const bool swap : {false, true})
        for (const double scale : {1.0, huge, tiny}) {
          const setting s{power, swap, scale == tiny ? 0 : 1e-6 * scale};
          const index n = 7;
          const auto x =
              triplets<T>::normal(n, d, scale, static_cast<std::uint64_t>(3 + d + 100 * swap));
          const double margin = static_cast<T>(scale);
          const perdita::triplet_margin<T> loss({.margin = static_cast<T>(margin),
                                                 .power = power,
                                                 .epsilon = s.epsilon,
                                                 .swap = swap,
                                                 .reduction = reduction::none});
          std::vector<T> values(static_cast<std::size_t>(n));
          triplets<T> g(n, d);
          run(loss, x, g, {.values = values});
          for (std::size_t r = 0; r < values.size(); ++r) {
            const expectation e(x, r, margin, s);
            INFO("d " << d << ", p " << power << ", swap " << swap << ", scale " << scale);
            CHECK(of_values.within(size_of(wide(values[r] - e.value)), 4, epsilon * e.size));
            ++all;
            active += e.value > 0;
            swaps += e.value > 0 && d > 1 && e.terms[1][0] > 1.01 * e.terms[0][0];
            for (int k = 0; k < 3; ++k)
              for (std::size_t i = 0; i < static_cast<std::size_t>(d); ++i) {
                const std::size_t at = r * static_cast<std::size_t>(d) + i;
                CHECK(of_slopes.within(size_of(wide(g.part[k][at] - e.slope[k][i])), 4,
                                       epsilon * e.terms[k][i]));
              }
          }
        }
  CHECK((active > all / 3 && active < all && swaps > 20));
  report_accuracy<T>(
      "triplet_margin", "", in_epsilons_of_terms,
      {of_values.worst(), of_slopes.worst(), std::max(of_values.share(), of_slopes.share())});
}

TEST_CASE("triplet_margin: the formula sheet's value", "[triplet]") {
  triplets<double> x(6, 4), g(6, 4);
  for (std::size_t k = 0; k < 24; ++k) {
    const double at = static_cast<double>(k);
    x.part[0][k] = std::sin(0.7 * at + 0.3 + 0.15 * at * at);
    x.part[1][k] = std::cos(0.9 * at + 0.1 + 0.15 * at * at);
  }
  for (std::size_t r = 0; r < 6; ++r)
    for (std::size_t i = 0; i < 4; ++i)
      x.part[2][4 * r + i] = x.part[0][4 * (5 - r) + i];
  CHECK(std::abs(run(perdita::triplet_margin<double>(), x, g) - 0.790654711472) < 1e-12);
  double of_x = 0, of_y = 0;
  for (std::size_t r = 0; r < 6; ++r)
    for (std::size_t i = 0; i < 4; ++i) {
      of_x += std::pow(g.part[0][4 * r + i] + g.part[2][4 * (5 - r) + i], 2);
      of_y += std::pow(g.part[1][4 * r + i], 2);
    }
  CHECK(std::abs(std::sqrt(of_x) - 0.519892628) < 1e-9);
  CHECK(std::abs(std::sqrt(of_y) - 0.333333333) < 1e-9);
}

TEST_CASE("triplet_margin: the gradients are the derivatives", "[triplet]") {
  for (const double power : {1.0, 1.5, 2.0, 3.0, inf})
    for (const bool swap : {false, true}) {
      auto x = triplets<double>::normal(4, 3, 1, 21);
      const perdita::triplet_margin<double> loss({.margin = 3, .power = power, .swap = swap});
      triplets<double> g(4, 3);
      run(loss, x, g);
      for (int k = 0; k < 3; ++k) {
        const auto report = perdita::testing::check_gradient([&] { return value_of(loss, x); },
                                                             x.part[k], g.part[k]);
        INFO("p " << power << ", swap " << swap << ", matrix " << k << ": " << report.message());
        CHECK(report.ok);
      }
    }
}

TEST_CASE("triplet_margin: distances of 0 are finite", "[triplet]") {
  for (const double power : {1.0, 1.5, 2.0, inf})
    for (const bool swap : {false, true}) {
      triplets<double> x(1, 4), g(1, 4);
      for (auto& p : x.part)
        p.assign(4, 0.25);
      CHECK(run(perdita::triplet_margin<double>({.power = power, .epsilon = 0, .swap = swap}), x,
                g) == 1);
      for (const auto& p : g.part)
        CHECK(p == std::vector<double>(4, 0));
      // ε alone: both distances are ε d^(1/p), the slope of each component d^(1/p − 1).
      CHECK(run(perdita::triplet_margin<double>({.power = power, .swap = swap}), x, g) == 1);
      const double slope = power == inf ? 0.25 : std::pow(4, 1 / power - 1);
      for (std::size_t i = 0; i < 4; ++i) {
        CHECK(g.part[0][i] == 0);
        CHECK(std::abs(g.part[1][i] + slope) < 1e-15);
        CHECK(std::abs(g.part[2][i] - slope) < 1e-15);
      }
    }
}

TEST_CASE("triplet_margin: conventions", "[triplet]") {
  triplets<double> x(1, 2), g(1, 2);
  // ε is added to x − y: with 0.5, ‖(−0.5, 0) + 0.5‖ is not ‖(0.5, 0) + 0.5‖.
  x.part[1] = {0.5, 0};
  x.part[2] = {0, 0};
  const double near = 0.5, far = std::sqrt(0.5);
  CHECK(std::abs(value_of(perdita::triplet_margin<double>({.epsilon = 0.5}), x) -
                 (1 + near - far)) < 1e-15);
  // The swap: (0.5, 0) and (0, 0) are apart by √(1.25), more than √0.5, and by 0.5 without ε.
  CHECK(value_of(perdita::triplet_margin<double>({.epsilon = 0.5, .swap = true}), x) ==
        value_of(perdita::triplet_margin<double>({.epsilon = 0.5}), x));
  x.part[2] = {2, 0};
  CHECK(value_of(perdita::triplet_margin<double>({.margin = 2, .epsilon = 0}), x) == 0.5);
  CHECK(value_of(perdita::triplet_margin<double>({.margin = 2, .epsilon = 0, .swap = true}), x) ==
        1);
  // At the kink there is no slope.
  x.part[2] = {0, 1.5};
  CHECK(run(perdita::triplet_margin<double>({.epsilon = 0}), x, g) == 0);
  for (const auto& p : g.part)
    CHECK(p == std::vector<double>(2, 0));
  // p = 1: no slope of a component of 0. p = ∞: components that are equally large share it.
  run(perdita::triplet_margin<double>({.margin = 9, .power = 1, .epsilon = 0}), x, g);
  CHECK(g.part[1] == std::vector<double>{1, 0});
  x.part[1] = {0.5, -0.5};
  run(perdita::triplet_margin<double>({.margin = 9, .power = inf, .epsilon = 0}), x, g);
  CHECK(g.part[1] == std::vector<double>{0.5, -0.5});
}

TEST_CASE("triplet_margin: NaN, infinity, no triplets, weights", "[triplet]") {
  for (const double bad : {nan, inf, -inf})
    for (int k = 0; k < 3; ++k) {
      auto x = triplets<double>::normal(3, 9, 1, 5);
      triplets<double> g(3, 9), clean(3, 9);
      std::vector<double> values(3), good(3), weights{1, 2, 1};
      const perdita::triplet_margin<double> loss({.margin = 5});
      run(loss, x, clean, {.row_weights = weights, .values = good});
      x.part[k][9 + 4] = bad;
      CHECK(std::isnan(run(loss, x, g, {.row_weights = weights, .values = values})));
      CHECK((values[0] == good[0] && std::isnan(values[1]) && values[2] == good[2]));
      for (int m = 0; m < 3; ++m)
        for (std::size_t i = 0; i < 27; ++i)
          CHECK((i / 9 == 1 ? std::isnan(g.part[m][i]) : g.part[m][i] == clean.part[m][i]));
      weights[1] = 0;
      const std::vector<double> upstream{1, bad, 1};
      CHECK(std::abs(
                run(loss, x, g, {.row_weights = weights, .upstream = upstream, .values = values}) -
                (good[0] + good[2]) / 2) < 1e-14);
      for (int m = 0; m < 3; ++m)
        for (std::size_t i = 9; i < 18; ++i)
          CHECK(g.part[m][i] == 0);
    }
  triplets<double> none(0, 4), g(0, 4);
  CHECK(run(perdita::triplet_margin<double>(), none, g) == 0);
}

TEST_CASE("triplet_margin: call options, strides, 16 bits, threads", "[triplet][threads]") {
  const index n = 200, d = 19;
  const auto x = triplets<float>::normal(n, d, 1, 8);
  const perdita::triplet_margin<float> loss({.swap = true});
  triplets<float> g(n, d);
  const float value = run(loss, x, g, {.run_on = perdita::serial});
  CHECK(value_of(loss, x) == value);
  perdita::workspace memory;
  for (const std::size_t threads : {2U, 7U}) {
    const threads_executor pool(threads, task_order::shuffled);
    triplets<float> many(n, d);
    CHECK(run(loss, x, many, {.run_on = pool, .memory = &memory}) == value);
    for (int k = 0; k < 3; ++k)
      CHECK(many.part[k] == g.part[k]);
  }
  triplets<float> added(n, d), scaled(n, d);
  for (auto& p : added.part)
    p.assign(p.size(), 1);
  std::vector<float> upstream(static_cast<std::size_t>(n), 2), weights(upstream.size(), 3);
  run(loss, x, added, {.accumulate = true});
  run(loss, x, scaled, {.row_weights = weights, .upstream = upstream, .scale = 4});
  for (int k = 0; k < 3; ++k)
    for (std::size_t i = 0; i < g.part[k].size(); ++i) {
      REQUIRE(std::abs(added.part[k][i] - 1 - g.part[k][i]) <= 1.2e-7f);
      REQUIRE(std::abs(scaled.part[k][i] - 8 * g.part[k][i]) <= 1e-7f);
    }
  // Column by column, and as bfloat16.
  std::vector<float> turned(static_cast<std::size_t>(n * d)), result(turned.size());
  std::vector<perdita::bfloat16> half(turned.size());
  auto rounded = x;
  for (std::size_t i = 0; i < turned.size(); ++i) {
    const auto row = i / static_cast<std::size_t>(d), col = i % static_cast<std::size_t>(d);
    turned[col * static_cast<std::size_t>(n) + row] = x.part[0][i];
    half[i] = {perdita::core::narrow_bfloat16(x.part[0][i])};
    rounded.part[0][i] = perdita::core::widen_bfloat16(half[i].bits);
  }
  triplets<float> other(n, d);
  CHECK(loss(matrix_view<const float>(turned.data(), n, d, 1, n), x.view(1), x.view(2),
             matrix_view<float>(result.data(), n, d, 1, n), other.view(1), other.view(2)) == value);
  for (std::size_t i = 0; i < turned.size(); ++i) {
    const auto row = i / static_cast<std::size_t>(d), col = i % static_cast<std::size_t>(d);
    REQUIRE(result[col * static_cast<std::size_t>(n) + row] == g.part[0][i]);
  }
  CHECK(other.part[2] == g.part[2]);
  CHECK(loss(matrix_view<const perdita::bfloat16>(half.data(), n, d), x.view(1), x.view(2)) ==
        value_of(loss, rounded));
}

TEST_CASE("triplet_margin: bad input is refused, and nothing written", "[triplet]") {
  using Catch::Matchers::ContainsSubstring;
  using loss_type = perdita::triplet_margin<double>;
  CHECK_THROWS_WITH(loss_type({.margin = inf}), ContainsSubstring("margin is inf"));
  CHECK_THROWS_WITH(loss_type({.power = 0.5}), ContainsSubstring("power is 0.5"));
  CHECK_THROWS_WITH(loss_type({.power = nan}), ContainsSubstring("power is"));
  CHECK_THROWS_WITH(loss_type({.epsilon = -1}), ContainsSubstring("epsilon is -1"));
  CHECK_THROWS_WITH(loss_type({.reduction = static_cast<reduction>(9)}),
                    ContainsSubstring("reduction is 9"));
  const loss_type loss;
  auto x = triplets<double>::normal(3, 4, 1, 2);
  triplets<double> g(3, 4);
  std::vector<double> two(2, 5);
  const matrix_view<const double> shorter(x.part[0].data(), 2, 4), none(nullptr, 3, 4),
      narrow(x.part[0].data(), 3, 2);
  const auto refused = [&](auto a, auto p, auto n, const char* why) {
    CHECK_THROWS_WITH(loss(a, p, n, g.view(0), g.view(1), g.view(2)), ContainsSubstring(why));
  };
  refused(x.view(0), shorter, x.view(2), "rows of the positives is 2, expected 3");
  refused(x.view(0), x.view(1), shorter, "rows of the negatives is 2");
  refused(x.view(0), narrow, x.view(2), "columns of the positives is 2");
  refused(x.view(0), x.view(1), narrow, "columns of the negatives is 2");
  refused(none, x.view(1), x.view(2), "anchors is null");
  refused(x.view(0), none, x.view(2), "positives is null");
  refused(x.view(0), x.view(1), none, "negatives is null");
  CHECK_THROWS_WITH(run(loss, x, g, {.values = two}), ContainsSubstring("values is 2"));
  CHECK_THROWS_WITH(loss(x.view(0), x.view(1), x.view(2), g.view(0), g.view(0), g.view(2)),
                    ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(loss(x.view(0), x.view(1), x.view(2), g.view(0), g.view(1), x.view(0)),
                    ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(loss(x.view(0), x.view(1), x.view(2), g.view(0),
                         matrix_view<double>(two.data(), 1, 2), g.view(2)),
                    ContainsSubstring("rows of the positives' gradient is 1"));
  const matrix_view<double> empty(nullptr, 3, 0);
  CHECK_THROWS_WITH(loss(empty, empty, empty), ContainsSubstring("columns is 0"));
  for (const auto& p : g.part)
    CHECK(p == std::vector<double>(12, 0));
}

TEST_CASE("triplet_margin: what the mean divides by", "[triplet]") {
  const auto x = triplets<double>::normal(5, 9, 1, 8);
  check_normaliser<double>([&](perdita::reduction how, const perdita::call_options<double>& call) {
    triplets<double> g(5, 9);
    const double value =
        run(perdita::triplet_margin<double>({.margin = 5, .reduction = how}), x, g, call);
    return all_of(value, g.part[0], g.part[1], g.part[2]);
  });
}

} // namespace perdita_tests
