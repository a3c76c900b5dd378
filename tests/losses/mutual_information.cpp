// SPDX-License-Identifier: MIT

// Estimates of mutual information from a critic's scores: formula sheet of contrastive losses, 7.

#include <perdita/mutual_information.hpp>

#include <cmath>
#include <cstddef>
#include <limits>
#include <utility>
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

constexpr double inf = std::numeric_limits<double>::infinity();
enum class kind { dv, nwj, tuba, js, nce, smile };

template <class T> std::vector<T> draw(std::size_t n, double spread, std::uint64_t seed) {
  random_numbers random(seed);
  std::vector<T> x;
  for (std::size_t i = 0; i < n; ++i)
    x.push_back(static_cast<T>(spread * random.normal()));
  return x;
}

/// Value, gradients of joint and product scores (row by row), and sizes of the terms.
struct expectation {
  wide value = 0, size = 1;
  std::vector<wide> joint, product;
};

wide clip(const wide& x, double limit) { return smaller(larger(x, -limit), limit); }

/// Term by term, of scores that lie apart.
expectation expect(kind k, const std::vector<wide>& joint, const std::vector<wide>& product,
                   double limit = inf) {
  expectation e;
  const wide n = static_cast<double>(joint.size()), m = static_cast<double>(product.size());
  for (const wide& s : joint) {
    e.value += (k == kind::js ? softplus(-s) : wide(-s)) / n;
    e.size += size_of(s) / n;
    e.joint.push_back(-(k == kind::js || k == kind::smile ? logistic(-s) : wide(1)) / n);
  }
  wide sum = 0;
  for (const wide& t : product)
    sum += k == kind::nwj ? exp(wide(t - 1)) : k == kind::js ? softplus(t) : exp(clip(t, limit));
  const wide part = k == kind::nwj || k == kind::js ? wide(sum / m) : log(wide(sum / m));
  e.value += part;
  e.size += size_of(part);
  for (const wide& t : product)
    e.product.push_back(k == kind::nwj  ? wide(exp(wide(t - 1)) / m)
                        : k == kind::dv ? wide(exp(t) / sum)
                                        : wide(logistic(t) / m));
  return e;
}

template <class T> std::vector<wide> widened(const std::vector<T>& x) {
  return {x.begin(), x.end()};
}
template <class T> matrix_view<T> square(std::vector<T>& x, index n) { return {x.data(), n, n}; }

template <class T>
void split(const std::vector<T>& s, index n, std::vector<wide>& joint, std::vector<wide>& product) {
  for (index i = 0; i < n; ++i)
    for (index j = 0; j < n; ++j)
      (i == j ? joint : product).push_back(s[static_cast<std::size_t>(i * n + j)]);
}

template <class T, class Loss>
void check_against_formula(const Loss& loss, kind k, const char* name, double limit = inf) {
  const wide epsilon = std::numeric_limits<T>::epsilon();
  error_judge of_values, of_slopes;
  // e^x has the rounding error of x for its relative one
  const auto unit = [&](const wide& slope) {
    return wide(epsilon * size_of(slope) * (1 + size_of(log(size_of(slope))) / 16) + wide(1e-37));
  };
  for (const index n : {2, 5, 33})
    for (const double spread : {0.01, 2.0, 30.0}) {
      if (k == kind::nwj && spread > 2)
        continue;
      auto s = draw<T>(static_cast<std::size_t>(n * n), spread, static_cast<std::uint64_t>(n));
      std::vector<wide> joint, product;
      split(s, n, joint, product);
      const auto e = expect(k, joint, product, limit);
      std::vector<T> g(s.size(), 7);
      const T value = loss(square(s, n), square(g, n));
      CHECK(loss(square(s, n)) == value);
      CHECK(of_values.within(size_of(wide(value - e.value)), 3, epsilon * e.size));
      std::size_t at = 0;
      for (index i = 0; i < n; ++i)
        for (index j = 0; j < n; ++j) {
          const wide want = i == j ? e.joint[static_cast<std::size_t>(i)] : e.product[at++];
          const wide off = size_of(wide(g[static_cast<std::size_t>(i * n + j)] - want));
          CHECK(of_slopes.within(off, 4, unit(want)));
        }
      // The same of vectors, the product samples in another order of summation
      std::vector<T> a, b, da(joint.size(), 7), db(product.size(), 7);
      for (const wide& x : joint)
        a.push_back(static_cast<T>(x));
      for (const wide& x : product)
        b.push_back(static_cast<T>(x));
      const T apart = loss(a, b, da, db);
      CHECK(loss(a, b) == apart);
      CHECK(of_values.within(size_of(wide(apart - e.value)), 3, epsilon * e.size));
      for (std::size_t i = 0; i < a.size(); ++i)
        CHECK(of_slopes.within(size_of(wide(da[i] - e.joint[i])), 4, unit(e.joint[i])));
      for (std::size_t i = 0; i < b.size(); ++i)
        CHECK(of_slopes.within(size_of(wide(db[i] - e.product[i])), 4, unit(e.product[i])));
    }
  report_accuracy<T>(
      name, "", in_epsilons_of_terms,
      {of_values.worst(), of_slopes.worst(), std::max(of_values.share(), of_slopes.share())});
}

/// Formula sheet 11.
std::vector<double> golden_scores() {
  std::vector<double> s;
  for (int k = 0; k < 36; ++k)
    s.push_back(std::sin(.5 * k + .4 + .15 * k * k));
  return s;
}
double norm(const std::vector<double>& g) {
  double squares = 0;
  for (const double x : g)
    squares += x * x;
  return std::sqrt(squares);
}
template <class Loss> void check_golden(const Loss& loss, double value, double length) {
  auto s = golden_scores(), g = s;
  CHECK(std::abs(loss(square(s, 6), square(g, 6)) - value) < 1e-11);
  CHECK(std::abs(norm(g) - length) < 2e-9);
  auto before = s;
  CHECK(loss(square(s, 6), square(s, 6)) == loss(square(before, 6))); // in place
  CHECK(s == g);
}
template <class Loss> void check_derivative(const Loss& loss) {
  auto s = draw<double>(49, 1, 4), g = s;
  loss(square(s, 7), square(g, 7));
  const auto report = perdita::testing::check_gradient([&] { return loss(square(s, 7)); }, s, g);
  INFO(report.message());
  CHECK(report.ok);
}

} // namespace

TEMPLATE_TEST_CASE("critic losses: value and gradient against the formulas", "[mutual_information]",
                   float, double) {
  using T = TestType;
  check_against_formula<T>(perdita::donsker_varadhan<T>(), kind::dv, "donsker_varadhan");
  check_against_formula<T>(perdita::nwj<T>(), kind::nwj, "nwj");
  check_against_formula<T>(perdita::jensen_shannon_information<T>(), kind::js,
                           "jensen_shannon_information");
  check_against_formula<T>(perdita::smile_bound<T>({.limit = 1.5}), kind::smile, "smile_bound",
                           1.5);
}

TEST_CASE("critic losses: golden values, derivatives", "[mutual_information]") {
  check_golden(perdita::donsker_varadhan<double>(), 0.380743277497, 0.458951423);
  check_golden(perdita::nwj<double>(), 0.52006570802, 0.424837295);
  check_golden(perdita::info_nce_bound<double>(), 0.331177295517, 0.394834569);
  check_golden(perdita::jensen_shannon_information<double>(), 1.59615666875, 0.235505281);
  check_derivative(perdita::donsker_varadhan<double>());
  check_derivative(perdita::nwj<double>());
  check_derivative(perdita::info_nce_bound<double>());
  check_derivative(perdita::jensen_shannon_information<double>());
  auto s = golden_scores();
  std::vector<double> g(36), h(36);
  CHECK(perdita::smile_bound<double>({.limit = inf})(square(s, 6), square(g, 6)) ==
        perdita::donsker_varadhan<double>()(square(s, 6)));
  perdita::jensen_shannon_information<double>()(square(s, 6), square(h, 6));
  CHECK(g == h);
}

TEMPLATE_TEST_CASE("info_nce_bound: value and gradient", "[mutual_information]", float, double) {
  using T = TestType;
  const wide epsilon = std::numeric_limits<T>::epsilon();
  error_judge of_values, of_slopes;
  for (const index n : {1, 4, 19}) {
    auto s = draw<T>(static_cast<std::size_t>(n * n), 3, 8), g = s;
    const T value = perdita::info_nce_bound<T>()(square(s, n), square(g, n));
    const wide k = static_cast<double>(n);
    wide want = 0, size = 1;
    for (index i = 0; i < n; ++i) {
      const auto* row = s.data() + i * n;
      const std::vector<wide> x(row, row + n);
      const wide lse = log_sum_exp(x, [](std::size_t) { return true; });
      want += (lse - x[static_cast<std::size_t>(i)]) / k;
      size += (size_of(lse) + size_of(x[static_cast<std::size_t>(i)])) / k;
      for (index j = 0; j < n; ++j) {
        const wide p = exp(wide(x[static_cast<std::size_t>(j)] - lse));
        const wide slope = (p - (i == j ? 1 : 0)) / k;
        CHECK(of_slopes.within(size_of(wide(g[static_cast<std::size_t>(i * n + j)] - slope)), 16,
                               epsilon * size_of(slope)));
      }
    }
    CHECK(of_values.within(size_of(wide(value - (want - log(k)))), 2, epsilon * size));
  }
  report_accuracy<T>(
      "info_nce_bound", "", in_epsilons_of_terms,
      {of_values.worst(), of_slopes.worst(), std::max(of_values.share(), of_slopes.share())});
}

TEMPLATE_TEST_CASE("tuba, interpolated_bound: against the formula", "[mutual_information]", float,
                   double) {
  using T = TestType;
  const wide epsilon = std::numeric_limits<T>::epsilon();
  for (const double alpha : {-1.0, 0.0, 0.3, 1.0}) { // below 0: tuba
    error_judge of_values, of_slopes;
    for (const index n : {2, 3, 6})
      for (const double spread : {0.1, 3.0, 12.0}) {
        auto s = draw<T>(static_cast<std::size_t>(n * n), spread, 3), g = s;
        auto a = draw<T>(static_cast<std::size_t>(n), 1, 5), d = a;
        if (alpha <= 0 && spread > 3)
          continue;
        T value;
        if (alpha < 0)
          value = perdita::tuba<T>()(square(s, n), a, square(g, n), d);
        else
          value =
              perdita::interpolated_bound<T>({.alpha = alpha})(square(s, n), a, square(g, n), d);
        const double share = alpha < 0 ? 0 : alpha;
        const auto bound = [&](const std::vector<wide>& x, const std::vector<wide>& base,
                               wide& size) {
          wide sum = 0;
          size = 1;
          const auto at = [&](index i, index j) { return x[static_cast<std::size_t>(i * n + j)]; };
          const wide m = static_cast<double>(n * (n - 1));
          const auto b = [&](index i, index j) {
            wide mean = 0;
            for (index k = 0; k < n; ++k)
              if (k != j)
                mean += exp(at(i, k)) / static_cast<double>(n - 1);
            return log(wide(share * mean + (1 - share) * exp(base[static_cast<std::size_t>(i)])));
          };
          for (index i = 0; i < n; ++i)
            for (index j = 0; j < n; ++j)
              if (i != j) {
                const wide e = exp(wide(at(i, j) - b(i, i))), c = b(i, j);
                sum += (e - at(i, i) + c) / m;
                size += (e * (1 + size_of(at(i, j))) + size_of(at(i, i)) + size_of(c)) / m;
              }
          return wide(sum - 1);
        };
        auto x = widened(s);
        auto base = widened(a);
        wide size = 0, unused = 0;
        const wide want = bound(x, base, size);
        CHECK(of_values.within(size_of(wide(value - want)), 4, epsilon * size));
        const wide h = 1e-9; // fourth order: off by 1e-25 of the size of the fifth derivative
        const auto derivative = [&](wide& z) {
          const wide at = z;
          const auto f = [&](int k) {
            z = at + k * h;
            return bound(x, base, unused);
          };
          const wide slope = (8 * (f(1) - f(-1)) - (f(2) - f(-2))) / (12 * h);
          z = at;
          return slope;
        };
        for (std::size_t i = 0; i < x.size(); ++i)
          CHECK(of_slopes.within(size_of(wide(g[i] - derivative(x[i]))), 8, epsilon * size));
        for (std::size_t i = 0; i < base.size(); ++i)
          CHECK(of_slopes.within(size_of(wide(d[i] - derivative(base[i]))), 8, epsilon * size));
      }
    report_accuracy<T>(
        alpha < 0 ? "tuba" : "interpolated_bound", "", in_epsilons_of_terms,
        {of_values.worst(), of_slopes.worst(), std::max(of_values.share(), of_slopes.share())});
  }
}

TEST_CASE("tuba, interpolated_bound: what they become", "[mutual_information]") {
  auto s = draw<double>(36, 2, 11), g = s, h = s;
  std::vector<double> a(6, 1), d(6);
  const double of_nwj = perdita::nwj<double>()(square(s, 6), square(g, 6));
  CHECK(std::abs(perdita::tuba<double>()(square(s, 6), a, square(h, 6), d) - of_nwj) < 1e-12);
  for (std::size_t i = 0; i < 36; ++i)
    CHECK(std::abs(g[i] - h[i]) <= 1e-15 * std::abs(g[i]));
  double mean = 0;
  for (std::size_t i = 0; i < 36; ++i)
    mean += i % 7 == 0 ? 0 : std::exp(s[i]) / 30;
  a.assign(6, std::log(mean));
  CHECK(std::abs(perdita::tuba<double>()(square(s, 6), a) -
                 perdita::donsker_varadhan<double>()(square(s, 6))) < 1e-13);
  // One score far above all others of its row, product or joint: no digits lost
  for (const std::size_t far : {std::size_t(2), std::size_t(0)}) {
    s[far] += 60;
    const perdita::interpolated_bound<double> loss({.alpha = 0.5});
    loss(square(s, 6), a, square(g, 6), d);
    const auto report =
        perdita::testing::check_gradient([&] { return loss(square(s, 6), a); }, s, g);
    INFO(report.message());
    CHECK(report.ok);
    s[far] -= 60;
  }
}

TEST_CASE("mine: the average, its gradient", "[mutual_information]") {
  auto s = draw<double>(25, 1, 7), g = s, h = s;
  const auto mean = [](const std::vector<double>& x) {
    double sum = 0;
    for (std::size_t i = 0; i < 25; ++i)
      sum += i % 6 == 0 ? 0 : std::exp(x[i]);
    return sum / 20;
  };
  const perdita::mine<double> loss({.rate = 0.25, .floor = 0.125});
  perdita::mine_average average;
  const double value = loss(square(s, 5), average, square(g, 5));
  CHECK(value == perdita::donsker_varadhan<double>()(square(s, 5)));
  CHECK(loss(square(s, 5)) == value);
  CHECK(average.started);
  CHECK(std::abs(std::exp(average.log) - mean(s)) < 1e-14 * mean(s));
  auto next = draw<double>(25, 2, 8);
  const double expected = 0.25 * mean(next) + 0.75 * mean(s);
  loss(square(next, 5), average, square(h, 5));
  CHECK(std::abs(std::exp(average.log) - expected) < 1e-14 * expected);
  for (std::size_t i = 0; i < 25; ++i) {
    const double slope = i % 6 == 0 ? -0.2 : std::exp(next[i]) / (20 * (expected + 0.125));
    CHECK(std::abs(h[i] - slope) < 4e-15 * std::abs(slope));
  }
  // Without a floor, the first batch has the gradient of donsker_varadhan, at any level.
  for (double& x : s)
    x += 5000;
  perdita::mine_average fresh;
  perdita::mine<double>({.floor = 0})(square(s, 5), fresh, square(g, 5));
  perdita::donsker_varadhan<double>()(square(s, 5), square(h, 5));
  for (std::size_t i = 0; i < 25; ++i)
    CHECK(std::abs(g[i] - h[i]) < 1e-11 * std::abs(h[i]));
  // A lost batch moves nothing; vectors
  const double before = fresh.log;
  std::vector<double> joint{1, 2}, product{std::nan(""), 5000}, dj(2), dp(2);
  CHECK(std::isnan(perdita::mine<double>()(joint, product, fresh, dj, dp)));
  CHECK(fresh.log == before);
  CHECK((dj[0] == -0.5 && std::isnan(dp[0]) && std::isfinite(dp[1])));
}

TEST_CASE("donsker_varadhan, mine: a number added to all scores changes nothing",
          "[mutual_information]") {
  random_numbers random(4);
  std::vector<double> s(16), raised;
  for (double& x : s)
    x = std::floor(4 * random.normal());
  for (const double x : s)
    raised.push_back(x + 0x1p48);
  const perdita::matrix_view<const double> scores(s.data(), 4, 4), above(raised.data(), 4, 4);
  const perdita::donsker_varadhan<double> dv;
  CHECK(dv(above) == dv(scores));
  const perdita::mine<double> mine;
  CHECK(mine(above) == mine(scores));
}

TEST_CASE("interpolated_bound: a number added to a row and its baseline changes nothing",
          "[mutual_information]") {
  random_numbers random(5);
  for (const double far : {0x1p40, -0x1p48}) {
    std::vector<double> s(16), g(16), h(16), a(4), d(4), e(4);
    for (double& x : s)
      x = std::floor(4 * random.normal());
    for (double& x : a)
      x = std::floor(4 * random.normal());
    std::vector<double> raised = s, raised_a = a;
    for (std::size_t i = 0; i < 16; ++i)
      raised[i] += far * static_cast<double>(1 + i / 4);
    for (std::size_t i = 0; i < 4; ++i)
      raised_a[i] += far * static_cast<double>(1 + i);
    for (const double alpha : {0.0, 0.5, 1.0}) {
      const perdita::interpolated_bound<double> loss({.alpha = alpha});
      CHECK(loss(square(raised, 4), raised_a, square(h, 4), e) ==
            loss(square(s, 4), a, square(g, 4), d));
      CHECK((h == g && e == d));
    }
  }
  // Scores whose differences no number holds: log α + log (e^0 + …) of a lone product score is 0.
  std::vector<double> s{1e308, -1e308, -1e308, 1e308}, a(2);
  const double value = perdita::interpolated_bound<double>({.alpha = 1})(square(s, 2), a);
  CHECK(std::abs(value) < 1e-15);
}

TEST_CASE("critic losses: special scores", "[mutual_information]") {
  std::vector<double> joint{1, 2}, product{-inf, 0, 1}, dj(2), dp(3);
  const perdita::donsker_varadhan<double> dv;
  const double p = std::exp(1.0) / (1 + std::exp(1.0));
  CHECK(std::abs(dv(joint, product, dj, dp) - (std::log((1 + std::exp(1.0)) / 3) - 1.5)) < 1e-15);
  CHECK((dp[0] == 0 && std::abs(dp[2] - p) < 1e-15));
  product = {-inf, -inf, -inf};
  CHECK(dv(joint, product, dj, dp) == -inf);
  CHECK((dp == std::vector<double>{0, 0, 0} && dj[0] == -0.5));
  product = {inf, 0, -inf};
  CHECK(dv(joint, product, dj, dp) == inf);
  CHECK((std::isnan(dp[0]) && dp[1] == 0));
  CHECK(perdita::nwj<double>()(joint, product, dj, dp) == inf);
  CHECK((dp[0] == inf && dp[2] == 0));
  CHECK(perdita::jensen_shannon_information<double>()(joint, product, dj, dp) == inf);
  CHECK((dp[0] == 1.0 / 3 && dp[2] == 0));
  CHECK(std::isfinite(perdita::smile_bound<double>()(joint, product)));
  product = {std::nan(""), 0, inf};
  CHECK(std::isnan(dv(joint, product)));
  CHECK(std::isnan(perdita::smile_bound<double>()(joint, product)));
  CHECK(std::isnan(perdita::nwj<double>()(joint, product, dj, dp)));
  CHECK((std::isnan(dp[0]) && std::abs(dp[1] - std::exp(-1.0) / 3) < 1e-16));
  joint[0] = -inf;
  product = {800, 801, 802}; // no overflow
  CHECK(dv(joint, product) == inf);
  joint[0] = 1;
  CHECK(std::isfinite(dv(joint, product)));
  std::vector<double> s(9, 0.5), g(9), a(3, 0), d(3);
  s[1] = std::nan("");
  CHECK(std::isnan(perdita::interpolated_bound<double>()(square(s, 3), a, square(g, 3), d)));
  CHECK((std::isnan(g[0]) && std::isnan(d[0]) && std::isfinite(g[3]) && std::isfinite(d[1])));
  CHECK(std::isnan(perdita::info_nce_bound<double>()(square(s, 3), square(g, 3))));
  CHECK((std::isnan(g[2]) && std::isfinite(g[3])));
  CHECK(std::isnan(perdita::tuba<double>()(square(s, 3), a, square(g, 3), d)));
}

TEST_CASE("critic losses: threads, strides, added", "[mutual_information][threads]") {
  auto s = draw<float>(70 * 70, 2, 12), g = s, h = s;
  auto product = draw<float>(5000, 2, 13), joint = draw<float>(300, 2, 14);
  std::vector<float> dj(300), dp(5000), ej(300), ep(5000);
  const auto check = [&](const auto& loss) {
    const threads_executor pool(3, task_order::shuffled);
    const float value = loss(square(s, 70), square(g, 70), {.run_on = perdita::serial});
    CHECK(loss(square(s, 70), square(h, 70), {.run_on = pool}) == value);
    CHECK(g == h);
    const float apart = loss(joint, product, dj, dp, {.run_on = perdita::serial});
    CHECK(loss(joint, product, ej, ep, {.run_on = pool}) == apart);
    CHECK((dj == ej && dp == ep));
    loss(joint, product, ej, ep, {.scale = 0.5f, .accumulate = true});
    for (std::size_t i = 0; i < ep.size(); ++i)
      REQUIRE(std::abs(ep[i] - 1.5f * dp[i]) <= 2e-7f * std::abs(dp[i]));
    for (std::size_t i = 0; i < ej.size(); ++i)
      REQUIRE(std::abs(ej[i] - 1.5f * dj[i]) <= 2e-7f * std::abs(dj[i]));
    // By columns: the transposed matrix has the same scores on and off the diagonal
    std::vector<float> transposed(s.size()), to(s.size());
    for (std::size_t i = 0; i < 70; ++i)
      for (std::size_t j = 0; j < 70; ++j)
        transposed[j * 70 + i] = s[i * 70 + j];
    CHECK(loss(matrix_view<float>(transposed.data(), 70, 70, 1, 70),
               matrix_view<float>(to.data(), 70, 70, 1, 70)) == value);
    for (std::size_t i = 0; i < 70; ++i)
      for (std::size_t j = 0; j < 70; ++j)
        REQUIRE(to[j * 70 + i] == g[i * 70 + j]);
  };
  check(perdita::donsker_varadhan<float>());
  check(perdita::nwj<float>());
  check(perdita::jensen_shannon_information<float>());
  check(perdita::smile_bound<float>());
}

TEST_CASE("critic losses: what is refused", "[mutual_information]") {
  using Catch::Matchers::ContainsSubstring;
  std::vector<double> s(9, 1), g(9, 5), a(3, 1), d(3, 5), two(2, 1);
  const perdita::donsker_varadhan<double> dv;
  const perdita::tuba<double> tuba;
  CHECK_THROWS_WITH(dv(matrix_view<double>(s.data(), 2, 3)), ContainsSubstring("columns of the"));
  CHECK_THROWS_WITH(dv(matrix_view<double>(s.data(), 1, 1)), ContainsSubstring("is 1, expected"));
  CHECK_THROWS_WITH(dv(square(s, 3), matrix_view<double>(g.data(), 3, 2)),
                    ContainsSubstring("gradient columns is 2"));
  CHECK_THROWS_WITH(dv(square(s, 3), square(s, 3), {.accumulate = true}),
                    ContainsSubstring("accumulate"));
  CHECK_THROWS_WITH(dv(square(s, 3), square(g, 3), {.row_weights = a}),
                    ContainsSubstring("row_weights"));
  CHECK_THROWS_WITH(dv(a, s, d, d), ContainsSubstring("gradient of the product scores is 3"));
  CHECK_THROWS_WITH(dv(a, s, a, g), ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(dv(std::vector<double>(), s), ContainsSubstring("joint scores is 0"));
  CHECK_THROWS_WITH(dv(a, std::vector<double>()), ContainsSubstring("product scores is 0"));
  CHECK_THROWS_WITH(tuba(square(s, 3), two, square(g, 3), d), ContainsSubstring("baselines is 2"));
  CHECK_THROWS_WITH(tuba(square(s, 3), a, square(g, 3), two), ContainsSubstring("is 2"));
  CHECK_THROWS_WITH(tuba(square(s, 3), a, square(g, 3), a), ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(tuba(square(s, 3), std::span(g).first(3), square(g, 3), d),
                    ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(perdita::smile_bound<double>({.limit = 0}), ContainsSubstring("limit is 0"));
  CHECK_THROWS_WITH(perdita::mine<double>({.rate = 0}), ContainsSubstring("rate is 0"));
  CHECK_THROWS_WITH(perdita::mine<double>({.floor = -1}), ContainsSubstring("floor is -1"));
  CHECK_THROWS_WITH(perdita::interpolated_bound<double>({.alpha = 2}),
                    ContainsSubstring("alpha is 2"));
  CHECK(g == std::vector<double>(9, 5));
  CHECK(d == std::vector<double>(3, 5));
}

TEST_CASE("tuba, interpolated_bound: scaled, added, on any threads",
          "[mutual_information][threads]") {
  auto s = draw<double>(900, 1, 12), a = draw<double>(30, 1, 13);
  const auto check = [&](const auto& loss) {
    std::vector<double> g(900), d(30), h(900), e(30);
    const double value = loss(square(s, 30), a, square(g, 30), d, {.run_on = perdita::serial});
    const threads_executor pool(3, task_order::shuffled);
    CHECK(loss(square(s, 30), a, square(h, 30), e, {.run_on = pool}) == value);
    CHECK((h == g && e == d));
    loss(square(s, 30), a, square(h, 30), e, {.scale = 2, .accumulate = true});
    for (std::size_t i = 0; i < 900; ++i)
      REQUIRE(std::abs(h[i] - 3 * g[i]) <= 1e-14 * std::abs(g[i]));
    for (std::size_t i = 0; i < 30; ++i)
      REQUIRE(std::abs(e[i] - 3 * d[i]) <= 1e-13);
  };
  check(perdita::tuba<double>());
  check(perdita::interpolated_bound<double>({.alpha = 0.25}));
}

} // namespace perdita_tests
