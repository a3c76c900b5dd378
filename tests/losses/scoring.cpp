// SPDX-License-Identifier: MIT

// Levels of quality: soft targets and comparisons. Formula sheet 13.

#include <perdita/scoring.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include <perdita/testing/gradient_check.hpp>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/normaliser.hpp"
#include "support/numbers.hpp"
#include "support/softmax_reference.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

using perdita::level_mass;
using perdita::matrix_view;
constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

wide normal_density(const wide& x) {
  const wide two_pi = wide(6.283185307179586) + wide(2.4492935982947064e-16);
  return exp(wide(-x * x / 2)) / sqrt(two_pi);
}
/// Φ, by its series in the middle and a continued fraction in the tails.
wide normal_probability(const wide& x) {
  if (size_of(x) < 4) {
    wide term = x, sum = x;
    for (int k = 3; k < 250; k += 2)
      sum += term *= x * x / k;
    return wide(0.5) + normal_density(x) * sum;
  }
  wide fraction = size_of(x);
  for (int k = 400; k > 0; --k)
    fraction = size_of(x) + k / fraction;
  const wide tail = normal_density(x) / fraction;
  return x < 0 ? tail : wide(1 - tail);
}

struct pair_expectation {
  wide value = 0, value_size = 0;
  std::vector<wide> slopes[2], sizes[2];
};
/// The formula as it is printed, levels from best to worst.
pair_expectation expect(const std::vector<wide>& za, const std::vector<wide>& zb, const wide& g,
                        const wide& variance, const wide& e) {
  const softmax_row p[] = {softmax_row(za), softmax_row(zb)};
  const std::size_t n = za.size();
  wide m[2] = {0, 0}, v[2] = {0, 0};
  const auto level = [n](std::size_t k) { return wide(static_cast<double>(n - k)); };
  for (int s = 0; s < 2; ++s) {
    for (std::size_t k = 0; k < n; ++k)
      m[s] += p[s].p(k) * level(k);
    for (std::size_t k = 0; k < n; ++k)
      v[s] += p[s].p(k) * (level(k) - m[s]) * (level(k) - m[s]);
  }
  const wide all = variance > 0 ? variance : wide(v[0] + v[1] + e), u = (m[0] - m[1]) / sqrt(all);
  const wide yes = normal_probability(u), no = normal_probability(wide(-u)), h = 1 - g;
  const wide a = sqrt(wide(yes * g + e)), b = sqrt(wide(no * h + e));
  pair_expectation out;
  out.value = 1 - a - b;
  const wide from_g = g == 0 ? wide(0) : wide(g / a), from_h = h == 0 ? wide(0) : wide(h / b);
  const wide slope = (from_h - from_g) / 2 * normal_density(u);
  // u comes with the rounding errors of means, over √V; the rest has some of its own.
  const wide of_u = (1 + size_of(u)) * (1 + level(0) / sqrt(all));
  const wide size = (from_h + from_g) / 2 * normal_density(u) * of_u;
  out.value_size = size_of(out.value) + size;
  for (int s = 0; s < 2; ++s)
    for (std::size_t k = 0; k < n; ++k) {
      const wide off = level(k) - m[s], of_m = (s == 0 ? 1 : -1) / sqrt(all),
                 of_v = variance > 0 ? wide(0) : wide(-u / (2 * all));
      out.slopes[s].push_back(slope * p[s].p(k) * (of_m * off + of_v * (off * off - v[s])));
      out.sizes[s].push_back(size * p[s].p(k) *
                             (size_of(of_m) * level(0) + size_of(of_v) * level(0) * level(0)));
    }
  return out;
}

template <class T> std::vector<wide> row(const std::vector<T>& x, std::size_t r, std::size_t n) {
  return {x.begin() + static_cast<index>(r * n), x.begin() + static_cast<index>((r + 1) * n)};
}

std::vector<double> levels_of(double mean, double deviation,
                              const perdita::gaussian_levels<double>::options& o = {}) {
  std::vector<double> p(static_cast<std::size_t>(o.levels), 7);
  const std::vector<double> means{mean}, deviations{deviation};
  perdita::gaussian_levels<double> levels(o);
  levels(means, deviations, matrix_view<double>(p.data(), 1, o.levels));
  return p;
}

} // namespace

TEMPLATE_TEST_CASE("thurstone_fidelity: value and gradients", "[scoring]", float, double) {
  using T = TestType;
  random_numbers random(21);
  const wide epsilon = std::numeric_limits<T>::epsilon();
  const wide rounding = std::numeric_limits<double>::epsilon();
  error_judge of_values, of_slopes;
  for (const T variance : {T(0), T(2)})
    for (const T smoothing : {T(0), T(1e-8)})
      for (const std::size_t n : {1U, 5U, 11U})
        for (const double width : {0.1, 2.0, 9.0}) {
          if (variance == 0 && smoothing == 0)
            continue;
          constexpr std::size_t rows = 7;
          const auto cols = static_cast<index>(n);
          std::vector<T> a, b, da(rows * n, 7), db(da), values(rows);
          const std::vector<T> targets{0, 1, T(0.5), T(0.7), T(0.01), T(1e-6), T(0.999)};
          for (std::size_t i = 0; i < rows * n; ++i) {
            a.push_back(static_cast<T>(width * random.normal()));
            b.push_back(static_cast<T>(width * random.normal()));
          }
          perdita::call_options<T> call;
          call.values = values;
          const perdita::thurstone_fidelity<T> loss(
              {.variance = variance, .smoothing = smoothing, .reduction = perdita::reduction::sum});
          const matrix_view<const T> x(a.data(), rows, cols), y(b.data(), rows, cols);
          const T value = loss(x, y, targets, matrix_view<T>(da.data(), rows, cols),
                               matrix_view<T>(db.data(), rows, cols), call);
          CHECK(value == loss(x, y, targets));
          for (std::size_t r = 0; r < rows; ++r) {
            const auto e = expect(row(a, r, n), row(b, r, n), targets[r], variance, smoothing);
            const auto check = [](error_judge& judge, const wide& got, const wide& expected,
                                  const wide& size) {
              judge.within(size_of(wide(got - expected)), 1, size + std::numeric_limits<T>::min());
            };
            check(of_values, values[r], e.value,
                  epsilon * size_of(e.value) +
                      rounding * (8 * wide(smoothing > 0) + 8 * e.value_size));
            for (std::size_t k = 0; k < n; ++k) {
              check(of_slopes, da[r * n + k], e.slopes[0][k],
                    epsilon * size_of(e.slopes[0][k]) + rounding * 8 * (1 + width) * e.sizes[0][k]);
              check(of_slopes, db[r * n + k], e.slopes[1][k],
                    epsilon * size_of(e.slopes[1][k]) + rounding * 8 * (1 + width) * e.sizes[1][k]);
            }
          }
        }
  report_accuracy<T>("thurstone_fidelity", "", in_allowances, of_values, of_slopes);
  INFO(of_values.worst() << " and " << of_slopes.worst());
  CHECK(of_values.all_within());
  CHECK(of_slopes.all_within());
}

TEST_CASE("thurstone_fidelity: golden value, derivatives, binary labels", "[scoring]") {
  using Catch::Matchers::WithinAbs;
  std::vector<double> a{.2, .5, -.1, .3, -.4}, b{-.3, .1, .4, .2, 0}, da(5), db(5);
  std::vector<double> targets{.7};
  const matrix_view<const double> x(a.data(), 1, 5), y(b.data(), 1, 5);
  const matrix_view<double> dx(da.data(), 1, 5), dy(db.data(), 1, 5);
  const perdita::thurstone_fidelity<double> loss;
  CHECK_THAT(loss(x, y, targets, dx, dy), WithinAbs(0.00833247721926, 1e-12));
  const std::vector<double> slopes{-0.00982398121, -0.00643791664, 0.000659366469, 0.00790656022,
                                   0.00769597116};
  for (std::size_t k = 0; k < 5; ++k)
    CHECK_THAT(da[k], WithinAbs(slopes[k], 1e-10));
  const auto first = perdita::testing::check_gradient([&] { return loss(x, y, targets); }, a, da);
  const auto second = perdita::testing::check_gradient([&] { return loss(x, y, targets); }, b, db);
  INFO(first.message() << second.message());
  CHECK(first.ok);
  CHECK(second.ok);

  const perdita::thurstone_fidelity<double> binary({.variance = 2, .smoothing = 0});
  const double p = binary.preference(1, 9, 0, 9); // Φ(1/√2)
  CHECK_THAT(p, WithinAbs(0.76024993890652, 1e-13));
  // Items that are sure of the levels 5 and 4
  const std::vector<double> best{0, -inf, -inf, -inf, -inf}, good{-inf, 0, -inf, -inf, -inf};
  const matrix_view<const double> five(best.data(), 1, 5), four(good.data(), 1, 5);
  targets = {1};
  CHECK_THAT(binary(five, four, targets), WithinAbs(1 - std::sqrt(p), 1e-15));
  targets = {0};
  CHECK_THAT(binary(five, four, targets), WithinAbs(1 - std::sqrt(1 - p), 1e-15));
  targets = {p};
  CHECK(std::abs(binary(five, four, targets, dx, dy)) < 1e-31);
  // The other order of levels turns the preference round.
  const perdita::thurstone_fidelity<double> worst_first({.best_first = false}),
      narrow({.variance = 1e-4, .smoothing = 0});
  targets = {.3};
  CHECK_THAT(worst_first(x, y, targets), WithinAbs(0.00833247721926, 1e-12));
  // Probabilities that underflow: u = ±100
  targets = {1};
  CHECK(narrow(four, five, targets, dx, dy) == 1);
  CHECK((da == std::vector<double>(5, 0.0) && db == da));
  targets = {.5};
  CHECK_THAT(narrow(four, five, targets, dx, dy), WithinAbs(1 - std::sqrt(.5), 1e-15));
  CHECK((da == std::vector<double>(5, 0.0) && db == da));
}

TEST_CASE("thurstone_fidelity: special rows, calls, threads", "[scoring]") {
  const std::size_t rows = 200, n = 5;
  random_numbers random(23);
  std::vector<float> a, b, g, da(rows * n, 1), db(da), ea(da), eb(da), values(rows);
  for (std::size_t i = 0; i < rows * n; ++i) {
    a.push_back(static_cast<float>(random.normal()));
    b.push_back(static_cast<float>(random.normal()));
  }
  std::vector<float> weights, targets;
  for (std::size_t r = 0; r < rows; ++r) {
    targets.push_back(static_cast<float>(random.uniform(0, 1)));
    weights.push_back(static_cast<float>(r % 3));
  }
  const matrix_view<const float> x(a.data(), rows, n), y(b.data(), rows, n);
  const matrix_view<float> dx(da.data(), rows, n), dy(db.data(), rows, n), ex(ea.data(), rows, n),
      ey(eb.data(), rows, n);
  const perdita::thurstone_fidelity<float> loss;
  perdita::call_options<float> call;
  call.run_on = perdita::serial;
  call.row_weights = weights;
  call.values = values;
  const float value = loss(x, y, targets, dx, dy, call);
  double sum = 0;
  for (const float v : values)
    sum += static_cast<double>(v);
  CHECK(std::abs(sum / 199 - static_cast<double>(value)) < 1e-7); // 66 ones and 66.5 twos
  CHECK((da[0] == 0 && db[n - 1] == 0));
  const threads_executor threads(3, task_order::shuffled);
  call.run_on = threads;
  call.accumulate = true;
  call.scale = 3;
  CHECK(loss(x, y, targets, ex, ey, call) == value);
  for (std::size_t i = 0; i < rows * n; ++i) {
    CHECK(std::abs(ea[i] - (1 + 3 * da[i])) < 1e-6f);
    CHECK(std::abs(eb[i] - (1 + 3 * db[i])) < 1e-6f);
  }
  // NaN stays in its pair.
  for (const float bad : {static_cast<float>(nan), static_cast<float>(inf)}) {
    b[4 * n + 1] = bad;
    CHECK(std::isnan(loss(x, y, targets, ex, ey)));
    for (std::size_t i = 0; i < rows * n; ++i) {
      CHECK(std::isnan(ea[i]) == (i / n == 4));
      CHECK(std::isnan(eb[i]) == (i / n == 4));
    }
  }
  // So does that of a target, beside scores of which nothing more can be learnt.
  for (const float z : {0.F, 300.F}) {
    std::vector<float> one{z, 0, 0, 0, -z}, other{-z, 0, 0, 0, z}, d_one(5), d_other(5);
    const std::vector<float> target{static_cast<float>(nan)};
    const auto row = [](std::vector<float>& v) { return matrix_view<float>(v.data(), 1, 5); };
    for (const float variance : {0.F, 1e-3F}) {
      const perdita::thurstone_fidelity<float> lost({.variance = variance});
      CHECK(std::isnan(lost(row(one), row(other), target, row(d_one), row(d_other))));
      CHECK((std::isnan(d_one[0]) && std::isnan(d_other[4])));
    }
  }
  const matrix_view<const float> none(nullptr, 0, 5);
  CHECK(loss(none, none, std::vector<float>()) == 0);
}

TEST_CASE("gaussian_levels: mean, sum and the formula", "[scoring]") {
  const wide root = 2; // only so that the expressions below are wide
  const double epsilon = std::numeric_limits<double>::epsilon();
  error_judge of_shares;
  for (const level_mass mass : {level_mass::interval, level_mass::density})
    for (const double s : {0.3, 0.7, 1.1})
      for (const double m : {2.1, 2.7, 2.95, 2.9999999, 3.0000001, 3.4, 3.9}) {
        wide raw[5], all = 0, moment = 0;
        for (int j = 1; j <= 5; ++j) {
          const wide low = (j - root / 4 - m) / s, high = (j + root / 4 - m) / s;
          raw[j - 1] = mass == level_mass::density
                           ? wide(normal_density(wide((j - wide(m)) / s)) / s)
                           : wide(normal_probability(high) - normal_probability(low));
          all += raw[j - 1];
          moment += raw[j - 1] * (j - 3);
        }
        const wide alpha = (wide(m) - 3) / moment, beta = (1 - alpha * all) / 5;
        wide total = 0;
        for (int j = 0; j < 5; ++j)
          total += larger(wide(alpha * raw[j] + beta), wide(0));
        const auto p = levels_of(m, s, {.mass = mass, .most_error = 1});
        double sum = 0, mean = 0;
        for (int j = 1; j <= 5; ++j) {
          const double share = p[static_cast<std::size_t>(5 - j)];
          const wide expected = larger(wide(alpha * raw[j - 1] + beta), wide(0)) / total;
          INFO(m << ", " << s << ": " << share << " for " << text(expected));
          CHECK(of_shares.within(size_of(wide(share - expected)), 2e-15 / epsilon, epsilon));
          sum += share;
          mean += j * share;
        }
        CHECK(std::abs(sum - 1) < 1e-15);
        if (total < wide(1 + 1e-12))
          CHECK(std::abs(mean - m) < 1e-14);
      }
  report_accuracy<double>("gaussian_levels", "", in_epsilons_absolute,
                          {of_shares.worst(), -1, of_shares.share()});
}

TEST_CASE("gaussian_levels: centre, ends, small and large deviations", "[scoring]") {
  using vector = std::vector<double>;
  // Not uniform in the centre, as it is not beside it
  const vector at = levels_of(3, 0.5), beside = levels_of(3 + 1e-10, 0.5);
  for (std::size_t k = 0; k < 5; ++k)
    CHECK(std::abs(at[k] - beside[k]) < 1e-9);
  CHECK(at[2] > 0.6);
  CHECK(std::abs(at[0] - at[4]) < 1e-15);
  // Two levels
  CHECK(levels_of(4.25, 0.1) == vector{.25, .75, 0, 0, 0});
  CHECK(levels_of(5, 0) == vector{1, 0, 0, 0, 0});
  CHECK(levels_of(1, 0) == vector{0, 0, 0, 0, 1});
  CHECK(levels_of(3, inf) == vector{0, 0, 1, 0, 0});
  CHECK(levels_of(4.5, 3) == vector{.5, .5, 0, 0, 0}); // what is cut at 0 moves the mean
  CHECK(levels_of(4.25, 0.1, {.best_first = false}) == vector{0, 0, 0, .75, .25});
  CHECK(levels_of(25, 0, {.levels = 3, .least = 0, .most = 100}) == vector{0, .5, .5});
  for (const bool of_mean : {false, true})
    for (const double share : levels_of(of_mean ? nan : 2, of_mean ? 1 : nan))
      CHECK(std::isnan(share));
  // Ends of scales, some of which are rounded to what is above the last level
  for (int most = 25; most < 45; ++most)
    for (const perdita::index k : {5, 6, 7, 11}) {
      const double end = most / 10.0;
      const auto p = levels_of(end, 0, {.levels = k, .least = -1, .most = end});
      CHECK(std::abs(p[0] - 1) < 1e-14);
      CHECK(*std::min_element(p.begin(), p.end()) >= 0);
    }
  // The scale of the means
  const auto scaled = levels_of(60, 12, {.least = 0, .most = 100}), plain = levels_of(3.4, 0.48);
  for (std::size_t k = 0; k < 5; ++k)
    CHECK(std::abs(scaled[k] - plain[k]) < 1e-14);
}

TEST_CASE("scoring: what is refused", "[scoring]") {
  using Catch::Matchers::ContainsSubstring;
  using levels = perdita::gaussian_levels<double>;
  using fidelity = perdita::thurstone_fidelity<double>;
  CHECK_THROWS_WITH(levels({.levels = 1}), ContainsSubstring("levels is 1"));
  CHECK_THROWS_WITH(levels({.least = 5}), ContainsSubstring("most is 5"));
  CHECK_THROWS_WITH(levels({.least_deviation = 0}), ContainsSubstring("least_deviation is 0"));
  CHECK_THROWS_WITH(levels_of(5.5, 1), ContainsSubstring("means[0] is 5.5"));
  CHECK_THROWS_WITH(levels_of(5, -1), ContainsSubstring("deviations[0] is -1"));
  std::vector<double> x(10), g(10, 7), targets{1};
  const matrix_view<double> to(g.data(), 1, 5), other(g.data() + 5, 1, 5), z(x.data(), 1, 5),
      short_one(x.data(), 1, 4);
  CHECK_THROWS_WITH(levels()(targets, targets, short_one), ContainsSubstring("columns"));
  const perdita::vector_view<const double> inside(g.data() + 2, 1);
  CHECK_THROWS_WITH(levels()(inside, targets, to), ContainsSubstring("memory apart"));
  CHECK_THROWS_WITH(fidelity({.smoothing = 0}), ContainsSubstring("smoothing is 0"));
  CHECK_THROWS_WITH(fidelity({.variance = -1}), ContainsSubstring("variance is -1"));
  CHECK_THROWS_WITH(fidelity()(z, short_one, targets), ContainsSubstring("second scores is 4"));
  CHECK_THROWS_WITH(fidelity()(z, z, targets, to, to), ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(fidelity()(z, z, targets, z, to), ContainsSubstring("overlaps"));
  targets = {1.5};
  CHECK_THROWS_WITH(fidelity()(z, z, targets, to, other), ContainsSubstring("targets[0] is 1.5"));
  targets = {1, 0};
  CHECK_THROWS_WITH(fidelity()(z, z, targets, to, other), ContainsSubstring("targets is 2"));
  CHECK(g == std::vector<double>(10, 7));
}

TEST_CASE("gaussian_levels: where two levels are enough", "[scoring]") {
  const auto two = levels_of(4.25, 0.3, {.least_deviation = 0.5});
  CHECK(two == std::vector<double>{.25, .75, 0, 0, 0});
  CHECK(levels_of(4.25, 0.3) != two);
}

TEST_CASE("thurstone_fidelity: slopes upstream, and what the mean divides by", "[scoring]") {
  const std::vector<double> a{.2, .5, -.1, .3, -.4, 1}, b{-.3, .1, .4, .2, 0, -1}, targets{.7, .2},
      upstream{3, -2};
  std::vector<double> da(6), db(6), ea(6), eb(6);
  const auto view = [](auto& v) { return matrix_view(v.data(), 2, 3); };
  const perdita::thurstone_fidelity<double> loss;
  const double value = loss(view(a), view(b), targets, view(da), view(db));
  CHECK(std::abs(loss(view(a), view(b), targets, view(ea), view(eb),
                      {.upstream = upstream, .normaliser = 4}) -
                 value / 2) < 1e-16);
  for (std::size_t k = 0; k < 6; ++k) {
    CHECK(std::abs(ea[k] - upstream[k / 3] * da[k] / 2) < 1e-16);
    CHECK(std::abs(eb[k] - upstream[k / 3] * db[k] / 2) < 1e-16);
  }
}

TEST_CASE("thurstone_fidelity: mean and sum by a normaliser", "[scoring]") {
  const std::vector<double> a{.2, .5, -.1, .3, -.4, 1}, b{-.3, .1, .4, .2, 0, -1}, targets{.7, .2};
  const auto view = [](auto& v) { return matrix_view(v.data(), 2, 3); };
  check_normaliser<double>([&](perdita::reduction how, const perdita::call_options<double>& call) {
    std::vector<double> da(6), db(6);
    const double value = perdita::thurstone_fidelity<double>({.reduction = how})(
        view(a), view(b), targets, view(da), view(db), call);
    return all_of(value, da, db);
  });
}

} // namespace perdita_tests
