// SPDX-License-Identifier: MIT

// The active passive losses' descriptor: formula sheet 4.4, NCE and what is added to it.

#include <perdita/active_passive.hpp>

#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include <perdita/comp_sum.hpp>
#include <perdita/robust.hpp>

#include "support/catch.hpp"
#include "support/row_battery.hpp"
#include "support/target_descriptor.hpp"

namespace perdita_tests {
namespace {

template <class T> class active_passive_descriptor final : public row_descriptor<T> {
public:
  static constexpr double value_budget = 4, slope_budget = 6; // epsilons, before condition terms
  using mae = perdita::comp_sum<T>;
  using agce = perdita::asymmetric_gce<T>;

  std::string name() const override { return "active_passive"; }
  int settings() const override { return 4; }
  double alpha(int setting) const { return setting == 3 ? 5 : setting == 2 ? 0 : 1; }
  double beta(int setting) const { return setting == 1 ? 0 : setting == 3 ? 0.25 : 1; }
  /// 1 - p, or AGCE with a = 3 and q = 2: (16 - (3 + p)^2) / 2.
  bool is_mae(int setting) const { return setting != 3; }
  std::string describe(int setting) const override {
    return "alpha " + perdita::core::to_text(alpha(setting)) + ", beta " +
           perdita::core::to_text(beta(setting)) + (is_mae(setting) ? ", MAE" : ", AGCE");
  }
  std::vector<int> few_settings() const override { return {0, 3}; }
  std::unique_ptr<row_subject<T>> make(int setting, index,
                                       perdita::reduction reduction) const override {
    const auto with = [&](const auto& passive) -> std::unique_ptr<row_subject<T>> {
      using loss = perdita::active_passive<std::remove_cvref_t<decltype(passive)>>;
      return std::make_unique<row_subject_of<loss>>(
          loss(passive, {.alpha = alpha(setting),
                         .beta = beta(setting),
                         .ignore_index = row_descriptor<T>::ignore_index,
                         .reduction = reduction}));
    };
    if (is_mae(setting))
      return with(mae({.tau = 2}));
    return with(agce({.a = 3, .q = 2}));
  }
  perdita::loss_traits traits(int) const override {
    return perdita::active_passive<mae>(mae({.tau = 2})).traits();
  }

  row_expectation expect(int setting, const row_input& row) const override {
    const auto y = static_cast<std::size_t>(row.label);
    const std::size_t count = row.scores.size();
    const softmax_row s(row.scores);
    const rival_errors errors(row.scores, y, 0, T());
    const wide a = alpha(setting), b = beta(setting), n = static_cast<double>(count);
    const wide c = s.surprise(y), miss = s.miss(y);
    // S, and what is rounded on the way to it: each score's distance to the shift, which is some
    // score of the row, and the log-sum-exp's.
    wide sum = 0, rounded = 0;
    for (std::size_t k = 0; k < count; ++k) {
      sum += s.surprise(k);
      rounded += 2 * s.surprise(k);
    }
    if (is_finite(sum))
      for (std::size_t k = 0; k < count; ++k)
        rounded += size_of(wide(row.scores[k] - row.scores[s.top]));
    const bool counts = is_finite(sum) && sum > 0;
    const wide inverse = counts ? wide(1 / sum) : wide(0);
    const wide nce = counts ? wide(c * inverse) : c == infinity() ? wide(1) : wide(0);
    const wide passive = is_mae(setting) ? miss : wide(miss * (7 + s.p(y)) / 2);
    const wide passive_slope = is_mae(setting) ? s.p(y) : wide(s.p(y) * (3 + s.p(y)));

    const wide of_sum = counts ? wide(rounded * inverse) : wide(0); // relative
    const wide of_c = miss * errors.of_u + (counts ? wide(c * value_budget) : wide(0));
    row_expectation e;
    e.value = {a * nce + b * passive, (a * nce + b * passive) * value_budget + a * nce * of_sum +
                                          (a * inverse + b * passive_slope) * of_c};
    const wide even = counts ? wide(a * c * inverse * inverse) : wide(0);
    const wide of_even = even * (slope_budget + 2 * of_sum) + a * inverse * inverse * of_c;
    const wide of_steep = (a * inverse + b * passive_slope) * slope_budget + a * inverse * of_sum +
                          n * of_even + b * 2 * passive_slope * of_c;
    const wide steep = a * inverse - n * even + b * passive_slope;
    for (std::size_t k = 0; k < count; ++k) {
      const wide share = k == y ? miss : s.p(k);
      const wide g = k == y
                         ? wide(-(a * inverse + b * passive_slope) * miss - even * (n * s.p(y) - 1))
                         : wide(steep * share + even);
      const wide relative = slope_budget + errors.of_u + (k == y ? wide(0) : errors.of_share(k));
      const wide terms = a * inverse + n * even + b * passive_slope;
      e.gradient.push_back({g, share * (of_steep + terms * relative) + of_even +
                                   (k == y ? wide(even * n * s.p(y) * relative) : wide(0))});
    }
    const wide lse = s.log_sum_exp;
    e.log_sum_exp = {lse, value_budget * larger(size_of(lse), size_of(row.scores[s.top])) +
                              miss * errors.of_u};
    e.target_log_probability = {-c, miss * errors.of_u + c * value_budget};
    e.entropy.reported = e.penalty.reported = false;
    e.hit = true;
    for (std::size_t k = 0; k < count; ++k)
      e.hit = e.hit && (k == y || row.scores[k] < row.scores[y]);
    return e;
  }
};

} // namespace

TEMPLATE_TEST_CASE("active_passive: the row battery", "[active_passive]", float, double) {
  check_row_loss(active_passive_descriptor<TestType>());
}

TEMPLATE_TEST_CASE("active_passive: special rows", "[active_passive]", float, double) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double n = std::numeric_limits<double>::quiet_NaN();
  const std::vector<special_row> rows{
      {"one class", 0, {3}, 0, {}, 0, {0}},
      {"two equal", 1, {7, 7}, 0, {}, 0.5, {-0.25 / std::log(2.0), 0.25 / std::log(2.0)}},
      {"half masked", 0, {7, 7, -inf, -inf}, 0, {}, 0.5, {-0.25, 0.25, 0, 0}},
      {"all rivals masked", 0, {-inf, 5, -inf}, 1, {}, 0, {0, 0, 0}},
      {"label masked", 0, {1, -inf, 0}, 1, {}, 2, {0, 0, 0}},
      {"all masked", 3, {-inf, -inf, -inf}, 1, {}, 5 + 0.25 * 3.5, {0, 0, 0}},
      {"+inf elsewhere", 0, {0, inf, 1}, 0, {}, n, {n, n, n}},
      {"NaN", 0, {0, 1, n}, 0, {}, n, {n, n, n}},
      {"+inf elsewhere, NCE alone", 1, {0, inf, 1}, 0, {}, n, {n, n, n}},
      {"NaN, NCE alone", 1, {0, 1, n}, 0, {}, n, {n, n, n}},
  };
  check_special(active_passive_descriptor<TestType>(), rows, 8);
}

TEST_CASE("active_passive: golden values", "[active_passive]") {
  const perdita::comp_sum<double> passive({.tau = 2});
  check_golden(perdita::active_passive(passive, {.beta = 0}), 0.231212813535,
               {-0.0948031665, 0.0292303567, 0.0356179122, 0.0299548976});
}

TEST_CASE("active_passive: options out of range are refused", "[active_passive]") {
  using Catch::Matchers::ContainsSubstring;
  const perdita::comp_sum<float> passive({.tau = 2});
  CHECK_THROWS_WITH(perdita::active_passive(passive, {.alpha = -1}),
                    ContainsSubstring("alpha is -1"));
  CHECK_THROWS_WITH(perdita::active_passive(passive, {.beta = -1}),
                    ContainsSubstring("beta is -1"));
}

} // namespace perdita_tests
