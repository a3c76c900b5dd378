// SPDX-License-Identifier: MIT

// Losses of pairs of responses: formula sheet "preference", sections 2, 3, 4, 6 and 9.

#include <perdita/preference/dpo.hpp>
#include <perdita/preference/entanglement.hpp>
#include <perdita/preference/margin_family.hpp>
#include <perdita/preference/reference_free.hpp>

#include <cmath>
#include <cstddef>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include <perdita/testing/gradient_check.hpp>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/dual.hpp"
#include "support/numbers.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

using perdita::dpo_type;
constexpr double inf = std::numeric_limits<double>::infinity();
const double nan = std::nan("");

auto close(double x, double tolerance) { return Catch::Matchers::WithinRel(x, tolerance); }

/// Pairs with all that a loss may need.
template <class T> struct pair_data {
  std::vector<T> chosen, rejected, chosen_reference, rejected_reference, chosen_previous,
      rejected_previous, targets, d_chosen, d_rejected, values;
  std::vector<int> chosen_lengths, rejected_lengths;
  double baseline = 0;

  void add(double w, double l, double rw, double rl, int nw, int nl) {
    chosen.push_back(static_cast<T>(w));
    rejected.push_back(static_cast<T>(l));
    chosen_reference.push_back(static_cast<T>(rw));
    rejected_reference.push_back(static_cast<T>(rl));
    chosen_previous.push_back(static_cast<T>(rw + 0.5));
    rejected_previous.push_back(static_cast<T>(rl - 1));
    targets.push_back(static_cast<T>(0.75));
    chosen_lengths.push_back(nw);
    rejected_lengths.push_back(nl);
    d_chosen.push_back(7);
    d_rejected.push_back(7);
    values.push_back(7);
  }
  perdita::preference_pairs<T> view() const {
    return {.chosen = chosen,
            .rejected = rejected,
            .chosen_reference = chosen_reference,
            .rejected_reference = rejected_reference,
            .chosen_lengths = chosen_lengths,
            .rejected_lengths = rejected_lengths,
            .chosen_previous = chosen_previous,
            .rejected_previous = rejected_previous,
            .targets = targets,
            .baseline = baseline};
  }
  T run(const perdita::preference_loss<T>& loss, const perdita::call_options<T>& call = {},
        const perdita::preference_report<T>& report = {}) {
    return loss(view(), d_chosen, d_rejected, call, report);
  }
};

template <class T> pair_data<T> golden_pair() {
  pair_data<T> data;
  data.add(-12, -20, -12.5, -19.2, 5, 8);
  return data;
}
pair_data<double> random_pairs(std::size_t n, std::uint64_t seed) {
  random_numbers random(seed);
  pair_data<double> data;
  for (std::size_t i = 0; i < n; ++i) {
    const double w = -20 + 4 * random.normal(), l = -20 + 4 * random.normal();
    data.add(w, l, w + 2 * random.normal(), l + 2 * random.normal(),
             static_cast<int>(3 + random.below(9)), static_cast<int>(3 + random.below(9)));
    data.targets.back() = random.uniform(0, 1);
  }
  return data;
}

template <class T> perdita::dpo<T> of_type(dpo_type type, double e = 0.125) {
  return {{.types = {type}, .label_smoothing = static_cast<T>(e)}};
}
using divergence = perdita::preference_divergence;

/// A loss, and what it is of the log-ratios u and v of a pair with lengths 5 and 8 and references
/// −12.5 and −19.25; β is 0.1 as T has it, ε 1/8. A slope may be wrong by epsilons of
/// floor + of_ratios (|u| + |v|), where it is a difference.
template <class T> struct subject {
  std::string name;
  perdita::preference_loss<T> loss;
  std::function<dual(const dual&, const dual&)> reference;
  double floor = 0, of_ratios = 0;
};

template <class T> std::vector<subject<T>> ratio_losses() {
  const wide b = T(0.1), half = 1 / (2 * b), e = 0.125, tau = T(0.05);
  const auto margin = [b](auto link) {
    return [=](const dual& u, const dual& v) { return link(b * (u - v)); };
  };
  const auto smoothed = [e](const dual& z) { return (1 - e) * sp(-z) + e * sp(z); };
  const auto square = [](const dual& x) { return x * x; };
  const auto lrml = [tau](const dual& z) {
    const dual k = sg((1 / tau) * z);
    return sg(-((1 / tau) * z)) * sp(-z) + k * exp(-z);
  };
  const auto power = [](wide rate) { // centred
    return [rate](const dual& r) {
      const dual x = rate * r;
      return (1 / rate) * expm1(x.value > 80 ? dual(80) : x);
    };
  };
  const auto scored = [=](auto s) {
    return [=](const dual& u, const dual& v) { return sp(-(b * (s(u) - s(v)))); };
  };
  const auto of = [](divergence d, double a = 0.5) {
    return perdita::dpo<T>({.divergence = d, .divergence_alpha = static_cast<T>(a)});
  };
  const wide eta = T(0.01), tau_over_eta = T(0.0025) / wide(T(0.01));
  std::vector<subject<T>> all{
      {"dpo", of_type<T>(dpo_type::sigmoid), margin([](const dual& z) { return sp(-z); })},
      {"dpo: cdpo", of_type<T>(dpo_type::cdpo), margin(smoothed), 0.1},
      {"dpo: robust", of_type<T>(dpo_type::robust),
       margin([e](const dual& z) { return (1 / (1 - 2 * e)) * ((1 - e) * sp(-z) - e * sp(z)); })},
      {"dpo: hinge", of_type<T>(dpo_type::hinge),
       margin([](const dual& z) { return at_least_0(1 - z); })},
      {"dpo: ipo", of_type<T>(dpo_type::ipo),
       [=](const dual& u, const dual& v) {
         return square((1 / wide(5)) * u - (1 / wide(8)) * v - half);
       },
       1, 0.1},
      {"dpo: ipo_sum", of_type<T>(dpo_type::ipo_sum),
       [=](const dual& u, const dual& v) { return square(u - v - half); }, 5, 1},
      {"dpo: exo", of_type<T>(dpo_type::exo), margin([e](const dual& z) {
         return sg(z) * (-sp(-z) - log1p(-e)) + sg(-z) * (-sp(z) - log(e));
       })},
      {"dpo: nca", of_type<T>(dpo_type::nca),
       [=](const dual& u, const dual& v) {
         return sp(-(b * u)) + wide(0.5) * sp(b * u) + wide(0.5) * sp(b * v);
       },
       0.1},
      {"dpo: bco", of_type<T>(dpo_type::bco),
       [=](const dual& u, const dual& v) {
         return sp(-(b * u - wide(0.25))) + sp(b * v - wide(0.25));
       }},
      {"dpo: sppo", of_type<T>(dpo_type::sppo),
       [=](const dual& u, const dual& v) { return square(u - half) + square(v + half); }, 5, 1},
      {"dpo: apo_zero", of_type<T>(dpo_type::apo_zero),
       [=](const dual& u, const dual& v) { return sg(-(b * u)) + sg(b * v); }},
      {"dpo: apo_down", of_type<T>(dpo_type::apo_down),
       [=](const dual& u, const dual& v) { return sg(b * u) + sg(-(b * (u - v))); }, 0.1},
      {"dpo: discopop", of_type<T>(dpo_type::discopop), margin(lrml), 0.1},
      {"dpo: sigmoid_norm", of_type<T>(dpo_type::sigmoid_norm),
       [=](const dual& u, const dual& v) {
         return sp(-(b * ((1 / wide(5)) * u - (1 / wide(8)) * v)));
       }},
      {"dpo: forward_kl", of(divergence::forward_kl), scored(power(-1))},
      {"dpo: alpha", of(divergence::alpha), scored(power(wide(-0.5)))},
      {"dpo: alpha above 1", of(divergence::alpha, 1.25), scored(power(wide(0.25)))},
      {"dpo: js", of(divergence::js), scored([](const dual& r) { return -sp(-r); })},
      {"rdpo", perdita::rdpo<T>({.alpha = T(0.25)}),
       [=](const dual& u, const dual& v) { return sp(-(b * (u - v) - wide(0.75))); }},
      {"dpop", perdita::dpop<T>(),
       [=](const dual& u, const dual& v) {
         return sp(-(b * (u - wide(50) * at_least_0(-u) - v)));
       }},
      {"dpo_shift", perdita::dpo_shift<T>({.factor = T(0.75)}),
       [=](const dual& u, const dual& v) { return sp(-(b * (u - wide(0.75) * v))); }},
      {"cal_dpo", perdita::cal_dpo<T>({.beta = T(0.1)}),
       [=](const dual& u, const dual& v) {
         return sp(-(u - v)) + wide(0.5) * (square(u - half) + square(v + half));
       },
       5, 1},
      {"sppo", perdita::sppo<T>({.beta = T(0.1)}),
       [=](const dual& u, const dual& v) {
         return wide(0.5) * (square(u - wide(0.25) / b) + square(v + wide(0.25) / b));
       },
       5, 1},
      {"dno", perdita::dno<T>(),
       margin([](const dual& z) { return wide(0.75) * sp(-z) + wide(0.25) * sp(z); }), 0.1},
      {"xpo", perdita::xpo<T>({.alpha = T(0.25)}), // log π of the rejected is −19.25 + v
       [=](const dual& u, const dual& v) {
         return wide(0.75) * sp(-(b * (u - v))) + wide(0.25) * sp(b * (u - v)) +
                wide(0.25) * (v - wide(19.25));
       },
       0.3},
      {"xpo: ipo", perdita::xpo<T>({.alpha = 0, .ipo = true}),
       [=](const dual& u, const dual& v) { return square(u - v - wide(0.5) * half); }, 5, 1},
      {"inpo", perdita::inpo<T>({.eta = T(0.01), .tau = T(0.0025)}),
       [=](const dual& u, const dual& v) { // the iteration before: ref + ½ and ref − 1
         return square(u - v - (1 - tau_over_eta) * wide(1.5) - 1 / (2 * eta));
       },
       50, 1},
      {"beta_dpo", perdita::beta_dpo<T>(),
       [=](const dual& u, const dual& v) {
         const wide d = u.value - v.value, a = T(0.6);
         const wide of_batch = larger(wide(T(0.001)), wide(b * (1 + a * (d - wide(0.25)))));
         return sp(-(of_batch * (u - v)));
       }},
      {"diffusion_dpo", perdita::diffusion_dpo<T>({.beta = T(0.5)}),
       [=](const dual& u, const dual& v) { return sp(wide(0.25) * (u - v)); }},
      {"density_ratio: bce", perdita::density_ratio<T>({.type = perdita::density_ratio_type::bce}),
       [=](const dual& u, const dual& v) { return sp(-u) + sp(v); }},
  };
  return all;
}

constexpr double at[] = {0, 1, -1, 50, -50, 500, -500, 5000, -5000};

/// Central differences of the reference, unless there is a kink.
template <class F> bool differences_agree(F value, wide slope, wide scale) {
  const wide h = 1 / wide(1L << 36);
  const wide middle = value(wide(0)), up = (value(h) - middle) / h, down = (middle - value(-h)) / h;
  const wide allowed = 1e-9 * (size_of(slope) + scale) + 1e-9 * size_of(wide((up - down)));
  return size_of(wide(up - down)) > 1e-3 * (size_of(up) + size_of(down)) ||
         size_of(wide((up + down) / 2 - slope)) <= allowed;
}

} // namespace

TEMPLATE_TEST_CASE("preference pairs: value and slopes against the formula", "[preference]", float,
                   double) {
  using T = TestType;
  const double epsilon = std::numeric_limits<T>::epsilon(), fine = 0x1p-52,
               tiny = std::numeric_limits<T>::min();
  for (const subject<T>& s : ratio_losses<T>()) {
    error_judge of_values, of_slopes;
    for (const double u : at)
      for (const double v : at) {
        INFO(s.name << " " << u << " " << v);
        pair_data<T> data;
        data.baseline = 0.25;
        data.add(-12.5 + u, -19.25 + v, -12.5, -19.25, 5, 8);
        const T value = data.run(s.loss);
        const dual by_u = s.reference(dual(u, 1), dual(v)), by_v = s.reference(dual(u), dual(v, 1));
        const double size = std::fabs(u) + std::fabs(v);
        const wide expected = by_u.value;
        const wide sensitive = size * size_of(by_u.slope) + size * size_of(by_v.slope);
        if (!(size_of(expected) < std::numeric_limits<T>::max())) {
          CHECK(std::isinf(value));
          continue;
        }
        CHECK(of_values.within(size_of(wide(value - expected)), 1,
                               epsilon * size_of(expected) + tiny +
                                   4 * fine * ((10 + size) * size_of(expected) + sensitive)));
        const auto judge = [&](T slope, const wide& right) {
          if (size_of(right) < std::numeric_limits<T>::max())
            CHECK(of_slopes.within(
                size_of(wide(slope - right)), 1,
                epsilon * size_of(right) + tiny +
                    4 * fine * ((10 + size) * size_of(right) + s.floor + s.of_ratios * size)));
          else
            CHECK(std::isinf(slope));
        };
        judge(data.d_chosen[0], by_u.slope);
        judge(data.d_rejected[0], by_v.slope);
        if (s.name != "beta_dpo") { // whose β is constant in the gradient
          const wide scale = s.floor + s.of_ratios * size + expected * 1e-8;
          CHECK(differences_agree(
              [&](const wide& h) { return s.reference(dual(u + h), dual(v)).value; }, by_u.slope,
              scale));
          CHECK(differences_agree(
              [&](const wide& h) { return s.reference(dual(u), dual(v + h)).value; }, by_v.slope,
              scale));
        }
      }
    report_accuracy<T>(s.name.substr(0, s.name.find(':')), s.name, in_allowances, of_values,
                       of_slopes);
  }
}

TEMPLATE_TEST_CASE("preference pairs: without reference, against the formula", "[preference]",
                   float, double) {
  using T = TestType;
  const double epsilon = std::numeric_limits<T>::epsilon(), fine = 0x1p-52,
               tiny = std::numeric_limits<T>::min();
  const wide b = T(0.1);
  const auto log_odds = [](const dual& a) { return a - log1mexp(a); };
  const auto power = [](const dual& a) { // α = ¼
    const dual x = wide(-0.25) * a;
    return wide(-4) * expm1(x.value > 80 ? dual(80) : x);
  };
  // By sums a and b of 4 and 2 tokens.
  const std::vector<subject<T>> all{
      {"cpo", perdita::cpo<T>(),
       [=](const dual& x, const dual& y) { return sp(-(b * (x - y))) - wide(0.25) * x; }},
      {"cpo: hinge", perdita::cpo<T>({.type = perdita::cpo_type::hinge, .likelihood = 0}),
       [=](const dual& x, const dual& y) { return at_least_0(1 - b * (x - y)); }},
      {"cpo: ipo", perdita::cpo<T>({.type = perdita::cpo_type::ipo, .likelihood = 0}),
       [=](const dual& x, const dual& y) {
         const dual off = wide(0.25) * x - wide(0.5) * y - 1 / (2 * b);
         return off * off;
       },
       5, 1},
      {"simpo", perdita::simpo<T>(),
       [=](const dual& x, const dual& y) {
         return sp(-(2 * (wide(0.25) * x - wide(0.5) * y) - wide(0.5)));
       }},
      {"simpo: hinge", perdita::simpo<T>({.hinge = true, .likelihood = T(0.5)}),
       [=](const dual& x, const dual& y) {
         return at_least_0(1 - (2 * (wide(0.25) * x - wide(0.5) * y) - wide(0.5))) -
                wide(0.125) * x;
       },
       1},
      {"alphapo", perdita::alphapo<T>(),
       [=](const dual& x, const dual& y) {
         return sp(-(wide(2.5) * (power(wide(0.25) * x) - power(wide(0.5) * y)) - wide(0.25)));
       }},
      {"orpo", perdita::orpo<T>(),
       [=](const dual& x, const dual& y) {
         return b * sp(-(log_odds(wide(0.25) * x) - log_odds(wide(0.5) * y))) - wide(0.25) * x;
       }},
      {"slic", perdita::slic<T>(),
       [=](const dual& x, const dual& y) { return at_least_0(1 - (x - y)) - b * x; }},
      {"rrhf_pair", perdita::rrhf_pair<T>({.length_power = 2}), [=](const dual& x, const dual& y) {
         return at_least_0(-(x * wide(0.0625) - y * wide(0.25))) - x;
       }}};
  const double averages[] = {-1e-12, -1e-5, -0.01, -0.5, -1, -7, -50, -700, -1e4};
  for (const subject<T>& s : all) {
    error_judge of_values, of_slopes;
    for (const double u : averages)
      for (const double v : averages) {
        INFO(s.name << " " << u << " " << v);
        pair_data<T> data;
        data.add(4 * u, 2 * v, 0, 0, 4, 2);
        const T value = data.run(s.loss);
        const wide x = data.chosen[0], y = data.rejected[0];
        const dual by_x = s.reference(dual(x, 1), dual(y)), by_y = s.reference(dual(x), dual(y, 1));
        const double size = 4 * std::fabs(u) + 4 * std::fabs(v);
        CHECK(
            of_values.within(size_of(wide(value - by_x.value)), 1,
                             epsilon * size_of(by_x.value) + tiny +
                                 4 * fine *
                                     ((10 + size) * size_of(by_x.value) - x * size_of(by_x.slope) -
                                      y * size_of(by_y.slope) + s.floor + s.of_ratios * size)));
        const auto judge = [&](T slope, const wide& right) {
          CHECK(of_slopes.within(
              size_of(wide(slope - right)), 1,
              epsilon * size_of(right) + tiny +
                  4 * fine * ((10 + size) * size_of(right) + s.floor + s.of_ratios * size)));
        };
        judge(data.d_chosen[0], by_x.slope);
        judge(data.d_rejected[0], by_y.slope);
      }
    report_accuracy<T>(s.name.substr(0, s.name.find(':')), s.name, in_allowances, of_values,
                       of_slopes);
  }
}

TEST_CASE("tpo: the best response is said, the other two are set apart", "[preference]") {
  auto data = random_pairs(3, 8);
  std::vector<double> gold{-9, -4, -8}, d_gold(3, 7), w(3), l(3), weights{2, 0.5, 0};
  const std::vector<int> lengths{6, 2, 5};
  const auto with_gold = [&] {
    auto pairs = data.view();
    pairs.gold = gold;
    pairs.gold_lengths = lengths;
    return pairs;
  };
  const auto apart = [&](const perdita::preference_loss<double>& other, double said,
                         const perdita::tpo<double>& loss) {
    const perdita::call_options<double> call{.row_weights = weights, .scale = 3};
    const double mean = (2 * 6 + 0.5 * 2) / 2.5, nll = (2 * 9 + 0.5 * 4) / 2.5 / mean;
    const double margin = other(data.view(), w, l, call);
    CHECK_THAT(loss(with_gold(), data.d_chosen, data.d_rejected, d_gold, call),
               close(margin + said * nll, 1e-14));
    CHECK_THAT(loss(with_gold(), call), close(margin + said * nll, 1e-14));
    CHECK((data.d_chosen == w && data.d_rejected == l));
    for (std::size_t i = 0; i < 3; ++i)
      CHECK(std::fabs(d_gold[i] + 3 * said * weights[i] / 2.5 / mean) < 1e-15);
  };
  using perdita::cpo_type;
  for (const cpo_type type : {cpo_type::sigmoid, cpo_type::hinge, cpo_type::ipo})
    apart(perdita::cpo<double>({.beta = 0.01, .type = type, .likelihood = 0}), 0.5,
          perdita::tpo<double>({.type = type, .likelihood = 0.5}));
  apart(
      perdita::simpo<double>({.beta = 2, .gamma = 0.25, .label_smoothing = 0.125}), 1,
      perdita::tpo<double>({.beta = 2, .averages = true, .gamma = 0.25, .label_smoothing = 0.125}));
  // By its derivative, too
  weights[2] = 1;
  const perdita::tpo<double> loss;
  loss(with_gold(), data.d_chosen, data.d_rejected, d_gold, {.row_weights = weights});
  for (std::size_t i = 0; i < 3; ++i) {
    const auto moved = [&](double x) {
      const double kept = gold[i];
      gold[i] += x;
      const double value = loss(with_gold(), {.row_weights = weights});
      gold[i] = kept;
      return value;
    };
    CHECK(std::fabs((moved(0.5) - moved(-0.5)) - d_gold[i]) < 1e-14);
  }
  { // A NaN stays with its three; rewards are those of pairs.
    gold[1] = nan;
    std::vector<double> rewards(3);
    CHECK(std::isnan(loss(with_gold(), data.d_chosen, data.d_rejected, d_gold, {},
                          {.chosen_rewards = rewards})));
    CHECK((std::isnan(data.d_chosen[1]) && std::isnan(d_gold[1]) && std::isfinite(d_gold[0])));
    CHECK(rewards[0] == 0.01 * data.chosen[0]);
  }
  const auto before = d_gold;
  using Catch::Matchers::ContainsSubstring;
  CHECK_THROWS_WITH(loss(data.view(), data.d_chosen, data.d_rejected, d_gold),
                    ContainsSubstring("tpo: gold is 0, expected 3"));
  CHECK_THROWS_WITH(loss(with_gold(), data.d_chosen, data.d_rejected, data.d_chosen),
                    ContainsSubstring("same memory"));
  std::vector<double> small(2);
  CHECK_THROWS_WITH(loss(with_gold(), data.d_chosen, data.d_rejected, small),
                    ContainsSubstring("d_gold is 2"));
  CHECK((d_gold[0] == before[0] && d_gold[2] == before[2]));
  const perdita::tpo<double> pairs_alone({.likelihood = 0}); // needs no gold
  CHECK(pairs_alone(data.view()) ==
        perdita::cpo<double>({.beta = 0.01, .likelihood = 0})(data.view()));
  CHECK_THROWS_WITH(perdita::tpo<float>({.beta = 0}), ContainsSubstring("tpo: beta is 0"));
  CHECK_THROWS_WITH(perdita::tpo<float>({.type = cpo_type::hinge, .averages = true}),
                    ContainsSubstring("tpo: type"));
  CHECK_THROWS_WITH(perdita::tpo<float>({.share = static_cast<perdita::likelihood_share>(3)}),
                    ContainsSubstring("share is 3"));
  CHECK_THROWS_WITH(
      perdita::dpo<float>({.divergence = static_cast<perdita::preference_divergence>(4)}),
      ContainsSubstring("dpo: divergence is 4"));
}

TEST_CASE("preference pairs: golden values", "[preference]") {
  using perdita::dpo;
  const auto check = [](const char* what, const perdita::preference_loss<double>& loss,
                        double value, double by_chosen, double by_rejected, bool averages = false) {
    INFO(what);
    auto data = golden_pair<double>();
    if (averages) {
      data.chosen[0] /= 5;
      data.rejected[0] /= 8;
      data.chosen_lengths[0] = data.rejected_lengths[0] = 1;
    }
    CHECK_THAT(data.run(loss), close(value, 1e-12));
    CHECK_THAT(data.d_chosen[0], close(by_chosen, 1e-12));
    CHECK_THAT(data.d_rejected[0], close(by_rejected, 1e-12));
  };
  const auto of = [](dpo_type type, double e = 0.1) { return of_type<double>(type, e); };
  const auto with = [](divergence d) { return dpo<double>({.divergence = d}); };
  check("sigmoid", of(dpo_type::sigmoid), 0.6302581946816907, -0.04675456936127, 0.04675456936127);
  check("cDPO", of(dpo_type::cdpo), 0.6432581946816907, -0.03675456936127, 0.03675456936127);
  check("robust", of(dpo_type::robust), 0.6140081946816907, -0.05925456936127, 0.05925456936127);
  check("hinge", of(dpo_type::hinge), 0.87, -0.1, 0.1);
  check("ipo", of(dpo_type::ipo), 23.04, -1.92, 1.2);
  check("ipo_sum", of(dpo_type::ipo_sum), 13.69, -7.4, 7.4);
  check("exo", of(dpo_type::exo, 0.001), 2.539184819078183, -0.1687050860814, 0.1687050860814);
  check("nca", of(dpo_type::nca), 1.354662955678724, -0.02312539052737, 0.02400053299222);
  check("bco", of(dpo_type::bco), 1.322406615330876, -0.04875026035158, 0.04800106598444);
  check("sppo_hard", of(dpo_type::sppo), 37.89, -9.0, 8.4);
  check("apo_zero", of(dpo_type::apo_zero), 0.9675132633602079, -0.02498438150811,
        0.02496004262801);
  check("apo_down", of(dpo_type::apo_down), 0.9800430900968916, 8.970970841984e-5,
        0.02489467179969);
  check("discopop", of(dpo_type::discopop), 0.8609603559047449, -0.05307030106756,
        0.05307030106756);
  check("sigmoid_norm", of(dpo_type::sigmoid_norm), 0.6831971797266342, -0.0099000033332,
        0.00618750208325);
  check("forward_kl", with(divergence::forward_kl), 0.6154695877064145, -0.02787693296477,
        0.1022887372311);
  check("js", with(divergence::js), 0.6589031760887654, -0.01821941270071, 0.03329688921896);
  check("alpha", with(divergence::alpha), 0.6243846535847743, -0.03616821699046, 0.06928169635786);
  check("dpo_shift", perdita::dpo_shift<double>(), 0.6321303692009346, -0.04685416084437,
        0.04451145280215);
  check("cal_dpo", perdita::cal_dpo<double>({.beta = 0.1}), 19.18600845383299, -4.714165016957,
        4.414165016957);
  check("rdpo", perdita::rdpo<double>({.alpha = 0.2}), 0.955509211647004, -0.06153837563912,
        0.06153837563912);
  check("dpop", perdita::dpop<double>(), 0.6302581946816907, -0.04675456936127, 0.04675456936127);
  check("simpo", perdita::simpo<double>({.beta = 2.5, .gamma = 1.375}), 1.406150136248315,
        -1.887287467169, 1.887287467169, true);
  check("orpo", perdita::orpo<double>({.likelihood = 0}), 0.06399190985879387, -0.0519822113765,
        0.05149332071282, true);
  check("alphapo", perdita::alphapo<double>(), 0.5930805088941499, -2.037938285734, 2.089528939059,
        true);
  check("rrhf", perdita::rrhf_pair<double>({.likelihood = 0}), 0, 0, 0, true);
  check("cpo", perdita::cpo<double>({.likelihood = 0}), 0.3711006659477777,
        -0.1 * (1 - std::exp(-0.3711006659477777)), 0.1 * (1 - std::exp(-0.3711006659477777)));
  check("slic", perdita::slic<double>({.lambda = 0}), 0, 0, 0);
  // δ of bco, by hand: log(1 + e^0.2) + log(1 + e^−0.33)
  auto shifted = golden_pair<double>();
  shifted.baseline = 0.25;
  CHECK_THAT(shifted.run(of(dpo_type::bco)),
             close(std::log1p(std::exp(0.2)) + std::log1p(std::exp(-0.33)), 1e-14));
}

TEST_CASE("preference pairs: where the model is its reference", "[preference]") {
  pair_data<double> data;
  data.add(-12, -20, -12, -20, 5, 8);
  const auto value = [&](const perdita::preference_loss<double>& loss) { return data.run(loss); };
  const double ln2 = std::log(2.0), e = 0.01;
  CHECK_THAT(value(of_type<double>(dpo_type::sigmoid)), close(ln2, 1e-15));
  CHECK(value(of_type<double>(dpo_type::hinge)) == 1);
  CHECK_THAT(value(of_type<double>(dpo_type::ipo)), close(25, 1e-15));
  CHECK(value(of_type<double>(dpo_type::apo_zero)) == 1);
  CHECK(value(of_type<double>(dpo_type::apo_down)) == 1);
  CHECK_THAT(value(of_type<double>(dpo_type::bco)), close(2 * ln2, 1e-15));
  CHECK_THAT(value(of_type<double>(dpo_type::nca)), close(2 * ln2, 1e-15));
  CHECK_THAT(value(of_type<double>(dpo_type::sppo)), close(50, 1e-15));
  CHECK_THAT(value(of_type<double>(dpo_type::exo, e)),
             close(-ln2 - 0.5 * std::log(e * (1 - e)), 1e-14));
  CHECK_THAT(value(of_type<double>(dpo_type::discopop)), close(0.5 * (ln2 + 1), 1e-15));
  CHECK(value(of_type<double>(dpo_type::kto_pair)) == 0.5);
  std::vector<double> margins(1, 7), right(1, 7);
  data.run(of_type<double>(dpo_type::sigmoid), {}, {.margins = margins, .accuracies = right});
  CHECK((margins[0] == 0 && right[0] == 0));
}

TEST_CASE("preference pairs: identities", "[preference]") {
  using perdita::dpo;
  auto data = random_pairs(6, 3);
  const auto value = [&](const perdita::preference_loss<double>& loss) { return data.run(loss); };
  const auto swapped = [&](const perdita::preference_loss<double>& loss) {
    auto other = data;
    std::swap(other.chosen, other.rejected);
    std::swap(other.chosen_reference, other.rejected_reference);
    std::swap(other.chosen_lengths, other.rejected_lengths);
    return other.run(loss);
  };
  double mean_z = 0;
  for (std::size_t i = 0; i < 6; ++i)
    mean_z +=
        0.1 / 6 *
        (data.chosen[i] - data.chosen_reference[i] - data.rejected[i] + data.rejected_reference[i]);
  const auto plain = of_type<double>(dpo_type::sigmoid), robust = of_type<double>(dpo_type::robust);
  CHECK_THAT(value(plain) - swapped(plain), close(-mean_z, 1e-13));
  CHECK_THAT(0.875 * value(robust) + 0.125 * swapped(robust), close(value(plain), 1e-13));
  CHECK(value(of_type<double>(dpo_type::cdpo, 0)) == value(plain));
  CHECK_THAT(value(dpo<double>({.divergence = divergence::alpha, .divergence_alpha = 1})),
             close(value(plain), 1e-15));
  CHECK_THAT(value(dpo<double>({.divergence = divergence::alpha, .divergence_alpha = 0})),
             close(value(dpo<double>({.divergence = divergence::forward_kl})), 1e-15));
  // TRL before 0.29: (u^−a − 1)/−a of the ratio u
  for (const double old : {0.25, 0.75}) {
    const perdita::scores::divergence s{divergence::alpha, 1 - old};
    const double r = 0.625;
    CHECK_THAT(s({r}).value, close((std::pow(std::exp(r), -old) - 1) / -old, 1e-15));
  }
  // log (2t/(1 + t)), and what TRL makes of it
  CHECK_THAT(perdita::scores::divergence{divergence::js}({0.5}).value,
             close(std::log(2 * std::exp(0.5) / (1 + std::exp(0.5))), 1e-15));
  CHECK_THAT((perdita::scores::divergence{divergence::js, 0.5, false}({0.5}).value),
             close(-std::log1p(std::exp(-0.5)), 1e-15));
  CHECK_THAT((perdita::scores::divergence{divergence::forward_kl, 0.5, false}({0.5}).value),
             close(-std::exp(-0.5), 1e-15));
  CHECK_THAT(value(dpo<double>({.divergence = divergence::js, .centred = false})),
             close(value(dpo<double>({.divergence = divergence::js})), 1e-14));
  // apo_zero of one pair is aot's neighbour: of one pair aot is DPO
  auto one = golden_pair<double>();
  for (const dpo_type type : {dpo_type::aot, dpo_type::aot_unpaired}) {
    one.run(of_type<double>(type, 0.1));
    CHECK_THAT(one.d_chosen[0], close(-0.03675456936127, 1e-12));
    CHECK_THAT(one.d_rejected[0], close(0.03675456936127, 1e-12));
  }
  // A constant added to model and reference of one side
  for (const dpo_type type :
       {dpo_type::sigmoid, dpo_type::exo, dpo_type::nca, dpo_type::bco, dpo_type::sppo,
        dpo_type::aot_unpaired, dpo_type::apo_zero, dpo_type::apo_down, dpo_type::discopop}) {
    auto moved = data;
    for (std::size_t i = 0; i < 6; ++i) {
      moved.chosen[i] += 3;
      moved.chosen_reference[i] += 3;
      moved.rejected[i] -= 2;
      moved.rejected_reference[i] -= 2;
    }
    CHECK_THAT(moved.run(of_type<double>(type)), close(value(of_type<double>(type)), 1e-13));
    for (std::size_t i = 0; i < 6; ++i)
      CHECK_THAT(moved.d_chosen[i], close(data.d_chosen[i], 1e-12));
  }
  // Least where they should be
  const double optimum = std::log(0.875 / 0.125);
  for (const auto& [type, margin] :
       {std::pair{dpo_type::cdpo, optimum / 0.1}, std::pair{dpo_type::exo, optimum / 0.1},
        std::pair{dpo_type::ipo_sum, 5.0}}) {
    pair_data<double> at_optimum;
    at_optimum.add(margin, 0, 0, 0, 1, 1);
    const double least = at_optimum.run(of_type<double>(type));
    CHECK(std::fabs(at_optimum.d_chosen[0]) < 1e-15);
    if (type != dpo_type::cdpo)
      CHECK(std::fabs(least) < 1e-15);
  }
  pair_data<double> chosen_half;
  chosen_half.add(std::log(2.0) / 0.1, 0, 0, 0, 1, 1);
  chosen_half.run(of_type<double>(dpo_type::nca));
  CHECK(std::fabs(chosen_half.d_chosen[0]) < 1e-16);
  // SPPO's with certain wins is half of TRL's
  auto certain = data.view();
  certain.targets = {};
  CHECK_THAT(2 * perdita::sppo<double>({.beta = 0.1})(certain),
             close(value(of_type<double>(dpo_type::sppo)), 1e-14));
  CHECK_THAT(value(perdita::inpo<double>({.eta = 0.1, .tau = 0.1})),
             close(value(of_type<double>(dpo_type::ipo_sum)), 1e-13));
}

TEST_CASE("preference pairs: combinations are sums", "[preference]") {
  auto data = random_pairs(5, 8);
  const perdita::dpo<double> mixed(
      {.types = {{dpo_type::sigmoid, 0.8}, {dpo_type::bco, 0.2}, dpo_type::sft}});
  const double value = data.run(mixed);
  const auto slopes = data.d_chosen, other = data.d_rejected;
  const double a = data.run(of_type<double>(dpo_type::sigmoid));
  const auto of_a = data.d_chosen, other_a = data.d_rejected;
  const double b = data.run(of_type<double>(dpo_type::bco));
  double likelihood = 0, tokens = 0;
  for (std::size_t i = 0; i < 5; ++i) {
    likelihood -= data.chosen[i];
    tokens += data.chosen_lengths[i];
  }
  CHECK_THAT(value, close(0.8 * a + 0.2 * b + likelihood / tokens, 1e-14));
  for (std::size_t i = 0; i < 5; ++i) {
    CHECK_THAT(slopes[i], close(0.8 * of_a[i] + 0.2 * data.d_chosen[i] - 1 / tokens, 1e-14));
    CHECK_THAT(other[i], close(0.8 * other_a[i] + 0.2 * data.d_rejected[i], 1e-14));
  }
  // Weights of pairs are not the likelihood's
  const std::vector<double> weights{0.5, 0, 1, 0.25, 0.75};
  auto view = data.view();
  view.weights = weights;
  const perdita::dpo<double> with_sft({.types = {dpo_type::sigmoid, dpo_type::sft}});
  std::vector<double> values(5);
  of_type<double>(dpo_type::sigmoid)(data.view(), {.values = values});
  double expected = likelihood / tokens;
  for (std::size_t i = 0; i < 5; ++i)
    expected += weights[i] * values[i] / 5;
  CHECK_THAT(with_sft(view), close(expected, 1e-14));
  // One that nobody has published
  const perdita::preference_loss<double> own(
      "own", {perdita::margin_term(perdita::scores::average{}, perdita::links::lrml(0.05), 2.0),
              0.1 * perdita::likelihood_term(perdita::likelihood_share::tokens),
              perdita::pairwise_term(
                  [](const perdita::preference_pair& p) -> perdita::pair_outcome {
                    const double gap = p.chosen.length - p.rejected.length;
                    return {gap * p.chosen.log_probability, gap, 0};
                  },
                  perdita::needs_lengths)});
  data.run(own);
  const auto report = perdita::testing::check_gradient([&] { return own(data.view()); },
                                                       data.chosen, data.d_chosen);
  INFO(report.message());
  CHECK(report.ok);
}

TEST_CASE("preference pairs: the gradient is the derivative", "[preference]") {
  std::vector<std::pair<std::string, perdita::preference_loss<double>>> all;
  for (const subject<double>& s : ratio_losses<double>())
    if (s.name != "beta_dpo")
      all.emplace_back(s.name, s.loss);
  for (const dpo_type type : {dpo_type::aot, dpo_type::aot_unpaired, dpo_type::kto_pair})
    all.emplace_back("coupled", of_type<double>(type));
  for (const auto type : {perdita::density_ratio_type::lsif, perdita::density_ratio_type::ukl,
                          perdita::density_ratio_type::ddro})
    all.emplace_back("density_ratio", perdita::density_ratio<double>({.type = type}));
  all.emplace_back("bradley_terry", perdita::bradley_terry<double>({.centering = 0.01}));
  for (const auto share : {perdita::likelihood_share::batch_tokens,
                           perdita::likelihood_share::tokens, perdita::likelihood_share::sequence})
    all.emplace_back(
        "simpo", perdita::simpo<double>(
                     {.alpha = -0.1, .likelihood = 0.5, .label_smoothing = 0.1, .share = share}));
  for (auto& [name, loss] : all) {
    auto data = random_pairs(5, 17);
    if (name == "coupled") // both means above 0: old KTO's have a gradient
      for (std::size_t i = 0; i < 5; ++i) {
        data.chosen_reference[i] -= 4;
        data.rejected_reference[i] -= 3;
      }
    if (name == "density_ratio") // e^v on both sides of 2
      for (std::size_t i = 0; i < 5; ++i)
        data.rejected[i] = data.rejected_reference[i] + 0.5 * static_cast<double>(i) - 1.1;
    data.run(loss);
    const auto f = [&, &of = loss] { return of(data.view()); };
    for (const bool chosen : {true, false}) {
      auto& x = chosen ? data.chosen : data.rejected;
      const auto report =
          perdita::testing::check_gradient(f, x, chosen ? data.d_chosen : data.d_rejected);
      INFO(name << " " << report.message());
      CHECK(report.ok);
    }
  }
}

TEST_CASE("preference pairs: rewards, margins and degrees of preference", "[preference]") {
  const std::vector<double> w{1.5, -0.5}, l{0.25, 0.75}, margins{0.5, 1};
  std::vector<double> dw(2), dl(2), right(2);
  const auto logistic = [](double t) { return std::log1p(std::exp(-t)); };
  const perdita::bradley_terry<double> loss({.centering = 0.01});
  const double value =
      loss({.chosen = w, .rejected = l, .margins = margins}, dw, dl, {}, {.accuracies = right});
  CHECK_THAT(value,
             close((logistic(0.75) + 0.01 * 1.75 * 1.75 + logistic(-2.25) + 0.01 * 0.25 * 0.25) / 2,
                   1e-14));
  CHECK_THAT(dw[0], close((-1 / (1 + std::exp(0.75)) + 0.02 * 1.75) / 2, 1e-14));
  CHECK_THAT(dl[0], close((1 / (1 + std::exp(0.75)) + 0.02 * 1.75) / 2, 1e-14));
  CHECK((right == std::vector<double>{1, 0}));

  // SPPO: P = 0.75 and P′ = 0.4, β = ½
  const std::vector<double> zero{0}, u{1}, v{-0.5}, p{0.75}, other{0.4};
  const perdita::sppo<double> by_wins({.beta = 0.5});
  CHECK_THAT(by_wins({.chosen = u,
                      .rejected = v,
                      .chosen_reference = zero,
                      .rejected_reference = zero,
                      .targets = p,
                      .rejected_targets = other}),
             close(0.5 * (0.5 * 0.5 + 0.3 * 0.3), 1e-14));
  // DNO with a margin: t = 1.5 − 0.25
  const std::vector<double> quarter{0.25};
  CHECK_THAT(perdita::dno<double>({.eta = 1})({.chosen = u,
                                               .rejected = v,
                                               .chosen_reference = zero,
                                               .rejected_reference = zero,
                                               .margins = quarter,
                                               .targets = p}),
             close(0.75 * logistic(1.25) + 0.25 * logistic(-1.25), 1e-14));
}

TEST_CASE("preference pairs: sorted apart", "[preference]") {
  // U = 3, 1, 2 and R = 0, 5, 1: ranks 1-0, 2-1, 3-5
  pair_data<double> data;
  data.add(3, 0, 0, 0, 1, 1);
  data.add(1, 0, 5, 0, 1, 1);
  data.add(2, 0, 1, 0, 1, 1);
  const auto sp = [](double x) { return std::log1p(std::exp(x)); };
  CHECK_THAT(data.run(of_type<double>(dpo_type::aot, 0), {.values = data.values}),
             close((sp(-0.1) + sp(-0.1) + sp(0.2)) / 3, 1e-15));
  CHECK_THAT(data.values[0], close(sp(0.2), 1e-15));
  CHECK_THAT(data.d_chosen[0], close(-0.1 / 3 / (1 + std::exp(-0.2)), 1e-14));
  CHECK(data.d_rejected[0] == -data.d_chosen[0]);
  // u = 3, −4, 1 and v = 0, 0, −1: ranks −4 with −1, 1 with 0, 3 with 0
  data.rejected[2] = -1;
  CHECK_THAT(data.run(of_type<double>(dpo_type::aot_unpaired, 0)),
             close((sp(0.3) + sp(-0.1) + sp(-0.3)) / 3, 1e-15));
  CHECK_THAT(data.d_chosen[1], close(-0.1 / 3 / (1 + std::exp(-0.3)), 1e-14));
  CHECK(data.d_rejected[2] == -data.d_chosen[1]);
  CHECK(data.d_rejected[0] == -data.d_chosen[2]); // equal ones as they come
  // What is removed or NaN is not sorted
  auto more = data;
  more.add(nan, 0, 0, 0, 1, 1);
  more.add(100, 7, 0, 0, 1, 1);
  const std::vector<double> present{1, 1, 1, 1, 0};
  CHECK(std::isnan(more.run(of_type<double>(dpo_type::aot_unpaired, 0),
                            {.row_weights = present, .values = more.values})));
  CHECK_THAT(more.values[1], close(sp(0.3), 1e-15));
  CHECK((std::isnan(more.values[3]) && std::isnan(more.d_rejected[3])));
  CHECK((more.values[4] == 0 && more.d_chosen[4] == 0));
  for (std::size_t i = 0; i < 3; ++i)
    CHECK_THAT(more.d_chosen[i] * 4, close(data.d_chosen[i] * 3, 1e-15));
  // Nor is what has no difference, of which each part is a limit.
  pair_data<double> apart, with;
  for (const double u : {3.0, -inf, 1.0, 2.0}) {
    const double r = u == 1 ? 5 : u == 2 ? 1 : 0;
    with.add(u, std::isinf(u) ? u : 0, r, 0, 1, 1);
    if (std::isfinite(u))
      apart.add(u, 0, r, 0, 1, 1);
  }
  const auto aot = of_type<double>(dpo_type::aot, 0);
  apart.run(aot, {.values = apart.values});
  CHECK(std::isnan(with.run(aot, {.values = with.values})));
  CHECK((std::isnan(with.values[1]) && std::isnan(with.d_chosen[1])));
  for (const std::size_t i : {0U, 1U, 2U})
    CHECK(with.values[i == 0 ? 0 : i + 1] == apart.values[i]);
}

TEST_CASE("preference pairs: calls", "[preference]") {
  auto data = random_pairs(4, 5);
  const auto loss = of_type<double>(dpo_type::nca);
  std::vector<double> values(4);
  data.run(loss, {.values = values});
  const auto slopes = data.d_chosen, other = data.d_rejected;
  const std::vector<double> weights{2, 0, 1, 0.5}, upstream{1, 1, -2, 3};
  data.chosen[1] = nan; // of no weight
  const auto kept = data.d_rejected;
  const double value = data.run(loss, {.row_weights = weights,
                                       .upstream = upstream,
                                       .scale = 3,
                                       .accumulate = true,
                                       .values = data.values});
  double expected = 0;
  for (std::size_t i = 0; i < 4; ++i) {
    expected += i == 1 ? 0 : weights[i] * values[i] / 3.5;
    CHECK_THAT(data.values[i], close(i == 1 ? 0 : weights[i] * values[i], 1e-15));
    const double factor = i == 1 ? 0 : 3 * weights[i] * upstream[i] * 4 / 3.5;
    CHECK_THAT(data.d_chosen[i], close(slopes[i] + factor * slopes[i], 1e-14));
    CHECK_THAT(data.d_rejected[i], close(kept[i] + factor * other[i], 1e-14));
  }
  CHECK_THAT(value, close(expected, 1e-15));
  CHECK_THAT(loss(data.view(), {.row_weights = weights, .normaliser = 7}),
             close(expected / 2, 1e-15));
  const std::vector<double> zeros(4);
  CHECK(data.run(loss, {.row_weights = zeros}) == 0);
  CHECK(data.d_chosen == zeros);
  // sum, and no pairs
  const perdita::dpo<double> sum({.types = {dpo_type::nca}, .reduction = perdita::reduction::sum});
  CHECK_THAT(sum(data.view(), {.row_weights = weights}), close(expected * 3.5, 1e-15));
  const std::vector<double> none;
  std::vector<double> to;
  CHECK(
      sum({.chosen = none, .rejected = none, .chosen_reference = none, .rejected_reference = none},
          to, to) == 0);
  CHECK(loss({}) == 0);
  // Gradients in the place of the inputs, one pair beside the other
  auto apart = random_pairs(3, 6);
  std::vector<double> both;
  for (std::size_t i = 0; i < 3; ++i) {
    both.push_back(apart.chosen[i]);
    both.push_back(apart.rejected[i]);
  }
  apart.run(loss);
  auto view = apart.view();
  const perdita::vector_view<double> w(both.data(), 3, 2), l(both.data() + 1, 3, 2);
  view.chosen = w;
  view.rejected = l;
  loss(view, w, l);
  for (std::size_t i = 0; i < 3; ++i)
    CHECK((both[2 * i] == apart.d_chosen[i] && both[2 * i + 1] == apart.d_rejected[i]));
}

TEST_CASE("preference pairs: outputs in one another's memory", "[preference]") {
  using Catch::Matchers::ContainsSubstring;
  auto data = random_pairs(2, 6);
  const perdita::dpo<double> loss;
  std::vector<double> to(4, 7), g(2, 7);
  const auto untouched = to;
  const perdita::vector_view<double> first(to.data(), 2), second(to.data() + 1, 2);
  const auto refused = ContainsSubstring("same memory");
  CHECK_THROWS_WITH(loss(data.view(), first, second), refused);
  CHECK_THROWS_WITH(loss(data.view(), first, g, {.values = first}), refused);
  CHECK_THROWS_WITH(loss(data.view(), first, g, {}, {.chosen_rewards = second}), refused);
  CHECK_THROWS_WITH(loss(data.view(), {.values = g}, {.margins = g}), refused);
  CHECK_THROWS_WITH(loss.with_gold(data.view(), first, g, second), refused);
  // of different strides; of the same, but not between the elements
  const perdita::vector_view<double> apart(to.data(), 2, 2), backwards(to.data() + 3, 2, -2);
  CHECK_THROWS_WITH(loss(data.view(), apart, second), refused);
  CHECK_THROWS_WITH(loss(data.view(), apart, {to.data() + 2, 2, 2}), refused);
  CHECK_THROWS_WITH(loss(data.view(), apart, backwards), refused);
  const auto chosen = data.chosen;
  CHECK_THROWS_WITH(loss(data.view(), data.chosen, g, {.accumulate = true}),
                    ContainsSubstring("accumulate"));
  CHECK_THROWS_WITH(loss(data.view(), g, {data.chosen.data() + 1, 2}, {.accumulate = true}),
                    ContainsSubstring("accumulate"));
  CHECK((to == untouched && g == std::vector<double>(2, 7) && data.chosen == chosen));
  // What lies between is apart.
  const double value = loss(data.view(), data.d_chosen, data.d_rejected);
  CHECK(loss(data.view(), apart, {to.data() + 1, 2, 2}) == value);
  CHECK(to == std::vector<double>{data.d_chosen[0], data.d_rejected[0], data.d_chosen[1],
                                  data.d_rejected[1]});
}

TEST_CASE("preference pairs: by-products", "[preference]") {
  auto data = golden_pair<double>();
  data.add(-1, -2, -1.5, -4, 2, 2);
  data.add(-1, -2, nan, -4, 2, 2);
  std::vector<double> chosen(3, 7), rejected(3, 7), margins(3, 7), right(3, 7), u(3, 7), v(3, 7),
      arguments(3, 7);
  const std::vector<double> present{1, 1, 0};
  const perdita::preference_report<double> report{chosen, rejected, margins,  right,
                                                  u,      v,        arguments};
  data.run(of_type<double>(dpo_type::sigmoid), {.row_weights = present}, report);
  CHECK_THAT(chosen[0], close(0.05, 1e-14));
  CHECK_THAT(rejected[0], close(-0.08, 1e-13));
  CHECK_THAT(margins[0], close(0.13, 1e-13));
  CHECK_THAT(arguments[0], close(0.13, 1e-13));
  CHECK((u[0] == 0.5 && u[1] == 0.5 && v[1] == 2 && right[0] == 1 && right[1] == 0));
  CHECK((chosen[2] == 0 && margins[2] == 0 && arguments[2] == 0 && v[2] == 0));
  data.run(perdita::orpo<double>(), {.row_weights = present}, report);
  CHECK_THAT(chosen[0], close(-0.24, 1e-14));
  const auto odds = [](double a) { return a - std::log1p(-std::exp(a)); };
  CHECK_THAT(arguments[0], close(odds(-2.4) - odds(-2.5), 1e-13));
  const perdita::dpo<double> f({.divergence = divergence::forward_kl, .scored_rewards = true});
  data.run(f, {.row_weights = present}, report);
  CHECK_THAT(chosen[0], close(0.1 * (1 - std::exp(-0.5)), 1e-14));
  data.run(of_type<double>(dpo_type::bco), {.row_weights = present}, report);
  CHECK((arguments[0] == 0 && chosen[0] == 0.1 * 0.5));
}

namespace {

using three = std::vector<double>;
/// Value and slopes of one pair without a reference, of one token each.
three run(const perdita::preference_loss<double>& loss, double w, double l) {
  pair_data<double> data;
  data.add(w, l, 0, 0, 1, 1);
  const double value = data.run(loss);
  return {value, data.d_chosen[0], data.d_rejected[0]};
}

} // namespace

TEST_CASE("preference pairs: limits", "[preference]") {
  const perdita::dpo<double> plain({.beta = 1}),
      exo({.beta = 1, .types = {dpo_type::exo}, .label_smoothing = 1e-3});
  CHECK(run(plain, 1000, 0) == three{0, 0, 0});
  CHECK(run(plain, -1000, 0) == three{1000, -1, 1});
  CHECK(run(plain, inf, 0) == three{0, 0, 0});
  CHECK(run(plain, -inf, 0) == three{inf, -1, 1});
  // Without a penalty dpop is dpo.
  CHECK(run(perdita::dpop<double>({.beta = 1, .lambda = 0}), -inf, 0) == three{inf, -1, 1});
  CHECK_THAT(run(exo, -1000, 0)[0], close(-std::log(1e-3), 1e-15));
  CHECK_THAT(run(exo, -inf, 0)[0], close(-std::log(1e-3), 1e-15));
  CHECK(run(exo, -inf, 0)[1] == 0);
  const perdita::dpo<double> disco({.beta = 1, .types = {dpo_type::discopop}});
  CHECK(run(disco, -1000, 0) == three{1000, -1, 1});
  CHECK(run(disco, -inf, 0) == three{inf, -1, 1});
  CHECK(run(disco, inf, 0) == three{0, 0, 0});
  const perdita::dpo<double> warm({.beta = 1, .types = {dpo_type::discopop}, .tau = 2});
  CHECK(run(warm, -2000, 0) == three{inf, -inf, inf}); // e^1000
  // Beyond the cap of the score's exponent its slope is 0, whatever the link's.
  CHECK(run(perdita::dpo<double>({.beta = 1,
                                  .types = {dpo_type::discopop},
                                  .tau = 2,
                                  .divergence = divergence::alpha}),
            -1000, 0) == three{inf, 0, inf});
  for (const double a : {-1e-12, -800.0})
    for (const double b : {-1e-12, -800.0})
      for (const double x : run(perdita::orpo<double>(), a, b))
        CHECK(std::isfinite(x));
  for (const double a : {0.0, 1e-9}) { // certain: no odds
    CHECK_THAT(run(perdita::orpo<double>({.lambda = 1, .likelihood = 0}), -1, a)[0],
               close(std::log(1e15) + 1 + std::log1p(-std::exp(-1)), 1e-12));
    CHECK(run(perdita::orpo<double>(), -1, a)[2] == 0);
  }
  // Kinks: the branch of 0
  CHECK(run(perdita::slic<double>({.lambda = 0}), 1, 0) == three{0, 0, 0});
  CHECK(run(perdita::rrhf_pair<double>({.likelihood = 0}), -3, -3) == three{0, 0, 0});
  // LSIF, and beyond the pole of DDRO
  const perdita::density_ratio<double> ddro;
  CHECK(std::isfinite(run(ddro, 0, 300)[0]));
  CHECK(run(ddro, 0, inf)[0] == inf);
  const perdita::density_ratio<double> lsif({.type = perdita::density_ratio_type::lsif});
  CHECK(run(lsif, 0, 0) == three{-0.5, -1, 1});
  // ½ e^2v − e^u is what the larger one says, where both are beyond the largest number.
  CHECK(run(lsif, 800, 500) == three{inf, -inf, inf});
  CHECK(run(lsif, 1200, 500) == three{-inf, -inf, inf});
  CHECK_THAT(run(lsif, 0, 355.1)[0], close(std::exp(2 * 355.1 - std::log(2)), 1e-12));
  const double near = 2 * 360.0 - std::log(2); // where it is 0
  CHECK_THAT(run(lsif, near + 0x1p-30, 360)[0], close(-std::exp(near - 30 * std::log(2)), 1e-6));
  CHECK(run(lsif, -inf, -inf) == three{0, 0, 0});
  CHECK((run(lsif, inf, 0)[0] == -inf && run(lsif, 0, inf)[0] == inf));
  CHECK(std::isnan(run(lsif, inf, inf)[0]));
  // NaN in one pair
  for (const dpo_type type : {dpo_type::sigmoid, dpo_type::hinge, dpo_type::ipo, dpo_type::exo,
                              dpo_type::nca, dpo_type::bco, dpo_type::apo_down, dpo_type::discopop,
                              dpo_type::aot, dpo_type::aot_unpaired, dpo_type::kto_pair})
    for (const bool chosen : {true, false}) {
      auto data = random_pairs(3, 4);
      (chosen ? data.chosen : data.rejected)[1] = nan;
      CHECK(std::isnan(data.run(of_type<double>(type), {.values = data.values})));
      CHECK((std::isnan(data.values[1]) && std::isnan(data.d_chosen[1]) &&
             std::isnan(data.d_rejected[1])));
      for (const std::size_t i : {0U, 2U})
        CHECK((std::isfinite(data.values[i]) && std::isfinite(data.d_chosen[i]) &&
               std::isfinite(data.d_rejected[i])));
    }
  auto data = random_pairs(3, 4);
  data.chosen[1] = nan;
  data.run(perdita::beta_dpo<double>(), {.values = data.values});
  CHECK((std::isnan(data.values[1]) && std::isfinite(data.values[0])));
  // Infinities of both signs have no mean.
  data = random_pairs(3, 4);
  data.chosen[0] = inf;
  data.chosen[1] = -inf;
  data.run(perdita::beta_dpo<double>(), {.values = data.values});
  CHECK(std::isnan(data.values[2]));
  data.run(of_type<double>(dpo_type::kto_pair), {.values = data.values});
  CHECK(std::isnan(data.values[2]));
}

TEST_CASE("preference pairs: an upstream of 0 takes out an infinite slope, not NaN",
          "[preference]") {
  const perdita::dpo<double> steep({.beta = 1, .types = {dpo_type::discopop}, .tau = 2});
  auto data = random_pairs(3, 4);
  data.chosen[0] = -5000; // slope −e^{2480}
  data.chosen[1] = nan;
  const std::vector<double> upstream{0, 0, 1};
  data.run(steep, {.upstream = upstream, .values = data.values});
  CHECK((data.values[0] == inf && data.d_chosen[0] == 0 && data.d_rejected[0] == 0));
  CHECK((std::isnan(data.d_chosen[1]) && std::isnan(data.d_rejected[1])));
  CHECK((data.d_chosen[2] != 0 && std::isfinite(data.d_chosen[2])));
}

TEST_CASE("xpo: what the reference says is impossible", "[preference]") {
  const std::vector<double> w{-2}, never{-inf}, q{-1}, p{0.75}, certain{1};
  std::vector<double> dw(1), dl(1);
  const auto run = [&](const perdita::xpo<double>::options& o, const std::vector<double>& target) {
    return perdita::xpo<double>(o)({.chosen = w,
                                    .rejected = never,
                                    .chosen_reference = q,
                                    .rejected_reference = q,
                                    .targets = target},
                                   dw, dl);
  };
  CHECK(run({.beta = 0.5, .alpha = 0.0625}, p) == inf); // (1 − p) β = 1/8 is steeper
  CHECK((dw[0] == 0.125 && dl[0] == -0.0625));
  CHECK(run({.beta = 0.5, .alpha = 0.25}, p) == -inf);
  CHECK((dw[0] == 0.125 && dl[0] == 0.125));
  CHECK(run({.beta = 0.5, .alpha = 0}, p) == inf);
  CHECK(run({.beta = 0.5, .alpha = 0.25}, certain) == -inf);
  CHECK((dw[0] == 0 && dl[0] == 0.25));
  CHECK(run({.beta = 0.5, .alpha = 0}, certain) == 0);
  CHECK(run({.beta = 0.5, .alpha = 0.25, .ipo = true}, p) == inf); // a square outgrows a line
  CHECK((dw[0] == inf && dl[0] == -inf));
}

TEST_CASE("preference pairs: a batch's beta where margins are infinite", "[preference]") {
  pair_data<double> data, sigmoid;
  for (auto* const d : {&data, &sigmoid}) {
    d->add(-inf, -1, -1, -1, 1, 1);
    d->add(-1, -2, -1, -1, 1, 1);
  }
  CHECK(data.run(perdita::beta_dpo<double>({.a = 0}), {.values = data.values}) == inf);
  sigmoid.run(of_type<double>(dpo_type::sigmoid), {.values = sigmoid.values});
  CHECK(data.values == sigmoid.values); // a = 0: the batch is of no effect
  CHECK(data.d_chosen == sigmoid.d_chosen);
  CHECK(data.d_rejected == sigmoid.d_rejected);

  std::swap(data.chosen[0], data.rejected[0]); // β is infinite, and all pairs are right
  CHECK(data.run(perdita::beta_dpo<double>()) == 0);
  CHECK(data.d_chosen == std::vector<double>{0, 0});
  CHECK(data.d_rejected == std::vector<double>{0, 0});
}

TEST_CASE("preference pairs: what is added to a response under every model cancels",
          "[preference]") {
  pair_data<double> data, high;
  const double much = 0x1p40;
  for (int i = 0; i < 5; ++i) {
    const double w = -i, l = -3 + 0.5 * i;
    data.add(w, l, w - 0.25, l + 0.5, 1, 1);
    high.add(w - much, l + much, w - 0.25 - much, l + 0.5 + much, 1, 1);
  }
  const auto compare = [&](const perdita::preference_loss<double>& loss) {
    CHECK(data.run(loss) == high.run(loss));
    CHECK(data.d_chosen == high.d_chosen);
    CHECK(data.d_rejected == high.d_rejected);
  };
  compare(perdita::dpo<double>());
  compare(perdita::inpo<double>({.eta = 0.3, .tau = 0.1}));
}

TEST_CASE("preference pairs: nothing is said in a completion without tokens", "[preference]") {
  pair_data<double> data;
  data.add(0, 0, 0, 0, 0, 0); // both empty
  CHECK(data.run(perdita::dpo<double>()) == std::log(2));
  CHECK((data.d_chosen[0] == -0.05 && data.d_rejected[0] == 0.05)); // of scores without tokens
  CHECK(data.run(of_type<double>(dpo_type::sft)) == 0);
  CHECK(data.d_chosen[0] == 0);
  const std::vector<double> removed{0};
  for (const double x : {data.run(perdita::simpo<double>(), {.row_weights = removed}),
                         data.run(perdita::orpo<double>(), {.row_weights = removed}),
                         data.run(of_type<double>(dpo_type::ipo), {.row_weights = removed}),
                         data.d_chosen[0], data.d_rejected[0]})
    CHECK(x == 0);
}

TEST_CASE("preference pairs: bad input", "[preference]") {
  using perdita::dpo;
  const auto refuses = [](const std::function<void()>& f, const char* what) {
    INFO(what);
    try {
      f();
      FAIL("accepted");
    } catch (const std::invalid_argument& e) {
      CHECK(std::string(e.what()).find(what) != std::string::npos);
    }
  };
  const perdita::alphapo<double> hinge({.hinge = true}); // the others are as without any
  CHECK((hinge.settings().alpha == 0.25 && hinge.settings().beta == 2.5 && hinge.settings().hinge));
  for (const double beta : {0.0, -0.1, nan, inf}) {
    refuses([&] { dpo<double>({.beta = beta}); }, "dpo: beta");
    refuses([&] { perdita::simpo<double>({.beta = beta}); }, "simpo: beta");
    refuses([&] { perdita::alphapo<double>({.beta = beta}); }, "alphapo: beta");
    refuses([&] { perdita::cpo<double>({.beta = beta}); }, "cpo: beta");
    refuses([&] { perdita::rdpo<double>({.beta = beta}); }, "rdpo: beta");
    refuses([&] { perdita::dpop<double>({.beta = beta}); }, "dpop: beta");
    refuses([&] { perdita::dpo_shift<double>({.beta = beta}); }, "dpo_shift: beta");
    refuses([&] { perdita::cal_dpo<double>({.beta = beta}); }, "cal_dpo: beta");
    refuses([&] { perdita::sppo<double>({.beta = beta}); }, "sppo: beta");
    refuses([&] { perdita::beta_dpo<double>({.beta = beta}); }, "beta_dpo: beta");
    refuses([&] { perdita::diffusion_dpo<double>({.beta = beta}); }, "diffusion_dpo: beta");
    refuses([&] { perdita::dno<double>({.eta = beta}); }, "dno: eta");
    refuses([&] { perdita::xpo<double>({.beta = beta}); }, "xpo: beta");
    refuses([&] { perdita::tpo<double>({.beta = beta}); }, "tpo: beta");
    refuses([&] { perdita::inpo<double>({.eta = beta}); }, "inpo: eta");
    refuses([&] { perdita::orpo<double>({.lambda = beta}); }, "orpo: lambda");
  }
  refuses([] { dpo<double>({.types = {}}); }, "number of terms");
  refuses([] { of_type<double>(dpo_type::robust, 0.5); }, "label_smoothing");
  refuses([] { of_type<double>(dpo_type::exo, 0); }, "label_smoothing");
  refuses([] { of_type<double>(dpo_type::cdpo, -0.1); }, "label_smoothing");
  refuses([] { of_type<double>(static_cast<dpo_type>(99)); }, "type");
  refuses([] { dpo<double>({.types = {{dpo_type::hinge, nan}}}); }, "weight of a term");
  refuses([] { dpo<double>({.types = {dpo_type::discopop}, .tau = 0}); }, "tau");
  refuses([] { perdita::dpo_shift<double>({.factor = 0}); }, "factor");
  refuses([] { perdita::inpo<double>({.eta = 1, .tau = 2}); }, "tau");
  refuses([] { perdita::cpo<double>({.likelihood = -1}); }, "likelihood");
  refuses([] { perdita::links::hinge{nan}; }, "links::hinge");

  auto data = random_pairs(3, 2);
  const dpo<double> plain, ipo({.types = {dpo_type::ipo}});
  const std::vector<double> two{-1, -2};
  const auto call = [&](const dpo<double>& loss, auto change) {
    return [&, change] {
      auto view = data.view();
      change(view);
      loss(view, data.d_chosen, data.d_rejected);
    };
  };
  using pairs = perdita::preference_pairs<double>;
  refuses(call(plain, [&](pairs& p) { p.rejected = two; }), "rejected is 2, expected 3");
  refuses(call(plain, [&](pairs& p) { p.chosen_reference = {}; }), "chosen_reference is 0");
  refuses(call(plain, [&](pairs& p) { p.rejected_reference = {}; }), "rejected_reference is 0");
  refuses(call(plain, [&](pairs& p) { p.margins = two; }), "margins");
  refuses(call(ipo, [&](pairs& p) { p.chosen_lengths = {}; }), "chosen_lengths");
  const std::vector<int> empty{3, 0, 2}, wrong{3, -1, 2};
  refuses(call(ipo, [&](pairs& p) { p.rejected_lengths = empty; }), "rejected_lengths[1] is 0");
  refuses(call(plain, [&](pairs& p) { p.rejected_lengths = wrong; }), "rejected_lengths[1] is -1");
  call(plain, [&](pairs& p) { p.rejected_lengths = empty; })();
  const std::vector<double> impossible{-1, -inf, -2}, weights{1, -1, 1}, targets{0, 1, 1.5};
  refuses(call(plain, [&](pairs& p) { p.chosen_reference = impossible; }), "chosen_reference[1]");
  refuses(call(plain, [&](pairs& p) { p.weights = weights; }), "weights[1]");
  refuses(call(plain, [&](pairs& p) { p.targets = targets; }), "targets[2]");
  refuses(call(plain, [&](pairs& p) { p.baseline = nan; }), "baseline");
  refuses(
      [&] {
        perdita::dno<double>()(
            {.chosen = two, .rejected = two, .chosen_reference = two, .rejected_reference = two});
      },
      "targets");
  refuses(
      [&] {
        perdita::inpo<double>()(
            {.chosen = two, .rejected = two, .chosen_reference = two, .rejected_reference = two});
      },
      "chosen_previous");
  refuses([&] { plain(data.view(), data.d_chosen, data.d_chosen); }, "same memory");
  std::vector<double> small(2);
  refuses([&] { plain(data.view(), small, data.d_rejected); }, "d_chosen");
  refuses([&] { plain(data.view(), {}, {.margins = small}); }, "report's margins");
  const std::vector<double> half{1, 0.5, 1};
  const auto aot = of_type<double>(dpo_type::aot);
  refuses([&] { data.run(aot, {.row_weights = half}); }, "row_weights[1]");
  refuses([&] { data.run(aot, {.upstream = half}); }, "upstream");
  refuses([&] { data.run(plain, {.entropy = data.values}); }, "by-product");
  CHECK(data.values == std::vector<double>{7, 7, 7}); // untouched
}

TEST_CASE("preference pairs: statistics over batches", "[preference]") {
  perdita::running_mean mean;
  CHECK(mean.update(std::vector<double>{1, 3}) == 2);
  CHECK(mean.update(std::vector<double>{8}) == 4);
  CHECK(mean.update(std::vector<double>{}) == 4);
  CHECK(mean.update(std::vector<double>{-inf, nan, 4}) == 4); // finite numbers alone
  CHECK(mean.update(std::vector<double>{9}) == 5);

  pair_data<double> data; // d = 4, 1, −2, 9
  for (const double d : {4.0, 1.0, -2.0, 9.0})
    data.add(d - 3, -1, -3, -1, 1, 1);
  perdita::margin_statistics statistics;
  statistics.update(data.view());
  CHECK(statistics.mean() == 3);
  CHECK_THAT(statistics.deviation(), close(std::sqrt(66.0 / 3), 1e-15));
  CHECK_THAT(statistics.densities(data.view())[2], close(std::exp(-0.5 * 25 / 22), 1e-14));
  CHECK(statistics.keep(data.view(), 0.5) == std::vector<double>{1, 1, 0, 0});
  CHECK(statistics.keep(data.view(), 0.6) == std::vector<double>{1, 1, 1, 0});
  data.chosen[0] += 40;
  statistics.update(data.view());
  CHECK_THAT(statistics.mean(), close(0.9 * 3 + 0.1 * 13, 1e-15));
  // Margins that are not finite have no part.
  pair_data<double> some;
  for (const double w : {4.0, -inf, 2.0, nan})
    some.add(w, 0, 0, 0, 1, 1);
  perdita::margin_statistics finite;
  finite.update(some.view());
  CHECK(finite.mean() == 3);
  CHECK_THAT(finite.deviation(), close(std::sqrt(2.0), 1e-15));
  some.chosen = {inf, -inf, nan, nan};
  finite.update(some.view());
  CHECK(finite.mean() == 3);
  // β of the batch: 0.1 (1 + 0.6 (13 − 5))
  data.baseline = 5;
  std::vector<double> arguments(4);
  data.run(perdita::beta_dpo<double>(), {}, {.arguments = arguments});
  CHECK_THAT(arguments[1], close(0.1 * (1 + 0.6 * 8), 1e-15));
}

TEST_CASE("preference pairs: entanglement", "[preference]") {
  using perdita::entanglement;
  // DPO: equal slopes c. ‖g‖² = 4, ‖g′‖² = 9
  CHECK(perdita::entangle(-1, 1, 4, 9, 3).kind == entanglement::ideal);
  CHECK(perdita::entangle(-1, 1, 4, 9, 5).kind == entanglement::both_fall);
  CHECK(perdita::entangle(-1, 1, 9, 4, 5).kind == entanglement::both_rise);
  CHECK(perdita::entangle(-0.5, 1, 4, 9, 3).kind == entanglement::both_fall);
  CHECK(perdita::entangle(1, -1, 4, 9, 3).kind == entanglement::reversed);
  const auto step = perdita::entangle(-2, 3, 4, 9, 5);
  CHECK((step.chosen == 2 * 4 - 3 * 5 && step.rejected == 2 * 5 - 3 * 9));

  // A head of 3 classes and 2 features: log π of a sequence by W, its gradient written out.
  random_numbers random(5);
  const index classes = 3, features = 2;
  std::vector<double> weights(6), h1(4), h2(6), p1, p2;
  for (auto* v : {&weights, &h1, &h2})
    for (double& x : *v)
      x = random.normal();
  const std::vector<int> y1{0, 2}, y2{1, 1, 2};
  const auto gradient = [&](const std::vector<double>& h, const std::vector<int>& y,
                            std::vector<double>& p) {
    std::vector<double> g(6);
    for (std::size_t t = 0; t < y.size(); ++t) {
      double z[3], sum = 0;
      for (std::size_t k = 0; k < 3; ++k) {
        z[k] = std::exp(weights[2 * k] * h[2 * t] + weights[2 * k + 1] * h[2 * t + 1]);
        sum += z[k];
      }
      for (std::size_t k = 0; k < 3; ++k) {
        p.push_back(z[k] / sum);
        const double residual = (static_cast<int>(k) == y[t] ? 1 : 0) - z[k] / sum;
        for (std::size_t f = 0; f < 2; ++f)
          g[2 * k + f] += residual * h[2 * t + f];
      }
    }
    return g;
  };
  const auto g1 = gradient(h1, y1, p1), g2 = gradient(h2, y2, p2);
  double product = 0, norm1 = 0, norm2 = 0;
  for (std::size_t i = 0; i < 6; ++i) {
    product += g1[i] * g2[i];
    norm1 += g1[i] * g1[i];
    norm2 += g2[i] * g2[i];
  }
  const auto matrix = [](const std::vector<double>& v, index cols) {
    return perdita::matrix_view<const double>(v.data(), static_cast<index>(v.size()) / cols, cols);
  };
  const perdita::head_sequence<double> a(matrix(h1, features), matrix(p1, classes), y1),
      b(matrix(h2, features), matrix(p2, classes), y2);
  CHECK_THAT(perdita::head_gradient_product(a, b), close(product, 1e-13));
  CHECK_THAT(perdita::head_gradient_product(a, a), close(norm1, 1e-13));
  const std::vector<int> outside{0, 3};
  CHECK_THROWS_AS(
      (perdita::head_sequence<double>(matrix(h1, features), matrix(p1, classes), outside)),
      std::invalid_argument);
  // Normalised, log π of the chosen cannot fall, nor that of the rejected rise.
  for (const double across : {product, 0.99 * std::sqrt(norm1 * norm2)}) {
    std::vector<double> w{-0.3}, l{0.3};
    const std::vector<double> nw{std::sqrt(norm1)}, nl{std::sqrt(norm2)};
    perdita::normalise_pairs<double>(w, l, nw, nl);
    CHECK_THAT(w[0], close(-0.3 / nw[0], 1e-15));
    CHECK(perdita::entangle(w[0], l[0], norm1, norm2, across).kind == entanglement::ideal);
  }
  // A mask of tokens
  std::vector<double> l{-1, -2, -0.5}, q{-1.5, -1, -0.25}, m{0.5, 0, -1}, dl(3), dm(3);
  using view = perdita::vector_view<const double>;
  const auto masked = [&] {
    const perdita::masked_log_ratio s(view(l), view(q), view(m), 0.25);
    return std::log1p(std::exp(-s.sum)) + 2 * s.penalty;
  };
  const perdita::masked_log_ratio s(view(l), view(q), view(m), 0.25);
  CHECK((s.sum == 0.25 + 0.25 && s.penalty == 0.375));
  perdita::masked_log_ratio::gradients<double>(view(l), view(q), view(m), 0.25,
                                               -1 / (1 + std::exp(s.sum)), 2, dl, dm);
  CHECK(perdita::testing::check_gradient(masked, l, dl).ok);
  CHECK(perdita::testing::check_gradient(masked, m, dm).ok); // 0 is a kink: unresolved
  CHECK_THAT(dm[1], close(1 / (1 + std::exp(s.sum)), 1e-15));
}

TEST_CASE("preference pairs: what each loss calls a reward", "[preference]") {
  auto data = golden_pair<double>(); // log-ratios 0.5 and −0.8; −12 and −20 of 5 and 8 tokens
  std::vector<double> chosen(1), rejected(1);
  const auto rewards = [&](const perdita::preference_loss<double>& loss, double w, double l) {
    data.run(loss, {}, {.chosen_rewards = chosen, .rejected_rewards = rejected});
    CHECK_THAT(chosen[0], close(w, 1e-13));
    CHECK_THAT(rejected[0], close(l, 1e-13));
  };
  rewards(perdita::rdpo<double>({.beta = 0.2}), 0.1, -0.16);
  rewards(perdita::dpop<double>({.beta = 0.2}), 0.1, -0.16);
  rewards(perdita::dpo_shift<double>({.beta = 0.2}), 0.1, -0.16);
  rewards(perdita::cal_dpo<double>({.beta = 0.2}), 0.1, -0.16);
  rewards(perdita::sppo<double>({.beta = 0.2}), 0.1, -0.16);
  rewards(perdita::dno<double>({.eta = 0.2}), 0.1, -0.16);
  rewards(perdita::xpo<double>({.beta = 0.2}), 0.1, -0.16);
  rewards(perdita::inpo<double>({.eta = 0.2, .tau = 0.1}), 0.1, -0.16);
  rewards(perdita::beta_dpo<double>({.beta = 0.2}), 0.1, -0.16);
  rewards(perdita::diffusion_dpo<double>({.beta = 0.4}), -0.1, 0.16);
  rewards(perdita::slic<double>(), -12, -20);
  rewards(perdita::bradley_terry<double>(), -12, -20);
  rewards(perdita::density_ratio<double>(), 0.5, -0.8);
  rewards(perdita::rrhf_pair<double>(), -12.0 / 5, -20.0 / 8);
  rewards(perdita::simpo<double>({.beta = 3}), -3 * 12.0 / 5, -3 * 20.0 / 8);
  rewards(perdita::cpo<double>({.beta = 0.2}), -2.4, -4);
  rewards(perdita::cpo<double>({.beta = 0.2, .type = perdita::cpo_type::ipo}), -0.48, -0.5);
  rewards(perdita::tpo<double>({.beta = 0.2, .averages = true, .likelihood = 0}), -0.48, -0.5);
}

TEST_CASE("preference pairs: settings that are not the published ones", "[preference]") {
  CHECK(run(perdita::slic<double>({.delta = 3, .lambda = 0}), 1, 0) == three{2, -1, 1});
  CHECK(run(perdita::rrhf_pair<double>({.rank = 5, .likelihood = 0}), -3, -2) == three{5, -5, 5});
  // dpop: z = 0.1 (−1 − 2)
  CHECK_THAT(run(perdita::dpop<double>({.lambda = 2}), -1, 0)[0],
             close(std::log1p(std::exp(0.3)), 1e-14));
  // cpo: (1 − ε) log(1 + e^−z) + ε log(1 + e^z), z = 0.8
  CHECK_THAT(run(perdita::cpo<double>({.likelihood = 0, .label_smoothing = 0.25}), -12, -20)[0],
             close(0.75 * std::log1p(std::exp(-0.8)) + 0.25 * std::log1p(std::exp(0.8)), 1e-14));
  // xpo: d − m = 1, and (2 · 0.75 − 1)/(2β) = 2.5
  pair_data<double> one;
  one.add(1.5, 0.25, 0, 0, 1, 1);
  const std::vector<double> quarter{0.25};
  auto view = one.view();
  view.margins = quarter;
  std::vector<double> argument(1);
  CHECK_THAT(perdita::xpo<double>({.alpha = 0, .ipo = true})(view, {}, {.arguments = argument}),
             close(1.5 * 1.5, 1e-14));
  CHECK(argument[0] == 1);
  // beta_dpo: the mean of d = 4 and −1 by weights, margins, and the least β
  pair_data<double> two;
  two.add(4, 0, 0, 0, 1, 1);
  two.add(-1, 0, 0, 0, 1, 1);
  const std::vector<double> weights{1, 3}, margins{0.5, 0};
  std::vector<double> arguments(2);
  view = two.view();
  view.margins = margins;
  perdita::beta_dpo<double>()(view, {.row_weights = weights}, {.arguments = arguments});
  CHECK_THAT(arguments[0], close(0.115 * 4 - 0.5, 1e-14)); // 0.1 (1 + 0.6 (4 − 3)/4)
  CHECK_THAT(arguments[1], close(-0.115, 1e-14));
  perdita::beta_dpo<double>({.least = 0.25})(view, {.row_weights = weights},
                                             {.arguments = arguments});
  CHECK(arguments[0] == 0.5);

  pair_data<double> data; // d = 4 and 1, then 10 and 2
  data.add(4, 0, 0, 0, 1, 1);
  data.add(1, 0, 0, 0, 1, 1);
  perdita::margin_statistics statistics(0.75);
  statistics.update(data.view());
  data.chosen = {10, 2};
  statistics.update(data.view());
  CHECK_THAT(statistics.mean(), close(0.75 * 2.5 + 0.25 * 6, 1e-15));
  CHECK_THAT(statistics.deviation(), close(0.75 * std::sqrt(4.5) + 0.25 * std::sqrt(32.0), 1e-15));
}

} // namespace perdita_tests
