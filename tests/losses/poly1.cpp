// SPDX-License-Identifier: MIT

// Poly-1's descriptor: formula sheet 1.5.

#include <perdita/poly.hpp>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/row_battery.hpp"
#include "support/target_descriptor.hpp"

namespace perdita_tests {
namespace {

/// (1 - p)^γ, as 0^0 = 1.
wide focus(const target_point& at, const wide& gamma) {
  return gamma == 0 ? wide(1) : at.miss == 0 ? wide(0) : wide(exp(wide(gamma * log(at.miss))));
}

template <class T> target_descriptor<T> poly1_descriptor() {
  std::vector<target_setting<T>> settings;
  for (const double epsilon : {1.0, 0.0, -1.0, 3.5})
    for (const double gamma : {0.0, 2.0, 0.5}) {
      const wide e = static_cast<T>(epsilon), g = static_cast<T>(gamma);
      settings.push_back(make_target_setting<T, perdita::poly1<T>>(
          "epsilon " + perdita::core::to_text(epsilon) + ", gamma " + perdita::core::to_text(gamma),
          {.epsilon = static_cast<T>(epsilon), .gamma = static_cast<T>(gamma)},
          [=](const target_point& at) { return focus(at, g) * (at.c + e * at.miss); },
          [=](const target_point& at) {
            const wide ratio = at.miss == 0 ? wide(1) : wide(weighted(at.p, at.c) / at.miss);
            return weighted(focus(at, g), 1 + g * ratio + e * (g + 1) * at.p);
          }));
      // Terms of both signs: what is left of them has no more digits than they.
      settings.back().terms = [=](const target_point& at) {
        return focus(at, g) * (at.c + size_of(e) * at.miss);
      };
      settings.back().slope_terms = [=](const target_point& at) {
        const wide ratio = at.miss == 0 ? wide(1) : wide(weighted(at.p, at.c) / at.miss);
        return weighted(focus(at, g), 1 + g * ratio + size_of(e) * (g + 1) * at.p);
      };
    }
  return {"poly1", settings, {0, 4}};
}

} // namespace

TEMPLATE_TEST_CASE("poly1: the row battery", "[poly1]", float, double) {
  check_row_loss(poly1_descriptor<TestType>());
}

TEMPLATE_TEST_CASE("poly1: special rows", "[poly1]", float, double) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double n = std::numeric_limits<double>::quiet_NaN();
  const double e1 = std::exp(1.0), p1 = e1 / (1 + e1);
  const std::vector<special_row> rows{
      {"one class", 0, {3}, 0, {}, 0, {0}},
      {"one class, focal", 1, {3}, 0, {}, 0, {0}},
      {"half masked", 0, {7, 7, -inf, -inf}, 0, {}, std::log(2.0) + 0.5, {-0.75, 0.75, 0, 0}},
      {"all rivals masked", 1, {-inf, 5, -inf}, 1, {}, 0, {0, 0, 0}},
      {"label masked", 0, {1, -inf, 0}, 1, {}, inf, {p1, -1, 1 - p1}},
      {"label masked, focal", 1, {1, -inf, 0}, 1, {}, inf, {p1, -1, 1 - p1}},
      {"all masked", 0, {-inf, -inf, -inf}, 1, {}, inf, {0, -1, 0}},
      {"+inf at the label", 0, {0, inf, 1}, 1, {}, 0, {0, 0, 0}},
      {"+inf elsewhere", 1, {0, inf, 1}, 0, {}, n, {n, n, n}},
      {"NaN", 1, {0, 1, n}, 0, {}, n, {n, n, n}},
  };
  check_special(poly1_descriptor<TestType>(), rows, 8);
}

TEST_CASE("poly1: golden values", "[poly1]") {
  check_golden(perdita::poly1<double>(), 2.68818043933,
               {-0.97507995, 0.0333910599, 0.819167186, 0.122521705});
  check_golden(perdita::poly1<double>({.epsilon = 0, .gamma = 2}), 1.30920941929,
               {-1.01058952, 0.034607065, 0.848998867, 0.126983588});
}

TEST_CASE("poly1: options out of range are refused", "[poly1]") {
  using Catch::Matchers::ContainsSubstring;
  CHECK_THROWS_WITH(perdita::poly1<float>({.epsilon = -2}), ContainsSubstring("epsilon is -2"));
  CHECK_THROWS_WITH(perdita::poly1<float>({.gamma = -1}), ContainsSubstring("gamma is -1"));
}

} // namespace perdita_tests
