// SPDX-License-Identifier: MIT

// normmax, its Jacobian product and normmax_loss with labels: formula sheet 8.4. Soft targets are
// in fenchel_young.cpp.

#include <perdita/normmax.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/map_rows.hpp"
#include "support/numbers.hpp"
#include "support/row_battery.hpp"
#include "support/simplex_reference.hpp"

namespace perdita_tests {
namespace {

constexpr double alphas[] = {2, 1.5, 1.25, 3};

/// What an error of a few epsilons in every base makes of the row.
struct normmax_errors {
  wide fine = 8 * std::numeric_limits<double>::epsilon(), all = 0;

  explicit normmax_errors(const exact_prediction& e) {
    for (std::size_t j = 0; j < e.p.size(); ++j)
      all += e.base[j] < 1 ? e.spread(j, fine) : wide(0);
  }
  /// Of p_j, where its own base has this error and the sum has all of theirs.
  wide of(const exact_prediction& e, std::size_t j, const wide& own) const {
    return e.spread(j, own) + e.p[j] * all;
  }
};

template <class T> class normmax_descriptor final : public row_descriptor<T> {
public:
  static constexpr double value_budget = 4, slope_budget = 2; // epsilons

  std::string name() const override { return "normmax_loss"; }
  int settings() const override { return static_cast<int>(std::size(alphas)); }
  std::string describe(int s) const override {
    return "alpha " + perdita::core::to_text(alphas[s]);
  }
  std::vector<int> few_settings() const override { return {0}; }
  bool twice_smooth() const override { return false; }
  bool sparse() const override { return true; }
  std::unique_ptr<row_subject<T>> make(int s, index, perdita::reduction reduction) const override {
    return std::make_unique<row_subject_of<perdita::normmax_loss<T>>>(
        perdita::normmax_loss<T>({.alpha = alphas[s],
                                  .ignore_index = row_descriptor<T>::ignore_index,
                                  .reduction = reduction}));
  }
  perdita::loss_traits traits(int) const override { return perdita::normmax_loss<T>::traits; }

  row_expectation expect(int s, const row_input& row) const override {
    const auto y = static_cast<std::size_t>(row.label);
    const exact_prediction r(map_kind::normmax, alphas[s], row.scores);
    const normmax_errors errors(r);
    const wide epsilon = std::numeric_limits<T>::epsilon();
    const wide coarse = alphas[s] == 2 ? larger(errors.fine, epsilon) : errors.fine;
    row_expectation e = nothing_reported();
    const wide value = (r.top - row.scores[y]) + (1 - r.first);
    wide shift = 0;
    for (std::size_t k = 0; k < row.scores.size(); ++k)
      shift += weighted(r.p[k], wide(r.top - row.scores[k]));
    e.value = {value, value * value_budget + shift * errors.fine / epsilon};
    for (std::size_t k = 0; k < row.scores.size(); ++k) {
      const wide slope = k == y ? wide(r.p[k] - 1) : r.p[k];
      const wide error = row.scores[k] == -infinity()
                             ? wide(0)
                             : wide(errors.of(r, k, k == y ? errors.fine : coarse));
      e.gradient.push_back({slope, slope_budget * size_of(slope) + error / epsilon});
    }
    return e;
  }
};

} // namespace

TEMPLATE_TEST_CASE("normmax_loss: the row battery", "[normmax]", float, double) {
  check_row_loss(normmax_descriptor<TestType>());
}

TEMPLATE_TEST_CASE("normmax_loss: special rows", "[normmax]", float, double) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double n = std::numeric_limits<double>::quiet_NaN();
  // Settings 0, 1 and 3 are α = 2, 1.5 and 3.
  const std::vector<special_row> rows{
      {"one class", 0, {3}, 0, {}, 0, {0}},
      {"all equal", 0, {7, 7, 7, 7}, 2, {}, 0.5, {0.25, 0.25, -0.75, 0.25}},
      {"all equal, order 3/2",
       1,
       {7, 7, 7, 7, 7, 7, 7, 7},
       0,
       {},
       0.5,
       {-0.875, 0.125, 0.125, 0.125, 0.125, 0.125, 0.125, 0.125}},
      {"margin of 1", 0, {2, 1, 0}, 0, {}, 0, {0, 0, 0}},
      {"margin of 1, order 3/2", 1, {2, 1, 0}, 0, {}, 0, {0, 0, 0}},
      {"margin of 5", 3, {2, -3, -4}, 0, {}, 0, {0, 0, 0}},
      // w = 4/5 and 3/5, p in their proportion
      {"Pythagoras", 0, {0.5, 0.5 - 0.2}, 1, {}, 0.4, {4. / 7, -4. / 7}},
      {"far behind", 0, {0, 5}, 0, {}, 5, {-1, 1}},
      {"masked", 0, {0, -inf, 0}, 0, {}, 1 - std::sqrt(0.5), {-0.5, 0, 0.5}},
      {"all rivals masked", 0, {-inf, 5, -inf}, 1, {}, 0, {0, 0, 0}},
      {"label masked", 0, {1, -inf, -1}, 1, {}, inf, {1, -1, 0}},
      {"all masked", 0, {-inf, -inf, -inf}, 1, {}, inf, {0, -1, 0}},
      {"NaN", 0, {0, 1, n}, 0, {}, n, {n, n, n}},
      {"NaN, order 3", 3, {0, 1, n}, 0, {}, n, {n, n, n}},
      {"+inf", 0, {0, 1, inf}, 0, {}, n, {n, n, n}},
  };
  check_special(normmax_descriptor<TestType>(), rows, 8);
}

TEMPLATE_TEST_CASE("normmax_loss: threads", "[normmax][threads]", float, double) {
  check_threads(normmax_descriptor<TestType>());
}

TEST_CASE("normmax_loss: the digits of a label that wins", "[normmax]") {
  for (const double alpha : {1.25, 1.5, 2., 3.})
    for (const double share : {1e-3, 0.02, 0.1}) {
      // One rival, inside the margin by this share of it.
      const std::vector<double> x{0, -(1 - share)};
      const exact_prediction r(map_kind::normmax, alpha, {0, x[1]});
      const std::vector<int> label{0};
      std::vector<double> g(2);
      const double value = perdita::normmax_loss<double>({.alpha = alpha})(
          perdita::matrix_view<const double>(x.data(), 1, 2), label,
          perdita::matrix_view<double>(g.data(), 1, 2));
      const wide error = (0x1p-50 / share + 0x1p-48) * (1 + 1 / (wide(alpha) - 1));
      INFO("alpha " << alpha << ", share " << share << ": " << value << " for "
                    << text(wide(1 - r.first)) << ", " << g[0] << " for " << text(wide(-r.p[1])));
      CHECK(size_of(value - (1 - r.first)) <= error * (1 - r.first));
      CHECK(size_of(g[0] + r.p[1]) <= error * r.p[1]);
    }
}

TEMPLATE_TEST_CASE("normmax: values of every kind of row", "[normmax]", float, double) {
  using T = TestType;
  const wide epsilon = std::numeric_limits<T>::epsilon();
  std::size_t compared = 0, wrong = 0;
  std::string last;
  error_judge errors_of_p;
  for (const double alpha : alphas)
    for (const index cols : {1, 2, 3, 17, 100, 1100}) {
      const row_major<T> x = make_rows<T>(cols);
      row_major<T> p(x.rows(), cols);
      std::vector<index> support(static_cast<std::size_t>(x.rows()), -1);
      perdita::normmax(x, p, {.alpha = alpha, .support = support});
      for (index r = 0; r < x.rows(); ++r) {
        const exact_prediction e(map_kind::normmax, alpha, row_of(x, r));
        const normmax_errors errors(e);
        index least = 0, most = 0;
        for (index c = 0; c < cols; ++c) {
          const auto j = static_cast<std::size_t>(c);
          const wide own = alpha == 2 ? larger(errors.fine, epsilon) : errors.fine;
          const wide allowed =
              2 * epsilon * e.p[j] + errors.of(e, j, own) + wide(std::numeric_limits<T>::min());
          const bool outside = e.base[j] < -1e-5;
          least += e.base[j] > errors.fine;
          most += e.base[j] > -errors.fine;
          ++compared;
          if (!errors_of_p.within(size_of(wide(p(r, c)) - e.p[j]), 1, allowed) ||
              (outside && p(r, c) != 0)) {
            ++wrong;
            last = "alpha " + perdita::core::to_text(alpha) + ", " + std::to_string(cols) +
                   " columns, row " + std::to_string(r) + ", column " + std::to_string(c) + ": " +
                   perdita::core::to_text(p(r, c)) + " for " + text(e.p[j]);
          }
        }
        const index got = support[static_cast<std::size_t>(r)];
        INFO("alpha " << alpha << ", " << cols << " columns, row " << r << ": support " << got);
        CHECK((got >= least && got <= most));
      }
      const column_major<T> columns = x;
      column_major<T> p_columns(x.rows(), cols);
      perdita::normmax(columns, p_columns, {.alpha = alpha});
      CHECK(same_bits(p, p_columns));
      row_major<T> over = x, serial = x;
      perdita::normmax(over, over, {.alpha = alpha});
      CHECK(same_bits(p, over));
      perdita::normmax(x, serial, {.alpha = alpha, .run_on = perdita::serial});
      CHECK(same_bits(p, serial));
    }
  report_accuracy<T>("normmax", "", in_allowances, {errors_of_p.worst(), -1, errors_of_p.share()});
  INFO(wrong << " of " << compared << " wrong, the last: " << last);
  CHECK(wrong == 0);
  CHECK(compared > 50000);
}

TEMPLATE_TEST_CASE("normmax: backward", "[normmax]", float, double) {
  using T = TestType;
  const wide epsilon = std::numeric_limits<T>::epsilon();
  std::size_t compared = 0, wrong = 0;
  std::string last;
  error_judge of_slopes;
  for (const double alpha : {1.25, 1.5, 2., 3.})
    for (const index cols : {1, 2, 3, 17, 300}) {
      const row_major<T> x = make_rows<T>(cols);
      random_numbers random(4);
      row_major<T> d(x.rows(), cols), p = d, got = d;
      for (index r = 0; r < x.rows(); ++r)
        for (index c = 0; c < cols; ++c)
          d(r, c) = static_cast<T>(random.uniform(-2, 2));
      perdita::normmax(x, p, {.alpha = alpha});
      perdita::normmax_backward(p, d, got, {.alpha = alpha});
      for (index r = 0; r < x.rows(); ++r) {
        // s = p^{2−α} and ‖p‖^{α−1} as they stand in the formula sheet
        const std::vector<wide> share = row_of(p, r), b = row_of(d, r);
        wide mean = 0, sum = 0, product = 0, size = 0, powers = 0;
        std::vector<wide> s;
        for (std::size_t j = 0; j < share.size(); ++j) {
          s.push_back(share[j] > 0 ? pow(share[j], wide(2 - alpha)) : wide(0));
          mean += share[j] * b[j];
          sum += s[j];
          product += s[j] * b[j];
          size += s[j] * (size_of(b[j]) + 2);
          powers += raise(share[j], alpha);
        }
        const wide factor = pow(powers, wide((alpha - 1) / alpha)) / (wide(alpha) - 1);
        for (std::size_t j = 0; j < share.size(); ++j) {
          const wide expected = factor * (s[j] * (b[j] - mean) - share[j] * (product - mean * sum));
          const wide error = 2 * epsilon * size_of(expected) +
                             wide(0x1p-48) * factor * (s[j] * 4 + share[j] * size) +
                             wide(std::numeric_limits<T>::min());
          const T result = got(r, static_cast<index>(j));
          ++compared;
          if (!of_slopes.within(size_of(wide(result) - expected), 1, error)) {
            ++wrong;
            last = "alpha " + perdita::core::to_text(alpha) + ", " + std::to_string(cols) +
                   " columns, row " + std::to_string(r) + ", column " + std::to_string(j) + ": " +
                   perdita::core::to_text(result) + " for " + text(expected);
          }
        }
      }
      const column_major<T> p_columns = p, d_columns = d;
      column_major<T> across(x.rows(), cols);
      perdita::normmax_backward(p_columns, d_columns, across, {.alpha = alpha});
      CHECK(same_bits(got, across));
      row_major<T> over = p, over_d = d;
      perdita::normmax_backward(over, d, over, {.alpha = alpha});
      CHECK(same_bits(got, over));
      perdita::normmax_backward(p, over_d, over_d, {.alpha = alpha});
      CHECK(same_bits(got, over_d));
    }
  report_accuracy<T>("normmax", "backward", in_allowances,
                     {-1, of_slopes.worst(), of_slopes.share()});
  INFO(wrong << " of " << compared << " wrong, the last: " << last);
  CHECK(wrong == 0);
  CHECK(compared > 20000);
}

TEST_CASE("normmax: backward is the transposed Jacobian", "[normmax]") {
  random_numbers random(9);
  const index cols = 6;
  std::size_t moved = 0;
  for (const double alpha : {1.25, 1.5, 2., 3., 50.})
    for (int trial = 0; trial < 10; ++trial) {
      row_major<double> x(1, cols), d(1, cols), p(1, cols), got(1, cols);
      for (index c = 0; c < cols; ++c) {
        x(0, c) = random.uniform(-0.4, 0.4);
        d(0, c) = random.uniform(-2, 2);
      }
      perdita::normmax(x, p, {.alpha = alpha});
      perdita::normmax_backward(p, d, got, {.alpha = alpha});
      for (index c = 0; c < cols; ++c) {
        const wide h = ldexp(wide(1), -40);
        wide difference = 0;
        for (const int sign : {-1, 1}) {
          std::vector<wide> z = row_of(x, 0);
          z[static_cast<std::size_t>(c)] += sign * h;
          const exact_prediction e(map_kind::normmax, alpha, z);
          for (index k = 0; k < cols; ++k)
            difference += sign * wide(d(0, k)) * e.p[static_cast<std::size_t>(k)];
        }
        const double expected = static_cast<double>(wide(difference / (2 * h)));
        INFO("alpha " << alpha << ", trial " << trial << ", column " << c << ": " << got(0, c)
                      << " for " << expected);
        CHECK(std::abs(got(0, c) - expected) <= 1e-10 * (1 + std::abs(expected)));
        moved += expected != 0;
      }
    }
  CHECK(moved > 100);
}

TEST_CASE("normmax: known values", "[normmax]") {
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double n = std::numeric_limits<double>::quiet_NaN();
  const auto check = [](double alpha, std::vector<double> x, std::vector<double> expected,
                        double error) {
    std::vector<double> p(x.size());
    const auto cols = static_cast<index>(x.size());
    perdita::normmax(perdita::matrix_view<const double>(x.data(), 1, cols),
                     perdita::matrix_view<double>(p.data(), 1, cols), {.alpha = alpha});
    for (std::size_t k = 0; k < p.size(); ++k) {
      INFO("alpha " << alpha << ", class " << k << ": " << p[k] << " for " << expected[k]);
      CHECK(
          (std::abs(p[k] - expected[k]) <= error || (p[k] != p[k] && expected[k] != expected[k])));
    }
  };
  check(2, {-2, 0, 0.5}, {0, 0.3110, 0.6890}, 5e-5);
  check(1000, {-2, 0, 0.5}, {0, 0.4997, 0.5003}, 5e-5);
  for (const double alpha : {1.01, 1.5, 2., 3., 1000.}) {
    check(alpha, {5}, {1}, 0);
    check(alpha, {7, 7, 7, 7}, {0.25, 0.25, 0.25, 0.25}, 1e-15);
    check(alpha, {0, -inf, 0}, {0.5, 0, 0.5}, 1e-15);
    check(alpha, {-1, 0, -1}, {0, 1, 0}, 0);
    check(alpha, {-inf, -inf}, {0, 0}, 0);
    check(alpha, {0, n, 1}, {n, n, n}, 0);
    check(alpha, {0, inf, 1}, {n, n, n}, 0);
  }
  for (const double alpha : {1., 0.5, -2., inf, n}) {
    row_major<double> x = row_major<double>::Zero(2, 3), y = x;
    CHECK_THROWS_WITH(perdita::normmax(x, y, {.alpha = alpha}),
                      Catch::Matchers::ContainsSubstring("perdita::normmax: alpha is"));
    CHECK_THROWS_AS(perdita::normmax_backward(x, x, y, {.alpha = alpha}), std::invalid_argument);
    CHECK_THROWS_WITH(perdita::normmax_loss<float>({.alpha = alpha}),
                      Catch::Matchers::ContainsSubstring("perdita::normmax_loss: alpha is"));
  }
  row_major<double> x = row_major<double>::Zero(3, 4), wrong = row_major<double>::Constant(3, 5, 7);
  CHECK_THROWS_AS(perdita::normmax(x, wrong), std::invalid_argument);
  CHECK_THROWS_AS(perdita::normmax_backward(x, x, wrong), std::invalid_argument);
  CHECK((wrong.array() == 7).all());
}

} // namespace perdita_tests
