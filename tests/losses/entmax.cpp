// SPDX-License-Identifier: MIT

// The descriptors of entmax15_loss and entmax_loss: formula sheet 8.

#include <perdita/entmax.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/numbers.hpp"
#include "support/row_battery.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

/// α-entmax by a bracketed search for the largest probability, and what its loss is made of.
class entmax_reference {
public:
  std::vector<wide> p, base; ///< base: (1 − r)_+ of each class
  wide top = -infinity(), rest = 0, conjugate = 0;

  entmax_reference(const wide& alpha, const std::vector<wide>& x) : order_(alpha - 1) {
    for (const wide& z : x)
      top = larger(top, z);
    std::vector<wide> gaps; // (α−1)(max x − x_j) of those that may count
    bool passed = false;
    for (const wide& z : x) {
      const wide gap = order_ * (top - z);
      if (gap == 0 && !passed)
        passed = true;
      else if (gap < 1)
        gaps.push_back(gap);
    }
    const wide u = find(gaps); // −log of the largest probability
    const wide root = exp(wide(-order_ * u)), most = exp(wide(-u));
    for (const wide& z : x) {
      base.push_back(z == -infinity() ? wide(0) : larger(0, 1 - order_ * (top - z) / root));
      p.push_back(most * power(base.back()));
    }
    wide tails = 0;
    for (const wide& gap : gaps) {
      const wide b = larger(0, 1 - gap / root);
      tails += most * power(b) * root * b;
    }
    rest = -expm1(wide(-u));
    // ⟨p, x⟩ − Ω(p) with Σ p = 1 put in, so that a small value is not a difference.
    const wide a = order_, m = rest;
    conjugate =
        tails / (a + 1) - expm1(wide(a * log1p(wide(-m)) + log1p(wide(a * m)))) / (a * (a + 1));
  }
  /// How far p_j moves where its base is wrong by so much.
  wide spread(std::size_t j, const wide& error, const wide& most) const {
    return most * (power(larger(0, base[j] + error)) - power(larger(0, base[j] - error)));
  }
  wide most() const { return 1 - rest; }

private:
  wide power(const wide& b) const {
    if (b <= 0)
      return 0;
    if (order_ == wide(0.5))
      return b * b;
    if (order_ == wide(0.25))
      return b * b * b * b;
    if (order_ == wide(0x1p-6)) {
      wide image = b;
      for (int k = 0; k < 6; ++k)
        image *= image;
      return image;
    }
    if (order_ == 1)
      return b;
    if (order_ == 2)
      return sqrt(b);
    return exp(wide(log(b) / order_));
  }
  /// Σ p − 1 where the largest probability is e^{-u}.
  wide excess(const std::vector<wide>& gaps, const wide& u) const {
    const wide root = exp(wide(-order_ * u));
    wide sum = 0;
    for (const wide& gap : gaps)
      sum += power(larger(0, 1 - gap / root));
    return exp(wide(-u)) * sum + expm1(wide(-u));
  }
  wide find(const std::vector<wide>& gaps) const {
    wide low = 0, high = log(wide(static_cast<double>(gaps.size() + 2)));
    wide at_low = excess(gaps, low), at_high = excess(gaps, high);
    if (at_low <= 0)
      return 0;
    for (int round = 0; round < 400; ++round) { // Illinois' false position, and bisection
      wide u = (low * at_high - high * at_low) / (at_high - at_low);
      if (round % 4 == 3 || !(u > low && u < high))
        u = (low + high) / 2;
      if (!(u > low && u < high) || high - low <= ldexp(u, -110))
        return u;
      const wide at = excess(gaps, u);
      if (at == 0)
        return u;
      if (at > 0) {
        low = u, at_low = at;
        at_high = at_high / 2;
      } else {
        high = u, at_high = at;
        at_low = at_low / 2;
      }
    }
    return (low + high) / 2;
  }

  wide order_;
};

/// In epsilons: of the value; of an ordinary slope; and, in units of what the thresholds and powers
/// are computed in, of 1 − r.
constexpr double value_budget = 4, slope_budget = 2, base_budget = 4;

template <class T>
row_expectation expect_entmax(const wide& alpha, const row_input& row, bool slopes_in_double) {
  const auto y = static_cast<std::size_t>(row.label);
  const entmax_reference r(alpha, row.scores);
  const wide epsilon = std::numeric_limits<T>::epsilon();
  const wide double_epsilon = std::numeric_limits<double>::epsilon();
  // The power α − 1 of p₁, which is e^{-u} with a rounded u, is no better.
  const wide fine = larger(base_budget, (alpha - 1) * -log(r.most())) * double_epsilon;
  const wide coarse = slopes_in_double ? fine : wide(base_budget / 4 * epsilon);
  row_expectation e;
  const wide value = r.conjugate + (r.top - row.scores[y]);
  wide shift = 0, spread = 0; // by an error of each 1 − r
  std::vector<wide> edges;
  for (std::size_t k = 0; k < row.scores.size(); ++k) {
    const bool masked = row.scores[k] == -infinity();
    edges.push_back(masked ? wide(0) : r.spread(k, k == y ? fine : coarse, r.most()));
    if (r.p[k] > 0) {
      shift += r.p[k] * (r.top - row.scores[k]);
      if (row.scores[k] < r.top)
        spread += k == y || coarse == fine ? edges[k] : r.spread(k, fine, r.most());
    }
  }
  e.value = {value, value * value_budget + shift * fine / epsilon};
  for (std::size_t k = 0; k < row.scores.size(); ++k) {
    const bool label = k == y, highest = row.scores[k] == r.top;
    const wide size = r.p[k] * (slope_budget + (r.p[k] > 0 ? wide(-log(r.p[k])) / 8 : wide(0)));
    const wide edge = label && highest ? spread : edges[k];
    const wide slope = label ? (highest ? wide(-r.rest) : wide(r.p[k] - 1)) : r.p[k];
    e.gradient.push_back({slope, edge / epsilon + (label && highest ? wide(0) : size)});
  }
  e.log_sum_exp.reported = e.target_log_probability.reported = false;
  e.entropy.reported = e.penalty.reported = e.hit_reported = false;
  return e;
}

template <class T> class entmax15_descriptor final : public row_descriptor<T> {
public:
  std::string name() const override { return "entmax15_loss"; }
  int settings() const override { return 1; }
  std::string describe(int) const override { return "plain"; }
  std::vector<int> few_settings() const override { return {0}; }
  bool twice_smooth() const override { return false; }
  bool sparse() const override { return true; }
  std::unique_ptr<row_subject<T>> make(int, index, perdita::reduction reduction) const override {
    return std::make_unique<row_subject_of<perdita::entmax15_loss<T>>>(perdita::entmax15_loss<T>(
        {.ignore_index = row_descriptor<T>::ignore_index, .reduction = reduction}));
  }
  perdita::loss_traits traits(int) const override { return perdita::entmax15_loss<T>::traits; }
  row_expectation expect(int, const row_input& row) const override {
    return expect_entmax<T>(wide(1.5), row, false);
  }
};

template <class T> class entmax_descriptor final : public row_descriptor<T> {
public:
  static constexpr double alphas[] = {1.25, 1.5, 1 + 0x1p-6, 1.75, 2, 3, 50};

  std::string name() const override { return "entmax_loss"; }
  int settings() const override { return static_cast<int>(std::size(alphas)); }
  std::string describe(int s) const override {
    return "alpha " + perdita::core::to_text(alphas[s]);
  }
  std::vector<int> few_settings() const override { return {0}; }
  bool twice_smooth() const override { return false; }
  bool sparse() const override { return true; }
  std::unique_ptr<row_subject<T>> make(int s, index, perdita::reduction reduction) const override {
    return std::make_unique<row_subject_of<perdita::entmax_loss<T>>>(
        perdita::entmax_loss<T>({.alpha = alphas[s],
                                 .ignore_index = row_descriptor<T>::ignore_index,
                                 .reduction = reduction}));
  }
  perdita::loss_traits traits(int) const override { return perdita::entmax_loss<T>::traits; }
  row_expectation expect(int s, const row_input& row) const override {
    return expect_entmax<T>(wide(alphas[s]), row, alphas[s] != 1.5);
  }
};

} // namespace

TEMPLATE_TEST_CASE("entmax15_loss: the row battery", "[entmax]", float, double) {
  check_row_loss(entmax15_descriptor<TestType>());
}

TEMPLATE_TEST_CASE("entmax_loss: the row battery", "[entmax]", float, double) {
  check_row_loss(entmax_descriptor<TestType>());
}

TEMPLATE_TEST_CASE("entmax15_loss: special rows", "[entmax]", float, double) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double n = std::numeric_limits<double>::quiet_NaN();
  const std::vector<special_row> rows{
      {"one class", 0, {3}, 0, {}, 0, {0}},
      {"all equal", 0, {7, 7, 7, 7}, 2, {}, 2. / 3, {0.25, 0.25, -0.75, 0.25}},
      {"margin of 2", 0, {2, 0, -1}, 0, {}, 0, {0, 0, 0}},
      {"margin of 5", 0, {2, -3, -4}, 0, {}, 0, {0, 0, 0}},
      {"two classes, far behind", 0, {0, 5}, 0, {}, 5, {-1, 1}},
      {"masked", 0, {0, -inf, 0}, 0, {}, (4 - 2 * std::sqrt(2.)) / 3, {-0.5, 0, 0.5}},
      {"all rivals masked", 0, {-inf, 5, -inf}, 1, {}, 0, {0, 0, 0}},
      {"label masked", 0, {1, -inf, -1}, 1, {}, inf, {1, -1, 0}},
      {"all masked", 0, {-inf, -inf, -inf}, 1, {}, inf, {0, -1, 0}},
      {"NaN", 0, {0, 1, n}, 0, {}, n, {n, n, n}},
      {"+inf", 0, {0, 1, inf}, 0, {}, n, {n, n, n}},
  };
  check_special(entmax15_descriptor<TestType>(), rows, 8);
}

TEMPLATE_TEST_CASE("entmax_loss: special rows", "[entmax]", float, double) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double n = std::numeric_limits<double>::quiet_NaN();
  // Settings 0, 2, 4, 5 and 6 are α = 1.25, 1 + 1/64, 2, 3 and 50.
  const std::vector<special_row> rows{
      {"one class", 0, {3}, 0, {}, 0, {0}},
      {"one class, large order", 6, {3}, 0, {}, 0, {0}},
      {"all equal", 4, {7, 7, 7, 7}, 2, {}, 0.375, {0.25, 0.25, -0.75, 0.25}},
      {"all equal, large order", 5, {7, 7, 7, 7}, 2, {}, 0.15625, {0.25, 0.25, -0.75, 0.25}},
      {"margin of 4", 0, {6, 2, -1}, 0, {}, 0, {0, 0, 0}},
      {"margin of 64", 2, {0, -65, -150}, 0, {}, 0, {0, 0, 0}},
      {"margin of 1", 4, {2, 1, 0}, 0, {}, 0, {0, 0, 0}},
      {"margin of 1/2", 5, {2, 1.5, 0}, 0, {}, 0, {0, 0, 0}},
      {"two classes, half a margin", 4, {0.5, 0}, 0, {}, 0.0625, {-0.25, 0.25}},
      {"two classes, far behind", 0, {0, 5}, 0, {}, 5, {-1, 1}},
      {"ahead by almost the margin", 4, {1, 0x1p-20}, 0, {}, 0x1p-42, {-0x1p-21, 0x1p-21}},
      {"masked", 4, {0, -inf, 0}, 0, {}, 0.25, {-0.5, 0, 0.5}},
      {"all rivals masked", 0, {-inf, 5, -inf}, 1, {}, 0, {0, 0, 0}},
      {"label masked", 5, {1, -inf, 0}, 1, {}, inf, {1, -1, 0}},
      {"all masked", 0, {-inf, -inf, -inf}, 1, {}, inf, {0, -1, 0}},
      {"NaN", 0, {0, 1, n}, 0, {}, n, {n, n, n}},
      {"+inf", 5, {0, 1, inf}, 0, {}, n, {n, n, n}},
  };
  check_special(entmax_descriptor<TestType>(), rows, 8);
}

TEST_CASE("entmax losses: golden values", "[entmax]") {
  const std::vector<double> x{0.5, -1.2, 2, 0.1};
  const perdita::matrix_view<const double> scores(x.data(), 1, 4);
  const std::vector<int> label{0};
  const auto check = [&](const auto& loss, double value, std::vector<double> gradient) {
    std::vector<double> g(4);
    CHECK(std::abs(loss(scores, label, perdita::matrix_view<double>(g.data(), 1, 4)) - value) <
          1e-9);
    for (std::size_t k = 0; k < 4; ++k)
      CHECK(std::abs(g[k] - gradient[k]) < 1e-8);
  };
  const std::vector<double> middle{-0.949719124, 0, 0.949131839, 0.000587285561};
  check(perdita::entmax15_loss<double>(), 1.50884231415, middle);
  check(perdita::entmax_loss<double>(), 1.50884231415, middle);
  check(perdita::entmax_loss<double>({.alpha = 2}), 1.5, {-1, 0, 1, 0});
  check(perdita::entmax_loss<double>({.alpha = 1.25}), 1.58845087549,
        {-0.886606218, 0.000581576959, 0.832810762, 0.0532138796});
  check(perdita::entmax_loss<double>({.alpha = 1 + 1e-11}), 1.8460412949, // cross-entropy
        {-0.842139144, 0.0288385774, 0.707483271, 0.105817296});
}

TEST_CASE("entmax losses: the digits of a label that wins", "[entmax]") {
  for (const double alpha : {1.01, 1.25, 1.5, 2., 3.})
    for (const double share : {0x1p-30, 0x1p-20, 1e-6, 1e-3, 0.1}) {
      // One rival, inside the margin by this share of it.
      const std::vector<double> x{0, -(1 - share) / (alpha - 1)};
      const entmax_reference r(alpha, {0, x[1]});
      const std::vector<int> label{0};
      std::vector<double> g(2);
      const double value = perdita::entmax_loss<double>({.alpha = alpha})(
          perdita::matrix_view<const double>(x.data(), 1, 2), label,
          perdita::matrix_view<double>(g.data(), 1, 2));
      // An error of 2 epsilons in the distance from the margin.
      const double error = 0x1p-51 / share * std::max(1., 1 / (alpha - 1)) + 0x1p-49;
      INFO("alpha " << alpha << ", share " << share << ": " << value << " for " << text(r.conjugate)
                    << ", " << g[0] << " for " << text(wide(-r.rest)));
      CHECK(size_of(value - r.conjugate) <= 2 * error * r.conjugate + wide(1e-280));
      CHECK(size_of(g[0] + r.rest) <= error * r.rest + wide(1e-280));
    }
}

TEMPLATE_TEST_CASE("entmax_loss: gradient with respect to alpha", "[entmax]", float, double) {
  using T = TestType;
  random_numbers random(3);
  for (const double alpha : {1 + 0x1p-20, 1.01, 1.25, 1.5, 1.75, 2., 2.5, 3., 8., 8., 8., 30., 30.})
    for (const index cols : {1, 2, 5, 9, 40}) {
      std::vector<T> x(3 * static_cast<std::size_t>(cols)), values(3);
      for (T& z : x)
        z = static_cast<T>(2 * random.normal());
      const std::vector<int> labels{0, -7, static_cast<int>(cols - 1)};
      const perdita::entmax_loss<T> loss(
          {.alpha = alpha, .ignore_index = -7, .reduction = perdita::reduction::sum});
      const T total = loss.alpha_gradient(perdita::matrix_view<const T>(x.data(), 3, cols), labels,
                                          {.values = values});
      wide sum = 0;
      for (const index r : {0, 2}) {
        std::vector<wide> row;
        for (index c = 0; c < cols; ++c)
          row.push_back(x[static_cast<std::size_t>(r * cols + c)]);
        const wide h = ldexp(wide(1), -44);
        const wide above = entmax_reference(alpha + h, row).conjugate;
        const wide below = entmax_reference(alpha - h, row).conjugate;
        const wide expected = (above - below) / (2 * h);
        INFO("alpha " << alpha << ", " << cols << " columns: " << values[std::size_t(r)] << " for "
                      << text(expected));
        // Differences are good to ten digits.
        const wide error = larger(4 * std::numeric_limits<T>::epsilon(), wide(1e-10));
        CHECK(size_of(values[std::size_t(r)] - expected) <= error * (size_of(expected) + 1e-3));
        CHECK((cols == 1 ? expected == 0 : expected <= 0));
        sum += expected;
      }
      CHECK(values[1] == 0);
      CHECK(size_of(total - sum) <= 1e-5 * size_of(sum) + wide(1e-8));
    }
}

// A gradient of more than 4 MiB is written past the caches, whole lines at a time; one that
// overwrites its scores is not. With α = 1.25 slopes are taken of the support alone.
TEMPLATE_TEST_CASE("entmax losses: a gradient that goes past the caches has the same bits",
                   "[entmax]", float, double) {
  using T = TestType;
  const threads_executor pool(3, task_order::shuffled);
  const auto check = [&](const auto& loss, index classes, index gap) {
    const index stride = classes + gap,
                n = (index{4} << 20) / static_cast<index>(sizeof(T)) / classes + 2;
    std::vector<T> x(static_cast<std::size_t>(n * stride));
    for (std::size_t i = 0; i < x.size(); ++i)
      x[i] = static_cast<T>(i * 7919 % 1009) / 64;
    std::vector<int> y;
    for (index r = 0; r < n; ++r)
      y.push_back(r % 11 == 3 ? -100 : static_cast<int>(r * 101 % classes));
    std::vector<T> expected = x;
    const perdita::matrix_view<T> all(expected.data(), n, classes, stride, 1);
    const T value = loss(all, y, all);
    for (index r = 0; r < n; ++r) // between rows, where nothing may be written
      std::fill_n(expected.begin() + r * stride + classes, r + 1 < n ? gap : 0, T(9));
    INFO(classes << " classes");
    std::vector<T> gradient(expected.size() + 32, T(9));
    const auto start = 5 + (64 - reinterpret_cast<std::uintptr_t>(gradient.data()) % 64) /
                               sizeof(T) % (64 / sizeof(T));
    const perdita::matrix_view<const T> scores(x.data(), n, classes, stride, 1);
    const perdita::matrix_view<T> to(gradient.data() + start, n, classes, stride, 1);
    CHECK(loss(scores, y, to, {.run_on = pool}) == value);
    const auto first = gradient.begin() + static_cast<index>(start),
               last = first + ((n - 1) * stride + classes);
    CHECK(std::equal(first, last, expected.begin()));
    CHECK(std::count(gradient.begin(), first, T(9)) == first - gradient.begin());
    CHECK(std::count(last, gradient.end(), T(9)) == gradient.end() - last);
  };
  for (const auto& [classes, gap] : {std::pair<index, index>{1000, 0}, {997, 5}, {40007, 0}}) {
    check(perdita::entmax_loss<T>({.alpha = 1.25}), classes, gap);
    check(perdita::entmax15_loss<T>(), classes, gap);
  }
}

TEST_CASE("entmax_loss: alpha is checked", "[entmax]") {
  for (const double alpha : {1., 0.5, -2., std::numeric_limits<double>::infinity(),
                             std::numeric_limits<double>::quiet_NaN()})
    CHECK_THROWS_WITH(perdita::entmax_loss<float>({.alpha = alpha}),
                      Catch::Matchers::ContainsSubstring("perdita::entmax_loss: alpha is"));
}

} // namespace perdita_tests
