// SPDX-License-Identifier: MIT

// Losses of unlearning: formula sheet "preference", 10 and 13.

#include <perdita/preference/unlearning.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <perdita/testing/gradient_check.hpp>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/numbers.hpp"
#include "support/point_losses.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

using Catch::Matchers::ContainsSubstring;
using perdita::index;
using perdita::matrix_view;
using perdita::reduction;
constexpr double inf = std::numeric_limits<double>::infinity();
const double nan = std::nan("");

/// log(1 − e^a)
wide log_rest(const wide& a) { return a > -0.5 ? log(wide(-expm1(a))) : log1p(wide(-exp(a))); }

} // namespace

TEMPLATE_TEST_CASE("unlearning: losses of sequences at log-ratios up to 5000", "[unlearning]",
                   float, double) {
  using T = TestType;
  const wide beta = 0.1;
  const auto value = [=](const wide& x) { return wide(2 / beta * softplus(wide(beta * x))); };
  const auto slope = [=](const wide& x) { return wide(2 * sigma(wide(beta * x))); };
  for (const bool per_token : {false, true})
    check_points<T>(
        "npo", per_token ? "per token" : "", log_ratios, true, per_token ? 8 : 1,
        [&](const auto& scores, const auto& gradient, const auto& call) {
          return perdita::npo<T>({.per_token = per_token, .reduction = reduction::sum})(
              scores, gradient, call);
        },
        value, slope);
  const wide baseline = -0.75;
  for (const bool bounded : {false, true})
    check_points<T>(
        "npo_kto", bounded ? "bounded" : "", log_ratios, true, 1,
        [&](const auto& scores, const auto& gradient, const auto& call) {
          return perdita::npo_kto<T>({.bounded = bounded, .reduction = reduction::sum})(
              scores, -0.75, gradient, call);
        },
        [=](const wide& x) {
          const wide t = beta * x - baseline;
          return wide(2 / beta * (bounded ? sigma(t) : softplus(t)));
        },
        [=](const wide& x) {
          const wide t = beta * x - baseline;
          return wide(2 * sigma(t) * (bounded ? sigma(wide(-t)) : wide(1)));
        });
  const wide steep = 2.5, gamma = 0.25;
  check_points<T>(
      "simnpo", "", log_ratios, false, 8,
      [&](const auto& scores, const auto& gradient, const auto& call) {
        return perdita::simnpo<T>({.gamma = 0.25, .reduction = reduction::sum})(scores, gradient,
                                                                                call);
      },
      [=](const wide& a) { return wide(2 / steep * softplus(wide(steep * (a + gamma)))); },
      [=](const wide& a) { return wide(2 * sigma(wide(steep * (a + gamma)))); });
  for (const int sign : {1, -1})
    check_points<T>(
        sign > 0 ? "gradient_ascent" : "sequence_nll", "", log_ratios, false, 1,
        [&](const auto& scores, const auto& gradient, const auto& call) {
          return sign > 0 ? perdita::gradient_ascent<T>({.reduction = reduction::sum})(
                                scores, gradient, call)
                          : perdita::sequence_nll<T>({.reduction = reduction::sum})(scores,
                                                                                    gradient, call);
        },
        [=](const wide& x) { return wide(sign * x); }, [=](const wide&) { return wide(sign); });
}

TEMPLATE_TEST_CASE("unlearning: losses of tokens", "[unlearning]", float, double) {
  using T = TestType;
  const std::vector<double> tokens{-0.0625, -0.25, -0.75, -1, -3, -20, -50, -500, -5000};
  for (const double beta : {0.0, 0.5, 2.0})
    check_points<T>(
        "wga", "beta " + std::to_string(beta), tokens, false, 1,
        [&](const auto& scores, const auto& gradient, const auto& call) {
          return perdita::wga<T>({.beta = beta, .reduction = reduction::sum})(scores, gradient,
                                                                              call);
        },
        [=](const wide& l) { return wide(exp(wide(beta * l)) * l); },
        [=](const wide& l) { return exp(wide(beta * l)); }, true);
  const auto weight = [](const wide& l) { return exp(wide(0.5 * l + 2 * log_rest(l))); };
  check_points<T>(
      "satimp", "", tokens, false, 1,
      [&](const auto& scores, const auto& gradient, const auto& call) {
        return perdita::satimp<T>({.beta1 = 0.5, .beta2 = 2, .reduction = reduction::sum})(
            scores, gradient, call);
      },
      [=](const wide& l) { return wide(weight(l) * l); }, weight, true);
  check_points<T>(
      "token_unlikelihood", "", tokens, false, 1,
      [&](const auto& scores, const auto& gradient, const auto& call) {
        return perdita::token_unlikelihood<T>({.reduction = reduction::sum})(scores, gradient,
                                                                             call);
      },
      [](const wide& l) { return wide(-log_rest(l)); },
      [](const wide& l) { return wide(1 / expm1(wide(-l))); });
  check_points<T>(
      "token_unlikelihood", "threshold", tokens, false, 1,
      [&](const auto& scores, const auto& gradient, const auto& call) {
        return perdita::token_unlikelihood<T>({.threshold = -2, .reduction = reduction::sum})(
            scores, gradient, call);
      },
      [](const wide& l) { return l < -2 ? wide(0) : wide(-log_rest(l)); },
      [](const wide& l) { return l < -2 ? wide(0) : wide(1 / expm1(wide(-l))); });
}

TEST_CASE("unlearning: golden values, and the limits of npo", "[unlearning]") {
  const std::vector<double> p{-20}, r{-19.2};
  const std::vector<int> n{8};
  std::vector<double> g(1);
  const perdita::sequence_scores<double> scores{.policy = p, .reference = r, .lengths = n};
  check_golden(perdita::npo<double>()(scores, g), 13.0789393463518);
  check_golden(g[0], 0.9600213196888);
  check_golden(perdita::simnpo<double>()(scores, g), 0.001542874563375505);
  check_golden(8 * g[0], 0.003853469326655);
  CHECK(perdita::npo_kto<double>()(scores, 0) == perdita::npo<double>()(scores));
  { // K is the mean over refusals that say something; it is a constant, and may be below 0.
    const std::vector<double> idk{-4, -7, -3}, idk_r{-3.5, -6, -1};
    const std::vector<int> tokens{2, 3, 0};
    const double k = perdita::refusal_baseline<double>({.policy = idk, .reference = idk_r});
    CHECK(std::abs(k + 3.5 / 3) < 1e-15);
    CHECK(perdita::refusal_baseline<double>(
              {.policy = idk, .reference = idk_r, .lengths = tokens}) == -0.75);
    perdita::sequence_summary summary;
    perdita::npo_kto<double>()(scores, k, {}, {}, {.summary = &summary});
    CHECK(summary.kl == k);
  }
  // At the start, and with β → 0: gradient ascent.
  CHECK(std::abs(perdita::npo<double>()({.policy = p, .reference = p}, g) - 20 * std::log(2)) <
        1e-14);
  CHECK(g[0] == 1);
  const double small = 1e-6;
  CHECK(std::abs(perdita::npo<double>({.beta = small})(scores) - 2 / small * std::log(2) + 0.8) <
        1e-6);
}

TEST_CASE("unlearning: the mean is over tokens or sequences", "[unlearning]") {
  const std::vector<double> p{-6, -3, -5}, weights{1, 2, 1};
  const std::vector<unsigned> n{3, 1, 0};
  std::vector<double> g(3, 9);
  const perdita::sequence_scores<double> scores{.policy = p, .lengths = n};
  CHECK(perdita::gradient_ascent<double>()(scores, g) == -9.0 / 4);
  CHECK(g == std::vector<double>{0.25, 0.25, 0});
  perdita::sequence_summary summary;
  CHECK(std::abs(perdita::sequence_nll<double>()(scores, g, {.row_weights = weights},
                                                 {.summary = &summary}) -
                 12.0 / 5) < 1e-15);
  CHECK(g == std::vector<double>{-0.2, -0.4, 0});
  CHECK((summary.chosen == 2 && summary.chosen_logps == -4.5 && summary.empty == 1));
  CHECK(perdita::sequence_nll<double>({.reduction = reduction::sum})(scores) == 9);
  const perdita::simnpo<double> simnpo({.beta = 2, .gamma = 1});
  CHECK(std::abs(simnpo(scores) - (std::log1p(std::exp(-2.0)) + std::log1p(std::exp(-4.0))) / 2) <
        1e-15);
  // Tokens: a mask is a row weight.
  const std::vector<double> mask{1, 0, 1};
  const std::vector<double> l{-0.5, nan, -2};
  CHECK(std::abs(perdita::wga<double>({.beta = 2})({.policy = l}, g, {.row_weights = mask}) -
                 (-0.5 * std::exp(-1.0) - 2 * std::exp(-4.0)) / 2) < 1e-15);
  CHECK((std::abs(g[0] - std::exp(-1.0) / 2) < 1e-15 && g[1] == 0));
}

TEST_CASE("unlearning: certain and impossible tokens, NaN", "[unlearning]") {
  const std::vector<double> l{0, -inf, nan, 0.5, -1e-300};
  std::vector<double> g(5), values(5);
  const auto run = [&](const auto& loss) {
    CHECK(std::isnan(loss({.policy = l}, g, {.values = values})));
    CHECK((std::isnan(values[2]) && std::isnan(g[2])));
  };
  run(perdita::wga<double>({.reduction = reduction::sum}));
  CHECK((values[0] == 0 && g[0] == 1 && values[1] == 0 && g[1] == 0));
  run(perdita::satimp<double>({.reduction = reduction::sum}));
  CHECK((values[0] == 0 && g[0] == 0 && values[1] == 0 && g[1] == 0 && std::isnan(g[3])));
  CHECK(std::abs(g[4] / 1e-300 - 1) < 1e-12);
  run(perdita::token_unlikelihood<double>({.reduction = reduction::sum}));
  CHECK((values[0] == inf && g[0] == inf && values[1] == 0 && g[1] == 0));
  CHECK((std::isnan(values[3]) && std::isnan(g[3])));
  CHECK((std::abs(values[4] - 300 * std::log(10)) < 1e-12 && std::abs(g[4] * 1e-300 - 1) < 1e-15));
  // An infinite log-ratio has the limit.
  const std::vector<double> p{-inf, -1}, r{-1, -1};
  std::vector<double> d(2);
  CHECK(perdita::npo<double>({.reduction = reduction::sum})({.policy = p, .reference = r}, d) ==
        20 * std::log(2));
  CHECK((d[0] == 0 && d[1] == 1));
}

// --- Rows of logits ------------------------------------------------------------------------------

namespace {

using row = std::vector<wide>;

/// −log softmax(z)_i
wide surprise(const row& z, std::size_t i) {
  const wide u = log_sum_exp(z, [&](std::size_t k) { return k != i; }) - z[i];
  return u > -infinity() ? softplus(u) : wide(0);
}
struct row_outcome {
  wide value;
  row slopes;
};
row_outcome unlikelihood(const row& x, std::size_t y, bool with_entropy) {
  const wide rivals = log_sum_exp(x, [&](std::size_t k) { return k != y; });
  row_outcome e{softplus(wide(x[y] - rivals)), row(x.size())};
  const wide hit = sigma(wide(x[y] - rivals));
  row others = x; // a class of no chance in place of the label
  others[y] = -infinity();
  for (std::size_t k = 0; k < x.size(); ++k) {
    const wide log_q = k == y ? wide(0) : wide(-surprise(others, k));
    e.slopes[k] = k == y ? hit : wide(-hit * exp(log_q));
    if (with_entropy && k != y)
      e.value -= exp(log_q) * log_q;
  }
  return e;
}
row_outcome undial(const row& x, const row& teacher, std::size_t y, const wide& beta) {
  row t = teacher;
  t[y] -= beta;
  row_outcome e{0, {}};
  for (std::size_t k = 0; k < x.size(); ++k) {
    const wide q = exp(wide(-surprise(t, k)));
    e.value += q * surprise(x, k);
    e.slopes.push_back(exp(wide(-surprise(x, k))) - q);
  }
  return e;
}
row_outcome logit_gap(const row& x) {
  const wide n = static_cast<double>(x.size());
  wide sum = 0;
  for (const wide& z : x)
    sum += z;
  const auto top = static_cast<std::size_t>(std::max_element(x.begin(), x.end()) - x.begin());
  const wide gap = x[top] - sum / n;
  row_outcome e{gap * gap, row(x.size(), wide(-2 * gap / n))};
  e.slopes[top] += 2 * gap;
  return e;
}

template <class T> struct logits {
  index rows = 7, cols;
  std::vector<T> x, teacher, gradient, values;
  std::vector<int> labels;

  logits(index classes, double spread)
      : cols(classes), gradient(static_cast<std::size_t>(rows * classes)), values(7) {
    random_numbers random(static_cast<std::uint64_t>(classes));
    for (std::size_t i = 0; i < gradient.size(); ++i) {
      x.push_back(static_cast<T>(spread * random.normal()));
      teacher.push_back(static_cast<T>(spread * random.normal()));
    }
    for (index r = 0; r < rows; ++r)
      labels.push_back(static_cast<int>(random.below(static_cast<std::uint64_t>(classes))));
  }
  matrix_view<const T> view() const { return {x.data(), rows, cols}; }
  matrix_view<const T> teacher_view() const { return {teacher.data(), rows, cols}; }
  matrix_view<T> gradient_view() { return {gradient.data(), rows, cols}; }
  row scores(const std::vector<T>& from, index r) const {
    row z;
    for (index k = 0; k < cols; ++k)
      z.push_back(from[static_cast<std::size_t>(r * cols + k)]);
    return z;
  }
};

/// run(data, call): the loss with reduction `sum`; expect(data, row).
template <class T, class Run, class Expect>
void check_rows(const std::string& name, Run run, Expect expect) {
  const double epsilon = std::numeric_limits<T>::epsilon(),
               least = sizeof(T) == 4 ? 0x1p-149 : 0x1p-1000; // below it, exp(double) is 0
  error_judge of_values, of_slopes;
  for (const index classes : {2, 3, 13, 40})
    for (const double spread : {1.0, 30.0, 2000.0}) {
      logits<T> data(classes, spread);
      wide sum = 0;
      const T total = run(data, perdita::call_options<T>{.values = data.values});
      for (index r = 0; r < data.rows; ++r) {
        const row_outcome e = expect(data, r);
        sum += e.value;
        // e^x of a distance up to a few spreads, in double
        const double sway = 0x1p-50 * (1 + 8 * spread);
        INFO(name << ", " << classes << " classes, spread " << spread << ", row " << r);
        CHECK(of_values.within(size_of(wide(data.values[static_cast<std::size_t>(r)] - e.value)), 1,
                               (epsilon + sway) * size_of(e.value) + least));
        for (index k = 0; k < classes; ++k) {
          const wide slope = e.slopes[static_cast<std::size_t>(k)];
          const wide got = data.gradient[static_cast<std::size_t>(r * classes + k)];
          CHECK(of_slopes.within(size_of(wide(got - slope)), 1,
                                 (epsilon + sway) * size_of(slope) + (name == "undial" ? sway : 0) +
                                     least));
        }
      }
      CHECK(size_of(wide(total - sum)) <= 4 * epsilon * sum + 1e-12 * sum + 7 * least);
    }
  report_accuracy<T>(name, "", in_allowances, of_values, of_slopes);
}

} // namespace

TEMPLATE_TEST_CASE("unlearning: losses of rows against 113 bits", "[unlearning]", float, double) {
  using T = TestType;
  const auto y = [](const logits<T>& d, index r) {
    return static_cast<std::size_t>(d.labels[static_cast<std::size_t>(r)]);
  };
  check_rows<T>(
      "unlikelihood",
      [](logits<T>& d, const auto& call) {
        return perdita::unlikelihood<T>({.reduction = reduction::sum})(d.view(), d.labels,
                                                                       d.gradient_view(), call);
      },
      [&](const logits<T>& d, index r) { return unlikelihood(d.scores(d.x, r), y(d, r), false); });
  check_rows<T>(
      "ce_u",
      [](logits<T>& d, const auto& call) {
        return perdita::ce_u<T>({.reduction = reduction::sum})(d.view(), d.labels,
                                                               d.gradient_view(), call);
      },
      [&](const logits<T>& d, index r) { return unlikelihood(d.scores(d.x, r), y(d, r), true); });
  check_rows<T>(
      "undial",
      [](logits<T>& d, const auto& call) {
        return perdita::undial<T>({.beta = 3, .reduction = reduction::sum})(
            d.view(), d.labels, d.teacher_view(), d.gradient_view(), call);
      },
      [&](const logits<T>& d, index r) {
        return undial(d.scores(d.x, r), d.scores(d.teacher, r), y(d, r), 3);
      });
  check_rows<T>(
      "logit_gap",
      [](logits<T>& d, const auto& call) {
        return perdita::logit_gap<T>({.reduction = reduction::sum})(d.view(), d.gradient_view(),
                                                                    call);
      },
      [&](const logits<T>& d, index r) { return logit_gap(d.scores(d.x, r)); });
}

TEST_CASE("unlearning: gradients of rows are derivatives", "[unlearning]") {
  logits<double> d(6, 2);
  const auto check = [&](const auto& value) {
    std::vector<double> x = d.x;
    const auto report = perdita::testing::check_gradient(
        [&](std::span<const double> at) {
          return value(matrix_view<const double>(at.data(), d.rows, d.cols));
        },
        x, d.gradient);
    INFO(report.message());
    CHECK(report.ok);
  };
  const perdita::unlikelihood<double> unlikelihood;
  unlikelihood(d.view(), d.labels, d.gradient_view());
  check([&](const auto& x) { return unlikelihood(x, d.labels); });
  // That of ce_u is the same.
  const auto same = d.gradient;
  perdita::ce_u<double>()(d.view(), d.labels, d.gradient_view());
  CHECK(d.gradient == same);
  const perdita::undial<double> undial({.beta = 2});
  undial(d.view(), d.labels, d.teacher_view(), d.gradient_view());
  check([&](const auto& x) { return undial(x, d.labels, d.teacher_view()); });
  const perdita::logit_gap<double> gap;
  gap(d.view(), d.gradient_view());
  check([&](const auto& x) { return gap(x); });
}

TEST_CASE("unlearning: special rows", "[unlearning]") {
  const std::vector<std::vector<double>> rows{{-inf, 1, -inf}, {0, -inf, 1}, {-inf, -inf, -inf},
                                              {nan, 1, 2},     {0, 1, inf},  {0, inf, 1},
                                              {2, 2, -inf}};
  const std::vector<int> y{1};
  std::vector<double> g(3);
  const matrix_view<double> d(g.data(), 1, 3);
  const auto run = [&](const auto& loss, std::size_t i) {
    return loss(matrix_view<const double>(rows[i].data(), 1, 3), y, d);
  };
  for (const bool with_entropy : {false, true}) {
    const auto at = [&](std::size_t i) {
      return with_entropy ? run(perdita::ce_u<double>(), i)
                          : run(perdita::unlikelihood<double>(), i);
    };
    CHECK((at(0) == inf && g == std::vector<double>{0, 1, 0}));
    const double value = at(1);
    const double q = 1 / (1 + std::exp(1.0));
    CHECK(std::abs(value - (with_entropy ? -q * std::log(q) - (1 - q) * std::log(1 - q) : 0)) <
          1e-15);
    CHECK(g == std::vector<double>{0, 0, 0});
    CHECK((at(2) == 0 && g == std::vector<double>{0, 0, 0}));
    for (const std::size_t i : {3U, 4U}) {
      CHECK(std::isnan(at(i)));
      CHECK((std::isnan(g[0]) && std::isnan(g[1]) && std::isnan(g[2])));
    }
    CHECK((at(5) == inf && g[1] == 1 && std::abs(g[0] + q) < 1e-15));
    CHECK(std::abs(at(6) - std::log(2)) < 1e-15);
    CHECK((g[0] == -0.5 && g[1] == 0.5 && g[2] == 0));
  }
  // Below the threshold, log ½ here
  CHECK(run(perdita::unlikelihood<double>({.threshold = -0.6}), 6) == 0);
  CHECK(g == std::vector<double>{0, 0, 0});
  CHECK(run(perdita::unlikelihood<double>({.threshold = -0.7}), 6) > 0);

  const auto gap = [&](std::size_t i) {
    return perdita::logit_gap<double>()(matrix_view<const double>(rows[i].data(), 1, 3), d);
  };
  CHECK((gap(1) == 0.25 && g == std::vector<double>{-0.5, 0, 0.5}));
  CHECK((gap(2) == 0 && g == std::vector<double>{0, 0, 0}));
  CHECK((std::isnan(gap(3)) && std::isnan(g[1])));
  CHECK(std::isnan(gap(4)));

  const auto undial = [&](std::size_t x, std::size_t t) {
    return perdita::undial<double>()(matrix_view<const double>(rows[x].data(), 1, 3), y,
                                     matrix_view<const double>(rows[t].data(), 1, 3), d);
  };
  CHECK((undial(1, 1) > 0 && g == std::vector<double>{0, 0, 0}));
  CHECK((undial(1, 6) == inf && g[1] < 0)); // the teacher still gives the label a share
  CHECK(std::isnan(undial(3, 1)));
  CHECK(std::isnan(undial(1, 3)));
  CHECK((std::isnan(undial(2, 1)) && std::isnan(g[0])));
}

TEST_CASE("undial: what is added to the logits of a model cancels", "[unlearning]") {
  const std::vector<double> x{1, -0.5, 2, 0.25}, t{3, 2.5, -1, 0};
  std::vector<double> high_x, high_t, g(4), high_g(4);
  for (std::size_t i = 0; i < 4; ++i) {
    high_x.push_back(x[i] + 0x1p50);
    high_t.push_back(t[i] + 0x1p50);
  }
  const std::vector<int> y{1};
  const auto run = [&](const auto& scores, const auto& teacher, auto& gradient) {
    return perdita::undial<double>({.beta = 0.3})(matrix_view<const double>(scores.data(), 1, 4), y,
                                                  matrix_view<const double>(teacher.data(), 1, 4),
                                                  matrix_view<double>(gradient.data(), 1, 4));
  };
  CHECK(run(x, t, g) == run(high_x, high_t, high_g));
  CHECK(g == high_g);
}

TEST_CASE("unlearning: rows that are ignored, in place, on any threads", "[unlearning]") {
  logits<float> d(11, 3);
  d.labels[2] = -100;
  const perdita::undial<float> loss;
  const float value =
      loss(d.view(), d.labels, d.teacher_view(), d.gradient_view(), {.values = d.values});
  CHECK(d.values[2] == 0);
  CHECK(std::all_of(d.gradient.begin() + 22, d.gradient.begin() + 33,
                    [](float g) { return g == 0; }));
  float sum = 0;
  for (const float v : d.values)
    sum += v;
  CHECK(std::abs(value - sum / 6) < 1e-6F * value);
  const threads_executor pool(3, task_order::shuffled);
  std::vector<float> x = d.x;
  const matrix_view<float> place(x.data(), d.rows, d.cols);
  CHECK(loss(place, d.labels, d.teacher_view(), place, {.run_on = pool}) == value);
  CHECK(x == d.gradient);
  CHECK_THROWS_WITH(loss(d.view(), d.labels, matrix_view<const float>(x.data(), 7, 10)),
                    ContainsSubstring("columns of teacher is 10"));
  // Without labels, and in place.
  const perdita::logit_gap<float> gap;
  const float before = gap(d.view(), d.gradient_view());
  x = d.x;
  CHECK(gap(place, place, {.run_on = pool}) == before);
  CHECK(x == d.gradient);
}

// --- Together ------------------------------------------------------------------------------------

TEST_CASE("retaining: the sum of its terms", "[unlearning]") {
  const std::vector<double> f{-4, -6}, fr{-5, -5}, k{-3, -2}, kl{0.5, nan, 0.25}, mask{1, 0, 2};
  const std::vector<int> n{2, 3};
  const perdita::sequence_scores<double> forget{.policy = f, .reference = fr, .lengths = n};
  const perdita::retained<double> keep{
      .sequences = {.policy = k, .lengths = n}, .kl = kl, .kl_weights = mask};
  std::vector<double> df(2), dk(2), dl(3), alone(2);
  const perdita::npo<double> npo;
  const double part = npo(forget, alone);
  const perdita::retaining loss(npo, {.forget_weight = 2, .retain_weight = 0.5, .kl_weight = 3});
  perdita::retaining_terms terms;
  const double value = loss(forget, keep, {df, dk, dl}, &terms);
  CHECK((terms.forget == part && terms.retain == 1 && terms.kl == 1.0 / 3));
  CHECK(std::abs(value - (2 * part + 0.5 + 1)) < 1e-14);
  CHECK(std::abs(df[0] - 2 * alone[0]) < 1e-15);
  CHECK((dk == std::vector<double>{-0.1, -0.1} && dl == std::vector<double>{1, 0, 2}));
  CHECK(loss(forget, keep) == value);
  // GradDiff; what has no weight is not looked at, and has slopes of 0.
  const perdita::retaining difference(perdita::gradient_ascent<double>{});
  CHECK(difference(forget, {.sequences = keep.sequences}, {df, dk}) == -2 + 1);
  CHECK((df == std::vector<double>{0.2, 0.2} && dk == std::vector<double>{-0.2, -0.2}));
  const perdita::retaining forget_alone(npo, {.retain_weight = 0});
  CHECK(forget_alone(forget, {}, {df, dk, {}}) == part);
  CHECK(dk == std::vector<double>{0, 0});

  const auto untouched = df = std::vector<double>(2, 7);
  CHECK_THROWS_WITH(loss(forget, {.sequences = {.policy = k}, .kl = kl}, {df, dk, dl}),
                    ContainsSubstring("lengths is missing"));
  CHECK_THROWS_WITH(loss(forget, {.sequences = keep.sequences}, {df, dk, dl}),
                    ContainsSubstring("kl is missing"));
  CHECK_THROWS_WITH(loss(forget, keep, {df, dl, dl}), ContainsSubstring("overlaps"));
  std::vector<double> wrong(1);
  CHECK_THROWS_WITH(loss(forget, keep, {df, wrong, dl}), ContainsSubstring("is 1 long"));
  CHECK_THROWS_WITH(loss(forget, keep, {df, dk, wrong}), ContainsSubstring("is 1 long"));
  CHECK(df == untouched);
  CHECK_THROWS_WITH(perdita::retaining(npo, {.retain_weight = -1}),
                    ContainsSubstring("retain_weight is -1"));
}

TEST_CASE("retain_multiplier: rises while the retain loss is too high", "[unlearning]") {
  perdita::retain_multiplier mu;
  CHECK(mu.update(0.75, 0.25, 0.5) == 0.25);
  CHECK(mu.update(0.5, 0.25, 0.5) == 0.375);
  CHECK(mu.update(-4, 0.25, 0.5) == 0);
  CHECK(mu.update(nan, 0.25, 0.5) == 0);
  CHECK(mu.update(inf, 0.25, 0.5) == 0);
  CHECK_THROWS_WITH(mu.update(1, nan, 0.5), ContainsSubstring("level"));
  CHECK_THROWS_WITH(mu.update(1, 1, -1), ContainsSubstring("step is -1"));
}

TEST_CASE("unlearning: NaN shows in the gradient of its sequence", "[unlearning]") {
  const std::vector<double> p{nan, -2}, one{-1};
  const std::vector<int> n{3, 4}, single{1};
  const perdita::sequence_scores<double> in{.policy = p, .lengths = n};
  std::vector<double> g(2);
  const auto shows = [&](double value) {
    return std::isnan(value) && std::isnan(g[0]) && std::isfinite(g[1]) && g[1] != 0;
  };
  CHECK(shows(perdita::sequence_nll<double>()(in, g)));
  CHECK(shows(perdita::gradient_ascent<double>()(in, g)));
  const perdita::sequence_scores<double> other{.policy = one, .lengths = single};
  CHECK(shows(perdita::c_advul<double>()({in, other, other}, {g, {}, {}})));
}

TEST_CASE("unlearning: gradients of what is left out are checked", "[unlearning]") {
  const std::vector<double> f{-4, -6}, k{-3, -2}, kl{0.5, 0.25};
  const std::vector<int> n{2, 3};
  std::vector<double> df(2, 7), dk(2, 7), w{1, 2};
  const perdita::vector_view<double> nowhere(nullptr, 2);
  const perdita::sequence_scores<double> forget{.policy = f, .lengths = n},
      keep{.policy = k, .lengths = n};
  using ascent = perdita::gradient_ascent<double>;
  const perdita::retaining loss(ascent{}), away(ascent{}, {.forget_weight = 0}),
      alone(ascent{}, {.retain_weight = 0});
  CHECK_THROWS_WITH(loss(forget, {.sequences = keep}, {df, dk, nowhere}),
                    ContainsSubstring("gradient of the kl is null"));
  CHECK_THROWS_WITH(away(forget, {.sequences = keep}, {nowhere, dk, {}}),
                    ContainsSubstring("forgotten is null"));
  CHECK_THROWS_WITH(alone(forget, {.sequences = keep}, {df, nowhere, {}}),
                    ContainsSubstring("kept is null"));
  const perdita::c_advul<double> plain({.away_weight = 0, .toward_weight = 0}), all;
  CHECK_THROWS_WITH(plain({.utility = keep}, {nowhere, {}, df}),
                    ContainsSubstring("gradient of away is null"));
  // The weights of one term are not the gradient of another.
  const perdita::sequence_scores<double> weighted{.policy = k, .lengths = n, .weights = w};
  CHECK_THROWS_WITH(loss(forget, {.sequences = weighted}, {df, w, {}}),
                    ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(all({forget, keep, weighted}, {df, dk, w}), ContainsSubstring("overlaps"));
  CHECK((df == std::vector<double>(2, 7) && dk == df));
}

TEST_CASE("c_advul: pieces and their cutoffs", "[unlearning]") {
  const std::vector<double> a{-6, -4}, t{-1, -3}, u{-2, -6};
  const std::vector<int> two{2, 2}, one{1, 1};
  std::vector<double> da(2, 5), dt(2, 5), du(2, 5);
  const perdita::c_advul<double> loss;
  const perdita::sequence_scores<double> utility{.policy = u, .lengths = two};
  // NLL per token: 2.5 (above the cutoff of −2.5 > −5), 1, 2
  CHECK(loss({.away = {.policy = a, .lengths = two},
              .toward = {.policy = t, .lengths = two},
              .utility = utility},
             {da, dt, du}) == 0.5 * -2.5 + 0.5 * 1 + 2);
  CHECK((da == std::vector<double>(2, 0.125) && dt == std::vector<double>(2, -0.125)));
  CHECK(du == std::vector<double>(2, -0.25));
  // −8 is below −5, and 0.25 below 0.5: a slope of 0.001 is left.
  const std::vector<double> far{-9, -7}, near{-0.25, -0.25};
  const double value = loss({.away = {.policy = far, .lengths = one},
                             .toward = {.policy = near, .lengths = one},
                             .utility = utility},
                            {da, dt, du});
  CHECK(std::abs(value - (0.5 * (-5 - 0.008) + 0.5 * (0.5 + 0.00025) + 2)) < 1e-15);
  CHECK((std::abs(da[0] - 0.00025) < 1e-18 && std::abs(dt[1] + 0.00025) < 1e-18));
  // What is impossible already is at its cutoff.
  const std::vector<double> never{-1, -std::numeric_limits<double>::infinity()};
  const perdita::c_advul<double> flat({.leak = 0});
  CHECK(flat({.away = {.policy = never, .lengths = one},
              .toward = {.policy = near, .lengths = one},
              .utility = utility},
             {da, dt, du}) == 0.5 * -5 + 0.5 * 0.5 + 2);
  CHECK((da == std::vector<double>(2, 0) && dt == da));
  // A piece of weight 0 needs no data.
  const perdita::c_advul<double> plain({.away_weight = 0, .toward_weight = 0});
  CHECK(plain({.utility = utility}, {da, {}, du}) == 2);
  CHECK(da == std::vector<double>(2, 0));
  CHECK_THROWS_WITH(loss({.utility = {.policy = u}}), ContainsSubstring("lengths is missing"));
  CHECK_THROWS_WITH(plain({.utility = utility}, {da, {}, da}), ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(perdita::c_advul<float>({.leak = 2}), ContainsSubstring("leak is 2"));
  CHECK_THROWS_WITH(perdita::c_advul<float>({.away_weight = -1}), ContainsSubstring("away_weight"));
}

TEMPLATE_TEST_CASE("c_advipo: tokens beyond the cutoffs count in the length alone", "[unlearning]",
                   float, double) {
  using T = TestType;
  const double epsilon = std::numeric_limits<T>::epsilon();
  random_numbers random(5);
  std::vector<T> w, l, rw, rl;
  std::vector<std::int64_t> sw{0}, sl{0};
  for (int i = 0; i < 9; ++i) {
    for (std::uint64_t k = i == 4 ? 0 : 1 + random.below(6); k > 0; --k)
      w.push_back(static_cast<T>(-std::abs(random.normal())));
    for (std::uint64_t k = 1 + random.below(6); k > 0; --k)
      l.push_back(static_cast<T>(-4 * std::abs(random.normal())));
    sw.push_back(static_cast<std::int64_t>(w.size()));
    sl.push_back(static_cast<std::int64_t>(l.size()));
    rw.push_back(static_cast<T>(-std::abs(random.normal())));
    rl.push_back(static_cast<T>(-std::abs(random.normal())));
  }
  w[0] = T(-0.5); // on the cutoffs: left out
  l[0] = T(-5);
  std::vector<T> dw(w.size()), dl(l.size()), values(9);
  const perdita::token_scores<T> chosen{w, sw, rw}, rejected{l, sl, rl};
  const perdita::c_advipo<T> loss;
  const T value = loss(chosen, rejected, dw, dl, {.scale = 2, .values = values});
  error_judge of_values, of_slopes;
  wide total = 0;
  for (std::size_t i = 0; i < 9; ++i) {
    wide a = 0, b = 0;
    const wide n = static_cast<double>(sw[i + 1] - sw[i]),
               m = static_cast<double>(sl[i + 1] - sl[i]);
    for (auto t = static_cast<std::size_t>(sw[i]); t < static_cast<std::size_t>(sw[i + 1]); ++t)
      a += w[t] < T(-0.5) ? wide(w[t]) : wide(0);
    for (auto t = static_cast<std::size_t>(sl[i]); t < static_cast<std::size_t>(sl[i + 1]); ++t)
      b += l[t] > T(-5) ? wide(l[t]) : wide(0);
    const wide off = n == 0 ? wide(0) : wide(a / n - b / m - (wide(rw[i]) - wide(rl[i])) - 2);
    total += off * off / 8; // the fifth has no chosen answer
    CHECK(of_values.within(size_of(wide(values[i] - off * off)), 1,
                           epsilon * off * off + 0x1p-48 * (1 + size_of(off))));
    for (auto t = static_cast<std::size_t>(sw[i]); t < static_cast<std::size_t>(sw[i + 1]); ++t) {
      const wide slope = w[t] < T(-0.5) ? wide(4 * off / n / 8) : wide(0);
      CHECK(of_slopes.within(size_of(wide(dw[t] - slope)), 1, epsilon * size_of(slope) + 0x1p-50));
    }
    for (auto t = static_cast<std::size_t>(sl[i]); t < static_cast<std::size_t>(sl[i + 1]); ++t) {
      const wide slope = n > 0 && l[t] > T(-5) ? wide(-4 * off / m / 8) : wide(0);
      CHECK(of_slopes.within(size_of(wide(dl[t] - slope)), 1, epsilon * size_of(slope) + 0x1p-50));
    }
  }
  CHECK(size_of(wide(value - total)) <= 4 * epsilon * total);
  CHECK(loss(chosen, rejected) == value);
  report_accuracy<T>("c_advipo", "", in_allowances, of_values, of_slopes);

  const auto before = dw;
  std::vector<std::int64_t> wrong = sw;
  wrong.back() += 1;
  CHECK_THROWS_WITH(loss({w, wrong, rw}, rejected, dw, dl),
                    ContainsSubstring("starts of the chosen[9]"));
  CHECK_THROWS_WITH(loss(chosen, {l, sl, {}}, dw, dl), ContainsSubstring("is missing"));
  CHECK_THROWS_WITH(loss({w, {}, rw}, rejected, dw, dl), ContainsSubstring("starts of the chosen"));
  CHECK_THROWS_WITH(loss(chosen, rejected, dw, dw), ContainsSubstring("gradient of the rejected"));
  CHECK(dw == before);
  CHECK_THROWS_WITH(perdita::c_advipo<T>({.beta = 0}), ContainsSubstring("beta is 0"));
  // No pairs; and a pair that is removed may have any reference.
  CHECK(loss({}, {}) == 0);
  const std::vector<T> two{-1, -2}, impossible{-1, -std::numeric_limits<T>::infinity()},
      present{1, 0};
  const std::vector<std::int64_t> each{0, 1, 2}, first{0, 1};
  CHECK(loss({two, each, impossible}, {two, each, two}, {}, {}, {.row_weights = present}) ==
        loss({{two.data(), 1}, first, {two.data(), 1}}, {{two.data(), 1}, first, {two.data(), 1}}));
}

TEST_CASE("unlearning: bad input", "[unlearning]") {
  const std::vector<double> p{-1, -2}, three{-1, -2, -3};
  std::vector<double> g(2, 5);
  CHECK_THROWS_WITH(perdita::npo<double>()({.policy = p}, g),
                    ContainsSubstring("reference is missing"));
  CHECK_THROWS_WITH(perdita::npo<double>()({.policy = p, .reference = three}, g),
                    ContainsSubstring("reference is 3 long"));
  CHECK_THROWS_WITH(perdita::simnpo<double>()({.policy = p}, g),
                    ContainsSubstring("lengths is missing"));
  CHECK_THROWS_WITH(perdita::gradient_ascent<double>()({.policy = p}, g),
                    ContainsSubstring("lengths is missing"));
  const perdita::npo<double> per_token({.per_token = true});
  CHECK_THROWS_WITH(per_token({.policy = p, .reference = p}, g),
                    ContainsSubstring("lengths is missing"));
  CHECK(g == std::vector<double>{5, 5});
  CHECK_THROWS_WITH(perdita::npo<float>({.beta = 0}), ContainsSubstring("npo: beta is 0"));
  CHECK_THROWS_WITH(perdita::npo_kto<float>({.beta = 0}), ContainsSubstring("npo_kto: beta is 0"));
  CHECK_THROWS_WITH(perdita::npo_kto<double>()({.policy = p, .reference = p}, inf, g),
                    ContainsSubstring("baseline is inf"));
  CHECK_THROWS_WITH(perdita::refusal_baseline<double>({.policy = p}),
                    ContainsSubstring("reference is missing"));
  CHECK_THROWS_WITH(perdita::simnpo<float>({.beta = -2}), ContainsSubstring("beta is -2"));
  CHECK_THROWS_WITH(perdita::simnpo<float>({.gamma = inf}), ContainsSubstring("gamma"));
  CHECK_THROWS_WITH(perdita::wga<float>({.beta = -1}), ContainsSubstring("beta is -1"));
  CHECK_THROWS_WITH(perdita::satimp<float>({.beta2 = nan}), ContainsSubstring("beta2"));
  CHECK_THROWS_WITH(perdita::undial<float>({.beta = -1}), ContainsSubstring("beta is -1"));
  CHECK_THROWS_WITH(perdita::unlikelihood<float>({.threshold = nan}),
                    ContainsSubstring("threshold"));
  // Nothing at all
  const std::vector<double> none;
  const std::vector<int> no_lengths;
  CHECK(perdita::npo<double>()({.policy = none, .reference = none}) == 0);
  CHECK(perdita::refusal_baseline<double>({.policy = none, .reference = none}) == 0);
  CHECK(perdita::simnpo<double>()({.policy = none, .lengths = no_lengths}) == 0);
}

TEST_CASE("unlearning: rewards, and other betas", "[unlearning]") {
  const std::vector<double> p{-20}, r{-19.2};
  const std::vector<int> n{8};
  std::vector<double> g(1), other(1), rewards(1);
  const perdita::sequence_scores<double> scores{.policy = p, .reference = r, .lengths = n};
  CHECK(perdita::npo_kto<double>({.beta = 0.4})(scores, 0, g) ==
        perdita::npo<double>({.beta = 0.4})(scores, other, {}, {.rewards = rewards}));
  CHECK(g == other);
  CHECK(std::abs(rewards[0] + 0.4 * 0.8) < 1e-15);
  perdita::simnpo<double>()(scores, {}, {}, {.rewards = rewards});
  CHECK(std::abs(rewards[0] + 2.5 * 2.5) < 1e-14);
}

TEST_CASE("c_advul: other cutoffs, weights and leaks", "[unlearning]") {
  const std::vector<double> a{-6, -4}, t{-1, -3}, u{-2, -6};
  const std::vector<int> two{2, 2};
  std::vector<double> da(2), dt(2), du(2);
  const perdita::c_advul<double> loss(
      {.utility_weight = 0.25, .away_cutoff = -2, .toward_cutoff = 1.5, .leak = 0.5});
  // −2.5 is below −2, and 1 below 1.5.
  CHECK(loss({.away = {.policy = a, .lengths = two},
              .toward = {.policy = t, .lengths = two},
              .utility = {.policy = u, .lengths = two}},
             {da, dt, du}) == 0.5 * (-2 - 1.25) + 0.5 * (1.5 + 0.5) + 0.25 * 2);
  CHECK((da == std::vector<double>(2, 0.0625) && dt == std::vector<double>(2, -0.0625)));
  CHECK(du == std::vector<double>(2, -0.0625));
}

TEST_CASE("c_advipo: other cutoffs, and what a call may ask", "[unlearning]") {
  const std::vector<double> w{-1, -2, -0.5}, l{-3, -1, -2, -4}, rw{-1, -0.5}, rl{-2, -1.5};
  const std::vector<std::int64_t> sw{0, 2, 3}, sl{0, 1, 4};
  const std::vector<double> weights{2, 0.5}, upstream{-1, 3};
  std::vector<double> dw(3, 1), dl(4, 1), values(2);
  const perdita::c_advipo<double>::options o{
      .beta = 0.5, .away_cutoff = -2.5, .toward_cutoff = 1.5};
  const perdita::c_advipo<double> loss(o);
  const perdita::token_scores<double> chosen{w, sw, rw}, rejected{l, sl, rl};
  // a: −2/2 and 0, 0 and −3/3; off by (−1 − 0) − (−1 + 2) − 1 = −3 and (0 + 1) − (−0.5 + 1.5) − 1
  CHECK(std::abs(loss(chosen, rejected, dw, dl,
                      {.row_weights = weights,
                       .upstream = upstream,
                       .scale = 2,
                       .accumulate = true,
                       .values = values}) -
                 18.5 / 2.5) < 1e-14);
  CHECK(values == std::vector<double>{18, 0.5});
  const double wanted_w[] = {1, 1 + 4.8, 1}, wanted_l[] = {1, 1.8, 1.8, 1};
  for (std::size_t k = 0; k < 3; ++k)
    CHECK(std::abs(dw[k] - wanted_w[k]) < 1e-14);
  for (std::size_t k = 0; k < 4; ++k)
    CHECK(std::abs(dl[k] - wanted_l[k]) < 1e-14);
  CHECK(loss(chosen, rejected, {}, {}, {.row_weights = weights, .normaliser = 5}) == 18.5 / 5);
  auto summed = o;
  summed.reduction = reduction::sum;
  CHECK(perdita::c_advipo<double>(summed)(chosen, rejected, {}, {}, {.row_weights = weights}) ==
        18.5);
}

} // namespace perdita_tests
