// SPDX-License-Identifier: MIT

// Formula sheet 15.2: the Poincaré ball.

#include <perdita/hyperbolic.hpp>

#include <cmath>
#include <limits>
#include <vector>

#include <perdita/testing/gradient_check.hpp>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/numbers.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

using perdita::index;
using perdita::matrix_view;
using perdita::reduction;
constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

/// By arcosh and the gradient that follows from it, where 113 bits leave enough of G − 1.
struct expectation {
  wide value;
  std::vector<wide> slopes, sizes;
  template <class T> expectation(const std::vector<T>& u, const std::vector<T>& v, const wide& c) {
    wide uu = 0, vv = 0, apart = 0;
    for (std::size_t k = 0; k < u.size(); ++k) {
      uu += wide(u[k]) * u[k];
      vv += wide(v[k]) * v[k];
      apart += (wide(u[k]) - v[k]) * (wide(u[k]) - v[k]);
    }
    const wide a = 1 - c * uu, b = 1 - c * vv, more = 2 * c * apart / (a * b);
    const wide root = sqrt(wide(more * (2 + more)));
    value = log1p(wide(more + root)) / sqrt(c);
    for (std::size_t k = 0; k < u.size(); ++k) {
      const wide factor = 4 * sqrt(c) / (a * b * root), d = wide(u[k]) - v[k];
      slopes.push_back(factor * (d + c * apart / a * u[k]));
      sizes.push_back(factor * (size_of(d) + c * apart / a * size_of(wide(u[k]))));
    }
  }
};

/// A point at a share of the ball's radius.
template <class T>
std::vector<T> make_point(std::size_t n, double share, double c, random_numbers& random) {
  std::vector<double> x;
  double squares = 0;
  for (std::size_t k = 0; k < n; ++k) {
    x.push_back(random.normal());
    squares += x[k] * x[k];
  }
  std::vector<T> point;
  for (const double a : x)
    point.push_back(static_cast<T>(a * share / std::sqrt(c * squares)));
  return point;
}

double run(const std::vector<double>& u, const std::vector<double>& v, double c,
           std::vector<double>& du, std::vector<double>& dv) {
  const auto n = static_cast<index>(u.size());
  du.assign(u.size(), 7);
  dv.assign(u.size(), 7);
  return perdita::poincare_distance<double>({.curvature = c})(
      matrix_view<const double>(u.data(), 1, n), matrix_view<const double>(v.data(), 1, n),
      matrix_view<double>(du.data(), 1, n), matrix_view<double>(dv.data(), 1, n));
}

} // namespace

TEMPLATE_TEST_CASE("poincare_distance: value and gradients", "[hyperbolic]", float, double) {
  using T = TestType;
  random_numbers random(31);
  const wide epsilon = std::numeric_limits<T>::epsilon();
  double value_error = 0, slope_error = 0;
  for (const T c : {T(0.1), T(1), T(2.5)})
    for (const std::size_t n : {1U, 2U, 17U, 128U})
      for (const double share : {0.1, 0.9, 0.999})
        for (const double step : {1e-3, 0.1, 1.0}) {
          const auto u = make_point<T>(n, share, static_cast<double>(c), random);
          auto v = make_point<T>(n, 0.8, static_cast<double>(c), random);
          for (std::size_t k = 0; k < n; ++k) // towards it
            v[k] = static_cast<T>(static_cast<double>(u[k]) +
                                  step * (static_cast<double>(v[k]) - static_cast<double>(u[k])));
          std::vector<T> du(n, T(7)), dv(n, T(7));
          const auto m = static_cast<index>(n);
          const perdita::poincare_distance<T> loss({.curvature = c});
          const matrix_view<const T> a(u.data(), 1, m), b(v.data(), 1, m);
          const T value =
              loss(a, b, matrix_view<T>(du.data(), 1, m), matrix_view<T>(dv.data(), 1, m));
          CHECK(value == loss(a, b));
          const expectation e(u, v, c), f(v, u, c);
          value_error = std::max(value_error, static_cast<double>(size_of(wide(value - e.value)) /
                                                                  (epsilon * e.value)));
          for (std::size_t k = 0; k < n; ++k)
            for (const auto& [got, x] : {std::pair(du[k], &e), std::pair(dv[k], &f)})
              slope_error =
                  std::max(slope_error, static_cast<double>(size_of(wide(got - x->slopes[k])) /
                                                            (epsilon * x->sizes[k])));
        }
  report_accuracy<T>("poincare_distance, pairwise_confusion", "", in_epsilons_of_terms,
                     {value_error, slope_error, std::max(value_error / 4, slope_error / 8)});
  INFO(value_error << " and " << slope_error);
  CHECK(value_error < 4);
  CHECK(slope_error < 8);
}

TEST_CASE("poincare_distance: golden value and derivative", "[hyperbolic]") {
  using Catch::Matchers::WithinAbs;
  std::vector<double> du, dv, first, second, u{.3, -.2}, v{.1, .4};
  CHECK_THAT(run(u, v, .1, du, dv), WithinAbs(1.27551217061, 1e-11));
  CHECK_THAT(du[0], WithinAbs(0.66750009, 1e-8));
  CHECK_THAT(du[1], WithinAbs(-1.91324524, 1e-8));
  const auto report = perdita::testing::check_gradient(
      [&](const auto& x) {
        return run(u, std::vector<double>(x.begin(), x.end()), .1, first, second);
      },
      v, dv, {.step = 0.1});
  INFO(report.message());
  CHECK(report.ok);
}

TEST_CASE("poincare_distance: near points, the border, and beyond", "[hyperbolic]") {
  std::vector<double> du, dv;
  CHECK(run({.3, .2}, {.3, .2}, 1, du, dv) == 0);
  CHECK((du == std::vector<double>{0, 0} && dv == du));
  // as far apart as numbers can be small
  CHECK(run({1e-200, 0}, {0, 0}, 1, du, dv) == 2e-200);
  CHECK((du[0] == 2 && dv[0] == -2 && du[1] == 0));
  // 1e-12 from the border: all digits of the distance from the centre, (2/√c) artanh(√c r)
  const double r = 1 - 1e-12;
  const wide x = r, far = log1p(wide(2 * x / (1 - x)));
  CHECK(std::abs(run({r, 0}, {0, 0}, 1, du, dv) / static_cast<double>(far) - 1) < 1e-15);
  const wide slope = 2 / ((1 - x) * (1 + x));
  CHECK(std::abs(du[0] / static_cast<double>(slope) - 1) < 1e-15);
  // The same where the squares' rounding errors are what counts
  const std::vector<double> p{0.6, 0.8 - 1e-14}, zero{0, 0};
  const wide squares = wide(p[0]) * p[0] + wide(p[1]) * p[1], length = sqrt(squares);
  const wide gap = 1 - squares; // = (1 − |p|)(1 + |p|)
  const wide distance = 2 * log1p(wide(length)) - log(gap);
  CHECK(std::abs(run(p, zero, 1, du, dv) / static_cast<double>(distance) - 1) < 1e-15);
  CHECK(std::abs(du[0] / static_cast<double>(2 * p[0] / (length * gap)) - 1) < 1e-14);
  for (const double bad : {1.0, 1.5, -2.0, inf, -inf, nan})
    for (const bool first : {false, true}) {
      CHECK(std::isnan(first ? run({bad, 0}, {.5, 0}, 1, du, dv)
                             : run({.5, 0}, {bad, 0}, 1, du, dv)));
      CHECK((std::isnan(du[0]) && std::isnan(du[1]) && std::isnan(dv[0]) && std::isnan(dv[1])));
    }
}

TEST_CASE("poincare_distance: symmetry and the triangle", "[hyperbolic]") {
  random_numbers random(33);
  std::vector<double> a, b, c, d;
  for (int repeat = 0; repeat < 50; ++repeat) {
    const auto x = make_point<double>(3, random.uniform(0, 1), 1, random),
               y = make_point<double>(3, random.uniform(0, 1), 1, random),
               z = make_point<double>(3, random.uniform(0, 1), 1, random);
    const double xy = run(x, y, 1, a, b);
    CHECK(xy == run(y, x, 1, c, d));
    CHECK((a == d && b == c));
    CHECK(run(x, z, 1, a, b) <= (xy + run(y, z, 1, a, b)) * (1 + 1e-14));
  }
}

TEST_CASE("pairwise_confusion: the halves of a batch", "[hyperbolic]") {
  random_numbers random(34);
  const index n = 600, dims = 33;
  std::vector<float> x;
  for (index r = 0; r < 2 * n; ++r) {
    const auto p = make_point<float>(static_cast<std::size_t>(dims), 0.7, 0.5, random);
    x.insert(x.end(), p.begin(), p.end());
  }
  const auto half = static_cast<std::size_t>(n * dims);
  std::vector<float> du(half), dv(half), g(2 * half), h(2 * half),
      values(static_cast<std::size_t>(n));
  const matrix_view<const float> u(x.data(), n, dims), v(x.data() + half, n, dims);
  const perdita::poincare_distance<float>::options options{.curvature = 0.5F};
  const float expected = perdita::poincare_distance<float>(options)(
      u, v, matrix_view<float>(du.data(), n, dims), matrix_view<float>(dv.data(), n, dims));
  perdita::call_options<float> call;
  call.run_on = perdita::serial;
  call.values = values;
  const perdita::pairwise_confusion<float> loss(options);
  const matrix_view<const float> all(x.data(), 2 * n, dims);
  CHECK(loss(all, matrix_view<float>(g.data(), 2 * n, dims), call) == expected);
  CHECK(loss(all) == expected);
  double sum = 0;
  for (const float value : values)
    sum += static_cast<double>(value);
  CHECK(std::abs(sum / static_cast<double>(n) - static_cast<double>(expected)) < 1e-6);
  du.insert(du.end(), dv.begin(), dv.end());
  CHECK(g == du);
  const threads_executor threads(3, task_order::shuffled);
  call.run_on = threads;
  CHECK(loss(all, matrix_view<float>(h.data(), 2 * n, dims), call) == expected);
  CHECK(g == h);
  // Column-major, the halves lie between each other.
  std::vector<float> by_columns(x.size()), to(x.size());
  for (std::size_t r = 0, rows = 2 * static_cast<std::size_t>(n); r < rows; ++r)
    for (std::size_t d = 0; d < static_cast<std::size_t>(dims); ++d)
      by_columns[d * rows + r] = x[r * static_cast<std::size_t>(dims) + d];
  CHECK(loss(matrix_view<const float>(by_columns.data(), 2 * n, dims, 1, 2 * n),
             matrix_view<float>(to.data(), 2 * n, dims, 1, 2 * n)) == expected);
  std::size_t wrong = 0;
  for (std::size_t r = 0, rows = 2 * static_cast<std::size_t>(n); r < rows; ++r)
    for (std::size_t d = 0; d < static_cast<std::size_t>(dims); ++d)
      wrong += !(to[d * rows + r] == g[r * static_cast<std::size_t>(dims) + d]);
  CHECK(wrong == 0);
}

TEST_CASE("hyperbolic: what is refused", "[hyperbolic]") {
  using Catch::Matchers::ContainsSubstring;
  using distance = perdita::poincare_distance<float>;
  CHECK_THROWS_WITH(distance({.curvature = 0}), ContainsSubstring("curvature is 0"));
  std::vector<float> x(12), g(12, 7.0F);
  const matrix_view<float> u(x.data(), 2, 3), v(x.data() + 6, 2, 3), d(g.data(), 2, 3),
      e(g.data() + 6, 2, 3);
  CHECK_THROWS_WITH(distance()(u, matrix_view<float>(x.data(), 3, 2)),
                    ContainsSubstring("other points is 3"));
  CHECK_THROWS_WITH(distance()(u, v, d, d), ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(distance()(u, v, v, e), ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(distance()(u, v, u, e), ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(distance()(u, v, d, v), ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(distance()(u, v, matrix_view<float>(g.data(), 1, 3), e),
                    ContainsSubstring("first gradient is 1"));
  const perdita::pairwise_confusion<float> confusion;
  CHECK_THROWS_WITH(confusion(matrix_view<float>(x.data(), 3, 4)), ContainsSubstring("rows is 3"));
  CHECK_THROWS_WITH(
      confusion(matrix_view<float>(x.data(), 4, 3), matrix_view<float>(g.data(), 2, 3)),
      ContainsSubstring("rows of the gradient is 2"));
  CHECK_THROWS_WITH(confusion(matrix_view<float>(nullptr, 4, 3)), ContainsSubstring("null"));
  CHECK_THROWS_WITH(
      confusion(matrix_view<float>(x.data(), 4, 3), matrix_view<float>(x.data(), 4, 3)),
      ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(
      confusion(matrix_view<float>(x.data(), 4, 3), matrix_view<float>(g.data(), 4, 2)),
      ContainsSubstring("columns of the gradient is 2"));
  CHECK(g == std::vector<float>(12, 7.0F));
}

namespace {

/// By the definition, with (−p) ⊕ x formed.
wide expect_logit(const std::vector<wide>& x, const std::vector<wide>& v,
                  const std::vector<wide>& a, const wide& c) {
  const auto dot = [](const std::vector<wide>& s, const std::vector<wide>& t) {
    wide sum = 0;
    for (std::size_t j = 0; j < s.size(); ++j)
      sum += s[j] * t[j];
    return sum;
  };
  const wide k = sqrt(wide(c * dot(v, v)));
  std::vector<wide> u, m; // u = −p
  for (const wide& s : v)
    u.push_back(k == 0 ? wide(0) : wide(-tanh(k) / k * s));
  const wide ux = dot(u, x), uu = dot(u, u), xx = dot(x, x);
  for (std::size_t j = 0; j < x.size(); ++j)
    m.push_back(((1 + 2 * c * ux + c * xx) * u[j] + (1 - c * uu) * x[j]) /
                (1 + 2 * c * ux + c * c * uu * xx));
  const wide length = sqrt(dot(a, a));
  const wide s = 2 * sqrt(c) * dot(m, a) / (length * (1 - c * dot(m, m))), t = size_of(s);
  const wide arc = log1p(wide(t + t * t / (1 + sqrt(wide(1 + t * t)))));
  return (s < 0 ? -1 : 1) * 2 * length / sqrt(c) * arc;
}

template <class T> struct planes {
  index rows = 7, classes = 5, dims = 6;
  std::vector<T> x, v, a;
  planes(double c, random_numbers& random) {
    const auto n = static_cast<std::size_t>(dims);
    const auto add = [&](std::vector<T>& to, double share, double curvature) {
      const auto point = make_point<T>(n, share, curvature, random);
      to.insert(to.end(), point.begin(), point.end());
    };
    for (index r = 0; r < rows; ++r)
      add(x, random.uniform(0, 0.99), c);
    for (index k = 0; k < classes; ++k) {
      add(v, k == 1 ? 0 : random.uniform(0, 2), c);
      add(a, random.uniform(0.1, 3), 1);
    }
  }
  matrix_view<const T> view(const std::vector<T>& m) const {
    return {m.data(), static_cast<index>(m.size()) / dims, dims};
  }
  std::vector<wide> row(const std::vector<T>& m, index r) const {
    return {m.begin() + r * dims, m.begin() + (r + 1) * dims};
  }
};

} // namespace

TEMPLATE_TEST_CASE("hyperbolic_logits: scores and Jacobian products", "[hyperbolic]", float,
                   double) {
  using T = TestType;
  random_numbers random(35);
  const wide epsilon = std::numeric_limits<T>::epsilon();
  double score_error = 0, slope_error = 0;
  for (const T c : {T(0.1), T(1)}) {
    const planes<T> in(static_cast<double>(c), random);
    const auto pairs = static_cast<std::size_t>(in.rows * in.classes);
    std::vector<T> z(pairs), dz, dx(in.x.size()), dv(in.v.size()), da(in.a.size());
    for (std::size_t i = 0; i < pairs; ++i)
      dz.push_back(static_cast<T>(random.normal()));
    const perdita::hyperbolic_logits<T> logits({.curvature = c});
    logits(in.view(in.x), in.view(in.v), in.view(in.a),
           matrix_view<T>(z.data(), in.rows, in.classes));
    logits.backward(in.view(in.x), in.view(in.v), in.view(in.a),
                    matrix_view<const T>(dz.data(), in.rows, in.classes),
                    matrix_view<T>(dx.data(), in.rows, in.dims),
                    matrix_view<T>(dv.data(), in.classes, in.dims),
                    matrix_view<T>(da.data(), in.classes, in.dims));
    const auto score = [&](index r, index k) {
      return expect_logit(in.row(in.x, r), in.row(in.v, k), in.row(in.a, k), c);
    };
    for (index r = 0; r < in.rows; ++r)
      for (index k = 0; k < in.classes; ++k) {
        const auto i = static_cast<std::size_t>(r * in.classes + k);
        score_error =
            std::max(score_error, static_cast<double>(size_of(wide(z[i] - score(r, k))) /
                                                      (epsilon * (1 + size_of(score(r, k))))));
      }
    // Differences of the reference, with an error of 1e-22 or so
    const auto differences = [&](const std::vector<T>& m, const std::vector<T>& got, auto total) {
      wide size = 0;
      std::vector<wide> expected;
      for (std::size_t i = 0; i < m.size(); ++i) {
        const wide step = ldexp(wide(1), -38);
        const auto at = [&](int n) { return total(i, wide(n * step)); };
        expected.push_back((8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step));
        size = larger(size, size_of(expected[i]));
      }
      for (std::size_t i = 0; i < m.size(); ++i)
        slope_error =
            std::max(slope_error,
                     static_cast<double>(size_of(wide(got[i] - expected[i])) /
                                         (epsilon * larger(size_of(expected[i]), wide(size / 8)))));
    };
    const auto moved = [&](const std::vector<T>& m, index r, std::size_t i, const wide& by) {
      auto row = in.row(m, r);
      const auto at = static_cast<index>(i) - r * in.dims;
      if (at >= 0 && at < in.dims)
        row[static_cast<std::size_t>(at)] += by;
      return row;
    };
    const auto total = [&](int which) {
      return [&, which](std::size_t i, const wide& by) {
        wide sum = 0;
        const wide none = 0;
        for (index r = 0; r < in.rows; ++r)
          for (index k = 0; k < in.classes; ++k)
            sum += wide(dz[static_cast<std::size_t>(r * in.classes + k)]) *
                   expect_logit(moved(in.x, r, i, which == 0 ? by : none),
                                moved(in.v, k, i, which == 1 ? by : none),
                                moved(in.a, k, i, which == 2 ? by : none), c);
        return sum;
      };
    };
    differences(in.x, dx, total(0));
    differences(in.v, dv, total(1));
    differences(in.a, da, total(2));
  }
  report_accuracy<T>("hyperbolic_logits", "", in_epsilons_of_terms,
                     {score_error, slope_error, std::max(score_error / 32, slope_error / 64)});
  INFO(score_error << " and " << slope_error);
  CHECK(score_error < 32);
  CHECK(slope_error < 64);
}

TEST_CASE("hyperbolic_logits: digits near a plane's point, limits, specials", "[hyperbolic]") {
  const auto logit = [](std::vector<double> x, std::vector<double> v, std::vector<double> a,
                        double c, std::vector<double>* slopes = nullptr) {
    const auto n = static_cast<index>(x.size());
    double z = 7;
    const matrix_view<const double> at(x.data(), 1, n), p(v.data(), 1, n), q(a.data(), 1, n);
    const perdita::hyperbolic_logits<double> loss({.curvature = c});
    loss(at, p, q, matrix_view<double>(&z, 1, 1));
    if (slopes) {
      const double one = 1;
      slopes->assign(3 * x.size(), 7);
      loss.backward(at, p, q, matrix_view<const double>(&one, 1, 1),
                    matrix_view<double>(slopes->data(), 1, n),
                    matrix_view<double>(slopes->data() + n, 1, n),
                    matrix_view<double>(slopes->data() + 2 * n, 1, n));
    }
    return z;
  };
  std::vector<double> g;
  const double p = std::tanh(0.5), x = p + 1e-10; // x − p is exact
  const double near = logit({x}, {0.5}, {2}, 1);
  CHECK(std::abs(near / (4 * 2 * (x - p) / (1 - p * p)) - 1) < 1e-9);
  // c → 0
  CHECK(std::abs(logit({.5, 2}, {1, 1}, {3, -1}, 1e-12) - 4 * ((.5 - 1) * 3 - (2 - 1))) < 1e-9);
  CHECK(logit({.5, .1}, {1, 1}, {0, 0}, 1, &g) == 0);
  CHECK(g == std::vector<double>(6, 0.0));
  for (const double bad : {1.0, 2.0, -inf, nan}) {
    CHECK(std::isnan(logit({bad, 0}, {1, 1}, {1, 0}, 1, &g)));
    CHECK((std::isnan(g[0]) && std::isnan(g[2]) && std::isnan(g[5])));
    CHECK(std::isnan(logit({bad, 0}, {1, 1}, {0, 0}, 1)));
  }
}

TEST_CASE("hyperbolic_logits: normals whose squares leave the range", "[hyperbolic]") {
  random_numbers random(44);
  const planes<double> in(1, random);
  std::vector<double> dz;
  for (int i = 0; i < 35; ++i)
    dz.push_back(random.normal());
  struct results {
    std::vector<double> z, dx, dv, da;
  };
  const auto run_all = [&](const std::vector<double>& normals) {
    results to{std::vector<double>(35), std::vector<double>(42), std::vector<double>(30),
               std::vector<double>(30)};
    const perdita::hyperbolic_logits<double> loss;
    loss(in.view(in.x), in.view(in.v), in.view(normals), matrix_view<double>(to.z.data(), 7, 5));
    loss.backward(in.view(in.x), in.view(in.v), in.view(normals),
                  matrix_view<const double>(dz.data(), 7, 5),
                  matrix_view<double>(to.dx.data(), 7, 6), matrix_view<double>(to.dv.data(), 5, 6),
                  matrix_view<double>(to.da.data(), 5, 6));
    return to;
  };
  const auto scaled = [](std::vector<double> m, int power) {
    for (double& s : m)
      s = std::ldexp(s, power);
    return m;
  };
  const results plain = run_all(in.a);
  for (const int power : {-900, -532, 532, 1000}) {
    INFO("normals by 2^" << power);
    const results got = run_all(scaled(in.a, power));
    CHECK(got.z == scaled(plain.z, power));
    CHECK(got.dx == scaled(plain.dx, power));
    CHECK(got.dv == scaled(plain.dv, power));
    CHECK(got.da == plain.da);
  }
}

TEST_CASE("hyperbolic_logits: threads, layouts, and what is refused", "[hyperbolic]") {
  using Catch::Matchers::ContainsSubstring;
  random_numbers random(36);
  const planes<float> in(1, random);
  std::vector<float> z(35), y(35), dx(42), dv(30), da(30), ex(42), ev(30), ea(30), dz(35, 0.5F);
  const auto x = in.view(in.x), v = in.view(in.v), a = in.view(in.a);
  const perdita::hyperbolic_logits<float> logits;
  const threads_executor threads(3, task_order::shuffled);
  perdita::workspace memory;
  logits(x, v, a, matrix_view<float>(z.data(), 7, 5), perdita::serial);
  logits(x, v, a, matrix_view<float>(y.data(), 7, 5, 1, 7), threads, &memory);
  for (std::size_t r = 0; r < 7; ++r)
    for (std::size_t k = 0; k < 5; ++k)
      CHECK(z[5 * r + k] == y[7 * k + r]);
  const matrix_view<const float> g(dz.data(), 7, 5);
  logits.backward(x, v, a, g, matrix_view<float>(dx.data(), 7, 6),
                  matrix_view<float>(dv.data(), 5, 6), matrix_view<float>(da.data(), 5, 6),
                  perdita::serial);
  logits.backward(x, v, a, g, matrix_view<float>(ex.data(), 7, 6),
                  matrix_view<float>(ev.data(), 5, 6), matrix_view<float>(ea.data(), 5, 6), threads,
                  &memory);
  CHECK((dx == ex && dv == ev && da == ea));

  const matrix_view<float> to(ex.data(), 7, 6), tv(ev.data(), 5, 6), ta(ea.data(), 5, 6);
  CHECK_THROWS_WITH(perdita::hyperbolic_logits<float>({.curvature = -1}),
                    ContainsSubstring("curvature is -1"));
  CHECK_THROWS_WITH(logits(x, v, in.view(in.x), matrix_view<float>(z.data(), 7, 5)),
                    ContainsSubstring("rows of normals is 7"));
  CHECK_THROWS_WITH(logits(x, v, a, matrix_view<float>(z.data(), 5, 7)),
                    ContainsSubstring("rows of scores is 5"));
  CHECK_THROWS_WITH(logits(x, v, a, matrix_view<float>(nullptr, 7, 5)),
                    ContainsSubstring("scores"));
  CHECK_THROWS_WITH(logits.backward(x, v, a, g, to, tv, tv), ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(logits.backward(x, v, a, g, to, tv, to),
                    ContainsSubstring("rows of d_normals"));
  CHECK_THROWS_WITH(logits.backward(x, v, a, matrix_view<float>(ex.data(), 7, 5), to, tv, ta),
                    ContainsSubstring("overlaps"));
  CHECK((dx == ex && dv == ev && da == ea));
}

namespace {

/// x = exponential_map(v), as it is printed.
std::vector<wide> expect_point(const std::vector<wide>& v, const wide& c, const wide& reach) {
  wide squares = 0;
  for (const wide& s : v)
    squares += s * s;
  const wide length = sqrt(squares), root = sqrt(c);
  std::vector<wide> x;
  for (const wide& s : v)
    x.push_back(length == 0 ? wide(0)
                            : wide(tanh(wide(root * smaller(length, reach))) / root * s / length));
  return x;
}

/// One feature's share of the cross-entropy.
wide expect_surprise(const std::vector<wide>& x, const planes<double>& in, index y, const wide& c) {
  std::vector<wide> z;
  for (index k = 0; k < in.classes; ++k)
    z.push_back(expect_logit(x, in.row(in.v, k), in.row(in.a, k), c));
  return log_sum_exp(z, [](std::size_t) { return true; }) - z[static_cast<std::size_t>(y)];
}

} // namespace

TEMPLATE_TEST_CASE("exponential_map: points and Jacobian products", "[hyperbolic]", float, double) {
  using T = TestType;
  random_numbers random(41);
  const wide epsilon = std::numeric_limits<T>::epsilon();
  error_judge of_points, of_slopes;
  for (const T c : {T(0.1), T(1), T(4)})
    for (const T clip : {T(2), std::numeric_limits<T>::infinity()})
      for (const double length : {0.0, 1e-3, 1.0, 30.0}) {
        const index dims = 9;
        std::vector<T> v, g, x(9), d(9);
        for (index j = 0; j < dims; ++j) {
          v.push_back(static_cast<T>(length / 3 * random.normal()));
          g.push_back(static_cast<T>(random.normal()));
        }
        const perdita::exponential_map<T> map({.curvature = c, .clip = clip, .margin = T(0.125)});
        const matrix_view<const T> at(v.data(), 1, dims), slopes(g.data(), 1, dims);
        map(at, matrix_view<T>(x.data(), 1, dims));
        map.backward(at, slopes, matrix_view<T>(d.data(), 1, dims));
        // artanh(7/8) = ½ log 15
        const wide reach = smaller(wide(clip), wide(log(wide(15)) / 2 / sqrt(wide(c))));
        const std::vector<wide> start(v.begin(), v.end());
        const auto expected = expect_point(start, c, reach);
        wide along = 0, size = 0;
        for (std::size_t j = 0; j < 9; ++j) {
          of_points.within(size_of(wide(x[j] - expected[j])), 8,
                           epsilon * size_of(expected[j]) + wide(1e-300));
          const wide step = ldexp(wide(1), -40);
          auto moved = start;
          const auto total = [&](int n) {
            moved[j] = start[j] + n * step;
            const auto p = expect_point(moved, c, reach);
            wide sum = 0;
            for (std::size_t k = 0; k < 9; ++k)
              sum += p[k] * g[k];
            return sum;
          };
          along = (8 * (total(1) - total(-1)) - (total(2) - total(-2))) / (12 * step);
          size = larger(size, size_of(along));
          of_slopes.within(size_of(wide(d[j] - along)), 16,
                           epsilon * larger(size_of(along), wide(size / 4)));
        }
      }
  report_accuracy<T>("exponential_map", "", in_epsilons_of_terms, of_points, of_slopes);
  INFO(of_points.worst() << " and " << of_slopes.worst());
  CHECK(of_points.all_within());
  CHECK(of_slopes.all_within());
}

TEST_CASE("exponential_map: distances, specials, and what is refused", "[hyperbolic]") {
  using Catch::Matchers::ContainsSubstring;
  using Catch::Matchers::WithinAbs;
  std::vector<double> v{.3, -.4}, x{7, 7}, du, dv, d{7, 7};
  const matrix_view<double> at(v.data(), 1, 2), to(x.data(), 1, 2), slopes(d.data(), 1, 2);
  const perdita::exponential_map<double> map({.curvature = .1});
  map(at, to);
  CHECK_THAT(run({0, 0}, x, .1, du, dv), WithinAbs(2 * .5, 1e-14));
  v = {30, 40};
  map(at, to);
  CHECK_THAT(run({0, 0}, x, .1, du, dv), WithinAbs(2 * 2, 1e-14));
  v = {3e200, -4e200}; // the squares overflow
  map(at, to);
  CHECK_THAT(run({0, 0}, x, .1, du, dv), WithinAbs(2 * 2, 1e-14));
  v = {0, 0};
  map(at, at);
  CHECK(v == std::vector<double>{0, 0});
  map.backward(at, to, slopes);
  CHECK(d == x);
  for (const double bad : {inf, -inf, nan}) {
    v = {bad, 0};
    map(at, to);
    CHECK((std::isnan(x[0]) && std::isnan(x[1])));
    x = {1, 1};
    map.backward(at, to, slopes);
    CHECK((std::isnan(d[0]) && std::isnan(d[1])));
  }
  using exponential = perdita::exponential_map<double>;
  CHECK_THROWS_WITH(exponential({.curvature = 0}), ContainsSubstring("curvature is 0"));
  CHECK_THROWS_WITH(exponential({.clip = 0}), ContainsSubstring("clip is 0"));
  CHECK_THROWS_WITH(exponential({.margin = 1}), ContainsSubstring("margin is 1"));
  CHECK_THROWS_WITH(map(at, matrix_view<double>(x.data(), 2, 1)),
                    ContainsSubstring("rows of points is 2"));
  CHECK_THROWS_WITH(map.backward(at, to, matrix_view<double>(x.data(), 1, 2, 2, 0)),
                    ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(map(at, matrix_view<double>(v.data() + 1, 1, 1)),
                    ContainsSubstring("columns of points is 1"));
}

TEST_CASE("hyp_oc: the formula, and its derivative", "[hyperbolic]") {
  random_numbers random(42);
  planes<double> in(1, random);
  in.rows = 6;
  in.x.resize(36);
  for (double& s : in.x)
    s = random.normal(); // about half of the features are clipped
  const std::vector<int> labels{0, 1, -100, 4, 2, 1};
  const perdita::hyp_oc<double> loss({.confusion = 0.75});
  std::vector<double> dx(36, 7), dv(30, 7), da(30, 7);
  const perdita::hyp_oc_gradients<double> to{matrix_view<double>(dx.data(), 6, 6),
                                             matrix_view<double>(dv.data(), 5, 6),
                                             matrix_view<double>(da.data(), 5, 6)};
  const auto value = [&] { return loss(in.view(in.x), labels, in.view(in.v), in.view(in.a)); };
  CHECK(loss(in.view(in.x), labels, in.view(in.v), in.view(in.a), to) == value());
  const wide c = 0.1;
  wide entropy = 0, apart = 0;
  std::vector<std::vector<wide>> x;
  for (index r = 0; r < 6; ++r) {
    x.push_back(expect_point(in.row(in.x, r), c, 2));
    if (labels[std::size_t(r)] >= 0)
      entropy += expect_surprise(x.back(), in, labels[std::size_t(r)], c) / 5;
  }
  for (std::size_t r = 0; r < 3; ++r)
    apart += expectation(x[r], x[r + 3], c).value / 3;
  const double epsilon = std::numeric_limits<double>::epsilon();
  error_judge of_value;
  CHECK(of_value.within(size_of(wide(value() - (entropy + wide(0.75) * apart))), 1e-14 / epsilon,
                        epsilon));
  report_accuracy<double>("hyp_oc", "", in_epsilons_absolute,
                          {of_value.worst(), -1, of_value.share()});
  for (auto* which : {&in.x, &in.v, &in.a}) {
    const auto& slopes = which == &in.x ? dx : which == &in.v ? dv : da;
    const auto report = perdita::testing::check_gradient(value, *which, slopes, {.step = 0.02});
    INFO(report.message());
    CHECK(report.ok);
    CHECK(report.unresolved == 0);
  }
  // Without confusion it is cross-entropy of any number of rows.
  const perdita::hyp_oc<double> alone({.confusion = 0});
  CHECK(std::abs(alone(in.view(in.x), labels, in.view(in.v), in.view(in.a)) -
                 static_cast<double>(entropy)) < 1e-14);
  // Nothing depends on a row without cross-entropy, whatever it holds.
  const double without = alone(in.view(in.x), labels, in.view(in.v), in.view(in.a), to);
  for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity()}) {
    const auto of_x = dx, of_v = dv, of_a = da;
    in.x[2 * 6 + 1] = bad;
    CHECK(alone(in.view(in.x), labels, in.view(in.v), in.view(in.a), to) == without);
    CHECK((dx == of_x && dv == of_v && da == of_a));
    for (std::size_t j = 0; j < 6; ++j)
      CHECK(dx[2 * 6 + j] == 0);
  }
}

TEST_CASE("hyp_oc: float, calls, threads, and what is refused", "[hyperbolic]") {
  using Catch::Matchers::ContainsSubstring;
  random_numbers random(43);
  planes<float> in(1, random);
  in.rows = 400;
  in.x.resize(2400);
  for (float& s : in.x)
    s = static_cast<float>(random.normal());
  std::vector<int> labels(400);
  for (std::size_t r = 0; r < 400; ++r)
    labels[r] = static_cast<int>(r % 5);
  std::vector<float> g(2460), h(2460, 1);
  const auto gradients = [](std::vector<float>& m) {
    return perdita::hyp_oc_gradients<float>{matrix_view<float>(m.data(), 400, 6),
                                            matrix_view<float>(m.data() + 2400, 5, 6),
                                            matrix_view<float>(m.data() + 2430, 5, 6)};
  };
  const perdita::hyp_oc<float> loss;
  perdita::call_options<float> call;
  call.run_on = perdita::serial;
  const auto x = in.view(in.x), v = in.view(in.v), a = in.view(in.a);
  const float value = loss(x, labels, v, a, gradients(g), call);
  const threads_executor threads(3, task_order::shuffled);
  call.run_on = threads;
  call.scale = 2;
  call.accumulate = true;
  CHECK(loss(x, labels, v, a, gradients(h), call) == value);
  for (std::size_t i = 0; i < 2460; ++i)
    CHECK(std::abs(h[i] - (1 + 2 * g[i])) < 1e-6F);
  // All of float's digits
  const std::vector<double> wx(in.x.begin(), in.x.end()), wv(in.v.begin(), in.v.end()),
      wa(in.a.begin(), in.a.end());
  const double same = perdita::hyp_oc<double>({.curvature = static_cast<double>(0.1F)})(
      matrix_view<const double>(wx.data(), 400, 6), labels,
      matrix_view<const double>(wv.data(), 5, 6), matrix_view<const double>(wa.data(), 5, 6));
  CHECK(value == static_cast<float>(same));

  std::vector<float> before = h;
  CHECK_THROWS_WITH(perdita::hyp_oc<float>({.confusion = -1}),
                    ContainsSubstring("confusion is -1"));
  CHECK_THROWS_WITH(loss(matrix_view<const float>(in.x.data(), 399, 6),
                         perdita::vector_view<const int>(labels.data(), 399), v, a),
                    ContainsSubstring("rows is 399"));
  CHECK_THROWS_WITH(loss(x, labels, v, x), ContainsSubstring("rows of normals is 400"));
  auto some = gradients(h);
  some.offsets = some.normals;
  CHECK_THROWS_WITH(loss(x, labels, v, a, some), ContainsSubstring("overlaps"));
  some.offsets.cols = 5;
  CHECK_THROWS_WITH(loss(x, labels, v, a, some),
                    ContainsSubstring("columns of gradient of offsets"));
  labels[3] = 5;
  CHECK_THROWS_WITH(loss(x, labels, v, a, gradients(h)), ContainsSubstring("labels[3] is 5"));
  labels[3] = 0;
  const std::vector<float> ones(400, 1);
  call.upstream = ones;
  CHECK_THROWS_WITH(loss(x, labels, v, a, gradients(h), call), ContainsSubstring("upstream"));
  CHECK(h == before);
}

TEST_CASE("hyp_oc: its map is exponential_map with its settings", "[hyperbolic]") {
  random_numbers random(44);
  planes<double> in(1, random);
  in.rows = 6;
  in.x.resize(36);
  for (double& s : in.x)
    s = random.normal();
  const std::vector<int> labels{0, 1, 3, 4, 2, 1};
  for (const auto& [clip, margin] : {std::pair{0.5, 1e-3}, {9.0, 0.5}}) {
    const perdita::hyp_oc<double> loss(
        {.curvature = 0.5, .clip = clip, .margin = margin, .confusion = 0});
    std::vector<double> points(36), z(30);
    perdita::exponential_map<double>({.curvature = 0.5, .clip = clip, .margin = margin})(
        in.view(in.x), matrix_view<double>(points.data(), 6, 6));
    const matrix_view<double> scores(z.data(), 6, 5);
    perdita::hyperbolic_logits<double>({.curvature = 0.5})(
        matrix_view<const double>(points.data(), 6, 6), in.view(in.v), in.view(in.a), scores);
    CHECK(std::abs(loss(in.view(in.x), labels, in.view(in.v), in.view(in.a)) -
                   perdita::cross_entropy<double>()(scores, labels)) < 1e-13);
  }
}

} // namespace perdita_tests
