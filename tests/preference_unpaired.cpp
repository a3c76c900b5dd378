// SPDX-License-Identifier: MIT

// Preference losses of single responses and of lists: formula sheet "preference", 4.6, 5, 9, 13.

#include <perdita/preference/lists.hpp>
#include <perdita/preference/unpaired.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/numbers.hpp"
#include "support/point_losses.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

using Catch::Matchers::ContainsSubstring;
using perdita::index;
using perdita::list_objective;
using perdita::matrix_view;
using perdita::reduction;
constexpr double inf = std::numeric_limits<double>::infinity();
const double nan = std::nan("");

// --- Single responses ----------------------------------------------------------------------------

TEMPLATE_TEST_CASE("unpaired losses: value and slope at log-ratios up to 5000", "[preference]",
                   float, double) {
  using T = TestType;
  for (const bool desirable : {true, false}) {
    const std::vector<int> labels(log_ratios.size(), desirable);
    const std::string detail = desirable ? "desirable" : "undesirable";
    const int sign = desirable ? 1 : -1;
    for (const double z0 : {0.0, 0.25}) {
      const wide beta = 0.3, w = desirable ? 1.5 : 0.75;
      const auto argument = [=](const wide& x) { return wide(sign * beta * (x - wide(z0))); };
      check_points<T>(
          z0 == 0 ? "apo_zero_unpaired" : "kto", detail, log_ratios, true, 1,
          [&](const auto& scores, const auto& gradient, const auto& call) {
            const typename perdita::kto<T>::options o{.beta = 0.3,
                                                      .desirable_weight = 1.5,
                                                      .undesirable_weight = 0.75,
                                                      .reduction = reduction::sum};
            return z0 == 0 ? perdita::apo_zero_unpaired<T>(o)(scores, labels, gradient, call)
                           : perdita::kto<T>(o)(scores, labels, z0, gradient, call);
          },
          [=](const wide& x) { return wide(w * sigma(wide(-argument(x)))); },
          [=](const wide& x) {
            const wide t = argument(x);
            return wide(-w * beta * sign * sigma(t) * sigma(wide(-t)));
          });
    }
    const wide beta = 0.1, delta = 0.7;
    check_points<T>(
        "bco", detail, log_ratios, true, 1,
        [&](const auto& scores, const auto& gradient, const auto& call) {
          const perdita::bco_state state{.delta = 0.7, .count = 5};
          return perdita::bco<T>({.reduction = reduction::sum})(scores, labels, state, gradient,
                                                                call);
        },
        [=](const wide& x) { return softplus(wide(-sign * (beta * x - delta))); },
        [=](const wide& x) {
          return wide(-sign * beta * sigma(wide(-sign * (beta * x - delta))));
        });
  }
  const std::vector<T> wins(log_ratios.size(), T(0.75));
  check_points<T>(
      "sppo_points", "", log_ratios, true, 1,
      [&](const auto& scores, const auto& gradient, const auto& call) {
        return perdita::sppo_points<T>({.beta = 0.125, .reduction = reduction::sum})(
            scores, wins, gradient, call);
      },
      [](const wide& x) { return wide((x - 2) * (x - 2) / 2); },
      [](const wide& x) { return wide(x - 2); });
}

/// The sheet's inputs: u = 0.5, v = −0.8.
struct golden {
  std::vector<double> policy{-12, -20}, reference{-12.5, -19.2}, gradient = std::vector<double>(2),
                                                                 values = std::vector<double>(2);
  std::vector<bool> unused;
  std::vector<int> labels{1, 0};
  perdita::sequence_scores<double> scores() const {
    return {.policy = policy, .reference = reference};
  }
  perdita::call_options<double> call() { return {.values = values}; }
  void check(double chosen, double rejected, double d_chosen, double d_rejected) const {
    check_golden(values[0], chosen);
    check_golden(values[1], rejected);
    check_golden(gradient[0], d_chosen);
    check_golden(gradient[1], d_rejected);
  }
};

TEST_CASE("unpaired losses: golden values", "[preference]") {
  golden g;
  const perdita::kto<double> kto({.reduction = reduction::sum});
  kto(g.scores(), g.labels, 0.25, g.gradient, g.call());
  g.check(0.4937503255004896, 0.4737740906279313, -0.02499609415687, 0.02493122016777);
  check_golden(perdita::apo_zero_unpaired<double>({.reduction = reduction::sum})(
                   g.scores(), g.labels, g.gradient),
               0.9675132633602079);
  check_golden(g.gradient[0], -0.02498438150811);
  check_golden(g.gradient[1], 0.02496004262801);
  check_golden(
      perdita::bco<double>({.reduction = reduction::sum})(g.scores(), g.labels, {}, g.gradient),
      1.322406615330876);
  check_golden(g.gradient[0], -0.04875026035158);
  check_golden(g.gradient[1], 0.04800106598444);
  const std::vector<double> wins{1, 0};
  check_golden(2 * perdita::sppo_points<double>({.beta = 0.1, .reduction = reduction::sum})(
                       g.scores(), wins, g.gradient),
               37.89);
  check_golden(2 * g.gradient[0], -9);
  check_golden(2 * g.gradient[1], 8.4);
}

TEST_CASE("kto: at the reference every term is half its weight", "[preference]") {
  const std::vector<float> p{-3, -4, -5};
  const bool labels[] = {true, false, true};
  std::vector<float> values(3), rewards(3);
  perdita::sequence_summary summary;
  const perdita::kto<float> loss({.desirable_weight = 2, .undesirable_weight = 3});
  CHECK(loss({.policy = p, .reference = p}, std::span(labels), 0, {}, {.values = values},
             {.rewards = rewards, .summary = &summary}) == 3.5F / 3);
  CHECK(values == std::vector<float>{1, 1.5, 1});
  CHECK(rewards == std::vector<float>{0, 0, 0});
  CHECK((summary.chosen == 2 && summary.rejected == 1 && summary.margins == 0));
  CHECK((summary.chosen_logps == -4 && summary.rejected_logps == -4));
  CHECK(std::isnan(summary.accuracies));
}

TEST_CASE("unpaired losses: reductions, weights, scale, lengths, accumulation", "[preference]") {
  const std::vector<double> p{-1, -2, -3, -4}, r{-2, -2, -1, -9}, row_weights{1, 0.5, 0, 2},
      weights{1, 3, 1, 0.5}, upstream{1, -2, 1, 1};
  const std::vector<int> labels{1, 0, 1, 0};
  const auto term = [&](std::size_t i, double shift) {
    const double sign = labels[i] == 1 ? 1 : -1;
    return std::log1p(std::exp(-sign * (0.5 * (p[i] - r[i] + shift) - 0.25)));
  };
  std::vector<double> g(4, 1), values(4), rewards(4);
  const perdita::bco<double> loss({.beta = 0.5});
  const perdita::bco_state state{.delta = 0.25, .count = 1};
  const perdita::sequence_scores<double> scores{.policy = p, .reference = r, .weights = weights};
  perdita::sequence_summary summary;
  const double value = loss(scores, labels, state, g,
                            {.row_weights = row_weights,
                             .upstream = upstream,
                             .scale = 3,
                             .accumulate = true,
                             .values = values},
                            {.rewards = rewards, .summary = &summary});
  double expected = 0;
  for (std::size_t i = 0; i < 4; ++i) {
    const double factor = row_weights[i] * weights[i];
    expected += factor * term(i, 0) / 3.5;
    CHECK(std::abs(values[i] - factor * term(i, 0)) < 1e-15);
    const double slope = (term(i, 1e-6) - term(i, -1e-6)) / 2e-6;
    CHECK(std::abs(g[i] - 1 - 3 * upstream[i] * factor * slope / 3.5) < 1e-9);
  }
  CHECK(std::abs(value - expected) < 1e-15);
  CHECK(rewards == std::vector<double>{0.5, 0, 0, 2.5});
  CHECK(summary.delta == 0.25);
  CHECK((summary.chosen == 1 && summary.rejected == 2));
  CHECK((summary.chosen_rewards == 0.5 && summary.rejected_rewards == 1.25));
  CHECK(summary.margins == -0.75);
  CHECK(std::abs(loss(scores, labels, state, {}, {.row_weights = row_weights, .normaliser = 7}) -
                 value / 2) < 1e-15);
  // A sequence without tokens has no part.
  const std::vector<short> lengths{3, 3, 0, 3};
  const perdita::sequence_scores<double> ragged{
      .policy = p, .reference = r, .lengths = lengths, .weights = weights};
  const std::vector<double> others{1, 0.5, 1, 2};
  CHECK(loss(ragged, labels, state, {}, {.row_weights = others}, {.summary = &summary}) == value);
  CHECK(summary.empty == 1);
  // None at all, and none left.
  const std::vector<double> none, nothing(4);
  CHECK(loss({.policy = none, .reference = none}, std::vector<int>{}, state) == 0);
  CHECK(loss(scores, labels, state, g, {.row_weights = nothing}) == 0);
  CHECK(g == nothing);
}

TEST_CASE("unpaired losses: an empty class, infinity, NaN", "[preference]") {
  const std::vector<double> p{-1, -inf, nan}, r{-2, -3, -4};
  std::vector<double> g(3), values(3);
  perdita::sequence_summary summary;
  const perdita::sequence_scores<double> scores{.policy = p, .reference = r};
  for (const int label : {0, 1}) {
    const std::vector<int> labels(3, label);
    CHECK(std::isnan(
        perdita::kto<double>()(scores, labels, 0, g, {.values = values}, {.summary = &summary})));
    CHECK((values[1] == label && g[1] == 0));
    CHECK((std::isfinite(values[0]) && g[0] != 0 && std::isfinite(g[0])));
    CHECK((std::isnan(values[2]) && std::isnan(g[2])));
    CHECK(summary.chosen == 3 * label);
    CHECK(std::isnan(label == 1 ? summary.rejected_rewards : summary.chosen_rewards));
    CHECK(std::isnan(label == 1 ? summary.rejected_logps : summary.chosen_logps));
    perdita::bco<double>()(scores, labels, {}, g, {.values = values});
    CHECK((values[1] == (label == 1 ? inf : 0)));
    CHECK(std::abs(g[1] - (label == 1 ? -0.1 / 3 : 0)) < 1e-17);
    CHECK((std::isnan(values[2]) && std::isnan(g[2])));
  }
}

TEST_CASE("kto's baseline: the mean of mismatched pairs, not below 0", "[preference]") {
  const std::vector<double> a{-1, -2, -3}, b{-2, -2.5, -3.25}, c{-0.5, -1, -2};
  CHECK(std::abs(perdita::kto_baseline<double>({.policy = a, .reference = b}) - 1.75 / 3) < 1e-16);
  CHECK(perdita::kto_baseline<double>({.policy = a, .reference = c}) == 0);
  const std::vector<int> tokens{2, 0, 4};
  CHECK(perdita::kto_baseline<double>({.policy = a, .reference = b, .lengths = tokens}) == 0.625);
  CHECK((perdita::mismatched(0, 3) == 1 && perdita::mismatched(2, 3) == 0));
  const std::vector<double> one{-1};
  CHECK_THROWS_WITH(perdita::kto_baseline<double>({.policy = one, .reference = one}),
                    ContainsSubstring("pairs is 1"));
  CHECK_THROWS_WITH(perdita::kto_baseline<double>({.policy = a}), ContainsSubstring("missing"));
  // It is a constant for the gradient: that of the loss with z0 frozen.
  const std::vector<int> labels{1, 0, 1};
  std::vector<double> p = a, g(3);
  const double z0 = 0.4;
  const perdita::kto<double> loss;
  loss({.policy = p, .reference = b}, labels, z0, g);
  for (std::size_t i = 0; i < 3; ++i) {
    const auto at = [&](double step) {
      p = a;
      p[i] += step;
      return loss({.policy = p, .reference = b}, labels, z0);
    };
    CHECK(std::abs((at(1e-5) - at(-1e-5)) / 2e-5 - g[i]) < 1e-11);
  }
}

TEST_CASE("bco: the running mean, and the weights of prompts", "[preference]") {
  const std::vector<double> p{-1, -2, -3}, r{-3, -3, -3}, q{-5}, s{-1};
  perdita::bco_state state;
  state.update<double>({.policy = p, .reference = r}, 0.5);
  CHECK((std::abs(state.delta - 0.5) < 1e-16 && state.count == 3));
  state.update<double>({.policy = q, .reference = s}, 0.5);
  CHECK((std::abs(state.delta + 0.125) < 1e-16 && state.count == 4));
  const std::vector<double> none;
  const perdita::bco_state before = state;
  state.update<double>({.policy = none, .reference = none}, 0.5);
  CHECK(state == before);
  const std::vector<int> empty{0};
  state.update<double>({.policy = q, .reference = s, .lengths = empty}, 0.5);
  CHECK(state == before);
  perdita::bco_state merged{.delta = 0.5, .count = 3};
  merged.update_mean(-2, 1);
  CHECK(std::abs(merged.delta - state.delta) < 1e-15);
  merged = {}; // and the mean of none, before there is any
  merged.update_mean(0, 0);
  CHECK(merged == perdita::bco_state{});
  CHECK_THROWS_WITH(state.update<double>({.policy = p}, 0.5),
                    ContainsSubstring("reference is missing"));
  CHECK_THROWS_WITH(state.update<double>({.policy = p, .reference = r}, 0),
                    ContainsSubstring("beta is 0"));

  const std::vector<float> chance{0.1F, 0.5F, 0.75F, 1, 0.5F};
  const std::vector<int> labels{0, 0, 0, 0, 1};
  std::vector<float> weights(5);
  perdita::udm_weights<float>(chance, labels, weights);
  CHECK((weights[0] == 0.5F && weights[3] == 10 && weights[4] == 1));
  CHECK((std::abs(weights[1] - 1) < 1e-6F && std::abs(weights[2] - 3) < 1e-6F));
  const std::vector<float> wrong{0.1F, 1.5F, 0, 0, 0};
  CHECK_THROWS_WITH(perdita::udm_weights<float>(wrong, labels, weights),
                    ContainsSubstring("probabilities[1] is 1.5"));
  std::vector<float> in_place = chance, beside(6);
  perdita::udm_weights<float>(in_place, labels, in_place);
  CHECK(in_place == weights);
  CHECK_THROWS_WITH(perdita::udm_weights<float>({beside.data(), 5}, labels, {beside.data() + 1, 5}),
                    ContainsSubstring("overlaps"));
}

TEST_CASE("unpaired losses: bad input", "[preference]") {
  const std::vector<double> p{-1, -2}, three{-1, -2, -3}, none;
  std::vector<double> g(2, 5);
  const std::vector<int> labels{1, 0}, signs{1, -1}, few{1};
  const perdita::kto<double> loss;
  const perdita::sequence_scores<double> good{.policy = p, .reference = p};
  const auto untouched = g;
  CHECK_THROWS_WITH(loss({.policy = p}, labels, 0, g), ContainsSubstring("reference is missing"));
  CHECK_THROWS_WITH(loss({.policy = p, .reference = three}, labels, 0, g),
                    ContainsSubstring("reference is 3 long, expected 2"));
  CHECK_THROWS_WITH(loss(good, signs, 0, g), ContainsSubstring("labels[1] is -1"));
  CHECK_THROWS_WITH(loss(good, few, 0, g), ContainsSubstring("labels is 1 long"));
  CHECK_THROWS_WITH(loss(good, labels, -1, g), ContainsSubstring("baseline is -1"));
  CHECK_THROWS_WITH(loss(good, labels, nan, g), ContainsSubstring("baseline"));
  const std::vector<double> impossible{-1, -inf};
  CHECK_THROWS_WITH(loss({.policy = p, .reference = impossible}, labels, 0, g),
                    ContainsSubstring("reference[1] is -inf"));
  CHECK_THROWS_WITH(loss({.policy = p, .reference = p, .lengths = signs}, labels, 0, g),
                    ContainsSubstring("lengths[1] is -1"));
  CHECK_THROWS_WITH(loss({.policy = p, .reference = p, .lengths = few}, labels, 0, g),
                    ContainsSubstring("lengths is 1 × 1"));
  CHECK_THROWS_WITH(loss({.policy = p, .reference = p, .weights = p}, labels, 0, g),
                    ContainsSubstring("weights[0] is -1"));
  CHECK_THROWS_WITH(loss({.policy = p, .reference = p, .weights = three}, labels, 0, g),
                    ContainsSubstring("weights is 3 long"));
  CHECK_THROWS_WITH(loss(good, labels, 0, g, {.row_weights = three}),
                    ContainsSubstring("row_weights"));
  CHECK_THROWS_WITH(loss(good, labels, 0, g, {.entropy = g}), ContainsSubstring("by-product"));
  std::vector<double> long_gradient(3);
  CHECK_THROWS_WITH(loss(good, labels, 0, long_gradient), ContainsSubstring("gradient is 3 long"));
  CHECK_THROWS_WITH(loss({.policy = g, .reference = p}, labels, 0, g),
                    ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(loss(good, labels, 0, g, {}, {.rewards = g}), ContainsSubstring("overlaps"));
  CHECK(g == untouched);
  CHECK_THROWS_WITH(perdita::kto<float>({.beta = 0}), ContainsSubstring("beta is 0"));
  CHECK_THROWS_WITH(perdita::kto<float>({.desirable_weight = -1}), ContainsSubstring("desirable"));
  CHECK_THROWS_WITH(perdita::kto<float>({.undesirable_weight = nan}), ContainsSubstring("undesir"));
  CHECK_THROWS_WITH(perdita::bco<float>({.beta = -1}), ContainsSubstring("beta is -1"));
  CHECK_THROWS_WITH(perdita::apo_zero_unpaired<float>({.beta = inf}),
                    ContainsSubstring("apo_zero_unpaired: beta is inf"));
  CHECK_THROWS_WITH(perdita::sppo_points<float>({.beta = 0}), ContainsSubstring("beta is 0"));
  CHECK_THROWS_WITH(perdita::bco<double>()(good, labels, {.delta = nan}, g),
                    ContainsSubstring("delta"));
  CHECK_THROWS_WITH(perdita::sppo_points<double>()(good, three, g),
                    ContainsSubstring("win_probabilities is 3 long"));
  CHECK_THROWS_WITH(perdita::sppo_points<double>()(good, p, g),
                    ContainsSubstring("win_probabilities[0] is -1"));
}

TEST_CASE("unpaired losses: what is removed is not looked at", "[preference]") {
  const std::vector<double> p{-1, nan, -3}, r{-2, -inf, -2}, wins{1, 2, 0}, w{1, -1, 1}, x{-1, -3},
      y{-2, -2}, present{1, 0, 1};
  const std::vector<int> labels{1, 7, 0}, lengths{1, 0, 1}, wrong{1, -3, 1}, two{1, 0};
  std::vector<double> g(3), h(2);
  const perdita::kto<double> kto;
  const double value = kto({.policy = x, .reference = y}, two, 0.25, h);
  CHECK(kto({.policy = p, .reference = r, .lengths = wrong, .weights = w}, labels, 0.25, g,
            {.row_weights = present}) == value);
  CHECK(g == std::vector<double>{h[0], 0, h[1]});
  const std::vector<int> all{1, 1, 0};
  CHECK(kto({.policy = p, .reference = r, .lengths = lengths}, all, 0.25, g) == value);
  CHECK(g == std::vector<double>{h[0], 0, h[1]});
  CHECK(perdita::sppo_points<double>()({.policy = p, .reference = r}, wins, g,
                                       {.row_weights = present}) ==
        perdita::sppo_points<double>()({.policy = x, .reference = y}, std::vector<double>{1, 0}));
  CHECK(perdita::kto_baseline<double>({.policy = p, .reference = r, .lengths = lengths}) == 0);
}

TEST_CASE("unpaired and list losses: lengths that are nowhere", "[preference]") {
  const std::vector<double> p{-1, -2};
  const std::vector<int> labels{1, 0};
  const perdita::vector_view<const int> nowhere(nullptr, 2);
  const perdita::sequence_scores<double> in{.policy = p, .reference = p, .lengths = nowhere};
  CHECK_THROWS_WITH(perdita::kto<double>()(in, labels, 0), ContainsSubstring("lengths is null"));
  CHECK_THROWS_WITH(perdita::kto_baseline(in), ContainsSubstring("lengths is null"));
  const matrix_view<const double> m(p.data(), 1, 2);
  CHECK_THROWS_WITH(
      perdita::rrhf<double>()({.policy = m, .lengths = matrix_view<const int>(nullptr, 1, 2)}, m),
      ContainsSubstring("lengths is null"));
}

TEST_CASE("bco: one bad batch does not ruin the running mean", "[preference]") {
  const std::vector<double> p{-inf, -2, nan, inf}, r{0, -1, 0, 0}, bad{-inf};
  perdita::bco_state state;
  state.update<double>({.policy = p, .reference = r}, 0.5);
  CHECK(state == perdita::bco_state{.delta = -0.5, .count = 1});
  state.update<double>({.policy = bad, .reference = std::vector<double>{0}}, 0.5);
  state.update_mean(inf, 2);
  state.update_mean(nan, 1);
  CHECK(state == perdita::bco_state{.delta = -0.5, .count = 1});
}

// --- Lists ---------------------------------------------------------------------------------------

using row = std::vector<wide>;

wide log_sum(const row& z) {
  return log_sum_exp(z, [](std::size_t) { return true; });
}
/// −log softmax(z)_i
wide surprise(const row& z, std::size_t i) {
  row behind;
  for (std::size_t k = 0; k < z.size(); ++k)
    if (k != i)
      behind.push_back(z[k] - z[i]);
  return behind.empty() ? wide(0) : softplus(log_sum(behind));
}
std::vector<std::size_t> sorted(const row& key) {
  std::vector<std::size_t> order(key.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return key[a] > key[b]; });
  return order;
}
template <class F> wide over_pairs(const row& s, const row& y, F f) {
  wide sum = 0;
  for (std::size_t i = 0; i < s.size(); ++i)
    for (std::size_t j = 0; j < s.size(); ++j)
      if (y[i] > y[j])
        sum += f(i, j, wide(s[i] - s[j]));
  return sum;
}
wide count_pairs(const row& y) {
  return over_pairs(y, y, [](std::size_t, std::size_t, const wide&) { return wide(1); });
}
wide plackett_luce(const row& s, const row& y) {
  const auto order = sorted(y);
  wide sum = 0;
  for (std::size_t k = 0; k + 1 < s.size(); ++k) {
    row left;
    for (std::size_t j = k; j < s.size(); ++j)
      left.push_back(s[order[j]]);
    sum += surprise(left, 0);
  }
  return sum;
}
wide lipo(list_objective kind, const row& s, const row& at, const row& y) {
  std::vector<wide> discount(s.size());
  const auto order = sorted(at); // ranks are constants
  for (std::size_t k = 0; k < s.size(); ++k)
    discount[order[k]] = 1 / log(wide(static_cast<double>(k + 2)));
  wide mass = 0, sum = 0;
  for (const wide& psi : y)
    mass += psi;
  switch (kind) {
  case list_objective::lambda:
    return over_pairs(s, y, [&](std::size_t i, std::size_t j, const wide& d) {
      return wide(size_of(wide(pow(wide(2), y[i]) - pow(wide(2), y[j]))) *
                  size_of(wide(discount[i] - discount[j])) * softplus(wide(-d)));
    });
  case list_objective::pair_logistic:
    return over_pairs(s, y,
                      [](std::size_t, std::size_t, const wide& d) { return softplus(wide(-d)); });
  case list_objective::pair_hinge:
    return over_pairs(
        s, y, [](std::size_t, std::size_t, const wide& d) { return larger(0, wide(1 - d)); });
  case list_objective::list_mle:
    return plackett_luce(s, y);
  case list_objective::softmax:
    for (std::size_t i = 0; i < s.size() && mass > 0; ++i)
      sum += y[i] / mass * surprise(s, i);
    return sum;
  case list_objective::point_mse:
    for (std::size_t i = 0; i < s.size(); ++i)
      sum += (y[i] - s[i]) * (y[i] - s[i]);
    return sum;
  case list_objective::point_sigmoid:
    for (std::size_t i = 0; i < s.size(); ++i)
      sum += y[i] * softplus(wide(-s[i])) + (1 - y[i]) * softplus(s[i]);
    return sum;
  }
  return sum;
}
wide exo(const row& s, const row& r, const wide& beta) {
  row t;
  for (const wide& x : r)
    t.push_back(x / beta);
  wide sum = 0;
  for (std::size_t i = 0; i < s.size(); ++i)
    sum += exp(wide(-surprise(s, i))) * (surprise(t, i) - surprise(s, i));
  return sum;
}
wide dno(const row& s, const row& r) {
  wide sum = 0, n = 0;
  for (std::size_t i = 0; i < s.size(); ++i)
    for (std::size_t j = 0; j < i; ++j, ++n) {
      const wide p = sigma(wide(r[i] - r[j])), q = sigma(wide(r[j] - r[i]));
      sum += p * softplus(wide(s[j] - s[i])) + q * softplus(wide(s[i] - s[j]));
    }
  return n > 0 ? wide(sum / n) : sum;
}

template <class T> struct lists {
  static constexpr index count = 6, most = 5;
  std::vector<T> policy, reference, previous, ratings, gradient, values;
  std::vector<int> lengths;
  std::vector<std::int64_t> candidates{5, 4, 3, 2, 1, 0};

  /// Log-ratios of some units, or any of log_ratios.
  lists(bool extreme, std::uint64_t seed) : gradient(count * most, 3), values(count) {
    random_numbers random(seed);
    for (index i = 0; i < count * most; ++i) {
      const double ratio =
          extreme ? log_ratios[random.below(log_ratios.size())] : 8 * random.normal();
      reference.push_back(T(-6000));
      policy.push_back(static_cast<T>(ratio - 6000));
      previous.push_back(static_cast<T>(-5990 - static_cast<double>(random.below(20))));
      ratings.push_back(static_cast<T>(static_cast<double>(random.below(5)) / 4));
      lengths.push_back(static_cast<int>(1 + random.below(9)));
    }
  }
  template <class U> static matrix_view<const U> view(const std::vector<U>& v) {
    return {v.data(), count, most};
  }
  perdita::list_scores<T> scores() const {
    return {.policy = view(policy),
            .reference = view(reference),
            .previous = view(previous),
            .lengths = view(lengths),
            .candidates = candidates};
  }
  matrix_view<T> gradient_view() { return {gradient.data(), count, most}; }
};

/// run(scores, ratings, gradient, call): the loss with reduction `sum`. score(data, i): x of the
/// candidate with flat index i, linear in its log-probability with the factor slope(data, i).
/// value(x, frozen x, ratings).
template <class T>
void check_lists(const std::string& name, const std::string& detail,
                 const std::function<T(const perdita::list_scores<T>&, matrix_view<const T>,
                                       matrix_view<T>, const perdita::call_options<T>&)>& run,
                 const std::function<wide(const lists<T>&, std::size_t)>& score,
                 const std::function<wide(const lists<T>&, std::size_t)>& slope,
                 const std::function<wide(const row&, const row&, const row&)>& value,
                 bool squares = false) {
  const double epsilon = std::numeric_limits<T>::epsilon();
  error_judge of_values, of_slopes;
  for (const bool extreme : {false, true}) {
    lists<T> data(extreme, 7);
    run(data.scores(), data.view(data.ratings), data.gradient_view(), {.values = data.values});
    for (std::size_t q = 0; q < lists<T>::count; ++q) {
      const auto n = static_cast<std::size_t>(data.candidates[q]);
      row s, y;
      wide top = 1;
      for (std::size_t k = 0; k < n; ++k) {
        const std::size_t i = q * lists<T>::most + k;
        s.push_back(score(data, i));
        y.push_back(data.ratings[i]);
        top = larger(top, size_of(s[k]));
      }
      const wide v = n == 0 ? wide(0) : value(s, s, y);
      // The rounding of scores in double, by as much as a value or slope can change with them.
      const wide steps = 0x1p-50 * static_cast<double>(n * n) * (squares ? wide(top * top) : top);
      INFO(name << " " << detail << (extreme ? ", extreme" : "") << ", list " << q << ": "
                << text(v) << ", got " << data.values[q]);
      CHECK(of_values.within(size_of(wide(data.values[q] - v)), 1, epsilon * size_of(v) + steps));
      for (std::size_t k = 0; k < lists<T>::most; ++k) {
        const std::size_t i = q * lists<T>::most + k;
        if (k >= n) {
          CHECK(data.gradient[i] == 0);
          continue;
        }
        const wide d = slope(data, i) * difference(
                                            [&](const wide& x) {
                                              row moved = s;
                                              moved[k] = x;
                                              return value(moved, s, y);
                                            },
                                            s[k]);
        INFO("candidate " << k << " at " << text(s[k]) << ": " << text(d) << ", got "
                          << data.gradient[i]);
        CHECK(of_slopes.within(size_of(wide(data.gradient[i] - d)), 1,
                               epsilon * size_of(d) + slope(data, i) * steps + 1e-19));
      }
    }
  }
  report_accuracy<T>(name, detail, in_allowances, of_values, of_slopes);
}

} // namespace

TEMPLATE_TEST_CASE("list losses: value and slopes against 113 bits", "[preference]", float,
                   double) {
  using T = TestType;
  using data = lists<T>;
  using call_type = perdita::call_options<T>;
  const auto scaled = [](double beta) {
    return [=](const data& d, std::size_t i) {
      return wide(wide(beta) * (wide(d.policy[i]) - wide(d.reference[i])));
    };
  };
  const auto constant = [](double beta) {
    return [=](const data&, std::size_t) { return wide(beta); };
  };
  const auto with = [](auto loss) {
    return [=](const perdita::list_scores<T>& scores, matrix_view<const T> ratings,
               matrix_view<T> gradient,
               const call_type& call) { return loss(scores, ratings, gradient, call); };
  };
  check_lists<T>("plackett_luce_dpo", "",
                 with(perdita::plackett_luce_dpo<T>({.beta = 0.1, .reduction = reduction::sum})),
                 scaled(0.1), constant(0.1),
                 [](const row& s, const row&, const row& y) { return plackett_luce(s, y); });
  for (int kind = 0; kind <= static_cast<int>(list_objective::point_sigmoid); ++kind) {
    const auto objective = static_cast<list_objective>(kind);
    check_lists<T>(
        "lipo", "objective " + std::to_string(kind),
        with(perdita::lipo<T>({.objective = objective, .reduction = reduction::sum})), scaled(0.05),
        constant(0.05),
        [=](const row& s, const row& at, const row& y) { return lipo(objective, s, at, y); },
        objective == list_objective::point_mse);
  }
  check_lists<T>(
      "exo_list", "",
      with(perdita::exo_list<T>({.reward_beta = 0.25, .reduction = reduction::sum})), scaled(0.1),
      constant(0.1), [](const row& s, const row&, const row& r) { return exo(s, r, 0.25); }, true);
  check_lists<T>("dno_list", "",
                 with(perdita::dno_list<T>({.eta = 0.2, .reduction = reduction::sum})), scaled(0.2),
                 constant(0.2), [](const row& s, const row&, const row& r) { return dno(s, r); });
  check_lists<T>(
      "inpo_list", "",
      with(perdita::inpo_list<T>({.eta = 0.5, .tau = 0.125, .reduction = reduction::sum})),
      [](const data& d, std::size_t i) {
        return wide(wide(d.policy[i]) - 0.25 * wide(d.reference[i]) - 0.75 * wide(d.previous[i]));
      },
      constant(1),
      [](const row& s, const row&, const row& y) {
        const wide n = count_pairs(y);
        return n == 0 ? n
                      : wide(over_pairs(s, y,
                                        [](std::size_t, std::size_t, const wide& d) {
                                          return wide((d - 1) * (d - 1));
                                        }) /
                             n);
      },
      true);
  check_lists<T>(
      "rrhf", "",
      with(perdita::rrhf<T>({.rank_weight = 3, .nll_weight = 0, .reduction = reduction::sum})),
      [](const data& d, std::size_t i) { return wide(wide(d.policy[i]) / d.lengths[i]); },
      [](const data& d, std::size_t i) { return wide(wide(1) / d.lengths[i]); },
      [](const row& s, const row&, const row& y) {
        return wide(3 * over_pairs(s, y, [](std::size_t, std::size_t, const wide& d) {
                      return larger(0, wide(-d));
                    }));
      });
}

TEST_CASE("list losses: golden values, and lists of two that are pairs", "[preference]") {
  golden g;
  const matrix_view<const double> p(g.policy.data(), 1, 2), r(g.reference.data(), 1, 2);
  const matrix_view<double> d(g.gradient.data(), 1, 2);
  const perdita::list_scores<double> scores{.policy = p, .reference = r};
  const std::vector<double> better{1, 0};
  const matrix_view<const double> ratings(better.data(), 1, 2);
  const auto check = [&](double value, double expected, double chosen, double rejected) {
    check_golden(value, expected);
    check_golden(g.gradient[0], chosen);
    check_golden(g.gradient[1], rejected);
  };
  const double slope = -0.04675456936127, dpo = 0.6302581946816907;
  check(perdita::plackett_luce_dpo<double>()(scores, {}, d), dpo, slope, -slope);
  for (const auto kind :
       {list_objective::pair_logistic, list_objective::list_mle, list_objective::softmax})
    check(perdita::lipo<double>({.beta = 0.1, .objective = kind})(scores, ratings, d), dpo, slope,
          -slope);
  // Δ = |2 − 1| (1/log 2 − 1/log 3)
  const double weight = 1 / std::log(2.0) - 1 / std::log(3.0);
  check(perdita::lipo<double>({.beta = 0.1})(scores, ratings, d), weight * dpo, weight * slope,
        -weight * slope);
  check(perdita::lipo<double>({.beta = 0.1, .objective = list_objective::pair_hinge})(scores,
                                                                                      ratings, d),
        0.87, -0.1, 0.1);
  check(perdita::inpo_list<double>({.eta = 0.1, .tau = 0.1})(scores, ratings, d), 13.69, -7.4, 7.4);
  const std::vector<double> odds{std::log(0.999), std::log(0.001)};
  check(perdita::exo_list<double>({.reward_beta = 1})(
            scores, matrix_view<const double>(odds.data(), 1, 2), d),
        2.539184819078183, -0.1687050860814, 0.1687050860814);
  // p = σ(log 9) = 0.9: cDPO with ε = 0.1
  const std::vector<double> sure{std::log(9.0), 0};
  check(perdita::dno_list<double>()(scores, matrix_view<const double>(sure.data(), 1, 2), d),
        0.6432581946816907, -0.03675456936127, 0.03675456936127);
  const std::vector<int> tokens{5, 8};
  const perdita::list_scores<double> counted{
      .policy = p, .lengths = matrix_view<const int>(tokens.data(), 1, 2)};
  check(perdita::rrhf<double>({.nll_weight = 0})(counted, ratings, d), 0, 0, 0);
  check(perdita::rrhf<double>()(counted, ratings, d), 12, -1, 0);
  const std::vector<double> worse{0, 1};
  check(perdita::rrhf<double>({.rank_weight = 10, .nll_weight = 2})(
            counted, matrix_view<const double>(worse.data(), 1, 2), d),
        10 * (-2.4 + 2.5) + 2 * 20, 10.0 / 5, -10.0 / 8 - 2);
}

TEST_CASE("list losses: without ratings candidates are in order; places; the summary",
          "[preference]") {
  const std::vector<double> p{-1, -2, -4, -9, -3, -1}, zero(6), y{3, 2, 1, 1, 1, 1};
  const perdita::list_scores<double> scores{.policy = {p.data(), 2, 3},
                                            .reference = {zero.data(), 2, 3}};
  const matrix_view<const double> ratings(y.data(), 2, 3);
  const perdita::plackett_luce_dpo<double> loss({.beta = 1}), first({.beta = 1, .places = 1});
  CHECK(loss(scores) == loss(scores, ratings));
  const auto log_sum = [](double a, double b) { return std::log1p(std::exp(a) + std::exp(b)); };
  CHECK(std::abs(first(scores) - (log_sum(-1, -3) + log_sum(6, 8)) / 2) < 1e-14);
  perdita::sequence_summary summary;
  std::vector<double> rewards(6), g(6, 1), values(2), weights{2, 0}, factors{3, 1}, up{-1, 5};
  auto weighted = scores;
  weighted.weights = factors;
  const double value = loss(
      weighted, ratings, matrix_view<double>(g.data(), 2, 3),
      {.row_weights = weights, .upstream = up, .scale = 2, .accumulate = true, .values = values},
      {.rewards = rewards, .summary = &summary});
  const double term = log_sum(-1, -3) + std::log1p(std::exp(-2.0));
  CHECK(std::abs(value - 3 * term) < 1e-15);
  CHECK((std::abs(values[0] - 6 * term) < 1e-14 && values[1] == 0));
  CHECK((std::abs(g[0] - 1 + 6 * (1 / (1 + std::exp(-1.0) + std::exp(-3.0)) - 1)) < 1e-14));
  CHECK((g[3] == 1 && g[4] == 1 && g[5] == 1));
  CHECK(rewards == std::vector<double>{-1, -2, -4, 0, 0, 0});
  CHECK((summary.chosen == 1 && summary.chosen_rewards == -1 && summary.rejected_rewards == -4));
  CHECK((summary.margins == 3 && summary.accuracies == 1));
  loss(scores, ratings, {}, {}, {.summary = &summary});
  CHECK((summary.chosen == 1 && summary.rejected == 1)); // the second list prefers nothing
}

TEST_CASE("list losses: NaN, infinity and nothing stay in their list", "[preference]") {
  std::vector<double> p{-1, -2, nan, -3, -inf, -4}, zero(6), y{1, 0, 1, 0, 1, 0}, g(6), values(3);
  const perdita::list_scores<double> scores{.policy = {p.data(), 3, 2},
                                            .reference = {zero.data(), 3, 2}};
  const matrix_view<const double> ratings(y.data(), 3, 2);
  const matrix_view<double> d(g.data(), 3, 2);
  const auto check = [&](const auto& loss) {
    CHECK(std::isnan(loss(scores, ratings, d, {.values = values})));
    CHECK((std::isfinite(values[0]) && std::isfinite(g[0]) && std::isfinite(g[1])));
    for (std::size_t i = 2; i < 6; ++i)
      CHECK((std::isnan(values[i / 2]) && std::isnan(g[i])));
  };
  check(perdita::plackett_luce_dpo<double>());
  check(perdita::lipo<double>());
  check(perdita::exo_list<double>());
  check(perdita::dno_list<double>());
  check(perdita::inpo_list<double>({.eta = 0.1, .tau = 0.1}));
  check(perdita::rrhf<double>({.length_penalty = 0}));
  // What is added to a response under every model cancels.
  const std::vector<double> l{-1, -2}, q{-1.5, -2.25}, before{-0.75, -3}, order{1, 0};
  std::vector<double> high(6), slopes(2), high_slopes(2);
  for (std::size_t i = 0; i < 2; ++i) {
    const double much = i == 0 ? 0x1.2345678p40 : 0x1p30;
    high[i] = l[i] - much;
    high[2 + i] = q[i] - much;
    high[4 + i] = before[i] - much;
  }
  const perdita::inpo_list<double> inpo({.eta = 0.3, .tau = 0.1});
  CHECK(inpo({.policy = {l.data(), 1, 2},
              .reference = {q.data(), 1, 2},
              .previous = {before.data(), 1, 2}},
             {order.data(), 1, 2},
             {slopes.data(), 1, 2}) == inpo({.policy = {high.data(), 1, 2},
                                             .reference = {high.data() + 2, 1, 2},
                                             .previous = {high.data() + 4, 1, 2}},
                                            {order.data(), 1, 2}, {high_slopes.data(), 1, 2}));
  CHECK(slopes == high_slopes);
  // Ratings without a difference, and weights of 0
  const std::vector<double> same(6, 0.5), none(6);
  CHECK(perdita::rrhf<double>({.nll_weight = 0, .length_penalty = 0})(
            {.policy = {zero.data(), 3, 2}}, {same.data(), 3, 2}, d) == 0);
  CHECK(g == none);
  CHECK(perdita::inpo_list<double>({.eta = 0.1, .tau = 0.1})(
            {.policy = {zero.data(), 3, 2}, .reference = {zero.data(), 3, 2}}, {same.data(), 3, 2},
            d) == 0);
  CHECK(perdita::lipo<double>({.objective = list_objective::softmax})(
            {.policy = {zero.data(), 3, 2}, .reference = {zero.data(), 3, 2}}, {none.data(), 3, 2},
            d) == 0);
  CHECK(g == none);
}

TEST_CASE("list losses: what does not count is not looked at", "[preference]") {
  const std::vector<double> p{-3, -4, 0, -1, -2, 0}, q(6, -3), y{1, 0, 9, 7, nan, -2},
      present{1, 0}, impossible{-3, -3, -inf, -inf, -3, nan};
  const std::vector<int> n{2, 3, 0, 0, -1, 0}, none(6);
  const std::vector<std::int64_t> first{2, 3};
  std::vector<double> g(6, 5);
  const auto lists = [](const auto& v, index rows, index cols) {
    return matrix_view(v.data(), rows, cols);
  };
  const matrix_view<double> d(g.data(), 2, 3);
  const perdita::rrhf<double> rrhf;
  CHECK(rrhf({.policy = lists(p, 2, 3), .lengths = lists(n, 2, 3), .candidates = first},
             lists(y, 2, 3), d, {.row_weights = present}) ==
        rrhf({.policy = lists(p, 1, 2), .lengths = lists(n, 1, 2)}, lists(y, 1, 2)));
  CHECK(std::equal(g.begin() + 2, g.end(), std::vector<double>(4).begin()));
  const perdita::lipo<double> lipo;
  const perdita::list_scores<double> whole{.policy = lists(p, 1, 2), .reference = lists(q, 1, 2)};
  CHECK(lipo({.policy = lists(p, 2, 3),
              .reference = lists(impossible, 2, 3),
              .lengths = lists(none, 2, 3),
              .candidates = first},
             lists(y, 2, 3), d, {.row_weights = present}) == lipo(whole, lists(y, 1, 2)));
}

TEST_CASE("exo_list: rewards whose quotients overflow", "[preference]") {
  const std::vector<double> p{-1, -2, -3}, q(3), r{3e307, 3e307, 3e307}, zero(3);
  std::vector<double> g(3), h(3);
  const perdita::exo_list<double> loss;
  const auto list = [](const auto& v) { return matrix_view(v.data(), 1, 3); };
  const perdita::list_scores<double> in{.policy = list(p), .reference = list(q)};
  CHECK(loss(in, list(r), matrix_view<double>(g.data(), 1, 3)) ==
        loss(in, list(zero), matrix_view<double>(h.data(), 1, 3)));
  CHECK(g == h);
}

TEST_CASE("exo_list: targets below all numbers", "[preference]") {
  const std::vector<double> q(3), r{1e308, 0, -1e308}; // t = 0, −1e309 and −2e309
  const auto list = [](const auto& v) { return matrix_view(v.data(), 1, 3); };
  // s = 0, −up/10 and −up/10
  for (const double up : {1., 7000., 7060.}) {
    const std::vector<double> p{0, -up, -up};
    std::vector<double> g(3, 7);
    const double value = perdita::exo_list<double>()({.policy = list(p), .reference = list(q)},
                                                     list(r), matrix_view<double>(g.data(), 1, 3));
    const wide beta = 0.1, image = exp(wide(-beta * up)), share = image / (1 + 2 * image);
    const wide unit = wide(1e308) / beta, expected = 3 * share * unit;
    const wide slopes[] = {-(1 - 2 * share) * expected, share * (unit - expected),
                           share * (2 * unit - expected)};
    const auto check = [&](double got, const wide& want, const wide& factor) {
      INFO("policy " << up << ": " << got << " for " << text(wide(factor * want)));
      if (size_of(want) > std::numeric_limits<double>::max())
        CHECK(got == (want > 0 ? 1 : -1) * std::numeric_limits<double>::infinity());
      else
        CHECK(size_of(got - factor * want) <= 1e-12 * size_of(factor * want));
    };
    check(value, expected, 1);
    for (std::size_t k = 0; k < 3; ++k)
      check(g[k], slopes[k], beta); // s is β log π
  }
  CHECK_THROWS_WITH(perdita::exo_list<double>({.reward_beta = 1e-310}),
                    ContainsSubstring("whose inverse is finite"));
}

TEST_CASE("list losses: bad input", "[preference]") {
  const std::vector<double> p(4, -1), y{1, 0, 1, 2};
  std::vector<double> g(4, 5);
  const std::vector<std::int64_t> many{3, 1}, tokens{1, 0, 1, 1};
  const matrix_view<const double> m(p.data(), 2, 2), flat(p.data(), 1, 4), ratings(y.data(), 2, 2);
  const matrix_view<double> d(g.data(), 2, 2);
  const perdita::lipo<double> loss;
  CHECK_THROWS_WITH(loss({.policy = m}, ratings, d), ContainsSubstring("reference is missing"));
  CHECK_THROWS_WITH(loss({.policy = m, .reference = flat}, ratings, d),
                    ContainsSubstring("reference is 1 × 4, expected 2 × 2"));
  CHECK_THROWS_WITH(loss({.policy = m, .reference = m}, {}, d),
                    ContainsSubstring("ratings is missing"));
  CHECK_THROWS_WITH(loss({.policy = m, .reference = m}, ratings, d),
                    ContainsSubstring("ratings[3] is 2"));
  CHECK_THROWS_WITH(loss({.policy = m, .reference = m, .candidates = many}, m, d),
                    ContainsSubstring("candidates[0] is 3"));
  CHECK_THROWS_WITH(perdita::rrhf<double>()({.policy = m}, ratings, d),
                    ContainsSubstring("lengths is missing"));
  CHECK_THROWS_WITH(
      perdita::rrhf<double>()(
          {.policy = m, .lengths = matrix_view<const std::int64_t>(tokens.data(), 2, 2)}, ratings,
          d),
      ContainsSubstring("lengths[1] is 0"));
  CHECK_THROWS_WITH(perdita::inpo_list<double>()({.policy = m, .reference = m}, ratings, d),
                    ContainsSubstring("previous is missing"));
  const std::vector<double> impossible{-1, -inf, -1, -1};
  CHECK_THROWS_WITH(perdita::dno_list<double>()(
                        {.policy = m, .reference = {impossible.data(), 2, 2}}, ratings, d),
                    ContainsSubstring("reference[1] is -inf"));
  CHECK_THROWS_WITH(perdita::dno_list<double>()({.policy = d, .reference = m}, ratings, d),
                    ContainsSubstring("overlaps"));
  CHECK(g == std::vector<double>(4, 5));
  CHECK_THROWS_WITH(perdita::lipo<float>({.beta = 0}), ContainsSubstring("beta is 0"));
  CHECK_THROWS_WITH(perdita::lipo<float>({.objective = list_objective(9)}),
                    ContainsSubstring("objective is 9"));
  CHECK_THROWS_WITH(perdita::plackett_luce_dpo<float>({.beta = -1}),
                    ContainsSubstring("beta is -1"));
  CHECK_THROWS_WITH(perdita::plackett_luce_dpo<float>({.places = -1}), ContainsSubstring("places"));
  CHECK_THROWS_WITH(perdita::exo_list<float>({.reward_beta = 0}), ContainsSubstring("reward_beta"));
  CHECK_THROWS_WITH(perdita::dno_list<float>({.eta = 0}), ContainsSubstring("eta is 0"));
  CHECK_THROWS_WITH(perdita::inpo_list<float>({.eta = 0.1, .tau = 0.2}), ContainsSubstring("tau"));
  CHECK_THROWS_WITH(perdita::rrhf<float>({.rank_weight = -1}), ContainsSubstring("rank_weight"));
}

TEST_CASE("win_probabilities: against the others of the list", "[preference]") {
  const std::vector<double> s{0, 1, 3, 2, 2, 9};
  const std::vector<std::int64_t> candidates{3, 1};
  std::vector<double> p(6, 7);
  const matrix_view<const double> scores(s.data(), 2, 3);
  const matrix_view<double> result(p.data(), 2, 3);
  const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  perdita::win_probabilities(scores, result, candidates);
  CHECK(std::abs(p[0] - (sigmoid(-1) + sigmoid(-3)) / 2) < 1e-15);
  CHECK(std::abs(p[2] - (sigmoid(3) + sigmoid(2)) / 2) < 1e-15);
  CHECK((p[3] == 0.5 && p[4] == 0 && p[5] == 0));
  CHECK_THROWS_WITH(perdita::win_probabilities(scores, matrix_view<double>(p.data(), 3, 2)),
                    ContainsSubstring("result is 3 × 2"));
}

TEST_CASE("Curry-DPO: pairs from ratings, the easy ones first", "[preference]") {
  using perdita::pairing;
  using pairs = std::vector<perdita::rated_pair>;
  const std::vector<double> y{5, 9, 2, 9, 1, 1, 1, 1, 4, 7, 6, 0};
  const matrix_view<const double> ratings(y.data(), 3, 4);
  const std::vector<std::int64_t> candidates{4, 4, 3};
  const pairs best = perdita::make_pairs(ratings, pairing::best_against_rest, 0, candidates);
  CHECK(best == pairs{{0, 1, 0, 4}, {0, 1, 2, 7}, {2, 1, 0, 3}, {2, 1, 2, 1}});
  CHECK(perdita::make_pairs(ratings, pairing::best_against_worst, 0, candidates) ==
        pairs{{0, 1, 2, 7}, {2, 1, 0, 3}});
  CHECK(perdita::make_pairs(ratings, pairing::all, 4) == pairs{{0, 1, 0, 4},
                                                               {0, 1, 2, 7},
                                                               {0, 3, 0, 4},
                                                               {0, 3, 2, 7},
                                                               {2, 0, 3, 4},
                                                               {2, 1, 3, 7},
                                                               {2, 2, 3, 6}});

  const auto plan = perdita::make_curriculum(best, 2);
  REQUIRE(plan.stages() == 2);
  const auto stage = [&](const perdita::curriculum& c, index s) {
    const auto span = c.stage(s);
    return pairs(span.begin(), span.end());
  };
  CHECK(stage(plan, 0) == pairs{{0, 1, 2, 7}, {2, 1, 0, 3}});
  CHECK(stage(plan, 1) == pairs{{0, 1, 0, 4}, {2, 1, 2, 1}});
  const auto whole = perdita::make_curriculum(best, 2, perdita::staging::overall);
  CHECK(stage(whole, 0) == pairs{{0, 1, 2, 7}, {0, 1, 0, 4}});
  CHECK(stage(whole, 1) == pairs{{2, 1, 0, 3}, {2, 1, 2, 1}});
  const auto many = perdita::make_curriculum(best, 5);
  CHECK((many.stages() == 5 && many.stage(1).empty() && many.stage(2).size() == 2));
  CHECK(perdita::make_curriculum({}, 3).stage(2).empty());

  const std::vector<double> unknown{1, nan};
  CHECK_THROWS_WITH(perdita::make_pairs(matrix_view<const double>(unknown.data(), 1, 2)),
                    ContainsSubstring("ratings[1]"));
  CHECK_THROWS_WITH(perdita::make_pairs(ratings, pairing(7)), ContainsSubstring("pairing is 7"));
  const matrix_view<const double> nowhere(nullptr, 2, 3);
  CHECK_THROWS_WITH(perdita::make_pairs(nowhere), ContainsSubstring("ratings is null"));
  std::vector<double> wins(6);
  CHECK_THROWS_WITH(perdita::win_probabilities(nowhere, matrix_view<double>(wins.data(), 2, 3)),
                    ContainsSubstring("scores is null"));
  CHECK_THROWS_WITH(perdita::make_pairs(ratings, pairing::all, -1), ContainsSubstring("least_gap"));
  CHECK_THROWS_WITH(perdita::make_curriculum(best, 0), ContainsSubstring("stages is 0"));
  CHECK_THROWS_WITH(plan.stage(2), ContainsSubstring("stage is 2"));
}

TEST_CASE("unpaired losses: what the summary says, and bounds of weights", "[preference]") {
  golden g;
  perdita::sequence_summary summary;
  perdita::kto<double>()(g.scores(), g.labels, 0.25, {}, {}, {.summary = &summary});
  CHECK(summary.kl == 0.25);
  const std::vector<double> wins{0.25, 0.75};
  perdita::sppo_points<double>()(g.scores(), wins, {}, {}, {.summary = &summary});
  CHECK((summary.chosen_logps == -20 && summary.rejected_logps == -12));
  const std::vector<float> chance{0.1F, 0.75F, 0.5F};
  std::vector<float> weights(3);
  perdita::udm_weights<float>(chance, std::vector<int>{0, 0, 1}, weights, 0.75, 2);
  CHECK(weights == std::vector<float>{0.75F, 2, 1});
}

TEST_CASE("list losses: other settings, the summary, the normaliser", "[preference]") {
  golden g;
  const matrix_view<const double> p(g.policy.data(), 1, 2), r(g.reference.data(), 1, 2);
  const matrix_view<double> d(g.gradient.data(), 1, 2);
  const std::vector<double> worse{0, 1}, odds{std::log(0.999), std::log(0.001)};
  const std::vector<int> tokens{5, 8};
  // p: log π/√n
  check_golden(perdita::rrhf<double>({.nll_weight = 0, .length_penalty = 0.5})(
                   {.policy = p, .lengths = matrix_view<const int>(tokens.data(), 1, 2)},
                   matrix_view<const double>(worse.data(), 1, 2), d),
               20 / std::sqrt(8.0) - 12 / std::sqrt(5.0));
  check_golden(g.gradient[0], 1 / std::sqrt(5.0));
  check_golden(g.gradient[1], -1 / std::sqrt(8.0));
  // Twice β of half the log-ratios
  const std::vector<double> half{-12.25, -19.6};
  check_golden(perdita::exo_list<double>({.beta = 0.2, .reward_beta = 1})(
                   {.policy = {half.data(), 1, 2}, .reference = r},
                   matrix_view<const double>(odds.data(), 1, 2), d),
               2.539184819078183);
  check_golden(g.gradient[0], -2 * 0.1687050860814);
  const std::vector<double> zero(2), weights{2};
  const perdita::list_scores<double> scores{.policy = p, .reference = {zero.data(), 1, 2}};
  const perdita::plackett_luce_dpo<double> loss;
  perdita::sequence_summary summary;
  const double value = loss(scores, matrix_view<const double>(worse.data(), 1, 2), {},
                            {.row_weights = weights}, {.summary = &summary});
  CHECK((summary.chosen_logps == -20 && summary.rejected_logps == -12));
  CHECK(summary.accuracies == 0);
  check_golden(loss(scores, matrix_view<const double>(worse.data(), 1, 2), {},
                    {.row_weights = weights, .normaliser = 8}),
               value / 4);
}

} // namespace perdita_tests
