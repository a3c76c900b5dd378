// SPDX-License-Identifier: MIT

// The Brier score's descriptor: formula sheet 4.4, MSE.

#include <perdita/brier.hpp>

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

template <class T> class brier_descriptor final : public row_descriptor<T> {
public:
  static constexpr double value_budget = 4, slope_budget = 6; // epsilons, before condition terms

  std::string name() const override { return "brier"; }
  int settings() const override { return 1; }
  std::string describe(int) const override { return "plain"; }
  std::vector<int> few_settings() const override { return {0}; }
  std::unique_ptr<row_subject<T>> make(int, index, perdita::reduction reduction) const override {
    return std::make_unique<row_subject_of<perdita::brier<T>>>(perdita::brier<T>(
        {.ignore_index = row_descriptor<T>::ignore_index, .reduction = reduction}));
  }
  perdita::loss_traits traits(int) const override { return perdita::brier<T>::traits; }

  row_expectation expect(int, const row_input& row) const override {
    const auto y = static_cast<std::size_t>(row.label);
    const std::size_t n = row.scores.size();
    const softmax_row s(row.scores);
    const rival_errors errors(row.scores, y, 0, T());
    const wide hit = s.p(y), miss = s.miss(y);
    wide squares = 0, of_squares = 0; // of the rivals, and what errors of the shares do to it
    for (std::size_t k = 0; k < n; ++k)
      if (k != y) {
        squares += s.p(k) * s.p(k);
        of_squares += s.p(k) * s.p(k) * 2 * errors.of_share(k);
      }
    const wide value = miss * miss + squares;
    const wide of_u = errors.of_u; // moves log of miss by p_y, and log of hit by 1 - p_y, as much
    row_expectation e;
    e.value = {value, value * (value_budget + 2 * hit * of_u) + of_squares};
    for (std::size_t k = 0; k < n; ++k) {
      if (k == y) {
        e.gradient.push_back(
            {-2 * hit * value, 2 * hit * (value * (slope_budget + (2 + hit) * of_u) + of_squares)});
        continue;
      }
      const wide p = s.p(k), size = p + hit * miss + squares;
      e.gradient.push_back(
          {2 * p * (p + hit * miss - squares),
           2 * p * (size * (slope_budget + 2 * errors.of_share(k) + 3 * of_u) + of_squares)});
    }
    const wide c = s.surprise(y), lse = s.log_sum_exp;
    e.log_sum_exp = {lse,
                     value_budget * larger(size_of(lse), size_of(row.scores[s.top])) + miss * of_u};
    e.target_log_probability = {-c, c * value_budget + miss * of_u};
    e.entropy.reported = e.penalty.reported = false;
    e.hit = true;
    for (std::size_t k = 0; k < n; ++k)
      e.hit = e.hit && (k == y || row.scores[k] < row.scores[y]);
    return e;
  }
};

} // namespace

TEMPLATE_TEST_CASE("brier: the row battery", "[brier]", float, double) {
  check_row_loss(brier_descriptor<TestType>());
}

TEMPLATE_TEST_CASE("brier: special rows", "[brier]", float, double) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double n = std::numeric_limits<double>::quiet_NaN();
  const std::vector<special_row> rows{
      {"one class", 0, {3}, 0, {}, 0, {0}},
      {"half masked", 0, {7, 7, -inf, -inf}, 0, {}, 0.5, {-0.5, 0.5, 0, 0}},
      {"all rivals masked", 0, {-inf, 5, -inf}, 1, {}, 0, {0, 0, 0}},
      {"label masked", 0, {1, -inf, 1}, 1, {}, 1.5, {0, 0, 0}},
      {"all masked", 0, {-inf, -inf, -inf}, 1, {}, 1, {0, 0, 0}},
      {"+inf at the label", 0, {0, inf, 1}, 1, {}, 0, {0, 0, 0}},
      {"+inf elsewhere", 0, {0, inf, 1}, 0, {}, n, {n, n, n}},
      {"NaN", 0, {0, 1, n}, 0, {}, n, {n, n, n}},
  };
  check_special(brier_descriptor<TestType>(), rows, 8);
}

// By the definition, on the scores of the formula sheet's appendix A.
TEST_CASE("brier: the definition, as it stands", "[brier]") {
  double p[4], sum = 0, value = 0, mean = 0;
  const double x[] = {0.5, -1.2, 2, 0.1};
  for (int k = 0; k < 4; ++k)
    sum += p[k] = std::exp(x[k]);
  for (int k = 0; k < 4; ++k) {
    p[k] /= sum;
    value += (p[k] - (k == 0)) * (p[k] - (k == 0));
    mean += p[k] * (p[k] - (k == 0));
  }
  std::vector<double> g;
  for (int k = 0; k < 4; ++k)
    g.push_back(2 * p[k] * (p[k] - (k == 0) - mean));
  check_golden(perdita::brier<double>(), value, g);
}

} // namespace perdita_tests
