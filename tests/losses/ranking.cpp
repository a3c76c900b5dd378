// SPDX-License-Identifier: MIT

// Losses of pairs, with PyTorch's semantics.

#include <perdita/ranking.hpp>

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

template <class T> element_points<T> labelled_points() {
  auto p = pair_points<T>(signed_grid(), {-1, 1}, -1, 1);
  for (T& y : p.t)
    y = y < 0 ? T(-1) : T(1);
  return p;
}
template <class T> std::vector<T> as_zero_one(std::vector<T> labels) {
  for (T& y : labels)
    y = y > 0 ? T(1) : T(0);
  return labels;
}

/// Of the score that moves, which y pulls up (sign 1) or down (−1), beside one that stays.
element_reference ranking_reference(double margin, double other, double sign) {
  return [=](wide x, wide y) {
    const wide pull = sign * y, r = x - other, h = margin - pull * r;
    return element_point{.value = h > 0 ? h : wide(0),
                         .slope = h > 0 ? wide(-pull) : wide(0),
                         .curvature = 0,
                         .value_size = size_of(r) + size_of(h),
                         .to_kink = size_of(h),
                         .scale = 1};
  };
}

} // namespace

// The margins and the scores that stay are such that no difference rounds across the kink.
TEMPLATE_TEST_CASE("margin_ranking: every number", "[ranking]", float, double) {
  using T = TestType;
  const auto points = labelled_points<T>();
  const std::size_t size = points.x.size();
  for (const double margin : {0.0, 0.5, 0.375, -0.25})
    for (const double other : {0.0, 1.0, -2.5}) {
      const std::vector<T> fixed(size, static_cast<T>(other));
      const perdita::margin_ranking<T> loss(
          {.margin = static_cast<T>(margin), .reduction = reduction::none});
      element_results<T> moved{std::vector<T>(size), std::vector<T>(size), std::vector<T>(size)};
      std::vector<T> fixed_slope(size), fixed_curvature(size);
      const auto check_opposite = [&] {
        for (std::size_t i = 0; i < size; ++i) {
          REQUIRE(fixed_slope[i] == -moved.slope[i]);
          REQUIRE(fixed_curvature[i] == 0);
        }
      };
      loss(points.x, fixed, points.t, moved.slope, fixed_slope, {.values = moved.value});
      loss.hessian_diagonal(points.x, fixed, points.t, moved.curvature, fixed_curvature);
      judge("margin_ranking, first", points, moved, ranking_reference(margin, other, 1), {1, 0, 0});
      check_opposite();
      loss(fixed, points.x, points.t, fixed_slope, moved.slope, {.values = moved.value});
      loss.hessian_diagonal(fixed, points.x, points.t, fixed_curvature, moved.curvature);
      judge("margin_ranking, second", points, moved, ranking_reference(margin, other, -1),
            {1, 0, 0});
      check_opposite();

      auto settings = loss.settings();
      settings.labels = binary_labels::zero_one;
      std::vector<T> values(size), slope(size);
      const perdita::margin_ranking<T> same(settings);
      same(fixed, points.x, as_zero_one(points.t), fixed_slope, slope, {.values = values});
      CHECK(values == moved.value);
      CHECK(slope == moved.slope);
    }
}

TEMPLATE_TEST_CASE("hinge_embedding: every number", "[ranking]", float, double) {
  using T = TestType;
  const auto points = labelled_points<T>();
  for (const double margin : {1.0, 0.0, -0.5, 3.25}) {
    const perdita::hinge_embedding<T> loss(
        {.margin = static_cast<T>(margin), .reduction = reduction::none});
    check_element(" " + std::to_string(margin), loss, points,
                  [=](wide x, wide y) {
                    if (y > 0)
                      return element_point{.value = x, .slope = 1, .curvature = 0, .scale = 1};
                    const wide h = margin - x;
                    return element_point{.value = h > 0 ? h : wide(0),
                                         .slope = h > 0 ? wide(-1) : wide(0),
                                         .curvature = 0,
                                         .to_kink = size_of(h),
                                         .scale = 1};
                  },
                  {0.5, 0, 0});
    auto settings = loss.settings();
    settings.labels = binary_labels::zero_one;
    const auto expected = apply(loss, points);
    const auto got = apply(perdita::hinge_embedding<T>(settings),
                           element_points<T>{points.x, as_zero_one(points.t)});
    CHECK(got.value == expected.value);
    CHECK(got.slope == expected.slope);
  }
}

TEST_CASE("ranking: sums and means by hand", "[ranking]") {
  const std::vector<double> a{1, 0, 2, -1}, b{0.5, 1, 2, 4}, weights{1, 1, 2, 0};
  const std::vector<int> y{1, 1, -1, -1};
  std::vector<double> da(4), db(4);
  // 1 − 0.5, 1 + 1, 1 + 0, max(0, 1 − 5)
  CHECK(perdita::margin_ranking<double>({.margin = 1})(a, b, y, da, db) == 3.5 / 4);
  CHECK(da == std::vector<double>{-0.25, -0.25, 0.25, 0});
  CHECK(db == std::vector<double>{0.25, 0.25, -0.25, 0});
  CHECK(perdita::margin_ranking<double>({.margin = 1})(a, b, y, da, db, {.weights = weights}) ==
        4.5 / 4);
  CHECK(da == std::vector<double>{-0.25, -0.25, 0.5, 0});
  // Without a margin, a tie is on the kink.
  CHECK(perdita::margin_ranking<double>({.reduction = reduction::sum})(a, b, y, da, db) == 1);
  CHECK(da == std::vector<double>{0, -1, 0, 0});
  CHECK(perdita::margin_ranking<double>({.reduction = reduction::sum})(a, b, y) == 1);
  // In place.
  std::vector<double> x = a, z = b;
  perdita::margin_ranking<double>({.margin = 1})(x, z, y, x, z);
  CHECK(x == std::vector<double>{-0.25, -0.25, 0.25, 0});
  CHECK(z == std::vector<double>{0.25, 0.25, -0.25, 0});

  // 0.5 + 1 + max(0, 1 − 2) + max(0, 1 − 4)
  CHECK(perdita::hinge_embedding<double>()(b, y, da) == 1.5 / 4);
  CHECK(da == std::vector<double>{0.25, 0.25, 0, 0});
}

TEMPLATE_TEST_CASE("ranking: special values", "[ranking]", float, double) {
  using T = TestType;
  check_specials(perdita::hinge_embedding<T>({.reduction = reduction::none}),
                 {{1, -1, 0, 0, 0},
                  {1, 1, 1, 1, 0},
                  {inf, 1, inf, 1, 0},
                  {-inf, 1, -inf, 1, 0},
                  {inf, -1, 0, 0, 0},
                  {-inf, -1, inf, -1, 0},
                  {n, 1, n, n, n},
                  {n, -1, n, n, n},
                  {1, n, n, n, n}});
  struct special_pair {
    double a, b, y, value, slope;
  };
  const std::vector<special_pair> pairs{
      {inf, 0, 1, 0, 0},  {inf, 0, -1, inf, 1}, {-inf, 0, 1, inf, -1}, {0, inf, 1, inf, -1},
      {0, -inf, 1, 0, 0}, {inf, -inf, 1, 0, 0}, {inf, inf, 1, n, n},   {-inf, -inf, 1, n, n},
      {n, 0, 1, n, n},    {0, n, 1, n, n},      {0, 0, n, n, n},       {0, 0, 1, 1, -1},
      {1, 0, 1, 0, 0},    {2e30, 1e30, 1, 0, 0}};
  std::vector<T> a, b, y;
  for (const auto& p : pairs) {
    a.push_back(static_cast<T>(p.a));
    b.push_back(static_cast<T>(p.b));
    y.push_back(static_cast<T>(p.y));
  }
  std::vector<T> da(a.size()), db(a.size()), values(a.size()), ha(a.size()), hb(a.size());
  const perdita::margin_ranking<T> loss({.margin = 1, .reduction = reduction::none});
  loss(a, b, y, da, db, {.values = values});
  loss.hessian_diagonal(a, b, y, ha, hb);
  const auto same = [](T got, double expected) {
    return std::isnan(expected) ? std::isnan(got) : static_cast<double>(got) == expected;
  };
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    INFO("a = " << a[i] << ", b = " << b[i] << ", y = " << y[i] << ": " << values[i] << ", "
                << da[i] << ", " << db[i]);
    CHECK(same(values[i], pairs[i].value));
    CHECK(same(da[i], pairs[i].slope));
    CHECK(same(db[i], -pairs[i].slope));
    CHECK(same(ha[i], std::isnan(pairs[i].value) ? n : 0));
    CHECK(same(hb[i], std::isnan(pairs[i].value) ? n : 0));
  }
  const std::vector<T> nothing;
  CHECK(loss(nothing, nothing, nothing) == 0);
}

TEST_CASE("ranking: what is refused", "[ranking]") {
  using Catch::Matchers::ContainsSubstring;
  for (const double v : {n, inf, -inf}) {
    CHECK_THROWS_WITH(perdita::margin_ranking<double>({.margin = v}),
                      ContainsSubstring("margin_ranking: margin is"));
    CHECK_THROWS_WITH(perdita::hinge_embedding<double>({.margin = v}),
                      ContainsSubstring("hinge_embedding: margin is"));
  }
  const auto labels = static_cast<binary_labels>(5);
  const auto how = static_cast<reduction>(9);
  CHECK_THROWS_WITH(perdita::margin_ranking<float>({.labels = labels}),
                    ContainsSubstring("labels is 5"));
  CHECK_THROWS_WITH(perdita::hinge_embedding<float>({.labels = labels}),
                    ContainsSubstring("labels is 5"));
  CHECK_THROWS_WITH(perdita::margin_ranking<float>({.reduction = how}),
                    ContainsSubstring("reduction"));
  CHECK_THROWS_WITH(perdita::hinge_embedding<float>({.reduction = how}),
                    ContainsSubstring("reduction"));
  const std::vector<double> x(3, 1), y(3, 1), two(2, 1);
  std::vector<double> g(3, 7), h(3, 7), few(2, 7);
  const perdita::margin_ranking<double> loss;
  CHECK_THROWS_WITH(loss(x, two, y, g, h), ContainsSubstring("shape of second scores is 1 x 2"));
  CHECK_THROWS_WITH(loss(x, x, two, g, h), ContainsSubstring("shape of targets is 1 x 2"));
  CHECK_THROWS_WITH(loss(x, x, y, few, h), ContainsSubstring("shape of first result is 1 x 2"));
  CHECK_THROWS_WITH(loss(x, x, y, g, few), ContainsSubstring("shape of second result is 1 x 2"));
  CHECK_THROWS_WITH(loss(x, x, y, g, g), ContainsSubstring("overlaps the gradient"));
  CHECK(g == std::vector<double>(3, 7));
  CHECK(h == std::vector<double>(3, 7));
}

} // namespace perdita_tests
