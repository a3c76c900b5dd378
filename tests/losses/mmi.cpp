// SPDX-License-Identifier: MIT

// MMI objectives: formula sheet 11.4, against their definition in wide arithmetic.

#include <perdita/mmi.hpp>

#include <cmath>
#include <cstdint>
#include <limits>
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

constexpr auto sum = perdita::reduction::sum;
std::size_t at(index n) { return static_cast<std::size_t>(n); }

/// Scores of one model, and their labels.
template <class T> struct model {
  index sequences, steps, classes;
  std::vector<T> scores;
  std::vector<int> labels;
  matrix_view<const T> view() const { return {scores.data(), sequences * steps, classes}; }
  matrix_view<const int> label_view() const { return {labels.data(), sequences, steps}; }
};
template <class T>
model<T> make(index b, index s, index c, double spread, double lead, std::uint64_t seed) {
  model<T> m{b, s, c, std::vector<T>(at(b * s * c)), std::vector<int>(at(b * s))};
  random_numbers random(seed);
  for (T& x : m.scores)
    x = static_cast<T>(random.uniform(-spread, spread));
  for (index r = 0; r < b * s; ++r) {
    int& y = m.labels[at(r)];
    y = static_cast<int>(random.below(static_cast<std::uint64_t>(c)));
    m.scores[at(r * c + y)] += static_cast<T>(lead);
    if (random.below(4) == 0)
      y = -100;
  }
  return m;
}

/// weight · Σ cross-entropies of the first tokens of sequence b; what rounding is relative to; and
/// the gradient.
struct expected {
  wide value = 0, size = 0;
  std::vector<wide> gradient, sizes;
};
template <class T>
void add(const model<T>& m, index b, const wide& weight, index first, expected& e) {
  e.gradient.assign(at(m.steps * m.classes), 0);
  e.sizes = e.gradient;
  index said = 0;
  for (index t = 0; t < m.steps; ++t) {
    const int y = m.labels[at(b * m.steps + t)];
    if (y < 0 || said++ >= first)
      continue;
    std::vector<wide> z;
    for (index k = 0; k < m.classes; ++k)
      z.push_back(m.scores[at((b * m.steps + t) * m.classes + k)]);
    const wide lse = log_sum_exp(z, [](std::size_t) { return true; });
    wide miss = 0, miss_size = 0;
    for (index k = 0; k < m.classes; ++k) {
      if (k == y)
        continue;
      const wide p = exp(wide(z[at(k)] - lse)),
                 size = p * (1 + size_of(wide(z[at(k)] - lse)) + size_of(wide(z[at(y)] - lse)));
      e.gradient[at(t * m.classes + k)] = weight * p;
      e.sizes[at(t * m.classes + k)] = size_of(wide(weight * size));
      miss += p;
      miss_size += size;
    }
    e.gradient[at(t * m.classes + y)] = -weight * miss;
    e.sizes[at(t * m.classes + y)] = size_of(wide(weight * miss_size));
    const wide ce = miss < 0.5 ? wide(-log1p(wide(-miss))) : wide(lse - z[at(y)]);
    e.value += weight * ce;
    e.size += size_of(wide(weight * larger(ce, miss_size)));
  }
}
template <class T> index tokens(const model<T>& m, index b) {
  index n = 0;
  for (index t = 0; t < m.steps; ++t)
    n += m.labels[at(b * m.steps + t)] >= 0;
  return n;
}

template <class T> struct results {
  T value = 0;
  std::vector<T> one, two, values;
  results(const model<T>& x, const model<T>& z)
      : one(x.scores.size(), T(-77)), two(z.scores.size(), T(-77)),
        values(at(x.sequences), T(-77)) {}
  matrix_view<T> first(const model<T>& x) { return {one.data(), x.sequences * x.steps, x.classes}; }
  matrix_view<T> second(const model<T>& z) {
    return {two.data(), z.sequences * z.steps, z.classes};
  }
  bool operator==(const results&) const = default;
};

/// Eight epsilons of double of what each number is made of, in float one of the result.
template <class T>
void judge(error_judge& of, const wide& got, const wide& want, const wide& size) {
  const wide own = sizeof(T) == 4 ? wide(std::numeric_limits<T>::epsilon()) : wide(0);
  CHECK(of.within(size_of(wide(got - want)), 1,
                  own * size_of(want) + 8 * wide(std::numeric_limits<double>::epsilon()) * size +
                      (sizeof(T) == 4 ? wide(1e-37) : wide(1e-298))));
}
template <class T>
void compare(const char* loss, const results<T>& r, const model<T>& x, const model<T>& z,
             const wide& weight, const wide& other, index first, double reward) {
  error_judge of_values, of_slopes;
  wide total = 0, total_size = 0;
  for (index b = 0; b < x.sequences; ++b) {
    expected one, two;
    add(x, b, weight, std::numeric_limits<index>::max(), one);
    add(z, b, other, first, two);
    const wide bonus = reward * static_cast<double>(tokens(x, b)),
               value = one.value + two.value - bonus, size = one.size + two.size + size_of(bonus);
    judge<T>(of_values, r.values[at(b)], value, size);
    total += value;
    total_size += size;
    for (std::size_t i = 0; i < one.gradient.size(); ++i)
      judge<T>(of_slopes, r.one[at(b) * one.gradient.size() + i], one.gradient[i], one.sizes[i]);
    for (std::size_t i = 0; i < two.gradient.size(); ++i)
      judge<T>(of_slopes, r.two[at(b) * two.gradient.size() + i], two.gradient[i], two.sizes[i]);
  }
  judge<T>(of_values, r.value, total, total_size);
  report_accuracy<T>(loss, "", in_allowances, of_values, of_slopes);
}

template <class T>
results<T> anti_lm(const model<T>& x, const model<T>& z,
                   const typename perdita::mmi_anti_lm<T>::options& o,
                   perdita::call_options<T> call = {}) {
  results<T> r(x, z);
  call.values = r.values;
  r.value =
      perdita::mmi_anti_lm<T>(o)(x.view(), z.view(), x.label_view(), r.first(x), r.second(z), call);
  return r;
}

} // namespace

TEMPLATE_TEST_CASE("mmi_anti_lm: the definition", "[mmi]", float, double) {
  using T = TestType;
  for (const double lead : {0.0, 20.0})
    for (const index classes : {1, 5, 9, 33}) {
      const auto x = make<T>(4, 7, classes, 3, lead, 1);
      auto z = make<T>(4, 7, classes, 3, lead / 2, 2);
      z.labels = x.labels;
      for (const double penalty : {0.0, 0.25, 1.5})
        for (const index first : {0, 3, 100})
          compare("mmi_anti_lm",
                  anti_lm(x, z,
                          {.penalty = static_cast<T>(penalty),
                           .penalised = first,
                           .length_reward = T(0.125),
                           .reduction = sum}),
                  x, z, 1, -penalty, first, 0.125);
    }
}

TEMPLATE_TEST_CASE("mmi_bidirectional: the definition", "[mmi]", float, double) {
  using T = TestType;
  const auto x = make<T>(4, 7, 5, 3, 0, 3), z = make<T>(4, 3, 11, 3, 5, 4);
  for (const double share : {0.0, 0.25, 1.0}) {
    results<T> r(x, z);
    r.value = perdita::mmi_bidirectional<T>(
        {.backward = static_cast<T>(share), .length_reward = T(-0.5), .reduction = sum})(
        x.view(), x.label_view(), perdita::scored_labels(z.view(), z.label_view()), r.first(x),
        r.second(z), {.values = r.values});
    compare("mmi_bidirectional", r, x, z, 1 - share, share, 100, -0.5);
    CHECK(perdita::mmi_bidirectional<T>(
              {.backward = static_cast<T>(share), .length_reward = T(-0.5), .reduction = sum})(
              x.view(), x.label_view(), perdita::scored_labels(z.view(), z.label_view())) ==
          r.value);
  }
}

TEST_CASE("mmi: the gradient of the definition is its derivative", "[mmi]") {
  auto x = make<double>(1, 4, 3, 2, 0, 7);
  expected e, other;
  add(x, 0, wide(-0.75), 2, e);
  for (std::size_t i = 0; i < x.scores.size(); ++i) {
    const double home = x.scores[i], h = 0x1p-20;
    other = {};
    x.scores[i] = home + h;
    add(x, 0, wide(-0.75), 2, other);
    const wide up = other.value, high = x.scores[i];
    other = {};
    x.scores[i] = home - h;
    add(x, 0, wide(-0.75), 2, other);
    CHECK(size_of(wide((up - other.value) / (high - wide(x.scores[i])) - e.gradient[i])) < 1e-11);
    x.scores[i] = home;
  }
}

TEMPLATE_TEST_CASE("mmi_anti_lm: options of a call, one gradient, threads, special scores", "[mmi]",
                   float, double) {
  using T = TestType;
  auto x = make<T>(6, 4, 5, 2, 0, 5), z = make<T>(6, 4, 5, 2, 0, 6);
  z.labels = x.labels;
  const auto plain = anti_lm(x, z, {.penalty = T(0.5), .reduction = sum});
  const std::vector<T> weights{1, 0, 2, T(0.5), 4, 1}, upstream{1, 2, T(-0.5), 8, 1, 1};
  const auto r = anti_lm(x, z, {.penalty = T(0.5)},
                         {.row_weights = weights, .upstream = upstream, .scale = T(3)});
  const double epsilon = static_cast<double>(std::numeric_limits<T>::epsilon());
  double value = 0;
  for (std::size_t b = 0; b < 6; ++b) {
    const double w = static_cast<double>(weights[b]) / 8.5,
                 factor = 3 * w * static_cast<double>(upstream[b]);
    value += w * static_cast<double>(plain.values[b]);
    for (std::size_t i = b * 20; i < b * 20 + 20; ++i) {
      CHECK(std::abs(static_cast<double>(r.one[i]) - factor * static_cast<double>(plain.one[i])) <=
            4 * epsilon * std::abs(factor));
      CHECK(std::abs(static_cast<double>(r.two[i]) - factor * static_cast<double>(plain.two[i])) <=
            4 * epsilon * std::abs(factor));
    }
  }
  CHECK(std::abs(static_cast<double>(r.value) - value) <= 16 * epsilon * (1 + std::abs(value)));
  const perdita::mmi_anti_lm<T> mmi({.penalty = T(0.5), .reduction = sum});
  auto g = plain.one;
  CHECK(mmi(x.view(), z.view(), x.label_view(), matrix_view<T>(g.data(), 24, 5),
            {.accumulate = true}) == plain.value);
  for (std::size_t i = 0; i < g.size(); ++i)
    CHECK(g[i] == 2 * plain.one[i]);
  const threads_executor pool(3, task_order::shuffled);
  CHECK(anti_lm(x, z, {.penalty = T(0.5), .reduction = sum}, {.run_on = pool}) == plain);
  // In place.
  auto q = x;
  CHECK(mmi(q.view(), z.view(), q.label_view(), matrix_view<T>(q.scores.data(), 24, 5)) ==
        plain.value);
  CHECK(q.scores == plain.one);
  // Of ignored tokens nothing is read; what is no number stays in its token and its sequence.
  q = x;
  q.labels = std::vector<int>(24, 1);
  q.labels[2] = -100;
  z.labels = q.labels;
  for (std::size_t k = 0; k < 5; ++k)
    q.scores[2 * 5 + k] = z.scores[2 * 5 + k] = std::numeric_limits<T>::quiet_NaN();
  CHECK(std::isfinite(anti_lm(q, z, {}).value));
  q.scores[7 * 5] = std::numeric_limits<T>::infinity();
  const auto bad = anti_lm(q, z, {});
  for (std::size_t i = 0; i < 120; ++i)
    CHECK(std::isnan(bad.one[i]) == (i / 5 == 7));
  for (std::size_t b = 0; b < 6; ++b)
    CHECK(std::isnan(bad.values[b]) == (b == 1));
  q.scores[7 * 5] = 0;
  q.scores[7 * 5 + 1] = -std::numeric_limits<T>::infinity();
  CHECK(anti_lm(q, z, {}).values[1] == std::numeric_limits<T>::infinity());
}

TEST_CASE("mmi: bad input is refused, and nothing written", "[mmi]") {
  using Catch::Matchers::ContainsSubstring;
  auto x = make<float>(2, 3, 4, 1, 0, 1);
  const auto z = x;
  std::vector<float> g(24, -77), h(24, -77), three(3);
  const auto untouched = g;
  const perdita::mmi_anti_lm<float> mmi;
  const auto attempt = [&](float* d, float* e, const perdita::call_options<float>& call = {}) {
    mmi(x.view(), z.view(), x.label_view(), matrix_view(d, 6, 4), matrix_view(e, 6, 4), call);
  };
  attempt(h.data(), std::vector<float>(24).data());
  h = untouched;
  CHECK_THROWS_WITH(attempt(g.data(), g.data() + 3), ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(attempt(g.data(), x.scores.data()), ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(attempt(g.data(), h.data(), {.values = three}),
                    ContainsSubstring("values is 3"));
  x.labels[4] = 4;
  CHECK_THROWS_WITH(attempt(g.data(), h.data()), ContainsSubstring("labels[4] is 4, expected 0"));
  x.labels[4] = 0;
  CHECK_THROWS_WITH(mmi(x.view(), z.view(), matrix_view(x.labels.data(), 1, 5)),
                    ContainsSubstring("score rows is 6"));
  CHECK_THROWS_WITH(perdita::mmi_bidirectional<float>()(
                        x.view(), x.label_view(),
                        perdita::scored_labels(matrix_view(z.scores.data(), 6, 4),
                                               matrix_view(z.labels.data(), 3, 2))),
                    ContainsSubstring("rows of the backward labels is 3"));
  CHECK_THROWS_AS(perdita::mmi_anti_lm<float>({.penalty = -1}), std::invalid_argument);
  CHECK_THROWS_AS(perdita::mmi_anti_lm<float>({.penalised = -1}), std::invalid_argument);
  CHECK_THROWS_AS(perdita::mmi_anti_lm<float>({.length_reward = INFINITY}), std::invalid_argument);
  CHECK_THROWS_AS(perdita::mmi_bidirectional<float>({.backward = 1.5F}), std::invalid_argument);
  CHECK(g == untouched);
  CHECK(h == untouched);
  const model<float> none{0, 5, 3, {}, {}};
  CHECK(anti_lm(none, none, {}).value == 0);
}

TEST_CASE("mmi: what the mean divides by", "[mmi]") {
  const auto x = make<double>(6, 4, 5, 2, 0, 5);
  auto z = make<double>(6, 4, 5, 2, 0, 6);
  z.labels = x.labels;
  check_normaliser<double>([&](perdita::reduction how, const perdita::call_options<double>& call) {
    const auto r = anti_lm(x, z, {.penalty = 0.5, .reduction = how}, call);
    return all_of(r.value, r.one, r.two);
  });
  check_normaliser<double>([&](perdita::reduction how, const perdita::call_options<double>& call) {
    results<double> r(x, z);
    r.value = perdita::mmi_bidirectional<double>({.backward = 0.25, .reduction = how})(
        x.view(), x.label_view(), perdita::scored_labels(z.view(), z.label_view()), r.first(x),
        r.second(z), call);
    return all_of(r.value, r.one, r.two);
  });
}

} // namespace perdita_tests
