// SPDX-License-Identifier: MIT
#pragma once

// Element losses against references in 113 bits: the points where they are tried, and the judge.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include <perdita/core/element_kernel.hpp>

#include "accuracy.hpp"
#include "catch.hpp"
#include "numbers.hpp"
#include "wide.hpp"

namespace perdita_tests {

/// What a loss is at a point, and for each number what an error is measured by: its own size and
/// what the rounding of its arguments does to it.
struct element_point {
  wide value, slope, curvature;
  wide value_size = -1, slope_size = -1, curvature_size = -1; ///< < 0: of the number itself
  wide to_kink = infinity();                                  ///< of the slope, in x
  wide scale = -1; ///< of x, on which the loss is smooth; < 0: of the residual
};
using element_reference = std::function<element_point(wide x, wide t)>;

/// Largest errors allowed, in epsilons of the sizes.
struct element_budget {
  double value, slope, curvature;
};

/// A reference of r = x − t, which the library rounds.
template <class F> element_reference of_residual(F f) {
  return [f](wide x, wide t) {
    const wide r = x - t, step = size_of(r) * 1e-12;
    element_point p = f(r);
    p.value_size = size_of(p.value) + size_of(r * p.slope);
    p.slope_size = size_of(p.slope) + size_of(r * p.curvature);
    p.curvature_size = size_of(p.curvature);
    if (r != 0 && p.to_kink > step)
      p.curvature_size += size_of(
          r * wide((f(wide(r + step)).curvature - f(wide(r - step)).curvature) / (2 * step)));
    return p;
  };
}

template <class T> struct element_points { std::vector<T> x, t; };

/// Everything of `xs` with everything of `ts`, both with what is near zero, near one, and huge, and
/// random ones.
template <class T>
element_points<T> pair_points(const std::vector<double>& xs, const std::vector<double>& ts,
                              double low_t, double high_t) {
  element_points<T> p;
  for (const double x : xs)
    for (const double t : ts) {
      p.x.push_back(static_cast<T>(x));
      p.t.push_back(static_cast<T>(t));
    }
  random_numbers random(7);
  for (int i = 0; i < 400; ++i) {
    const double t = random.uniform(low_t, high_t);
    p.x.push_back(static_cast<T>(i % 2 ? t + random.normal() : 6 * random.normal()));
    p.t.push_back(static_cast<T>(t));
  }
  return p;
}
inline std::vector<double> signed_grid() {
  std::vector<double> all{0};
  for (const double x : {1e-30,        1e-8, 1e-3,  0.1,   0.4375, 0.5,  0.9990234375, 1.0,
                         1.0009765625, 1.5,  2.0,   3.0,   4.5,    9.0,  17.0,         30.0,
                         60.0,         87.0, 100.0, 700.0, 1e4,    1e10, 1e19,         1e25}) {
    all.push_back(x);
    all.push_back(-x);
  }
  return all;
}

/// Sees to it that slope and curvature of a reference are what differences of it say.
inline void check_reference(const element_reference& reference, wide x, wide t) {
  const element_point p = reference(x, t);
  const wide scale = p.scale > 0 ? p.scale : larger(size_of(wide(x - t)), 1e-6);
  const wide h = 1e-11 * scale;
  if (!(p.to_kink > 2 * h) || !is_finite(p.value))
    return;
  const element_point a = reference(x - h, t), b = reference(x + h, t);
  const wide slope = (b.value - a.value) / (2 * h), curvature = (b.slope - a.slope) / (2 * h);
  if (!is_finite(slope) || !is_finite(curvature))
    return;
  INFO("reference at x = " << text(x) << ", t = " << text(t) << ": slope " << text(p.slope)
                           << ", by differences " << text(slope) << "; curvature "
                           << text(p.curvature) << ", by differences " << text(curvature));
  const auto agree = [&](wide got, wide expected, wide size, wide before) {
    const wide noise = 1e-12 * larger(size, 0) + 1e-20 * size_of(wide(before / h)) + 1e-40;
    return bool(size_of(wide(got - expected)) <= 1e-8 * size_of(expected) + noise);
  };
  CHECK(agree(slope, p.slope, p.slope_size, p.value));
  CHECK(agree(curvature, p.curvature, p.curvature_size, p.slope));
}

/// Whether a number is near enough; keeps the worst error, in epsilons.
template <class T> bool near(T got, wide expected, wide size, double budget, double& worst) {
  using limits = std::numeric_limits<T>;
  const wide epsilon = static_cast<double>(limits::epsilon());
  const wide most = static_cast<double>(limits::max()), least = static_cast<double>(limits::min());
  if (is_nan(expected))
    return std::isnan(got);
  if (size < 0)
    size = size_of(expected);
  const wide allowed = budget * epsilon * size + 2 * least;
  if (size_of(expected) > most - allowed)
    return std::isinf(got) ? (got > 0) == (expected > 0)
                           : size_of(expected) < most + allowed && std::isfinite(got);
  if (!std::isfinite(got))
    return false;
  const wide error = size_of(wide(static_cast<double>(got)) - expected);
  if (size > 0 && error > 2 * least)
    worst = worse(worst, static_cast<double>(error / (epsilon * size)));
  return error <= allowed;
}

/// What a loss made of the points.
template <class T> struct element_results { std::vector<T> value, slope, curvature; };

template <class T>
void judge(const std::string& name, const element_points<T>& points,
           const element_results<T>& results, const element_reference& reference,
           const element_budget& budget) {
  element_budget worst{0, 0, 0};
  const wide epsilon = static_cast<double>(std::numeric_limits<T>::epsilon());
  for (std::size_t i = 0; i < points.x.size(); ++i) {
    const wide x = static_cast<double>(points.x[i]), t = static_cast<double>(points.t[i]);
    const element_point p = reference(x, t);
    INFO(name << " at x = " << text(x) << ", t = " << text(t) << ": value " << results.value[i]
              << " (" << text(p.value) << "), slope " << results.slope[i] << " (" << text(p.slope)
              << "), curvature " << results.curvature[i] << " (" << text(p.curvature) << ")");
    if (!near(results.value[i], p.value, p.value_size, budget.value, worst.value))
      FAIL_CHECK("value");
    if (!near(results.slope[i], p.slope, p.slope_size, budget.slope, worst.slope))
      FAIL_CHECK("slope");
    // On which side of a kink of the slope an argument rounds is nobody's fault.
    const bool beside_kink =
        p.to_kink > 0 && p.to_kink <= 4 * epsilon * larger(size_of(x), size_of(t));
    if (!beside_kink && !near(results.curvature[i], p.curvature, p.curvature_size, budget.curvature,
                              worst.curvature))
      FAIL_CHECK("curvature");
    check_reference(reference, x, t);
  }
  const auto share = [](double error, double allowed) { return error > 0 ? error / allowed : 0; };
  report_accuracy<T>(name.substr(0, name.find_first_of(" ,")),
                     "(" + name + "; curvature " + text(worst.curvature) + ")",
                     in_epsilons_of_terms,
                     {worst.value, worst.slope,
                      std::max({share(worst.value, budget.value), share(worst.slope, budget.slope),
                                share(worst.curvature, budget.curvature)})});
}

/// Room for as many results.
template <class T> element_results<T> results_of(std::size_t n) {
  return {std::vector<T>(n), std::vector<T>(n), std::vector<T>(n)};
}
template <class T> perdita::element_options<T> serially(std::vector<T>* values = nullptr) {
  perdita::element_options<T> call;
  if (values)
    call.values = *values;
  call.run_on = perdita::serial;
  return call;
}

/// The loss (with reduction none) at every point. As short as can be: there is one for each loss.
template <class Loss, class T = typename Loss::value_type>
element_results<T> apply(const Loss& loss, const element_points<T>& p) {
  auto r = results_of<T>(p.x.size());
  loss(p.x, p.t, r.slope, serially(&r.value));
  loss.hessian_diagonal(p.x, p.t, r.curvature, serially<T>());
  return r;
}

template <class Loss, class T = typename Loss::value_type>
void check_element(const std::string& detail, const Loss& loss, const element_points<T>& points,
                   const element_reference& reference, const element_budget& budget) {
  judge(std::string(Loss::name) + detail, points, apply(loss, points), reference, budget);
}

/// One element and what it must give, to four epsilons.
struct special_element {
  double x, t, value, slope, curvature;
};

template <class T> element_points<T> points_of(const std::vector<special_element>& elements) {
  element_points<T> p;
  for (const auto& e : elements) {
    p.x.push_back(static_cast<T>(e.x));
    p.t.push_back(static_cast<T>(e.t));
  }
  return p;
}
template <class T>
void judge_specials(const char* name, const std::vector<special_element>& elements,
                    const element_results<T>& r) {
  const auto same = [](T got, double expected) {
    double worst = 0;
    return std::isinf(expected) ? static_cast<double>(got) == expected
                                : near(got, wide(expected), -1, 4, worst);
  };
  for (std::size_t i = 0; i < elements.size(); ++i) {
    const auto& e = elements[i];
    INFO(name << " at x = " << e.x << ", t = " << e.t << ": " << r.value[i] << ", " << r.slope[i]
              << ", " << r.curvature[i]);
    CHECK(same(r.value[i], e.value));
    CHECK(same(r.slope[i], e.slope));
    CHECK(same(r.curvature[i], e.curvature));
  }
}
template <class Loss, class T = typename Loss::value_type>
void check_specials(const Loss& loss, const std::vector<special_element>& elements) {
  judge_specials<T>(Loss::name, elements, apply(loss, points_of<T>(elements)));
}

/// The sum over a formula sheet's vector, and its gradient, to the sheet's digits.
template <class Loss>
void check_golden_elements(const Loss& loss, const std::vector<double>& x,
                           const std::vector<double>& t, double value,
                           const std::vector<double>& gradient) {
  std::vector<double> g(x.size());
  CHECK(std::abs(loss(x, t, g) - value) <= 1e-9 * std::max(1.0, std::abs(value)));
  for (std::size_t i = 0; i < g.size(); ++i)
    CHECK(std::abs(g[i] - gradient[i]) <= 1e-8);
}

} // namespace perdita_tests
