// SPDX-License-Identifier: MIT

// Descriptors of LDR-KL's limits: formula sheet 4.1 and 4.4.

#include <perdita/ldr.hpp>

#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/margin_descriptor.hpp"
#include "support/row_battery.hpp"
#include "support/target_descriptor.hpp"

namespace perdita_tests {
namespace {

template <class T>
class crammer_singer_descriptor final : public margin_descriptor<T, perdita::crammer_singer<T>> {
public:
  bool twice_smooth() const override { return false; }
  bool sparse() const override { return true; }

  row_expectation expect(int setting, const row_input& row) const override {
    const auto y = static_cast<std::size_t>(row.label);
    wide most = -infinity();
    int ties = 0;
    for (std::size_t k = 0; k < row.scores.size(); ++k)
      if (k != y && row.scores[k] > most)
        most = row.scores[k];
    for (std::size_t k = 0; k < row.scores.size(); ++k)
      ties += k != y && row.scores[k] == most && most > -infinity();
    const wide gap = ties == 0 ? wide(0) : wide(most - row.scores[y] + this->margin(setting));
    const bool active = gap > 0;
    row_expectation e = nothing_reported();
    e.value = {active ? gap : wide(0), 2 * size_of(gap)};
    if (sizeof(T) == 8)
      e.value.allow(size_of(most) + size_of(row.scores[y]));
    for (std::size_t k = 0; k < row.scores.size(); ++k) {
      const wide g = !active                 ? wide(0)
                     : k == y                ? wide(-1)
                     : row.scores[k] == most ? wide(1 / wide(ties))
                                             : wide(0);
      e.gradient.push_back({g, size_of(g)});
    }
    return e;
  }
};

template <class T>
class average_margin_descriptor final : public margin_descriptor<T, perdita::average_margin<T>> {
public:
  /// There are no masked classes, and the squares of the scores must be numbers of T.
  bool legal(int, row_kind kind, index) const override {
    const bool extreme = kind == row_kind::huge || kind == row_kind::tiny;
    return kind != row_kind::masked && !(extreme && sizeof(T) == 4);
  }
  row_expectation expect(int setting, const row_input& row) const override {
    const auto y = static_cast<std::size_t>(row.label);
    const wide n = static_cast<double>(row.scores.size()), c = this->margin(setting);
    wide mean = 0, spread = 0;
    for (const wide& x : row.scores)
      mean += x / n;
    for (const wide& x : row.scores)
      spread += size_of(wide(x - mean)) / n;
    row_expectation e = nothing_reported();
    const wide value = (mean - row.scores[y]) + c * (n - 1) / n;
    e.value = {value, 4 * (spread + size_of(value) + c) + 2 * size_of(mean)};
    for (std::size_t k = 0; k < row.scores.size(); ++k) {
      const wide g = k == y ? wide((1 - n) / n) : wide(1 / n);
      e.gradient.push_back({g, 2 * size_of(g)});
    }
    return e;
  }
};

} // namespace

TEMPLATE_TEST_CASE("crammer_singer: the row battery", "[ldr]", float, double) {
  check_row_loss(crammer_singer_descriptor<TestType>());
}
TEMPLATE_TEST_CASE("average_margin: the row battery", "[ldr]", float, double) {
  check_row_loss(average_margin_descriptor<TestType>());
}

TEMPLATE_TEST_CASE("crammer_singer: special rows", "[ldr]", float, double) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double n = std::numeric_limits<double>::quiet_NaN();
  const std::vector<special_row> rows{
      {"one class", 0, {3}, 0, {}, 0, {0}},
      {"ties", 0, {7, 7, 7, 1}, 0, {}, 1, {-1, 0.5, 0.5, 0}},
      {"on the kink", 0, {8, 7, 7, 1}, 0, {}, 0, {0, 0, 0, 0}},
      {"all rivals masked", 0, {-inf, 5, -inf}, 1, {}, 0, {0, 0, 0}},
      {"label masked", 0, {1, -inf, 0}, 1, {}, inf, {1, -1, 0}},
      {"all masked", 0, {-inf, -inf, -inf}, 1, {}, 0, {0, 0, 0}},
      {"+inf at the label", 0, {0, inf, 1}, 1, {}, 0, {0, 0, 0}},
      {"+inf elsewhere", 0, {0, inf, 1}, 0, {}, inf, {-1, 1, 0}},
      {"NaN", 0, {0, 1, n}, 0, {}, n, {n, n, n}},
      {"NaN below", 0, {5, n, 1}, 0, {}, n, {n, n, n}},
  };
  check_special(crammer_singer_descriptor<TestType>(), rows, 4);
}
TEMPLATE_TEST_CASE("average_margin: special rows", "[ldr]", float, double) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double n = std::numeric_limits<double>::quiet_NaN();
  const std::vector<special_row> rows{
      {"one class", 0, {3}, 0, {}, 0, {0}},
      {"two classes", 1, {3, -1}, 0, {}, -2, {-0.5, 0.5}},
      {"NaN", 0, {0, 1, n}, 0, {}, n, {n, n, n}},
      {"-inf", 0, {0, 1, -inf}, 0, {}, n, {n, n, n}},
  };
  check_special(average_margin_descriptor<TestType>(), rows, 4);
}

TEMPLATE_TEST_CASE("crammer_singer: NaN shows wherever the largest score is", "[ldr]", float,
                   double) {
  using T = TestType;
  using perdita::index;
  const index n = 1300;
  const perdita::crammer_singer<T> loss;
  const std::vector<int> label{0};
  for (const index wrong : {1, 3, 511, 512, 600, 1299})
    for (const index top : {2, 510, 513, 1298}) {
      std::vector<T> x(static_cast<std::size_t>(n)), g(x);
      x[static_cast<std::size_t>(wrong)] = std::numeric_limits<T>::quiet_NaN();
      x[static_cast<std::size_t>(top)] = 1;
      INFO("NaN at " << wrong << ", the largest at " << top);
      CHECK(std::isnan(loss(perdita::matrix_view<const T>(x.data(), 1, n), label,
                            perdita::matrix_view<T>(g.data(), 1, n))));
      CHECK(std::isnan(g[static_cast<std::size_t>(top)]));
      CHECK(std::isnan(loss(perdita::matrix_view<const T>(x.data(), 1, n, 1, 1), label)));
    }
}

// Formula sheet, appendix A.
TEST_CASE("crammer_singer: golden values", "[ldr]") {
  check_golden(perdita::crammer_singer<double>(), 2.5, {-1, 0, 1, 0});
}

TEST_CASE("ldr_kl: its limits", "[ldr]") {
  const std::vector<double> x{0.5, -1.2, 2, 0.1};
  const std::vector<int> label{0};
  const auto value = [&](const auto& loss) {
    return loss(perdita::matrix_view<const double>(x.data(), 1, 4), label);
  };
  using Catch::Matchers::WithinAbs;
  const double c = 0.3;
  CHECK_THAT(value(perdita::ldr_kl<double>({.lambda = 1e-4, .margin = c})),
             WithinAbs(value(perdita::crammer_singer<double>({.margin = c})), 1e-3));
  CHECK_THAT(value(perdita::ldr_kl<double>({.lambda = 1e6, .margin = c})),
             WithinAbs(value(perdita::average_margin<double>({.margin = c})), 1e-5));
}

TEST_CASE("ldr_kl's limits: options out of range are refused", "[ldr]") {
  using Catch::Matchers::ContainsSubstring;
  const float inf = std::numeric_limits<float>::infinity();
  CHECK_THROWS_WITH(perdita::crammer_singer<float>({.margin = inf}),
                    ContainsSubstring("margin is inf"));
  CHECK_THROWS_WITH(perdita::average_margin<float>({.margin = inf}),
                    ContainsSubstring("margin is inf"));
}

} // namespace perdita_tests
