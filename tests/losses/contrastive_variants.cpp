// SPDX-License-Identifier: MIT

// Newer contrastive losses: adaptive multi-head, separating, with meta-nodes, without bad pairs,
// gated, relational, by order of groups.

#include <perdita/amcl.hpp>
#include <perdita/bad_pairs.hpp>
#include <perdita/barlow_twins.hpp>
#include <perdita/gate.hpp>
#include <perdita/group_ordering.hpp>
#include <perdita/pam_c.hpp>
#include <perdita/relation.hpp>
#include <perdita/sep_clr.hpp>
#include <perdita/sup_con.hpp>

#include "support/anchors.hpp"

namespace perdita_tests {
namespace {

using perdita::index;

// --- AMCL ---------------------------------------------------------------------------------------

double some_temperature(index i, index j) {
  return 0.25 + 0.125 * static_cast<double>((7 * i + 3 * j) % 5);
}
template <class Temperature>
wide amcl(const wide_comparisons& c, double width, double beta, Temperature temperature) {
  wide total = 0;
  int anchors = 0;
  for (index i = 0; i < c.anchors(); ++i) {
    if (!c.has(i, 1) || !c.has(i, -1))
      continue;
    ++anchors;
    const auto term = [&](index j) {
      const wide t = temperature(i, j);
      return wide(beta * (width / 2 * log(t) + 1 / t) - c.score(i, j) / t);
    };
    wide own = 0;
    int count = 0;
    index nearest = -1;
    for (index j = 0; j < c.candidates(); ++j) {
      if (c.of(i, j) > 0)
        own += term(j), ++count;
      if (c.of(i, j) < 0 && (nearest < 0 || c.score(i, j) > c.score(i, nearest)))
        nearest = j;
    }
    total += own / count - term(nearest);
  }
  return anchors > 0 ? wide(total / anchors) : wide(0);
}

} // namespace

TEMPLATE_TEST_CASE("Adaptive multi-head contrastive is its definition", "", float, double) {
  for (const int classes : {1, 4, 30}) {
    check_anchor_values<TestType>(
        "amcl", perdita::amcl<TestType>({.width = 5, .beta = 0.5, .temperature = 0.25}),
        {.value_budget = 8, .gradient_budget = 16},
        [](const wide_comparisons& c) {
          return amcl(c, 5, 0.5, [](index, index) { return 0.25; });
        },
        9, 17, 3, classes);
    const auto temperatures = [](index i, index j) { return some_temperature(i, j); };
    check_anchor_values<TestType>(
        "amcl", perdita::amcl<TestType>({.width = 8, .temperatures = temperatures}),
        {.value_budget = 8, .gradient_budget = 16},
        [](const wide_comparisons& c) { return amcl(c, 8, 0.1, some_temperature); }, 9, 17, 3,
        classes);
  }
  check_anchor_values<TestType>(
      "amcl",
      perdita::amcl<TestType>({.width = 5, .beta = 0.5, .temperature = 2, .normalise = false}),
      {.normalise = false, .value_budget = 8, .gradient_budget = 16},
      [](const wide_comparisons& c) { return amcl(c, 5, 0.5, [](index, index) { return 2.0; }); },
      9, 17, 3, 4);
}

TEMPLATE_TEST_CASE("Adaptive SimSiam and Barlow Twins are their definitions", "", float, double) {
  using T = TestType;
  using Catch::Matchers::ContainsSubstring;
  check_anchor_values<T>(
      "amcl, SimSiam",
      perdita::amcl<T>(
          {.width = 5, .beta = 0.5, .temperature = 0.25, .form = perdita::amcl_form::sim_siam}),
      {.value_budget = 8, .gradient_budget = 16}, [](const wide_comparisons& c) {
        wide total = 0;
        int anchors = 0;
        for (index i = 0; i < c.anchors(); ++i) {
          wide own = 0;
          int count = 0;
          for (index j = 0; j < c.candidates(); ++j)
            if (c.of(i, j) > 0)
              own += c.score(i, j), ++count;
          if (count == 0)
            continue;
          ++anchors;
          total += 0.5 * (2.5 * log(wide(0.25)) + 4) - 2 * own / count;
        }
        return wide(total / anchors);
      });

  error_judge values, slopes;
  const auto a = random_batch<T>(9, 4, 3), b = random_batch<T>(9, 4, 4);
  auto t = random_batch<T>(4, 4, 5);
  for (T& entry : t.x)
    entry = T(0.3) + std::abs(entry);
  wide_matrix x[] = {wide_matrix(a), wide_matrix(b), wide_matrix(t)};
  const auto value = [&] {
    wide_matrix u[2] = {x[0], x[1]};
    for (wide_matrix& m : u)
      for (index j = 0; j < 4; ++j) {
        wide mean = 0, square = 0;
        for (index i = 0; i < 9; ++i)
          mean += m(i, j) / 9;
        for (index i = 0; i < 9; ++i)
          square += (m(i, j) - mean) * (m(i, j) - mean) / 9;
        for (index i = 0; i < 9; ++i)
          m(i, j) = (m(i, j) - mean) / sqrt(wide(square + 1e-5));
      }
    wide total = 0;
    for (index l = 0; l < 4; ++l)
      for (index m = 0; m < 4; ++m) {
        wide c = 0;
        for (index i = 0; i < 9; ++i)
          c += u[0](i, l) * u[1](i, m) / 9;
        const wide at = x[2](l, m), penalty = 0.25 * (3 * log(at) + 1 / at);
        total += l == m ? wide((1 - c / at) * (1 - c / at) + penalty)
                        : wide(0.125 * c * c / at - penalty);
      }
    return total;
  };
  const perdita::amcl_barlow<T> loss({.width = 6, .beta = 0.25, .off_diagonal = 0.125});
  batch<T> d_a(9, 4), d_b(9, 4), d_t(4, 4);
  const T got = loss(a.seen(), b.seen(), t.seen(), d_a.view(), d_b.view(), d_t.view());
  CHECK(loss(a.seen(), b.seen(), t.seen()) == got);
  const wide expected = value();
  CHECK(values.within(size_of(wide(got - expected)), 32,
                      std::numeric_limits<T>::epsilon() * (1 + size_of(expected))));
  CHECK(slopes_within(slopes, d_a, differences(x[0], value), 8));
  CHECK(slopes_within(slopes, d_b, differences(x[1], value), 8));
  CHECK(slopes_within(slopes, d_t, differences(x[2], value), 8));
  report_accuracy<T>("amcl_barlow", "", in_epsilons, values, slopes);

  // With temperatures of 1 and without Ω it is Barlow Twins; one row; what is not finite.
  const batch<T> ones(4, 4, T(1));
  const perdita::amcl_barlow<T> plain({.beta = 0});
  batch<T> e_a(9, 4), e_b(9, 4), again(9, 4);
  const auto twins =
      static_cast<double>(perdita::barlow_twins<T>()(a.seen(), b.seen(), e_a.view(), e_b.view()));
  const threads_executor pool(3, task_order::shuffled);
  CHECK(near(static_cast<double>(plain(a.seen(), b.seen(), ones.seen(), d_a.view(), d_b.view(),
                                       d_t.view(), {.run_on = pool})),
             twins, 1e-6));
  for (std::size_t k = 0; k < 36; ++k)
    CHECK(std::abs(d_b.x[k] - e_b.x[k]) < 16 * std::numeric_limits<T>::epsilon());
  const batch<T> row(1, 4, T(2));
  CHECK(near(static_cast<double>(plain(row.seen(), row.seen(), ones.seen())), 4, 1e-6));
  CHECK(loss(batch<T>(0, 4).seen(), batch<T>(0, 4).seen(), ones.seen()) == 0);
  t(2, 1) = 0;
  CHECK(std::isnan(loss(a.seen(), b.seen(), t.seen(), d_a.view(), d_b.view(), d_t.view())));
  CHECK((std::isnan(d_a(0, 0)) && std::isnan(d_b(3, 1)) && std::isnan(d_t(0, 0))));
  auto spoilt = a;
  spoilt(3, 2) = std::numeric_limits<T>::infinity();
  CHECK(std::isnan(loss(spoilt.seen(), b.seen(), ones.seen())));
  CHECK_THROWS_WITH(loss(a.seen(), b.seen(), row.seen()),
                    ContainsSubstring("rows of the temperatures is 1, expected 4"));
  CHECK_THROWS_WITH(loss(a.seen(), b.seen(), ones.seen(), d_a.view(), d_a.view(), d_t.view()),
                    ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(perdita::amcl_barlow<T>({.beta = -1}), ContainsSubstring("beta is -1"));
}

TEST_CASE("Adaptive multi-head contrastive: calls", "[threads]") {
  check_anchor_calls(perdita::amcl<double>({.width = 4}));
}

TEST_CASE("Adaptive multi-head contrastive: temperatures", "") {
  const auto x = sheet_x(), y = sheet_y();
  batch<double> g(6, 4), h(6, 4), t(6, 6), d_t(6, 6);
  for (index i = 0; i < 6; ++i)
    for (index j = 0; j < 6; ++j)
      t(i, j) = some_temperature(i, j);
  const auto temperatures = [&](index i, index j) { return t(i, j); };
  const auto slopes = [&](index i, index j, double slope) { d_t(i, j) = slope; };
  const perdita::amcl<double> loss({.width = 4,
                                    .temperatures = temperatures,
                                    .d_temperatures = slopes,
                                    .reduction = perdita::reduction::sum});
  loss.pairs(x.view(), y.view(), g.view(), h.view());
  int asked = 0;
  for (std::size_t k = 0; k < 36; ++k) {
    const double kept = t.x[k];
    t.x[k] = kept + 1e-5;
    const double above = loss.pairs(x.view(), y.view());
    t.x[k] = kept - 1e-5;
    const double below = loss.pairs(x.view(), y.view());
    t.x[k] = kept;
    CHECK(std::abs(d_t.x[k] - (above - below) / 2e-5) < 1e-7);
    asked += d_t.x[k] != 0 ? 1 : 0;
  }
  CHECK(asked == 12); // one positive and one negative each

  double slope = 0;
  const auto with = [&](double u) {
    return perdita::amcl<double>({.width = 4, .temperature = u, .d_temperature = &slope});
  };
  const double above = with(0.5 + 1e-5).pairs(x.view(), y.view());
  const double below = with(0.5 - 1e-5).pairs(x.view(), y.view());
  with(0.5).pairs(x.view(), y.view(), g.view(), h.view());
  CHECK(near(slope, (above - below) / 2e-5, 1e-7));

  t(0, 0) = -1;
  CHECK(std::isnan(loss.pairs(x.view(), y.view(), g.view(), h.view())));
  CHECK((std::isnan(g(0, 1)) && std::isfinite(g(1, 1))));

  const perdita::bounded_temperature bounded;
  CHECK(near(bounded(0), 0.5 * (1e-5 + 2), 1e-15));
  CHECK(
      near(bounded.slope(bounded(0.7)), (bounded(0.7 + 1e-5) - bounded(0.7 - 1e-5)) / 2e-5, 1e-8));
}

TEST_CASE("Adaptive multi-head contrastive: what has a stated result", "") {
  batch<double> equal(4, 3, 2.0), g(4, 3, 7.0);
  const perdita::amcl<double> loss({.width = 4});
  CHECK(std::abs(loss(equal.view(), std::vector<int>{1, 1, 2, 2}, g.view())) < 1e-15); // ties
  CHECK(loss(equal.view(), std::vector<int>{1, 1, 1, 1}, g.view()) == 0); // no negatives
  CHECK(loss(equal.view(), std::vector<int>{1, 2, 3, 4}, g.view()) == 0); // no positives
  CHECK(g.x == std::vector<double>(12, 0.0));
  const auto zero = [](index, index) { return 0.0; };
  CHECK(std::isnan(perdita::amcl<double>({.width = 4, .temperatures = zero})(
      equal.view(), std::vector<int>{1, 1, 2, 2})));
  using Catch::Matchers::ContainsSubstring;
  CHECK_THROWS_WITH(perdita::amcl<double>({}), ContainsSubstring("width is 0"));
  CHECK_THROWS_WITH(perdita::amcl<double>({.width = 1, .beta = -1}),
                    ContainsSubstring("beta is -1"));
  CHECK_THROWS_WITH(perdita::amcl<double>({.width = 1, .temperature = 0}),
                    ContainsSubstring("temperature is 0"));
  CHECK_THROWS_WITH(perdita::amcl<double>({.width = 1, .temperature = 1e-310}),
                    ContainsSubstring("whose inverse is finite"));
  CHECK_THROWS_WITH(perdita::amcl<double>({.width = 1, .form = static_cast<perdita::amcl_form>(2)}),
                    ContainsSubstring("form is 2"));
  // Without negatives nothing is compared with what is not its own.
  const perdita::amcl<double> own({.width = 4, .form = perdita::amcl_form::sim_siam});
  const auto p = random_batch<double>(3, 4, 1);
  auto z = random_batch<double>(3, 4, 2);
  z(2, 1) = std::numeric_limits<double>::quiet_NaN();
  batch<double> d_p(3, 4);
  CHECK(std::isnan(own.pairs(p.view(), z.view(), d_p.view())));
  for (index i = 0; i < 3; ++i)
    CHECK(std::isnan(d_p(i, 0)) == (i == 2));
}

// --- SepCLR -------------------------------------------------------------------------------------

namespace {

struct sep_clr_weights {
  double common, salient, information_less, joint;
};
wide square_between(const wide_matrix& x, index i, const wide_matrix& y, index j) {
  wide sum = 0;
  for (index d = 0; d < x.cols; ++d) {
    const wide apart = x(i, d) - y(j, d);
    sum += apart * apart;
  }
  return sum;
}
wide sep_clr(const std::array<wide_matrix, 4>& x, const std::vector<int>& target, double tau,
             const sep_clr_weights& w) {
  const index n = x[0].rows;
  const auto half = [&](const wide& square) { return wide(square / (2 * tau)); };
  const std::array<wide_matrix, 2> c{unit_rows(x[0]), unit_rows(x[1])}, s{x[2], x[3]};
  std::array<wide_matrix, 2> teacher = s;
  int targets = 0;
  for (index i = 0; i < n; ++i) {
    targets += target[static_cast<std::size_t>(i)];
    for (auto& t : teacher)
      for (index d = 0; d < t.cols && target[static_cast<std::size_t>(i)] == 0; ++d)
        t(i, d) = 0;
  }
  const wide_matrix origin(1, s[0].cols);
  wide result = 0;
  for (index i = 0; i < n; ++i) {
    result += w.common * half(square_between(c[0], i, c[1], i)) / n;
    if (target[static_cast<std::size_t>(i)] == 1)
      result += w.salient * half(square_between(s[0], i, s[1], i)) / targets;
    else
      result += w.information_less *
                half(square_between(s[0], i, origin, 0) + square_between(s[1], i, origin, 0)) /
                (2 * (n - targets));
  }
  for (std::size_t v = 0; v < 2; ++v) {
    wide of_c = 0, of_s = 0, joint = 0; // of i ≠ j
    std::vector<wide> row(static_cast<std::size_t>(n), 1);
    const auto image = [&](const wide_matrix& m, index i, index j, double weight) {
      return weight + w.joint == 0 ? wide(0) : wide(exp(-half(square_between(m, i, m, j))));
    };
    for (index i = 0; i < n; ++i)
      for (index j = 0; j < i; ++j) {
        const wide k = image(c[v], i, j, w.common), l = image(teacher[v], i, j, w.salient);
        row[static_cast<std::size_t>(i)] += k * l;
        row[static_cast<std::size_t>(j)] += k * l;
        of_c += 2 * k;
        of_s += 2 * l;
      }
    for (const wide& sum : row)
      joint += log(wide(sum / n)) / n;
    result += w.joint * joint / 2;
    if (n > 1)
      result += weighted(w.common, log(wide(of_c / (n * (n - 1))))) +
                weighted(w.salient, log(wide(of_s / (n * (n - 1)))));
  }
  return result;
}
template <class T> struct sep_clr_run {
  std::vector<batch<T>> x, g;
  std::vector<int> target;

  explicit sep_clr_run(index n, index of_common = 5, index of_salient = 3) {
    for (std::uint64_t k = 0; k < 4; ++k) {
      x.push_back(random_batch<T>(n, k < 2 ? of_common : of_salient, 21 + k));
      g.emplace_back(x.back().rows, x.back().cols, T(7));
    }
    for (index i = 0; i < n; ++i)
      target.push_back(i % 3 == 0 ? 0 : 1);
  }
  perdita::sep_clr_batch<const T> in() const {
    return {{x[0].view(), x[1].view()}, {x[2].view(), x[3].view()}};
  }
  perdita::sep_clr_batch<T> out() {
    return {{g[0].view(), g[1].view()}, {g[2].view(), g[3].view()}};
  }
};

} // namespace

TEMPLATE_TEST_CASE("SepCLR is its definition", "", float, double) {
  using T = TestType;
  error_judge values, slopes;
  for (const sep_clr_weights& w :
       {sep_clr_weights{1, 0, 0, 0}, sep_clr_weights{0, 1, 0, 0}, sep_clr_weights{0, 0, 1, 0},
        sep_clr_weights{0, 0, 0, 1}, sep_clr_weights{1, 3, 2, 10}})
    for (const double tau : {0.5, 2.0})
      for (const index n : {2, 9}) {
        INFO(w.common << ' ' << w.salient << ' ' << w.information_less << ' ' << w.joint << ", n "
                      << n);
        sep_clr_run<T> run(n);
        const perdita::sep_clr<T> loss({.temperature = tau,
                                        .common = w.common,
                                        .salient = w.salient,
                                        .information_less = w.information_less,
                                        .joint = w.joint});
        std::array<wide_matrix, 4> x{wide_matrix(run.x[0]), wide_matrix(run.x[1]),
                                     wide_matrix(run.x[2]), wide_matrix(run.x[3])};
        const auto definition = [&] { return sep_clr(x, run.target, tau, w); };
        const wide expected = definition();
        const T value = loss(run.in(), run.target, run.out());
        CHECK(values.within(size_of(wide(value - expected)), 4,
                            std::numeric_limits<T>::epsilon() * (1 + size_of(expected))));
        CHECK(loss(run.in(), run.target) == value);
        for (std::size_t k = 0; k < 4; ++k)
          CHECK(slopes_within(slopes, run.g[k], differences(x[k], definition), 24));
      }
  report_accuracy<T>("sep_clr", "", in_epsilons, values, slopes);
}

TEST_CASE("SepCLR: calls, and what has a stated result", "[threads]") {
  using Catch::Matchers::ContainsSubstring;
  const perdita::sep_clr<double> loss;
  sep_clr_run<double> run(300), again(300);
  const double value = loss(run.in(), run.target, run.out(), {.run_on = perdita::serial});
  for (const std::size_t threads : {2U, 7U}) {
    const threads_executor pool(threads, task_order::shuffled);
    CHECK(loss(again.in(), run.target, again.out(), {.run_on = pool}) == value);
    for (std::size_t k = 0; k < 4; ++k)
      CHECK(again.g[k].x == run.g[k].x);
  }
  loss(again.in(), run.target, again.out(), {.scale = 2, .accumulate = true});
  for (std::size_t k = 0; k < 4; ++k)
    CHECK(near(again.g[k].x[5], 3 * run.g[k].x[5], 1e-14));

  auto spoilt = run;
  spoilt.x[2](1, 1) = std::numeric_limits<double>::quiet_NaN();
  CHECK(std::isnan(loss(spoilt.in(), spoilt.target, spoilt.out())));
  CHECK(std::isnan(spoilt.g[0].x[0]));
  CHECK(std::isnan(spoilt.g[3].x[9]));

  sep_clr_run<double> one(1), none(0), equal(4);
  CHECK(std::isfinite(loss(one.in(), one.target, one.out())));
  CHECK(loss(none.in(), none.target, none.out()) == 0);
  for (auto& x : equal.x)
    std::fill(x.x.begin(), x.x.end(), 0.0);
  CHECK(std::abs(loss(equal.in(), equal.target, equal.out())) < 1e-12); // zero vectors, all alike
  for (const auto& g : equal.g)
    CHECK(length_of(g.x) == 0);
  for (const int all : {0, 1}) {
    std::fill(one.target.begin(), one.target.end(), all);
    CHECK(std::isfinite(loss(one.in(), one.target)));
  }
  { // Salient features far apart: what is small keeps its digits.
    sep_clr_run<double> far(3);
    for (auto& x : far.x[2].x)
      x *= 1000;
    CHECK(std::isfinite(loss(far.in(), std::vector<int>{1, 1, 1}, far.out())));
    CHECK(std::isfinite(far.g[2].x[0]));
  }
  const auto kept = run.g;
  CHECK_THROWS_WITH(loss(run.in(), one.target), ContainsSubstring("labels is 1, expected 300"));
  one.target[0] = 2;
  CHECK_THROWS_WITH(loss(one.in(), one.target), ContainsSubstring("labels[0] is 2"));
  auto wrong = run.out();
  wrong.salient[1].cols -= 1;
  CHECK_THROWS_WITH(loss(run.in(), run.target, wrong),
                    ContainsSubstring("columns of the gradient of salient is 2"));
  wrong = run.out();
  wrong.common[0] = wrong.common[1];
  CHECK_THROWS_WITH(loss(run.in(), run.target, wrong), ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(perdita::sep_clr<double>({.temperature = 0}),
                    ContainsSubstring("temperature is 0"));
  CHECK_THROWS_WITH(perdita::sep_clr<double>({.temperature = 1e-310}),
                    ContainsSubstring("whose inverse is finite"));
  CHECK_THROWS_WITH(perdita::sep_clr<double>({.joint = -1}), ContainsSubstring("joint is -1"));
  for (std::size_t k = 0; k < 4; ++k)
    CHECK(run.g[k].x == kept[k].x);
}

// --- PamC ---------------------------------------------------------------------------------------

namespace {

/// A graph in which node i sees itself and a few others, one of them twice.
template <class T> struct some_graph {
  std::vector<int> begin{0}, column, cluster;
  std::vector<T> weight;

  explicit some_graph(int n) {
    for (int i = 0; i < n; ++i) {
      for (const int j : {i, (i + 1) % n, (3 * i + 2) % n, (i + 1) % n}) {
        column.push_back(j);
        weight.push_back(static_cast<T>(0.125 * (1 + (i + 2 * j) % 4)));
      }
      begin.push_back(static_cast<int>(column.size()));
      cluster.push_back(7 * ((i * i) % 3));
    }
  }
  perdita::sparse_rows<T, int> rows() const { return {begin, column, weight}; }
};
template <class T>
wide pam_c(const wide_matrix& z, const some_graph<T>& graph, double sharpness, double floor) {
  const wide_matrix unit = unit_rows(z);
  const auto cosine = [](const wide_matrix& x, index i, index j) {
    wide sum = 0;
    for (index d = 0; d < x.cols && i != j; ++d)
      sum += x(i, d) * x(j, d);
    return sum;
  };
  wide near = 0, apart = 0;
  for (index i = 0; i < z.rows; ++i) {
    wide sum = floor;
    for (int e = graph.begin[static_cast<std::size_t>(i)];
         e < graph.begin[static_cast<std::size_t>(i) + 1]; ++e) {
      const auto at = static_cast<std::size_t>(e);
      sum += graph.weight[at] * exp(wide(sharpness * cosine(unit, i, graph.column[at])));
    }
    near += log(sum) / z.rows;
  }
  std::vector<int> clusters(graph.cluster);
  std::sort(clusters.begin(), clusters.end());
  clusters.erase(std::unique(clusters.begin(), clusters.end()), clusters.end());
  wide_matrix sums(static_cast<index>(clusters.size()), z.cols);
  for (index a = 0; a < sums.rows; ++a)
    for (index i = 0; i < z.rows; ++i)
      for (index d = 0; d < z.cols; ++d)
        if (graph.cluster[static_cast<std::size_t>(i)] == clusters[static_cast<std::size_t>(a)])
          sums(a, d) += z(i, d);
  sums = unit_rows(sums);
  for (index a = 0; a < sums.rows; ++a) {
    wide sum = floor;
    for (index b = 0; b < sums.rows; ++b)
      sum += exp(wide(sharpness * cosine(sums, a, b)));
    apart += log(sum) / sums.rows;
  }
  return apart - near;
}

} // namespace

TEMPLATE_TEST_CASE("PamC is its definition", "", float, double) {
  using T = TestType;
  error_judge values, slopes;
  for (const double sharpness : {1.0, 8.0})
    for (const double floor : {1e-10, 0.5})
      for (const int n : {1, 2, 14}) {
        const some_graph<T> graph(n);
        const auto z = random_batch<T>(n, 5, 31);
        batch<T> g(n, 5, T(7));
        const perdita::pam_c<T> loss({.sharpness = sharpness, .floor = floor});
        wide_matrix x(z);
        const auto definition = [&] { return pam_c(x, graph, sharpness, floor); };
        const wide expected = definition();
        const T value = loss(z.view(), graph.rows(), graph.cluster, g.view());
        CHECK(values.within(size_of(wide(value - expected)), 4,
                            std::numeric_limits<T>::epsilon() * (1 + size_of(expected))));
        CHECK(loss(z.view(), graph.rows(), graph.cluster) == value);
        // Of two nodes, what draws them together and what keeps them apart all but cancel.
        CHECK(slopes_within(slopes, g, differences(x, definition), n == 2 ? 2048 : 16));
      }
  report_accuracy<T>("pam_c", "", in_epsilons, values, slopes);
}

TEST_CASE("PamC: calls, and what has a stated result", "[threads]") {
  using Catch::Matchers::ContainsSubstring;
  const perdita::pam_c<double> loss;
  some_graph<double> graph(300);
  const auto z = random_batch<double>(300, 6, 4);
  batch<double> g(300, 6), again(300, 6);
  const double value =
      loss(z.view(), graph.rows(), graph.cluster, g.view(), {.run_on = perdita::serial});
  for (const std::size_t threads : {2U, 7U}) {
    const threads_executor pool(threads, task_order::shuffled);
    CHECK(loss(z.view(), graph.rows(), graph.cluster, again.view(), {.run_on = pool}) == value);
    CHECK(again.x == g.x);
  }
  loss(z.view(), graph.rows(), graph.cluster, again.view(), {.scale = 2, .accumulate = true});
  CHECK(near(again.x[5], 3 * g.x[5], 1e-14));

  auto odd = z;
  for (index d = 0; d < 6; ++d)
    odd(4, d) = 0;
  CHECK(std::isfinite(loss(odd.view(), graph.rows(), graph.cluster, again.view())));
  odd(4, 0) = std::numeric_limits<double>::quiet_NaN();
  CHECK(std::isnan(loss(odd.view(), graph.rows(), graph.cluster, again.view())));
  CHECK(std::isnan(again.x[0]));
  { // Nobody has neighbours, and the only two meta-nodes cancel out.
    const std::vector<int> begin(5), none, cluster{0, 0, 1, 1};
    const std::vector<double> weight;
    batch<double> x(4, 2, 1), d_x(4, 2, 7);
    for (index k = 0; k < 2; ++k)
      x(0, k) = x(2, k) = -1;
    CHECK(near(loss(x.view(), {begin, none, weight}, cluster, d_x.view()),
               std::log(2 + 1e-10) - std::log(1e-10), 1e-14));
    CHECK(length_of(d_x.x) == 0);
  }
  const auto kept = g;
  graph.column[3] = 300;
  CHECK_THROWS_WITH(loss(z.view(), graph.rows(), graph.cluster, g.view()),
                    ContainsSubstring("columns[3] is 300"));
  graph.column[3] = 0;
  graph.weight[2] = -1;
  CHECK_THROWS_WITH(loss(z.view(), graph.rows(), graph.cluster, g.view()),
                    ContainsSubstring("weights[2] is -1"));
  graph.weight[2] = 1;
  graph.begin[1] = 5000;
  CHECK_THROWS_WITH(loss(z.view(), graph.rows(), graph.cluster, g.view()),
                    ContainsSubstring("begin[1] is 5000"));
  graph.begin[1] = 4;
  CHECK_THROWS_WITH(loss(z.view(), graph.rows(), std::vector<int>(3), g.view()),
                    ContainsSubstring("clusters is 3"));
  std::vector<double> long_weights(1800, 1);
  std::copy(graph.weight.begin(), graph.weight.end(), long_weights.begin());
  auto over_gradient = graph.rows();
  over_gradient.weight.data = long_weights.data();
  CHECK_THROWS_WITH(loss(z.view(), over_gradient, graph.cluster,
                         perdita::matrix_view(long_weights.data(), 300, 6)),
                    ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(perdita::pam_c<double>({.sharpness = 0}), ContainsSubstring("sharpness is 0"));
  CHECK(g.x == kept.x);
}

// --- Bad pairs ----------------------------------------------------------------------------------

TEMPLATE_TEST_CASE("Weights of bad pairs are their definition", "", float, double) {
  using T = TestType;
  const int n = 40, epochs = 5, total = 3; // so that m is about as large as the losses
  random_numbers random(3);
  std::vector<std::vector<T>> history;
  perdita::bad_pairs<T> memory(n, {.epochs = total, .warm_up = 2, .noisy = 1, .faulty = 1.5});
  std::vector<int> items;
  for (int i = 0; i < n; ++i)
    items.push_back((7 * i) % n);
  std::vector<T> losses(2 * n), w(2 * n, T(7));
  error_judge judge;
  for (int e = 0; e < epochs; ++e) {
    for (T& l : losses)
      l = static_cast<T>(1 + 0.3 * random.normal());
    memory.record(items, losses);
    history.push_back(losses);
    if (e < 2) {
      memory.weights(items, losses, w);
      CHECK(w == std::vector<T>(2 * n, T(1))); // there is no history yet
    }
    memory.end_epoch();
  }
  const auto mean_of_views = [&](const std::vector<T>& l, int i) {
    return wide((wide(l[static_cast<std::size_t>(i)]) + l[static_cast<std::size_t>(i + n)]) / 2);
  };
  std::vector<wide> m;
  wide mu = 0, square = 0;
  for (int i = 0; i < n; ++i) {
    wide sum = 0;
    for (int e = 0; e < epochs; ++e)
      sum += wide(e + 1) / total * mean_of_views(history[static_cast<std::size_t>(e)], i);
    m.push_back(sum / epochs);
    mu += m.back() / n;
  }
  for (const wide& x : m)
    square += (x - mu) * (x - mu) / n;
  const wide sd = sqrt(square);
  memory.weights(items, losses, w);
  int bad = 0, moved = 0;
  for (int i = 0; i < n; ++i) {
    const auto at = static_cast<std::size_t>(i);
    const bool flagged = m[at] <= mu - sd || m[at] >= mu + 1.5 * sd;
    bad += flagged ? 1 : 0;
    CHECK(memory.is_bad(items[at]) == flagged);
    const wide off = (mean_of_views(losses, i) - mu) / sd, density = exp(wide(-off * off / 2));
    const wide expected = flagged ? wide(density / (sd * sqrt(wide(8 * atan(wide(1)))))) : wide(1);
    moved += flagged && expected > 0.1 ? 1 : 0;
    for (const T got : {w[at], w[at + n]})
      CHECK(judge.within(size_of(wide(got - expected)), 16,
                         std::numeric_limits<T>::epsilon() * (1 + expected)));
  }
  CHECK(bad > 4);
  CHECK(moved > 1);
  CHECK(bad < n - 4);
  report_accuracy<T>("bad_pairs", "", in_epsilons, {judge.worst(), -1, judge.share()});

  perdita::bad_pairs<T> resumed(n, memory.settings());
  resumed.set_state(memory.state());
  std::vector<T> again(2 * n);
  resumed.weights(items, losses, again);
  CHECK(again == w);
}

TEST_CASE("Bad pairs: with a loss of anchors, and what has a stated result", "") {
  using Catch::Matchers::ContainsSubstring;
  const auto x = random_batch<double>(12, 4, 9);
  const std::vector<int> items{0, 1, 2, 3, 4, 5};
  std::vector<double> losses(12), w(12), ones(12, 1);
  perdita::bad_pairs<double> memory(6, {.epochs = 2, .noisy = 0.5, .faulty = 0.5});
  const perdita::sup_con<double> loss({.temperature = 0.2});
  loss.views(x.view(), 2, {.values = losses});
  memory.record(items, losses);
  memory.end_epoch();
  memory.weights(items, losses, w);
  CHECK(w != ones);
  batch<double> g(12, 4), h(12, 4);
  const double value = loss.views(x.view(), 2, g.view(), {.row_weights = w, .normaliser = 12});
  double expected = 0;
  for (std::size_t i = 0; i < 12; ++i)
    expected += w[i] * losses[i] / 12;
  CHECK(near(value, expected, 1e-14));
  loss.views(x.view(), 2, h.view(), {.upstream = w});
  for (std::size_t i = 0; i < g.x.size(); ++i)
    CHECK(std::abs(g.x[i] - h.x[i]) < 1e-14);

  perdita::bad_pairs<double> even(3, {.epochs = 7});
  const std::vector<double> alike(3, 0.7);
  std::vector<double> of_alike(3);
  for (int e = 0; e < 3; ++e) {
    even.record(std::vector<int>{0, 1, 2}, alike);
    even.end_epoch();
  }
  even.weights(std::vector<int>{0, 1, 2}, alike, of_alike);
  CHECK(of_alike == std::vector<double>(3, 1.0)); // no deviation: none is bad
  const auto kept = even.state().history;
  CHECK_THROWS_WITH(even.record(std::vector<int>{0, 1, 3}, alike),
                    ContainsSubstring("items[2] is 3"));
  CHECK_THROWS_WITH(even.record(std::vector<int>{0, 1}, alike), ContainsSubstring("losses is 3"));
  const std::vector<double> wrong{1, std::nan(""), 1};
  CHECK_THROWS_WITH(even.record(std::vector<int>{0, 1, 2}, wrong),
                    ContainsSubstring("losses[1] is"));
  CHECK_THROWS_WITH(even.weights(std::vector<int>{0, 1, 2}, alike, w),
                    ContainsSubstring("weights is 12"));
  const perdita::vector_view<const double> nowhere(nullptr, 3);
  CHECK_THROWS_WITH(even.record(std::vector<int>{0, 1, 2}, nowhere),
                    ContainsSubstring("losses is null"));
  auto state = even.state();
  state.history[1] = std::nan("");
  CHECK_THROWS_WITH(even.set_state(state), ContainsSubstring("history[1] is"));
  CHECK(even.state().history == kept);
  CHECK_THROWS_WITH(perdita::bad_pairs<double>(3, {}), ContainsSubstring("epochs is 0"));
}

// --- Gates --------------------------------------------------------------------------------------

namespace {

struct gate_classes {
  std::vector<int> anchors, wanted, keys;

  gate_classes(int n, int m) {
    for (int i = 0; i < n; ++i) {
      anchors.push_back(i % 5 - 2);
      wanted.push_back((i * i + 1) % 6 - 2); // of some there is no key
    }
    for (int j = 0; j < m; ++j)
      keys.push_back(j % 5 - 2);
  }
  perdita::gated_classes<int> views() const { return {anchors, wanted, keys}; }
};
wide gated(const std::array<wide_matrix, 3>& x, const gate_classes& classes, const wide& tau) {
  const wide_matrix z = unit_rows(x[0]), k = unit_rows(x[2]);
  wide total = 0;
  int pairs = 0;
  for (index i = 0; i < z.rows; ++i) {
    const int own = classes.anchors[static_cast<std::size_t>(i)],
              wanted = classes.wanted[static_cast<std::size_t>(i)];
    std::vector<wide> positives;
    wide negatives = 0;
    for (index j = 0; j < k.rows; ++j) {
      const int c = classes.keys[static_cast<std::size_t>(j)];
      wide s = 0;
      for (index d = 0; d < z.cols; ++d)
        s += z(i, d) * x[1](i, d) * x[1](i, d) * k(j, d) / tau;
      if (c == wanted)
        positives.push_back(s);
      else if (c != own)
        negatives += exp(s);
    }
    for (const wide& s : positives) {
      total += log(wide(exp(s) + negatives)) - s;
      ++pairs;
    }
  }
  return pairs > 0 ? wide(total / pairs) : wide(0);
}
template <class T> struct gate_run {
  std::vector<batch<T>> x, g;

  gate_run(index n, index m, index d) {
    for (std::uint64_t k = 0; k < 3; ++k) {
      x.push_back(random_batch<T>(k < 2 ? n : m, d, 41 + k));
      g.emplace_back(x.back().rows, d, T(7));
    }
    for (T& gate : x[1].x)
      gate = 1 / (1 + std::exp(-gate));
  }
  perdita::gated_batch<const T> in() const { return {x[0].view(), x[1].view(), x[2].view()}; }
  perdita::gated_batch<T> out() { return {g[0].view(), g[1].view(), g[2].view()}; }
};

} // namespace

TEMPLATE_TEST_CASE("Gated contrast is its definition", "", float, double) {
  using T = TestType;
  error_judge values, slopes;
  for (const double tau : {0.1, 1.0}) {
    gate_run<T> run(11, 17, 5);
    const gate_classes classes(11, 17);
    double d_tau = 0;
    const perdita::gated_contrast<T> loss({.temperature = tau, .d_temperature = &d_tau});
    std::array<wide_matrix, 3> x{wide_matrix(run.x[0]), wide_matrix(run.x[1]),
                                 wide_matrix(run.x[2])};
    const wide expected = gated(x, classes, tau);
    const T value = loss(run.in(), classes.views(), run.out());
    const double budget = 8 + 2 / tau;
    CHECK(values.within(size_of(wide(value - expected)), budget,
                        std::numeric_limits<T>::epsilon() * (1 + size_of(expected))));
    CHECK(loss(run.in(), classes.views()) == value);
    for (std::size_t k = 0; k < 3; ++k)
      CHECK(slopes_within(slopes, run.g[k],
                          differences(x[k], [&] { return gated(x, classes, tau); }), 2 * budget));
    const wide h = 1e-11;
    const wide slope = (gated(x, classes, tau + h) - gated(x, classes, tau - h)) / (2 * h);
    CHECK(slopes.within(size_of(wide(d_tau - slope)), 2 * budget,
                        std::numeric_limits<T>::epsilon() * (1 + size_of(slope))));
  }
  report_accuracy<T>("gated_contrast", "", in_epsilons, values, slopes);
}

TEST_CASE("Gated contrast: calls, and what has a stated result", "[threads]") {
  using Catch::Matchers::ContainsSubstring;
  const perdita::gated_contrast<double> loss;
  gate_run<double> run(150, 90, 6), again(150, 90, 6);
  const gate_classes classes(150, 90);
  const double value = loss(run.in(), classes.views(), run.out(), {.run_on = perdita::serial});
  for (const std::size_t threads : {2U, 7U}) {
    const threads_executor pool(threads, task_order::shuffled);
    CHECK(loss(again.in(), classes.views(), again.out(), {.run_on = pool}) == value);
    for (std::size_t k = 0; k < 3; ++k)
      CHECK(again.g[k].x == run.g[k].x);
  }
  loss(again.in(), classes.views(), again.out(), {.scale = 2, .accumulate = true});
  for (std::size_t k = 0; k < 3; ++k)
    CHECK(near(again.g[k].x[5], 3 * run.g[k].x[5], 1e-14));
  double d_tau[2];
  for (const int scale : {1, 8})
    perdita::gated_contrast<double>({.d_temperature = &d_tau[scale == 8]})(
        again.in(), classes.views(), again.out(), {.scale = static_cast<double>(scale)});
  CHECK(d_tau[1] == 8 * d_tau[0]);

  gate_run<double> small(2, 3, 4);
  gate_classes odd(2, 3);
  odd.wanted = {77, 78}; // no positives
  CHECK(loss(small.in(), odd.views(), small.out()) == 0);
  for (const auto& g : small.g)
    CHECK(length_of(g.x) == 0);
  odd.wanted = odd.anchors = {4, 4}, odd.keys = {4, 4, 4}; // no negatives
  CHECK(loss(small.in(), odd.views(), small.out()) == 0);
  for (const auto& g : small.g)
    CHECK(length_of(g.x) == 0);
  odd.wanted = {4, 4}, odd.keys = {4, 5, 6};
  small.x[0].x.assign(8, 0.0); // zero vectors: all tie
  CHECK(near(loss(small.in(), odd.views(), small.out()), std::log(3.0), 1e-14));
  CHECK(length_of(small.g[0].x) == 0);
  small.x[1].x[0] = std::numeric_limits<double>::quiet_NaN();
  CHECK(std::isnan(loss(small.in(), odd.views())));
  odd.wanted = {77, 5}; // an anchor that is not finite, without positives, spoils nobody else's
  CHECK(std::isfinite(loss(small.in(), odd.views(), small.out())));
  for (const auto& g : small.g)
    for (const double slope : g.x)
      CHECK(std::isfinite(slope));
  CHECK((small.g[0](0, 0) == 0 && small.g[1](0, 0) == 0));

  const auto kept = run.g;
  odd.keys.pop_back();
  CHECK_THROWS_WITH(loss(small.in(), odd.views()), ContainsSubstring("classes of keys is 2"));
  auto wrong = run.out();
  wrong.gates.rows -= 1;
  CHECK_THROWS_WITH(loss(run.in(), classes.views(), wrong),
                    ContainsSubstring("rows of the gradient of gates is 149"));
  wrong = run.out();
  wrong.anchors = wrong.gates;
  CHECK_THROWS_WITH(loss(run.in(), classes.views(), wrong), ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(perdita::gated_contrast<double>({.temperature = 1e-310}),
                    ContainsSubstring("whose inverse is finite"));
  CHECK_THROWS_WITH(perdita::gated_contrast<double>({.temperature = -1}),
                    ContainsSubstring("temperature is -1"));
  for (std::size_t k = 0; k < 3; ++k)
    CHECK(run.g[k].x == kept[k].x);
}

// --- Relations ----------------------------------------------------------------------------------

TEMPLATE_TEST_CASE("The binary focal loss is its definition", "", float, double) {
  using T = TestType;
  error_judge values, slopes, curvatures;
  for (const double gamma : {0.0, 0.5, 2.0})
    for (const double alpha : {0.5, 0.25})
      for (const int t : {0, 1}) {
        std::vector<T> z, g(161), h(161), each(161);
        for (int i = -80; i <= 80; ++i)
          z.push_back(static_cast<T>(0.25 * i));
        const std::vector<int> target(161, t);
        const perdita::binary_focal<T> loss({.gamma = static_cast<T>(gamma),
                                             .alpha = static_cast<T>(alpha),
                                             .reduction = perdita::reduction::sum});
        loss(z, target, g, {.values = each});
        loss.hessian_diagonal(z, target, h);
        const auto f = [&](const wide& at) {
          const wide x = t == 1 ? at : wide(-at), w = t == 1 ? alpha : 1 - alpha;
          return wide(w * pow(logistic(wide(-x)), wide(gamma)) * softplus(wide(-x)));
        };
        const wide step = 1e-9, unit = std::numeric_limits<T>::epsilon();
        for (std::size_t i = 0; i < z.size(); ++i) {
          const wide at = z[i], here = f(at), above = f(at + step), below = f(at - step);
          CHECK(values.within(size_of(wide(each[i] - here)), 8, unit * (wide(1e-3) + here)));
          const wide slope = (above - below) / (2 * step);
          CHECK(
              slopes.within(size_of(wide(g[i] - slope)), 16, unit * (wide(0.1) + size_of(slope))));
          const wide bend = (above - 2 * here + below) / (step * step);
          CHECK(curvatures.within(size_of(wide(h[i] - bend)), 64, unit * (1 + size_of(bend))));
        }
      }
  report_accuracy<T>("binary_focal", "", in_epsilons, values, slopes);

  const T inf = std::numeric_limits<T>::infinity();
  for (const T gamma : {T(0), T(2)}) {
    const perdita::binary_focal<T> loss({.gamma = gamma});
    std::vector<T> z{inf, -inf, std::numeric_limits<T>::quiet_NaN(), 0}, g(4), each(4);
    loss(z, std::vector<int>(4, 1), g, {.values = each});
    CHECK(each[0] == 0);
    CHECK(g[0] == 0);
    CHECK(each[1] == inf);
    CHECK(std::isnan(each[2]));
    CHECK(std::isnan(g[2]));
    CHECK(std::isfinite(g[3]));
    loss(z, std::vector<int>(4, 1), g, {.scale = 4, .values = each});
    CHECK(g[1] == T(-0.5)); // w = 1/2, in a mean of four
  }
  CHECK_THROWS_WITH(perdita::binary_focal<T>({.gamma = -1}),
                    Catch::Matchers::ContainsSubstring("gamma is -1"));
  CHECK_THROWS_WITH(perdita::binary_focal<T>({.alpha = 2}),
                    Catch::Matchers::ContainsSubstring("alpha is 2"));
}

TEST_CASE("Pairs for relational reasoning", "") {
  using Catch::Matchers::ContainsSubstring;
  const index items = 3, views = 4, d = 2;
  const perdita::relation_pairs pairs(items, views);
  CHECK(pairs.size() == 36);
  const auto target = pairs.targets<double>();
  int alike = 0;
  for (index i = 0; i < pairs.size(); ++i) {
    const auto [first, second, same] = pairs[i];
    CHECK(first / items < second / items);
    CHECK((first % items == second % items) == same);
    CHECK(target[static_cast<std::size_t>(i)] == (same ? 1 : 0));
    alike += same ? 1 : 0;
  }
  CHECK(alike == 18);
  CHECK(pairs[3].second == 3 + 2); // rolled by 1: item 0 meets item 2
  CHECK(pairs[9].second == 6 + 1); // by 2
  CHECK(pairs[15].second == 9 + 2);

  // The gradient of the features is that of the pairs, by the chain rule of a copy.
  const auto x = random_batch<double>(items * views, d, 3);
  const auto d_joined = random_batch<double>(pairs.size(), 2 * d, 4);
  batch<double> joined(pairs.size(), 2 * d), d_x(items * views, d, 7);
  pairs.concatenate(x.view(), joined.view());
  for (index i = 0; i < pairs.size(); ++i)
    for (index k = 0; k < d; ++k) {
      CHECK(joined(i, k) == x(pairs[i].first, k));
      CHECK(joined(i, d + k) == x(pairs[i].second, k));
    }
  pairs.gather(d_joined.view(), d_x.view());
  double along = 0, same = 0;
  for (std::size_t i = 0; i < joined.x.size(); ++i)
    along += joined.x[i] * d_joined.x[i];
  for (std::size_t i = 0; i < x.x.size(); ++i)
    same += x.x[i] * d_x.x[i];
  CHECK(near(along, same, 1e-12));
  CHECK_THROWS_WITH(perdita::relation_pairs(1, 2), ContainsSubstring("items is 1"));
  CHECK_THROWS_WITH(perdita::relation_pairs(2, 1), ContainsSubstring("views is 1"));
  CHECK_THROWS_WITH(pairs.concatenate(x.view(), d_x.view()),
                    ContainsSubstring("rows of the pairs is 12"));
  std::vector<double> both(static_cast<std::size_t>(pairs.size() * 2 * d + items * views * d));
  const perdita::matrix_view out(both.data(), pairs.size(), 2 * d);
  const auto in = [&](index first) {
    return perdita::matrix_view<const double>(both.data() + first, items * views, d);
  };
  CHECK_NOTHROW(pairs.concatenate(in(pairs.size() * 2 * d), out));
  CHECK_THROWS_WITH(pairs.concatenate(in(pairs.size() * 2 * d - 1), out),
                    ContainsSubstring("overlaps"));
}

// --- Group ordering -----------------------------------------------------------------------------

namespace {

/// With the whole permutation matrix, as written.
wide order_of_groups(std::vector<wide> x, std::size_t first, double steepness) {
  const wide pi = 4 * atan(wide(1));
  const std::size_t n = x.size();
  wide_matrix p(static_cast<index>(n), static_cast<index>(n));
  for (index i = 0; i < p.rows; ++i)
    p(i, i) = 1;
  for (std::size_t layer = 0; layer < n; ++layer)
    for (std::size_t a = layer % 2; a + 1 < n; a += 2) {
      const wide swaps = 0.5 - atan(wide(steepness * (x[a + 1] - x[a]))) / pi; // 1 − α
      const auto mix = [&](wide& low, wide& high) {
        const wide moved = swaps * (high - low);
        low += moved;
        high -= moved;
      };
      mix(x[a], x[a + 1]);
      for (index i = 0; i < p.rows; ++i)
        mix(p(i, static_cast<index>(a)), p(i, static_cast<index>(a) + 1));
    }
  wide loss = 0;
  for (index i = 0; i < p.rows; ++i) {
    wide negative = 0, positive = 0;
    for (index c = 0; c < p.cols; ++c)
      (c < static_cast<index>(first) ? negative : positive) += p(i, c);
    loss -= log(i < static_cast<index>(first) ? negative : positive) / wide(n);
  }
  return loss;
}
/// A definition for one batch after another: an anchor whose scores are those of the call before,
/// as most are when one number is moved, keeps its term.
class group_ordering {
public:
  group_ordering(std::size_t k, double steepness) : k_(k), steepness_(steepness) {}
  wide operator()(const wide_comparisons& c);

private:
  struct term {
    std::vector<wide> scores;
    std::size_t first = 0;
    wide value = 0;
  };
  std::size_t k_;
  double steepness_;
  std::vector<term> kept_;
};
wide group_ordering::operator()(const wide_comparisons& c) {
  kept_.resize(static_cast<std::size_t>(c.anchors()));
  wide total = 0;
  int anchors = 0;
  for (index i = 0; i < c.anchors(); ++i) {
    if (!c.has(i, 1) || !c.has(i, -1))
      continue;
    std::vector<wide> negative, positive;
    for (index j = 0; j < c.candidates(); ++j)
      if (c.of(i, j) != 0)
        (c.of(i, j) > 0 ? positive : negative).push_back(c.score(i, j));
    std::sort(negative.begin(), negative.end());
    std::sort(positive.begin(), positive.end());
    if (negative.size() > k_)
      negative.erase(negative.begin(), negative.end() - static_cast<std::ptrdiff_t>(k_));
    const std::size_t first = negative.size();
    negative.insert(negative.end(), positive.begin(), positive.end());
    term& t = kept_[static_cast<std::size_t>(i)];
    if (t.first != first || t.scores != negative)
      t = {negative, first, order_of_groups(negative, first, steepness_)};
    total += t.value;
    ++anchors;
  }
  return anchors > 0 ? wide(total / anchors) : wide(0);
}

} // namespace

TEMPLATE_TEST_CASE("Group ordering is its definition", "", float, double) {
  for (const int classes : {1, 3})
    for (const double steepness : {1.0, 6.0})
      check_anchor_values<TestType>(
          "group_ordering",
          perdita::group_ordering<TestType>({.negatives = 3, .steepness = steepness}),
          {.value_budget = 8, .gradient_budget = 32}, group_ordering(3, steepness), 7, 9, 4,
          classes);
  check_anchor_values<TestType>(
      "group_ordering", perdita::group_ordering<TestType>({.negatives = 3, .normalise = false}),
      {.normalise = false, .value_budget = 8, .gradient_budget = 32}, group_ordering(3, 1), 7, 9, 4,
      3);
}

TEST_CASE("Group ordering: calls, and what has a stated result", "[threads]") {
  using Catch::Matchers::ContainsSubstring;
  check_anchor_calls(perdita::group_ordering<double>());
  const perdita::group_ordering<double> loss({.negatives = 1});
  batch<double> equal(4, 3, 2.0), g(4, 3, 7.0);
  CHECK(near(loss(equal.view(), std::vector<int>{1, 1, 2, 2}, g.view()), std::log(2.0), 1e-14));
  CHECK(loss(equal.view(), std::vector<int>{1, 1, 1, 1}, g.view()) == 0); // no negatives
  CHECK(loss(equal.view(), std::vector<int>{1, 2, 3, 4}, g.view()) == 0); // no positives
  CHECK(length_of(g.x) == 0);
  { // A perfect order has a loss: one swap, of cosines 1 and −1.
    batch<double> x(1, 1, 1.0), y(2, 1, 1.0), d_x(1, 1), d_y(2, 1);
    y(1, 0) = -1;
    const double alpha = 0.5 + std::atan(2.0) / std::acos(-1.0);
    CHECK(near(loss(x.view(), y.view(), std::vector<int>{1}, std::vector<int>{1, 2}, d_x.view(),
                    d_y.view()),
               -std::log(alpha), 1e-14));
  }
  CHECK_THROWS_WITH(perdita::group_ordering<double>({.negatives = 0}),
                    ContainsSubstring("negatives is 0"));
  CHECK_THROWS_WITH(perdita::group_ordering<double>({.steepness = 0}),
                    ContainsSubstring("steepness is 0"));
}

// --- Supervised alignment ------------------------------------------------------------------------

TEMPLATE_TEST_CASE("Supervised alignment is its definition", "[threads]", float, double) {
  using T = TestType;
  using Catch::Matchers::ContainsSubstring;
  error_judge values, slopes;
  const index n = 70;
  const auto x = random_batch<T>(n, 3, 2);
  std::vector<T> numbers;
  std::vector<int> classes;
  for (index i = 0; i < n; ++i) {
    numbers.push_back(static_cast<T>(i * i % 11) / 8);
    classes.push_back(static_cast<int>(i * i % 11));
  }
  const perdita::supervised_alignment<T> loss({.temperature = 0.125});
  const auto check = [&](const auto& y, auto weight) {
    wide total = 0;
    wide_matrix expected(n, 3);
    for (index i = 0; i < n; ++i)
      for (index j = 0; j < i; ++j)
        for (index d = 0; d < 3; ++d) {
          const wide apart = wide(x(i, d)) - wide(x(j, d)), w = weight(i, j) * 2 / (n * (n - 1));
          total += w * apart * apart;
          expected(i, d) += 2 * w * apart;
          expected(j, d) -= 2 * w * apart;
        }
    batch<T> g(n, 3, T(7)), again(n, 3), added(n, 3, T(1));
    const T got = loss(x.seen(), y, g.view(), {.run_on = perdita::serial});
    CHECK(loss(x.seen(), y) == got);
    CHECK(values.within(size_of(wide(got - total)), 4, std::numeric_limits<T>::epsilon() * total));
    CHECK(slopes_within(slopes, g, expected, 8));
    const threads_executor pool(3, task_order::shuffled);
    loss(x.seen(), y, again.view(), {.run_on = pool});
    CHECK(again.x == g.x);
    loss(x.seen(), y, added.view(), {.scale = 2, .accumulate = true});
    CHECK(std::abs(added(1, 1) - (1 + 2 * g(1, 1))) <= 2 * std::numeric_limits<T>::epsilon());
  };
  const auto at = [](index i) { return static_cast<std::size_t>(i); };
  check(numbers, [&](index i, index j) {
    const wide apart = wide(numbers[at(i)]) - wide(numbers[at(j)]);
    return exp(wide(-4 * apart * apart));
  });
  check(classes, [&](index i, index j) { return wide(classes[at(i)] == classes[at(j)] ? 1 : 0); });
  report_accuracy<T>("supervised_alignment", "", in_epsilons, values, slopes);

  batch<T> one(1, 3, T(2)), g(1, 3, T(7));
  CHECK(loss(one.seen(), std::vector<int>{4}, g.view()) == 0);
  CHECK(g.x == std::vector<T>(3, T(0)));
  CHECK(loss(batch<T>(0, 3).seen(), std::vector<int>{}) == 0);
  auto spoilt = x;
  spoilt(3, 1) = std::numeric_limits<T>::quiet_NaN();
  CHECK(std::isnan(loss(spoilt.seen(), numbers)));
  numbers[2] = std::numeric_limits<T>::quiet_NaN();
  CHECK(std::isnan(loss(x.seen(), numbers)));
  CHECK_THROWS_WITH(loss(x.seen(), std::vector<int>{1}), ContainsSubstring("attributes is 1"));
  CHECK_THROWS_WITH(loss(one.seen(), std::vector<int>{1}, one.view()),
                    ContainsSubstring("overlaps"));
  batch<T> over(n, 3, T(7));
  CHECK_THROWS_WITH(
      loss(x.seen(), perdita::vector_view<const T>(over.x.data() + 2, n), over.view()),
      ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(perdita::supervised_alignment<T>({.temperature = 0}),
                    ContainsSubstring("temperature is 0"));
}

TEST_CASE("Adaptive multi-head contrastive: bounds of temperatures, epsilon of Barlow Twins", "") {
  const perdita::bounded_temperature bounded{.low = 0.25, .high = 0.75};
  CHECK(bounded(0) == 0.5);
  CHECK(bounded.slope(0.5) == 0.125); // (t − low)(high − t)/(high − low)
  // One feature of variance 1 in both views, with ε = 3: C = 1/4 for 1
  batch<double> x(2, 1), t(1, 1, 1.0);
  x.x = {1, -1};
  const perdita::amcl_barlow<double> loss({.beta = 0, .epsilon = 3});
  CHECK(near(loss(x.seen(), x.seen(), t.seen()), 0.75 * 0.75, 1e-14));
}

} // namespace perdita_tests
