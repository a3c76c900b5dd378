// SPDX-License-Identifier: MIT

// The descriptor of distillation: formula sheet 13. The battery's soft targets are the teacher's
// scores; what makes students that are near their teachers comes after it.

#include <perdita/distillation.hpp>

#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/numbers.hpp"
#include "support/row_battery.hpp"
#include "support/softmax_reference.hpp"

namespace perdita_tests {
namespace {

using perdita::divergence;
constexpr divergence kinds[] = {divergence::forward_kl, divergence::reverse_kl,
                                divergence::jensen_shannon, divergence::total_variation};
constexpr const char* kind_names[] = {"forward KL", "reverse KL", "Jensen-Shannon",
                                      "total variation"};

template <class T> class distillation_descriptor final : public row_descriptor<T> {
public:
  std::string name() const override { return "distillation"; }
  int settings() const override { return 8; }
  static divergence kind(int setting) { return kinds[setting % 4]; }
  static double temperature(int setting) { return setting < 4 ? 1 : 0.125; }
  static double beta(int) { return 0.25; }
  std::string describe(int setting) const override {
    return std::string(kind_names[setting % 4]) + ", temperature " +
           perdita::core::to_text(temperature(setting));
  }
  std::vector<int> few_settings() const override { return {4, 6}; }
  bool soft(int) const override { return true; }
  std::unique_ptr<row_subject<T>> make(int setting, index,
                                       perdita::reduction reduction) const override {
    return std::make_unique<row_subject_of<perdita::distillation<T>>>(
        perdita::distillation<T>({.divergence = kind(setting),
                                  .temperature = static_cast<T>(temperature(setting)),
                                  .beta = static_cast<T>(beta(setting)),
                                  .reduction = reduction}));
  }
  perdita::loss_traits traits(int setting) const override {
    return perdita::distillation<T>({.divergence = kind(setting)}).traits();
  }
  bool twice_smooth() const override { return false; }
  bool sparse() const override { return true; } // total variation, shares that underflow

  row_expectation expect(int setting, const row_input& row) const override {
    const wide t = temperature(setting), b = beta(setting);
    std::vector<wide> x, y;
    for (std::size_t k = 0; k < row.scores.size(); ++k) {
      x.push_back(row.scores[k] / t);
      y.push_back(row.soft[k] / t);
    }
    row_expectation e = nothing_reported();
    const softmax_row p(x), q(y);
    if (p.all_masked || q.all_masked) {
      e.value = {not_a_number(), 0};
      e.gradient.assign(x.size(), {not_a_number(), 0});
      return e;
    }
    // r: what p is multiplied by in the slope; scale: its factor
    std::vector<wide> r;
    wide value = 0, size = 0, scale = t;
    for (std::size_t k = 0; k < x.size(); ++k) {
      const wide pk = p.p(k), qk = q.p(k), m = b * qk + (1 - b) * pk;
      const wide log_p = x[k] - p.log_sum_exp, log_q = y[k] - q.log_sum_exp;
      const auto entropy = [](const wide& share, const wide& ratio) {
        return weighted(share, ratio);
      };
      wide term = 0;
      switch (kind(setting)) {
      case divergence::forward_kl:
        term = entropy(qk, log_q - log_p);
        r.push_back(0);
        break;
      case divergence::reverse_kl:
        term = entropy(pk, log_p - log_q);
        r.push_back(log_p - log_q);
        break;
      case divergence::jensen_shannon:
        term = b * entropy(qk, wide(log(wide(qk / m)))) +
               (1 - b) * entropy(pk, wide(log(wide(pk / m))));
        r.push_back(pk > 0 ? wide(log(wide(pk / m))) : wide(0));
        scale = (1 - b) * t;
        break;
      case divergence::total_variation:
        term = size_of(wide(pk - qk)) / 2;
        r.push_back(pk > qk ? 1 : pk < qk ? -1 : 0);
        scale = t / 2;
        break;
      }
      value += term;
      size += size_of(term);
    }
    wide mean = 0, reach = 0;
    for (std::size_t k = 0; k < x.size(); ++k) {
      mean += weighted(p.p(k), r[k]);
      reach += weighted(p.p(k), size_of(r[k]));
    }
    // Scores are exact in double: only their quotients by T, shares and logarithms are rounded.
    wide spread = 0;
    for (std::size_t k = 0; k < x.size(); ++k)
      if (x[k] > -infinity())
        spread = larger(spread,
                        larger(size_of(wide(x[k] - p.z[p.top])), size_of(wide(y[k] - q.z[q.top]))));
    const wide fine = sizeof(T) == 8 ? wide(8 * (1 + spread)) : wide(1);
    const wide tops =
        sizeof(T) == 8 ? wide(size_of(p.log_sum_exp) + size_of(q.log_sum_exp)) : wide(0);
    e.value = {t * t * value,
               t * t * ((fine + tops) * (size + (is_finite(value) ? wide(1) : wide(0))))};
    for (std::size_t k = 0; k < x.size(); ++k) {
      const wide pk = p.p(k), qk = q.p(k);
      const bool forward = kind(setting) == divergence::forward_kl;
      const wide slope =
          forward ? wide(t * (pk - qk)) : wide(scale * weighted(pk, wide(r[k] - mean)));
      const wide of = forward ? wide(pk + qk) : wide(weighted(pk, wide(size_of(r[k]) + reach + 1)));
      e.gradient.push_back({slope, size_of(slope) + scale * of * (fine + tops)});
    }
    return e;
  }
};

} // namespace

TEMPLATE_TEST_CASE("distillation: the row battery", "[distillation]", float, double) {
  check_row_loss(distillation_descriptor<TestType>());
}

// All digits of a difference of 1e-3 to 1e-7, in double, against 113 bits.
TEST_CASE("distillation: a student near its teacher", "[distillation]") {
  random_numbers random(5);
  for (const double apart : {1e-3, 1e-5, 1e-7})
    for (int kind = 0; kind < 3; ++kind) {
      std::vector<double> x, t, g(40);
      for (int k = 0; k < 40; ++k) {
        t.push_back(3 * random.normal());
        x.push_back(t.back() + apart * random.normal());
      }
      const double value = perdita::distillation<double>(
          {.divergence = kinds[kind], .temperature = 2, .beta = 0.25})(
          perdita::matrix_view<const double>(x.data(), 1, 40),
          perdita::matrix_view<const double>(t.data(), 1, 40),
          perdita::matrix_view<double>(g.data(), 1, 40));
      std::vector<wide> zx, zt;
      for (int k = 0; k < 40; ++k) {
        zx.push_back(wide(x[std::size_t(k)]) / 2);
        zt.push_back(wide(t[std::size_t(k)]) / 2);
      }
      const softmax_row p(zx), q(zt);
      wide expected = 0, mean = 0;
      std::vector<wide> r;
      for (std::size_t k = 0; k < 40; ++k) {
        const wide m = q.p(k) / 4 + 3 * p.p(k) / 4;
        const wide l = (zx[k] - p.log_sum_exp) - (zt[k] - q.log_sum_exp),
                   to_m = log(wide(p.p(k) / m));
        expected += kind == 0   ? wide(-q.p(k) * l)
                    : kind == 1 ? wide(p.p(k) * l)
                                : wide(q.p(k) * log(wide(q.p(k) / m)) / 4 + 3 * p.p(k) * to_m / 4);
        r.push_back(kind == 1 ? l : to_m);
        mean += p.p(k) * r.back();
      }
      INFO(kind_names[kind] << ", " << apart);
      CHECK(std::abs(static_cast<double>((wide(value) - 4 * expected) / (4 * expected))) < 1e-13);
      double worst = 0;
      for (std::size_t k = 0; k < 40; ++k) {
        const wide slope = kind == 0   ? wide(2 * (p.p(k) - q.p(k)))
                           : kind == 1 ? wide(2 * p.p(k) * (r[k] - mean))
                                       : wide(1.5 * p.p(k) * (r[k] - mean));
        const wide size = p.p(k) * apart;
        worst = std::max(worst, static_cast<double>(size_of(wide(wide(g[k]) - slope)) / size));
      }
      CHECK(worst < 1e-13);
    }
}

TEMPLATE_TEST_CASE("distillation: special rows", "[distillation]", float, double) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double n = std::numeric_limits<double>::quiet_NaN();
  const std::vector<special_row> rows{
      {"the same", 0, {3, 1, 2}, -1, {3, 1, 2}, 0, {0, 0, 0}},
      {"one class", 2, {4}, -1, {3}, 0, {0}},
      {"masked for both", 0, {5, -inf, 5}, -1, {1, -inf, 1}, 0, {0, 0, 0}},
      {"masked for the student", 0, {5, -inf, -inf}, -1, {1, 1, -inf}, inf, {0.5, -0.5, 0}},
      {"masked for the teacher",
       0,
       {5, 5, -inf},
       -1,
       {1, -inf, -inf},
       std::log(2.0),
       {-0.5, 0.5, 0}},
      {"disjoint", 3, {5, -inf}, -1, {-inf, 1}, 1, {0, 0}},
      {"disjoint",
       2,
       {5, -inf},
       -1,
       {-inf, 1},
       -(0.25 * std::log(0.25) + 0.75 * std::log(0.75)),
       {0, 0}},
      {"all masked", 0, {-inf, -inf}, -1, {0, 0}, n, {n, n}},
      {"NaN", 1, {0, n}, -1, {0, 0}, n, {n, n}},
      {"NaN of the teacher", 1, {0, 0}, -1, {0, n}, n, {n, n}},
      {"+inf", 2, {0, inf}, -1, {0, 0}, n, {n, n}},
  };
  check_special(distillation_descriptor<TestType>(), rows, 8);
}

TEST_CASE("distillation: what is refused", "[distillation]") {
  using Catch::Matchers::ContainsSubstring;
  using loss = perdita::distillation<float>;
  CHECK_THROWS_WITH(loss({.temperature = 0}), ContainsSubstring("temperature is 0"));
  CHECK_THROWS_WITH(loss({.beta = 1}), ContainsSubstring("beta is 1"));
  CHECK_THROWS_WITH(loss({.divergence = static_cast<divergence>(9)}),
                    ContainsSubstring("divergence is 9"));
  const std::vector<float> x{0, 1};
  const std::vector<int> label{0};
  CHECK_THROWS_WITH(loss()(perdita::matrix_view<const float>(x.data(), 1, 2), label),
                    ContainsSubstring("target is labels"));
}

} // namespace perdita_tests
