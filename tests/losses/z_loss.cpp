// SPDX-License-Identifier: MIT

// The Z-loss's descriptor: formula sheet 3.2.

#include <perdita/z_loss.hpp>

#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/numbers.hpp"
#include "support/row_battery.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

template <class T> class z_loss_descriptor final : public row_descriptor<T> {
public:
  static constexpr double value_budget = 4, slope_budget = 8; // epsilons, before condition terms
  static constexpr double score_budget = 4;                   // of a standard score

  std::string name() const override { return "z_loss"; }
  int settings() const override { return 9; }
  double a(int setting) const {
    constexpr double choices[] = {1, 0.5, 5};
    return choices[setting % 3];
  }
  double b(int setting) const {
    constexpr double choices[] = {0, 2, -1.5};
    return choices[setting / 3];
  }
  std::string describe(int setting) const override {
    return "a " + perdita::core::to_text(a(setting)) + ", b " + perdita::core::to_text(b(setting));
  }
  std::vector<int> few_settings() const override { return {0, 4}; }
  /// There are no masked classes, and the squares of the scores must be numbers of T.
  bool legal(int, row_kind kind, index) const override {
    const bool extreme = kind == row_kind::huge || kind == row_kind::tiny;
    return kind != row_kind::masked && !(extreme && sizeof(T) == 4);
  }
  std::unique_ptr<row_subject<T>> make(int setting, index,
                                       perdita::reduction reduction) const override {
    return std::make_unique<row_subject_of<perdita::z_loss<T>>>(
        perdita::z_loss<T>({.a = static_cast<T>(a(setting)),
                            .b = static_cast<T>(b(setting)),
                            .ignore_index = row_descriptor<T>::ignore_index,
                            .reduction = reduction}));
  }
  perdita::loss_traits traits(int) const override { return perdita::z_loss<T>::traits; }

  row_expectation expect(int setting, const row_input& row) const override {
    const auto y = static_cast<std::size_t>(row.label);
    const std::size_t count = row.scores.size();
    const wide n = static_cast<double>(count), sharpness = a(setting), level = b(setting);
    wide mean = 0, variance = 0;
    for (const wide& x : row.scores)
      mean += x / n;
    for (const wide& x : row.scores)
      variance += (x - mean) * (x - mean) / n;
    // Scores that are all the same: the mean above is off by its rounding.
    bool flat = true;
    for (const wide& x : row.scores)
      flat = flat && x == row.scores[0];
    const wide inverse = flat ? wide(0) : wide(1 / sqrt(variance));
    const auto standard = [&](std::size_t k) { return wide((row.scores[k] - mean) * inverse); };
    const wide z = flat ? wide(0) : standard(y), u = sharpness * (level - z);
    // An error of z moves u, and the slope of softplus with it.
    const wide of_u =
        sharpness * size_of(z) * score_budget + (sizeof(T) == 8 ? size_of(u) : wide(0));

    row_expectation e;
    e.value = {softplus(u) / sharpness,
               softplus(u) / sharpness * value_budget + logistic(u) * of_u / sharpness};
    const wide steep = logistic(u) * inverse;
    for (std::size_t k = 0; k < count; ++k) {
      const wide zk = flat ? wide(0) : standard(k);
      const wide own = k == y ? steep : wide(0), even = steep / n, tilt = steep * z * zk / n;
      e.gradient.push_back(
          {even + tilt - own, (own + even + size_of(tilt)) * (slope_budget + of_u * logistic(-u)) +
                                  size_of(steep * z / n) * slope_budget});
    }
    e.log_sum_exp.reported = e.target_log_probability.reported = false;
    e.entropy.reported = e.penalty.reported = e.hit_reported = false;
    return e;
  }
};

} // namespace

TEMPLATE_TEST_CASE("z_loss: the row battery", "[z_loss]", float, double) {
  check_row_loss(z_loss_descriptor<TestType>());
}

TEMPLATE_TEST_CASE("z_loss: special rows", "[z_loss]", float, double) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double n = std::numeric_limits<double>::quiet_NaN();
  const std::vector<special_row> rows{
      {"one class", 0, {3}, 0, {}, std::log(2.0), {0}},
      {"all equal", 0, {7, 7, 7, 7}, 2, {}, std::log(2.0), {0, 0, 0, 0}},
      {"all equal to no sum of halves", 0, {0.1, 0.1, 0.1}, 2, {}, std::log(2.0), {0, 0, 0}},
      {"two classes", 0, {1, -1}, 0, {}, std::log1p(std::exp(-1.0)), {0, 0}},
      {"NaN", 0, {0, 1, n}, 0, {}, n, {n, n, n}},
      {"+inf", 0, {0, 1, inf}, 0, {}, n, {n, n, n}},
      {"-inf", 0, {0, 1, -inf}, 0, {}, n, {n, n, n}},
  };
  check_special(z_loss_descriptor<TestType>(), rows, 8);
}

// The squares of all distances are 0, that of their sum, in double, is not.
TEST_CASE("z_loss: a spread that float cannot square counts as none", "[z_loss]") {
  const std::vector<float> x{1e-24F, 2.3e-24F, -0.7e-24F};
  std::vector<float> g(3, 7.0F);
  const std::vector<int> label{1};
  const float value = perdita::z_loss<float>()(perdita::matrix_view<const float>(x.data(), 1, 3),
                                               label, perdita::matrix_view<float>(g.data(), 1, 3));
  CHECK(value == std::log(2.0F));
  CHECK(g == std::vector<float>(3, 0.0F));
}

// μ is a quotient: what a product with 1/K rounds, for 49 classes say, would be a σ to divide by.
TEMPLATE_TEST_CASE("z_loss: equal scores of any number of classes", "[z_loss]", float, double) {
  using T = TestType;
  constexpr index most_classes = 1300, column_rows = 20;
  const perdita::z_loss<T> loss({.a = 2, .b = T(0.25)});
  const double expected = std::log1p(std::exp(0.5)) / 2;
  random_numbers random(1);
  std::size_t wrong = 0;
  for (index cols = 1; cols <= most_classes; ++cols)
    for (const auto& [row_stride, col_stride] :
         {std::pair{cols, index{1}}, {index{1}, column_rows}}) {
      const index rows = col_stride == 1 ? 3 : column_rows;
      const auto size = static_cast<std::size_t>(rows * cols);
      std::vector<T> x(size), gradient(size, T(7)), values(static_cast<std::size_t>(rows));
      const perdita::matrix_view<T> scores(x.data(), rows, cols, row_stride, col_stride);
      for (index r = 0; r < rows; ++r) {
        const auto score = static_cast<T>(random.uniform(-1000, 1000));
        for (index c = 0; c < cols; ++c)
          x[static_cast<std::size_t>(r * row_stride + c * col_stride)] = score;
      }
      const std::vector<index> labels(static_cast<std::size_t>(rows), cols / 2);
      loss(scores, labels,
           perdita::matrix_view<T>(gradient.data(), rows, cols, row_stride, col_stride),
           {.values = values});
      for (const T v : values)
        wrong += !(std::abs(static_cast<double>(v) - expected) <=
                   4 * static_cast<double>(std::numeric_limits<T>::epsilon()));
      for (const T g : gradient)
        wrong += g != 0;
    }
  CHECK(wrong == 0);
}

// Formula sheet, appendix A.
TEST_CASE("z_loss: golden values", "[z_loss]") {
  const std::vector<double> x{0.5, -1.2, 2, 0.1};
  std::vector<double> g(4);
  const std::vector<int> label{0};
  const double value = perdita::z_loss<double>({.a = 0.5, .b = 2})(
      perdita::matrix_view<const double>(x.data(), 1, 4), label,
      perdita::matrix_view<double>(g.data(), 1, 4));
  using Catch::Matchers::WithinAbs;
  CHECK_THAT(value, WithinAbs(2.53129623116, 1e-9));
  CHECK_THAT(g[0], WithinAbs(-0.469088454, 1e-8));
  CHECK_THAT(g[1], WithinAbs(0.129195533, 1e-8));
  CHECK_THAT(g[2], WithinAbs(0.187152407, 1e-8));
  CHECK_THAT(g[3], WithinAbs(0.152740513, 1e-8));
}

} // namespace perdita_tests
