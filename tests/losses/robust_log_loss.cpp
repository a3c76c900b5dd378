// SPDX-License-Identifier: MIT

// The robust log loss's descriptor: formula sheet 4.4.

#include <perdita/robust_log_loss.hpp>

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

template <class T> class robust_log_descriptor final : public row_descriptor<T> {
public:
  std::string name() const override { return "robust_log_loss"; }
  int settings() const override { return 3; }
  static wide a(int setting) {
    return static_cast<double>(
        static_cast<T>(std::vector<double>{0.1, 1, 0.001}[std::size_t(setting)]));
  }
  std::string describe(int setting) const override { return "a " + text(a(setting)); }
  std::vector<int> few_settings() const override { return {0}; }
  std::unique_ptr<row_subject<T>> make(int setting, index,
                                       perdita::reduction reduction) const override {
    return std::make_unique<row_subject_of<perdita::robust_log_loss<T>>>(
        perdita::robust_log_loss<T>({.a = static_cast<T>(a(setting)),
                                     .ignore_index = row_descriptor<T>::ignore_index,
                                     .reduction = reduction}));
  }
  perdita::loss_traits traits(int) const override { return perdita::robust_log_loss<T>::traits; }

  row_expectation expect(int setting, const row_input& row) const override {
    const auto y = static_cast<std::size_t>(row.label);
    const std::size_t n = row.scores.size();
    row_expectation e = nothing_reported();
    const softmax_row s(row.scores);
    if (n == 1 || s.all_masked) {
      e.value = {s.all_masked ? wide(log1p(wide(1 / a(setting)))) : wide(0), 4};
      e.gradient.assign(n, {0, 0});
      return e;
    }
    const rival_errors errors(row.scores, y, 0, T());
    const wide hit = row.scores[y] == -infinity() ? wide(0) : s.p(y),
               each = 1 / wide(static_cast<double>(n - 1));
    const wide own = hit / (a(setting) + hit);
    wide value = log1p(wide(s.miss(y) / (a(setting) + hit))), rivals = 0; // Σ_{k≠y} p_k g_k
    for (std::size_t k = 0; k < n; ++k)
      if (k != y) {
        value += each * log1p(wide(s.p(k) / a(setting)));
        rivals += each * s.p(k) / (a(setting) + s.p(k));
      }
    const wide apart = errors.any ? wide(errors.of_u + errors.distance / 2) : wide(0);
    e.value = {value, value * (8 + 4 * apart)};
    for (std::size_t k = 0; k < n; ++k) {
      if (k == y) { // p_y (g_y − Σ p g), whose terms have the same sign
        const wide slope = -hit * (s.miss(y) / (a(setting) + hit) + rivals);
        e.gradient.push_back({slope, size_of(slope) * (8 + 4 * apart)});
        continue;
      }
      const wide g = each / (a(setting) + s.p(k)), p = s.p(k);
      const wide behind = row.scores[k] > -infinity() ? errors.of_share(k) : wide(0);
      // Of one with more than half, g − p g is one term.
      wide rest = row.scores[y] == -infinity() ? wide(0) : s.p(y), others = 0;
      const bool leads = 2 * p > 1;
      for (std::size_t j = 0; leads && j < n; ++j)
        if (j != y && j != k) {
          rest += s.p(j);
          others += each * s.p(j) / (a(setting) + s.p(j));
        }
      const wide from = leads ? wide(rest * g + own - others) : wide(g + own - rivals),
                 terms = 8 * p > 5 ? wide(rest * g + own + others) : wide(g + own + rivals);
      e.gradient.push_back({p * from, p * terms * (8 + 4 * (apart + behind))});
    }
    return e;
  }
};

} // namespace

TEMPLATE_TEST_CASE("robust_log_loss: the row battery", "[rll]", float, double) {
  check_row_loss(robust_log_descriptor<TestType>());
}

TEMPLATE_TEST_CASE("robust_log_loss: special rows", "[rll]", float, double) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double n = std::numeric_limits<double>::quiet_NaN();
  const std::vector<special_row> rows{
      {"one class", 0, {3}, 0, {}, 0, {0}},
      {"all rivals masked", 0, {-inf, 5, -inf}, 1, {}, 0, {0, 0, 0}},
      {"+inf at the label", 0, {0, inf, 1}, 1, {}, 0, {0, 0, 0}},
      // p = ½ each, a = 1: log(2/1.5) + log 1.5, and ½ · ½ (2/3 + 2/3)
      {"two classes", 1, {4, 4}, 0, {}, std::log(2.0), {-1. / 3, 1. / 3}},
      {"label masked", 1, {4, -inf}, 1, {}, 2 * std::log(2.0), {0, 0}},
      {"+inf elsewhere", 0, {0, inf, 1}, 0, {}, n, {n, n, n}},
      {"NaN", 0, {0, 1, n}, 0, {}, n, {n, n, n}},
      {"NaN at the label", 0, {0, 1, n}, 2, {}, n, {n, n, n}},
  };
  check_special(robust_log_descriptor<TestType>(), rows, 8);
}

// In 113 bits, with 1 − p from what the others have.
TEMPLATE_TEST_CASE("robust_log_loss: the slope of a rival that has nearly all", "[rll]", float,
                   double) {
  using T = TestType;
  const auto slope = [](std::size_t classes, double rival, double others) {
    std::vector<T> x(classes, static_cast<T>(others)), g(classes);
    x[0] = 0;
    x[1] = static_cast<T>(rival);
    const auto n = static_cast<index>(classes);
    perdita::robust_log_loss<T>({.a = T(0.125)})(perdita::matrix_view<const T>(x.data(), 1, n),
                                                 std::vector<int>{0},
                                                 perdita::matrix_view<T>(g.data(), 1, n));
    return static_cast<double>(g[1]);
  };
  const auto reference = [](std::size_t classes, double rival, double others) {
    const wide a = 0.125, each = 1 / wide(static_cast<double>(classes - 1)), e = exp(wide(-rival)),
               o = exp(wide(others - rival)), many = static_cast<double>(classes - 2);
    const wide sum = 1 + e + many * o, p = 1 / sum, own = e / sum, other = o / sum;
    return wide(p * ((own + many * other) * each / (a + p) + own / (a + own) -
                     many * each * other / (a + other)));
  };
  for (const std::size_t classes : {2U, 3U, 20U, 70U, 1000U})
    for (const double rival : {2., 7., 15., 20., 30., 80.})
      for (const double others : {-40., -20., 1.}) {
        const wide want = reference(classes, rival, others);
        const auto got = slope(classes, rival, others);
        CAPTURE(classes, rival, others, got, static_cast<double>(want));
        CHECK(std::fabs(got / static_cast<double>(want) - 1) <=
              400 * static_cast<double>(std::numeric_limits<T>::epsilon()));
      }
}

TEST_CASE("robust_log_loss: options out of range are refused", "[rll]") {
  using Catch::Matchers::ContainsSubstring;
  CHECK_THROWS_WITH(perdita::robust_log_loss<float>({.a = 0}), ContainsSubstring("a is 0"));
  CHECK_THROWS_WITH(perdita::robust_log_loss<float>({.a = 1e-40F}),
                    ContainsSubstring("not subnormal"));
  CHECK_THROWS_WITH(perdita::robust_log_loss<double>({.a = 1e-310}),
                    ContainsSubstring("not subnormal"));
  CHECK_NOTHROW(perdita::robust_log_loss<float>({.a = std::numeric_limits<float>::min()}));
  CHECK_NOTHROW(perdita::robust_log_loss<double>({.a = 1e-40}));
}

} // namespace perdita_tests
