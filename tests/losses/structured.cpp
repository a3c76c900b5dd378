// SPDX-License-Identifier: MIT

// Lifted structure, N-pairs, ranked lists and threshold-consistent margins.

#include <perdita/lifted_structure.hpp>
#include <perdita/n_pairs.hpp>
#include <perdita/ranked_list.hpp>
#include <perdita/tcm.hpp>

#include "support/anchors.hpp"

namespace perdita_tests {
namespace {

using perdita::index;
using perdita::lifted_terms;

const std::vector<int> sheet_labels{0, 0, 1, 1, 2, 2};

/// Both ends' negatives where candidates are the anchors; otherwise the anchor's.
wide lifted_pairs(const wide_comparisons& c, double margin) {
  const bool alone = c.anchors() == c.candidates();
  wide total = 0;
  int terms = 0;
  for (index i = 0; i < c.anchors(); ++i)
    for (index j = 0; j < c.candidates(); ++j) {
      if (c.of(i, j) != 1)
        continue;
      ++terms;
      wide sum = 0;
      for (index k = 0; k < c.candidates(); ++k) {
        if (c.of(i, k) == -1)
          sum += exp(wide(margin - c.score(i, k)));
        if (alone && c.of(j, k) == -1)
          sum += exp(wide(margin - c.score(j, k)));
      }
      const wide hinge = sum > 0 ? larger(0, log(sum) + c.score(i, j)) : wide(0);
      total += hinge * hinge / 2;
    }
  return terms > 0 ? wide(total / terms) : wide(0);
}
wide lifted_anchors(const wide_comparisons& c, double margin) {
  wide total = 0;
  int anchors = 0;
  for (index i = 0; i < c.anchors(); ++i) {
    wide own = 0, others = 0;
    for (index j = 0; j < c.candidates(); ++j) {
      if (c.of(i, j) == 1)
        own += exp(c.score(i, j));
      if (c.of(i, j) == -1)
        others += exp(wide(margin - c.score(i, j)));
    }
    if (own > 0 && others > 0) {
      ++anchors;
      total += larger(0, log(own) + log(others));
    }
  }
  return anchors > 0 ? wide(total / anchors) : wide(0);
}

/// `weights`: what the weights are made of, where they are constants.
wide ranked_list(const wide_comparisons& c, const wide_comparisons& weights,
                 const perdita::ranked_list_options& o) {
  wide total = 0;
  for (index i = 0; i < c.anchors(); ++i) {
    wide sum[2] = {0, 0}, all[2] = {0, 0};
    for (index j = 0; j < c.candidates(); ++j) {
      if (c.of(i, j) == 0)
        continue;
      const int k = c.of(i, j) == 1 ? 0 : 1;
      const auto hinge = [&](const wide& d) {
        return k == 0 ? wide(d - (wide(o.boundary) - wide(o.margin))) : wide(o.boundary - d);
      };
      const wide h = hinge(c.score(i, j)), base = hinge(weights.score(i, j));
      if (base <= 0)
        continue;
      const wide w = exp(wide((k == 0 ? o.positive_temperature : o.negative_temperature) * base));
      sum[k] += w * h;
      all[k] += w;
    }
    for (int k = 0; k < 2; ++k)
      if (all[k] > 0)
        total += (k == 0 ? 1 - wide(o.balance) : wide(o.balance)) * sum[k] / all[k];
  }
  return total / static_cast<double>(c.anchors());
}

wide tcm(const wide_comparisons& c, const perdita::tcm_options& o) {
  wide sum[2] = {0, 0};
  int count[2] = {0, 0};
  for (index i = 0; i < c.anchors(); ++i)
    for (index j = 0; j < c.candidates(); ++j) {
      const int r = c.of(i, j);
      const wide h = r == 1 ? wide(o.positive_margin - c.score(i, j))
                            : wide(c.score(i, j) - o.negative_margin);
      if (r == 0 || h < 0)
        continue;
      sum[r == 1 ? 0 : 1] += h;
      ++count[r == 1 ? 0 : 1];
    }
  wide total = 0;
  if (count[0] > 0)
    total += o.positive_factor * sum[0] / count[0];
  if (count[1] > 0)
    total += o.negative_factor * sum[1] / count[1];
  return total;
}

template <class T, class Loss>
void check_empty_sets(const Loss& loss, T of_equal_rows, T of_zero_rows) {
  batch<T> equal(6, 3, T(0.7)), zero(6, 3), g(6, 3, T(9));
  const std::vector<int> labels{0, 0, 1, 1, 2, 2}, apart{0, 1, 2, 3, 4, 5};
  const auto flat = [&] {
    for (const T slope : g.x)
      if (!(std::abs(slope) < T(1e-6)))
        return false;
    return true;
  };
  CHECK(near(static_cast<double>(loss(equal.view(), labels, g.view())),
             static_cast<double>(of_equal_rows), 1e-6));
  CHECK(flat());
  CHECK(near(static_cast<double>(loss(zero.view(), labels, g.view())),
             static_cast<double>(of_zero_rows), 1e-6));
  CHECK(flat());
  const batch<T> one(1, 3, T(1));
  batch<T> g1(1, 3, T(9));
  CHECK(loss(one.view(), std::vector<int>{4}, g1.view()) == 0);
  CHECK(g1.x == std::vector<T>(3, T(0)));
}

} // namespace

TEMPLATE_TEST_CASE("Lifted structure is its definition", "", float, double) {
  for (const bool normalise : {true, false})
    for (const int classes : {1, 4, 30})
      for (const auto terms : {lifted_terms::pairs, lifted_terms::anchors}) {
        const perdita::lifted_structure<TestType> loss(
            {.margin = 1, .terms = terms, .normalise = normalise});
        const anchor_subject subject{
            .normalise = normalise, .distances = true, .value_budget = 8, .gradient_budget = 16};
        check_anchor_values<TestType>(
            "lifted_structure", loss, subject,
            [&](const wide_comparisons& c) {
              return terms == lifted_terms::pairs ? lifted_pairs(c, 1) : lifted_anchors(c, 1);
            },
            8, 12, 3, classes);
      }
}

TEST_CASE("Lifted structure: golden value, hinges at rest, weights of both ends", "") {
  const auto x = sheet_x();
  batch<double> g(6, 4);
  const perdita::lifted_structure<double> loss({.normalise = false});
  CHECK(near(loss(x.view(), sheet_labels, g.view()), 5.11812894778, 1e-11));
  CHECK(near(length_of(g.x), 2.13353316, 1e-8));
  CHECK(perdita::lifted_structure<double>({.margin = -9})(x.view(), sheet_labels, g.view()) == 0);
  CHECK(g.x == std::vector<double>(24, 0.0));

  // A pair counts by half for each of its ends, whatever weights and slopes upstream they have.
  const std::vector<double> weights{0, 2, 1, 3, 0.5, 0}, upstream{5, 1, 2, 1, 1, 7};
  const std::vector<double> ones(6, 1.0);
  std::vector<double> factor(6), values(6);
  for (std::size_t i = 0; i < 6; ++i)
    factor[i] = weights[i] * upstream[i];
  const double value = loss(x.view(), sheet_labels, g.view(),
                            {.row_weights = weights, .upstream = upstream, .values = values});
  double sum = 0;
  for (const double v : values)
    sum += v / 6.5;
  CHECK(near(value, sum, 1e-14));
  batch<double> moved = x;
  const auto report = perdita::testing::check_gradient(
      [&] { return loss(moved.view(), sheet_labels, {.row_weights = factor, .normaliser = 6.5}); },
      moved.x, g.x);
  INFO(report.message());
  CHECK(report.ok);
}

TEMPLATE_TEST_CASE("Ranked list is its definition", "", float, double) {
  for (const double temperature : {0.0, 10.0})
    for (const int classes : {1, 4, 30}) {
      const perdita::ranked_list_options o{.balance = 0.4,
                                           .positive_temperature = temperature / 4,
                                           .negative_temperature = temperature};
      check_anchor_values<TestType>(
          "ranked_list", perdita::ranked_list<TestType>(o),
          {.distances = true, .value_budget = 4, .gradient_budget = 40},
          [&](const wide_comparisons& c) { return ranked_list(c, c, o); }, 8, 12, 3, classes);
    }
  // Rows of the length √3 or so are as far apart as the boundary must be.
  const perdita::ranked_list_options raw{.margin = 1, .boundary = 2.5, .normalise = false};
  check_anchor_values<TestType>(
      "ranked_list", perdita::ranked_list<TestType>(raw),
      {.normalise = false, .distances = true, .value_budget = 4, .gradient_budget = 40},
      [&](const wide_comparisons& c) { return ranked_list(c, c, raw); }, 8, 12, 3, 4);
}

TEST_CASE("Ranked list with constant weights", "") {
  const auto x = random_batch<double>(9, 4, 3);
  std::vector<int> labels;
  for (int i = 0; i < 9; ++i)
    labels.push_back(i % 3);
  const perdita::ranked_list_options o{.positive_temperature = 3, .differentiate_weights = false};
  batch<double> g(9, 4);
  wide_matrix moved(x);
  const anchor_subject subject{.distances = true};
  const auto who = relations(labels, labels, true);
  const auto base = compare(moved, moved, who, subject);
  const double value = perdita::ranked_list<double>(o)(x.view(), labels, g.view());
  CHECK(near(value, static_cast<double>(ranked_list(base, base, o)), 1e-14));
  error_judge slopes;
  CHECK(slopes_within(
      slopes, g,
      differences(moved, [&] { return ranked_list(compare(moved, moved, who, subject), base, o); }),
      64));
}

TEMPLATE_TEST_CASE("Threshold-consistent margin is its definition", "", float, double) {
  for (const int classes : {1, 4, 30}) {
    const perdita::tcm_options o{.negative_margin = 0.1, .positive_factor = 2};
    check_anchor_values<TestType>(
        "tcm", perdita::tcm<TestType>(o), {.value_budget = 4, .gradient_budget = 8},
        [&](const wide_comparisons& c) { return tcm(c, o); }, 8, 12, 3, classes);
  }
  const perdita::tcm_options raw{.negative_margin = 0.1, .normalise = false};
  check_anchor_values<TestType>(
      "tcm", perdita::tcm<TestType>(raw),
      {.normalise = false, .value_budget = 4, .gradient_budget = 8},
      [&](const wide_comparisons& c) { return tcm(c, raw); }, 8, 12, 3, 4);
}

TEST_CASE("Threshold-consistent margin: golden value, kinks, sums", "") {
  const auto x = sheet_x();
  batch<double> g(6, 4);
  const perdita::tcm<double> loss({.negative_margin = 0.1});
  CHECK(near(loss(x.view(), sheet_labels, g.view()), 1.45171395083, 1e-11));
  CHECK(near(length_of(g.x), 0.619753916, 1e-8));
  // Cosines of 1 and 0 between two of three classes: at the kink they count, without a slope.
  batch<double> axes(4, 2), slopes(4, 2, 9);
  axes(0, 0) = axes(1, 0) = 1, axes(2, 1) = 1, axes(3, 0) = -1;
  const std::vector<int> labels{0, 0, 1, 2};
  CHECK(perdita::tcm<double>({.positive_margin = 1, .negative_margin = 0})(axes.view(), labels,
                                                                           slopes.view()) == 0);
  CHECK(slopes.x == std::vector<double>(8, 0.0));
  CHECK(perdita::tcm<double>({.positive_margin = 1, .negative_margin = -0.5})(
            axes.view(), labels, slopes.view()) == 0.5); // six of −1 to 0, none of −1
  CHECK(perdita::tcm<double>({.positive_margin = 1,
                              .negative_margin = -0.5,
                              .reduction = perdita::reduction::sum})(axes.view(), labels) == 3);
}

TEMPLATE_TEST_CASE("N-pairs is cross-entropy and lengths", "", float, double) {
  using T = TestType;
  const auto x = random_batch<T>(9, 5, 1), y = random_batch<T>(9, 5, 2);
  const double lambda = 0.05;
  const perdita::n_pairs<T> loss({.length_weight = lambda});
  const std::vector<T> weights{1, 2, 0, 1, 1, 1, 0.5, 1, 3}, upstream{1, 2, 1, 1, 3, 1, 1, 1, 1};
  wide_matrix wide_x(x), wide_y(y);
  const auto value = [&](bool reached) {
    wide total = 0, all = 0;
    for (index i = 0; i < 9; ++i) {
      const auto at = static_cast<std::size_t>(i);
      wide sum = 0, own = 0, lengths = 0;
      for (index j = 0; j < 9; ++j) {
        wide s = 0;
        for (index k = 0; k < 5; ++k)
          s += wide_x(i, k) * wide_y(j, k);
        sum += exp(s);
        own = i == j ? s : own;
      }
      for (index k = 0; k < 5; ++k)
        lengths += wide_x(i, k) * wide_x(i, k) + wide_y(i, k) * wide_y(i, k);
      const wide w = weights[at];
      total += w * (reached ? wide(upstream[at]) : wide(1)) * (log(sum) - own + lambda * lengths);
      all += w;
    }
    return wide(total / all);
  };
  error_judge values, slopes;
  batch<T> g(9, 5, T(1)), h(9, 5, T(1));
  std::vector<T> by_pair(9);
  const T got = loss(x.view(), y.view(), g.view(), h.view(),
                     {.row_weights = weights,
                      .upstream = upstream,
                      .scale = 2,
                      .accumulate = true,
                      .values = by_pair});
  const wide expected = value(false);
  CHECK(values.within(size_of(wide(got - expected)), 64,
                      std::numeric_limits<T>::epsilon() * (1 + size_of(expected))));
  CHECK(got == loss(x.view(), y.view(), {.row_weights = weights}));
  double sum = 0;
  for (const T v : by_pair)
    sum += static_cast<double>(v) / 10.5;
  CHECK(near(sum, static_cast<double>(got), 1e-5));
  const auto reached = [&] { return value(true); };
  wide_matrix d_x = differences(wide_x, reached), d_y = differences(wide_y, reached);
  for (wide_matrix* d : {&d_x, &d_y})
    for (wide& slope : d->x)
      slope = 1 + 2 * slope;
  CHECK(slopes_within(slopes, g, d_x, 64));
  CHECK(slopes_within(slopes, h, d_y, 64));
  report_accuracy<T>("n_pairs", "", in_epsilons, values, slopes);

  const batch<T> one(1, 4, T(2)), zero(3, 4);
  CHECK(near(static_cast<double>(loss(one.view(), one.view())), lambda * 32, 1e-6));
  CHECK(near(static_cast<double>(loss(zero.view(), zero.view())), std::log(3.0), 1e-6));
  const batch<T> none(0, 4);
  CHECK(loss(none.view(), none.view()) == 0);
  batch<T> spoilt = x;
  spoilt(2, 1) = std::numeric_limits<T>::quiet_NaN();
  CHECK(std::isnan(loss(spoilt.view(), y.view())));
  CHECK_THROWS_WITH(loss(x.view(), one.view()), Catch::Matchers::ContainsSubstring("is 4"));
  batch<T> d_one(1, 4, T(7)), d_zero(3, 4, T(7));
  CHECK_THROWS_WITH(loss(zero.view(), one.view(), d_zero.view(), d_one.view()),
                    Catch::Matchers::ContainsSubstring("rows of y is 1"));
  CHECK_THROWS_WITH(loss(zero.view(), one.view()),
                    Catch::Matchers::ContainsSubstring("rows of y is 1"));
  CHECK((d_one.x == batch<T>(1, 4, T(7)).x && d_zero.x == batch<T>(3, 4, T(7)).x));
  CHECK_THROWS_WITH(perdita::n_pairs<T>({.length_weight = -1}),
                    Catch::Matchers::ContainsSubstring("length_weight is -1"));
}

TEST_CASE("Structured losses: calls", "") {
  check_anchor_calls(perdita::lifted_structure<double>());
  check_anchor_calls(perdita::lifted_structure<float>({.terms = lifted_terms::anchors}));
  check_anchor_calls(perdita::ranked_list<float>());
  check_anchor_calls(perdita::tcm<double>());
}

TEST_CASE("Structured losses: hinges at rest, and anchors that are compared with nothing", "") {
  const auto x = random_batch<double>(6, 3, 8);
  const std::vector<int> labels{1, 1, 2, 2, 3, 3};
  batch<double> g(6, 3, 7.0);
  const perdita::lifted_structure<double> resting({.margin = -9, .terms = lifted_terms::anchors});
  CHECK(resting(x.view(), labels, g.view()) == 0);
  CHECK(g.x == std::vector<double>(18, 0.0));

  const auto first_alone = [](perdita::index anchor, double* relation, perdita::index n) {
    if (anchor == 0)
      std::fill_n(relation, n, 0.0);
  };
  const std::vector<double> weights{0, 1, 1, 1, 1, 1};
  const perdita::ranked_list<double> loss;
  const double others = loss(x.view(), labels, {.row_weights = weights});
  CHECK(others > 0);
  CHECK(loss(x.view(), labels, {.filter = first_alone}) == others);
}

TEST_CASE("Lifted structure: an anchor that is not finite is no other anchor's matter", "") {
  for (const auto terms : {lifted_terms::pairs, lifted_terms::anchors})
    check_spoilt_anchor(perdita::lifted_structure<double>({.terms = terms}));
}

TEMPLATE_TEST_CASE("Structured losses: equal and zero vectors, and sets that are empty", "", float,
                   double) {
  using T = TestType;
  const auto square = [](double x) { return x * x / 2; };
  // Each has one of its class and four others, all at distance 0.
  check_empty_sets<T>(perdita::lifted_structure<T>(), T(square(1 + std::log(8.0))),
                      T(square(1 + std::log(8.0))));
  check_empty_sets<T>(perdita::lifted_structure<T>({.terms = lifted_terms::anchors}),
                      T(1 + std::log(4.0)), T(1 + std::log(4.0)));
  check_empty_sets<T>(perdita::ranked_list<T>(), T(0.6), T(0.6));
  check_empty_sets<T>(perdita::tcm<T>(), T(0.5), T(0.9));

  const auto x = random_batch<T>(6, 3, 5);
  batch<T> g(6, 3, T(9));
  const std::vector<int> same(6, 1), apart{0, 1, 2, 3, 4, 5};
  for (const auto& labels : {same, apart}) { // no negatives; no positives
    CHECK(perdita::lifted_structure<T>()(x.view(), labels, g.view()) == 0);
    CHECK(g.x == std::vector<T>(18, T(0)));
    g.x.assign(18, T(9));
    CHECK(perdita::lifted_structure<T>({.terms = lifted_terms::anchors})(x.view(), labels,
                                                                         g.view()) == 0);
    CHECK(g.x == std::vector<T>(18, T(0)));
  }
  CHECK_THROWS_WITH(perdita::ranked_list<T>({.balance = 2}),
                    Catch::Matchers::ContainsSubstring("balance is 2"));
  CHECK_THROWS_WITH(perdita::tcm<T>({.positive_factor = -1}),
                    Catch::Matchers::ContainsSubstring("positive_factor is -1"));
  CHECK_THROWS_WITH(perdita::lifted_structure<T>({.terms = static_cast<lifted_terms>(2)}),
                    Catch::Matchers::ContainsSubstring("terms is 2"));
}

TEST_CASE("Structured losses: settings that are not the defaults, sums, normalisers", "") {
  const perdita::ranked_list_options o{.margin = 0.3, .boundary = 0.9};
  check_anchor_values<double>(
      "ranked_list", perdita::ranked_list<double>(o),
      {.distances = true, .value_budget = 4, .gradient_budget = 40},
      [&](const wide_comparisons& c) { return ranked_list(c, c, o); }, 8, 12, 3, 4);
  const perdita::tcm_options factors{.negative_margin = 0.1, .negative_factor = 3};
  check_anchor_values<double>(
      "tcm", perdita::tcm<double>(factors), {.value_budget = 4, .gradient_budget = 8},
      [&](const wide_comparisons& c) { return tcm(c, factors); }, 8, 12, 3, 4);
  // Two positives ½ below their margin; others ½ above theirs six times, none of −1
  batch<double> axes(4, 2);
  axes(0, 0) = axes(1, 0) = 1, axes(2, 1) = 1, axes(3, 0) = -1;
  CHECK(perdita::tcm<double>({.positive_margin = 1.5,
                              .negative_margin = -0.5,
                              .positive_factor = 2,
                              .negative_factor = 4,
                              .reduction = perdita::reduction::sum})(
            axes.view(), std::vector<int>{0, 0, 1, 2}) == 2 * 1 + 4 * 3);

  const auto x = random_batch<double>(5, 3, 1), y = random_batch<double>(5, 3, 2);
  const std::vector<double> weights{1, 2, 0, 0.5, 1};
  const perdita::n_pairs<double> mean({.length_weight = 0.05}),
      sum({.length_weight = 0.05, .reduction = perdita::reduction::sum});
  batch<double> g(5, 3), h(5, 3), of_sum(5, 3), other(5, 3);
  const double value = mean(x.view(), y.view(), g.view(), h.view(), {.row_weights = weights});
  CHECK(near(mean(x.view(), y.view(), {.row_weights = weights, .normaliser = 9}), value * 4.5 / 9,
             1e-14));
  CHECK(near(sum(x.view(), y.view(), of_sum.view(), other.view(), {.row_weights = weights}),
             4.5 * value, 1e-14));
  for (std::size_t k = 0; k < 15; ++k) {
    CHECK(std::abs(of_sum.x[k] - 4.5 * g.x[k]) < 1e-14);
    CHECK(std::abs(other.x[k] - 4.5 * h.x[k]) < 1e-14);
  }
}

} // namespace perdita_tests
