// SPDX-License-Identifier: MIT

// I-Con over its conditionals, and its special cases.

#include <perdita/i_con.hpp>
#include <perdita/sup_con.hpp>

#include <algorithm>

#include "support/anchors.hpp"

namespace perdita_tests {
namespace {

using perdita::cosine_neighbours, perdita::gaussian_neighbours, perdita::student_neighbours;
using perdita::index;

/// Given p by weight(i, j) of who is compared, up to a factor.
template <class Logit, class Weight>
wide i_con(const wide_comparisons& c, Logit logit, Weight weight, double debias, bool divergence) {
  wide total = 0;
  int anchors = 0;
  for (index i = 0; i < c.anchors(); ++i) {
    wide images = 0, weights = 0, value = 0;
    int n = 0;
    for (index j = 0; j < c.candidates(); ++j)
      if (c.of(i, j) != 0) {
        images += exp(wide(logit(c.score(i, j))));
        weights += weight(i, j);
        ++n;
      }
    if (weights == 0)
      continue;
    for (index j = 0; j < c.candidates(); ++j)
      if (c.of(i, j) != 0) {
        const wide p = (1 - wide(debias)) * weight(i, j) / weights + wide(debias) / n;
        const wide log_q = logit(c.score(i, j)) - log(images);
        value += weighted(p, divergence ? wide(log(p) - log_q) : wide(-log_q));
      }
    total += value;
    ++anchors;
  }
  return anchors > 0 ? wide(total / anchors) : wide(0);
}

template <class T, class Neighbours, class Logit>
void check(const std::string& name, const Neighbours& q, Logit logit, bool normalise) {
  for (const double debias : {0.0, 0.25}) {
    const bool divergence = debias > 0;
    check_anchor_values<T>(
        name,
        perdita::i_con<T, Neighbours>(
            {.neighbours = q, .debias = debias, .divergence = divergence, .normalise = normalise}),
        {.normalise = normalise,
         .distances = Neighbours::distances,
         .value_budget = 32,
         .gradient_budget = 64},
        [&](const wide_comparisons& c) {
          const auto even = [&](index i, index j) { return wide(c.of(i, j) > 0 ? 1 : 0); };
          return i_con(c, logit, even, debias, divergence);
        },
        5);
  }
}

} // namespace

TEMPLATE_TEST_CASE("I-Con is its definition", "", float, double) {
  using T = TestType;
  check<T>(
      "i_con, cosines", cosine_neighbours{0.5}, [](const wide& s) { return wide(2 * s); }, true);
  for (const bool normalise : {true, false}) {
    check<T>(
        "i_con, Gaussian", gaussian_neighbours{0.75},
        [](const wide& d) { return wide(-d * d / wide(1.125)); }, normalise);
    check<T>(
        "i_con, Student's t", student_neighbours{},
        [](const wide& d) { return wide(-log1p(wide(d * d))); }, normalise);
  }
}

TEST_CASE("I-Con: calls", "") {
  check_anchor_calls(perdita::i_con<double>());
  check_anchor_calls(perdita::i_con<double, student_neighbours>());
  check_anchor_calls(perdita::i_con<float, gaussian_neighbours>({.normalise = false}));
}

TEST_CASE("I-Con of given rows of p, and by σ", "") {
  const auto x = sheet_x();
  const auto weight = [](index i, index j) { return (i * 5 + j * 3) % 4; };
  const auto rows_of_p = [&](index i, double* p, index n) {
    for (index j = 0; j < n; ++j)
      p[j] = weight(i, j) > 0 ? 0.1 * static_cast<double>(weight(i, j)) : -1;
  };
  double slope = 0;
  const perdita::i_con<double, gaussian_neighbours> loss(
      {.neighbours = {0.8}, .divergence = true, .normalise = false, .d_parameter = &slope});
  batch<double> g(6, 4);
  const double value = loss(x.view(), g.view(), {.filter = rows_of_p});
  CHECK(loss(x.view(), {.filter = rows_of_p}) == value);

  const auto who = relations({1, 2, 3, 4, 5, 6}, {1, 2, 3, 4, 5, 6}, true);
  const anchor_subject subject{.normalise = false, .distances = true};
  wide_matrix wide_x(x);
  const auto at = [&](double sigma) {
    return i_con(
        compare(wide_x, wide_x, who, subject),
        [&](const wide& d) { return wide(-d * d / (2 * sigma * sigma)); },
        [&](index i, index j) { return wide(static_cast<double>(weight(i, j))); }, 0, true);
  };
  CHECK(near(value, static_cast<double>(at(0.8)), 1e-13));
  error_judge slopes;
  CHECK(slopes_within(slopes, g, differences(wide_x, [&] { return at(0.8); }), 64));
  CHECK(near(slope, static_cast<double>(wide((at(0.8 + 1e-6) - at(0.8 - 1e-6)) / 2e-6)), 1e-8));
}

TEST_CASE("I-Con's special cases", "") {
  const auto x = sheet_x();
  const std::vector<int> labels{0, 0, 1, 1, 0, 1};
  double slope = 0, other_slope = 0;
  batch<double> g(6, 4), h(6, 4);
  const perdita::i_con<double> loss({.neighbours = {0.2}, .d_parameter = &slope});
  const perdita::sup_con<double> same({.temperature = 0.2, .d_temperature = &other_slope});
  const perdita::i_con<double, gaussian_neighbours> on_sphere({.neighbours = {std::sqrt(0.2)}});
  const auto agree = [&] {
    for (std::size_t k = 0; k < g.x.size(); ++k)
      CHECK(std::abs(g.x[k] - h.x[k]) < 1e-14);
  };
  CHECK(near(loss(x.view(), labels, g.view()), same(x.view(), labels, h.view()), 1e-14));
  CHECK(near(slope, other_slope, 1e-13));
  agree();
  CHECK(near(on_sphere(x.view(), labels, g.view()), same(x.view(), labels), 1e-14));
  agree();
  CHECK(near(loss.views(x.view(), 2, g.view()), same.views(x.view(), 2, h.view()), 1e-14));
  agree();
}

TEST_CASE("I-Con: what has a stated result", "") {
  const batch<double> equal(6, 3, 2.0), zero(6, 3), one(1, 3, 1.0);
  batch<double> g(6, 3), of_one(1, 3);
  const std::vector<int> all(6, 1), apart{1, 2, 3, 4, 5, 6}, twos{1, 2, 3, 1, 2, 3}, single{1};
  const auto expect = [&](const auto& loss) {
    for (const auto& x : {equal, zero}) {
      for (const auto& labels : {all, twos}) {
        CHECK(near(loss(x.view(), labels, g.view()), std::log(5.0), 1e-14));
        for (const double slope : g.x)
          CHECK(std::abs(slope) < 1e-13);
      }
      CHECK(loss(x.view(), apart, g.view()) == 0);
      CHECK(g.x == std::vector<double>(18, 0.0));
    }
    CHECK(loss(one.view(), single, of_one.view()) == 0);
    CHECK(loss.pairs(one.view(), one.view()) == 0);
  };
  expect(perdita::i_con<double>());
  expect(perdita::i_con<double, gaussian_neighbours>());
  expect(perdita::i_con<double, student_neighbours>());
  const perdita::i_con<double> apart_from_p({.divergence = true}); // q is p
  CHECK(std::abs(apart_from_p(equal.view(), all)) < 1e-14);

  using Catch::Matchers::ContainsSubstring;
  CHECK_THROWS_WITH(perdita::i_con<double>({.neighbours = {0}}),
                    ContainsSubstring("parameter of the neighbours"));
  CHECK_THROWS_WITH(perdita::i_con<double>({.debias = 2}), ContainsSubstring("debias is 2"));
}

namespace {

/// By its definition, of f or of its logits, p being even over others of the same label.
wide clusters_of(const wide_matrix& x, const std::vector<int>& labels, bool logits, double debias,
                 bool divergence) {
  wide_matrix f = x;
  std::vector<wide> n(static_cast<std::size_t>(x.cols), wide(0));
  for (index i = 0; i < x.rows; ++i) {
    wide sum = 0;
    for (index c = 0; c < x.cols; ++c)
      sum += exp(x(i, c));
    for (index c = 0; c < x.cols; ++c) {
      if (logits)
        f(i, c) = exp(x(i, c)) / sum;
      n[static_cast<std::size_t>(c)] += f(i, c);
    }
  }
  wide total = 0;
  int anchors = 0;
  const auto belongs = [&](index i, index j) {
    return i != j && labels[static_cast<std::size_t>(i)] == labels[static_cast<std::size_t>(j)];
  };
  for (index i = 0; i < x.rows; ++i) {
    wide own = 0;
    for (index j = 0; j < x.rows; ++j)
      own += belongs(i, j) ? 1 : 0;
    if (own == 0)
      continue;
    ++anchors;
    for (index j = 0; j < x.rows; ++j) {
      wide q = 0;
      for (index c = 0; c < x.cols; ++c)
        q += f(i, c) * f(j, c) / n[static_cast<std::size_t>(c)];
      const wide p = wide(debias) / static_cast<double>(x.rows) +
                     (belongs(i, j) ? wide((1 - wide(debias)) / own) : wide(0));
      total += weighted(p, divergence ? wide(log(p) - log(q)) : wide(-log(q)));
    }
  }
  return total / anchors;
}

} // namespace

TEMPLATE_TEST_CASE("I-Con with clusters is its definition", "", float, double) {
  using T = TestType;
  error_judge values, slopes;
  const std::vector<int> labels{3, 1, 3, 1, 2, 1, 5, 2, 3};
  for (const bool logits : {true, false})
    for (const double debias : {0.0, 0.25}) {
      const bool divergence = debias > 0;
      const perdita::i_con_clusters<T> loss(
          {.logits = logits, .debias = debias, .divergence = divergence});
      auto x = random_batch<T>(9, 4, 8);
      for (T& entry : x.x)
        entry = logits ? entry : std::abs(entry) / 4;
      wide_matrix wide_x(x);
      const auto value = [&] { return clusters_of(wide_x, labels, logits, debias, divergence); };
      batch<T> g(9, 4, T(7)), more(9, 4, T(1));
      const T got = loss(x.seen(), labels, g.view());
      CHECK(loss(x.seen(), labels) == got);
      const wide expected = value();
      CHECK(values.within(size_of(wide(got - expected)), 8,
                          std::numeric_limits<T>::epsilon() * (1 + size_of(expected))));
      CHECK(slopes_within(slopes, g, differences(wide_x, value), 16));
      loss(x.seen(), labels, more.view(), {.scale = 2, .accumulate = true});
      for (std::size_t k = 0; k < g.x.size(); ++k)
        CHECK(std::abs(more.x[k] - (1 + 2 * g.x[k])) <= 4 * std::numeric_limits<T>::epsilon());
    }
  report_accuracy<T>("i_con_clusters", "", in_epsilons, values, slopes);
}

TEST_CASE("I-Con with clusters: calls, and what has a stated result", "[threads]") {
  using Catch::Matchers::ContainsSubstring;
  const perdita::i_con_clusters<double> loss, given({.logits = false});
  const auto x = random_batch<double>(90, 6, 2);
  batch<double> g(90, 6), h(90, 6);
  const double value = loss.views(x.seen(), 2, g.view(), {.run_on = perdita::serial});
  const threads_executor pool(3, task_order::shuffled);
  CHECK(loss.views(x.seen(), 2, h.view(), {.run_on = pool}) == value);
  CHECK(h.x == g.x);
  std::vector<int> items;
  for (int i = 0; i < 90; ++i)
    items.push_back(i % 45);
  CHECK(loss(x.seen(), items) == value);
  const auto partner = [](index i, double* p, index n) {
    std::fill_n(p, n, -1.0);
    p[(i + n / 2) % n] = 0.3;
  };
  CHECK(near(loss(x.seen(), h.view(), {.filter = partner}), value, 1e-14));
  CHECK(loss(x.seen(), {.filter = partner}) == loss(x.seen(), h.view(), {.filter = partner}));

  // Equal f: each of 90 is as likely; two pure clusters of 45: each of 45.
  CHECK(near(loss.views(batch<double>(90, 6, 1.5).seen(), 2), std::log(90.0), 1e-14));
  batch<double> pure(90, 2);
  for (index i = 0; i < 90; ++i)
    pure(i, i % 45 < 20 ? 0 : 1) = 1;
  std::vector<int> of_pure(90, 1);
  for (std::size_t i = 0; i < 90; ++i)
    of_pure[i] = i % 45 < 20 ? 0 : 1;
  batch<double> d_pure(90, 2);
  CHECK(near(given(pure.seen(), of_pure, d_pure.view()),
             (40 * std::log(40.0) + 50 * std::log(50.0)) / 90, 1e-14));
  of_pure[0] = 1; // of which q is 0
  CHECK(std::isinf(given(pure.seen(), of_pure)));
  batch<double> with_empty(90, 3), d_empty(90, 3);
  for (index i = 0; i < 90; ++i)
    with_empty(i, i % 2) = 1;
  std::vector<int> of_parity;
  for (int i = 0; i < 90; ++i)
    of_parity.push_back(i % 2);
  CHECK(near(given(with_empty.seen(), of_parity, d_empty.view()), std::log(45.0), 1e-14));
  CHECK(d_empty(3, 2) == 0);
  std::vector<int> alone(90);
  for (int i = 0; i < 90; ++i)
    alone[static_cast<std::size_t>(i)] = i;
  CHECK(loss(x.seen(), alone, g.view()) == 0);
  CHECK(g.x == std::vector<double>(540, 0.0));
  CHECK(loss(batch<double>(0, 6).seen(), std::vector<int>{}) == 0);
  auto spoilt = x;
  spoilt(3, 2) = std::numeric_limits<double>::quiet_NaN();
  CHECK(std::isnan(loss(spoilt.seen(), items, g.view())));
  CHECK(std::isnan(g(80, 1)));
  std::vector<double> weights(90, 1);
  weights[4] = 0;
  std::vector<double> values(90);
  const double some = loss(x.seen(), items, {.row_weights = weights, .values = values});
  double sum = 0;
  for (const double v : values)
    sum += v;
  CHECK(near(some, sum / 89, 1e-14));

  CHECK_THROWS_WITH(loss(x.seen(), std::vector<int>{1, 2}), ContainsSubstring("labels of x is 2"));
  CHECK_THROWS_WITH(loss.views(x.seen(), 4), ContainsSubstring("views is 4"));
  CHECK_THROWS_WITH(loss(x.seen(), items, with_empty.view()),
                    ContainsSubstring("columns of the gradient of the embeddings is 3"));
  CHECK_THROWS_WITH(perdita::i_con_clusters<double>({.debias = 2}),
                    ContainsSubstring("debias is 2"));
}

} // namespace perdita_tests
