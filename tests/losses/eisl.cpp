// SPDX-License-Identifier: MIT

// EISL: formula sheet 11.2, against its definition in wide arithmetic, n-gram by n-gram.

#include <perdita/eisl.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

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
constexpr double undefined = std::numeric_limits<double>::quiet_NaN();
constexpr auto sum = perdita::reduction::sum;
std::size_t at(index n) { return static_cast<std::size_t>(n); }

template <class T> struct problem {
  index sequences, steps, classes, most;
  std::vector<T> scores;
  std::vector<int> targets, inputs, labels;
  T& x(index b, index t, index k) { return scores[at((b * steps + t) * classes + k)]; }
  T x(index b, index t, index k) const { return scores[at((b * steps + t) * classes + k)]; }
  int y(index b, index l) const { return targets[at(b * most + l)]; }
  matrix_view<const T> view() const { return {scores.data(), sequences * steps, classes}; }
  matrix_view<const int> target_view() const { return {targets.data(), sequences, most}; }
};
template <class T>
problem<T> make(index b, index s, index c, index most, double spread, double lead,
                std::uint64_t seed) {
  random_numbers random(seed);
  const auto below = [&](index n) {
    return static_cast<int>(random.below(static_cast<std::uint64_t>(n)));
  };
  problem<T> p{b, s, c, most, std::vector<T>(at(b * s * c)), {}, {}, {}};
  for (T& x : p.scores)
    x = static_cast<T>(random.uniform(-spread, spread));
  for (index i = 0; i < b * most; ++i)
    p.targets.push_back(below(c));
  for (index i = 0; i < b; ++i) {
    p.inputs.push_back(i == 0 ? static_cast<int>(s) : below(s + 1));
    p.labels.push_back(i == 0 ? static_cast<int>(most) : below(most + 1));
    for (index t = 0; t < std::min(s - 1, most); ++t) // one step late
      p.x(i, t + 1, p.y(i, t)) += static_cast<T>(lead);
    for (index l = p.labels.back(); l < most; ++l)
      p.targets[at(i * most + l)] = -100; // not looked at
  }
  return p;
}
/// Not Gumbel's, but as good: any numbers do.
double noise(index b, index n, index position, index ngram) {
  return std::sin(static_cast<double>(1 + b * 7 + n * 3 + position * 5 + ngram * 11));
}

template <class T> using options = typename perdita::eisl<T>::options;

struct expected {
  wide value = 0;
  std::vector<wide> gradient, sizes;
  wide size = 0; ///< what errors of the value are relative to
};
template <class T> expected define(const problem<T>& p, index b, const options<T>& o) {
  const index steps = p.inputs[at(b)], labels = p.labels[at(b)];
  expected e;
  e.gradient.resize(at(p.steps * p.classes));
  e.sizes = e.gradient;
  std::vector<std::vector<wide>> lp, d(at(steps), std::vector<wide>(at(p.classes))), d_size = d;
  std::vector<std::vector<bool>> floored;
  for (index t = 0; t < steps; ++t) {
    std::vector<wide> z;
    for (index k = 0; k < p.classes; ++k)
      z.push_back(p.x(b, t, k));
    const wide lse =
        o.log_probabilities ? wide(0) : log_sum_exp(z, [](std::size_t) { return true; });
    lp.emplace_back();
    floored.emplace_back();
    for (const wide& x : z) {
      floored.back().push_back(!(x - lse > wide(o.floor)));
      lp.back().push_back(larger(wide(x - lse), wide(o.floor)));
    }
  }
  for (std::size_t which = 0; which < o.sizes.size(); ++which) {
    const wide w = o.weights.empty() ? wide(1) / wide(static_cast<double>(o.sizes.size()))
                                     : wide(o.weights[which]);
    const index n = o.sizes[which] > 0 ? o.sizes[which] : o.sizes[which] + labels;
    if (n < 1 || n > steps || n > labels)
      continue;
    const wide ngrams = static_cast<double>(labels - n + 1), length = static_cast<double>(n),
               tau = o.temperature;
    for (index i = 0; i + n <= labels; ++i) {
      std::vector<wide> t, z;
      for (index s = 0; s + n <= steps; ++s) {
        wide mean = 0;
        for (index j = 0; j < n; ++j)
          mean += lp[at(s + j)][at(p.y(b, i + j))] / length;
        t.push_back(mean);
        z.push_back((mean + (o.noise ? wide(o.noise(b, n, s, i)) : wide(0))) / tau);
      }
      const wide lse = log_sum_exp(z, [](std::size_t) { return true; });
      wide mean = 0;
      for (std::size_t s = 0; s < t.size(); ++s)
        mean += exp(wide(z[s] - lse)) * t[s];
      e.value -= w / ngrams * mean;
      for (std::size_t s = 0; s < t.size(); ++s) {
        const wide q = exp(wide(z[s] - lse)), away = (t[s] - mean) / tau,
                   // q's error is z's, whose parts have the size of scores less their largest
            doubt = 1 + size_of(z[s]) + size_of(lse);
        const wide slope = -w / ngrams * q * (1 + away) / length,
                   size = size_of(wide(w / ngrams * q / length)) * (1 + size_of(away)) * doubt;
        e.size += size_of(wide(w / ngrams * q * t[s])) * doubt;
        for (index j = 0; j < n; ++j) {
          const auto y = at(p.y(b, i + j));
          if (floored[s + at(j)][y])
            continue;
          d[s + at(j)][y] += slope;
          d_size[s + at(j)][y] += size;
        }
      }
    }
  }
  for (index t = 0; t < steps; ++t)
    for (index k = 0; k < p.classes; ++k) {
      wide& g = e.gradient[at(t * p.classes + k)];
      wide& size = e.sizes[at(t * p.classes + k)];
      if (o.log_probabilities) {
        g = d[at(t)][at(k)];
        size = d_size[at(t)][at(k)];
        continue;
      }
      std::vector<wide> z;
      for (index j = 0; j < p.classes; ++j)
        z.push_back(p.x(b, t, j));
      const wide lse = log_sum_exp(z, [](std::size_t) { return true; }),
                 own = exp(wide(z[at(k)] - lse));
      wide rest = 0, rest_size = 0, others = 0, others_size = 0;
      for (index j = 0; j < p.classes; ++j)
        if (j != k) {
          const wide q = exp(wide(z[at(j)] - lse));
          rest += q;
          rest_size += q > 0 ? wide(q * (1 + size_of(wide(z[at(j)] - z[at(k)])))) : wide(0);
          others += d[at(t)][at(j)];
          others_size += d_size[at(t)][at(j)];
        }
      // d (1 − p) − p (the others' d): the digits of 1 − p count where p leads.
      g = d[at(t)][at(k)] * rest - own * others;
      size = own > 0 ? wide(d_size[at(t)][at(k)] * rest_size +
                            own * others_size * (1 + size_of(wide(z[at(k)] - lse))))
                     : d_size[at(t)][at(k)];
      if (own < 0.5)
        size += d_size[at(t)][at(k)];
    }
  return e;
}

template <class T> struct results {
  T value = 0;
  std::vector<T> gradient, values;
  explicit results(const problem<T>& p)
      : gradient(p.scores.size(), T(-77)), values(p.inputs.size(), T(-77)) {}
  bool operator==(const results& o) const {
    return std::memcmp(gradient.data(), o.gradient.data(), gradient.size() * sizeof(T)) == 0 &&
           std::memcmp(values.data(), o.values.data(), values.size() * sizeof(T)) == 0 &&
           std::memcmp(&value, &o.value, sizeof(T)) == 0;
  }
};
template <class T>
results<T> evaluate(const problem<T>& p, const options<T>& o, perdita::call_options<T> call = {}) {
  results<T> r(p);
  call.values = r.values;
  r.value = perdita::eisl<T>(o)(p.view(), p.target_view(), p.inputs, p.labels,
                                matrix_view<T>(r.gradient.data(), p.sequences * p.steps, p.classes),
                                call);
  return r;
}

/// `budget` epsilons of double, of what each number is the sum of; in float one more.
template <class T> void check(const problem<T>& p, const char* what, double budget, options<T> o) {
  o.reduction = sum;
  const results<T> r = evaluate(p, o);
  const wide epsilon = std::numeric_limits<double>::epsilon(),
             own = sizeof(T) == 4 ? wide(std::numeric_limits<T>::epsilon()) : wide(0),
             least = sizeof(T) == 4 ? wide(1e-37) : wide(1e-290);
  error_judge of_values, of_slopes;
  const auto judge = [&](error_judge& of, const wide& got, const wide& want, const wide& size) {
    if (got != want)
      of.within(size_of(wide(got - want)), 1,
                own * size_of(want) + budget * epsilon * size + least);
  };
  wide total = 0, total_size = 0;
  for (index b = 0; b < p.sequences; ++b) {
    const expected e = define(p, b, o);
    judge(of_values, r.values[at(b)], e.value, e.size);
    total += e.value;
    total_size += e.size;
    for (index i = 0; i < p.steps * p.classes; ++i)
      judge(of_slopes, r.gradient[at(b * p.steps * p.classes + i)], e.gradient[at(i)],
            e.sizes[at(i)]);
  }
  judge(of_values, r.value, total, total_size);
  report_accuracy<T>("eisl", what, in_allowances, of_values, of_slopes);
  INFO(what);
  CHECK(of_values.all_within());
  CHECK(of_slopes.all_within());
}

} // namespace

TEST_CASE("eisl: the formula sheet's numbers", "[eisl]") {
  const std::vector<double> x{.5, -1.2, 2, .1, 1, .3, -.7, .2, 0, .4, .1, -.5};
  const std::vector<double> want{0.0076520194, 0.00849950966, -0.0473387515, 0.0311872225,
                                 -0.23208296,  0.0777722605,  0.0487649346,  0.105545765,
                                 0.054686734,  -0.138275122,  0.0539693697,  0.0296190181};
  const std::vector<int> y{2, 0, 1}, three{3};
  std::vector<double> g(12);
  const double value =
      perdita::eisl<double>()(matrix_view(x.data(), 3, 4), matrix_view(y.data(), 1, 3), three,
                              three, matrix_view(g.data(), 3, 4));
  CHECK(std::abs(value - 0.982458367181) < 1e-11);
  for (std::size_t i = 0; i < 12; ++i)
    CHECK(std::abs(g[i] - want[i]) < 1e-9);
}

TEMPLATE_TEST_CASE("eisl: the definition", "[eisl]", float, double) {
  using T = TestType;
  const std::vector<index> all{1, 2, 3, 4, 0, -1};
  const auto seeded = [&](std::uint64_t seed) {
    check(make<T>(6, 9, 5, 7, 2, 0, seed), "ordinary", 8, options<T>{.sizes = all});
    check(make<T>(4, 5, 5, 9, 2, 0, seed), "short", 8, options<T>{.sizes = all});
    check(make<T>(4, 20, 33, 17, 2, 6, seed), "late", 8, options<T>{.sizes = {2, 3}});
    check(make<T>(4, 12, 6, 7, 1, 18, seed), "sure", 8, options<T>{.sizes = all});
    check(make<T>(4, 12, 6, 7, 60, 0, seed), "floored", 8, options<T>{.sizes = {1, 3}});
    check(make<T>(4, 12, 6, 7, 60, 0, seed), "deep", 8,
          options<T>{.sizes = {1, 3}, .floor = T(-1e4)});
    check(make<T>(6, 9, 5, 7, 2, 0, seed), "weights", 8,
          options<T>{.sizes = {1, 2}, .weights = {T(0.75), T(-2)}, .temperature = T(0.25)});
    check(make<T>(6, 9, 5, 7, 2, 0, seed), "noise", 8,
          options<T>{.sizes = {2, 3}, .temperature = T(2), .noise = noise});
    auto p = make<T>(6, 9, 5, 7, 2, 0, seed);
    for (T& v : p.scores)
      v -= T(3);
    check(p, "log p", 8, options<T>{.sizes = {1, 2}, .floor = T(-4), .log_probabilities = true});
    check(make<T>(3, 4, 1, 3, 2, 0, seed), "one class", 8, options<T>{.sizes = {1, 2}});
  };
  for (const std::uint64_t seed : {1U, 2U, 3U})
    seeded(seed);
}

TEST_CASE("eisl: the gradient of the definition is its derivative", "[eisl]") {
  for (const bool logs : {false, true}) {
    auto p = make<double>(1, 5, 4, 4, 1.5, 0, 11);
    if (logs)
      for (double& v : p.scores)
        v -= 2;
    const options<double> o{.sizes = {1, 2, 0},
                            .temperature = 0.5,
                            .floor = logs ? -2.5 : -20.0,
                            .log_probabilities = logs,
                            .noise = noise};
    const expected e = define(p, 0, o);
    for (std::size_t i = 0; i < p.scores.size(); ++i) {
      double& x = p.scores[i];
      const double home = x, h = 0x1p-20;
      x = home + h;
      const wide up = define(p, 0, o).value, high = x;
      x = home - h;
      const wide down = define(p, 0, o).value, low = x;
      x = home;
      CHECK(size_of(wide((up - down) / (high - low) - e.gradient[i])) < 1e-11);
    }
  }
}

TEMPLATE_TEST_CASE("eisl: one n-gram at one position is the mean cross-entropy; shifts cost little",
                   "[eisl]", float, double) {
  using T = TestType;
  auto p = make<T>(1, 6, 5, 6, 2, 0, 4);
  double ce = 0;
  for (index t = 0; t < 6; ++t) {
    double total = 0;
    for (index k = 0; k < 5; ++k)
      total += std::exp(static_cast<double>(p.x(0, t, k)));
    ce += (std::log(total) - static_cast<double>(p.x(0, t, p.y(0, t)))) / 6;
  }
  for (const index n : {6, 0})
    CHECK(std::abs(static_cast<double>(evaluate(p, {.sizes = {n}}).value) - ce) <=
          4 * static_cast<double>(std::numeric_limits<T>::epsilon()) * ce);
  CHECK(evaluate(p, {.sizes = {7}}).value == 0);
  CHECK(evaluate(p, {.sizes = {-6}}).value == 0);
  // The target said one step late: what cross-entropy counts in full.
  auto late = make<T>(1, 6, 9, 5, 0, 12, 5);
  for (index l = 0; l < 5; ++l)
    late.targets[at(l)] = static_cast<int>(l);
  std::fill(late.scores.begin(), late.scores.end(), T(0));
  for (index l = 0; l < 5; ++l)
    late.x(0, l + 1, l) = T(12);
  CHECK(evaluate(late, {.sizes = {2}}).value < T(0.01));
}

TEMPLATE_TEST_CASE("eisl: special scores, what is not read", "[eisl]", float, double) {
  using T = TestType;
  auto p = make<T>(3, 5, 4, 4, 1, 0, 6);
  p.inputs = {5, 3, 4};
  p.labels = {4, 3, 2};
  for (int& y : p.targets)
    y = y < 0 ? 1 : y;
  const auto clean = evaluate(p, {.reduction = sum});
  auto q = p;
  for (index b = 0; b < 3; ++b) {
    for (index i = p.inputs[at(b)] * 4; i < 20; ++i)
      q.scores[at(b * 20 + i)] = static_cast<T>(undefined);
    for (index l = p.labels[at(b)]; l < 4; ++l)
      q.targets[at(b * 4 + l)] = 1000;
  }
  CHECK(evaluate(q, {.reduction = sum}) == clean);
  for (const double bad : {undefined, inf}) {
    q = p;
    q.x(1, 1, 3) = static_cast<T>(bad);
    const auto r = evaluate(q, {.reduction = sum});
    CHECK(std::isnan(r.value));
    for (index b = 0; b < 3; ++b) {
      CHECK(std::isnan(r.values[at(b)]) == (b == 1));
      for (index i = 0; i < 20; ++i) {
        const T g = r.gradient[at(b * 20 + i)];
        CHECK((b == 1 && i < 12 ? std::isnan(g) : g == clean.gradient[at(b * 20 + i)]));
      }
    }
  }
  // Masked: the floor, and no gradient; a whole row of them too.
  q = p;
  for (index k = 0; k < 4; ++k)
    q.x(0, 2, k) = k % 2 ? T(-inf) : std::numeric_limits<T>::lowest();
  q.x(0, 3, q.y(0, 0)) = T(-inf);
  const auto r = evaluate(q, {.sizes = {1, 2}, .reduction = sum});
  CHECK(std::isfinite(r.value));
  for (index k = 0; k < 4 && sizeof(T) == 8; ++k)
    CHECK(r.gradient[at(2 * 4 + k)] == 0);
  CHECK(r.gradient[at(3 * 4 + q.y(0, 0))] == 0);
}

TEMPLATE_TEST_CASE("eisl: reductions, weights, accumulation, layouts, in place", "[eisl]", float,
                   double) {
  using T = TestType;
  const auto p = make<T>(4, 6, 5, 4, 2, 0, 9);
  const auto plain = evaluate(p, {.reduction = sum});
  const std::vector<T> weights{1, 0, T(0.5), 3}, upstream{2, 1, 1, -1};
  const double epsilon = static_cast<double>(std::numeric_limits<T>::epsilon());
  for (const double normaliser : {0.0, 10.0}) {
    const auto r = evaluate(
        p, {},
        {.row_weights = weights, .upstream = upstream, .scale = T(2), .normaliser = normaliser});
    const double share = 1 / (normaliser > 0 ? normaliser : 4.5);
    double value = 0;
    for (std::size_t b = 0; b < 4; ++b) {
      const double w = static_cast<double>(weights[b]),
                   factor = share * w * 2 * static_cast<double>(upstream[b]);
      value += w * share * static_cast<double>(plain.values[b]);
      for (std::size_t i = b * 30; i < b * 30 + 30; ++i)
        CHECK(std::abs(static_cast<double>(r.gradient[i]) -
                       factor * static_cast<double>(plain.gradient[i])) <=
              4 * epsilon * std::abs(factor));
    }
    CHECK(std::abs(static_cast<double>(r.value) - value) <= 8 * epsilon * value);
  }
  const perdita::eisl<T> eisl({.reduction = sum});
  auto twice = plain.gradient;
  eisl(p.view(), p.target_view(), p.inputs, p.labels, matrix_view<T>(twice.data(), 24, 5),
       {.accumulate = true});
  std::vector<T> moved(p.scores.size());
  for (index b = 0; b < 4; ++b)
    for (index t = 0; t < 6; ++t)
      for (index k = 0; k < 5; ++k)
        moved[at((t * 4 + b) * 5 + k)] = p.x(b, t, k);
  matrix_view<T> view(moved.data(), 24, 5, 20, 1);
  view.plane_rows = 6;
  view.plane_stride = 5;
  CHECK(eisl(view, p.target_view(), p.inputs, p.labels) == plain.value);
  CHECK(eisl(view, p.target_view(), p.inputs, p.labels, view) == plain.value);
  for (index r = 0; r < 24; ++r)
    for (index k = 0; k < 5; ++k) {
      CHECK(view(r, k) == plain.gradient[at(r * 5 + k)]);
      CHECK(std::abs(twice[at(r * 5 + k)] - 2 * plain.gradient[at(r * 5 + k)]) <=
            2 * std::numeric_limits<T>::epsilon());
    }
  // Threads.
  const auto many = make<T>(30, 6, 5, 4, 2, 0, 10);
  const auto one = evaluate(many, {.sizes = {1, 2}}, {.run_on = perdita::serial});
  const threads_executor pool(3, task_order::shuffled);
  CHECK(evaluate(many, {.sizes = {1, 2}}, {.run_on = pool}) == one);
}

TEST_CASE("eisl: bad input is refused, and nothing written", "[eisl]") {
  using Catch::Matchers::ContainsSubstring;
  auto p = make<float>(2, 3, 4, 3, 1, 0, 1);
  p.inputs = p.labels = {3, 3};
  p.targets = {0, 1, 2, 3, 0, 1};
  std::vector<float> g(24, -77), three(3), pair(2);
  const auto untouched = g;
  const perdita::eisl<float> eisl;
  const auto attempt = [&](const perdita::call_options<float>& call = {}) {
    eisl(p.view(), p.target_view(), p.inputs, p.labels, matrix_view(g.data(), 6, 4), call);
  };
  CHECK_THROWS_WITH(attempt({.values = three}), ContainsSubstring("values is 3"));
  CHECK_THROWS_WITH(attempt({.log_sum_exp = pair}), ContainsSubstring("by-product"));
  p.targets[4] = 4;
  CHECK_THROWS_WITH(attempt(), ContainsSubstring("targets[4] is 4, expected 0 to 3"));
  p.targets[4] = 1;
  p.inputs[1] = 4;
  CHECK_THROWS_WITH(attempt(), ContainsSubstring("input_lengths[1] is 4, expected 0 to 3"));
  p.inputs[1] = 3;
  p.labels[0] = -1;
  CHECK_THROWS_WITH(attempt(), ContainsSubstring("target_lengths[0] is -1"));
  p.labels = {3};
  CHECK_THROWS_WITH(attempt(), ContainsSubstring("target_lengths is 1"));
  using options = perdita::eisl<float>::options;
  for (const options& bad :
       {options{.sizes = {}}, options{.weights = {1, 2}}, options{.weights = {NAN}},
        options{.temperature = 0}, options{.temperature = NAN}, options{.floor = 0},
        options{.floor = -INFINITY}, options{.reduction = perdita::reduction(7)}})
    CHECK_THROWS_AS(perdita::eisl<float>(bad), std::invalid_argument);
  CHECK_THROWS_WITH(perdita::eisl<double>({.temperature = 1e-310}),
                    ContainsSubstring("whose inverse is finite"));
  CHECK(g == untouched);
  const problem<float> none{0, 5, 3, 2, {}, {}, {}, {}};
  CHECK(evaluate(none, {}).value == 0);
}

} // namespace perdita_tests
