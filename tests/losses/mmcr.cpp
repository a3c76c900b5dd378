// SPDX-License-Identifier: MIT

// Maximum manifold capacity representations: formula sheet "contrastive", 6.4.

#include <perdita/mmcr.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "support/embeddings.hpp"

namespace perdita_tests {
namespace {

using perdita::index;
using perdita::matrix_view;

struct expectation {
  wide value = 0;
  wide_matrix slopes;

  template <class T>
  expectation(const batch<T>& x, index views, const wide& local) : slopes(x.rows, x.cols) {
    const index items = x.rows / views;
    wide_matrix z(x), centroids(items, x.cols);
    std::vector<wide> norms;
    for (index r = 0; r < x.rows; ++r) {
      wide square = 0;
      for (index c = 0; c < x.cols; ++c)
        square += z(r, c) * z(r, c);
      norms.push_back(sqrt(square));
      for (index c = 0; c < x.cols; ++c) {
        z(r, c) /= norms.back();
        centroids(r / views, c) += z(r, c) / views;
      }
    }
    const wide_spectrum all(centroids);
    const wide_matrix of_centroids = all.combine([&](std::size_t) { return wide(-1) / views; });
    for (const wide& s : all.sigma)
      value -= s;
    for (index b = 0; b < items; ++b) {
      wide_matrix item(views, x.cols);
      for (index v = 0; v < views; ++v)
        for (index c = 0; c < x.cols; ++c)
          item(v, c) = z(b * views + v, c);
      const wide_spectrum one(item);
      const wide_matrix of_item = one.combine([&](std::size_t) { return local / items; });
      for (const wide& s : one.sigma)
        value += local / items * s;
      for (index v = 0; v < views; ++v) {
        const index r = b * views + v;
        wide along = 0;
        for (index c = 0; c < x.cols; ++c) {
          slopes(r, c) = of_centroids(b, c) + of_item(v, c);
          along += slopes(r, c) * z(r, c);
        }
        for (index c = 0; c < x.cols; ++c)
          slopes(r, c) = (slopes(r, c) - along * z(r, c)) / norms[static_cast<std::size_t>(r)];
      }
    }
  }
};

} // namespace

TEMPLATE_TEST_CASE("mmcr: value and gradient against the formula", "[mmcr]", float, double) {
  using T = TestType;
  constexpr double epsilon = std::numeric_limits<T>::epsilon();
  error_judge of_values, of_slopes;
  struct shape {
    index items, views, cols;
  };
  for (const shape s : {shape{1, 1, 1}, {5, 2, 3}, {4, 3, 17}, {12, 2, 12}, {6, 5, 4}})
    for (const double local : {0.0, 0.1, 3.0}) {
      const index rows = s.items * s.views;
      const auto x = random_batch<T>(rows, s.cols, 3);
      const expectation expected(x, s.views, local);
      batch<T> g(rows, s.cols);
      const T value = perdita::mmcr<T>({.views = s.views, .local = local})(x.view(), g.view());
      CHECK(of_values.within(size_of(wide(value - expected.value)), sizeof(T) == 4 ? 1 : 8,
                             epsilon * (size_of(expected.value) + local)));
      if (s.cols > 1)
        CHECK(slopes_within(of_slopes, g, expected.slopes, sizeof(T) == 4 ? 1 : 16));
    }
  report_accuracy<T>(
      "mmcr", "", in_epsilons,
      {of_values.worst(), of_slopes.worst(), std::max(of_values.share(), of_slopes.share())});
}

TEST_CASE("mmcr: the formula sheet's values, of views one after another", "[mmcr]") {
  const auto x = sheet_x(), y = sheet_y();
  std::vector<double> both(x.x), g(48, 5);
  both.insert(both.end(), y.x.begin(), y.x.end());
  matrix_view<const double> views(both.data(), 12, 4, 24, 1);
  matrix_view<double> to(g.data(), 12, 4, 24, 1);
  views.plane_rows = to.plane_rows = 2;
  views.plane_stride = to.plane_stride = 4;
  CHECK(near(perdita::mmcr<double>({.local = 0.1})(views, to), -2.7007112363, 1e-11));
  CHECK(near(length_of(g), 0.732855953, 1e-8));

  batch<double> by_item(12, 4), h(12, 4);
  for (index r = 0; r < 12; ++r)
    for (index c = 0; c < 4; ++c)
      by_item(r, c) = (r % 2 == 0 ? x : y)(r / 2, c);
  CHECK(perdita::mmcr<double>({.local = 0.1})(by_item.view(), h.view()) ==
        perdita::mmcr<double>({.local = 0.1})(views));
  CHECK(h(3, 2) == to(3, 2));
}

TEST_CASE("mmcr: the gradient is the derivative", "[mmcr]") {
  for (const double local : {0.0, 0.7})
    for (const index cols : {3, 8})
      check_derivative<1>(perdita::mmcr<double>({.views = 2, .local = local}),
                          std::array{random_batch<double>(8, cols, 1)});
}

TEST_CASE("mmcr: the best batch, length, alike items, zeros, tiny and huge rows", "[mmcr]") {
  // Views agree, means are orthogonal: the bound √(B min(B, d)) = B.
  batch<double> best(8, 5), g(8, 5, 5);
  for (index r = 0; r < 8; ++r)
    best(r, r / 2) = 3;
  const perdita::mmcr<double> loss;
  CHECK(near(loss(best.view(), g.view()), -4, 1e-15));
  for (const double slope : g.x)
    CHECK(std::abs(slope) < 1e-15);

  // All alike: rank 1, ‖C‖_* = √B; the gradient is 0 along the rows, and there is no other.
  batch<double> alike(8, 5, 0.7);
  CHECK(near(loss(alike.view(), g.view()), -2, 1e-15));
  for (const double slope : g.x)
    CHECK(std::abs(slope) < 1e-15);

  auto some = random_batch<double>(8, 5, 2);
  for (index c = 0; c < 5; ++c)
    some(3, c) = 0;
  CHECK(std::isfinite(perdita::mmcr<double>({.local = 1})(some.view(), g.view())));
  for (index c = 0; c < 5; ++c)
    CHECK((g(3, c) == 0 && g(2, c) != 0));
  const batch<double> zeros(8, 5);
  CHECK(perdita::mmcr<double>({.local = 1})(zeros.view(), g.view()) == 0);
  CHECK(g.x == std::vector<double>(40, 0));

  // L(c x) = L(x), and the gradient is 1/c of what it was; to the bit, of powers of two.
  const auto x = random_batch<double>(8, 5, 2);
  auto scaled = x, h = g;
  const double value = loss(x.view(), g.view());
  for (const int power : {-900, 900}) {
    for (std::size_t i = 0; i < x.x.size(); ++i)
      scaled.x[i] = std::ldexp(x.x[i], power);
    CHECK(loss(scaled.view(), h.view()) == value);
    for (std::size_t i = 0; i < x.x.size(); ++i)
      REQUIRE(std::ldexp(h.x[i], power) == g.x[i]);
  }
  check_special_calls<1>(loss, 4, 3);
}

TEMPLATE_TEST_CASE("mmcr: layouts, threads, calls, refusals", "[mmcr][threads]", float, double) {
  using Catch::Matchers::ContainsSubstring;
  using loss = perdita::mmcr<TestType>;
  check_calls<1>(loss({.views = 3, .local = 0.3}), 150, 21);
  CHECK_THROWS_WITH(loss({.views = 0}), ContainsSubstring("views is 0"));
  CHECK_THROWS_WITH(loss({.local = std::nan("")}), ContainsSubstring("local is"));
  const batch<TestType> odd(5, 2);
  CHECK_THROWS_WITH(loss()(odd.view()), ContainsSubstring("rows is 5"));
}

} // namespace perdita_tests
