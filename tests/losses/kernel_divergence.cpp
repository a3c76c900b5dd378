// SPDX-License-Identifier: MIT

// Divergences and dependence measures by Gaussian kernels: formula sheet of contrastive losses,
// 7.11 and 7.12.

#include <perdita/kernel_divergence.hpp>

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
enum class kind { biased, unbiased, cs, hsic, qmi, normalised };

wide kernel(const std::vector<wide>& a, const std::vector<wide>& b, double bandwidth) {
  wide squares = 0;
  for (std::size_t k = 0; k < a.size(); ++k)
    squares += (a[k] - b[k]) * (a[k] - b[k]);
  return exp(wide(-squares / (2 * wide(bandwidth) * bandwidth)));
}
points matrix(const points& x, const points& y, double bandwidth) {
  points k(x.size());
  for (std::size_t i = 0; i < x.size(); ++i)
    for (const auto& b : y)
      k[i].push_back(kernel(x[i], b, bandwidth));
  return k;
}
wide mean(const points& k, bool skip_own = false) {
  wide sum = 0, count = 0;
  for (std::size_t i = 0; i < k.size(); ++i)
    for (std::size_t j = 0; j < k[i].size(); ++j)
      if (!skip_own || i != j) {
        sum += k[i][j];
        count += 1;
      }
  return sum / count;
}
/// H K H
points centred(points k) {
  const std::size_t n = k.size();
  for (int way = 0; way < 2; ++way)
    for (std::size_t i = 0; i < n; ++i) {
      wide m = 0;
      for (std::size_t j = 0; j < n; ++j)
        m += (way ? k[i][j] : k[j][i]) / static_cast<double>(n);
      for (std::size_t j = 0; j < n; ++j)
        (way ? k[i][j] : k[j][i]) -= m;
    }
  return k;
}
points product(const points& a, const points& b) {
  points k = a;
  for (std::size_t i = 0; i < a.size(); ++i)
    for (std::size_t j = 0; j < a[i].size(); ++j)
      k[i][j] *= b[i][j];
  return k;
}
wide row_mean(const std::vector<wide>& row) {
  wide sum = 0;
  for (const wide& x : row)
    sum += x / static_cast<double>(row.size());
  return sum;
}

/// By the definitions, with matrices.
wide reference(kind what, const points& x, const points& y, double sx, double sy) {
  if (what == kind::normalised)
    return reference(kind::qmi, x, y, sx, sy) /
           sqrt(wide(reference(kind::qmi, x, x, sx, sx) * reference(kind::qmi, y, y, sy, sy)));
  const points a = matrix(x, x, sx);
  if (what == kind::hsic || what == kind::qmi) {
    const points b = matrix(y, y, sy);
    const double n = static_cast<double>(x.size());
    if (what == kind::hsic)
      return mean(product(centred(a), centred(b))) * n * n / ((n - 1) * (n - 1));
    wide both = 0;
    for (std::size_t i = 0; i < x.size(); ++i)
      both += row_mean(a[i]) * row_mean(b[i]) / n;
    return log(mean(product(a, b))) + log(wide(mean(a) * mean(b))) - 2 * log(both);
  }
  const points b = matrix(y, y, sx), c = matrix(x, y, sx);
  if (what == kind::cs)
    return log(mean(a)) + log(mean(b)) - 2 * log(mean(c));
  const bool skip = what == kind::unbiased;
  return mean(a, skip) + mean(b, skip) - 2 * mean(c);
}

template <class T> struct sample {
  index rows, cols;
  std::vector<T> x, g;
  sample(index n, index d, double spread, double at, std::uint64_t seed) : rows(n), cols(d) {
    random_numbers random(seed);
    for (index i = 0; i < n * d; ++i)
      x.push_back(static_cast<T>(at + spread * random.normal()));
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

template <class T, class Loss>
void check_against_definition(const Loss& loss, kind what, const char* name, double sx = 1,
                              double sy = 1) {
  const wide epsilon = std::numeric_limits<T>::epsilon();
  const bool paired = what == kind::hsic || what == kind::qmi || what == kind::normalised;
  error_judge of_values, of_slopes;
  for (const double spread : {0.05, 0.7, 3.0})
    for (const index n : {2, 9}) {
      sample<T> x(n, 3, spread, 0, 3);
      sample<T> y(paired ? n : 5, paired ? 2 : 3, spread, 0.5 * spread, 4);
      const T value = loss(x.view(), y.view(), x.gradient(), y.gradient());
      CHECK(loss(x.view(), y.view()) == value);
      points p = x.wide_points(), q = y.wide_points();
      // Kernels are at most 1; logarithms of their means may be larger.
      wide scale = epsilon; // the normalisation divides by what may be small
      if (what == kind::normalised)
        scale /= smaller(wide(1), smaller(reference(kind::qmi, p, p, sx, sx),
                                          reference(kind::qmi, q, q, sy, sy)));
      // Of the gradient, besides: with it, two parts of 1/spread that cancel
      const double terms = what == kind::normalised ? spread + 1 / spread : spread;
      const wide want = reference(what, p, q, sx, sy), unit = scale * (1 + size_of(want));
      CHECK(of_values.within(size_of(wide(value - want)), 8, unit));
      const wide h = 1e-7;
      const auto derivative = [&](wide& z) {
        const wide at = z;
        const auto f = [&](int k) {
          z = at + k * h;
          return reference(what, p, q, sx, sy);
        };
        const wide slope = (8 * (f(1) - f(-1)) - (f(2) - f(-2))) / (12 * h);
        z = at;
        return slope;
      };
      const auto judge = [&](sample<T>& s, points& w) {
        for (std::size_t i = 0; i < s.x.size(); ++i) {
          wide& z = w[i / static_cast<std::size_t>(s.cols)][i % static_cast<std::size_t>(s.cols)];
          const wide slope = derivative(z);
          CHECK(
              of_slopes.within(size_of(wide(s.g[i] - slope)), 8, scale * (size_of(slope) + terms)));
        }
      };
      judge(x, p);
      judge(y, q);
    }
  report_accuracy<T>(
      name, "", in_epsilons_of_terms,
      {of_values.worst(), of_slopes.worst(), std::max(of_values.share(), of_slopes.share())});
}

/// Formula sheet 11.
void set_golden(sample<double>& x, sample<double>& y) {
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
template <class Loss> void check_golden(const Loss& loss, double value, double of_x, double of_y) {
  sample<double> x(6, 4, 1, 0, 1), y(6, 4, 1, 0, 2);
  set_golden(x, y);
  CHECK(std::abs(loss(x.view(), y.view(), x.gradient(), y.gradient()) - value) < 1e-11);
  CHECK(std::abs(norm(x.g) - of_x) < 2e-9);
  CHECK(std::abs(norm(y.g) - of_y) < 2e-9);
  for (sample<double>* s : {&x, &y}) {
    const auto report =
        perdita::testing::check_gradient([&] { return loss(x.view(), y.view()); }, s->x, s->g);
    INFO(report.message());
    CHECK(report.ok);
  }
}

} // namespace

TEMPLATE_TEST_CASE("kernel divergences: value and gradient against the definitions",
                   "[kernel_divergence]", float, double) {
  using T = TestType;
  check_against_definition<T>(perdita::mmd<T>({.bandwidth = 0.8}), kind::biased, "mmd", 0.8);
  check_against_definition<T>(perdita::mmd<T>({.bandwidth = 2, .unbiased = true}), kind::unbiased,
                              "mmd", 2);
  check_against_definition<T>(perdita::cauchy_schwarz_divergence<T>({.bandwidth = 1.5}), kind::cs,
                              "cauchy_schwarz_divergence", 1.5);
  check_against_definition<T>(perdita::hsic<T>({.bandwidth = 1.5, .other_bandwidth = 0.7}),
                              kind::hsic, "hsic", 1.5, 0.7);
  check_against_definition<T>(perdita::cs_qmi<T>({.bandwidth = 1.5, .other_bandwidth = 0.7}),
                              kind::qmi, "cs_qmi", 1.5, 0.7);
}

TEMPLATE_TEST_CASE("cs_qmi normalised: value and gradient", "[kernel_divergence]", float, double) {
  using T = TestType;
  const perdita::cs_qmi<T> loss({.bandwidth = 1.5, .other_bandwidth = 0.7, .normalised = true});
  check_against_definition<T>(loss, kind::normalised, "cs_qmi", 1.5, 0.7);
}

TEMPLATE_TEST_CASE("conditional_cauchy_schwarz: value and gradient against the definition",
                   "[kernel_divergence]", float, double) {
  using T = TestType;
  const wide epsilon = std::numeric_limits<T>::epsilon();
  error_judge of_values, of_slopes;
  for (const double spread : {0.1, 1.0, 4.0})
    for (const index n : {1, 3, 9}) {
      sample<T> x(n, 3, 1, 0, 3), y(n, 2, spread, 0, 4), p(n, 2, spread, 0.2, 5);
      const perdita::conditional_cauchy_schwarz<T> loss({.bandwidth = 1.5, .other_bandwidth = 0.7});
      const T value = loss(x.view(), y.view(), p.view(), p.gradient());
      CHECK(loss(x.view(), y.view(), p.view()) == value);
      CHECK(std::abs(loss(x.view(), y.view(), y.view())) < 1e-6);
      const points given = x.wide_points(), responses = y.wide_points();
      points predictions = p.wide_points();
      const points k = matrix(given, given, 1.5);
      const auto definition = [&] {
        const points yy = matrix(responses, responses, 0.7),
                     pp = matrix(predictions, predictions, 0.7),
                     py = matrix(predictions, responses, 0.7);
        wide sums[3] = {};
        for (std::size_t i = 0; i < k.size(); ++i) {
          wide sum = 0;
          for (const wide& z : k[i])
            sum += z;
          for (std::size_t j = 0; j < k.size(); ++j) {
            const wide w = k[i][j] / (sum * sum);
            sums[0] += w * yy[i][j];
            sums[1] += w * pp[i][j];
            sums[2] += w * py[i][j];
          }
        }
        return wide(log(sums[0]) + log(sums[1]) - 2 * log(sums[2]));
      };
      const wide want = definition(), unit = epsilon * (1 + size_of(want));
      CHECK(of_values.within(size_of(wide(value - want)), 8, unit));
      const wide h = 1e-7;
      for (std::size_t i = 0; i < p.x.size(); ++i) {
        wide& z = predictions[i / 2][i % 2];
        const wide at = z;
        const auto f = [&](int steps) {
          z = at + steps * h;
          return definition();
        };
        const wide slope = (8 * (f(1) - f(-1)) - (f(2) - f(-2))) / (12 * h);
        z = at;
        CHECK(of_slopes.within(size_of(wide(p.g[i] - slope)), 8,
                               epsilon * (size_of(slope) + spread)));
      }
    }
  report_accuracy<T>(
      "conditional_cauchy_schwarz", "", in_epsilons_of_terms,
      {of_values.worst(), of_slopes.worst(), std::max(of_values.share(), of_slopes.share())});
}

TEST_CASE("kernel divergences: golden values, derivatives", "[kernel_divergence]") {
  check_golden(perdita::mmd<double>({.unbiased = true}), -0.0482963119468, 0.156343751,
               0.131994296);
  check_golden(perdita::cauchy_schwarz_divergence<double>(), 0.825479686883, 0.661567486,
               0.575268584);
  check_golden(perdita::hsic<double>(), 0.125280981622, 0.0343372796, 0.0336654558);
  check_golden(perdita::cs_qmi<double>(), 0.603448286263, 0.31981656, 0.315243917);
}

TEST_CASE("kernel divergences: equal samples, far samples, special values", "[kernel_divergence]") {
  sample<double> x(11, 3, 1, 0, 5), y(11, 3, 1, 1e4, 5);
  CHECK(std::abs(perdita::mmd<double>()(x.view(), x.view())) < 1e-15);
  CHECK(std::abs(perdita::cauchy_schwarz_divergence<double>()(x.view(), x.view())) < 2e-15);
  // No kernel between the two is above 1e-300, and yet the nearest pair pulls by its distance.
  const perdita::cauchy_schwarz_divergence<double> loss;
  const double value = loss(x.view(), y.view(), x.gradient(), y.gradient());
  CHECK((std::isfinite(value) && value > 1e7));
  double sum = 0;
  for (const double g : x.g)
    sum += g;
  CHECK((sum < -1e4 && std::isfinite(sum)));
  CHECK(perdita::hsic<double>()(x.view(), y.view()) > 0);
  x.x[4] = std::nan("");
  CHECK(std::isnan(loss(x.view(), y.view(), x.gradient(), y.gradient())));
  CHECK(std::isnan(perdita::mmd<double>()(x.view(), y.view())));
  CHECK(std::isnan(perdita::hsic<double>()(x.view(), y.view())));
  x.x[4] = std::numeric_limits<double>::infinity();
  CHECK(std::isnan(perdita::cs_qmi<double>()(x.view(), y.view())));
  CHECK(std::isnan(perdita::mmd<double>()(x.view(), y.view())));
  CHECK(std::isnan(loss(x.view(), y.view())));
}

TEST_CASE("mmd: a point at infinity is no far point", "[kernel_divergence]") {
  const double inf = std::numeric_limits<double>::infinity();
  for (const double x : {inf, -inf}) {
    sample<double> far(3, 2, 1, 0, 5), y(4, 2, 1, 0, 6);
    far.x[2] = x;
    const perdita::mmd<double> loss({.unbiased = true});
    CHECK(std::isnan(loss(far.view(), y.view(), far.gradient(), y.gradient())));
    CHECK((std::isnan(far.g[2]) && std::isnan(y.g[0])));
    CHECK(std::isnan(loss(y.view(), far.view())));
  }
}

TEST_CASE("kernel divergences: bandwidths whose squares are out of range", "[kernel_divergence]") {
  const auto check = [](const auto& make, double bandwidth) {
    sample<double> x(5, 2, 1, 0, 5), y(5, 2, 1, 0.5, 6), far_x = x, far_y = y;
    for (std::size_t i = 0; i < x.x.size(); ++i) {
      far_x.x[i] *= bandwidth;
      far_y.x[i] *= bandwidth;
    }
    const double value = make(1)(x.view(), y.view(), x.gradient(), y.gradient());
    const double scaled =
        make(bandwidth)(far_x.view(), far_y.view(), far_x.gradient(), far_y.gradient());
    CHECK(std::abs(scaled - value) < 1e-14);
    for (std::size_t i = 0; i < x.g.size(); ++i) {
      CHECK(std::abs(far_x.g[i] * bandwidth - x.g[i]) < 1e-13);
      CHECK(std::abs(far_y.g[i] * bandwidth - y.g[i]) < 1e-13);
    }
  };
  for (const double bandwidth : {1e163, 1e-155, 1e-200, 1e250, 1e-290}) {
    CAPTURE(bandwidth);
    check([](double b) { return perdita::mmd<double>({.bandwidth = b}); }, bandwidth);
    check([](double b) { return perdita::mmd<double>({.bandwidth = b, .unbiased = true}); },
          bandwidth);
    check([](double b) { return perdita::cauchy_schwarz_divergence<double>({.bandwidth = b}); },
          bandwidth);
    const auto hsic = [](double b) {
      return perdita::hsic<double>({.bandwidth = b, .other_bandwidth = b});
    };
    check(hsic, bandwidth);
    for (const bool normalised : {false, true}) {
      const auto information = [=](double b) {
        return perdita::cs_qmi<double>(
            {.bandwidth = b, .other_bandwidth = b, .normalised = normalised});
      };
      check(information, bandwidth);
    }
  }
}

TEST_CASE("cauchy_schwarz_divergence: exponents whose rounding exceeds 1", "[kernel_divergence]") {
  const perdita::cauchy_schwarz_divergence<double> loss({.bandwidth = 0.7});
  for (double far = 1e7; far < 1e150; far *= 7.3) {
    std::vector<double> x{0}, y{far}, g(1), h(1);
    const auto one = [](std::vector<double>& v) { return matrix_view<double>(v.data(), 1, 1); };
    const double scaled = far / 0.7;
    CHECK(std::abs(loss(one(x), one(y), one(g), one(h)) / scaled / scaled - 1) < 1e-14);
    CHECK(std::abs(g[0] * 0.7 / scaled / -2 - 1) < 1e-14);
    CHECK(h[0] == -g[0]);
  }
}

TEST_CASE("conditional_cauchy_schwarz: predictions far off", "[kernel_divergence]") {
  const perdita::conditional_cauchy_schwarz<double> loss;
  // Inputs so far apart that W is 0 for the pair whose prediction and response are equal.
  std::vector<double> x{0, 1000}, y{0, 100}, p{100, 0}, g(2);
  const auto column = [](std::vector<double>& v) {
    return matrix_view<double>(v.data(), static_cast<index>(v.size()), 1);
  };
  CHECK(std::abs(loss(column(x), column(y), column(p), column(g)) - 10000) < 1e-9);
  CHECK(std::abs(g[0] - 100) < 1e-12);
  CHECK(std::abs(g[1] + 100) < 1e-12);
  // Where the two compete: −d²/2 of the inputs or of the others
  x = {0, 90};
  CHECK(std::abs(loss(column(x), column(y), column(p), column(g)) - 8100) < 1e-9);
  CHECK(std::abs(g[0]) < 1e-12);
}

TEST_CASE("kernel divergences: threads, strides, added", "[kernel_divergence][threads]") {
  const auto check = [](const auto& loss) {
    sample<float> x(150, 7, 1, 0, 6), y(150, 7, 1, 0.3, 7), v = x, w = y;
    const threads_executor pool(3, task_order::shuffled);
    const float value =
        loss(x.view(), y.view(), x.gradient(), y.gradient(), {.run_on = perdita::serial});
    CHECK(loss(v.view(), w.view(), v.gradient(), w.gradient(), {.run_on = pool}) == value);
    CHECK((x.g == v.g && y.g == w.g));
    loss(v.view(), w.view(), v.gradient(), w.gradient(), {.scale = 2, .accumulate = true});
    for (std::size_t i = 0; i < v.g.size(); ++i)
      REQUIRE(std::abs(v.g[i] - 3 * x.g[i]) <= 4e-7f * std::abs(x.g[i]));
    for (std::size_t i = 0; i < v.g.size(); ++i)
      REQUIRE(std::abs(w.g[i] - 3 * y.g[i]) <= 4e-7f * std::abs(y.g[i]));
    std::vector<float> columns(x.x.size()), to(x.x.size());
    for (std::size_t i = 0; i < 150; ++i)
      for (std::size_t k = 0; k < 7; ++k)
        columns[k * 150 + i] = x.x[i * 7 + k];
    CHECK(loss(matrix_view<float>(columns.data(), 150, 7, 1, 150), y.view(),
               matrix_view<float>(to.data(), 150, 7, 1, 150), y.gradient()) == value);
    for (std::size_t i = 0; i < 150; ++i)
      for (std::size_t k = 0; k < 7; ++k)
        REQUIRE(to[k * 150 + i] == x.g[i * 7 + k]);
  };
  check(perdita::mmd<float>());
  check(perdita::cauchy_schwarz_divergence<float>());
  check(perdita::hsic<float>());
  check(perdita::cs_qmi<float>());
  check(perdita::cs_qmi<float>({.normalised = true}));
}

TEST_CASE("kernel divergences: what is refused", "[kernel_divergence]") {
  using Catch::Matchers::ContainsSubstring;
  sample<double> x(4, 2, 1, 0, 1), y(3, 2, 1, 0, 2), one(1, 2, 1, 0, 3), flat(4, 1, 1, 0, 4);
  const perdita::mmd<double> mmd;
  CHECK_THROWS_WITH(perdita::mmd<double>({.bandwidth = 0}), ContainsSubstring("bandwidth is 0"));
  CHECK_THROWS_WITH(perdita::hsic<double>({.other_bandwidth = -1}),
                    ContainsSubstring("other_bandwidth is -1"));
  CHECK_THROWS_WITH(perdita::cs_qmi<double>({.other_bandwidth = 0}),
                    ContainsSubstring("other_bandwidth is 0"));
  CHECK_THROWS_WITH(perdita::conditional_cauchy_schwarz<double>({.other_bandwidth = 0}),
                    ContainsSubstring("other_bandwidth is 0"));
  CHECK_THROWS_WITH(mmd(x.view(), flat.view()), ContainsSubstring("columns of the second"));
  CHECK_THROWS_WITH(perdita::mmd<double>({.unbiased = true})(x.view(), one.view()),
                    ContainsSubstring("rows of the second sample is 1, expected at least 2"));
  CHECK_THROWS_WITH(perdita::hsic<double>()(x.view(), y.view()),
                    ContainsSubstring("rows of the second sample is 3"));
  CHECK_THROWS_WITH(mmd(matrix_view<double>(nullptr, 0, 2), y.view()),
                    ContainsSubstring("rows of the first sample is 0"));
  CHECK_THROWS_WITH(mmd(x.view(), y.view(), y.gradient(), y.gradient()),
                    ContainsSubstring("gradient rows is 3"));
  CHECK_THROWS_WITH(mmd(x.view(), y.view(), x.view(), y.gradient()), ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(mmd(x.view(), y.view(), x.gradient(), y.gradient(), {.row_weights = x.x}),
                    ContainsSubstring("row_weights"));
  const perdita::conditional_cauchy_schwarz<double> conditional;
  CHECK_THROWS_WITH(conditional(x.view(), y.view(), x.view()),
                    ContainsSubstring("rows of the responses is 3"));
  CHECK_THROWS_WITH(conditional(x.view(), x.view(), flat.view()),
                    ContainsSubstring("columns of the predictions is 1"));
  CHECK_THROWS_WITH(conditional(flat.view(), x.view(), x.view(), x.view()),
                    ContainsSubstring("overlaps"));
  CHECK(x.g == std::vector<double>(8, 7));
  CHECK(y.g == std::vector<double>(6, 7));
}

} // namespace perdita_tests
