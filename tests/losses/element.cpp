// SPDX-License-Identifier: MIT

// Regression losses, element by element: formula sheet 17.

#include <perdita/element.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/element_check.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

using perdita::reduction;
constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double n = std::numeric_limits<double>::quiet_NaN();

wide sign(wide r) { return r > 0 ? 1 : r < 0 ? -1 : 0; }

template <class T> element_points<T> residual_points() {
  return pair_points<T>(signed_grid(), {0, 0.25, -1.5, 3, 1e6}, -3, 3);
}

} // namespace

TEMPLATE_TEST_CASE("element losses of a residual: every number", "[element]", float, double) {
  using T = TestType;
  const auto points = residual_points<T>();
  check_element("", perdita::l1<T>({.reduction = reduction::none}), points, of_residual([](wide r) {
                  return element_point{
                      .value = size_of(r), .slope = sign(r), .curvature = 0, .to_kink = size_of(r)};
                }),
                {0.5, 0, 0});
  check_element("", perdita::mse<T>({.reduction = reduction::none}), points,
                of_residual([](wide r) {
                  return element_point{.value = r * r, .slope = 2 * r, .curvature = 2};
                }),
                {1, 0.5, 0});
  for (const T beta : {T(1), T(0.7), T(1e-3), T(250), T(0)})
    check_element(" " + std::to_string(beta),
                  perdita::smooth_l1<T>({.beta = beta, .reduction = reduction::none}), points,
                  of_residual([=](wide r) {
                    const wide b = static_cast<double>(beta), s = size_of(r);
                    if (s < b)
                      return element_point{.value = r * r / (2 * b),
                                           .slope = r / b,
                                           .curvature = 1 / b,
                                           .to_kink = b - s};
                    return element_point{
                        .value = s - b / 2, .slope = sign(r), .curvature = 0, .to_kink = s - b};
                  }),
                  {1.5, 1, 0.5});
  for (const T delta : {T(1), T(0.7), T(1e-3), T(250)})
    check_element(
        " " + std::to_string(delta),
        perdita::huber<T>({.delta = delta, .reduction = reduction::none}), points,
        of_residual([=](wide r) {
          const wide d = static_cast<double>(delta), s = size_of(r);
          if (s <= d)
            return element_point{.value = r * r / 2, .slope = r, .curvature = 1, .to_kink = d - s};
          return element_point{
              .value = d * (s - d / 2), .slope = d * sign(r), .curvature = 0, .to_kink = s - d};
        }),
        {1.5, 0.5, 0});
  for (const T delta : {T(1), T(0.01), T(300)})
    check_element(" " + std::to_string(delta),
                  perdita::pseudo_huber<T>({.delta = delta, .reduction = reduction::none}), points,
                  of_residual([=](wide r) {
                    const wide d = static_cast<double>(delta), u = r / d, s = sqrt(wide(1 + u * u));
                    return element_point{
                        .value = r * r / (1 + s), .slope = r / s, .curvature = 1 / (s * s * s)};
                  }),
                  {4, 4, 6});
  check_element("", perdita::log_cosh<T>({.reduction = reduction::none}), points,
                of_residual([](wide r) {
                  const wide s = size_of(r), e = exp(wide(-2 * s)), q = r * r;
                  const wide value = s < 1e-4 ? q / 2 - q * q / 12 + q * q * q / 45
                                              : wide(s + log1p(e) - log(wide(2)));
                  return element_point{
                      .value = value, .slope = tanh(r), .curvature = 4 * e / ((1 + e) * (1 + e))};
                }),
                {4, 4, 4});
  for (const T tau : {T(0.5), T(0.9), T(1e-3), T(0.999)}) {
    const auto weight = [=](wide r) { return r > 0 ? wide(1 - wide(tau)) : wide(tau); };
    check_element(" " + std::to_string(tau),
                  perdita::quantile<T>({.tau = tau, .reduction = reduction::none}), points,
                  of_residual([=](wide r) {
                    return element_point{.value = weight(r) * size_of(r),
                                         .slope = weight(r) * sign(r),
                                         .curvature = 0,
                                         .to_kink = size_of(r)};
                  }),
                  {1, 0.5, 0});
    check_element(" " + std::to_string(tau),
                  perdita::expectile<T>({.tau = tau, .reduction = reduction::none}), points,
                  of_residual([=](wide r) {
                    return element_point{.value = weight(r) * r * r,
                                         .slope = 2 * weight(r) * r,
                                         .curvature = 2 * weight(r),
                                         .to_kink = size_of(r)};
                  }),
                  {1.5, 1, 0.5});
  }
}

TEMPLATE_TEST_CASE("redescending element losses: every number", "[element]", float, double) {
  using T = TestType;
  const auto points = residual_points<T>();
  for (const T c : {T(1), T(0.01), T(4.685), T(300)}) {
    const std::string detail = " " + std::to_string(c);
    const wide w = static_cast<double>(c);
    check_element(detail, perdita::cauchy<T>({.c = c, .reduction = reduction::none}), points,
                  of_residual([=](wide r) {
                    const wide q = (r / w) * (r / w);
                    return element_point{.value = w * w / 2 * log1p(q),
                                         .slope = r / (1 + q),
                                         .curvature = (1 - q) / ((1 + q) * (1 + q))};
                  }),
                  {4, 4, 5});
    check_element(detail, perdita::tukey_biweight<T>({.c = c, .reduction = reduction::none}),
                  points, of_residual([=](wide r) {
                    const wide q = (r / w) * (r / w), left = 1 - q,
                               to_kink = size_of(w - size_of(r));
                    if (q >= 1)
                      return element_point{
                          .value = w * w / 6, .slope = 0, .curvature = 0, .to_kink = to_kink};
                    return element_point{.value = w * w / 6 * q * (3 - 3 * q + q * q),
                                         .slope = r * left * left,
                                         .curvature = left * (1 - 5 * q),
                                         .to_kink = to_kink};
                  }),
                  {4, 5, 5});
    check_element(detail, perdita::geman_mcclure<T>({.c = c, .reduction = reduction::none}), points,
                  of_residual([=](wide r) {
                    const wide q = (r / w) * (r / w), v = 1 / (1 + q);
                    return element_point{.value = w * w / 2 * q * v,
                                         .slope = r * v * v,
                                         .curvature = (1 - 3 * q) * v * v * v};
                  }),
                  {4, 5, 6});
  }
}

TEMPLATE_TEST_CASE("negative log-likelihoods: every number", "[element]", float, double) {
  using T = TestType;
  const std::vector<double> counts{0, 1e-6, 0.3, 1, 1.5, 2, 7, 1000, 3e5};
  const auto points = pair_points<T>(signed_grid(), counts, 0, 5);
  const auto stirling = [](wide t, bool full) {
    const wide pi = wide(3.141592653589793116) + wide(1.2246467991473531772e-16);
    return full && t > 1 ? wide(t * log(t) - t + log(wide(2 * pi * t)) / 2) : wide(0);
  };
  for (const bool full : {false, true}) {
    const std::string detail = full ? " full" : "";
    const auto of_stirling = [=](wide t) {
      return full && t > 1 ? wide(t * size_of(log(t)) + t + 2) : wide(0);
    };
    check_element(detail + " log_input",
                  perdita::poisson_nll<T>({.full = full, .reduction = reduction::none}), points,
                  [=](wide x, wide t) {
                    const wide mean = exp(x), infinite = mean > std::numeric_limits<T>::max();
                    return element_point{.value = infinite != 0
                                                      ? infinity()
                                                      : wide(mean - t * x + stirling(t, full)),
                                         .slope = mean - t,
                                         .curvature = mean,
                                         .value_size = mean + size_of(t * x) + of_stirling(t),
                                         .slope_size = mean + t,
                                         .scale = 1};
                  },
                  {2, 2, 2});
    // The mean is above 0.
    std::vector<double> means;
    for (const double x : signed_grid())
      if (x > 0 && x < 1e10)
        means.push_back(x);
    auto above = pair_points<T>(means, counts, 0, 5);
    for (T& x : above.x)
      x = std::abs(x);
    const T eps = T(1e-8);
    check_element(
        detail,
        perdita::poisson_nll<T>({.log_input = false, .full = full, .reduction = reduction::none}),
        above,
        [=](wide x, wide t) {
          const wide mean = x + static_cast<double>(eps), l = log(mean);
          return element_point{.value = x - t * l + stirling(t, full),
                               .slope = 1 - t / mean,
                               .curvature = t / (mean * mean),
                               .value_size = x + t * (size_of(l) + 1) + of_stirling(t),
                               .slope_size = 1 + t / mean,
                               .scale = mean};
        },
        {2, 2, 3});
  }
  std::vector<double> moderate;
  for (const double x : signed_grid())
    if (size_of(x) <= 700)
      moderate.push_back(x);
  const auto tame = pair_points<T>(moderate, counts, 0, 5);
  check_element("", perdita::gamma_nll<T>({.reduction = reduction::none}), tame,
                [=](wide x, wide t) {
                  const wide share = t * exp(wide(-x));
                  const bool infinite = exp(wide(-x)) > std::numeric_limits<T>::max() && t > 0;
                  return element_point{.value = infinite ? infinity() : wide(x + share),
                                       .slope = infinite ? wide(-infinity()) : wide(1 - share),
                                       .curvature = infinite ? infinity() : share,
                                       .value_size = size_of(x) + share,
                                       .slope_size = 1 + share,
                                       .scale = 1};
                },
                {2, 2, 2});
  for (const T power : {T(1.5), T(1.05), T(1.95)})
    check_element(" " + std::to_string(power),
                  perdita::tweedie_nll<T>({.power = power, .reduction = reduction::none}), tame,
                  [=](wide x, wide t) {
                    const wide p = static_cast<double>(power);
                    wide a = t * exp(wide((1 - p) * x));
                    const wide b = exp(wide((2 - p) * x));
                    if (a > 0 && a / t > std::numeric_limits<T>::max())
                      a = infinity();
                    const wide of_a = a * (1 + size_of((1 - p) * x)),
                               of_b = b * (1 + size_of((2 - p) * x));
                    return element_point{.value = a / (p - 1) + b / (2 - p),
                                         .slope = b - a,
                                         .curvature = (p - 1) * a + (2 - p) * b,
                                         .value_size = of_a / (p - 1) + of_b / (2 - p),
                                         .slope_size = of_a + of_b,
                                         .curvature_size = (p - 1) * of_a + (2 - p) * of_b,
                                         .scale = 1};
                  },
                  {3, 3, 3});
}

TEMPLATE_TEST_CASE("gaussian_nll: every number", "[element]", float, double) {
  using T = TestType;
  const wide pi = wide(3.141592653589793116) + wide(1.2246467991473531772e-16);
  const auto base = pair_points<T>({0, 1e-3, -0.5, 1, -2, 7, 1e3, -1e6}, {0, 0.25, -1.5, 3}, -3, 3);
  for (const bool full : {false, true})
    for (const double variance : {0.0, 1e-9, 1e-6, 0.1, 1.0, 3.7, 1e4}) {
      const auto size = base.x.size();
      const T eps = T(1e-6);
      const std::vector<T> v(size, static_cast<T>(variance));
      const perdita::gaussian_nll<T> loss({.full = full, .reduction = reduction::none});
      element_results<T> mean{std::vector<T>(size), std::vector<T>(size), std::vector<T>(size)};
      auto of_v = mean;
      loss(base.x, base.t, v, mean.slope, of_v.slope, {.values = mean.value});
      loss.hessian_diagonal(base.x, base.t, v, mean.curvature, of_v.curvature);
      of_v.value = mean.value;
      const wide clamped = static_cast<double>(std::max(v[0], eps));
      const auto value = [=](wide r, wide w) {
        return wide((log(w) + r * r / w + (full ? log(wide(2 * pi)) : wide(0))) / 2);
      };
      const auto value_size = [=](wide r, wide w) {
        return wide(size_of(log(w)) + r * r / w + (full ? 1 : 0));
      };
      judge("gaussian_nll", base, mean,
            [=](wide x, wide t) {
              const wide r = x - t, w = clamped;
              return element_point{.value = value(r, w),
                                   .slope = r / w,
                                   .curvature = 1 / w,
                                   .value_size = value_size(r, w)};
            },
            {2, 1.5, 1});
      // By the variance, which takes the place of x: differences of it check the reference.
      element_points<T> by_variance{std::vector<T>(size, static_cast<T>(double(clamped))), {}};
      for (std::size_t i = 0; i < size; ++i)
        by_variance.t.push_back(base.x[i] - base.t[i]);
      judge("gaussian_nll by the variance", by_variance, of_v,
            [=](wide w, wide r) {
              const wide s = r * r / (w * w);
              return element_point{.value = value(r, w),
                                   .slope = (1 / w - s) / 2,
                                   .curvature = s / w - 1 / (2 * w * w),
                                   .value_size = 2 * value_size(r, w),
                                   .slope_size = 1 / w + s,
                                   .curvature_size = s / w + 1 / (w * w),
                                   .scale = w};
            },
            {2, 2, 3});
    }
}

TEMPLATE_TEST_CASE("element losses: special values", "[element]", float, double) {
  using T = TestType;
  using perdita::reduction;
  check_specials(perdita::l1<T>({.reduction = reduction::none}), {{2, 2, 0, 0, 0},
                                                                  {inf, 1, inf, 1, 0},
                                                                  {-inf, 1, inf, -1, 0},
                                                                  {n, 1, n, n, n},
                                                                  {1, n, n, n, n},
                                                                  {inf, inf, n, n, n}});
  check_specials(
      perdita::mse<T>({.reduction = reduction::none}),
      {{2, 2, 0, 0, 2}, {inf, 1, inf, inf, 2}, {-inf, 1, inf, -inf, 2}, {n, 1, n, n, n}});
  for (const T beta : {T(0), T(2)})
    check_specials(perdita::smooth_l1<T>({.beta = beta, .reduction = reduction::none}),
                   {{2, 2, 0, 0, beta > 0 ? 1 / double(beta) : 0},
                    {inf, 1, inf, 1, 0},
                    {-inf, 1, inf, -1, 0},
                    {n, 1, n, n, n}});
  check_specials(perdita::huber<T>({.delta = 2, .reduction = reduction::none}),
                 {{2, 0, 2, 2, 1}, {inf, 1, inf, 2, 0}, {-inf, 1, inf, -2, 0}, {n, 1, n, n, n}});
  check_specials(perdita::pseudo_huber<T>({.delta = 2, .reduction = reduction::none}),
                 {{1, 1, 0, 0, 1}, {inf, 1, inf, 2, 0}, {-inf, 1, inf, -2, 0}, {n, 1, n, n, n}});
  check_specials(perdita::log_cosh<T>({.reduction = reduction::none}),
                 {{1, 1, 0, 0, 1}, {inf, 1, inf, 1, 0}, {-inf, 1, inf, -1, 0}, {n, 1, n, n, n}});
  check_specials(
      perdita::quantile<T>({.tau = T(0.25), .reduction = reduction::none}),
      {{1, 1, 0, 0, 0}, {inf, 1, inf, 0.75, 0}, {-inf, 1, inf, -0.25, 0}, {n, 1, n, n, n}});
  check_specials(
      perdita::expectile<T>({.tau = T(0.25), .reduction = reduction::none}),
      {{1, 1, 0, 0, 0.5}, {inf, 1, inf, inf, 1.5}, {-inf, 1, inf, -inf, 0.5}, {n, 1, n, n, n}});
  check_specials(perdita::cauchy<T>({.c = 2, .reduction = reduction::none}),
                 {{1, 1, 0, 0, 1}, {inf, 1, inf, 0, 0}, {-inf, 1, inf, 0, 0}, {n, 1, n, n, n}});
  check_specials(perdita::tukey_biweight<T>({.c = 3, .reduction = reduction::none}),
                 {{1, 1, 0, 0, 1},
                  {3, 0, 1.5, 0, 0},
                  {inf, 1, 1.5, 0, 0},
                  {-inf, 1, 1.5, 0, 0},
                  {n, 1, n, n, n}});
  check_specials(perdita::geman_mcclure<T>({.c = 2, .reduction = reduction::none}),
                 {{1, 1, 0, 0, 1}, {inf, 1, 2, 0, 0}, {-inf, 1, 2, 0, 0}, {n, 1, n, n, n}});
  check_specials(perdita::poisson_nll<T>({.reduction = reduction::none}), {{-inf, 0, 0, 0, 0},
                                                                           {-inf, 2, inf, -2, 0},
                                                                           {inf, 2, inf, inf, inf},
                                                                           {inf, 0, inf, inf, inf},
                                                                           {n, 0, n, n, n},
                                                                           {1, n, n, n, n}});
  check_specials(
      perdita::poisson_nll<T>({.log_input = false, .eps = 0, .reduction = reduction::none}),
      {{0, 0, 0, 1, 0},
       {0, 2, inf, -inf, inf},
       {n, 0, n, n, n},
       {1, n, n, n, n},
       {-1, 2, n, 3, 2}});
  check_specials(
      perdita::gamma_nll<T>({.reduction = reduction::none}),
      {{-inf, 2, inf, -inf, inf}, {inf, 2, inf, 1, 0}, {n, 0, n, n, n}, {1, n, n, n, n}});
  check_specials(perdita::tweedie_nll<T>({.reduction = reduction::none}),
                 {{-inf, 0, 0, 0, 0},
                  {-inf, 2, inf, -inf, inf},
                  {inf, 2, inf, inf, inf},
                  {n, 0, n, n, n},
                  {1, n, n, n, n}});
  // A variance that is negative or none at all.
  const std::vector<T> x{1, 1, 1}, t{0, 0, 0}, v{T(-1), T(n), 1};
  std::vector<T> g(3), h(3), value(3);
  perdita::gaussian_nll<T>({.reduction = reduction::none})(x, t, v, g, h, {.values = value});
  for (const std::size_t i : {0U, 1U})
    CHECK((std::isnan(g[i]) && std::isnan(h[i]) && std::isnan(value[i])));
  CHECK((value[2] == T(0.5) && g[2] == 1 && h[2] == 0));
}

TEST_CASE("element losses: their traits", "[element]") {
  element_points<double> p;
  for (int i = -4000; i <= 4000; ++i) {
    p.x.push_back(i / 256.0);
    p.t.push_back(0);
  }
  using results = element_results<double>;
  const auto compare = [](const char* name, const results& r,
                          const perdita::element_traits& traits) {
    INFO(name);
    bool convex = true, nonnegative = true;
    double steepest = 0, jump = 0;
    for (std::size_t i = 0; i < r.slope.size(); ++i) {
      nonnegative = nonnegative && r.value[i] >= 0;
      steepest = std::max(steepest, std::abs(r.slope[i]));
      if (i > 0) {
        convex = convex && r.slope[i] >= r.slope[i - 1];
        jump = std::max(jump, std::abs(r.slope[i] - r.slope[i - 1]));
      }
    }
    CHECK(convex == traits.convex);
    CHECK(nonnegative == traits.nonnegative);
    CHECK((jump < 0.05 * steepest) == traits.smooth);
    if (std::isfinite(traits.lipschitz)) {
      CHECK(steepest <= traits.lipschitz * (1 + 1e-12));
      CHECK(steepest >= traits.lipschitz * 0.99);
    }
  };
  const auto check = [&](const auto& loss, const perdita::element_traits& traits) {
    compare(loss.name, apply(loss, p), traits);
  };
  const auto none = reduction::none;
  check(perdita::l1<double>({.reduction = none}), perdita::l1<double>::traits);
  check(perdita::mse<double>({.reduction = none}), perdita::mse<double>::traits);
  check(perdita::log_cosh<double>({.reduction = none}), perdita::log_cosh<double>::traits);
  const auto check_settings = [&](const auto& loss) { check(loss, loss.traits()); };
  check_settings(perdita::smooth_l1<double>({.beta = 0.5, .reduction = none}));
  check_settings(perdita::smooth_l1<double>({.beta = 0, .reduction = none}));
  check_settings(perdita::huber<double>({.delta = 2, .reduction = none}));
  check_settings(perdita::pseudo_huber<double>({.delta = 2, .reduction = none}));
  check_settings(perdita::quantile<double>({.tau = 0.2, .reduction = none}));
  check_settings(perdita::cauchy<double>({.c = 2, .reduction = none}));
  check_settings(perdita::tukey_biweight<double>({.c = 3, .reduction = none}));
  check_settings(perdita::geman_mcclure<double>({.c = 3, .reduction = none}));
}

TEST_CASE("element losses: the formula sheet's numbers", "[element]") {
  const std::vector<double> r{-2, 0.3, 1.5}, zero(3, 0);
  check_golden_elements(perdita::log_cosh<double>({.reduction = reduction::sum}), r, zero,
                        2.2247836883, {-0.96402758, 0.291312612, 0.905148254});
  check_golden_elements(perdita::smooth_l1<double>({.beta = 0.7, .reduction = reduction::sum}), r,
                        zero, 2.86428571429, {-1, 0.428571429, 1});
  check_golden_elements(perdita::tweedie_nll<double>({.power = 1.5, .reduction = reduction::sum}),
                        r, {1, 0, 2.5}, 15.0918238216, {-2.35040239, 1.16183424, 0.936083635});
}

TEST_CASE("element losses: options out of range", "[element]") {
  using Catch::Matchers::ContainsSubstring;
  const double bad[] = {-1, n, inf};
  for (const double v : bad) {
    CHECK_THROWS_WITH(perdita::smooth_l1<double>({.beta = v}), ContainsSubstring("beta"));
    CHECK_THROWS_WITH(perdita::huber<double>({.delta = v}), ContainsSubstring("delta"));
    CHECK_THROWS_WITH(perdita::pseudo_huber<double>({.delta = v}), ContainsSubstring("delta"));
    CHECK_THROWS_WITH(perdita::quantile<double>({.tau = v}), ContainsSubstring("tau"));
    CHECK_THROWS_WITH(perdita::expectile<double>({.tau = v}), ContainsSubstring("tau"));
    CHECK_THROWS_WITH(perdita::cauchy<double>({.c = v}), ContainsSubstring("c is"));
    CHECK_THROWS_WITH(perdita::tukey_biweight<double>({.c = v}), ContainsSubstring("c is"));
    CHECK_THROWS_WITH(perdita::geman_mcclure<double>({.c = v}), ContainsSubstring("c is"));
    CHECK_THROWS_WITH(perdita::poisson_nll<double>({.eps = v}), ContainsSubstring("eps"));
    CHECK_THROWS_WITH(perdita::gaussian_nll<double>({.eps = v}), ContainsSubstring("eps"));
    CHECK_THROWS_WITH(perdita::tweedie_nll<double>({.power = v}), ContainsSubstring("power"));
  }
  CHECK_THROWS_WITH(perdita::huber<double>({.delta = 0}), ContainsSubstring("delta is 0"));
  CHECK_THROWS_WITH(perdita::tweedie_nll<double>({.power = 2}), ContainsSubstring("gamma_nll"));
  CHECK_THROWS_WITH(perdita::mse<double>({.reduction = static_cast<reduction>(9)}),
                    ContainsSubstring("reduction"));
}

} // namespace perdita_tests
