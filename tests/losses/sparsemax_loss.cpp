// SPDX-License-Identifier: MIT

// The sparsemax loss's descriptor: formula sheet 8.

#include <perdita/sparsemax.hpp>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/row_battery.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

template <class T> class sparsemax_descriptor final : public row_descriptor<T> {
public:
  // In epsilons; probabilities and threshold are at most 1 from the largest score, and so are the
  // errors of both absolute.
  static constexpr double value_budget = 4, slope_budget = 2;

  std::string name() const override { return "sparsemax_loss"; }
  int settings() const override { return 1; }
  std::string describe(int) const override { return "plain"; }
  std::vector<int> few_settings() const override { return {0}; }
  bool twice_smooth() const override { return false; }
  bool sparse() const override { return true; }
  std::unique_ptr<row_subject<T>> make(int, index, perdita::reduction reduction) const override {
    return std::make_unique<row_subject_of<perdita::sparsemax_loss<T>>>(perdita::sparsemax_loss<T>(
        {.ignore_index = row_descriptor<T>::ignore_index, .reduction = reduction}));
  }
  perdita::loss_traits traits(int) const override { return perdita::sparsemax_loss<T>::traits; }

  row_expectation expect(int, const row_input& row) const override {
    const auto y = static_cast<std::size_t>(row.label);
    const std::vector<wide>& x = row.scores;
    std::vector<wide> sorted = x;
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    const wide top = sorted[0];
    // The support is the longest prefix with 1 + k z_(k) > Σ_{i ≤ k} z_(i).
    wide sum = 0, threshold = 0, squares = 0, size = 0;
    for (std::size_t k = 1; k <= sorted.size() && sorted[k - 1] > -infinity(); ++k) {
      const wide z = sorted[k - 1] - top;
      if (1 + static_cast<double>(k) * z <= sum + z)
        break;
      sum += z;
      squares += z * z;
      size = static_cast<double>(k);
      threshold = (sum - 1) / size;
    }
    row_expectation e;
    const wide behind = top - x[y];
    const wide value = (squares - size * threshold * threshold + 1) / 2 + behind;
    e.value = {value, value * value_budget +
                          (sizeof(T) == 8 ? wide(value_budget * (1 + squares)) : wide(1e-8))};
    for (std::size_t k = 0; k < x.size(); ++k) {
      const wide p = x[k] > -infinity() ? larger(wide(0), wide(x[k] - top - threshold)) : wide(0);
      const bool outside = x[k] == -infinity() || x[k] - top - threshold < -1e-5;
      e.gradient.push_back({k == y ? wide(p - 1) : p, outside ? wide(0) : wide(slope_budget)});
    }
    e.log_sum_exp.reported = e.target_log_probability.reported = false;
    e.entropy.reported = e.penalty.reported = e.hit_reported = false;
    return e;
  }
};

} // namespace

TEMPLATE_TEST_CASE("sparsemax_loss: the row battery", "[sparsemax]", float, double) {
  check_row_loss(sparsemax_descriptor<TestType>());
}

TEMPLATE_TEST_CASE("sparsemax_loss: special rows", "[sparsemax]", float, double) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double n = std::numeric_limits<double>::quiet_NaN();
  const std::vector<special_row> rows{
      {"one class", 0, {3}, 0, {}, 0, {0}},
      {"all equal", 0, {7, 7, 7, 7}, 2, {}, 0.375, {0.25, 0.25, -0.75, 0.25}},
      {"margin of 1", 0, {2, 1, 0}, 0, {}, 0, {0, 0, 0}},
      {"margin of 3", 0, {2, -1, -2}, 0, {}, 0, {0, 0, 0}},
      {"two classes, half a margin", 0, {0.5, 0}, 0, {}, 0.0625, {-0.25, 0.25}},
      {"two classes, far behind", 0, {0, 5}, 0, {}, 5, {-1, 1}},
      {"masked", 0, {0, -inf, 0}, 0, {}, 0.25, {-0.5, 0, 0.5}},
      {"all rivals masked", 0, {-inf, 5, -inf}, 1, {}, 0, {0, 0, 0}},
      {"label masked", 0, {1, -inf, 0}, 1, {}, inf, {1, -1, 0}},
      {"all masked", 0, {-inf, -inf, -inf}, 1, {}, inf, {0, -1, 0}},
      {"NaN", 0, {0, 1, n}, 0, {}, n, {n, n, n}},
      {"+inf", 0, {0, 1, inf}, 0, {}, n, {n, n, n}},
      {"appendix A", 0, {0.5, -1.2, 2, 0.1}, 0, {}, 1.5, {-1, 0, 1, 0}},
  };
  check_special(sparsemax_descriptor<TestType>(), rows, 8);
}

TEMPLATE_TEST_CASE("sparsemax_loss: threads", "[sparsemax][threads]", float, double) {
  check_threads(sparsemax_descriptor<TestType>());
}

} // namespace perdita_tests
