// SPDX-License-Identifier: MIT
#include "perdita/testing/gradient_check.hpp"

#include "support/catch.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

using perdita::testing::check_direction;
using perdita::testing::check_gradient;
using perdita::testing::gradient_check_options;
using perdita::testing::gradient_report;

using point = std::span<const double>;
constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

template <class T> bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <class T> double log_sum_exp(std::span<const T> x) {
  double largest = -infinity, sum = 0;
  for (T v : x)
    largest = std::max(largest, static_cast<double>(v));
  for (T v : x)
    sum += std::exp(static_cast<double>(v) - largest);
  return largest + std::log(sum);
}

template <class T> std::vector<double> softmax(const std::vector<T>& x) {
  std::vector<double> p;
  for (T v : x)
    p.push_back(std::exp(static_cast<double>(v) - log_sum_exp(std::span<const T>(x))));
  return p;
}

double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

// One smooth function of all its arguments, of several kinds, and its gradient.
struct mixture {
  std::vector<double> x{0.7, -1.3, 0, 2.5, -0.2, 10};
  static double value(point x) {
    return x[0] * x[0] * x[0] * x[1] - 2 * x[1] + std::exp(x[2] + 0.5 * x[0]) + softplus(x[3]) +
           std::log(1 + x[4] * x[4]) + x[5] * std::sin(x[4]);
  }
  std::vector<double> gradient() const {
    const double e = std::exp(x[2] + 0.5 * x[0]);
    return {3 * x[0] * x[0] * x[1] + 0.5 * e,
            x[0] * x[0] * x[0] - 2,
            e,
            1 / (1 + std::exp(-x[3])),
            2 * x[4] / (1 + x[4] * x[4]) + x[5] * std::cos(x[4]),
            std::sin(x[4])};
  }
};

// f(x) of one argument, and what a check says of the derivative g.
template <class Function> gradient_report check_at(double x, double g, Function f) {
  std::vector<double> arguments{x};
  return check_gradient([&](point p) { return f(p[0]); }, arguments, std::array{g});
}

} // namespace

TEST_CASE("gradient check: right gradients pass, every entry resolved", "[gradient_check]") {
  mixture m;
  const auto report = check_gradient(mixture::value, m.x, m.gradient());
  INFO(report.message());
  CHECK(report);
  CHECK(report.entries == 6);
  CHECK(report.wrong == 0);
  CHECK(report.unresolved == 0);
  CHECK(report.worst_error < 1e-11);
  CHECK(report.value == mixture::value(m.x));
  CHECK(report.evaluations < 6 * 60);
  CHECK(contains(report.message(), "gradient ok: 6 entries"));

  std::vector<double> logits{3, -2, 0, 0.5, -30, 2.9, 100, 99};
  CHECK(check_gradient(log_sum_exp<double>, logits, softmax(logits)));
}

TEST_CASE("gradient check: smooth functions on hard ground", "[gradient_check]") {
  const auto right = [](const gradient_report& report) {
    INFO(report.message());
    CHECK(report.ok);
    CHECK(report.unresolved == 0);
  };
  for (double x : {-700.0, -30.0, -1.0, 0.0, 1e-9, 3.0, 40.0, 700.0}) {
    right(check_at(x, std::exp(x), [](double v) { return std::exp(v); }));
    right(check_at(x, 1 / (1 + std::exp(-x)), softplus));
  }
  for (double x : {1e-6, 1e-3, 1.0, 1e6}) // steps that leave the domain are passed over
    right(check_at(x, 1 / x, [](double v) { return std::log(v); }));
  for (double x : {0.0, 0.25, 0.3}) { // periods in the way of the steps
    const double w = 4 * std::acos(-1.0);
    right(check_at(x, w * std::cos(w * x), [=](double v) { return std::sin(w * v); }));
    right(check_at(x, 1e4 * std::cos(1e4 * x), [](double v) { return std::sin(1e4 * v); }));
  }
  for (double x : {1e-5, -1e-3, 0.2}) // a kink beside x, inside the first steps
    right(check_at(x, x > 0 ? 1 : -1, [](double v) { return std::abs(v); }));
  right(check_at(-0.1, 0, [](double v) { return std::max(v, 0.0); }));
  right(check_at(3e-7, 3e-7 / std::sqrt(9e-14 + 1e-12),
                 [](double v) { return std::sqrt(v * v + 1e-12); })); // almost a kink
  right(check_at(0, 0, [](double v) { return 5 + v * v; }));
  right(check_at(2, 0, [](double) { return 7.0; }));
}

TEST_CASE("gradient check: wrong gradients fail and the worst entry is named", "[gradient_check]") {
  mixture m;
  const auto gradient = m.gradient();
  const auto fails_at = [&](std::size_t entry, double instead) {
    auto wrong = gradient;
    wrong[entry] = instead;
    const auto report = check_gradient(mixture::value, m.x, wrong);
    INFO(report.message());
    CHECK_FALSE(report);
    CHECK(report.wrong == 1);
    CHECK(report.worst_index == entry);
    CHECK(contains(report.message(), "wrong in 1 of 6 entries"));
    CHECK(contains(report.message(), "worst at entry " + std::to_string(entry) + ": "));
    return report;
  };
  for (std::size_t i = 0; i < gradient.size(); ++i) {
    const double g = gradient[i];
    fails_at(i, -g);
    CHECK(fails_at(i, 0).analytic == 0);
    fails_at(i, infinity);
    CHECK(contains(fails_at(i, not_a_number).message(), "analytic nan"));
    if (std::abs(g) < 1) // below the floor of scale, a relative error counts for less
      continue;
    CHECK(std::abs(fails_at(i, g / 2).worst_error - 0.5) < 1e-9);
    CHECK(std::abs(fails_at(i, g * (1 + 1e-6)).worst_error - 1e-6) < 1e-9);
    fails_at(i, g * (1 - 1e-7));
  }

  auto half = gradient;
  for (double& g : half)
    g /= 2;
  CHECK(check_gradient(mixture::value, m.x, half).wrong == 6);
}

TEST_CASE("gradient check: the verdict does not depend on the unit of the value",
          "[gradient_check]") {
  mixture m;
  for (double unit : {1e-12, 1e-6, 1e9}) {
    const auto value = [=](point x) { return unit * mixture::value(x); };
    auto gradient = m.gradient();
    for (double& g : gradient)
      g *= unit;
    const auto right = check_gradient(value, m.x, gradient);
    INFO(right.message());
    CHECK(right);
    CHECK(right.unresolved == 0);
    gradient[4] *= 1 + 1e-6;
    CHECK(check_gradient(value, m.x, gradient).worst_index == 4);
    CHECK_FALSE(check_gradient(value, m.x, gradient));
  }
}

TEST_CASE("gradient check: a kink is unresolved, not right and not wrong", "[gradient_check]") {
  const auto absolute = [](double v) { return std::abs(v); };
  const auto hinge = [](double v) { return std::max(0.0, 1 - v); };
  for (double g : {-1.0, -0.5, 0.0, 0.5, 1.0}) {
    const auto report = check_at(0, g, absolute);
    INFO(report.message());
    CHECK_FALSE(report); // nothing else was checked
    CHECK(report.wrong == 0);
    CHECK(report.unresolved == 1);
    CHECK(contains(report.message(), "gradient not checked"));
  }
  for (double g : {-1.0, -0.5, 0.0})
    CHECK(check_at(1, g, hinge).wrong == 0);
  CHECK(check_at(1, -0.5, hinge).unresolved == 1);
  // Beyond the one-sided slopes it is wrong all the same.
  CHECK(check_at(0, 3, absolute).wrong == 1);
  CHECK(check_at(1, 1, hinge).wrong == 1);

  // Slopes differ on both sides and nothing is symmetric: an agreement by accident would show here.
  for (int k = 0; k < 500; ++k) {
    const double left = std::sin(k), right = std::cos(3.1 * k), bend = 3 * std::sin(0.7 * k);
    const double x0 = k % 3 == 0 ? 0 : 2 * std::cos(0.3 * k);
    const auto report = check_at(x0, left, [&](double v) {
      const double t = v - x0;
      return 1 + (t > 0 ? right : left) * t + bend * t * t;
    });
    INFO(k << ": " << report.message());
    CHECK(report.wrong == 0);
    CHECK(report.unresolved == 1);
  }

  // Among smooth entries it is counted, and its place is told.
  std::vector<double> x{1, 2, 0, 3};
  const auto value = [](point p) {
    return std::abs(p[0]) + std::abs(p[1]) + std::abs(p[2]) + p[3] * p[3];
  };
  const auto report = check_gradient(value, x, std::array{1.0, 1.0, 0.0, 6.0});
  CHECK(report);
  CHECK(report.unresolved == 1);
  CHECK(report.first_unresolved == 2);
  CHECK(report.worst_index != 2);
  CHECK(contains(report.message(), "unresolved (a kink, or too much noise): 1, the first at entry "
                                   "2"));
}

TEST_CASE("gradient check: too much noise is unresolved, not wrong", "[gradient_check]") {
  const auto noisy = [](double v) { return std::exp(v) + 1e-6 * std::sin(1e15 * v); };
  const auto report = check_at(0.5, std::exp(0.5), noisy);
  INFO(report.message());
  CHECK(report.wrong == 0);
  CHECK(report.unresolved == 1);
  CHECK(check_at(0.5, 2, noisy).wrong == 1);

  // Arguments in double, rounded to float on the way: below that the value stands still.
  for (int k = 1; k < 200; ++k) {
    const double at = 3 * std::sin(k);
    const auto coarse = check_at(at, std::exp(at), [](double v) {
      return std::exp(static_cast<double>(static_cast<float>(v)));
    });
    INFO(coarse.message());
    CHECK(coarse.wrong == 0);
  }

  std::vector<double> x{0.5};
  const auto told = check_gradient([](point p) { return std::exp(p[0]); }, x,
                                   std::array{std::exp(0.5)}, {.noise = 1e-3});
  CHECK(told.wrong == 0);
  CHECK(told.unresolved == 1);
}

TEST_CASE("gradient check: what is not finite", "[gradient_check]") {
  // Both infinite alike is no proof.
  CHECK(check_at(0, infinity, [](double) { return infinity; }).wrong == 1);
  const auto nowhere = check_at(0, 1, [](double) { return not_a_number; });
  CHECK_FALSE(nowhere);
  CHECK(contains(nowhere.message(), "the value at x is nan"));

  // On the edge of its domain a function has no two-sided derivative.
  const auto edge = check_at(0, 0, [](double v) { return std::sqrt(v * v * v); });
  CHECK(edge.wrong == 1);
  CHECK(contains(edge.message(), "numeric nan"));
  CHECK(edge.worst_error == infinity);

  // A masked class cannot be moved.
  std::vector<double> logits{1, -infinity, 2, 0.5};
  const auto before = logits;
  const auto masked = check_gradient(log_sum_exp<double>, logits, softmax(logits));
  INFO(masked.message());
  CHECK(masked);
  CHECK(masked.unresolved == 1);
  CHECK(masked.first_unresolved == 1);
  auto gradient = softmax(logits);
  gradient[1] = 0.5; // where x cannot be moved it does not count
  CHECK(check_direction(log_sum_exp<double>, logits, gradient));
  CHECK(same_bits(logits, before));
}

TEST_CASE("gradient check: x is restored bit for bit, also after a throw", "[gradient_check]") {
  const std::vector<double> before{0.1, -0.0, 1e-310, not_a_number, -infinity, 1e300, 0.3};
  const std::vector<double> gradient(before.size(), 1);
  std::vector<double> x = before;
  const auto finite = [](point p) { return p[0] * p[0] + p[6]; };
  CHECK_FALSE(check_gradient(finite, x, gradient));
  CHECK(same_bits(x, before));
  CHECK_FALSE(check_direction(finite, x, gradient));
  CHECK(same_bits(x, before));

  for (int calls : {1, 2, 5, 10, 12, 25, 30, 45}) {
    int left = calls;
    const auto throws = [&](point p) {
      if (--left == 0)
        throw std::runtime_error("enough");
      return p[0] * p[0] + p[6];
    };
    CHECK_THROWS_AS(check_gradient(throws, x, gradient).ok, std::runtime_error);
    CHECK(same_bits(x, before));
    left = calls;
    CHECK_THROWS_AS(check_direction(throws, x, gradient).ok, std::runtime_error);
    CHECK(same_bits(x, before));
  }
}

TEST_CASE("gradient check: a value may look at x where it lies", "[gradient_check]") {
  std::vector<double> x{1, 2};
  const std::array gradient{2.0, 4.0};
  const auto squares = [](auto p) { return p[0] * p[0] + p[1] * p[1]; };
  CHECK(check_gradient([&] { return squares(point(x)); }, x, gradient));
  CHECK(check_gradient([&](std::span<double> p) { return squares(point(p)); }, x, gradient));
  CHECK(check_gradient(squares, x, gradient));
  CHECK(check_gradient(squares, std::span(x), std::span(gradient)));
}

TEST_CASE("gradient check: float storage, steps measured between rounded arguments",
          "[gradient_check]") {
  std::vector<float> x{0.1f, -3.3f, 2.7f, 100.3f, 99.9f, 0.0f, 101.7f};
  const auto before = x;
  auto gradient = softmax(x);
  // A value in double of arguments in float is checked as sharply as if all were double.
  const auto sharp = check_gradient(log_sum_exp<float>, x, gradient);
  INFO(sharp.message());
  CHECK(sharp);
  CHECK(sharp.tolerance == 1e-8);
  CHECK(sharp.unresolved == 0);
  CHECK(same_bits(x, before));
  gradient[6] *= 1 + 1e-7;
  const auto off = check_gradient(log_sum_exp<float>, x, gradient);
  CHECK_FALSE(off);
  CHECK(off.worst_index == 6);

  const std::vector<float> stored(gradient.begin(), gradient.end());
  CHECK(check_gradient(log_sum_exp<float>, x, stored).tolerance == 0x1p-18);

  // A value and gradient computed in float.
  std::vector<float> y{0.3f, -1.2f, 2, 0.75f};
  const auto value = [](std::span<const float> p) {
    float sum = 0;
    for (float v : p)
      sum += std::log1p(std::exp(v));
    return sum;
  };
  std::vector<float> slope;
  for (float v : y)
    slope.push_back(1 / (1 + std::exp(-v)));
  const auto rough = check_gradient(value, y, slope);
  INFO(rough.message());
  CHECK(rough);
  CHECK(rough.tolerance == 0x1p-11);
  CHECK(rough.unresolved == 0);
  CHECK(check_gradient(value, y, slope, {.tolerance = 1e-12}).wrong == 0);
  slope[2] *= 1.002f;
  CHECK(check_gradient(value, y, slope).worst_index == 2);
  CHECK_FALSE(check_gradient(value, y, slope));
}

TEST_CASE("gradient check: no entries", "[gradient_check]") {
  std::vector<double> x;
  const auto value = [](point) { return 0.0; };
  for (const auto& report : {check_gradient(value, x, x), check_direction(value, x, x)}) {
    CHECK(report);
    CHECK(report.entries == 0);
    CHECK(contains(report.message(), "no entries"));
  }
}

TEST_CASE("gradient check: broken calls are refused before the value is called",
          "[gradient_check]") {
  std::vector<double> x{1, 2, 3}, gradient{1, 2};
  const auto value = [](point) -> double { throw std::logic_error("called"); };
  const auto refused = [&](const std::vector<double>& g, const gradient_check_options& options,
                           const std::string& message) {
    try {
      (void)check_gradient(value, x, g, options);
      FAIL("not refused: " << message);
    } catch (const std::invalid_argument& error) {
      CHECK(error.what() == "gradient check: " + message);
    }
    CHECK_THROWS_AS(check_direction(value, x, g, options).ok, std::invalid_argument);
  };
  refused(gradient, {}, "gradient.size() is 2, expected x.size() = 3");
  refused(x, {.tolerance = -1}, "options.tolerance is -1, expected a finite number >= 0");
  refused(x, {.floor = not_a_number}, "options.floor is nan, expected a finite number >= 0");
  refused(x, {.safety = -2}, "options.safety is -2, expected a finite number >= 0");
  refused(x, {.step = infinity}, "options.step is inf, expected a finite number >= 0");
  refused(x, {.noise = -1}, "options.noise is -1, expected a finite number >= 0");
  CHECK_THROWS_AS(check_direction(value, x, x, {.directions = 0}).ok, std::invalid_argument);
}

TEST_CASE("gradient check: directions prove a large gradient with few evaluations",
          "[gradient_check]") {
  std::vector<double> x, gradient;
  for (int i = 0; i < 20'000; ++i) {
    x.push_back(2 * std::sin(1.1 * i));
    gradient.push_back(1 / (1 + std::exp(-x.back())) / 20'000);
  }
  const auto before = x;
  const auto mean = [&](point p) {
    double sum = 0;
    for (double v : p)
      sum += softplus(v);
    return sum / 20'000;
  };
  const gradient_check_options three{.directions = 3};
  const auto right = check_direction(mean, x, gradient, three);
  INFO(right.message());
  CHECK(right);
  CHECK(right.entries == 3);
  CHECK(right.unresolved == 0);
  CHECK(right.evaluations < 150);
  CHECK(contains(right.message(), "3 directions"));
  CHECK(same_bits(x, before));

  auto wrong = gradient;
  wrong[17'777] *= 1.001; // one entry in 2e4, by a thousandth
  const auto found = check_direction(mean, x, wrong, three);
  INFO(found.message());
  CHECK(found.wrong == 3);
  CHECK(contains(found.message(), "direction "));

  wrong = gradient;
  std::swap(wrong[1], wrong[2]);
  CHECK_FALSE(check_direction(mean, x, wrong, {.directions = 8}));
  wrong = gradient;
  for (double& g : wrong)
    g /= 2;
  CHECK(check_direction(mean, x, wrong, three).wrong == 3);

  wrong = gradient;
  wrong[4321] = not_a_number;
  const auto named = check_direction(mean, x, wrong, three);
  CHECK_FALSE(named);
  CHECK(named.worst_index == 4321);
  CHECK(contains(named.message(), "entry 4321: analytic nan"));
  CHECK(named.evaluations == 0);
}

TEST_CASE("gradient check: a gradient is not compared with itself where storage takes no step",
          "[gradient_check]") {
  const auto squares = [](std::span<const float> p) {
    double sum = 0;
    for (const float v : p)
      sum += static_cast<double>(v) * static_cast<double>(v);
    return sum;
  };
  for (int k = 0; k < 50; ++k) {
    std::vector<float> x;
    std::vector<double> right, wrong;
    for (int i = 0; i < 3; ++i) {
      x.push_back(2 * std::sin(1.1f * static_cast<float>(3 * k + i)));
      right.push_back(2 * static_cast<double>(x.back()));
      wrong.push_back(-right.back());
    }
    const auto passed = check_direction(squares, x, right),
               failed = check_direction(squares, x, wrong);
    INFO(passed.message() << "; " << failed.message());
    CHECK(passed);
    CHECK(passed.unresolved == 0);
    CHECK(failed.wrong == 8);
  }
  // Where it cannot be moved by the first step, an argument does not count.
  std::vector<float> far{1e30f, 0.7f};
  CHECK(check_direction([&] { return std::sin(static_cast<double>(far[1])); }, far,
                        std::vector<double>{0.25, std::cos(static_cast<double>(far[1]))}));
}

TEST_CASE("gradient check: directions in float storage, at kinks, and by seed",
          "[gradient_check]") {
  std::vector<float> x{0.1f, -3.3f, 2.7f, 0.3f, 5.9f, 0.0f, 1.7f};
  auto gradient = softmax(x);
  const auto right = check_direction(log_sum_exp<float>, x, gradient);
  INFO(right.message());
  CHECK(right);
  CHECK(right.unresolved == 0);
  gradient[4] += 1e-4;
  CHECK(check_direction(log_sum_exp<float>, x, gradient).wrong == 8);

  std::vector<double> zeros(4, 0.0);
  const auto absolutes = [](point p) {
    double sum = 0;
    for (double v : p)
      sum += std::abs(v);
    return sum;
  };
  const auto kinks = check_direction(absolutes, zeros, zeros);
  CHECK_FALSE(kinks);
  CHECK(kinks.wrong == 0);
  CHECK(kinks.unresolved == 8);

  mixture m;
  const auto numeric = [&](std::uint64_t seed) {
    return check_direction(mixture::value, m.x, m.gradient(), {.directions = 1, .seed = seed})
        .numeric;
  };
  CHECK(numeric(1) == numeric(1));
  bool differs = false;
  for (std::uint64_t seed = 2; seed < 8; ++seed)
    differs = differs || numeric(seed) != numeric(1);
  CHECK(differs);
}
