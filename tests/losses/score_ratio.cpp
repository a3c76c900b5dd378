// SPDX-License-Identifier: MIT

// Descriptors of the losses with another function in the place of the exponential: formula sheet
// 3.1 and 9.

#include <perdita/spherical.hpp>
#include <perdita/stablemax.hpp>

#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/row_battery.hpp"
#include "support/target_descriptor.hpp"

namespace perdita_tests {
namespace {

/// The function, its derivative, and how far its terms may be from their sum.
struct stablemax_function {
  static wide of(const wide& x) { return x >= 0 ? wide(x + 1) : wide(1 / (1 - x)); }
  static wide slope(const wide& x) { return x >= 0 ? wide(1) : wide(of(x) * of(x)); }
  static wide terms(const wide& x) { return of(x); }
  static wide slope_terms(const wide& x) { return slope(x); }
};
struct taylor_function {
  static wide of(const wide& x) { return 1 + x + x * x / 2; }
  static wide slope(const wide& x) { return 1 + x; }
  static wide terms(const wide& x) { return 1 + size_of(x) + x * x / 2; }
  static wide slope_terms(const wide& x) { return 1 + size_of(x); }
};
struct spherical_function {
  static constexpr double epsilon = 0.125;
  static wide of(const wide& x) { return x * x + epsilon; }
  static wide slope(const wide& x) { return 2 * x; }
  static wide terms(const wide& x) { return of(x); }
  static wide slope_terms(const wide& x) { return size_of(slope(x)); }
};

template <class Loss, class F>
class ratio_descriptor final : public row_descriptor<typename Loss::value_type> {
public:
  using T = typename Loss::value_type;
  static constexpr double value_budget = 4, slope_budget = 8; // epsilons, before condition terms

  explicit ratio_descriptor(typename Loss::options options) : options_(options) {}
  std::string name() const override { return Loss::name; }
  int settings() const override { return 1; }
  std::string describe(int) const override { return "plain"; }
  std::vector<int> few_settings() const override { return {0}; }
  /// Squares must be numbers of T; and rows far below zero leave nothing to divide by.
  bool legal(int, row_kind kind, index) const override {
    return kind != row_kind::huge && kind != row_kind::tiny;
  }
  std::unique_ptr<row_subject<T>> make(int, index, perdita::reduction reduction) const override {
    auto o = options_;
    o.ignore_index = row_descriptor<T>::ignore_index;
    o.reduction = reduction;
    return std::make_unique<row_subject_of<Loss>>(Loss(o));
  }
  perdita::loss_traits traits(int) const override { return Loss::traits; }

  row_expectation expect(int, const row_input& row) const override {
    const auto y = static_cast<std::size_t>(row.label);
    const auto counts = [&](std::size_t k) { return row.scores[k] > -infinity(); };
    wide rivals = 0, noise = 0;
    for (std::size_t k = 0; k < row.scores.size(); ++k)
      if (k != y && counts(k)) {
        rivals += F::of(row.scores[k]);
        noise += F::terms(row.scores[k]);
      }
    const bool masked = !counts(y);
    const wide own = masked ? wide(0) : F::of(row.scores[y]);
    const wide of_own = masked ? wide(0) : wide(2 * F::terms(row.scores[y]) / own); // relative
    const wide of_rivals = rivals > 0 ? wide(2 * noise / rivals) : wide(0);
    const wide sum = rivals + own, value = masked ? infinity() : wide(log1p(wide(rivals / own)));
    row_expectation e;
    e.value = {value,
               masked ? wide(0) : wide(value * value_budget + (of_own + of_rivals) * rivals / sum)};
    for (std::size_t k = 0; k < row.scores.size(); ++k) {
      if (!counts(k)) {
        e.gradient.push_back({0, 0});
        continue;
      }
      const wide factor = k == y ? wide(-rivals / (own * sum)) : wide(1 / sum);
      const wide relative = of_own + of_rivals;
      e.gradient.push_back(
          {F::slope(row.scores[k]) * factor, (F::slope_terms(row.scores[k]) * slope_budget +
                                              size_of(F::slope(row.scores[k])) * relative) *
                                                 size_of(factor)});
    }
    e.log_sum_exp.reported = e.target_log_probability.reported = false;
    e.entropy.reported = e.penalty.reported = e.hit_reported = false;
    return e;
  }

private:
  typename Loss::options options_;
};

template <class T>
using stablemax_descriptor = ratio_descriptor<perdita::stablemax<T>, stablemax_function>;
template <class T>
using taylor_descriptor = ratio_descriptor<perdita::taylor_softmax<T>, taylor_function>;
template <class T>
using spherical_descriptor = ratio_descriptor<perdita::spherical_softmax<T>, spherical_function>;

template <class T, class F> void for_all(F f) {
  f(stablemax_descriptor<T>({}));
  f(taylor_descriptor<T>({}));
  f(spherical_descriptor<T>({.epsilon = static_cast<T>(spherical_function::epsilon)}));
}

} // namespace

TEMPLATE_TEST_CASE("stablemax: the row battery", "[ratio]", float, double) {
  check_row_loss(stablemax_descriptor<TestType>({}));
}
TEMPLATE_TEST_CASE("taylor_softmax: the row battery", "[ratio]", float, double) {
  check_row_loss(taylor_descriptor<TestType>({}));
}
TEMPLATE_TEST_CASE("spherical_softmax: the row battery", "[ratio]", float, double) {
  check_row_loss(spherical_descriptor<TestType>(
      {.epsilon = static_cast<TestType>(spherical_function::epsilon)}));
}

TEMPLATE_TEST_CASE("stablemax, taylor_softmax, spherical_softmax: special rows", "[ratio]", float,
                   double) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double n = std::numeric_limits<double>::quiet_NaN();
  for_all<TestType>([&](const auto& d) {
    const std::vector<special_row> rows{
        {"one class", 0, {3}, 0, {}, 0, {0}},
        {"all rivals masked", 0, {-inf, 5, -inf}, 1, {}, 0, {0, 0, 0}},
        {"all masked", 0, {-inf, -inf, -inf}, 1, {}, inf, {0, 0, 0}},
        {"NaN", 0, {0, 1, n}, 0, {}, n, {n, n, n}},
        {"+inf at the label", 0, {1, inf, 2}, 1, {}, 0, {0, 0, 0}},
        {"+inf elsewhere", 0, {1, 2, inf}, 1, {}, n, {n, n, n}},
        {"+inf at both", 0, {1, inf, inf}, 1, {}, n, {n, n, n}},
    };
    check_special(d, rows, 4);
  });
  const std::vector<special_row> stable{
      {"two zeros", 0, {0, 0}, 0, {}, std::log(2.0), {-0.5, 0.5}},
      {"half masked", 0, {3, 3, -inf}, 1, {}, std::log(2.0), {0.125, -0.125, 0}},
      {"label masked", 0, {3, -inf, 3}, 1, {}, inf, {0.125, 0, 0.125}},
  };
  check_special(stablemax_descriptor<TestType>({}), stable, 4);
}

// Odds that are no number, or none whose logarithm with 1 could be told from that of less.
TEST_CASE("stablemax, taylor_softmax, spherical_softmax: no hope for the label", "[ratio]") {
  const auto check = [](const auto& loss, std::vector<double> x, double value,
                        std::vector<double> slopes) {
    std::vector<double> g(2);
    const double got = loss(perdita::matrix_view<const double>(x.data(), 1, 2), std::vector<int>{1},
                            perdita::matrix_view<double>(g.data(), 1, 2));
    INFO(x[0] << ", " << x[1] << ": " << got << " for " << value << ", slopes " << g[0] << ", "
              << g[1] << " for " << slopes[0] << ", " << slopes[1]);
    CHECK(std::abs(got - value) <= 1e-14 * value);
    for (std::size_t k : {0U, 1U})
      CHECK(std::abs(g[k] - slopes[k]) <= 1e-14 * std::abs(slopes[k]));
  };
  const double ten = std::log(10.0), two = std::log(2.0);
  for (const int power : {100, 149, 150, 151, 152, 153}) { // odds of 10^2·power
    const double large = std::pow(10.0, power);
    const perdita::stablemax<double> stable;
    check(stable, {large, -large}, 2 * power * ten, {1 / large, -1 / large});
    const perdita::taylor_softmax<double> taylor;
    check(taylor, {large, 0}, 2 * power * ten - two, {2 / large, -1});
    const perdita::spherical_softmax<double> spherical({.epsilon = 0});
    check(spherical, {1, 1 / large}, 2 * power * ten, {2, -2 * large});
  }
  check(perdita::stablemax<double>(), {1e300, -1e150}, 450 * ten, {1e-300, -1e-150});
}

// Formula sheet, appendix A.
TEST_CASE("stablemax, taylor_softmax, spherical_softmax: golden values", "[ratio]") {
  check_golden(perdita::stablemax<double>(), 1.39534419664,
               {-0.501501502, 0.0341250341, 0.165165165, 0.165165165});
  check_golden(perdita::taylor_softmax<double>(), 1.62470538456,
               {-0.741258741, -0.0242424242, 0.363636364, 0.133333333});
  check_golden(perdita::spherical_softmax<double>(), 2.85811089568,
               {-2.69320843, -0.393442623, 0.655737705, 0.0327868852});
}

TEST_CASE("spherical_softmax: options out of range are refused", "[ratio]") {
  using Catch::Matchers::ContainsSubstring;
  CHECK_THROWS_WITH(perdita::spherical_softmax<float>({.epsilon = -1}),
                    ContainsSubstring("epsilon is -1"));
}

} // namespace perdita_tests
