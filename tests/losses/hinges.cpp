// SPDX-License-Identifier: MIT

// Descriptors of the hinges that need whole rows: formula sheet 4.3 and 4.4.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include <perdita/ldr.hpp>
#include <perdita/top_k_hinge.hpp>
#include <perdita/weston_watkins.hpp>

#include "support/catch.hpp"
#include "support/margin_descriptor.hpp"
#include "support/row_battery.hpp"

namespace perdita_tests {
namespace {

template <class T>
class weston_watkins_descriptor final : public margin_descriptor<T, perdita::weston_watkins<T>> {
public:
  bool twice_smooth() const override { return false; }
  bool sparse() const override { return true; }

  row_expectation expect(int setting, const row_input& row) const override {
    const auto y = static_cast<std::size_t>(row.label);
    row_expectation e = nothing_reported();
    wide active = 0;
    for (std::size_t k = 0; k < row.scores.size(); ++k) {
      const wide gap = row.scores[k] == -infinity()
                           ? -infinity()
                           : wide(row.scores[k] - row.scores[y] + this->margin(setting));
      const bool counts = k != y && gap > 0;
      e.value.value += counts ? gap : wide(0);
      // Each margin is rounded twice, and may be no longer above 0 then.
      e.value.slack += 2 * (size_of(row.scores[k] - row.scores[y]) + this->margin(setting));
      active += counts ? 1 : 0;
      e.gradient.push_back({counts ? wide(1) : wide(0), 0});
    }
    e.gradient[y] = {-active, 0};
    e.value.slack = e.value.value == 0 ? wide(0) : e.value.slack;
    return e;
  }
};

template <class T> class top_k_hinge_descriptor final : public row_descriptor<T> {
public:
  std::string name() const override { return "top_k_hinge"; }
  int settings() const override { return 6; }
  static index most(int setting) { return std::vector<index>{1, 2, 5}[std::size_t(setting % 3)]; }
  static double margin(int setting) { return setting < 3 ? 1 : 0; }
  std::string describe(int setting) const override {
    return "k " + std::to_string(most(setting)) + ", margin " +
           perdita::core::to_text(margin(setting));
  }
  std::vector<int> few_settings() const override { return {1}; }
  bool legal(int setting, row_kind, index cols) const override { return cols >= most(setting); }
  std::unique_ptr<row_subject<T>> make(int setting, index cols,
                                       perdita::reduction reduction) const override {
    return std::make_unique<row_subject_of<perdita::top_k_hinge<T>>>(
        perdita::top_k_hinge<T>({.k = std::min(cols, most(setting)),
                                 .margin = static_cast<T>(margin(setting)),
                                 .ignore_index = row_descriptor<T>::ignore_index,
                                 .reduction = reduction}));
  }
  perdita::loss_traits traits(int) const override { return perdita::top_k_hinge<T>::traits; }
  bool twice_smooth() const override { return false; }
  bool sparse() const override { return true; }

  row_expectation expect(int setting, const row_input& row) const override {
    const auto y = static_cast<std::size_t>(row.label);
    std::vector<wide> gaps;
    wide size = 0;
    for (std::size_t k = 0; k < row.scores.size(); ++k) {
      const bool masked = row.scores[k] == -infinity();
      gaps.push_back(masked   ? -infinity()
                     : k == y ? wide(0)
                              : wide(row.scores[k] - row.scores[y] + margin(setting)));
      if (!masked)
        size = larger(size, size_of(row.scores[k] - row.scores[y]));
    }
    std::vector<wide> sorted = gaps;
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    auto k = static_cast<std::size_t>(most(setting));
    while (sorted[k - 1] == -infinity())
      --k;
    const wide count = static_cast<double>(k), edge = sorted[k - 1];
    wide above = 0, equal = 0, sum = 0;
    for (const wide& g : gaps) {
      above += g > edge ? 1 : 0;
      equal += g == edge ? 1 : 0;
    }
    for (std::size_t i = 0; i < k; ++i)
      sum += sorted[i];
    row_expectation e = nothing_reported();
    e.value = {sum / count, 3 * (size + margin(setting))};
    for (std::size_t c = 0; c < gaps.size(); ++c) {
      const wide share = gaps[c] > edge    ? wide(1 / count)
                         : gaps[c] == edge ? wide((count - above) / (count * equal))
                                           : wide(0);
      const wide slope = c == y ? wide(share - 1) : share;
      e.gradient.push_back({slope, 2 * size_of(slope)});
    }
    return e;
  }
};

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double n = std::numeric_limits<double>::quiet_NaN();

} // namespace

TEMPLATE_TEST_CASE("weston_watkins: the row battery", "[hinges]", float, double) {
  check_row_loss(weston_watkins_descriptor<TestType>());
}
TEMPLATE_TEST_CASE("top_k_hinge: the row battery", "[hinges]", float, double) {
  check_row_loss(top_k_hinge_descriptor<TestType>());
}

TEMPLATE_TEST_CASE("weston_watkins: special rows", "[hinges]", float, double) {
  const std::vector<special_row> rows{
      {"one class", 0, {3}, 0, {}, 0, {0}},
      {"ties", 0, {7, 7, 7, 1}, 0, {}, 2, {-2, 1, 1, 0}},
      {"on the kink", 0, {8, 7, 7, 1}, 0, {}, 0, {0, 0, 0, 0}},
      {"all rivals masked", 0, {-inf, 5, -inf}, 1, {}, 0, {0, 0, 0}},
      {"label masked", 0, {1, -inf, 0}, 1, {}, inf, {1, -2, 1}},
      {"all masked", 0, {-inf, -inf, -inf}, 1, {}, 0, {0, 0, 0}},
      {"+inf at the label", 0, {0, inf, 1}, 1, {}, 0, {0, 0, 0}},
      {"+inf elsewhere", 0, {0, inf, 1}, 0, {}, inf, {-2, 1, 1}},
      {"NaN", 0, {0, 1, n}, 0, {}, n, {n, n, n}},
      {"NaN below", 0, {5, n, 1}, 0, {}, n, {n, n, n}},
      {"NaN at the label", 0, {5, n, 1}, 1, {}, n, {n, n, n}},
      {"appendix A", 0, {0.5, -1.2, 2, 0.1}, 0, {}, 3.1, {-2, 0, 1, 1}},
  };
  check_special(weston_watkins_descriptor<TestType>(), rows, 8);
}

TEMPLATE_TEST_CASE("top_k_hinge: special rows", "[hinges]", float, double) {
  const std::vector<special_row> rows{
      {"ties, k = 1", 0, {7, 7, 7, 1}, 0, {}, 1, {-1, 0.5, 0.5, 0}},
      {"k = 1 as Crammer and Singer", 0, {0.5, -1.2, 2, 0.1}, 0, {}, 2.5, {-1, 0, 1, 0}},
      {"k = 2", 1, {0.5, -1.2, 2, 0.1}, 0, {}, 1.55, {-1, 0, 0.5, 0.5}},
      {"k = 2, ties with the label", 4, {3, 3, 3, 1}, 0, {}, 0, {-2. / 3, 1. / 3, 1. / 3, 0}},
      {"k = 2, one left", 1, {-inf, 5, -inf}, 1, {}, 0, {0, 0, 0}},
      {"k = 5, four left", 2, {0, 1, -inf, 2, 3}, 3, {}, 0.25, {0.25, 0.25, 0, -0.75, 0.25}},
      {"label masked", 1, {1, -inf, 0}, 1, {}, inf, {0.5, -1, 0.5}},
      {"all masked", 1, {-inf, -inf, -inf}, 1, {}, inf, {0, -1, 0}},
      {"+inf elsewhere", 0, {0, inf, 1}, 0, {}, inf, {-1, 1, 0}},
      {"NaN", 1, {0, 1, n}, 0, {}, n, {n, n, n}},
      {"NaN at the label", 1, {0, 1, n}, 2, {}, n, {n, n, n}},
  };
  check_special(top_k_hinge_descriptor<TestType>(), rows, 8);
}

TEST_CASE("hinges: options out of range are refused", "[hinges]") {
  using Catch::Matchers::ContainsSubstring;
  const float infinite = std::numeric_limits<float>::infinity();
  CHECK_THROWS_WITH(perdita::weston_watkins<float>({.margin = infinite}),
                    ContainsSubstring("margin is inf"));
  CHECK_THROWS_WITH(perdita::top_k_hinge<float>({.margin = infinite}),
                    ContainsSubstring("margin is inf"));
  CHECK_THROWS_WITH(perdita::top_k_hinge<float>({.k = 0}), ContainsSubstring("k is 0"));
  const std::vector<float> x{0, 1};
  const std::vector<int> label{0};
  CHECK_THROWS_WITH(perdita::top_k_hinge<float>({.k = 3})(
                        perdita::matrix_view<const float>(x.data(), 1, 2), label),
                    ContainsSubstring("k is 3"));
}

} // namespace perdita_tests
