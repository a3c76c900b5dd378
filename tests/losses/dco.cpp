// SPDX-License-Identifier: MIT

// Direct coverage optimisation's descriptor: formula sheet 6.

#include <perdita/dco.hpp>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/row_battery.hpp"
#include "support/target_descriptor.hpp"

namespace perdita_tests {
namespace {

wide log_of_failure(const target_point& at) {
  return at.p < wide(0.5) ? wide(log1p(wide(-at.p))) : wide(log(at.miss));
}
/// -log(1 - (1 - p)^n). Past c = 1000 only the first term of its series is left in 113 bits.
wide coverage_loss(const target_point& at, const wide& n) {
  if (at.c > 1000)
    return at.c - log(n);
  const wide exponent = n * log_of_failure(at);
  return exponent < -1 ? wide(-log1p(wide(-exp(exponent)))) : wide(-log(wide(-expm1(exponent))));
}
wide coverage_slope(const target_point& at, const wide& n) {
  if (n == 1 || at.c > 1000)
    return 1;
  if (at.miss == 0)
    return 0;
  const wide a = log_of_failure(at);
  return n * at.p * exp(wide((n - 1) * a)) / -expm1(wide(n * a));
}

template <class T> target_descriptor<T> dco_descriptor() {
  std::vector<target_setting<T>> settings;
  for (const double attempts : {16.0, 1.0, 2.0, 1.5, 256.0, 1000.0}) {
    const wide n = static_cast<T>(attempts);
    settings.push_back(make_target_setting<T, perdita::dco<T>>(
        "attempts " + perdita::core::to_text(attempts), {.attempts = static_cast<T>(attempts)},
        [=](const target_point& at) { return coverage_loss(at, n); },
        [=](const target_point& at) { return coverage_slope(at, n); }));
  }
  return {"dco", settings, {0, 4}};
}

} // namespace

TEMPLATE_TEST_CASE("dco: the row battery", "[dco]", float, double) {
  check_row_loss(dco_descriptor<TestType>());
}

TEMPLATE_TEST_CASE("dco: special rows", "[dco]", float, double) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double n = std::numeric_limits<double>::quiet_NaN();
  const double e1 = std::exp(1.0), p1 = e1 / (1 + e1), half = std::exp2(-16);
  const double f = 16 * half / (1 - half) / 2;
  const std::vector<special_row> rows{
      {"one class", 0, {3}, 0, {}, 0, {0}},
      {"one class, one attempt", 1, {3}, 0, {}, 0, {0}},
      {"half masked", 0, {7, 7, -inf, -inf}, 0, {}, -std::log1p(-half), {-f, f, 0, 0}},
      {"all rivals masked", 4, {-inf, 5, -inf}, 1, {}, 0, {0, 0, 0}},
      {"label masked", 0, {1, -inf, 0}, 1, {}, inf, {p1, -1, 1 - p1}},
      {"all masked", 0, {-inf, -inf, -inf}, 1, {}, inf, {0, -1, 0}},
      {"+inf at the label", 0, {0, inf, 1}, 1, {}, 0, {0, 0, 0}},
      {"+inf elsewhere", 0, {0, inf, 1}, 0, {}, n, {n, n, n}},
      {"NaN", 0, {0, 1, n}, 0, {}, n, {n, n, n}},
  };
  check_special(dco_descriptor<TestType>(), rows, 8);
}

TEST_CASE("dco: golden values", "[dco]") {
  check_golden(perdita::dco<double>({.attempts = 16}), 0.0661337731126,
               {-0.172686204, 0.00591354113, 0.145074126, 0.0216985368});
  check_golden(perdita::dco<double>(), 1.8460412949,
               {-0.842139144, 0.0288385774, 0.707483271, 0.105817296});
}

TEST_CASE("dco: an answer of several tokens, for N p from 1e-290 to 1e6 and beyond", "[dco]") {
  const double epsilon = std::numeric_limits<double>::epsilon();
  for (const double attempts : {1.0, 2.0, 16.0, 1e6})
    for (double log_p = -660; log_p < -1e-18; log_p *= 0.93) {
      const target_point at = target_point::at(-log_p);
      const wide value = coverage_loss(at, attempts), slope = coverage_slope(at, attempts);
      const auto got = perdita::dco<float>::coverage(log_p, attempts);
      // (1 - p)^N is computed as e^{N log(1 - p)}, and log p itself was rounded.
      const double exponent = static_cast<double>(wide(attempts * size_of(log_of_failure(at))));
      const double moved = std::fabs(log_p) * static_cast<double>(slope);
      INFO("N " << attempts << ", log p " << log_p);
      CHECK(static_cast<double>(size_of(got.value - value)) <=
            8 * epsilon * ((1 + exponent) * static_cast<double>(value) + moved));
      CHECK(static_cast<double>(size_of(-got.slope - slope)) <=
            (8 + 4 * exponent + 2 * std::fabs(log_p)) * epsilon * static_cast<double>(slope));
      CHECK((got.slope <= 0 && got.slope >= -1 - 1e-12));
    }
  CHECK(perdita::dco<float>::coverage(0, 16).value == 0);
  CHECK(perdita::dco<float>::coverage(0, 16).slope == 0);
  CHECK(perdita::dco<float>::coverage(0, 1).slope == -1);
  const auto lost = perdita::dco<float>::coverage(-5000, 16);
  CHECK(lost.value == 5000 - std::log(16.0));
  CHECK(lost.slope == -1);
  // p is lost, N p is not: both are 1/2, and then 64.
  for (const double np : {0.5, 64.0}) {
    const double log_p = -650, attempts = np * std::exp(-log_p);
    const auto some = perdita::dco<float>::coverage(log_p, attempts);
    const double missed = std::exp(-np), value = -std::log1p(-missed);
    CHECK(std::fabs(some.value - value) <= 1e-12 * value);
    CHECK(std::fabs(-some.slope - np * missed / (1 - missed)) <= 1e-12 * np * missed);
  }
}

TEST_CASE("dco: options and arguments out of range are refused", "[dco]") {
  using Catch::Matchers::ContainsSubstring;
  CHECK_THROWS_WITH(perdita::dco<float>({.attempts = 0.5F}), ContainsSubstring("attempts is 0.5"));
  CHECK_THROWS_WITH(perdita::dco<float>::coverage(0.1, 4),
                    ContainsSubstring("log_probability is 0.1"));
  CHECK_THROWS_WITH(perdita::dco<float>::coverage(-1, 0), ContainsSubstring("attempts is 0"));
}

} // namespace perdita_tests
