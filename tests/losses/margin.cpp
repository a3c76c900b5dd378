// SPDX-License-Identifier: MIT

// Margin losses, and binary cross-entropy of logits: formula sheet 1.3 and 5.

#include <perdita/margin.hpp>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/element_check.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

using perdita::binary_labels;
using perdita::reduction;
constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double n = std::numeric_limits<double>::quiet_NaN();

/// A reference of the margin: φ, φ', φ''; sizes, the kink and the scale are in m, which is x but
/// for the sign.
using phi = element_point (*)(wide m);
element_reference of_margin(phi f) {
  return [f](wide x, wide y) {
    element_point p = f(y * x);
    p.slope *= y;
    if (p.scale < 0)
      p.scale = 1;
    return p;
  };
}

template <class T> element_points<T> margin_points() {
  auto p = pair_points<T>(signed_grid(), {-1, 1}, -1, 1);
  for (T& y : p.t)
    y = y < 0 ? T(-1) : T(1);
  return p;
}

/// The same points with labels 0 and 1: the same bits.
template <class Loss, class T> void check_zero_one(const Loss& signed_one, element_points<T> p) {
  auto settings = signed_one.settings();
  settings.labels = binary_labels::zero_one;
  const auto expected = apply(signed_one, p);
  for (T& y : p.t)
    y = y > 0 ? T(1) : T(0);
  const auto got = apply(Loss(settings), p);
  CHECK(got.value == expected.value);
  CHECK(got.slope == expected.slope);
  CHECK(got.curvature == expected.curvature);
}

/// What the traits say is true of what the loss computes.
template <class Loss> void check_traits(const Loss& loss, perdita::margin_traits traits) {
  using T = typename Loss::value_type;
  element_points<T> p;
  for (int i = -4000; i <= 4000; ++i) {
    p.x.push_back(static_cast<T>(i) / T(512));
    p.t.push_back(T(1));
  }
  const auto r = apply(loss, p);
  INFO(Loss::name);
  bool convex = true, nonnegative = true;
  double steepest = 0, jump = 0;
  for (std::size_t i = 0; i < p.x.size(); ++i) {
    nonnegative = nonnegative && r.value[i] >= 0;
    steepest = std::max(steepest, std::abs(static_cast<double>(r.slope[i])));
    if (i > 0) {
      convex = convex && r.slope[i] >= r.slope[i - 1];
      jump = std::max(jump, std::abs(static_cast<double>(r.slope[i] - r.slope[i - 1])));
    }
  }
  CHECK(convex == traits.convex);
  CHECK(nonnegative == traits.nonnegative);
  CHECK((traits.smooth ? jump / steepest < 0.05 : jump > 0.5));
  if (std::isfinite(traits.lipschitz)) {
    CHECK(steepest <= traits.lipschitz * (1 + 1e-6));
    CHECK(steepest >= traits.lipschitz * (1 - 1e-3));
  }
  CHECK(r.slope[4000] < 0); // at m = 0, without which there is no calibration
  CHECK(traits.calibrated);
}

template <template <class> class Loss, class T>
void check_margin(phi f, const element_budget& budget) {
  const Loss<T> loss({.reduction = reduction::none});
  const auto points = margin_points<T>();
  check_element("", loss, points, of_margin(f), budget);
  check_zero_one(loss, points);
  check_traits(loss, Loss<T>::traits);
}

} // namespace

TEMPLATE_TEST_CASE("margin losses: every number", "[margin]", float, double) {
  using T = TestType;
  check_margin<perdita::logistic, T>(
      [](wide m) {
        return element_point{
            .value = softplus(-m), .slope = -logistic(-m), .curvature = logistic(m) * logistic(-m)};
      },
      {2, 3, 4});
  check_margin<perdita::hinge, T>(
      [](wide m) {
        return element_point{.value = m < 1 ? wide(1 - m) : wide(0),
                             .slope = m < 1 ? wide(-1) : wide(0),
                             .curvature = 0,
                             .to_kink = size_of(wide(1 - m))};
      },
      {0.5, 0, 0});
  check_margin<perdita::squared_hinge, T>(
      [](wide m) {
        const wide h = m < 1 ? wide(1 - m) : wide(0);
        return element_point{.value = h * h,
                             .slope = -2 * h,
                             .curvature = m < 1 ? wide(2) : wide(0),
                             .to_kink = size_of(wide(1 - m)),
                             .scale = larger(size_of(m), 1)};
      },
      {1.5, 0.5, 0});
  check_margin<perdita::exponential, T>(
      [](wide m) {
        const wide e = exp(-m);
        return element_point{.value = e, .slope = -e, .curvature = e};
      },
      {1.2, 1.2, 1.2});
  check_margin<perdita::square_margin, T>(
      [](wide m) {
        return element_point{.value = (1 - m) * (1 - m),
                             .slope = -2 * (1 - m),
                             .curvature = 2,
                             .scale = larger(size_of(m), 1)};
      },
      {1.5, 0.5, 0});
  check_margin<perdita::modified_huber, T>(
      [](wide m) {
        const wide to_kink = smaller(size_of(wide(1 - m)), size_of(wide(1 + m)));
        const wide h = m < 1 ? wide(1 - m) : wide(0);
        if (m < -1)
          return element_point{.value = -4 * m, .slope = -4, .curvature = 0, .to_kink = to_kink};
        return element_point{.value = h * h,
                             .slope = -2 * h,
                             .curvature = m < 1 ? wide(2) : wide(0),
                             .to_kink = to_kink};
      },
      {1.5, 0.5, 0});
  check_margin<perdita::savage, T>(
      [](wide m) {
        const wide s = logistic(-2 * m), up = logistic(2 * m);
        return element_point{.value = s * s,
                             .slope = -4 * s * s * up,
                             .curvature = 8 * s * s * up * (2 - 3 * s),
                             .curvature_size = 8 * s * s * up * (size_of(2 - 3 * s) + s)};
      },
      {5, 7, 8});
  check_margin<perdita::unhinged, T>(
      [](wide m) { return element_point{.value = 1 - m, .slope = -1, .curvature = 0}; },
      {0.5, 0, 0});
}

namespace {

/// Arc tangent by twice halving the angle and its series.
wide arctangent(wide x) {
  if (x < 0)
    return -arctangent(-x);
  const wide pi = wide(3.141592653589793116) + wide(1.2246467991473531772e-16);
  if (x > 1)
    return pi / 2 - arctangent(1 / x);
  for (int i = 0; i < 4; ++i)
    x = x / (1 + sqrt(wide(1 + x * x)));
  wide sum = 0, power = x;
  for (int k = 1; k < 60; k += 2, power *= -x * x)
    sum += power / k;
  return 16 * sum;
}

} // namespace

TEMPLATE_TEST_CASE("tangent: every number", "[margin]", float, double) {
  check_margin<perdita::tangent, TestType>(
      [](wide m) {
        const wide angle = 2 * arctangent(m), a = angle - 1, v = 1 / (1 + m * m);
        const wide size = size_of(a) + 0.5; // of a, with what atan's rounding does
        return element_point{.value = a * a,
                             .slope = 4 * a * v,
                             .curvature = 8 * (1 - m * a) * v * v,
                             .value_size = size * (size_of(a) + 1e-3),
                             .slope_size = 4 * size * v,
                             .curvature_size = 8 * (1 + size_of(m) * size) * v * v};
      },
      {4, 4, 5});
}

TEMPLATE_TEST_CASE("smoothed_hinge: every number", "[margin]", float, double) {
  using T = TestType;
  const auto points = margin_points<T>();
  for (const T gamma : {T(1), T(0.25), T(2), T(50)}) {
    const perdita::smoothed_hinge<T> loss({.gamma = gamma, .reduction = reduction::none});
    check_element(" " + std::to_string(gamma), loss, points,
                  [=](wide x, wide y) {
                    const wide m = y * x, g = static_cast<double>(gamma),
                               h = m < 1 ? wide(1 - m) : wide(0);
                    const wide to_kink = smaller(size_of(wide(1 - m)), size_of(wide(1 - m - g)));
                    if (h < g)
                      return element_point{.value = h * h / (2 * g),
                                           .slope = -y * h / g,
                                           .curvature = h > 0 ? wide(1 / g) : wide(0),
                                           .to_kink = to_kink,
                                           .scale = 1};
                    return element_point{.value = h - g / 2,
                                         .slope = -y,
                                         .curvature = 0,
                                         .value_size = h,
                                         .to_kink = to_kink,
                                         .scale = 1};
                  },
                  {2.5, 1, 0.5});
    check_zero_one(loss, points);
    if (gamma <= 2)
      check_traits(loss, loss.traits);
  }
}

TEMPLATE_TEST_CASE("bce_logits: every number", "[margin][bce]", float, double) {
  using T = TestType;
  const auto points = pair_points<T>(signed_grid(), {0, 1e-6, 0.25, 0.5, 0.9, 1}, 0, 1);
  for (const T weight : {T(1), T(0), T(0.01), T(3)}) {
    const std::vector<T> p{weight};
    const perdita::bce_logits<T> loss({.pos_weight = p, .reduction = reduction::none});
    check_element(" " + std::to_string(weight), loss, points,
                  [=](wide x, wide t) {
                    const wide w = static_cast<double>(weight), hit = w * t, miss = 1 - t;
                    return element_point{.value = weighted(hit, softplus(-x)) +
                                                  weighted(miss, softplus(x)),
                                         .slope = miss * logistic(x) - hit * logistic(-x),
                                         .curvature = (hit + miss) * logistic(x) * logistic(-x),
                                         .slope_size = miss * logistic(x) + hit * logistic(-x),
                                         .scale = 1};
                  },
                  {3, 4, 4});
  }
  // Cross-entropy is the logistic loss where the target is 0 or 1.
  element_points<T> hard = points;
  for (T& t : hard.t)
    t = t > T(0.5) ? T(1) : T(0);
  const auto a = apply(perdita::bce_logits<T>({.reduction = reduction::none}), hard);
  const auto b =
      apply(perdita::logistic<T>({.labels = binary_labels::zero_one, .reduction = reduction::none}),
            hard);
  CHECK(a.value == b.value);
  CHECK(a.slope == b.slope);
  CHECK(a.curvature == b.curvature);
}

TEMPLATE_TEST_CASE("bce_logits: one weight per column", "[margin][bce]", float, double) {
  using T = TestType;
  for (const auto& [rows, cols] : {std::pair<perdita::index, perdita::index>{40, 3}, {3, 700}}) {
    const auto size = static_cast<std::size_t>(rows * cols);
    std::vector<T> x(size), t(size), g(size), h(size), one_g(1), one_h(1), p;
    random_numbers random(5);
    for (std::size_t i = 0; i < size; ++i) {
      x[i] = static_cast<T>(3 * random.normal());
      t[i] = static_cast<T>(random.uniform(0, 1));
    }
    for (perdita::index c = 0; c < cols; ++c)
      p.push_back(static_cast<T>(random.uniform(0, 4)));
    const perdita::bce_logits<T> loss({.pos_weight = p, .reduction = reduction::sum});
    const auto view = [&, r = rows, c = cols](std::vector<T>& v) {
      return perdita::matrix_view<T>(v.data(), r, c);
    };
    const T value = loss(view(x), view(t), view(g));
    loss.hessian_diagonal(view(x), view(t), view(h));
    // Columns first: the same numbers, read otherwise.
    std::vector<T> xt(size), tt(size), gt(size);
    const auto transposed = [&, r = rows, c = cols](std::vector<T>& v) {
      return perdita::matrix_view<T>(v.data(), r, c, 1, r);
    };
    for (perdita::index r = 0; r < rows; ++r)
      for (perdita::index c = 0; c < cols; ++c) {
        transposed(xt)(r, c) = view(x)(r, c);
        transposed(tt)(r, c) = view(t)(r, c);
      }
    loss(transposed(xt), transposed(tt), transposed(gt));
    wide sum = 0;
    for (perdita::index r = 0; r < rows; ++r)
      for (perdita::index c = 0; c < cols; ++c) {
        const std::vector<T> weight{p[static_cast<std::size_t>(c)]}, one_x{view(x)(r, c)},
            one_t{view(t)(r, c)};
        const perdita::bce_logits<T> one({.pos_weight = weight, .reduction = reduction::sum});
        sum += wide(one(one_x, one_t, one_g));
        one.hessian_diagonal(one_x, one_t, one_h);
        REQUIRE(view(g)(r, c) == one_g[0]);
        REQUIRE(view(h)(r, c) == one_h[0]);
        REQUIRE(transposed(gt)(r, c) == one_g[0]);
      }
    CHECK(std::abs(static_cast<double>(wide(value) - sum)) <=
          static_cast<double>(std::numeric_limits<T>::epsilon() * value));
    CHECK(loss.traits().lipschitz > 1);
  }
}

TEST_CASE("bce_logits: the formula sheet's numbers, and PyTorch's mean", "[margin][bce]") {
  const std::vector<double> x{0.5, -1.2, 2, 0.1}, t{1, 0, 0.3, 1}, p{3}, w{1, 2, 3, 4};
  check_golden_elements(perdita::bce_logits<double>({.pos_weight = p, .reduction = reduction::sum}),
                        x, t, 5.22178821777, {-1.13262201, 0.231475217, 0.509275325, -1.42506244});
  // Divided by the number of elements, weights or not.
  std::vector<double> g(4), g_sum(4);
  const double mean = perdita::bce_logits<double>()(x, t, g, {.weights = w});
  const double sum =
      perdita::bce_logits<double>({.reduction = reduction::sum})(x, t, g_sum, {.weights = w});
  CHECK(std::abs(mean - sum / 4) < 1e-15);
  CHECK(std::abs(g[2] - g_sum[2] / 4) < 1e-15);
  // Integers are labels too.
  const std::vector<unsigned char> bytes{1, 0, 0, 1};
  const std::vector<double> same{1, 0, 0, 1};
  CHECK(perdita::bce_logits<double>()(x, bytes) == perdita::bce_logits<double>()(x, same));
}

TEMPLATE_TEST_CASE("margin losses: special values", "[margin]", float, double) {
  using T = TestType;
  const perdita::margin_options none{.reduction = reduction::none};
  check_specials(perdita::logistic<T>(none), {{0, 1, std::log(2), -0.5, 0.25},
                                              {inf, 1, 0, 0, 0},
                                              {-inf, 1, inf, -1, 0},
                                              {inf, -1, inf, 1, 0},
                                              {n, 1, n, n, n},
                                              {1, n, n, n, n}});
  check_specials(perdita::hinge<T>(none), {{1, 1, 0, 0, 0},
                                           {inf, 1, 0, 0, 0},
                                           {-inf, 1, inf, -1, 0},
                                           {-1, -1, 0, 0, 0},
                                           {n, 1, n, n, n},
                                           {1, n, n, n, n}});
  check_specials(perdita::squared_hinge<T>(none),
                 {{1, 1, 0, 0, 0}, {inf, 1, 0, 0, 0}, {-inf, 1, inf, -inf, 2}, {n, 1, n, n, n}});
  check_specials(perdita::smoothed_hinge<T>({.reduction = reduction::none}), {{1, 1, 0, 0, 0},
                                                                              {0, 1, 0.5, -1, 0},
                                                                              {inf, 1, 0, 0, 0},
                                                                              {-inf, 1, inf, -1, 0},
                                                                              {n, 1, n, n, n}});
  check_specials(perdita::exponential<T>(none),
                 {{0, 1, 1, -1, 1}, {inf, 1, 0, 0, 0}, {-inf, 1, inf, -inf, inf}, {n, 1, n, n, n}});
  check_specials(
      perdita::square_margin<T>(none),
      {{1, 1, 0, 0, 2}, {inf, 1, inf, inf, 2}, {-inf, 1, inf, -inf, 2}, {n, 1, n, n, n}});
  check_specials(perdita::modified_huber<T>(none), {{1, 1, 0, 0, 0},
                                                    {-1, 1, 4, -4, 2},
                                                    {inf, 1, 0, 0, 0},
                                                    {-inf, 1, inf, -4, 0},
                                                    {n, 1, n, n, n}});
  check_specials(perdita::savage<T>(none),
                 {{0, 1, 0.25, -0.5, 0.5}, {inf, 1, 0, 0, 0}, {-inf, 1, 1, 0, 0}, {n, 1, n, n, n}});
  const double most = (std::acos(-1.0) - 1) * (std::acos(-1.0) - 1),
               other = (std::acos(-1.0) + 1) * (std::acos(-1.0) + 1);
  check_specials(perdita::tangent<T>(none),
                 {{0, 1, 1, -4, 8}, {inf, 1, most, 0, 0}, {-inf, 1, other, 0, 0}, {n, 1, n, n, n}});
  check_specials(perdita::unhinged<T>(none),
                 {{1, 1, 0, -1, 0}, {inf, 1, -inf, -1, 0}, {-inf, 1, inf, -1, 0}, {n, 1, n, n, n}});
  check_specials(perdita::bce_logits<T>({.reduction = reduction::none}),
                 {{0, 1, std::log(2), -0.5, 0.25},
                  {inf, 1, 0, 0, 0},
                  {-inf, 0, 0, 0, 0},
                  {inf, 0.5, inf, 0.5, 0},
                  {-inf, 1, inf, -1, 0},
                  {inf, 0, inf, 1, 0},
                  {n, 1, n, n, n},
                  {n, 0, n, n, n},
                  {1, n, n, n, n}});
}

TEST_CASE("margin losses: options out of range", "[margin]") {
  using Catch::Matchers::ContainsSubstring;
  const auto labels = static_cast<binary_labels>(5);
  CHECK_THROWS_WITH(perdita::hinge<float>({.labels = labels}), ContainsSubstring("labels is 5"));
  for (const double v : {0.0, -1.0, n, inf})
    CHECK_THROWS_WITH(perdita::smoothed_hinge<double>({.gamma = v}), ContainsSubstring("gamma"));
  const std::vector<double> bad{1, -2}, two{1, 2}, x(3, 1), t(3, 1);
  CHECK_THROWS_WITH(perdita::bce_logits<double>({.pos_weight = bad}),
                    ContainsSubstring("pos_weight[1] is -2"));
  std::vector<double> g(3, 7);
  CHECK_THROWS_WITH(perdita::bce_logits<double>({.pos_weight = two})(x, t, g),
                    ContainsSubstring("size of pos_weight is 2"));
  CHECK(g == std::vector<double>(3, 7));
}

} // namespace perdita_tests
