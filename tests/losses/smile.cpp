// SPDX-License-Identifier: MIT

// SMILE: formula sheet 11.1, against its definition in wide arithmetic.

#include <perdita/smile.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <set>
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
  index sequences, steps, classes;
  std::vector<T> scores;
  std::vector<int> labels;
  T x(index r, index k) const { return scores[at(r * classes + k)]; }
  T& x(index r, index k) { return scores[at(r * classes + k)]; }
  matrix_view<const T> view() const { return {scores.data(), sequences * steps, classes}; }
  matrix_view<const int> label_view() const { return {labels.data(), sequences, steps}; }
};
template <class T>
problem<T> make(index b, index s, index c, double spread, double lead, std::uint64_t seed) {
  problem<T> p{b, s, c, std::vector<T>(at(b * s * c)), std::vector<int>(at(b * s))};
  random_numbers random(seed);
  for (T& x : p.scores)
    x = static_cast<T>(random.uniform(-spread, spread));
  for (index r = 0; r < b * s; ++r) {
    p.labels[at(r)] = static_cast<int>(random.below(static_cast<std::uint64_t>(c)));
    if (random.below(5) == 0)
      p.labels[at(r)] = -100;
    else
      p.x(r, p.labels[at(r)]) += static_cast<T>(lead);
  }
  return p;
}

struct expected {
  wide value = 0;
  std::vector<wide> gradient, sizes;
};
/// Cross-entropy of y among the classes that `in` holds, times share.
template <class T, class In>
void add(const problem<T>& p, index r, index y, const wide& share, In in, expected& e) {
  std::vector<wide> z;
  for (index k = 0; k < p.classes; ++k)
    z.push_back(p.x(r, k));
  const wide lse = log_sum_exp(z, in), target = z[at(y)];
  wide miss = 0;
  for (index k = 0; k < p.classes; ++k)
    if (in(at(k)) && k != y) {
      const wide q = exp(wide(z[at(k)] - lse));
      e.gradient[at(k)] += share * q;
      e.sizes[at(k)] += share * q;
      miss += q;
    }
  e.gradient[at(y)] -= share * miss;
  e.sizes[at(y)] += share * miss;
  e.value += share * (miss < 0.5 ? wide(-log1p(wide(-miss))) : wide(lse - target));
}
/// What tokens are compared with, besides their labels.
enum class among { own, others, given };
constexpr index subset_size = 7;
/// Classes for each sequence, some of them twice.
template <class T> std::vector<int> subsets(const problem<T>& p) {
  random_numbers random(static_cast<std::uint64_t>(p.classes));
  std::vector<int> all(at(p.sequences * subset_size));
  for (int& k : all)
    k = static_cast<int>(random.below(static_cast<std::uint64_t>(p.classes)));
  return all;
}
template <class T>
expected define(const problem<T>& p, index r, double likelihood, bool whole_first, among kind) {
  expected e;
  e.gradient.resize(at(p.classes));
  e.sizes = e.gradient;
  const int y = p.labels[at(r)];
  if (y == -100)
    return e;
  const index first = r / p.steps * p.steps;
  std::set<int> own(p.labels.begin() + first, p.labels.begin() + first + p.steps);
  if (kind == among::given) {
    const auto all = subsets(p);
    const auto from = all.begin() + r / p.steps * subset_size;
    own = {from, from + subset_size};
  }
  const bool whole = whole_first && r == first;
  const wide all = whole ? wide(1) : wide(likelihood);
  if (all > 0)
    add(
        p, r, y, all, [](std::size_t) { return true; }, e);
  if (all < 1)
    add(
        p, r, y, wide(1 - all),
        [&](std::size_t k) {
          return (own.count(static_cast<int>(k)) > 0) != (kind == among::others) || k == at(y);
        },
        e);
  return e;
}

template <class T> struct results {
  T value = 0;
  std::vector<T> gradient, values;
  explicit results(const problem<T>& p)
      : gradient(p.scores.size(), T(-77)), values(p.labels.size(), T(-77)) {}
  bool operator==(const results& o) const {
    return std::memcmp(gradient.data(), o.gradient.data(), gradient.size() * sizeof(T)) == 0 &&
           std::memcmp(values.data(), o.values.data(), values.size() * sizeof(T)) == 0 &&
           std::memcmp(&value, &o.value, sizeof(T)) == 0;
  }
};
template <class T>
results<T> evaluate(const problem<T>& p, const typename perdita::smile<T>::options& options,
                    perdita::call_options<T> call = {}, among kind = among::own) {
  results<T> r(p);
  call.values = r.values;
  const perdita::smile<T> smile(options);
  const matrix_view<T> gradient(r.gradient.data(), p.sequences * p.steps, p.classes);
  const auto given = subsets(p);
  if (kind == among::given)
    r.value =
        smile(p.view(),
              perdita::with_subsets(p.label_view(),
                                    matrix_view<const int>(given.data(), p.sequences, subset_size)),
              gradient, call);
  else
    r.value = smile(p.view(), p.label_view(), gradient, call);
  return r;
}

/// In epsilons: of the value, and of what each slope is the sum of.
template <class T> void check(const problem<T>& p, const char* what, double budget) {
  const wide epsilon = std::numeric_limits<T>::epsilon(),
             least = sizeof(T) == 4 ? wide(1e-37) : wide(1e-290);
  wide worst_value = 0, worst_gradient = 0;
  for (const double likelihood : {0.0, 0.0078125, 1.0})
    for (const int choice : {0, 1, 2, 3, 4, 5}) {
      const bool whole_first = choice % 2 == 1;
      const auto kind = static_cast<among>(choice / 2);
      const auto r = evaluate(
          p,
          {.likelihood = static_cast<T>(likelihood),
           .whole_first = whole_first,
           .among = kind == among::others ? perdita::smile_set::others : perdita::smile_set::own,
           .reduction = sum},
          {}, kind);
      const auto judge = [&](wide& worst, const wide& got, const wide& want, const wide& size) {
        const wide error = size_of(wide(got - want));
        if (!(error == 0))
          worst = worse(worst, error / (epsilon * size + least));
      };
      wide total = 0;
      for (index row = 0; row < p.sequences * p.steps; ++row) {
        const expected e = define(p, row, likelihood, whole_first, kind);
        total += e.value;
        judge(worst_value, r.values[at(row)], e.value, e.value);
        for (index k = 0; k < p.classes; ++k)
          judge(worst_gradient, r.gradient[at(row * p.classes + k)], e.gradient[at(k)],
                e.sizes[at(k)]);
      }
      judge(worst_value, r.value, total, total);
    }
  report_accuracy<T>("smile", what, in_epsilons_of_terms,
                     {static_cast<double>(worst_value), static_cast<double>(worst_gradient),
                      static_cast<double>(larger(worst_value, worst_gradient)) / budget});
  INFO(what);
  CHECK(worst_value <= budget);
  CHECK(worst_gradient <= budget);
}

} // namespace

TEMPLATE_TEST_CASE("smile: the definition", "[smile]", float, double) {
  using T = TestType;
  const bool narrow = sizeof(T) == 4;
  for (const index classes : {1, 2, 7, 8, 9, 100}) {
    const auto seed = static_cast<std::uint64_t>(classes);
    check(make<T>(3, 6, classes, 3, 0, seed), "ordinary", narrow ? 1 : 12);
    check(make<T>(3, 6, classes, 1, 20, seed), "sure", narrow ? 1 : 40);
    check(make<T>(3, 6, classes, 200, 0, seed), "spread 200", narrow ? 1 : 600);
    check(make<T>(3, 6, classes, 1e30, 0, seed), "huge", narrow ? 1 : 8);
    check(make<T>(2, 40, classes, 3, 2, seed), "long", narrow ? 1 : 16);
  }
}

TEMPLATE_TEST_CASE("smile: never more than cross-entropy, the same among all, 0 among one",
                   "[smile]", float, double) {
  using T = TestType;
  auto p = make<T>(4, 5, 9, 3, 0, 3);
  const auto smile = evaluate(p, {.reduction = sum}), all = evaluate(p, {.likelihood = 1});
  for (std::size_t r = 0; r < p.labels.size(); ++r)
    CHECK(smile.values[r] <= all.values[r]);
  p = make<T>(1, 9, 6, 3, 0, 3);
  p.labels = {0, 1, 2, 3, 4, 5, 0, 1, 2};
  const auto few = evaluate(p, {.whole_first = false}), whole = evaluate(p, {.likelihood = 1});
  CHECK(few == whole);
  std::fill(p.labels.begin(), p.labels.end(), 3);
  p.labels[4] = -100;
  const auto one = evaluate(p, {.whole_first = false});
  CHECK(one.value == 0);
  CHECK(one.gradient == std::vector<T>(p.scores.size(), T(0)));
}

TEMPLATE_TEST_CASE("smile: special scores", "[smile]", float, double) {
  using T = TestType;
  problem<T> p{1, 3, 4, std::vector<T>(12, T(1)), {0, 1, 0}};
  const auto row = [&](const results<T>& r, index t, std::vector<double> want) {
    for (index k = 0; k < 4; ++k)
      if (std::isnan(want[at(k)]))
        CHECK(std::isnan(r.gradient[at(t * 4 + k)]));
      else
        CHECK(std::abs(static_cast<double>(r.gradient[at(t * 4 + k)]) - want[at(k)]) < 1e-6);
  };
  p.x(1, 3) = static_cast<T>(undefined); // not in A
  p.x(2, 0) = T(-inf);                   // the label
  auto r = evaluate(p, {.reduction = sum});
  row(r, 0, {-0.75, 0.25, 0.25, 0.25});
  row(r, 1, {0.5, -0.5, 0, 0});
  row(r, 2, {-1, 1, 0, 0});
  CHECK(std::isfinite(r.values[1]));
  CHECK(r.values[2] == T(inf));
  p.x(2, 1) = T(-inf);
  row(evaluate(p, {.reduction = sum}), 2, {-1, 0, 0, 0});
  for (const double bad : {undefined, inf}) {
    p.x(2, 1) = static_cast<T>(bad);
    r = evaluate(p, {.reduction = sum});
    row(r, 0, {-0.75, 0.25, 0.25, 0.25});
    row(r, 1, {0.5, -0.5, 0, 0});
    row(r, 2, {undefined, undefined, 0, 0});
    CHECK(std::isnan(r.values[2]));
    CHECK(std::isnan(r.value));
    // Among the others, which the label 1 of this sequence is none of
    p.x(2, 1) = 1;
    p.x(2, 2) = static_cast<T>(bad);
    r = evaluate(p, {.among = perdita::smile_set::others, .reduction = sum});
    row(r, 2, {undefined, 0, undefined, undefined});
    CHECK(std::isnan(r.values[2]));
    p.x(2, 2) = 1;
  }
}

TEMPLATE_TEST_CASE("smile: reductions, weights, accumulation, layouts", "[smile]", float, double) {
  using T = TestType;
  auto p = make<T>(3, 4, 5, 2, 0, 8);
  p.labels = {0, 1, 2, 1, 3, -100, -100, -100, 4, 4, 0, -100};
  const auto plain = evaluate(p, {.reduction = sum});
  std::vector<T> weights{1, 2, 0, T(0.5), 1, 7, 7, 7, 3, 1, 1, 7}, upstream(12, T(2));
  double denominator = 0, value = 0;
  for (std::size_t i = 0; i < 12; ++i)
    if (p.labels[i] >= 0) {
      denominator += static_cast<double>(weights[i]);
      value += static_cast<double>(weights[i]) * static_cast<double>(plain.values[i]);
    }
  const double slack = 16 * static_cast<double>(std::numeric_limits<T>::epsilon());
  for (std::size_t k = 0; k < 5; ++k)
    p.scores[2 * 5 + k] = p.scores[5 * 5 + k] = static_cast<T>(undefined); // rows not read
  for (const double normaliser : {0.0, 2.0}) {
    const auto r = evaluate(
        p, {},
        {.row_weights = weights, .upstream = upstream, .scale = T(3), .normaliser = normaliser});
    const double d = normaliser > 0 ? normaliser : denominator;
    CHECK(std::abs(static_cast<double>(r.value) - value / d) <= slack * value);
    for (std::size_t i = 0; i < r.gradient.size(); ++i) {
      const double factor = p.labels[i / 5] < 0 ? 0 : static_cast<double>(weights[i / 5]) * 6 / d;
      CHECK(std::abs(static_cast<double>(r.gradient[i]) -
                     factor * static_cast<double>(plain.gradient[i])) <= slack * (1 + factor));
    }
  }
  // In place, steps first, labels in columns; then added.
  p = make<T>(3, 4, 5, 2, 0, 8);
  const auto want = evaluate(p, {});
  std::vector<T> moved(60);
  std::vector<std::int64_t> labels(12);
  for (index b = 0; b < 3; ++b)
    for (index t = 0; t < 4; ++t) {
      labels[at(t * 3 + b)] = p.labels[at(b * 4 + t)];
      for (index k = 0; k < 5; ++k)
        moved[at((t * 3 + b) * 5 + k)] = p.x(b * 4 + t, k);
    }
  matrix_view<T> view(moved.data(), 12, 5, 15, 1);
  view.plane_rows = 4;
  view.plane_stride = 5;
  const perdita::smile<T> smile;
  const matrix_view<std::int64_t> in_columns(labels.data(), 3, 4, 1, 3);
  CHECK(smile(view, in_columns) == want.value);
  CHECK(smile(view, in_columns, view) == want.value);
  auto twice = want.gradient;
  smile(p.view(), p.label_view(), matrix_view<T>(twice.data(), 12, 5), {.accumulate = true});
  for (index r = 0; r < 12; ++r)
    for (index k = 0; k < 5; ++k) {
      CHECK(view(r, k) == want.gradient[at(r * 5 + k)]);
      CHECK(twice[at(r * 5 + k)] == 2 * want.gradient[at(r * 5 + k)]);
    }
}

TEST_CASE("smile: bad input is refused, and nothing written", "[smile]") {
  using Catch::Matchers::ContainsSubstring;
  auto p = make<float>(2, 3, 4, 1, 0, 1);
  std::vector<float> g(24, -77), two(2);
  const auto untouched = g;
  const perdita::smile<float> smile;
  const auto attempt = [&](const perdita::call_options<float>& call = {}) {
    smile(p.view(), p.label_view(), matrix_view(g.data(), 6, 4), call);
  };
  CHECK_THROWS_WITH(attempt({.row_weights = two}), ContainsSubstring("row_weights is 2"));
  CHECK_THROWS_WITH(attempt({.log_sum_exp = g}), ContainsSubstring("log_sum_exp is 24"));
  p.labels[4] = 4;
  CHECK_THROWS_WITH(attempt(), ContainsSubstring("labels[4] is 4, expected 0 to 3"));
  p.labels[4] = -1;
  CHECK_THROWS_WITH(attempt(), ContainsSubstring("labels[4] is -1"));
  p.labels[4] = 1;
  CHECK_THROWS_WITH(smile(p.view(), matrix_view(p.labels.data(), 1, 5)),
                    ContainsSubstring("score rows is 6, expected 5"));
  CHECK_THROWS_WITH(smile(p.view(), p.label_view(), matrix_view(g.data(), 6, 3)),
                    ContainsSubstring("gradient columns is 3"));
  const auto among = [&](std::vector<int> classes, index rows) {
    smile(p.view(),
          perdita::with_subsets(
              p.label_view(),
              matrix_view(classes.data(), rows, static_cast<index>(classes.size()) / rows)),
          matrix_view(g.data(), 6, 4));
  };
  CHECK_THROWS_WITH(among({0, 1, 2, 4}, 2), ContainsSubstring("subsets[3] is 4, expected 0 to 3"));
  CHECK_THROWS_WITH(among({0, 1, 2, -1}, 2), ContainsSubstring("subsets[3] is -1"));
  CHECK_THROWS_WITH(among({0, 1, 2}, 1), ContainsSubstring("subset rows is 1"));
  CHECK_THROWS_AS(perdita::smile<float>({.among = perdita::smile_set(2)}), std::invalid_argument);
  CHECK_THROWS_AS(perdita::smile<float>({.likelihood = 1.5F}), std::invalid_argument);
  CHECK_THROWS_AS(perdita::smile<float>({.likelihood = -0.5F}), std::invalid_argument);
  CHECK(g == untouched);
  const problem<float> none{0, 5, 3, {}, {}};
  CHECK(evaluate(none, {}).value == 0);
}

TEMPLATE_TEST_CASE("smile: the same bits for any number of threads", "[smile][threads]", float,
                   double) {
  using T = TestType;
  const auto p = make<T>(40, 7, 11, 3, 0, 31);
  const auto one = evaluate(p, {.likelihood = T(0.25)}, {.run_on = perdita::serial});
  perdita::workspace memory;
  for (const std::size_t n : {2U, 7U}) {
    const threads_executor pool(n, task_order::shuffled);
    CHECK(evaluate(p, {.likelihood = T(0.25)}, {.run_on = pool, .memory = &memory}) == one);
  }
}

} // namespace perdita_tests
