// SPDX-License-Identifier: MIT

// Contrastive losses of whole rows of comparisons.

#include <perdita/decoupled.hpp>
#include <perdita/hard_contrastive.hpp>
#include <perdita/sig_lip.hpp>
#include <perdita/sup_con.hpp>
#include <perdita/uniformity.hpp>

#include <algorithm>

#include "support/anchors.hpp"

namespace perdita_tests {
namespace {

using perdita::index;

/// Of an anchor's scores, those with this relation.
std::vector<wide> chosen(const wide_comparisons& c, index i, int which) {
  std::vector<wide> result;
  for (index j = 0; j < c.candidates(); ++j)
    if (c.of(i, j) == which)
      result.push_back(c.score(i, j));
  return result;
}
wide sum_of(const std::vector<wide>& x) {
  wide sum = 0;
  for (const wide& a : x)
    sum += a;
  return sum;
}
wide mean_of(const std::vector<wide>& x) { return sum_of(x) / wide(static_cast<double>(x.size())); }
wide log_sum(const std::vector<wide>& x, double rate) {
  wide sum = 0;
  for (const wide& a : x)
    sum += exp(wide(rate * a));
  return log(sum);
}
/// Σ f(i) over anchors for which `counts`, divided by how many there are.
template <class Counts, class F> wide mean_over(const wide_comparisons& c, Counts counts, F f) {
  wide total = 0;
  int n = 0;
  for (index i = 0; i < c.anchors(); ++i)
    if (counts(i)) {
      total += f(i);
      ++n;
    }
  return n == 0 ? wide(0) : wide(total / n);
}

wide sig_lip(const wide_comparisons& c, double scale, double bias) {
  return mean_over(
      c, [](index) { return true; },
      [&](index i) {
        wide sum = 0;
        for (index j = 0; j < c.candidates(); ++j)
          if (c.of(i, j) != 0)
            sum += softplus(wide(-c.of(i, j) * (scale * c.score(i, j) + bias)));
        return sum;
      });
}

/// With σ > 0, weights from `held`.
wide decoupled(const wide_comparisons& c, const wide_comparisons& held, double tau, double sigma) {
  const auto counts = [&](index i) { return c.has(i, 1) && c.has(i, -1); };
  const auto image = [&](index i) { return exp(wide(mean_of(chosen(held, i, 1)) / sigma)); };
  const wide mean_image = sigma > 0 ? mean_over(c, counts, image) : wide(0);
  return mean_over(c, counts, [&](index i) {
    const wide weight = sigma > 0 ? wide(2 - image(i) / mean_image) : wide(1);
    return wide(log_sum(chosen(c, i, -1), 1 / tau) - weight * mean_of(chosen(c, i, 1)) / tau);
  });
}

std::vector<wide> nearest(std::vector<wide> x, std::size_t n) {
  std::sort(x.begin(), x.end(), [](const wide& a, const wide& b) { return a > b; });
  x.resize(std::min(n, x.size()));
  return x;
}
std::size_t part_of(std::size_t n, double share) {
  std::size_t most = 0; // the least m with m ≥ share · n
  while (static_cast<double>(most) < share * static_cast<double>(n) - 1e-9)
    ++most;
  return most;
}
wide hard(const wide_comparisons& c, double share, double tau) {
  return mean_over(
      c, [&](index i) { return c.has(i, 1); },
      [&](index i) {
        const auto own = chosen(c, i, 1), rivals = chosen(c, i, -1);
        auto all = nearest(rivals, part_of(rivals.size(), share));
        all.insert(all.end(), own.begin(), own.end());
        return wide(log_sum(all, 1 / tau) - mean_of(own) / tau);
      });
}
wide simple(const wide_comparisons& c, double share, double lambda) {
  return mean_over(
      c, [&](index i) { return c.has(i, 1); },
      [&](index i) {
        const auto rivals = chosen(c, i, -1);
        return wide(lambda * sum_of(nearest(rivals, part_of(rivals.size(), share))) -
                    mean_of(chosen(c, i, 1)));
      });
}

wide uniformity(const wide_comparisons& c, double t) {
  wide sum = 0;
  int pairs = 0;
  for (index i = 0; i < c.anchors(); ++i)
    for (index j = 0; j < c.candidates(); ++j)
      if (c.of(i, j) != 0) {
        sum += exp(wide(-t * c.score(i, j) * c.score(i, j)));
        ++pairs;
      }
  return log(wide(sum / pairs));
}

/// The sheet's X over its Y.
batch<double> both_sheets() {
  const auto x = sheet_x(), y = sheet_y();
  batch<double> both(12, 4);
  std::copy(x.x.begin(), x.x.end(), both.x.begin());
  std::copy(y.x.begin(), y.x.end(), both.x.begin() + 24);
  return both;
}
double length_of_half(const batch<double>& b, int half) {
  return length_of({b.x.begin() + half * 24, b.x.begin() + half * 24 + 24});
}
const std::vector<double> first_half{1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0};
constexpr double digits = 5e-9; // of the sheet

template <class Loss> double by_difference(Loss at, double where) {
  const double h = 1e-5 * where;
  return (at(where + h) - at(where - h)) / (2 * h);
}

} // namespace

TEMPLATE_TEST_CASE("Contrastive losses are their definitions", "", float, double) {
  using T = TestType;
  for (const double scale : {10.0, 2.0})
    check_anchor_values<T>("sig_lip", perdita::sig_lip<T>({.scale = scale, .bias = 2 - scale}),
                           {.value_budget = 64, .gradient_budget = 64},
                           [&](const wide_comparisons& c) { return sig_lip(c, scale, 2 - scale); });
  check_anchor_values<T>("decoupled", perdita::decoupled<T>({.temperature = 0.2}),
                         {.value_budget = 32, .gradient_budget = 64},
                         [](const wide_comparisons& c) { return decoupled(c, c, 0.2, 0); });
  for (const bool constant : {false, true}) {
    constants held;
    check_anchor_values<T>(
        "weighted_decoupled",
        perdita::weighted_decoupled<T>({.temperature = 0.2, .constant_weights = constant}),
        {.value_budget = 32, .gradient_budget = 64}, [&](const wide_comparisons& c) {
          return decoupled(c, constant ? held.of(c) : c, 0.2, 0.5);
        });
  }
  for (const double share : {0.05, 0.4, 1.0})
    check_anchor_values<T>("hard_contrastive",
                           perdita::hard_contrastive<T>({.share = share, .temperature = 0.2}),
                           {.value_budget = 32, .gradient_budget = 64},
                           [&](const wide_comparisons& c) { return hard(c, share, 0.2); });
  for (const double share : {0.3, 1.0})
    check_anchor_values<T>("simple_contrastive",
                           perdita::simple_contrastive<T>({.share = share, .lambda = 0.5}),
                           {.value_budget = 32, .gradient_budget = 64},
                           [&](const wide_comparisons& c) { return simple(c, share, 0.5); });
  for (const bool normalise : {true, false})
    check_anchor_values<T>(
        "uniformity", perdita::uniformity<T>({.t = 0.7, .normalise = normalise}),
        {.normalise = normalise, .distances = true, .value_budget = 32, .gradient_budget = 64},
        [](const wide_comparisons& c) { return uniformity(c, 0.7); });
}

TEST_CASE("Contrastive losses: calls", "[threads]") {
  check_anchor_calls(perdita::sig_lip<double>());
  check_anchor_calls(perdita::decoupled<double>());
  check_anchor_calls(perdita::weighted_decoupled<double>());
  check_anchor_calls(perdita::hard_contrastive<float>());
  check_anchor_calls(perdita::simple_contrastive<float>({.share = 0.5}));
  check_anchor_calls(perdita::uniformity<double>());
}

TEST_CASE("Contrastive losses are the formula sheet's", "") {
  const auto x = sheet_x(), y = sheet_y(), both = both_sheets();
  batch<double> g(6, 4), h(6, 4), d_both(12, 4);
  double slope = 0, d_bias = 0;
  {
    const perdita::sig_lip<double> loss({.d_scale = &slope, .d_bias = &d_bias});
    CHECK(near(loss.pairs(x.view(), y.view(), g.view(), h.view()), 10.8806662817, digits));
    CHECK(near(length_of(g.x), 1.80394064, digits));
    CHECK(near(length_of(h.x), 1.80496762, digits));
    CHECK(near(std::abs(10 * slope), 1.57969738, digits));
    CHECK(near(std::abs(d_bias), 0.904597073, digits));
    CHECK(near(slope,
               by_difference(
                   [&](double s) {
                     return perdita::sig_lip<double>({.scale = s}).pairs(x.view(), y.view());
                   },
                   10),
               1e-8));
    CHECK(d_bias < 0);
    const auto only_x = [&] {
      batch<double> again(6, 4);
      loss.pairs(x.view(), y.view(), again.view());
      return again.x;
    };
    CHECK(only_x() == g.x);
  }
  {
    const perdita::decoupled<double> loss({.temperature = 0.2, .d_temperature = &slope});
    CHECK(near(loss.views(both.view(), 2, d_both.view(), {.row_weights = first_half}),
               4.03279345213, digits));
    CHECK(near(length_of_half(d_both, 0), 1.46099835, digits));
    CHECK(near(length_of_half(d_both, 1), 0.935969434, digits));
    CHECK(near(slope, -13.7456802, digits));
  }
  {
    const perdita::weighted_decoupled<double> loss({.temperature = 0.2, .d_temperature = &slope});
    CHECK(near(loss.views(both.view(), 2, d_both.view(), {.row_weights = first_half}),
               8.12071815135, digits));
    CHECK(near(length_of_half(d_both, 0), 2.17437377, digits));
    CHECK(near(length_of_half(d_both, 1), 1.81062235, digits));
    CHECK(near(slope, -34.1853037, digits));
  }
  {
    const perdita::hard_contrastive<double> loss(
        {.share = 0.4, .temperature = 0.2, .d_temperature = &slope});
    CHECK(near(loss.pairs(x.view(), y.view(), g.view(), h.view()), 3.92903954014, digits));
    CHECK(near(length_of(g.x), 1.18712619, digits));
    CHECK(near(length_of(h.x), 0.860727618, digits));
    CHECK(near(slope, -17.1207531, digits));
  }
  {
    const perdita::simple_contrastive<double> loss;
    CHECK(near(loss.pairs(x.view(), y.view(), g.view(), h.view()), -0.215192073791, digits));
    CHECK(near(length_of(g.x), 0.567441182, digits));
    CHECK(near(length_of(h.x), 0.595186526, digits));
  }
  CHECK(near(perdita::uniformity<double>()(x.view(), g.view()), -2.96242109269, digits));
  CHECK(near(length_of(g.x), 1.42871347, digits));
  CHECK(near(perdita::uniformity<double>()(x.view()), -2.96242109269, digits));
}

TEST_CASE("MoCo's queue: a query, its key, and a queue that is nobody's", "") {
  const auto q = sheet_x(), keys = sheet_y(), queue = random_batch<double>(9, 4, 3);
  batch<double> candidates(15, 4), g(6, 4), d_all(15, 4), g_again(6, 4);
  std::copy(keys.x.begin(), keys.x.end(), candidates.x.begin());
  std::copy(queue.x.begin(), queue.x.end(), candidates.x.begin() + 24);
  const perdita::sup_con<double> loss({.temperature = 0.2});
  const perdita::own_key_only filter{6};
  const double value = loss.pairs(q.view(), candidates.view(), g.view(), {.filter = filter});
  const double again =
      loss.pairs(q.view(), candidates.view(), g_again.view(), d_all.view(), {.filter = filter});
  CHECK(again == value);
  CHECK(g_again.x == g.x);

  std::vector<std::vector<int>> who(6, std::vector<int>(15, -1));
  for (std::size_t i = 0; i < 6; ++i)
    for (std::size_t j = 0; j < 6; ++j)
      who[i][j] = i == j ? 1 : 0;
  wide_matrix x(q);
  const wide_matrix y(candidates);
  const auto expected = [&] { return hard(compare(x, y, who, {}), 1, 0.2); };
  CHECK(near(value, static_cast<double>(expected()), 1e-14));
  error_judge slopes;
  CHECK(slopes_within(slopes, g, differences(x, expected), 64));

  auto spoilt = candidates; // a key: its query's matter, and the queue's, but no other query's
  spoilt(2, 1) = std::numeric_limits<double>::quiet_NaN();
  const auto d_sound = d_all;
  CHECK(std::isnan(
      loss.pairs(q.view(), spoilt.view(), g_again.view(), d_all.view(), {.filter = filter})));
  for (perdita::index i = 0; i < 6; ++i)
    for (perdita::index k = 0; k < 4; ++k) {
      CHECK((i == 2 ? std::isnan(g_again(i, k)) : g_again(i, k) == g(i, k)));
      CHECK((i == 2 ? std::isnan(d_all(i, k)) : d_all(i, k) == d_sound(i, k)));
      CHECK(std::isnan(d_all(6 + i, k)));
    }
}

TEST_CASE("A temperature of each anchor's own", "") {
  const auto x = sheet_x(), y = sheet_y();
  std::vector<double> tau{0.1, 0.2, 0.3, 0.5, 0.7, 1.1}, d_tau(6), values(6);
  const perdita::sup_con<double> loss({.temperatures = tau, .d_temperatures = d_tau});
  batch<double> g(6, 4), h(6, 4);
  loss.pairs(x.view(), y.view(), g.view(), h.view(), {.values = values});
  for (std::size_t i = 0; i < 6; ++i) {
    std::vector<double> only(6), all(6);
    only[i] = 1;
    const auto alone = [&](double t) {
      return perdita::sup_con<double>({.temperature = t})
          .pairs(x.view(), y.view(), {.row_weights = only});
    };
    CHECK(near(values[i], alone(tau[i]), 1e-14));
    CHECK(near(6 * d_tau[i], by_difference(alone, tau[i]), 1e-7));
  }
  tau[3] = 0;
  CHECK_THROWS_WITH(loss.pairs(x.view(), y.view()),
                    Catch::Matchers::ContainsSubstring("temperatures[3] is 0"));
  tau[3] = 1e-310;
  CHECK_THROWS_WITH(loss.pairs(x.view(), y.view()),
                    Catch::Matchers::ContainsSubstring("whose inverse is finite"));
  tau.resize(5);
  CHECK_THROWS_WITH(perdita::sup_con<double>({.temperatures = tau}).pairs(x.view(), y.view()),
                    Catch::Matchers::ContainsSubstring("temperatures is 5"));
}

TEST_CASE("What ties with the last hard negative stays", "") {
  batch<double> query(1, 2), candidates(5, 2);
  query.x = {1, 0};
  candidates.x = {0.6, 0.8, 0.8, 0.6, 0.28, 0.96, 0.28, 0.96, -1, 0};
  const std::vector<int> own{1}, labels{1, 2, 2, 2, 2};
  const auto value = [&](double share) {
    return perdita::simple_contrastive<double>({.share = share})(query.view(), candidates.view(),
                                                                 own, labels);
  };
  CHECK(near(value(0.25), 0.8 - 0.6, 1e-14));
  CHECK(near(value(0.5), 0.8 + 2 * 0.28 - 0.6, 1e-14));
  CHECK(near(value(0.75), 0.8 + 2 * 0.28 - 0.6, 1e-14));
  CHECK(near(value(1), 0.8 + 2 * 0.28 - 1 - 0.6, 1e-14));
}

TEST_CASE("Contrastive losses: what has a stated result", "") {
  const batch<double> equal(6, 3, 2.0), zero(6, 3), one(1, 3, 1.0);
  batch<double> g(6, 3), of_one(1, 3), of_other(1, 3);
  const std::vector<int> same(6, 1), apart{1, 2, 3, 4, 5, 6}, twos{1, 2, 3, 1, 2, 3};
  const auto flat = [&] {
    double most = 0;
    for (const double slope : g.x)
      most = std::max(most, std::isnan(slope) ? 1 : std::abs(slope));
    return most < 1e-13;
  };
  const auto none = [&] {
    return std::all_of(g.x.begin(), g.x.end(), [](double s) { return s == 0; });
  };

  const double sure = std::log1p(std::exp(-5.0)), wrong = std::log1p(std::exp(5.0));
  const perdita::sig_lip<double> sigmoid({.bias = -5}); // all cosines 1: S = 5
  CHECK(near(sigmoid(equal.view(), twos, g.view()), sure + 4 * wrong, 1e-14));
  CHECK(flat());
  CHECK(near(sigmoid(equal.view(), same, g.view()), 5 * sure, 1e-14));
  CHECK(near(sigmoid(equal.view(), apart, g.view()), 5 * wrong, 1e-14));
  CHECK(near(sigmoid(zero.view(), apart, g.view()), 5 * sure, 1e-14)); // S = bias
  CHECK(none());
  CHECK(near(sigmoid.pairs(one.view(), one.view()), sure, 1e-14));
  CHECK(sigmoid(one.view(), std::vector<int>{1}, of_one.view()) == 0);

  const auto expect = [&](const auto& loss, const std::vector<int>& labels, double value) {
    CHECK(std::abs(loss(equal.view(), labels, g.view()) - value) < 1e-13);
    CHECK(flat());
    CHECK(std::abs(loss(equal.view(), labels) - value) < 1e-13);
  };
  const auto both_have = [&](const auto& loss) { // positives and negatives
    expect(loss, twos, std::log(4.0));
    CHECK(near(loss(zero.view(), twos, g.view()), std::log(4.0), 1e-14));
    CHECK(none());
    expect(loss, same, 0);
    expect(loss, apart, 0);
    CHECK(loss.pairs(one.view(), one.view(), of_one.view(), of_other.view()) == 0);
  };
  both_have(perdita::decoupled<double>());
  both_have(perdita::weighted_decoupled<double>());

  for (const double share : {0.1, 1.0}) { // all tie: all stay
    const perdita::hard_contrastive<double> hard_loss({.share = share});
    expect(hard_loss, twos, std::log(5.0));
    expect(hard_loss, same, std::log(5.0));
    expect(hard_loss, apart, 0);
    CHECK(near(hard_loss(zero.view(), twos, g.view()), std::log(5.0), 1e-14));
    CHECK(none());
    CHECK(hard_loss.pairs(one.view(), one.view()) == 0);
    const perdita::simple_contrastive<double> simple_loss({.share = share});
    expect(simple_loss, twos, 3);
    expect(simple_loss, same, -1);
    expect(simple_loss, apart, 0);
    CHECK(simple_loss(zero.view(), twos, g.view()) == 0);
    CHECK(none());
    CHECK(near(simple_loss.pairs(one.view(), one.view()), -1, 1e-15));
  }

  const perdita::uniformity<double> spread;
  for (const auto& labels : {twos, same, apart})
    expect(spread, labels, 0);
  CHECK(std::abs(spread(equal.view(), g.view())) < 1e-15);
  CHECK(std::abs(spread(zero.view(), g.view())) < 1e-15);
  CHECK(none());
  CHECK(spread(one.view(), of_one.view()) == 0);
  CHECK(of_one.x == std::vector<double>(3, 0.0));

  using Catch::Matchers::ContainsSubstring;
  CHECK_THROWS_WITH(perdita::decoupled<double>({.temperature = -1}),
                    ContainsSubstring("temperature is -1"));
  constexpr double small = 1e-39; // beyond floats is its inverse
  CHECK_NOTHROW(perdita::sup_con<double>({.temperature = small}));
  CHECK_THROWS_WITH(perdita::sup_con<float>({.temperature = small}),
                    ContainsSubstring("whose inverse is finite"));
  CHECK_THROWS_WITH(perdita::decoupled<float>({.temperature = small}),
                    ContainsSubstring("whose inverse is finite"));
  CHECK_THROWS_WITH(perdita::weighted_decoupled<float>({.temperature = small}),
                    ContainsSubstring("whose inverse is finite"));
  CHECK_THROWS_WITH(perdita::hard_contrastive<float>({.temperature = small}),
                    ContainsSubstring("whose inverse is finite"));
  CHECK_THROWS_WITH(perdita::weighted_decoupled<double>({.sigma = 0}),
                    ContainsSubstring("sigma is 0"));
  CHECK_THROWS_WITH(perdita::hard_contrastive<double>({.share = 0}),
                    ContainsSubstring("share is 0"));
  CHECK_THROWS_WITH(
      perdita::simple_contrastive<double>({.lambda = std::numeric_limits<double>::infinity()}),
      ContainsSubstring("lambda is inf"));
  CHECK_THROWS_WITH(perdita::sig_lip<double>({.bias = std::numeric_limits<double>::infinity()}),
                    ContainsSubstring("bias is inf"));
  CHECK_THROWS_WITH(perdita::uniformity<double>({.t = 0}), ContainsSubstring("t is 0"));
}

TEST_CASE("Weighted decoupled: another sigma", "") {
  check_anchor_values<double>("weighted_decoupled",
                              perdita::weighted_decoupled<double>({.temperature = 0.2, .sigma = 2}),
                              {.value_budget = 32, .gradient_budget = 64},
                              [](const wide_comparisons& c) { return decoupled(c, c, 0.2, 2); });
}

} // namespace perdita_tests
