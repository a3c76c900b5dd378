// SPDX-License-Identifier: MIT

// The comp-sum losses' descriptor: formula sheet 2.1.

#include <perdita/comp_sum.hpp>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/row_battery.hpp"
#include "support/target_descriptor.hpp"

namespace perdita_tests {
namespace {

template <class T> target_descriptor<T> comp_sum_descriptor() {
  std::vector<target_setting<T>> settings;
  for (const double tau : {1.0, 0.0, 0.5, 1.5, 2.0, 3.0, 1 - 1e-6, 1 + 1e-6, 1.7}) {
    const T rounded = static_cast<T>(tau);
    const wide rest = 1 - wide(rounded);
    settings.push_back(make_target_setting<T, perdita::comp_sum<T>>(
        "tau " + perdita::core::to_text(tau), {.tau = rounded},
        [=](const target_point& at) {
          return rest == 0 ? at.c : wide(expm1(wide(rest * at.c)) / rest);
        },
        [=](const target_point& at) { return wide(exp(wide(rest * at.c))); }));
    settings.back().grows = tau < 1;
  }
  return {"comp_sum", settings, {0, 2, 3}};
}

} // namespace

TEMPLATE_TEST_CASE("comp_sum: the row battery", "[comp_sum]", float, double) {
  check_row_loss(comp_sum_descriptor<TestType>());
}

TEMPLATE_TEST_CASE("comp_sum: special rows", "[comp_sum]", float, double) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double n = std::numeric_limits<double>::quiet_NaN();
  const double e1 = std::exp(1.0), p1 = e1 / (1 + e1);
  const std::vector<special_row> rows{
      {"one class", 2, {3}, 0, {}, 0, {0}},
      {"half masked, tau 1", 0, {7, 7, -inf, -inf}, 0, {}, std::log(2.0), {-0.5, 0.5, 0, 0}},
      {"half masked, tau 0", 1, {7, 7, -inf, -inf}, 0, {}, 1, {-1, 1, 0, 0}},
      {"half masked, tau 2", 4, {7, 7, -inf, -inf}, 0, {}, 0.5, {-0.25, 0.25, 0, 0}},
      {"all rivals masked", 4, {-inf, 5, -inf}, 1, {}, 0, {0, 0, 0}},
      {"label masked, tau 1", 0, {1, -inf, 0}, 1, {}, inf, {p1, -1, 1 - p1}},
      {"label masked, tau 2", 4, {1, -inf, 0}, 1, {}, 1, {0, 0, 0}},
      {"label masked, tau 3", 5, {1, -inf, 0}, 1, {}, 0.5, {0, 0, 0}},
      {"+inf at the label", 3, {0, inf, 1}, 1, {}, 0, {0, 0, 0}},
      {"+inf elsewhere", 3, {0, inf, 1}, 0, {}, n, {n, n, n}},
      {"NaN", 2, {0, 1, n}, 0, {}, n, {n, n, n}},
  };
  check_special(comp_sum_descriptor<TestType>(), rows, 8);
}

TEST_CASE("comp_sum: golden values", "[comp_sum]") {
  const auto loss = [](double tau) { return perdita::comp_sum<double>({.tau = tau}); };
  check_golden(loss(0), 5.33469264043, {-5.33469264, 0.182683524, 4.48168907, 0.670320046});
  check_golden(loss(0.5), 3.03376306174, {-2.11956446, 0.0725832828, 1.78065158, 0.266329598});
  check_golden(loss(1), 1.8460412949, {-0.842139144, 0.0288385774, 0.707483271, 0.105817296});
  check_golden(loss(1.5), 1.20536585633, {-0.334596259, 0.0114580591, 0.281095182, 0.0420430182});
  check_golden(loss(1.7), 1.03620298066, {-0.23130018, 0.0079207435, 0.194315879, 0.0290635577});
  check_golden(loss(2), 0.842139144429, {-0.132940806, 0.0045524825, 0.111683914, 0.0167044089});
}

TEMPLATE_TEST_CASE("comp_sum: a value out of range is infinite, its gradient never", "[comp_sum]",
                   float, double) {
  using T = TestType;
  const std::vector<T> x{0, 1000, 999};
  const std::vector<int> label{0};
  std::vector<T> g(3);
  const T value = perdita::comp_sum<T>({.tau = 0})(perdita::matrix_view<const T>(x.data(), 1, 3),
                                                   label, perdita::matrix_view<T>(g.data(), 1, 3));
  CHECK(value == std::numeric_limits<T>::infinity());
  for (const T slope : g)
    CHECK(std::isfinite(slope));
  CHECK(g[0] < -std::numeric_limits<T>::max() * T(0x1p-25));
  CHECK(g[1] > g[2]);
}

TEST_CASE("comp_sum: options out of range are refused", "[comp_sum]") {
  using Catch::Matchers::ContainsSubstring;
  CHECK_THROWS_WITH(perdita::comp_sum<float>({.tau = -0.5F}), ContainsSubstring("tau is -0.5"));
  CHECK_THROWS_WITH(perdita::comp_sum<float>({.tau = std::numeric_limits<float>::infinity()}),
                    ContainsSubstring("tau is inf"));
}

} // namespace perdita_tests
