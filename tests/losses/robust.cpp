// SPDX-License-Identifier: MIT

// Descriptors of the losses for noisy labels: formula sheet 4.4.

#include <perdita/robust.hpp>

#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/row_battery.hpp"
#include "support/target_descriptor.hpp"

namespace perdita_tests {
namespace {

using perdita::core::to_text;

template <class T> T in(double x) { return static_cast<T>(x); }

template <class T> target_descriptor<T> truncated_gce_descriptor() {
  std::vector<target_setting<T>> settings;
  for (const double q : {0.7, 0.05, 1.0})
    for (const double k : {0.1, 0.45}) {
      const wide power = in<T>(q), least = in<T>(k);
      const wide most = -log(least);
      settings.push_back(make_target_setting<T, perdita::truncated_gce<T>>(
          "q " + to_text(q) + ", threshold " + to_text(k), {.q = in<T>(q), .threshold = in<T>(k)},
          [=](const target_point& at) {
            return wide(-expm1(wide(-power * smaller(at.c, most))) / power);
          },
          [=](const target_point& at) {
            return at.c < most ? wide(exp(wide(-power * at.c))) : wide(0);
          }));
      settings.back().smooth = false;
    }
  return {"truncated_gce", settings, {0, 3}};
}

template <class T> target_descriptor<T> symmetric_descriptor() {
  std::vector<target_setting<T>> settings;
  for (const auto& [alpha, beta, a] :
       {std::tuple(0.1, 1.0, -4.0), {0.5, 0.5, -9.21}, {1, 0, -4}, {0, 1, -4}}) {
    const wide first = in<T>(alpha), second = -wide(in<T>(beta)) * wide(in<T>(a));
    settings.push_back(make_target_setting<T, perdita::symmetric_cross_entropy<T>>(
        "alpha " + to_text(alpha) + ", beta " + to_text(beta) + ", A " + to_text(a),
        {.alpha = in<T>(alpha), .beta = in<T>(beta), .log_of_zero = in<T>(a)},
        [=](const target_point& at) { return weighted(first, at.c) + second * at.miss; },
        [=](const target_point& at) { return first + second * at.p; }));
  }
  return {"symmetric_cross_entropy", settings, {0, 3}};
}

template <class T> target_descriptor<T> asymmetric_gce_descriptor() {
  std::vector<target_setting<T>> settings;
  for (const auto& [a, q] : {std::pair(1.0, 2.0), {3, 1.5}, {0.1, 0.5}, {2, 1}}) {
    const wide base = in<T>(a), power = in<T>(q);
    settings.push_back(make_target_setting<T, perdita::asymmetric_gce<T>>(
        "a " + to_text(a) + ", q " + to_text(q), {.a = in<T>(a), .q = in<T>(q)},
        [=](const target_point& at) {
          const wide shrunk = power * log1p(wide(-at.miss / (base + 1)));
          return wide(-pow(wide(base + 1), power) * expm1(shrunk) / power);
        },
        [=](const target_point& at) {
          return wide(pow(wide(base + at.p), wide(power - 1)) * at.p);
        }));
  }
  return {"asymmetric_gce", settings, {0, 2}};
}

template <class T> target_descriptor<T> asymmetric_unhinged_descriptor() {
  std::vector<target_setting<T>> settings;
  for (const auto& [a, q] : {std::pair(1.5, 0.9), {6, 1.5}, {1.125, 3}, {2, 1}}) {
    const wide base = in<T>(a), power = in<T>(q);
    settings.push_back(make_target_setting<T, perdita::asymmetric_unhinged<T>>(
        "a " + to_text(a) + ", q " + to_text(q), {.a = in<T>(a), .q = in<T>(q)},
        [=](const target_point& at) {
          const wide grown = power * log1p(wide(at.miss / (base - 1)));
          return wide(pow(wide(base - 1), power) * expm1(grown) / power);
        },
        [=](const target_point& at) {
          return wide(pow(wide(base - 1 + at.miss), wide(power - 1)) * at.p);
        }));
    // It is computed as a power, whose exponent's rounding grows with it.
    settings.back().terms = [=](const target_point& at) {
      const wide grown = power * log1p(wide(at.miss / (base - 1)));
      return wide(pow(wide(base - 1), power) * expm1(grown) / power * (1 + grown));
    };
  }
  return {"asymmetric_unhinged", settings, {0, 2}};
}

template <class T> target_descriptor<T> jensen_shannon_descriptor() {
  std::vector<target_setting<T>> settings;
  for (const double share : {0.5, 0.1, 0.9, 0.01}) {
    const wide pi = in<T>(share), rest = 1 - pi, most = -log(rest);
    settings.push_back(make_target_setting<T, perdita::jensen_shannon<T>>(
        "pi " + to_text(share), {.pi = in<T>(share)},
        [=](const target_point& at) {
          const wide log_m = log1p(wide(-rest * at.miss));
          return wide((-pi * log_m - rest * weighted(at.p, at.c + log_m) + rest * most * at.miss) /
                      (rest * most));
        },
        [=](const target_point& at) {
          const wide log_m = log1p(wide(-rest * at.miss));
          return wide(at.p + weighted(at.p, at.c + log_m) / most);
        }));
    // The first two terms cancel near p = 1.
    settings.back().terms = [=](const target_point& at) {
      const wide log_m = log1p(wide(-rest * at.miss));
      return wide((-pi * log_m + rest * weighted(at.p, at.c - log_m) + rest * most * at.miss) /
                  (rest * most));
    };
    settings.back().slope_terms = [=](const target_point& at) {
      const wide log_m = log1p(wide(-rest * at.miss));
      return wide(at.p + weighted(at.p, at.c - log_m) / most);
    };
  }
  return {"jensen_shannon", settings, {0, 2}};
}

template <class T, class F> void for_all(F f) {
  f(truncated_gce_descriptor<T>());
  f(symmetric_descriptor<T>());
  f(asymmetric_gce_descriptor<T>());
  f(asymmetric_unhinged_descriptor<T>());
  f(jensen_shannon_descriptor<T>());
}

} // namespace

TEMPLATE_TEST_CASE("truncated_gce: the row battery", "[robust]", float, double) {
  check_row_loss(truncated_gce_descriptor<TestType>());
}
TEMPLATE_TEST_CASE("symmetric_cross_entropy: the row battery", "[robust]", float, double) {
  check_row_loss(symmetric_descriptor<TestType>());
}
TEMPLATE_TEST_CASE("asymmetric_gce: the row battery", "[robust]", float, double) {
  check_row_loss(asymmetric_gce_descriptor<TestType>());
}
TEMPLATE_TEST_CASE("asymmetric_unhinged: the row battery", "[robust]", float, double) {
  check_row_loss(asymmetric_unhinged_descriptor<TestType>());
}
TEMPLATE_TEST_CASE("jensen_shannon: the row battery", "[robust]", float, double) {
  check_row_loss(jensen_shannon_descriptor<TestType>());
}

namespace {

/// Value and slope, of a label with a score of s against one rival with 0, to all digits: f(at)
/// gives what they should be.
template <class Loss, class F> void check_digits(const Loss& loss, F f) {
  using T = typename Loss::value_type;
  const std::vector<int> label{0};
  for (const double s : {-25.0, -15.125, -8.0, -2.5, 0.0, 0.75, 3.0, 10.0}) {
    const std::vector<T> x{in<T>(s), 0};
    std::vector<T> g(2);
    const T value = loss(perdita::matrix_view<const T>(x.data(), 1, 2), label,
                         perdita::matrix_view<T>(g.data(), 1, 2));
    const target_point at = target_point::at(softplus(-wide(s)));
    const auto [expected, slope] = f(at);
    const auto off = [](const wide& got, const wide& right) {
      return static_cast<double>(size_of(wide(got / right - 1)));
    };
    const double epsilon = static_cast<double>(std::numeric_limits<T>::epsilon());
    INFO("score " << s);
    CHECK(off(value, expected) < 8 * epsilon);
    CHECK(off(g[1], wide(slope * at.miss)) < 8 * epsilon);
    CHECK(off(g[0], wide(-slope * at.miss)) < 8 * epsilon);
  }
}

} // namespace

TEMPLATE_TEST_CASE("asymmetric_gce: all digits for a small a and a large one", "[robust]", float,
                   double) {
  using T = TestType;
  for (const double a : {1e-5, 1e-3, 0.5, 100.0, 1e4})
    for (const double q : {0.5, 1.5}) {
      INFO("a " << a << ", q " << q);
      const wide base = in<T>(a), power = in<T>(q);
      check_digits(perdita::asymmetric_gce<T>({.a = in<T>(a), .q = in<T>(q)}),
                   [&](const target_point& at) {
                     const wide top = pow(wide(base + 1), power), own = base + at.p;
                     return std::pair(wide((top - pow(own, power)) / power),
                                      wide(pow(own, wide(power - 1)) * at.p));
                   });
    }
}

TEMPLATE_TEST_CASE("jensen_shannon: all digits for any π", "[robust]", float, double) {
  using T = TestType;
  for (const double share : {1e-8, 1e-6, 1e-4, 0.03, 0.5, 0.97, 0.9999}) {
    INFO("pi " << share);
    const wide pi = in<T>(share), rest = 1 - pi, most = -log1p(wide(-pi));
    check_digits(perdita::jensen_shannon<T>({.pi = in<T>(share)}), [&](const target_point& at) {
      const wide log_m = log1p(wide(-rest * at.miss)), ratio = at.p * wide(at.c + log_m);
      return std::pair(wide((rest * (most * at.miss - ratio) - pi * log_m) / (rest * most)),
                       wide(at.p + ratio / most));
    });
  }
}

TEMPLATE_TEST_CASE("robust losses: special rows", "[robust]", float, double) {
  using T = TestType;
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double n = std::numeric_limits<double>::quiet_NaN();
  const auto check = [&](const auto& d, double masked_label, double half, double slope_at_half) {
    const double g = slope_at_half / 2;
    const std::vector<special_row> rows{
        {"one class", 0, {3}, 0, {}, 0, {0}},
        {"half masked", 0, {7, 7, -inf, -inf}, 0, {}, half, {-g, g, 0, 0}},
        {"all rivals masked", 0, {-inf, 5, -inf}, 1, {}, 0, {0, 0, 0}},
        {"label masked", 0, {1, -inf, 1}, 1, {}, masked_label, {0, 0, 0}},
        {"+inf at the label", 0, {0, inf, 1}, 1, {}, 0, {0, 0, 0}},
        {"+inf elsewhere", 0, {0, inf, 1}, 0, {}, n, {n, n, n}},
        {"NaN", 0, {0, 1, n}, 0, {}, n, {n, n, n}},
    };
    check_special(d, rows, 12);
  };
  const double power = in<T>(0.7);
  const auto gce = [&](double p) { return (1 - std::pow(p, power)) / power; };
  check(truncated_gce_descriptor<T>(), gce(in<T>(0.1)), gce(0.5), std::pow(0.5, power));
  check(asymmetric_gce_descriptor<T>(), 1.5, (4 - 2.25) / 2, 0.75);
  const double q = in<T>(0.9);
  const auto unhinged = [&](double p) { return (std::pow(1.5 - p, q) - std::pow(0.5, q)) / q; };
  check(asymmetric_unhinged_descriptor<T>(), unhinged(0), unhinged(0.5), 0.5);
  const double js =
      (-0.5 * std::log(0.75) - 0.25 * std::log(1.5) - 0.25 * std::log(2)) * 2 / std::log(2.0) + 1;
  check(jensen_shannon_descriptor<T>(), 2, js, std::log(3.0) / std::log(2.0) / 2);
}

TEST_CASE("robust losses: golden values", "[robust]") {
  check_golden(perdita::symmetric_cross_entropy<double>({.alpha = 0.5, .beta = 0.5}), 2.60729893631,
               {-0.686951184, 0.0235242537, 0.577109464, 0.0863174657});
  check_golden(perdita::symmetric_cross_entropy<double>(
                   {.alpha = 0, .beta = 1, .log_of_zero = std::log(1e-4)}),
               7.75638816075, {-1.22443007, 0.0419299134, 1.02864687, 0.153853291});
  check_golden(perdita::asymmetric_unhinged<double>({.a = 6, .q = 1.5}), 1.96027515589,
               {-0.321324807, 0.0110035858, 0.269945801, 0.0403754206});
  check_golden(perdita::asymmetric_gce<double>({.a = 3, .q = 1.5}), 1.59224273487,
               {-0.236240744, 0.00808993031, 0.19846646, 0.0296843543});
  check_golden(perdita::jensen_shannon<double>(), 1.33472974507,
               {-0.382169788, 0.0130871877, 0.321061827, 0.0480207741});
  check_golden(perdita::truncated_gce<double>({.threshold = 0.1}), 1.03620298066,
               {-0.23130018, 0.0079207435, 0.194315879, 0.0290635577});
  check_golden(perdita::truncated_gce<double>({.threshold = 0.2}), (1 - std::pow(0.2, 0.7)) / 0.7,
               {0, 0, 0, 0});
}

TEST_CASE("robust losses: options out of range are refused", "[robust]") {
  using Catch::Matchers::ContainsSubstring;
  CHECK_THROWS_WITH(perdita::truncated_gce<float>({.q = 0}), ContainsSubstring("q is 0"));
  CHECK_THROWS_WITH(perdita::truncated_gce<float>({.threshold = 1}),
                    ContainsSubstring("threshold is 1"));
  CHECK_THROWS_WITH(perdita::symmetric_cross_entropy<float>({.log_of_zero = 0}),
                    ContainsSubstring("log_of_zero is 0"));
  CHECK_THROWS_WITH(perdita::symmetric_cross_entropy<float>({.beta = -1}),
                    ContainsSubstring("beta is -1"));
  CHECK_THROWS_WITH(perdita::asymmetric_gce<float>({.a = 0}), ContainsSubstring("a is 0"));
  CHECK_THROWS_WITH(perdita::asymmetric_unhinged<float>({.a = 1}), ContainsSubstring("a is 1"));
  CHECK_THROWS_WITH(perdita::jensen_shannon<float>({.pi = 1}), ContainsSubstring("pi is 1"));
}

} // namespace perdita_tests
