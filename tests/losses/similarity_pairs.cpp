// SPDX-License-Identifier: MIT

// Losses of an anchor's similarities with its positives and negatives.

#include <perdita/circle.hpp>
#include <perdita/multi_similarity.hpp>

#include <algorithm>

#include "support/anchors.hpp"

namespace perdita_tests {
namespace {

using perdita::index;

/// Σ e^{f(s)} of an anchor's scores with this relation that `keep` keeps; 0 of none.
template <class F, class Keep>
wide images(const wide_comparisons& c, index i, int which, F f, Keep keep) {
  wide sum = 0;
  for (index j = 0; j < c.candidates(); ++j)
    if (c.of(i, j) == which && keep(j))
      sum += exp(wide(f(j)));
  return sum;
}

wide multi_similarity(const wide_comparisons& c, const perdita::multi_similarity_options& o) {
  wide total = 0;
  for (index i = 0; i < c.anchors(); ++i) {
    const auto score = [&](index j) { return c.score(i, j); };
    const auto distinct = [&](index j) { return !o.mining || score(j) < 1 - o.duplicate; };
    wide least = infinity(), most = -infinity();
    for (index j = 0; j < c.candidates(); ++j) {
      if (c.of(i, j) == 1 && distinct(j))
        least = smaller(least, score(j));
      if (c.of(i, j) == -1)
        most = larger(most, score(j));
    }
    const wide positive = images(
        c, i, 1, [&](index j) { return wide(-o.alpha * (score(j) - o.base)); },
        [&](index j) { return distinct(j) && (!o.mining || score(j) - o.margin < most); });
    const wide negative = images(
        c, i, -1, [&](index j) { return wide(o.beta * (score(j) - o.base)); },
        [&](index j) { return !o.mining || score(j) + o.margin > least; });
    if (!o.mining || (positive > 0 && negative > 0))
      total += log1p(positive) / o.alpha + log1p(negative) / o.beta;
  }
  return total / wide(static_cast<double>(c.anchors()));
}

/// `alone`: of all pairs, those with i < j.
wide circle(const wide_comparisons& c, const wide_comparisons& held, double m, double gamma,
            bool batch, bool alone) {
  wide total = 0, all_positive = 0, all_negative = 0;
  int anchors = 0;
  for (index i = 0; i < c.anchors(); ++i) {
    const auto counts = [&](index j) { return !(alone && j < i); };
    const wide positive = images(
        c, i, 1,
        [&](index j) {
          const wide weight = larger(wide(1 + m - held.score(i, j)), 0);
          return wide(-gamma * weight * (c.score(i, j) - 1 + m));
        },
        counts);
    const wide negative = images(
        c, i, -1,
        [&](index j) {
          const wide weight = larger(wide(held.score(i, j) + m), 0);
          return wide(gamma * weight * (c.score(i, j) - m));
        },
        counts);
    all_positive += positive;
    all_negative += negative;
    if (positive > 0 && negative > 0) {
      total += log1p(wide(positive * negative));
      ++anchors;
    }
  }
  if (batch)
    return log1p(wide(all_positive * all_negative));
  return anchors > 0 ? wide(total / anchors) : wide(0);
}

template <class T, perdita::circle_group Group>
void check_circle(bool constant, const std::string& name) {
  constants held;
  const bool batch = Group == perdita::circle_group::batch;
  check_anchor_values<T>(
      name, perdita::circle<T, Group>({.margin = 0.25, .gamma = 16, .constant_weights = constant}),
      {.value_budget = 64, .gradient_budget = 256}, [&](const wide_comparisons& c) {
        return circle(c, constant ? held.of(c) : c, 0.25, 16, batch,
                      batch && c.anchors() == c.candidates());
      });
}

} // namespace

TEMPLATE_TEST_CASE("Multi-similarity and circle are their definitions", "", float, double) {
  using T = TestType;
  for (const bool mining : {false, true}) {
    const perdita::multi_similarity_options o{
        .alpha = 3, .beta = 20, .base = 0.4, .mining = mining};
    check_anchor_values<T>("multi_similarity", perdita::multi_similarity<T>(o),
                           {.value_budget = 32, .gradient_budget = 128},
                           [&](const wide_comparisons& c) { return multi_similarity(c, o); });
  }
  for (const bool constant : {true, false}) {
    check_circle<T, perdita::circle_group::anchor>(constant, "circle");
    check_circle<T, perdita::circle_group::batch>(constant, "circle, of the batch");
  }
}

TEST_CASE("Multi-similarity and circle: calls", "") {
  check_anchor_calls(perdita::multi_similarity<double>());
  check_anchor_calls(perdita::multi_similarity<double>({.mining = true}));
  check_anchor_calls(perdita::circle<double>({.gamma = 2}));
  check_anchor_calls(perdita::circle<float, perdita::circle_group::batch>({.gamma = 2}));
}

TEST_CASE("Multi-similarity and circle are the formula sheet's", "") {
  const auto x = sheet_x();
  const std::vector<int> labels{0, 0, 1, 1, 2, 2};
  batch<double> g(6, 4);
  CHECK(
      near(perdita::multi_similarity<double>()(x.view(), labels, g.view()), 0.781309721269, 5e-9));
  CHECK(near(length_of(g.x), 0.466500323, 5e-9));
  const perdita::circle<double, perdita::circle_group::batch> circle({.gamma = 16});
  CHECK(near(circle(x.view(), labels, g.view()), 33.0902760834, 5e-9));
  CHECK(near(length_of(g.x), 24.7633594, 5e-9));
}

TEST_CASE("Multi-similarity and circle: what has a stated result", "") {
  const batch<double> equal(6, 3, 2.0), zero(6, 3), one(1, 3, 1.0);
  batch<double> g(6, 3), of_one(1, 3);
  const std::vector<int> same(6, 1), apart{1, 2, 3, 4, 5, 6}, twos{1, 2, 3, 1, 2, 3}, single{1};
  const auto expect = [&](const auto& loss, const batch<double>& x, const std::vector<int>& labels,
                          double value) {
    CHECK(near(loss(x.view(), labels, g.view()), value, 1e-14));
    CHECK(near(loss(x.view(), labels), value, 1e-14));
    const bool level = x.x[0] != 0; // 0 has no gradient at all
    for (const double slope : g.x)
      CHECK(std::abs(slope) <= (level ? 1e-12 : 0));
  };
  const perdita::multi_similarity<double> pairs;
  const auto positives = [](int n, double s) { return std::log1p(n * std::exp(1 - 2 * s)) / 2; };
  const auto negatives = [](int n, double s) { return std::log1p(n * std::exp(50 * s - 25)) / 50; };
  expect(pairs, equal, twos, positives(1, 1) + negatives(4, 1));
  expect(pairs, equal, same, positives(5, 1));
  expect(pairs, equal, apart, negatives(5, 1));
  expect(pairs, zero, twos, positives(1, 0) + negatives(4, 0));
  CHECK(pairs(one.view(), single, of_one.view()) == 0);
  const perdita::multi_similarity<double> mined({.mining = true});
  expect(mined, equal, twos, 0); // duplicates are no positives
  expect(mined, equal, same, 0);
  expect(mined, equal, apart, 0);
  expect(mined, zero, twos, positives(1, 0) + negatives(4, 0));
  CHECK(mined(one.view(), single) == 0);
  auto spoilt = equal;
  spoilt(2, 0) = std::numeric_limits<double>::quiet_NaN();
  CHECK(std::isnan(mined(spoilt.view(), twos)));

  const perdita::circle<double> circle({.gamma = 4});
  const perdita::circle<double, perdita::circle_group::batch> whole({.gamma = 4});
  const auto both = [](int n, double s) { // log of n pairs' images
    return std::log(n) + 4 * (s + 0.25) * (s - 0.25) - 4 * (1.25 - s) * (s - 0.75);
  };
  expect(circle, equal, twos, std::log1p(std::exp(both(4, 1))));
  expect(circle, zero, twos, std::log1p(std::exp(both(4, 0))));
  expect(whole, equal, twos, std::log1p(std::exp(both(3 * 12, 1)))); // 3 and 12 pairs
  expect(whole, zero, twos, std::log1p(std::exp(both(3 * 12, 0))));
  for (const auto& labels : {same, apart}) {
    expect(circle, equal, labels, 0);
    expect(whole, equal, labels, 0);
  }
  CHECK(circle(one.view(), single) == 0);
  CHECK(whole(one.view(), single, of_one.view()) == 0);
  CHECK(of_one.x == std::vector<double>(3, 0.0));

  using Catch::Matchers::ContainsSubstring;
  CHECK_THROWS_WITH(perdita::circle<double>({.gamma = 0}), ContainsSubstring("gamma is 0"));
  CHECK_THROWS_WITH(perdita::multi_similarity<double>({.beta = -1}),
                    ContainsSubstring("beta is -1"));
}

} // namespace perdita_tests
