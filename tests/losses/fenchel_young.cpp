// SPDX-License-Identifier: MIT

// fenchel_young_loss, and the soft targets of sparsemax_loss, entmax15_loss, entmax_loss and
// normmax_loss, which are the same: formula sheet 8.

#include <perdita/cross_entropy.hpp>
#include <perdita/fenchel_young.hpp>
#include <perdita/normmax.hpp>

#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/map_rows.hpp"
#include "support/numbers.hpp"
#include "support/row_battery.hpp"
#include "support/simplex_reference.hpp"

namespace perdita_tests {
namespace {

namespace prediction = perdita::prediction;

struct young_setting {
  const char* what;
  map_kind kind;
  double alpha;
};
constexpr young_setting young_settings[] = {
    {"softmax", map_kind::softmax, 1},      {"sparsemax", map_kind::entmax, 2},
    {"entmax 5/4", map_kind::entmax, 1.25}, {"entmax 3", map_kind::entmax, 3},
    {"normmax 2", map_kind::normmax, 2},    {"normmax 3", map_kind::normmax, 3},
    {"entmax 3/2", map_kind::entmax, 1.5},  {"normmax 5/4", map_kind::normmax, 1.25},
};

constexpr int young_count = static_cast<int>(std::size(young_settings));

/// f(loss) with fenchel_young_loss of a setting's prediction.
template <class T, class F> auto with_prediction(int s, perdita::reduction how, F f) {
  const auto [what, kind, alpha] = young_settings[s];
  const auto of = [&]<class P>(const P& p) {
    return f(perdita::fenchel_young_loss<T, P>({.prediction = p, .reduction = how}));
  };
  if (kind == map_kind::softmax)
    return of(prediction::softmax{});
  if (kind == map_kind::normmax)
    return of(prediction::normmax{alpha});
  return alpha == 2 ? of(prediction::sparsemax{}) : of(prediction::entmax{alpha});
}

template <class T> class young_descriptor final : public row_descriptor<T> {
public:
  std::string name() const override { return "fenchel_young_loss"; }
  int settings() const override { return young_count; }
  std::string describe(int s) const override { return young_settings[s].what; }
  // Each kernel once, in one type or the other.
  std::vector<int> few_settings() const override {
    return sizeof(T) == 4 ? std::vector{0, 6} : std::vector{1, 7};
  }
  bool soft(int) const override { return true; }
  bool twice_smooth() const override { return false; }
  bool sparse() const override { return true; }
  std::unique_ptr<row_subject<T>> make(int s, index, perdita::reduction how) const override {
    return with_prediction<T>(s, how,
                              []<class L>(const L& loss) -> std::unique_ptr<row_subject<T>> {
                                return std::make_unique<row_subject_of<L, false>>(loss);
                              });
  }
  perdita::loss_traits traits(int) const override { return perdita::fenchel_young_loss<T>::traits; }

  row_expectation expect(int s, const row_input& row) const override {
    const auto [what, kind, alpha] = young_settings[s];
    const exact_prediction e(kind, alpha, row.scores);
    const wide epsilon = std::numeric_limits<T>::epsilon();
    const wide fine = 8 * std::numeric_limits<double>::epsilon();
    wide total = 0;
    for (const wide& share : row.soft)
      total += share;
    std::vector<wide> q;
    for (const wide& share : row.soft)
      q.push_back(share / total);
    row_expectation expected = nothing_reported();
    const wide value = total * young_value(kind, alpha, e, row.scores, q);
    wide errors = 0, all = 0;
    for (std::size_t j = 0; j < q.size(); ++j) {
      const wide gap = row.scores[j] == -infinity() ? wide(0) : wide(e.top - row.scores[j]);
      errors += (e.p[j] + q[j]) * (1 + gap) * fine;
      if (kind != map_kind::softmax && e.base[j] < 1)
        all += e.spread(j, fine);
    }
    expected.value = {value, 2 * value + (errors + all) * total / epsilon};
    for (std::size_t j = 0; j < q.size(); ++j) {
      const wide slope = total * (e.p[j] - q[j]);
      wide error = fine * (e.p[j] + q[j]);
      if (row.scores[j] == -infinity())
        error = fine * q[j];
      else if (kind == map_kind::softmax)
        error += fine * e.p[j] * (e.top - row.scores[j]);
      else
        error += e.spread(j, fine) + e.p[j] * all;
      error += std::numeric_limits<T>::min();
      expected.gradient.push_back({slope, size_of(slope) + total * error / epsilon});
    }
    return expected;
  }
};

perdita::matrix_view<const double> row_view(const std::vector<double>& x) {
  return {x.data(), 1, static_cast<index>(x.size())};
}
perdita::matrix_view<double> row_view(std::vector<double>& x) {
  return {x.data(), 1, static_cast<index>(x.size())};
}

/// Of one row.
template <class Target>
double evaluate(int s, const std::vector<double>& x, const Target& target, std::vector<double>& g) {
  return with_prediction<double>(s, perdita::reduction::mean, [&](const auto& loss) {
    return loss(row_view(x), target, row_view(g));
  });
}

} // namespace

TEMPLATE_TEST_CASE("Fenchel-Young losses: the row battery", "[fenchel_young]", float, double) {
  check_row_loss(young_descriptor<TestType>());
}

TEST_CASE("Fenchel-Young losses: the same by another name", "[fenchel_young]") {
  random_numbers random(14);
  const index rows = 40, cols = 9;
  row_major<float> x(rows, cols), q(rows, cols);
  for (index r = 0; r < rows; ++r)
    for (index c = 0; c < cols; ++c) {
      x(r, c) = static_cast<float>(2 * random.normal());
      q(r, c) = static_cast<float>(random.uniform(0, 0.25));
    }
  x(3, 4) = -std::numeric_limits<float>::infinity();
  const auto same = [&](const char* what, const auto& named, const auto& general) {
    row_major<float> g(rows, cols), h(rows, cols);
    std::vector<float> values(40), others(40);
    INFO(what);
    CHECK(named(x, q, g, {.values = values}) == general(x, q, h, {.values = others}));
    CHECK(same_bits(g, h));
    CHECK(values == others);
    CHECK(values[3] == std::numeric_limits<float>::infinity());
  };
  using perdita::fenchel_young_loss;
  const fenchel_young_loss<float, prediction::entmax> middle({.prediction = {1.5}}),
      cubic({.prediction = {3}});
  same("entmax15", perdita::entmax15_loss<float>(), middle);
  same("entmax 3", perdita::entmax_loss<float>({.alpha = 3}), cubic);
  same("sparsemax", perdita::sparsemax_loss<float>(),
       fenchel_young_loss<float, prediction::sparsemax>());
  same("normmax 5/4", perdita::normmax_loss<float>({.alpha = 1.25}),
       fenchel_young_loss<float, prediction::normmax>({.prediction = {1.25}}));
}

TEMPLATE_TEST_CASE("Fenchel-Young losses: special rows", "[fenchel_young]", float, double) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double n = std::numeric_limits<double>::quiet_NaN();
  std::vector<special_row> rows{
      {"two positives", 1, {1, 0, 0}, -1, {0, 0.5, 0.5}, 0.75, {1, -0.5, -0.5}},
      {"their labels", 1, {1, 0, 0}, -1, {0, 1, 1}, 1.5, {2, -1, -1}},
      {"met", 1, {0.25, 0, -5}, -1, {0.625, 0.375, 0}, 0, {0, 0, 0}},
      {"uniform", 0, {3, 3}, -1, {0.5, 0.5}, 0, {0, 0}},
      {"a label's", 4, {7, 7, 7, 7}, -1, {0, 0, 1, 0}, 0.5, {0.25, 0.25, -0.75, 0.25}},
      {"far behind", 6, {0, 5}, -1, {1, 0}, 5, {-1, 1}},
  };
  for (int s = 0; s < young_count; ++s)
    for (const special_row& row : std::vector<special_row>{
             {"nothing asked for", s, {1, 2, 3}, -1, {0, 0, 0}, 0, {0, 0, 0}},
             {"one class", s, {3}, -1, {1}, 0, {0}},
             {"target masked", s, {-inf, 200}, -1, {0.5, 0.5}, inf, {-0.5, 0.5}},
             {"rivals masked", s, {-inf, 5, -inf}, -1, {0, 1, 0}, 0, {0, 0, 0}},
             {"all masked", s, {-inf, -inf}, -1, {0.25, 0.75}, inf, {-0.25, -0.75}},
             {"NaN", s, {0, 1, n}, -1, {1, 0, 0}, n, {n, n, n}},
             {"NaN in the target", s, {0, 1, 2}, -1, {1, n, 0}, n, {n, n, n}},
             {"+inf", s, {0, 1, inf}, -1, {1, 0, 0}, n, {n, n, n}}})
      rows.push_back(row);
  check_special(young_descriptor<TestType>(), rows, 4);
}

// Labels, their targets e_y, and the losses' own ways with labels.
TEST_CASE("Fenchel-Young losses: labels", "[fenchel_young]") {
  random_numbers random(11);
  for (int s = 0; s < young_count; ++s)
    for (const std::size_t cols : {1U, 2U, 7U, 130U, 2000U}) {
      std::vector<double> x, q(cols), by_label(cols), by_target(cols);
      for (std::size_t k = 0; k < cols; ++k)
        x.push_back(random.normal());
      const std::vector<index> label{static_cast<index>(random.below(cols))};
      q[static_cast<std::size_t>(label[0])] = 1;
      const double a = evaluate(s, x, label, by_label), b = evaluate(s, x, row_view(q), by_target);
      INFO(young_settings[s].what << ", " << cols << " classes: " << a << " and " << b);
      CHECK(std::abs(a - b) <= 4e-15 * (1 + a));
      // Beside the threshold a probability of order 3 has half its digits.
      for (std::size_t k = 0; k < cols; ++k)
        CHECK(std::abs(by_label[k] - by_target[k]) <=
              (young_settings[s].alpha == 3 ? 1e-8 : 4e-15));
    }
}

TEST_CASE("Fenchel-Young losses: softmax is cross-entropy less the entropy", "[fenchel_young]") {
  const std::vector<double> x{0.5, -1.2, 2, 0.1}, q{0.6, 0.1, 0.1, 0.2};
  std::vector<double> g(4), h(4);
  double entropy = 0;
  for (const double share : q)
    entropy -= share * std::log(share);
  const double value = perdita::fenchel_young_loss<double>()(row_view(x), row_view(q), row_view(g));
  CHECK(std::abs(value - (1.9460412949 - entropy)) < 1e-9); // appendix A
  const double whole = perdita::cross_entropy<double>()(row_view(x), row_view(q), row_view(h));
  CHECK(std::abs(value - (whole - entropy)) < 1e-15 * 8);
  for (std::size_t k = 0; k < 4; ++k)
    CHECK(std::abs(g[k] - h[k]) < 1e-15);
  // Where the label leads, 1 − p is known without a difference to 1.
  const std::vector<double> leads{50, 0};
  std::vector<double> slopes(2);
  perdita::fenchel_young_loss<double>()(row_view(leads), std::vector<int>{0}, row_view(slopes));
  CHECK(std::abs(slopes[0] + std::exp(-50.)) < 1e-15 * std::exp(-50.));
  CHECK(std::abs(slopes[1] - std::exp(-50.)) < 1e-15 * std::exp(-50.));
}

// All digits of the loss of a target near its prediction.
TEST_CASE("Fenchel-Young losses: a target near the prediction", "[fenchel_young]") {
  random_numbers random(12);
  for (int s = 0; s < young_count; ++s)
    for (const double apart : {1e-2, 1e-5, 1e-7}) {
      const auto [what, kind, alpha] = young_settings[s];
      std::vector<double> x, q, g(6);
      std::vector<wide> z, share;
      for (int k = 0; k < 6; ++k)
        x.push_back(random.uniform(0, 0.1));
      for (const double score : x)
        z.push_back(score);
      const exact_prediction e(kind, alpha, z);
      wide total = 0;
      for (const wide& p : e.p) {
        q.push_back(static_cast<double>(p) * (1 + apart * random.normal()));
        total += q.back();
      }
      for (const double of : q)
        share.push_back(of / total);
      const wide expected = total * young_value(kind, alpha, e, z, share);
      const double value = evaluate(s, x, row_view(q), g);
      INFO(what << ", " << apart << " apart: " << value << " for " << text(expected));
      CHECK(size_of(value - expected) <= wide(2e-14 / apart) * expected);
    }
}

// Σ q = B; τ by bisection over all numbers.
TEMPLATE_TEST_CASE("Fenchel-Young losses: budget", "[fenchel_young]", float, double) {
  using T = TestType;
  random_numbers random(13);
  error_judge of_values, of_slopes;
  for (const double budget : {1., 2., 3.5})
    for (const std::size_t cols : {4U, 9U, 300U})
      for (const double spread : {0.2, 1., 20.}) {
        std::vector<T> x(cols), q(cols), g(cols);
        wide total = 0;
        for (std::size_t k = 0; k < cols; ++k) {
          x[k] = static_cast<T>(spread * random.normal());
          q[k] = static_cast<T>(budget / static_cast<double>(cols) * random.uniform(0.9, 1));
          total += q[k];
        }
        const wide scale = total / budget;
        wide low = -1e4, high = 1e4;
        const auto clipped = [](const wide& a) { return larger(0, smaller(1, a)); };
        for (int i = 0; i < 140; ++i) {
          const wide t = (low + high) / 2;
          wide sum = 0;
          for (const T z : x)
            sum += clipped(z - t);
          (sum >= budget ? low : high) = t;
        }
        wide value = 0;
        std::vector<wide> slopes;
        for (std::size_t k = 0; k < cols; ++k) {
          const wide p = clipped(x[k] - low), of = q[k] / scale;
          value += (of * of - p * p) / 2 - (of - p) * (x[k] - low);
          slopes.push_back(scale * (p - of));
        }
        const auto n = static_cast<index>(cols);
        const T got = perdita::fenchel_young_loss<T, prediction::budget>({.prediction = {budget}})(
            perdita::matrix_view<const T>(x.data(), 1, n),
            perdita::matrix_view<const T>(q.data(), 1, n), perdita::matrix_view<T>(g.data(), 1, n));
        const wide epsilon = std::numeric_limits<T>::epsilon();
        INFO("budget " << budget << ", " << cols << " classes, spread " << spread << ": " << got
                       << " for " << text(wide(scale * value)));
        CHECK(of_values.within(size_of(wide(got - scale * value)), 1,
                               epsilon * scale * value + wide(1e-13)));
        for (std::size_t k = 0; k < cols; ++k)
          CHECK(of_slopes.within(size_of(wide(g[k] - slopes[k])), 1,
                                 epsilon * size_of(slopes[k]) + wide(1e-14)));
      }
  report_accuracy<T>("fenchel_young_loss, budget", "", in_allowances, of_values, of_slopes);
}

// p = (1/2, 1/2, 0) and (1, 3/4, 1/4, 0, 0), to which q is near or equal.
TEMPLATE_TEST_CASE("Fenchel-Young losses: budget, where scores are large", "[fenchel_young]", float,
                   double) {
  using T = TestType;
  const auto check = [](double budget, const std::vector<T>& x, const std::vector<T>& q, T value,
                        const std::vector<T>& slopes) {
    std::vector<T> g(x.size(), 7);
    const auto n = static_cast<index>(x.size());
    CHECK(perdita::fenchel_young_loss<T, prediction::budget>({.prediction = {budget}})(
              perdita::matrix_view<const T>(x.data(), 1, n),
              perdita::matrix_view<const T>(q.data(), 1, n),
              perdita::matrix_view<T>(g.data(), 1, n)) == value);
    CHECK(g == slopes);
  };
  for (const T large : {T(1e17), T(3e38)}) {
    check(1, {large, large, 0}, {0.5, 0.5, 0}, 0, {0, 0, 0});
    check(1, {large, large, 0}, {0.75, 0.25, 0}, T(0.0625), {-0.25, 0.25, 0});
    check(2, {large, 5, 4.5, 4.25, -large}, {1, 0.75, 0.25, 0, 0}, 0, {0, 0, 0, 0, 0});
    check(2, {large, 5, 4.5, 4.25, -large}, {1, 0.5, 0.5, 0, 0}, T(0.0625), {0, 0.25, -0.25, 0, 0});
  }
}

TEST_CASE("Fenchel-Young losses: arguments are checked", "[fenchel_young]") {
  using Catch::Matchers::ContainsSubstring;
  constexpr double n = std::numeric_limits<double>::quiet_NaN();
  using entmax = perdita::fenchel_young_loss<float, prediction::entmax>;
  using normmax = perdita::fenchel_young_loss<float, prediction::normmax>;
  using budget = perdita::fenchel_young_loss<double, prediction::budget>;
  for (const double alpha : {1., -2., n}) {
    CHECK_THROWS_WITH(entmax({.prediction = {alpha}}),
                      ContainsSubstring("perdita::fenchel_young_loss: alpha is"));
    CHECK_THROWS_AS(normmax({.prediction = {alpha}}), std::invalid_argument);
  }
  for (const double b : {0., -1., n})
    CHECK_THROWS_WITH(budget({.prediction = {b}}), ContainsSubstring("budget is"));
  const std::vector<double> x{1, 2, 3};
  const std::vector<int> label{1};
  std::vector<double> g(3, 7);
  CHECK_THROWS_WITH(budget({.prediction = {2}})(row_view(x), label, row_view(g)),
                    ContainsSubstring("budget is 2"));
  CHECK_THROWS_AS(budget({.prediction = {4}})(row_view(x), row_view(x), row_view(g)),
                  std::invalid_argument);
  CHECK(g == std::vector<double>(3, 7));
  CHECK_NOTHROW(budget()(row_view(x), label, row_view(g)));
}

} // namespace perdita_tests
