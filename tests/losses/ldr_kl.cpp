// SPDX-License-Identifier: MIT

// LDR-KL's descriptor: formula sheet 4.1.

#include <perdita/ldr.hpp>

#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/row_battery.hpp"
#include "support/softmax_reference.hpp"

namespace perdita_tests {
namespace {

template <class T> class ldr_kl_descriptor final : public row_descriptor<T> {
public:
  static constexpr double value_budget = 4, slope_budget = 4; // epsilons, before condition terms

  std::string name() const override { return "ldr_kl"; }
  int settings() const override { return 12; }
  double lambda(int setting) const {
    constexpr double lambdas[] = {1, 0.7, 0.1, 10};
    return static_cast<double>(static_cast<T>(lambdas[setting % 4]));
  }
  double margin(int setting) const {
    constexpr double margins[] = {0, 0.3, 2};
    return static_cast<double>(static_cast<T>(margins[setting / 4]));
  }
  std::string describe(int setting) const override {
    return "lambda " + perdita::core::to_text(lambda(setting)) + ", margin " +
           perdita::core::to_text(margin(setting));
  }
  std::vector<int> few_settings() const override { return {0, 9}; }
  std::unique_ptr<row_subject<T>> make(int setting, index,
                                       perdita::reduction reduction) const override {
    return std::make_unique<row_subject_of<perdita::ldr_kl<T>>>(
        perdita::ldr_kl<T>({.lambda = static_cast<T>(lambda(setting)),
                            .margin = static_cast<T>(margin(setting)),
                            .ignore_index = row_descriptor<T>::ignore_index,
                            .reduction = reduction}));
  }
  perdita::loss_traits traits(int) const override { return perdita::ldr_kl<T>::traits; }

  row_expectation expect(int setting, const row_input& row) const override {
    const wide l = lambda(setting), c = margin(setting);
    const auto y = static_cast<std::size_t>(row.label);
    const std::size_t n = row.scores.size();
    std::vector<wide> z, shifted; // x/λ, and δ/λ but for a constant
    for (std::size_t k = 0; k < n; ++k) {
      z.push_back(row.scores[k] / l);
      shifted.push_back((k == y ? row.scores[k] : wide(row.scores[k] + c)) / l);
    }
    const softmax_row plain(z), s(shifted);
    const rival_errors errors(z, y, l == 1 ? 0 : 0.5, T());

    row_expectation e;
    const wide log_classes = log(wide(static_cast<double>(n)));
    const wide value = l * (s.surprise(y) - log_classes);
    e.value = {value, l * ((s.surprise(y) + log_classes) * value_budget + s.miss(y) * errors.of_u)};
    for (std::size_t k = 0; k < n; ++k) {
      const wide size = k == y ? s.miss(y) : s.p(k);
      e.gradient.push_back(
          {k == y ? wide(-size) : size,
           size * (slope_budget + errors.of_u + (k == y ? wide(0) : errors.of_share(k)))});
    }
    const wide lse = plain.log_sum_exp;
    e.log_sum_exp = {lse, value_budget * larger(size_of(lse), size_of(z[plain.top])) +
                              plain.miss(y) * errors.of_u + errors.of_z[y]};
    e.target_log_probability = {-plain.surprise(y),
                                plain.surprise(y) * value_budget + plain.miss(y) * errors.of_u};
    e.entropy.reported = e.penalty.reported = false;
    e.hit = true;
    for (std::size_t k = 0; k < n; ++k)
      e.hit = e.hit && (k == y || row.scores[k] < row.scores[y]);
    return e;
  }
};

} // namespace

TEMPLATE_TEST_CASE("ldr_kl: the row battery", "[ldr_kl]", float, double) {
  check_row_loss(ldr_kl_descriptor<TestType>());
}

TEMPLATE_TEST_CASE("ldr_kl: special rows", "[ldr_kl]", float, double) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double undefined = std::numeric_limits<double>::quiet_NaN(), n = undefined;
  const double e1 = std::exp(1.0), p1 = e1 / (1 + e1);
  const std::vector<special_row> rows{
      {"one class", 0, {3}, 0, {}, 0, {0}},
      {"one class with a margin", 9, {3}, 0, {}, 0, {0}},
      {"half masked", 0, {7, 7, -inf, -inf}, 0, {}, -std::log(2.0), {-0.5, 0.5, 0, 0}},
      {"all rivals masked", 0, {-inf, 5, -inf}, 1, {}, -std::log(3.0), {0, 0, 0}},
      {"label masked", 0, {1, -inf, 0}, 1, {}, inf, {p1, -1, 1 - p1}},
      {"all masked", 0, {-inf, -inf, -inf}, 1, {}, inf, {0, -1, 0}},
      {"+inf at the label", 0, {0, inf, 1}, 1, {}, -std::log(3.0), {0, 0, 0}},
      {"+inf elsewhere", 0, {0, inf, 1}, 0, {}, n, {n, n, n}},
      {"NaN", 0, {0, 1, n}, 0, {}, n, {n, n, n}},
  };
  check_special(ldr_kl_descriptor<TestType>(), rows, 8);
}

// Formula sheet, appendix A.
TEST_CASE("ldr_kl: golden values", "[ldr_kl]") {
  const std::vector<double> x{0.5, -1.2, 2, 0.1};
  std::vector<double> g(4);
  const std::vector<int> label{0};
  const double value = perdita::ldr_kl<double>({.lambda = 0.7, .margin = 0.3})(
      perdita::matrix_view<const double>(x.data(), 1, 4), label,
      perdita::matrix_view<double>(g.data(), 1, 4));
  using Catch::Matchers::WithinAbs;
  CHECK_THAT(value, WithinAbs(0.929264202062, 1e-9));
  CHECK_THAT(g[0], WithinAbs(-0.933716524, 1e-8));
  CHECK_THAT(g[1], WithinAbs(0.00897049294, 1e-8));
  CHECK_THAT(g[2], WithinAbs(0.867286351, 1e-8));
  CHECK_THAT(g[3], WithinAbs(0.0574596801, 1e-8));
}

} // namespace perdita_tests
