// SPDX-License-Identifier: MIT

// Sinkhorn divergence and sliced Wasserstein distance: formula sheet of contrastive losses, 7.17
// and 7.19.

#include <perdita/optimal_transport.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
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

using perdita::matrix_view;
using points = std::vector<std::vector<wide>>;

template <class T> struct sample {
  index rows, cols;
  std::vector<T> x, g;
  sample(index n, index d, double spread, std::uint64_t seed) : rows(n), cols(d) {
    random_numbers random(seed);
    for (index i = 0; i < n * d; ++i)
      x.push_back(static_cast<T>(spread * random.normal()));
    g.assign(x.size(), 7);
  }
  matrix_view<T> view() { return {x.data(), rows, cols}; }
  matrix_view<T> gradient() { return {g.data(), rows, cols}; }
  points wide_points() const {
    points p(static_cast<std::size_t>(rows));
    for (std::size_t i = 0; i < x.size(); ++i)
      p[i / static_cast<std::size_t>(cols)].push_back(x[i]);
    return p;
  }
};

/// u ← 1/(K v/m) and v ← 1/(K'u/n) until u moves by no more than the tolerance.
template <class Number>
void balance(const std::vector<std::vector<Number>>& k, std::vector<Number>& u,
             std::vector<Number>& v, const Number& tolerance) {
  for (Number moved = 2 * tolerance; moved > tolerance;) {
    moved = 0;
    for (std::size_t j = 0; j < v.size(); ++j) {
      Number sum = 0;
      for (std::size_t i = 0; i < u.size(); ++i)
        sum += k[i][j] * u[i];
      v[j] = static_cast<double>(u.size()) / sum;
    }
    for (std::size_t i = 0; i < u.size(); ++i) {
      Number sum = 0;
      for (std::size_t j = 0; j < v.size(); ++j)
        sum += k[i][j] * v[j];
      const Number next = static_cast<double>(v.size()) / sum;
      const Number step = u[i] / next - 1;
      moved = std::max(moved, step < 0 ? Number(-step) : step);
      u[i] = next;
    }
  }
}

/// Entropic optimal transport by scaling a matrix, in double as far as that goes. The value is the
/// dual's, whose error is the square of what u still moves; the plan's must agree.
wide transport(const points& x, const points& y, const wide& epsilon) {
  const std::size_t n = x.size(), m = y.size();
  points cost(n, std::vector<wide>(m)), k = cost;
  std::vector<std::vector<double>> rough_k(n, std::vector<double>(m));
  for (std::size_t i = 0; i < n; ++i)
    for (std::size_t j = 0; j < m; ++j) {
      for (std::size_t d = 0; d < x[i].size(); ++d)
        cost[i][j] += (x[i][d] - y[j][d]) * (x[i][d] - y[j][d]) / 2;
      k[i][j] = exp(wide(-cost[i][j] / epsilon));
      rough_k[i][j] = static_cast<double>(k[i][j]);
    }
  std::vector<double> rough_u(n, 1), rough_v(m, 1);
  balance(rough_k, rough_u, rough_v, 1e-13);
  std::vector<wide> u(rough_u.begin(), rough_u.end()), v(rough_v.begin(), rough_v.end());
  balance(k, u, v, wide(1e-16));

  wide dual = 0, primal = 0;
  for (const wide& scale : u)
    dual += epsilon * log(scale) / static_cast<double>(n);
  for (const wide& scale : v)
    dual += epsilon * log(scale) / static_cast<double>(m);
  for (std::size_t i = 0; i < n; ++i)
    for (std::size_t j = 0; j < m; ++j) {
      const wide ratio = u[i] * k[i][j] * v[j]; // plan over product of the weights
      primal += ratio * (cost[i][j] + epsilon * log(ratio)) / static_cast<double>(n * m);
    }
  REQUIRE(size_of(wide(primal - dual)) <= wide(1e-14) * (1 + size_of(dual)));
  return dual;
}
wide divergence(const points& x, const points& y, double epsilon, bool debiased) {
  const wide across = transport(x, y, epsilon);
  return debiased ? wide(across - (transport(x, x, epsilon) + transport(y, y, epsilon)) / 2)
                  : across;
}

/// W_p^p along directions with the mass of every point cut up, and gradients.
struct sliced {
  wide value = 0;
  points of_x, of_y;
};
sliced slice(const points& x, const points& y, const points& theta, double p) {
  sliced s{0, points(x.size(), std::vector<wide>(x[0].size())),
           points(y.size(), std::vector<wide>(x[0].size()))};
  for (const auto& direction : theta) {
    const auto project = [&](const points& z, std::size_t copies) {
      std::vector<std::pair<wide, std::size_t>> all;
      for (std::size_t i = 0; i < z.size(); ++i) {
        wide sum = 0;
        for (std::size_t d = 0; d < direction.size(); ++d)
          sum += z[i][d] * direction[d];
        all.insert(all.end(), copies, {sum, i});
      }
      std::sort(all.begin(), all.end());
      return all;
    };
    const auto u = project(x, y.size()), v = project(y, x.size());
    const wide mass = 1 / wide(static_cast<double>(u.size() * theta.size()));
    for (std::size_t t = 0; t < u.size(); ++t) {
      const wide off = u[t].first - v[t].first, size = size_of(off);
      s.value += mass * (off == 0 ? wide(0) : pow(size, p));
      const wide steep = off == 0 ? wide(0) : wide(mass * p * pow(size, p) / off);
      for (std::size_t d = 0; d < direction.size(); ++d) {
        s.of_x[u[t].second][d] += steep * direction[d];
        s.of_y[v[t].second][d] -= steep * direction[d];
      }
    }
  }
  return s;
}

void set_golden(sample<double>& x, sample<double>& y) { // formula sheet 11
  for (std::size_t k = 0; k < 24; ++k) {
    const auto at = static_cast<double>(k);
    x.x[k] = std::sin(.7 * at + .3 + .15 * at * at);
    y.x[k] = std::cos(.9 * at + .1 + .15 * at * at);
  }
}
double norm(const std::vector<double>& g) {
  double squares = 0;
  for (const double x : g)
    squares += x * x;
  return std::sqrt(squares);
}

} // namespace

TEMPLATE_TEST_CASE("sinkhorn_divergence: value and gradient of the converged plan",
                   "[optimal_transport]", float, double) {
  using T = TestType;
  const wide epsilon = std::numeric_limits<T>::epsilon();
  error_judge of_values, of_slopes;
  for (const bool debiased : {true, false})
    for (const double strength : {2.0, 0.4}) {
      sample<T> x(3, 2, 1, 3), y(4, 2, 1, 4);
      const perdita::sinkhorn_divergence<T> loss(
          {.epsilon = strength, .tolerance = 0, .iterations = 300, .debiased = debiased});
      const T value = loss(x.view(), y.view(), x.gradient(), y.gradient());
      CHECK(loss(x.view(), y.view()) == value);
      points p = x.wide_points(), q = y.wide_points();
      const wide want = divergence(p, q, strength, debiased);
      CHECK(of_values.within(size_of(wide(value - want)), 8, epsilon * (1 + want)));
      const wide h = 1e-7;
      const auto judge = [&](sample<T>& s, points& w) {
        for (std::size_t i = 0; i < s.x.size(); i += 3) {
          wide& z = w[i / 2][i % 2];
          const wide at = z;
          const auto f = [&](int k) {
            z = at + k * h;
            return divergence(p, q, strength, debiased);
          };
          const wide slope = (8 * (f(1) - f(-1)) - (f(2) - f(-2))) / (12 * h);
          z = at;
          CHECK(of_slopes.within(size_of(wide(s.g[i] - slope)), 16, epsilon));
        }
      };
      judge(x, p);
      judge(y, q);
    }
  report_accuracy<T>(
      "sinkhorn_divergence", "", in_epsilons_absolute,
      {of_values.worst(), of_slopes.worst(), std::max(of_values.share(), of_slopes.share())});
}

TEST_CASE("sinkhorn_divergence: golden values, convergence", "[optimal_transport]") {
  sample<double> x(6, 4, 1, 1), y(6, 4, 1, 2);
  set_golden(x, y);
  using loss_type = perdita::sinkhorn_divergence<double>;
  perdita::sinkhorn_report report;
  const loss_type plain({.epsilon = 0.5, .tolerance = 1e-11, .debiased = false});
  CHECK(std::abs(plain(x.view(), y.view(), x.gradient(), y.gradient(), {}, &report) -
                 1.39597733296) < 1e-11);
  CHECK((std::abs(norm(x.g) - 0.448416972) < 2e-9 && std::abs(norm(y.g) - 0.421941663) < 2e-9));
  CHECK((report.error <= 1e-11 && report.iterations > 1 && report.iterations < 1000));
  const loss_type debiased({.epsilon = 0.5, .tolerance = 1e-11});
  CHECK(std::abs(debiased(x.view(), y.view(), x.gradient(), y.gradient()) - 0.634060893276) <
        1e-11);
  CHECK((std::abs(norm(x.g) - 0.434285664) < 2e-9 && std::abs(norm(y.g) - 0.39310419) < 2e-9));
  CHECK(std::abs(debiased(x.view(), x.view())) < 1e-14);
  // A value's error is the square of the marginals', the gradient's as they are.
  const double value = debiased(x.view(), y.view());
  auto g = x.g;
  const loss_type rough({.epsilon = 0.5, .tolerance = 1e-4});
  CHECK(std::abs(rough(x.view(), y.view(), x.gradient(), y.gradient(), {}, &report) - value) <
        1e-7);
  CHECK((report.error <= 1e-4 && report.error > 1e-11));
  double off = 0;
  for (std::size_t i = 0; i < g.size(); ++i)
    off = std::max(off, std::abs(g[i] - x.g[i]));
  CHECK(off < 1e-4);
  const loss_type cut({.epsilon = 0.01, .tolerance = 1e-12, .iterations = 2});
  cut(x.view(), y.view(), {}, &report);
  CHECK((report.iterations == 2 && report.error > 1e-12));
  // Far below the cost: e^{−C/ε} alone is 0 everywhere, and the plan that of an assignment.
  const loss_type sharp({.epsilon = 1e-4, .tolerance = 1e-3, .debiased = false});
  sample<double> a(2, 1, 1, 1), b(2, 1, 1, 2);
  a.x = {0, 1};
  b.x = {11, 10};
  CHECK(std::abs(sharp(a.view(), b.view(), a.gradient(), b.gradient()) - 50) < 1e-3);
  CHECK((std::abs(a.g[0] + 5) < 1e-2 && std::abs(b.g[0] - 5) < 1e-2));
}

TEMPLATE_TEST_CASE("sliced_wasserstein: value and gradient against the definition",
                   "[optimal_transport]", float, double) {
  using T = TestType;
  const wide epsilon = std::numeric_limits<T>::epsilon();
  error_judge of_values, of_slopes;
  for (const double p : {1.0, 2.0, 3.5})
    for (const index m : {7, 4, 1})
      for (const bool root : {true, false}) {
        sample<T> x(7, 3, 1, 3), y(m, 3, 1.5, 4), theta(10, 3, 1, 5);
        perdita::random_directions(7, theta.view());
        const perdita::sliced_wasserstein<T> loss({.p = p, .root = root});
        const T value = loss(x.view(), y.view(), theta.view(), x.gradient(), y.gradient());
        CHECK(loss(x.view(), y.view(), theta.view()) == value);
        const auto s = slice(x.wide_points(), y.wide_points(), theta.wide_points(), p);
        const wide want = root ? pow(s.value, wide(1 / wide(p))) : s.value;
        const wide factor = root ? wide(want / s.value / p) : wide(1);
        CHECK(of_values.within(size_of(wide(value - want)), 8, epsilon * want));
        const auto judge = [&](const sample<T>& z, const points& slopes) {
          wide largest = 0;
          for (const auto& row : slopes)
            for (const wide& g : row)
              largest = larger(largest, size_of(wide(factor * g)));
          for (std::size_t i = 0; i < z.g.size(); ++i)
            CHECK(of_slopes.within(size_of(wide(z.g[i] - factor * slopes[i / 3][i % 3])), 8,
                                   epsilon * largest));
        };
        judge(x, s.of_x);
        judge(y, s.of_y);
      }
  report_accuracy<T>(
      "sliced_wasserstein", "", in_epsilons_of_terms,
      {of_values.worst(), of_slopes.worst(), std::max(of_values.share(), of_slopes.share())});
}

TEST_CASE("sliced_wasserstein: golden values, derivative, shifts", "[optimal_transport]") {
  sample<double> x(6, 4, 1, 1), y(6, 4, 1, 2);
  set_golden(x, y);
  std::vector<double> axes(16);
  for (std::size_t d = 0; d < 4; ++d)
    axes[5 * d] = 1;
  const matrix_view<double> theta(axes.data(), 4, 4);
  const perdita::sliced_wasserstein<double> squared({.root = false}), loss;
  CHECK(std::abs(squared(x.view(), y.view(), theta, x.gradient(), y.gradient()) - 0.224251654721) <
        1e-12);
  CHECK((std::abs(norm(x.g) - 0.193326863) < 1e-9 && std::abs(norm(y.g) - 0.193326863) < 1e-9));
  loss(x.view(), y.view(), theta, x.gradient(), y.gradient());
  const auto report = perdita::testing::check_gradient(
      [&] { return loss(x.view(), y.view(), theta); }, x.x, x.g, {.step = 1e-3});
  INFO(report.message());
  CHECK(report.ok);
  // Equal samples: 0, and no slope; a shift is its own distance
  CHECK(loss(x.view(), x.view(), theta, x.gradient(), y.gradient()) == 0);
  CHECK((norm(x.g) == 0 && norm(y.g) == 0));
  y.x = x.x;
  for (std::size_t i = 0; i < 24; i += 4)
    y.x[i] += 0.5;
  const matrix_view<double> first(axes.data(), 1, 4);
  CHECK(std::abs(loss(x.view(), y.view(), first) - 0.5) < 1e-15);
}

TEST_CASE("random_directions: unit length, no preferred direction", "[optimal_transport]") {
  std::vector<double> theta(3000), more(6000);
  perdita::random_directions(5, matrix_view<double>(theta.data(), 1000, 3));
  perdita::random_directions(5, matrix_view<double>(more.data(), 2000, 3));
  CHECK(std::equal(theta.begin(), theta.end(), more.begin()));
  double moments[9] = {}, means[3] = {};
  for (std::size_t l = 0; l < 1000; ++l) {
    double squares = 0;
    for (std::size_t d = 0; d < 3; ++d) {
      squares += theta[3 * l + d] * theta[3 * l + d];
      means[d] += theta[3 * l + d] / 1000;
      for (std::size_t e = 0; e < 3; ++e)
        moments[3 * d + e] += theta[3 * l + d] * theta[3 * l + e] / 1000;
    }
    REQUIRE(std::abs(squares - 1) < 1e-15);
  }
  for (std::size_t d = 0; d < 3; ++d)
    CHECK(std::abs(means[d]) < 0.08); // 4 deviations
  for (std::size_t d = 0; d < 9; ++d)
    CHECK(std::abs(moments[d] - (d % 4 == 0 ? 1.0 / 3 : 0)) < 0.05);
  perdita::random_directions(6, matrix_view<double>(theta.data(), 1000, 3));
  CHECK_FALSE(std::equal(theta.begin(), theta.end(), more.begin()));
}

TEST_CASE("optimal transport: NaN, threads, added, refused", "[optimal_transport][threads]") {
  using Catch::Matchers::ContainsSubstring;
  sample<float> x(90, 3, 1, 6), y(70, 3, 1, 7), v = x, w = y, theta(20, 3, 1, 8);
  perdita::random_directions(3, theta.view());
  const threads_executor pool(3, task_order::shuffled);
  const perdita::sinkhorn_divergence<float> sinkhorn({.epsilon = 0.5});
  const perdita::sliced_wasserstein<float> sliced_loss;
  const auto check = [&](const auto& run) {
    const float value = run(x, y, {.run_on = perdita::serial});
    CHECK(run(v, w, {.run_on = pool}) == value);
    CHECK((x.g == v.g && y.g == w.g));
    run(v, w, {.scale = 2, .accumulate = true});
    for (std::size_t i = 0; i < v.g.size(); ++i)
      REQUIRE(std::abs(v.g[i] - 3 * x.g[i]) <= 4e-7f * std::abs(x.g[i]));
  };
  using sample_type = sample<float>;
  using call_type = perdita::call_options<float>;
  check([&](sample_type& a, sample_type& b, const call_type& call) {
    return sinkhorn(a.view(), b.view(), a.gradient(), b.gradient(), call);
  });
  check([&](sample_type& a, sample_type& b, const call_type& call) {
    return sliced_loss(a.view(), b.view(), theta.view(), a.gradient(), b.gradient(), call);
  });
  CHECK_THROWS_WITH(perdita::sinkhorn_divergence<float>({.epsilon = 0}),
                    ContainsSubstring("epsilon is 0"));
  CHECK_THROWS_WITH(perdita::sinkhorn_divergence<float>({.tolerance = -1}),
                    ContainsSubstring("tolerance is -1"));
  CHECK_THROWS_WITH(perdita::sinkhorn_divergence<float>({.iterations = 0}),
                    ContainsSubstring("iterations is 0"));
  CHECK_THROWS_WITH(perdita::sliced_wasserstein<float>({.p = 0.5f}), ContainsSubstring("p is 0.5"));
  const auto before = x.g;
  CHECK_THROWS_WITH(sliced_loss(x.view(), y.view(), matrix_view<float>(theta.x.data(), 20, 2),
                                x.gradient(), y.gradient()),
                    ContainsSubstring("columns of the directions is 2"));
  CHECK_THROWS_WITH(sliced_loss(x.view(), y.view(), matrix_view<float>(x.g.data(), 20, 3),
                                x.gradient(), y.gradient()),
                    ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(sinkhorn(x.view(), y.view(), x.gradient(), x.gradient()),
                    ContainsSubstring("gradient rows is 90"));
  CHECK(x.g == before);
  x.x[5] = std::nanf("");
  perdita::sinkhorn_report report;
  CHECK(std::isnan(sinkhorn(x.view(), y.view(), {}, &report)));
  CHECK(std::isnan(report.error));
  CHECK(std::isnan(sliced_loss(x.view(), y.view(), theta.view(), x.gradient(), y.gradient())));
}

TEST_CASE("sliced_wasserstein, sinkhorn_divergence: a point at infinity", "[optimal_transport]") {
  const double inf = std::numeric_limits<double>::infinity();
  for (const double at : {inf, -inf}) {
    sample<double> x(3, 2, 1, 3), y(4, 2, 1, 4), theta(5, 2, 1, 5);
    x.x[2] = at;
    for (const bool root : {true, false}) {
      const perdita::sliced_wasserstein<double> loss({.root = root});
      CHECK(std::isnan(loss(x.view(), y.view(), theta.view(), x.gradient(), y.gradient())));
      CHECK((std::isnan(x.g[2]) && std::isnan(y.g[0])));
      CHECK(std::isnan(loss(y.view(), x.view(), theta.view())));
    }
    CHECK(
        std::isnan(perdita::sinkhorn_divergence<double>({.debiased = false})(x.view(), y.view())));
  }
}

TEST_CASE("sliced_wasserstein: a number added to all points changes nothing",
          "[optimal_transport]") {
  for (const double far : {0x1p40, -0x1p44})
    for (const double p : {1.0, 2.0, 3.0}) {
      sample<double> x(5, 2, 64, 3), y(7, 2, 64, 4), theta(5, 2, 1, 5);
      for (sample<double>* s : {&x, &y})
        for (double& z : s->x)
          z = std::floor(z);
      sample<double> far_x = x, far_y = y;
      for (sample<double>* s : {&far_x, &far_y})
        for (double& z : s->x)
          z += far;
      const perdita::sliced_wasserstein<double> loss({.p = p});
      const double value = loss(x.view(), y.view(), theta.view(), x.gradient(), y.gradient());
      const double moved =
          loss(far_x.view(), far_y.view(), theta.view(), far_x.gradient(), far_y.gradient());
      CHECK(std::abs(moved - value) < 1e-13 * value);
      for (std::size_t i = 0; i < x.g.size(); ++i)
        CHECK(std::abs(far_x.g[i] - x.g[i]) < 1e-13);
      for (std::size_t i = 0; i < y.g.size(); ++i)
        CHECK(std::abs(far_y.g[i] - y.g[i]) < 1e-13);
    }
}

TEST_CASE("sliced_wasserstein: powers below and above all numbers", "[optimal_transport]") {
  const auto check = [](double p, double by) {
    sample<double> x(3, 2, 1, 3), y(4, 2, 1, 4), theta(5, 2, 1, 5), small_x = x, small_y = y;
    for (double& z : small_x.x)
      z *= by;
    for (double& z : small_y.x)
      z *= by;
    const perdita::sliced_wasserstein<double> loss({.p = p});
    const double value = loss(x.view(), y.view(), theta.view(), x.gradient(), y.gradient());
    const double scaled =
        loss(small_x.view(), small_y.view(), theta.view(), small_x.gradient(), small_y.gradient());
    CHECK(std::abs(scaled / by - value) < 1e-12 * value);
    for (std::size_t i = 0; i < x.g.size(); ++i)
      CHECK(std::abs(small_x.g[i] - x.g[i]) < 1e-11 * p); // which is the root's, of the same scale
    for (std::size_t i = 0; i < y.g.size(); ++i)
      CHECK(std::abs(small_y.g[i] - y.g[i]) < 1e-11 * p);
  };
  check(100, 1e-4);
  check(100, 1e4);
  check(2, 1e-170);
  check(2, 1e170);
  check(1, 1e-290);
  std::vector<double> x{0x1p-10}, y{0}, theta{1}, g(1), h(1);
  const auto one = [](std::vector<double>& v) { return matrix_view<double>(v.data(), 1, 1); };
  const perdita::sliced_wasserstein<double> power({.p = 100, .root = false});
  CHECK(power(one(x), one(y), one(theta), one(g), one(h)) == 0x1p-1000);
  CHECK((g[0] == 100 * 0x1p-990 && h[0] == -g[0]));
}

} // namespace perdita_tests
