// SPDX-License-Identifier: MIT

// Preference losses of tokens: formula sheet of preference losses, 8.

#include <perdita/preference/token_level.hpp>

#include <cmath>
#include <cstddef>
#include <limits>
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
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

// Σ of the log-ratios of the chosen less that of the rejected: each pair's.
constexpr double margins[] = {0, 1e-3, -1e-3, 1, -1, 50, -50, 500, -500, 5000, -5000};
constexpr std::size_t count = 11, width = 5;

template <class T> struct pair_data {
  std::vector<T> l, q, guide, d, g, of_d;
  std::vector<T> weights, upstream, values, chosen, rejected, gaps;
  std::vector<int> lengths;

  explicit pair_data(T before = 0) {
    random_numbers random(5);
    const auto grid = [](double x) { return static_cast<T>(std::round(x * 0x1p9) * 0x1p-9); };
    for (std::size_t r = 0; r < 2 * count; ++r) {
      const bool is_chosen = r < count;
      const int n = r == 3 ? 0 : static_cast<int>(1 + r % width);
      lengths.push_back(n);
      for (std::size_t t = 0; t < width; ++t) {
        const bool counts = static_cast<int>(t) < n;
        const double x = (is_chosen ? 1 : -0.5) * margins[r % count] / n + 0.1 * random.normal();
        q.push_back(counts ? grid(random.uniform(-3, 0) - 5000) : T(nan));
        l.push_back(grid(static_cast<double>(q.back()) + x));
        guide.push_back(grid(static_cast<double>(q.back()) + 3 * random.normal()));
        d.push_back(counts ? grid(random.uniform(0, 2)) : T(nan));
      }
    }
    g.assign(2 * count * width, before);
    of_d = g;
    for (std::size_t i = 0; i < count; ++i) {
      weights.push_back(static_cast<T>(i == 4 ? 0 : 0.5 + 0.25 * static_cast<double>(i % 3)));
      upstream.push_back(static_cast<T>(i == 5 ? -2 : 1));
    }
    values.assign(count, 9);
    chosen = rejected = gaps = values;
  }
  template <class V> static auto view(V& x) {
    return matrix_view(x.data(), index(2 * count), index(width));
  }
  perdita::token_pairs<T> pairs() const {
    perdita::token_pairs<T> p;
    p.policy = view(l);
    p.reference = view(q);
    p.guide = view(guide);
    p.divergence = view(d);
    p.lengths = lengths;
    return p;
  }
};

/// What moves in the reference: a token's l, its D, or nothing.
struct moved {
  std::size_t l = std::size_t(-1), d = std::size_t(-1);
  wide by = 0;
};

struct pair_values {
  wide value, size, chosen, rejected;
};
/// `D_w` of TDPO2 is a constant: it does not move.
template <class T, class O>
pair_values pair_of(const pair_data<T>& data, const O& o, std::size_t i, const moved& m = {}) {
  wide score[2], reward[2], size = 0;
  for (const std::size_t side : {std::size_t(0), std::size_t(1)}) {
    wide ratios = 0, divergences = 0, rewarded = 0;
    const std::size_t r = side * count + i;
    for (std::size_t k = r * width; k < r * width + static_cast<std::size_t>(data.lengths[r]);
         ++k) {
      const wide x = data.l[k] + (m.l == k ? m.by : wide(0)) - data.q[k];
      wide f = 1;
      if constexpr (O::has_guide) {
        f += (side == 0 ? 1 : -1) * wide(o.alpha) * o.beta * (wide(data.guide[k]) - data.q[k]);
        f = larger(f, o.floor);
      }
      ratios += f * x;
      size += size_of(wide(f * x));
      if constexpr (O::has_divergence) {
        const bool constant = o.second && side == 0;
        divergences += data.d[k] + (m.d == k && !constant ? m.by : wide(0));
        rewarded += data.d[k];
        size += data.d[k];
      }
    }
    score[side] = ratios;
    if constexpr (O::has_divergence)
      score[side] += (o.second ? wide(o.alpha) : wide(1)) * divergences;
    reward[side] = o.beta * (ratios + rewarded);
  }
  const wide z = o.beta * (score[0] - score[1]);
  return {softplus(-z), 1 + o.beta * size, reward[0], reward[1]};
}

template <class T> struct judges { error_judge values, slopes; };

template <class T, class O> void compare(judges<T>& judge, const O& o, T before) {
  const wide epsilon = std::numeric_limits<T>::epsilon(), least = std::numeric_limits<T>::min();
  const perdita::token_preference<O, T> loss(o);
  pair_data<T> data(before);
  double accuracy = -1;
  perdita::token_pair_outputs<T> out;
  out.gradient = data.view(data.g);
  if (O::has_divergence)
    out.divergence_gradient = data.view(data.of_d);
  out.chosen_rewards = data.chosen;
  out.rejected_rewards = data.rejected;
  out.margins = data.gaps;
  out.accuracy = &accuracy;
  const T value = loss(data.pairs(), out,
                       {.row_weights = data.weights,
                        .upstream = data.upstream,
                        .scale = 2,
                        .accumulate = before != 0,
                        .values = data.values});
  wide share = 0, total = 0, total_size = 0, right = 0, counted = 0;
  for (const T w : data.weights)
    share += w;
  share = o.reduction == perdita::reduction::mean ? wide(1 / share) : wide(1);
  for (std::size_t i = 0; i < count; ++i) {
    INFO("margin " << margins[i]);
    const auto pair = pair_of(data, o, i);
    const wide w = data.weights[i];
    total += w * pair.value;
    // e^z errs relatively as z does absolutely
    const wide scale = pair.value * pair.size;
    total_size += w * scale;
    CHECK(judge.values.within(size_of(wide(data.values[i] - w * pair.value)), 2,
                              epsilon * w * scale + least));
    const wide there = w == 0 ? 0 : 1; // by-products are of the pairs that count
    for (const auto& [got, wanted] :
         {std::pair(data.chosen[i], pair.chosen), std::pair(data.rejected[i], pair.rejected),
          std::pair(data.gaps[i], wide(pair.chosen - pair.rejected))})
      CHECK(
          judge.values.within(size_of(wide(got - there * wanted)), 2, there * epsilon * pair.size));
    counted += there;
    right += pair.chosen > pair.rejected ? there : wide(0);
    for (const std::size_t r : {i, count + i})
      for (std::size_t t = 0; t < width; ++t) {
        const std::size_t k = r * width + t;
        if (static_cast<int>(t) >= data.lengths[r] || w == 0) {
          CHECK((data.g[k] == before && data.of_d[k] == before));
          continue;
        }
        const wide step = 1e-11, factor = 2 * share * w * data.upstream[i];
        const auto slope = [&](moved up) {
          up.by = step;
          moved down = up;
          down.by = -step;
          return wide(factor * (pair_of(data, o, i, up).value - pair_of(data, o, i, down).value) /
                      (2 * step));
        };
        const wide of_l = slope({.l = k}), of_d = slope({.d = k});
        INFO("token " << t << ": " << data.g[k] << " for " << text(of_l));
        // Where a difference drowns: the derivative is β f σ(−z), of which 1e-20 are left.
        const wide drowned = 1e-19 * pair.value;
        CHECK(
            judge.slopes.within(size_of(wide(data.g[k] - before - of_l)), 2,
                                epsilon * (before + size_of(of_l) * pair.size) + drowned + least));
        CHECK(
            judge.slopes.within(size_of(wide(data.of_d[k] - before - of_d)), 2,
                                epsilon * (before + size_of(of_d) * pair.size) + drowned + least));
      }
  }
  CHECK(judge.values.within(size_of(wide(value - share * total)), 2, epsilon * share * total_size));
  CHECK(accuracy == static_cast<double>(wide(right / counted)));
  CHECK(loss(data.pairs(), {}, {.row_weights = data.weights}) == value);
}

} // namespace

TEMPLATE_TEST_CASE("token_level: values and gradients against the formula", "[token_level]", float,
                   double) {
  using T = TestType;
  judges<T> of_tgdpo, of_tdpo;
  for (const auto how : {perdita::reduction::mean, perdita::reduction::sum})
    for (const double alpha : {0.0, 0.5, 2.0})
      for (const T before : {T(0), T(3)}) {
        for (const double floor : {-inf, 0.25})
          compare(of_tgdpo, perdita::tgdpo_options{0.125, alpha, floor, how}, before);
        for (const bool second : {false, true})
          compare(of_tdpo, perdita::tdpo_options{0.125, alpha, second, how}, before);
      }
  report_accuracy<T>("tgdpo", "", in_epsilons_of_terms, of_tgdpo.values, of_tgdpo.slopes);
  report_accuracy<T>("tdpo", "", in_epsilons_of_terms, of_tdpo.values, of_tdpo.slopes);
}

TEST_CASE("token_level: DPO's golden value, identities", "[token_level]") {
  // Formula sheet 13: u = 0.5, v = −0.8, β = 0.1
  std::vector<double> l{-7, -5, -20, 0}, q{-7, -5.5, -19.2, 0}, guide{-6, -6, -19, 0},
      d{.1, .2, .5, 0}, g(4), h(4);
  const std::vector<int> lengths{2, 1};
  const auto view = [](std::vector<double>& x) { return matrix_view<double>(x.data(), 2, 2); };
  perdita::token_pairs<double> in;
  in.policy = view(l);
  in.reference = view(q);
  in.guide = view(guide);
  in.divergence = view(d);
  in.lengths = lengths;
  for (const bool guided : {true, false}) {
    const double value = guided ? perdita::tgdpo<double>({.alpha = 0})(in, {.gradient = view(g)})
                                : perdita::tdpo<double>({.alpha = 0})(in, {.gradient = view(g)});
    CHECK(std::abs(value - 0.6302581946816907) < 1e-15);
    CHECK(std::abs(g[0] + 0.04675456936127) < 1e-14);
    CHECK((g[1] == g[0] && g[2] == -g[0] && g[3] == 0));
  }
  // TDPO1 by hand: 0.5 + 0.8 − (0.5 − 0.3) = 1.1; TDPO2: 1.3 − ½ 0.2 = 1.2
  const auto softplus_of = [](double x) { return std::log1p(std::exp(x)); };
  CHECK(std::abs(perdita::tdpo<double>({.second = false})(in) - softplus_of(-.11)) < 1e-15);
  CHECK(std::abs(perdita::tdpo<double>()(in, {.divergence_gradient = view(h)}) -
                 softplus_of(-.12)) < 1e-15);
  CHECK((h[0] == 0 && h[1] == 0 && std::abs(h[2] - .05 / (1 + std::exp(.12))) < 1e-15));
  // TGDPO by hand: f = 1 + ½ 0.1 (1, −0.5), 1 − ½ 0.1 · 0.2
  CHECK(std::abs(perdita::tgdpo<double>()(in) - softplus_of(-.1 * (.5 * .975 + .8 * .99))) < 1e-15);
  // TDPO1 through the softmax: a chosen token's logits see onehot − ref, whatever the policy is.
  (void)perdita::tdpo<double>({.second = false})(
      in, {.gradient = view(g), .divergence_gradient = view(h)});
  for (std::size_t k = 0; k < 3; ++k) {
    const double p[] = {.2, .3, .5}, ref[] = {.6, .3, .1};
    for (int j = 0; j < 3; ++j) {
      const double onehot = j == 1;
      CHECK(std::abs(g[k] * (onehot - p[j]) + h[k] * (p[j] - ref[j]) - g[k] * (onehot - ref[j])) <
            1e-16);
    }
  }
}

TEST_CASE("token_level: special values, threads", "[token_level]") {
  pair_data<float> data, other;
  const perdita::tdpo<float> loss;
  const auto run = [&](pair_data<float>& x, const perdita::executor& where) {
    return loss(x.pairs(), {.gradient = x.view(x.g), .divergence_gradient = x.view(x.of_d)},
                {.values = x.values, .run_on = where});
  };
  const float value = run(data, perdita::serial);
  const threads_executor threads(3, task_order::shuffled);
  CHECK(run(other, threads) == value);
  CHECK((other.g == data.g && other.of_d == data.of_d && other.values == data.values));
  // NaN stays within its pair; −inf in the reference is an infinite margin.
  other.l[0] = std::nanf("");
  other.q[width] = -std::numeric_limits<float>::infinity();
  other.q[(count + 2) * width] = -std::numeric_limits<float>::infinity();
  CHECK(std::isnan(run(other, threads)));
  CHECK((std::isnan(other.values[0]) && std::isnan(other.g[0])));
  CHECK((other.values[1] == 0 && other.g[width] == 0));
  CHECK(other.values[2] == std::numeric_limits<float>::infinity());
  CHECK((other.g[2 * width] == static_cast<float>(-0.1 * (1.0 / 11)) &&
         other.values[3] == data.values[3]));
  // A NaN in the guide is not hidden by the floor.
  other = data;
  other.guide[0] = std::nanf("");
  const perdita::tgdpo<float> guided({.floor = 0});
  CHECK(std::isnan(guided(other.pairs(), {.gradient = other.view(other.g)})));
  CHECK((std::isnan(other.g[0]) && !std::isnan(other.g[width])));
  CHECK(loss(perdita::token_pairs<float>{}) == 0);
  // −inf in the reference, of which f too becomes infinite: z is +inf all the same.
  for (const bool chosen : {true, false})
    for (const double floor : {-inf, 0.0, 0.25})
      for (const double alpha : {0.5, 0.0}) {
        other = data;
        other.q[(chosen ? 1 : 1 + count) * width] = -std::numeric_limits<float>::infinity();
        const perdita::tgdpo<float> far({.alpha = alpha, .floor = floor});
        const float all =
            far(other.pairs(), {.gradient = other.view(other.g)}, {.values = other.values});
        CHECK(std::isfinite(all) == (chosen || (alpha > 0 && floor <= 0)));
        // A rejected f held at 0 leaves nothing of its token; held above, z is −inf.
        if (chosen || (alpha > 0 && floor < 0))
          CHECK((other.values[1] == 0 && other.g[width] == 0));
        else if (alpha > 0 && floor == 0)
          CHECK((other.values[1] > 0 && other.g[(1 + count) * width] == 0));
        else
          CHECK(other.values[1] == std::numeric_limits<float>::infinity());
        for (const float g : other.g)
          CHECK(std::isfinite(g));
      }
  // A token that is impossible now, but weighs 0: nothing, as with any other log-probability.
  other = data;
  other.guide[width] = -1e6F;
  const float undecided = guided(other.pairs(), {.gradient = other.view(other.g)});
  const auto slopes = other.g;
  other.l[width] = -std::numeric_limits<float>::infinity();
  CHECK(guided(other.pairs(), {.gradient = other.view(other.g)}) == undecided);
  CHECK((other.g == slopes && other.g[width] == 0));
  // Nothing counts: every pair is undecided
  data.lengths.assign(2 * count, 0);
  CHECK(std::abs(run(data, perdita::serial) - std::log(2.0F)) < 1e-7F);
  CHECK(data.g == std::vector<float>(data.g.size(), 0));
}

TEST_CASE("token_level: pairs of row weight 0 are not looked at", "[token_level]") {
  const std::vector<double> l{-1, nan, -1, -3, -1, -4}, q(6, -2), d(6), weights{2, 0, 1};
  std::vector<double> values(3, 7), chosen(3, 7), rejected(3, 7), gaps(3, 7), g(6, 7);
  const auto column = [](const auto& x) { return matrix_view(x.data(), 6, 1); };
  double accuracy = 7;
  const perdita::tdpo<double> loss;
  const double value = loss({.policy = column(l), .reference = column(q), .divergence = column(d)},
                            {.gradient = matrix_view<double>(g.data(), 6, 1),
                             .chosen_rewards = chosen,
                             .rejected_rewards = rejected,
                             .margins = gaps,
                             .accuracy = &accuracy},
                            {.row_weights = weights, .values = values});
  CHECK(std::isfinite(value));
  CHECK(accuracy == 1);
  CHECK((chosen[1] == 0 && rejected[1] == 0 && gaps[1] == 0 && values[1] == 0));
  CHECK((g[1] == 0 && g[4] == 0 && chosen[0] == 0.1 && gaps[2] > 0));
}

TEST_CASE("token_level: rewards of RTO", "[token_level]") {
  std::vector<double> l{-1, -2, -3, -1, -1, nan}, q{-1.5, -2, -1, -2, -1.25, nan},
      guide{-1, -4, -1, -2.5, -1.75, nan}, scores{25, -3}, out(6, 7);
  const std::vector<int> lengths{3, 2};
  const auto view = [](std::vector<double>& x) { return matrix_view<double>(x.data(), 2, 3); };
  perdita::rto_rewards(view(l), view(q), view(guide), scores, view(out), {.kl_weight = 0.5}, {},
                       lengths);
  // 0.05 (0.5, −2, 0, −0.5, −0.5) within ±0.05, −½ (0.5, 0, −2, 1, 0.25), then 10 and −3
  const double wanted[] = {.025 - .25, -.05, 0 + 1 + 10, -.025 - .5, -.025 - .125 - 3, 0};
  for (std::size_t k = 0; k < 6; ++k)
    CHECK(std::abs(out[k] - wanted[k]) < 1e-14);
  const auto before = out;
  using Catch::Matchers::ContainsSubstring;
  const auto refused = [&](const perdita::rto_options& o, const char* what) {
    CHECK_THROWS_WITH(perdita::rto_rewards(view(l), view(q), view(guide), scores, view(out), o),
                      ContainsSubstring(what));
  };
  refused({.beta = 0}, "beta is 0");
  refused({.clip = -1}, "clip is -1");
  refused({.kl_weight = -1}, "weight is -1");
  refused({.score_clip = nan}, "score_clip");
  CHECK_THROWS_WITH(perdita::rto_rewards(view(l), view(q), view(guide),
                                         perdita::vector_view<const double>(nullptr, 2), view(out)),
                    ContainsSubstring("scores is null"));
  std::vector<double> eight(8, 7);
  const matrix_view<double> first(eight.data(), 2, 3), second(eight.data() + 1, 2, 3);
  CHECK_THROWS_WITH(perdita::rto_rewards(view(l), view(q), first, scores, second),
                    ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(perdita::rto_rewards(first, view(q), view(guide), scores, second),
                    ContainsSubstring("overlaps"));
  CHECK(eight == std::vector<double>(8, 7));
  CHECK_THROWS_WITH(perdita::rto_rewards(view(l), view(q), matrix_view<double>(guide.data(), 3, 2),
                                         scores, view(out)),
                    ContainsSubstring("expected"));
  CHECK(out == before);
}

TEST_CASE("token_level: weights of tokens (LD-DPO) and of pairs (WPO)", "[token_level]") {
  using Catch::Matchers::ContainsSubstring;
  std::vector<double> w(16, 7);
  const matrix_view<double> weights(w.data(), 4, 4);
  // Pairs of rows 0 and 2 with 3 and 2 tokens, of 1 and 3 with 2 and 0
  const std::vector<int> mask{0, 1, 1, 1, 1, 0, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0};
  const matrix_view<const int> counts(mask.data(), 4, 4);
  perdita::ld_weights(weights, 0.25, counts);
  CHECK(w == std::vector<double>{0, 1, 1, .25, .25, 0, .25, 0, 1, 0, 0, 1, 0, 0, 0, 0});
  const std::vector<int> lengths{4, 1, 2, 3};
  perdita::ld_weights(weights, 0, {}, lengths);
  CHECK(w == std::vector<double>{1, 1, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0});

  // Probabilities (½, ½) and (¾, ¼): Σ p² is ½ and ⅝
  const double even = std::log(0.5), some = std::log(0.75), rare = std::log(0.25);
  const std::vector<double> l{nan,  even, some, rare, even, nan, even, nan,
                              some, nan,  nan,  some, nan,  nan, nan,  nan};
  std::vector<double> squares(16, std::log(0.625)), c(2, 7);
  squares[1] = squares[4] = squares[6] = std::log(0.5);
  const matrix_view<const double> policy(l.data(), 4, 4), of_squares(squares.data(), 4, 4);
  const double first = std::cbrt(1.2 * 0.4) * 1.2;
  for (const double cap : {1.0, 0.5, inf}) {
    perdita::wpo_weights(policy, of_squares, c, cap, counts);
    CHECK(std::abs(c[0] - std::fmin(first, cap)) < 1e-15);
    CHECK(std::abs(c[1] - std::fmin(1, cap)) < 1e-15); // and 1 of the empty one
  }
  perdita::wpo_weights(policy, of_squares, c);
  CHECK((std::isnan(c[0]) && std::isnan(c[1])));

  const auto before = w;
  CHECK_THROWS_WITH(perdita::ld_weights(weights, 1.5), ContainsSubstring("alpha is 1.5"));
  CHECK_THROWS_WITH(perdita::ld_weights(matrix_view<double>(w.data(), 3, 4), 1),
                    ContainsSubstring("weights is 3, expected an even number of rows"));
  CHECK_THROWS_WITH(perdita::ld_weights(weights, 1, {}, std::vector<int>(4, 5)),
                    ContainsSubstring("lengths[0] is 5"));
  CHECK(w == before);
  std::vector<double> mine = squares;
  CHECK_THROWS_WITH(perdita::wpo_weights(policy, matrix_view<double>(mine.data(), 4, 4),
                                         perdita::vector_view<double>(mine.data() + 8, 2)),
                    ContainsSubstring("overlaps"));
  CHECK(mine == squares);
  CHECK_THROWS_WITH(perdita::wpo_weights(policy, of_squares, c, 0), ContainsSubstring("cap is 0"));
  CHECK_THROWS_WITH(perdita::wpo_weights(policy, of_squares, w),
                    ContainsSubstring("weights is 16"));
}

TEST_CASE("token_level: what is refused", "[token_level]") {
  using Catch::Matchers::ContainsSubstring;
  CHECK_THROWS_WITH(perdita::tdpo<float>({.beta = 0}), ContainsSubstring("tdpo: beta is 0"));
  CHECK_THROWS_WITH(perdita::tdpo<float>({.beta = -0.1}), ContainsSubstring("beta"));
  CHECK_THROWS_WITH(perdita::tgdpo<float>({.alpha = -1}), ContainsSubstring("tgdpo: alpha is -1"));
  CHECK_THROWS_WITH(perdita::tgdpo<float>({.floor = nan}), ContainsSubstring("floor"));
  pair_data<double> data(5);
  const auto refused = [&](const auto& loss, const perdita::token_pairs<double>& in,
                           const char* what, const perdita::call_options<double>& call = {}) {
    CHECK_THROWS_WITH(loss(in, {.gradient = data.view(data.g)}, call), ContainsSubstring(what));
  };
  const perdita::tdpo<double> tdpo;
  const perdita::tgdpo<double> tgdpo;
  auto bad = data.pairs();
  bad.reference = {};
  refused(tdpo, bad, "reference");
  bad = data.pairs();
  bad.guide = {};
  refused(tgdpo, bad, "guide");
  bad = data.pairs();
  bad.divergence = {};
  refused(tdpo, bad, "divergence");
  bad = data.pairs();
  bad.policy = {data.l.data(), 3, 5};
  refused(tdpo, bad, "rows of policy is 3, expected an even number");
  bad = data.pairs();
  bad.reference = {data.q.data(), 20, 5};
  refused(tdpo, bad, "rows of reference is 20, expected 22");
  bad = data.pairs();
  bad.policy = data.view(data.g);
  refused(tdpo, bad, "overlaps");
  const perdita::vector_view<double> in_gradient(data.g.data() + 3, 11);
  refused(tdpo, data.pairs(), "overlaps", {.row_weights = in_gradient});
  refused(tdpo, data.pairs(), "overlaps", {.upstream = in_gradient});
  refused(tdpo, data.pairs(), "overlaps", {.values = in_gradient});
  CHECK_THROWS_WITH(tdpo(data.pairs(), {.gradient = data.view(data.g), .margins = in_gradient}),
                    ContainsSubstring("overlaps"));
  bad = data.pairs();
  const std::vector<int> lengths(11);
  bad.lengths = lengths;
  refused(tdpo, bad, "lengths is 11, expected 22");
  refused(tdpo, data.pairs(), "row_weights", {.row_weights = data.l});
  CHECK_THROWS_WITH(tgdpo(data.pairs(), {.divergence_gradient = data.view(data.of_d)}),
                    ContainsSubstring("divergence_gradient is given"));
  CHECK_THROWS_WITH(tdpo(data.pairs(), {.margins = data.l}), ContainsSubstring("margins"));
  CHECK(data.g == std::vector<double>(data.g.size(), 5));
}

TEST_CASE("token_level: RTO with other bounds", "[token_level]") {
  std::vector<double> l(6), q{-1.5, -2, -1, -2, -1.25, nan}, guide{-1, -4, -1, -2.5, -1.75, nan},
      scores{25, -3}, out(6);
  const std::vector<int> lengths{3, 2};
  const auto view = [](std::vector<double>& x) { return matrix_view<double>(x.data(), 2, 3); };
  perdita::rto_rewards(view(l), view(q), view(guide), scores, view(out),
                       {.beta = 0.1, .clip = 0.15, .kl_weight = 0, .score_clip = 2}, {}, lengths);
  const double wanted[] = {.05, -.15, 2, -.05, -.05 - 2, 0};
  for (std::size_t k = 0; k < 6; ++k)
    CHECK(std::abs(out[k] - wanted[k]) < 1e-14);
}

} // namespace perdita_tests
