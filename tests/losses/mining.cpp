// SPDX-License-Identifier: MIT

// Losses of the pairs and triplets of a batch.

#include <perdita/pair_margin.hpp>
#include <perdita/triplet_mining.hpp>

#include "support/anchors.hpp"

namespace perdita_tests {
namespace {

using perdita::index;
using perdita::pair_mean;
using perdita::triplet_mean;
using perdita::triplet_measure;
using negatives = perdita::triplet_negatives;
using positives = perdita::triplet_positives;
using penalty = perdita::triplet_penalty;

wide pairs(const wide_comparisons& c, const perdita::pair_margin_options& o) {
  wide sum[2] = {0, 0};
  int all = 0, above[2] = {0, 0};
  for (index i = 0; i < c.anchors(); ++i)
    for (index j = 0; j < c.candidates(); ++j) {
      const int r = c.of(i, j);
      if (r == 0)
        continue;
      ++all;
      const wide h = r == 1 ? wide(c.score(i, j) - o.positive_margin)
                            : wide(o.negative_margin - c.score(i, j));
      if (h > 0) {
        sum[r == 1 ? 0 : 1] += o.squared ? wide(h * h / 2) : h;
        ++above[r == 1 ? 0 : 1];
      }
    }
  if (o.reduction == perdita::reduction::sum)
    return sum[0] + sum[1];
  if (o.mean == pair_mean::pairs)
    return (sum[0] + sum[1]) / all;
  wide total = 0;
  for (int k = 0; k < 2; ++k)
    if (above[k] > 0)
      total += sum[k] / above[k];
  return total;
}

/// The measure of each candidate of anchor i.
std::vector<wide> measured(const wide_comparisons& c, index i, triplet_measure measure) {
  std::vector<wide> u;
  for (index j = 0; j < c.candidates(); ++j) {
    const wide d = c.score(i, j);
    u.push_back(measure == triplet_measure::distance ? d : wide(d * d));
    if (measure == triplet_measure::cosine_distance)
      u.back() /= 2;
  }
  return u;
}
/// The negatives of anchor i that positive p is compared with.
std::vector<std::size_t> mined(const wide_comparisons& c, index i, const std::vector<wide>& u,
                               std::size_t p, const perdita::triplet_mining_options& o) {
  std::vector<std::size_t> result, others;
  for (std::size_t n = 0; n < u.size(); ++n)
    if (c.of(i, static_cast<index>(n)) == -1)
      others.push_back(n);
  const auto extreme = [&](int sign, const wide& least) {
    std::size_t best = u.size();
    for (const std::size_t n : others)
      if (u[n] > least && (best == u.size() || sign * u[n] < sign * u[best]))
        best = n;
    if (best < u.size())
      result.push_back(best);
  };
  for (const std::size_t n : others) {
    const wide gap = u[n] - u[p];
    if (o.negatives == negatives::all || (o.negatives == negatives::hard && gap <= 0) ||
        (o.negatives == negatives::semi_hard && gap > 0 && gap <= o.margin) ||
        (o.negatives == negatives::easy && gap > o.margin))
      result.push_back(n);
  }
  if (o.negatives == negatives::next)
    extreme(1, u[p]);
  if (o.negatives == negatives::nearest)
    extreme(1, -1);
  if (o.negatives == negatives::next && result.empty())
    extreme(-1, -1);
  return result;
}
/// With o.swap, candidates are the anchors.
wide triplets(const wide_comparisons& c, const perdita::triplet_mining_options& o,
              const std::vector<double>& weights = {}) {
  wide total = 0, terms = 0;
  for (index i = 0; i < c.anchors(); ++i) {
    const auto u = measured(c, i, o.measure);
    std::vector<std::size_t> own;
    for (std::size_t p = 0; p < u.size(); ++p) {
      if (c.of(i, static_cast<index>(p)) != 1)
        continue;
      if (o.positives == positives::all || own.empty())
        own.push_back(p);
      else if (o.positives == positives::farthest ? u[p] > u[own[0]] : u[p] < u[own[0]])
        own[0] = p;
    }
    for (const std::size_t p : own) {
      auto nearest = u;
      if (o.swap) {
        const auto of_p = measured(c, static_cast<index>(p), o.measure);
        for (std::size_t n = 0; n < u.size(); ++n)
          if (c.of(i, static_cast<index>(n)) == -1)
            nearest[n] = smaller(u[n], of_p[n]);
      }
      for (const std::size_t n : mined(c, i, nearest, p, o)) {
        const wide miss = o.margin + (u[p] - nearest[n]);
        const wide term = o.penalty == penalty::hinge ? larger(0, miss) : softplus(miss);
        const wide weight = weights.empty() ? 1 : weights[static_cast<std::size_t>(i)];
        total += weight * term;
        terms += o.mean == triplet_mean::triplets || term > 0 ? weight : wide(0);
      }
    }
  }
  return terms > 0 ? wide(total / terms) : wide(0);
}

} // namespace

TEMPLATE_TEST_CASE("Margins of pairs are their definition", "", float, double) {
  using perdita::reduction;
  for (const perdita::pair_margin_options& o : {
           perdita::pair_margin_options{},
           perdita::pair_margin_options{.squared = false, .mean = pair_mean::nonzero},
           perdita::pair_margin_options{.positive_margin = 0.5,
           .negative_margin = 1.5,
           .mean = pair_mean::nonzero,
           .normalise = false},
           perdita::pair_margin_options{
               .squared = false, .mean = pair_mean::nonzero, .reduction = reduction::sum},
       })
    for (const int classes : {1, 4, 30})
      check_anchor_values<TestType>(
          "pair_margin", perdita::pair_margin<TestType>(o),
          {.normalise = o.normalise, .distances = true, .value_budget = 4, .gradient_budget = 16},
          [&](const wide_comparisons& c) { return pairs(c, o); }, 8, 12, 3, classes);
}

TEMPLATE_TEST_CASE("Losses of mined triplets are their definition", "", float, double) {
  const auto check = [](const perdita::triplet_mining_options& o, int classes) {
    INFO("positives " << static_cast<int>(o.positives) << ", negatives "
                      << static_cast<int>(o.negatives) << ", " << classes << " classes");
    check_anchor_values<TestType>(
        "triplet_mining", perdita::triplet_mining<TestType>(o),
        {.normalise = o.normalise, .distances = true, .value_budget = 4, .gradient_budget = 24},
        [&](const wide_comparisons& c) { return triplets(c, o); }, 7, 12, 3, classes);
  };
  for (const auto p : {positives::all, positives::farthest, positives::nearest})
    for (const auto n : {negatives::all, negatives::hard, negatives::semi_hard, negatives::easy,
                         negatives::nearest, negatives::next})
      for (const auto kind : {penalty::hinge, penalty::softplus}) {
        const bool squared = n == negatives::next, every = p == positives::all;
        if (kind == penalty::softplus &&
            every != (n == negatives::all || n == negatives::semi_hard))
          continue; // enough of them
        check({.margin = squared ? 1.0 : 0.3,
               .measure = squared ? triplet_measure::squared_distance : triplet_measure::distance,
               .positives = p,
               .negatives = n,
               .penalty = kind,
               .mean = kind == penalty::hinge && every ? triplet_mean::nonzero
                                                       : triplet_mean::triplets},
              3);
      }
  for (const int classes : {1, 2, 30})
    check({.measure = triplet_measure::cosine_distance}, classes);
  check({.margin = 1, .mean = triplet_mean::triplets, .normalise = false}, 3);
}

TEMPLATE_TEST_CASE("Swapped triplets are their definition", "", float, double) {
  using T = TestType;
  error_judge values, slopes;
  const anchor_subject subject{.distances = true};
  const std::vector<int> labels{0, 1, 0, 2, 1, 0, 2, 2, 0, 1};
  const auto who = relations(labels, labels, true);
  const std::vector<T> weights{1, 2, 0, 1, T(0.5), 3, 1, 0, 1, 1};
  for (const auto n : {negatives::all, negatives::hard, negatives::semi_hard, negatives::easy})
    for (const auto kind : {penalty::hinge, penalty::softplus})
      for (const auto measure : {triplet_measure::distance, triplet_measure::cosine_distance}) {
        const perdita::triplet_mining_options o{
            .margin = 0.4,
            .measure = measure,
            .negatives = n,
            .penalty = kind,
            .mean = kind == penalty::hinge ? triplet_mean::nonzero : triplet_mean::triplets,
            .swap = true};
        const perdita::triplet_mining<T> loss(o);
        const auto x = random_batch<T>(10, 3, 21 + static_cast<std::uint64_t>(n));
        wide_matrix wide_x(x);
        comparer compared(who, subject);
        const auto value = [&] { return triplets(compared(wide_x, wide_x), o); };
        batch<T> g(10, 3, T(7));
        const T got = loss(x.view(), labels, g.view());
        const wide expected = value();
        CHECK(loss(x.view(), labels) == got);
        CHECK(values.within(size_of(wide(got - expected)), 4,
                            std::numeric_limits<T>::epsilon() * (1 + size_of(expected))));
        CHECK(slopes_within(slopes, g, differences(wide_x, value), 24));
        // A negative's second distance is of another row, but of its anchor's weight.
        const auto weighted_value = [&] {
          return triplets(compared(wide_x, wide_x), o, {weights.begin(), weights.end()});
        };
        const T of_weights = loss(x.view(), labels, g.view(), {.row_weights = weights});
        const wide by_weight = weighted_value();
        CHECK(values.within(size_of(wide(of_weights - by_weight)), 4,
                            std::numeric_limits<T>::epsilon() * (1 + size_of(by_weight))));
        CHECK(slopes_within(slopes, g, differences(wide_x, weighted_value), 24));
      }
  report_accuracy<T>("triplet_mining", "swap", in_epsilons, values, slopes);
}

TEST_CASE("Swapped triplets: given triplets, threads, refusals", "[threads]") {
  using Catch::Matchers::ContainsSubstring;
  // Two of one class at 0 and 1, others at 3 and 1.25: from the second of the two.
  batch<double> x(4, 1), g(4, 1);
  x.x = {0, 1, 3, 1.25};
  const std::vector<int> labels{0, 0, 1, 2};
  const perdita::triplet_mining<double> loss(
      {.margin = 1.5, .mean = triplet_mean::triplets, .swap = true, .normalise = false});
  // D(a, n) is 3, 1.25 of the first and 2, 0.25 of the second: 2 and 0.25 count, in both triplets.
  CHECK(loss(x.view(), labels, g.view()) == (2 * 0.5 + 2 * 2.25) / 4);
  const double slopes[] = {-4, 4 + 4, -2, -2}; // of D = 1 four times, of 2 and 0.25 twice each
  for (std::size_t i = 0; i < 4; ++i)
    CHECK(std::abs(g.x[i] - slopes[i] / 4) < 1e-15);

  const auto many = random_batch<double>(150, 6, 5);
  std::vector<int> of_many;
  for (int i = 0; i < 150; ++i)
    of_many.push_back(i % 40);
  batch<double> once(150, 6), again(150, 6);
  const perdita::triplet_mining<double> wide_margin({.margin = 1, .swap = true});
  const double value = wide_margin(many.view(), of_many, once.view(), {.run_on = perdita::serial});
  const threads_executor pool(3, task_order::shuffled);
  CHECK(wide_margin(many.view(), of_many, again.view(), {.run_on = pool}) == value);
  CHECK(again.x == once.x);
  auto spoilt = x;
  spoilt(2, 0) = std::numeric_limits<double>::quiet_NaN();
  CHECK(std::isnan(loss(spoilt.view(), labels)));
  CHECK(loss(x.view(), std::vector<int>{0, 1, 2, 3}, g.view()) == 0);
  CHECK(g.x == std::vector<double>(4, 0.0));

  const auto filter = [](index, double*, index) {};
  CHECK_THROWS_WITH(loss(x.view(), x.view(), labels, labels), ContainsSubstring("swap is 1"));
  CHECK_THROWS_WITH(loss(x.view(), labels, {.filter = filter}), ContainsSubstring("swap is 1"));
  CHECK_THROWS_WITH(
      perdita::triplet_mining<double>({.positives = positives::nearest, .swap = true}),
      ContainsSubstring("swap is 1"));
  CHECK_THROWS_WITH(perdita::triplet_mining<double>({.negatives = negatives::next, .swap = true}),
                    ContainsSubstring("swap is 1"));
}

TEST_CASE("Batch hard, soft margin: golden value", "") {
  const auto x = sheet_x();
  batch<double> g(6, 4);
  const perdita::triplet_mining<double> loss({.margin = 0,
                                              .positives = positives::farthest,
                                              .negatives = negatives::nearest,
                                              .penalty = penalty::softplus,
                                              .normalise = false});
  CHECK(near(loss(x.view(), std::vector<int>{0, 0, 1, 1, 2, 2}, g.view()), 1.00198740812, 1e-11));
  CHECK(near(length_of(g.x), 0.476277675, 1e-8));
}

TEST_CASE("Triplets by hand", "") {
  // Four points on a line, by hand: 0 and 1 of one class, 3 and 4.5 of another, all of 8 triplets.
  batch<double> x(4, 1), g(4, 1);
  x.x = {0, 1, 3, 4.5};
  const std::vector<int> labels{0, 0, 1, 1};
  const perdita::triplet_mining<double> loss(
      {.margin = 2.5, .mean = triplet_mean::triplets, .normalise = false});
  // 0: 1 − 3 + 2.5 = 0.5, −1 → 0; 1: 1 − 2 + 2.5 = 1.5, 1 − 3.5 + 2.5 = 0 (the kink);
  // 3: 1.5 − 3 + 2.5 = 1, 1.5 − 2 + 2.5 = 2; 4.5: −0.5 → 0, 1.5 − 3.5 + 2.5 = 0.5.
  CHECK(loss(x.view(), labels, g.view()) == 5.5 / 8);
  // Of (0, 1; 3), (1, 0; 3), (3, 4.5; 0), (3, 4.5; 1) and (4.5, 3; 1).
  const double slopes[] = {0 - 1 + 1 + 0 + 0, 1 + 2 + 0 + 1 + 1, -1 - 1 - 2 - 2 - 1,
                           0 + 0 + 1 + 1 + 0};
  for (std::size_t i = 0; i < 4; ++i)
    CHECK(std::abs(g.x[i] - slopes[i] / 8) < 1e-15);
  CHECK(perdita::triplet_mining<double>({.margin = 2.5, .normalise = false})(x.view(), labels) ==
        5.5 / 5);
  const auto hard = [&](positives p, negatives n) {
    return perdita::triplet_mining<double>({.margin = 2.5,
                                            .positives = p,
                                            .negatives = n,
                                            .mean = triplet_mean::triplets,
                                            .normalise = false})(x.view(), labels);
  };
  CHECK(hard(positives::farthest, negatives::nearest) == (0.5 + 1.5 + 2 + 0.5) / 4);
  CHECK(hard(positives::all, negatives::easy) == 0);
}

TEST_CASE("Pairs and triplets: calls", "[threads]") {
  check_anchor_calls(perdita::pair_margin<float>({.negative_margin = 2.1}));
  check_anchor_calls(perdita::pair_margin<double>({.squared = false, .mean = pair_mean::nonzero}));
  check_anchor_calls(perdita::triplet_mining<double>({.margin = 2}));
  check_anchor_calls(perdita::triplet_mining<float>({.margin = 2,
                                                     .positives = positives::farthest,
                                                     .negatives = negatives::nearest,
                                                     .mean = triplet_mean::triplets}));
}

TEST_CASE("Pairs and triplets: a weight of 3 is three anchors", "") {
  const auto x = random_batch<double>(4, 3, 1), y = random_batch<double>(9, 3, 2);
  const std::vector<int> of_x{0, 1, 2, 0}, of_y{0, 1, 2, 0, 1, 2, 0, 1, 2};
  const std::vector<double> weights{1, 3, 0, 2};
  batch<double> repeated(6, 3), g(4, 3), g_repeated(6, 3), h(9, 3), h_repeated(9, 3);
  std::vector<int> of_repeated;
  index row = 0;
  for (index i = 0; i < 4; ++i)
    for (int k = 0; k < static_cast<int>(weights[static_cast<std::size_t>(i)]); ++k, ++row) {
      std::copy_n(&x.x[static_cast<std::size_t>(3 * i)], 3,
                  &repeated.x[static_cast<std::size_t>(3 * row)]);
      of_repeated.push_back(of_x[static_cast<std::size_t>(i)]);
    }
  const auto check = [&](const auto& loss) {
    const double value =
        loss(x.view(), y.view(), of_x, of_y, g.view(), h.view(), {.row_weights = weights});
    CHECK(value != 0);
    CHECK(near(
        value,
        loss(repeated.view(), y.view(), of_repeated, of_y, g_repeated.view(), h_repeated.view()),
        1e-14));
    for (std::size_t k = 0; k < h.x.size(); ++k)
      CHECK(std::abs(h.x[k] - h_repeated.x[k]) < 1e-14);
    for (std::size_t k = 0; k < 3; ++k) // the second of four
      CHECK(std::abs(g.x[3 + k] - 3 * g_repeated.x[3 + k]) < 1e-14);
  };
  check(perdita::pair_margin<double>({.squared = false, .mean = pair_mean::nonzero}));
  check(perdita::pair_margin<double>());
  check(perdita::triplet_mining<double>({.margin = 0.5}));
}

TEMPLATE_TEST_CASE("Pairs and triplets: what has a stated result", "", float, double) {
  using T = TestType;
  const std::vector<int> two{0, 0, 0, 1, 1, 1}, same(6, 1), apart{0, 1, 2, 3, 4, 5};
  batch<T> equal(6, 3, T(0.7)), g(6, 3, T(9));
  const batch<T> zero(6, 3), one(1, 3, T(1));
  const std::vector<T> still(18, T(0));
  const auto is = [&](const auto& loss, const batch<T>& x, const std::vector<int>& labels,
                      double expected) {
    g.x.assign(18, T(9));
    CHECK(near(static_cast<double>(loss(x.view(), labels, g.view())), expected, 1e-6));
    CHECK(g.x == still);
  };
  const perdita::pair_margin<T> square;
  const perdita::pair_margin<T> line({.squared = false, .mean = pair_mean::nonzero});
  for (const auto& x : {equal, zero}) { // all distances 0: 12 pairs that belong, 18 that do not
    is(square, x, two, 18 * 0.5 / 30);
    is(line, x, two, 1);
    is(line, x, same, 0);
    is(square, x, apart, 0.5);
    for (const auto n : {negatives::all, negatives::hard, negatives::nearest, negatives::next})
      is(perdita::triplet_mining<T>({.negatives = n}), x, two, 0.2);
    for (const auto n : {negatives::semi_hard, negatives::easy})
      is(perdita::triplet_mining<T>({.negatives = n}), x, two, 0);
    is(perdita::triplet_mining<T>({.margin = 0, .penalty = penalty::softplus}), x, two,
       std::log(2.0));
    is(perdita::triplet_mining<T>(), x, same, 0);
    is(perdita::triplet_mining<T>(), x, apart, 0);
  }
  batch<T> of_one(1, 3, T(9));
  const std::vector<int> label{7};
  CHECK(square(one.view(), label, of_one.view()) == 0);
  CHECK(line(one.view(), label, of_one.view()) == 0);
  CHECK(perdita::triplet_mining<T>()(one.view(), label, of_one.view()) == 0);
  CHECK(of_one.x == std::vector<T>(3, T(0)));

  { // Ties: the first of the farthest positives and of the nearest negatives.
    batch<T> x(5, 2), d(5, 2);
    x(0, 0) = 1, x(1, 1) = 1, x(2, 1) = -1, x(3, 0) = x(4, 0) = T(0.6), x(3, 1) = T(0.8),
         x(4, 1) = T(-0.8);
    perdita::triplet_mining<T>({.margin = 3,
                                .positives = positives::farthest,
                                .negatives = negatives::nearest,
                                .normalise = false})(
        x.view(), std::vector<int>{0, 0, 0, 1, 2}, d.view(),
        {.row_weights = std::vector<T>{1, 0, 0, 0, 0}});
    CHECK((d(1, 0) != 0 && d(3, 0) != 0 && d(2, 0) == 0 && d(4, 0) == 0));
  }
  CHECK_THROWS_WITH(
      perdita::triplet_mining<T>({.measure = triplet_measure::cosine_distance, .normalise = false}),
      Catch::Matchers::ContainsSubstring("normalise is 0"));
  CHECK_THROWS_WITH(
      perdita::pair_margin<T>({.negative_margin = std::numeric_limits<double>::infinity()}),
      Catch::Matchers::ContainsSubstring("negative_margin is inf"));
  const auto refused = [](const perdita::triplet_mining_options& o, const char* what) {
    CHECK_THROWS_WITH(perdita::triplet_mining<T>(o), Catch::Matchers::ContainsSubstring(what));
  };
  refused({.measure = static_cast<triplet_measure>(3)}, "measure is 3");
  refused({.positives = static_cast<positives>(-1)}, "positives is -1");
  refused({.negatives = static_cast<negatives>(6)}, "negatives is 6");
  refused({.penalty = static_cast<perdita::triplet_penalty>(2)}, "penalty is 2");
  refused({.mean = static_cast<perdita::triplet_mean>(2)}, "mean is 2");
  CHECK_THROWS_WITH(perdita::pair_margin<T>({.mean = static_cast<pair_mean>(2)}),
                    Catch::Matchers::ContainsSubstring("mean is 2"));
}

TEMPLATE_TEST_CASE("Pairs and triplets: an anchor that is not finite is no other anchor's matter",
                   "", float, double) {
  using T = TestType;
  check_spoilt_anchor(perdita::pair_margin<T>({.mean = pair_mean::pairs}));
  const auto all = perdita::triplet_mean::triplets;
  for (const auto n : {negatives::all, negatives::nearest, negatives::next})
    for (const auto p : {perdita::triplet_positives::all, perdita::triplet_positives::farthest})
      check_spoilt_anchor(
          perdita::triplet_mining<T>({.positives = p, .negatives = n, .mean = all}));
}

TEST_CASE("Near neighbours: gradients lose as many bits as the distance has", "") {
  const perdita::pair_margin<float> narrow({.squared = false});
  const perdita::pair_margin<double> full({.squared = false});
  const std::vector<int> labels{0, 0};
  const auto start = random_batch<float>(2, 16, 9);
  double worst = 0;
  for (const float distance : {0.1F, 1e-2F, 1e-3F, 1e-4F, 1e-5F, 1e-6F, 1e-7F, 0.0F}) {
    batch<float> x = start, g(2, 16);
    batch<double> wide_x(2, 16), h(2, 16);
    for (index k = 0; k < 16; ++k)
      x(1, k) = x(0, k) + distance * start(1, k);
    std::copy(x.x.begin(), x.x.end(), wide_x.x.begin());
    const float value = narrow(x.view(), labels, g.view());
    const double expected = full(wide_x.view(), labels, h.view());
    double size = 0, error = 0;
    for (std::size_t k = 0; k < 32; ++k) {
      size = std::max(size, std::abs(h.x[k]));
      error = std::max(error, std::abs(static_cast<double>(g.x[k]) - h.x[k]));
    }
    INFO("distance " << expected << ": " << value << ", error " << error << " of " << size);
    CHECK(std::abs(static_cast<double>(value) - expected) <=
          1e-6 * expected + 1.2e-7); // of the factors of unit vectors
    if (expected > 1e-6) {
      const double unit = 1.2e-7 / expected * size;
      worst = std::max(worst, error / unit);
      CHECK(error <= 4 * unit);
    }
    CHECK(error < 4); // bounded, whatever its direction
    if (distance == 0)
      CHECK(g.x == std::vector<float>(32, 0.0F));
  }
  report_accuracy<float>("pair_margin", "near", in_epsilons, {-1, -1, worst / 4});
}

} // namespace perdita_tests
