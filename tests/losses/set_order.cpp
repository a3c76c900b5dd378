// SPDX-License-Identifier: MIT

// Order search: formula sheet 11.3. Sets against all their orderings, in wide arithmetic.

#include <perdita/set_order.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

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
using perdita::orderings;

constexpr auto sum = perdita::reduction::sum;
std::size_t at(index n) { return static_cast<std::size_t>(n); }

/// `budget` epsilons of double of what a number is made of, in float one of the result.
template <class T>
void near(error_judge& of, const wide& got, const wide& want, const wide& size, double budget) {
  const wide own = sizeof(T) == 4 ? wide(std::numeric_limits<T>::epsilon()) : wide(0);
  if (got == want)
    return;
  CHECK(of.within(size_of(wide(got - want)), 1,
                  own * size_of(want) +
                      budget * wide(std::numeric_limits<double>::epsilon()) * size +
                      (sizeof(T) == 4 ? wide(1e-37) : wide(1e-298))));
}

template <class T> struct problem {
  index sets, positions, classes, most;
  std::vector<T> scores;
  std::vector<int> items, sizes;
  T x(index b, index t, index k) const { return scores[at((b * positions + t) * classes + k)]; }
  T& x(index b, index t, index k) { return scores[at((b * positions + t) * classes + k)]; }
  int y(index b, index i) const { return items[at(b * most + i)]; }
  matrix_view<const T> view() const { return {scores.data(), sets * positions, classes}; }
  matrix_view<const int> item_view() const { return {items.data(), sets, most}; }
};
template <class T>
problem<T> make(index sets, index positions, index classes, index most, double spread,
                std::uint64_t seed) {
  problem<T> p{sets, positions, classes, most, {}, {}, {}};
  random_numbers random(seed);
  for (index i = 0; i < sets * positions * classes; ++i)
    p.scores.push_back(static_cast<T>(random.uniform(-spread, spread)));
  for (index i = 0; i < sets * most; ++i)
    p.items.push_back(static_cast<int>(random.below(static_cast<std::uint64_t>(classes))));
  for (index b = 0; b < sets; ++b)
    p.sizes.push_back(b == 0
                          ? static_cast<int>(most)
                          : static_cast<int>(random.below(static_cast<std::uint64_t>(most + 1))));
  return p;
}

template <class T> wide cross_entropy(const problem<T>& p, index b, index t, int y) {
  std::vector<wide> z;
  for (index k = 0; k < p.classes; ++k)
    z.push_back(wide(p.x(b, t, k)) - wide(p.x(b, t, y)));
  return log_sum_exp(z, [](std::size_t) { return true; });
}
/// Position t's item in the best of all orderings.
template <class T> std::vector<int> best_order(const problem<T>& p, index b) {
  std::vector<int> order(p.items.begin() + b * p.most,
                         p.items.begin() + b * p.most + p.sizes[at(b)]),
      best = order;
  std::sort(order.begin(), order.end());
  wide least = infinity();
  do {
    wide cost = 0;
    for (std::size_t t = 0; t < order.size(); ++t)
      cost += cross_entropy(p, b, static_cast<index>(t), order[t]);
    if (cost < least)
      least = cost, best = order;
  } while (std::next_permutation(order.begin(), order.end()));
  return best;
}

template <class T> struct results {
  T value = 0;
  std::vector<T> gradient, values;
  bool operator==(const results&) const = default;
};
template <class T>
results<T> evaluate(const problem<T>& p, perdita::reduction reduction = sum,
                    perdita::call_options<T> call = {}) {
  results<T> r{0, std::vector<T>(p.scores.size(), T(-77)), std::vector<T>(at(p.sets), T(-77))};
  call.values = r.values;
  r.value = perdita::set_cross_entropy<T>({reduction})(
      p.view(), p.item_view(), p.sizes,
      matrix_view<T>(r.gradient.data(), p.sets * p.positions, p.classes), call);
  return r;
}

} // namespace

TEMPLATE_TEST_CASE("set_cross_entropy: all orders, one by one", "[set_order]", float, double) {
  using T = TestType;
  error_judge of_values, of_slopes;
  for (const std::uint64_t seed : {1U, 2U, 3U})
    for (const double spread : {0.5, 4.0, 60.0}) {
      const auto p = make<T>(12, 6, 9, 5, spread, seed);
      const auto r = evaluate(p);
      std::vector<int> ordered(p.items.size(), -5);
      perdita::set_cross_entropy<T>().order(p.view(), p.item_view(), p.sizes,
                                            matrix_view(ordered.data(), p.sets, p.most));
      for (index b = 0; b < p.sets; ++b) {
        const auto order = best_order(p, b);
        wide value = 0;
        for (index t = 0; t < p.positions; ++t) {
          const bool counts = t < p.sizes[at(b)];
          if (t < p.most)
            CHECK(ordered[at(b * p.most + t)] == (counts ? order[at(t)] : -5));
          if (counts)
            value += cross_entropy(p, b, t, order[at(t)]);
          for (index k = 0; k < p.classes; ++k) {
            const T g = r.gradient[at((b * p.positions + t) * p.classes + k)];
            if (!counts) {
              CHECK(g == 0);
              continue;
            }
            const wide share = exp(wide(-cross_entropy(p, b, t, static_cast<int>(k))));
            const bool own = k == order[at(t)];
            near<T>(of_slopes, g, own ? wide(share - 1) : share, own ? wide(1) : share, 8 + spread);
          }
        }
        near<T>(of_values, r.values[at(b)], value, wide(value + 1e-30), 8 + 2 * spread);
      }
    }
  report_accuracy<T>("set_cross_entropy", "", in_allowances, of_values, of_slopes);
}

TEMPLATE_TEST_CASE("set_cross_entropy: large sets come back from any order", "[set_order]", float,
                   double) {
  using T = TestType;
  problem<T> p{1, 60, 60, 60, std::vector<T>(3600), std::vector<int>(60), {60}};
  random_numbers random(5);
  std::iota(p.items.begin(), p.items.end(), 0);
  std::vector<int> hidden = p.items;
  for (std::size_t i = 59; i > 0; --i)
    std::swap(hidden[i], hidden[random.below(i + 1)]);
  for (index t = 0; t < 60; ++t)
    for (index k = 0; k < 60; ++k) // the best of the whole, though not of each position
      p.x(0, t, k) = static_cast<T>(
          -std::abs(static_cast<double>(hidden[at(t)]) - 20.25 - static_cast<double>(k)) *
          std::abs(static_cast<double>(hidden[at(t)]) - 20.25 - static_cast<double>(k)));
  std::vector<int> ordered(60);
  perdita::set_cross_entropy<T>().order(p.view(), p.item_view(), p.sizes,
                                        matrix_view(ordered.data(), 1, 60));
  CHECK(ordered == hidden); // Monge: convex costs, so the order of the rows is that of the columns
}

TEMPLATE_TEST_CASE("set_cross_entropy: special scores, call options, threads", "[set_order]", float,
                   double) {
  using T = TestType;
  const T minus = -std::numeric_limits<T>::infinity();
  auto p = make<T>(4, 4, 5, 4, 2, 8);
  p.sizes = {4, 3, 0, 2};
  const auto plain = evaluate(p);
  const std::vector<T> weights{1, 0, 2, T(0.5)}, upstream{2, 1, 1, -1};
  const auto r = evaluate(p, perdita::reduction::mean,
                          {.row_weights = weights, .upstream = upstream, .scale = T(2)});
  const double epsilon = static_cast<double>(std::numeric_limits<T>::epsilon());
  double value = 0;
  for (std::size_t b = 0; b < 4; ++b) {
    const double w = static_cast<double>(weights[b]) / 3.5,
                 factor = 2 * w * static_cast<double>(upstream[b]);
    value += w * static_cast<double>(plain.values[b]);
    for (std::size_t i = b * 20; i < b * 20 + 20; ++i)
      CHECK(std::abs(static_cast<double>(r.gradient[i]) -
                     factor * static_cast<double>(plain.gradient[i])) <=
            4 * epsilon * std::abs(factor));
  }
  CHECK(std::abs(static_cast<double>(r.value) - value) <= 8 * epsilon * value);
  auto twice = p.scores; // in place, then added
  const perdita::set_cross_entropy<T> loss({sum});
  CHECK(loss(p.view(), p.item_view(), p.sizes) == plain.value);
  CHECK(loss(matrix_view<T>(twice.data(), 16, 5), p.item_view(), p.sizes,
             matrix_view<T>(twice.data(), 16, 5)) == plain.value);
  CHECK(twice == plain.gradient);
  loss(p.view(), p.item_view(), p.sizes, matrix_view<T>(twice.data(), 16, 5), {.accumulate = true});
  for (std::size_t i = 0; i < twice.size(); ++i)
    CHECK(twice[i] == 2 * plain.gradient[i]);
  const threads_executor pool(3, task_order::shuffled);
  CHECK(evaluate(p, sum, {.run_on = pool}) == plain);
  // A masked item is put where it is not masked; where there is no such place, +inf.
  problem<T> q{1, 2, 3, 2, {0, minus, 5, 9, 1, 0}, {0, 1}, {2}};
  const auto kept = evaluate(q);
  CHECK(std::isfinite(kept.value));
  CHECK(kept.gradient[3 + 1] < 0);
  q.x(0, 1, 1) = minus;
  CHECK(evaluate(q).value == -minus);
  auto bad = p;
  bad.x(1, 2, 4) = std::numeric_limits<T>::quiet_NaN();
  bad.x(3, 3, 0) = std::numeric_limits<T>::quiet_NaN(); // not read
  const auto s = evaluate(bad);
  CHECK(std::isnan(s.value));
  for (index b = 0; b < 4; ++b) {
    CHECK(std::isnan(s.values[at(b)]) == (b == 1));
    for (index i = 0; i < 20; ++i)
      CHECK((b == 1 && i < 15 ? std::isnan(s.gradient[at(b * 20 + i)])
                              : s.gradient[at(b * 20 + i)] == plain.gradient[at(b * 20 + i)]));
  }
}

TEMPLATE_TEST_CASE("order_search: the definition", "[set_order]", float, double) {
  using T = TestType;
  random_numbers random(7);
  error_judge of_values, of_slopes;
  for (const index n : {1, 2, 6, 24, 120})
    for (const double spread : {1.0, 30.0, 900.0}) {
      std::vector<T> l(at(3 * n)), g(l.size()), values(3);
      for (T& x : l)
        x = static_cast<T>(random.uniform(-spread, 0));
      for (const orderings kind : {orderings::best, orderings::any, orderings::all}) {
        const T value = perdita::order_search<T>({.kind = kind, .reduction = sum})(
            matrix_view<const T>(l.data(), 3, n), matrix_view<T>(g.data(), 3, n),
            {.values = values});
        wide total = 0;
        for (index r = 0; r < 3; ++r) {
          const std::vector<wide> z(l.begin() + r * n, l.begin() + (r + 1) * n);
          const auto best = std::max_element(z.begin(), z.end()) - z.begin();
          const wide lse = log_sum_exp(z, [](std::size_t) { return true; }),
                     mean = std::accumulate(z.begin(), z.end(), wide(0)) / static_cast<double>(n),
                     want = -(kind == orderings::best  ? z[at(best)]
                              : kind == orderings::any ? lse
                                                       : mean);
          near<T>(of_values, values[at(r)], want, wide(size_of(want) + size_of(z[at(best)]) + 1),
                  4);
          total += want;
          for (index j = 0; j < n; ++j) {
            const wide slope = kind == orderings::best  ? wide(j == best ? -1 : 0)
                               : kind == orderings::any ? wide(-exp(wide(z[at(j)] - lse)))
                                                        : wide(-1 / wide(static_cast<double>(n)));
            near<T>(of_slopes, g[at(r * n + j)], slope, size_of(slope), 8 + 2 * spread);
          }
        }
        near<T>(of_values, value, total, wide(size_of(total) + 3 * spread + 3), 4);
      }
    }
  report_accuracy<T>("order_search", "", in_allowances, of_values, of_slopes);
}

TEMPLATE_TEST_CASE("order_search: special values, weights, none", "[set_order]", float, double) {
  using T = TestType;
  const T minus = -std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const std::vector<T> l{minus, -2, minus, minus, nan, -1, -3, -3};
  for (const orderings kind : {orderings::best, orderings::any, orderings::all}) {
    std::vector<T> g(8), values(4);
    perdita::order_search<T>({.kind = kind})(matrix_view(l.data(), 4, 2),
                                             matrix_view(g.data(), 4, 2), {.values = values});
    CHECK(values[0] == (kind == orderings::all ? -minus : T(2)));
    CHECK(g[1] == (kind == orderings::all ? T(-0.125) : T(-0.25)));
    CHECK(values[1] == -minus);
    CHECK(std::isnan(values[2]));
    CHECK((std::isnan(g[4]) && std::isnan(g[5])));
    CHECK(g[6] == (kind == orderings::best ? T(-0.25) : T(-0.125)));
    CHECK(g[7] == (kind == orderings::best ? T(0) : T(-0.125)));
  }
  const std::vector<T> weights{0, 0, 0, 2};
  std::vector<T> g(8, T(1));
  CHECK(perdita::order_search<T>()(matrix_view(l.data(), 4, 2), matrix_view(g.data(), 4, 2),
                                   {.row_weights = weights, .accumulate = true}) == 3);
  CHECK(g == std::vector<T>{1, 1, 1, 1, 1, 1, 0, 1});
  CHECK(perdita::order_search<T>()(matrix_view<const T>(nullptr, 3, 0)) == 0);
}

TEST_CASE("set_order: bad input is refused, and nothing written", "[set_order]") {
  using Catch::Matchers::ContainsSubstring;
  auto p = make<float>(2, 3, 4, 3, 1, 1);
  p.sizes = {3, 2};
  std::vector<float> g(24, -77), three(3);
  const auto untouched = g;
  const perdita::set_cross_entropy<float> loss;
  const auto attempt = [&](const perdita::call_options<float>& call = {}) {
    loss(p.view(), p.item_view(), p.sizes, matrix_view(g.data(), 6, 4), call);
  };
  CHECK_THROWS_WITH(attempt({.values = three}), ContainsSubstring("values is 3"));
  p.items[1] = 4;
  CHECK_THROWS_WITH(attempt(), ContainsSubstring("items[1] is 4, expected 0 to 3"));
  p.items[1] = 0;
  p.sizes[1] = 4;
  CHECK_THROWS_WITH(attempt(), ContainsSubstring("sizes[1] is 4, expected 0 to 3"));
  p.sizes = {3};
  CHECK_THROWS_WITH(attempt(), ContainsSubstring("sizes is 1"));
  p.sizes = {3, 2};
  std::vector<int> out(6);
  CHECK_THROWS_WITH(loss.order(p.view(), p.item_view(), p.sizes, matrix_view(out.data(), 3, 2)),
                    ContainsSubstring("rows of the ordered items is 3"));
  const auto refused = [&](const perdita::call_options<float>& call, const char* message) {
    CHECK_THROWS_WITH(
        loss.order(p.view(), p.item_view(), p.sizes, matrix_view(out.data(), 2, 3), call),
        ContainsSubstring(message));
    CHECK(out == std::vector<int>(6, -7));
  };
  std::fill(out.begin(), out.end(), -7);
  const std::vector<float> two(2, 1.0F);
  std::vector<float> by_product(2);
  refused({.row_weights = two}, "set_cross_entropy: row_weights is given, expected none");
  refused({.upstream = two}, "set_cross_entropy: upstream is given, expected none");
  refused({.normaliser = 2}, "set_cross_entropy: normaliser is 2, expected 0");
  refused({.values = by_product}, "set_cross_entropy: values is given, expected none");
  refused({.log_sum_exp = by_product}, "a by-product that it does not have");
  CHECK_THROWS_WITH(perdita::order_search<float>()(p.view(), matrix_view(g.data(), 6, 3)),
                    ContainsSubstring("gradient columns is 3"));
  CHECK_THROWS_AS(perdita::order_search<float>({.kind = orderings(3)}), std::invalid_argument);
  CHECK(g == untouched);
}

TEST_CASE("order_search: slopes upstream, and what the mean divides by", "[set_order]") {
  const std::vector<double> l{-1, -2, -3, -1}, upstream{3, -1};
  std::vector<double> g(4);
  CHECK(perdita::order_search<double>()(matrix_view(l.data(), 2, 2), matrix_view(g.data(), 2, 2),
                                        {.upstream = upstream, .scale = 2, .normaliser = 4}) ==
        0.5);
  CHECK(g == std::vector<double>{-1.5, 0, 0, 0.5});
}

TEST_CASE("set_cross_entropy: what the mean divides by", "[set_order]") {
  const auto p = make<double>(4, 4, 5, 4, 2, 8);
  check_normaliser<double>([&](perdita::reduction how, const perdita::call_options<double>& call) {
    const auto r = evaluate(p, how, call);
    return all_of(r.value, r.gradient);
  });
}

} // namespace perdita_tests
