// SPDX-License-Identifier: MIT

// Formula sheet 15.1: losses of bounds, of which the battery knows nothing.

#include <perdita/certified.hpp>

#include <cmath>
#include <limits>
#include <vector>

#include <perdita/cross_entropy.hpp>
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

/// Straight from the definition: log(1 + Σ e^{−m}), m the margins in wide arithmetic.
struct expectation {
  wide value, miss;
  std::vector<wide> share;
  expectation(const std::vector<wide>& margins, std::size_t y) {
    wide least = 0, sum = 0;
    for (std::size_t k = 0; k < margins.size(); ++k)
      if (k != y)
        least = smaller(least, margins[k]);
    for (std::size_t k = 0; k < margins.size(); ++k) {
      share.push_back(k == y ? wide(0) : wide(exp(wide(least - margins[k]))));
      sum += share[k];
    }
    const wide own = exp(least), all = own + sum; // times e^−least
    value = least < 0 ? wide(-least + log(all)) : wide(log1p(sum));
    for (wide& s : share)
      s /= all;
    miss = sum / all;
  }
};

template <class T> struct bounds {
  std::vector<T> lower, upper;
  /// `lead`: how far the label's lower bound is above the rivals' scores, more or less.
  bounds(std::size_t n, std::size_t y, double lead, random_numbers& random) {
    for (std::size_t k = 0; k < n; ++k) {
      const double z = random.normal() + (k == y ? lead : 0), r = random.uniform(0, 1);
      lower.push_back(static_cast<T>(z - r));
      upper.push_back(static_cast<T>(z + r));
    }
  }
  std::vector<wide> margins(std::size_t y) const {
    std::vector<wide> m;
    for (const T u : upper)
      m.push_back(wide(lower[y]) - u);
    return m;
  }
};

template <class T> double relative(T got, const wide& expected) {
  const wide error = size_of(wide(got - expected));
  return error == 0 ? 0
                    : static_cast<double>(
                          error / (size_of(expected) * wide(std::numeric_limits<T>::epsilon())));
}

double run(const std::vector<double>& lower, const std::vector<double>& upper, int y,
           std::vector<double>& dl, std::vector<double>& du) {
  const auto n = static_cast<index>(lower.size());
  dl.assign(lower.size(), 7);
  du.assign(lower.size(), 7);
  return perdita::certified_cross_entropy<double>()(
      matrix_view<const double>(lower.data(), 1, n), matrix_view<const double>(upper.data(), 1, n),
      std::vector<int>{y}, matrix_view<double>(dl.data(), 1, n),
      matrix_view<double>(du.data(), 1, n));
}

} // namespace

TEMPLATE_TEST_CASE("certified: value and gradients of bounds and of margins", "[certified]", float,
                   double) {
  using T = TestType;
  random_numbers random(21);
  double worst_value = 0, worst = 0; // of gradients
  for (const double lead : {-20.0, 0.0, 5.0, 60.0})
    for (const std::size_t n : {1U, 2U, 17U, 300U})
      for (int repeat = 0; repeat < 5; ++repeat) {
        const auto y = static_cast<std::size_t>(random.below(n));
        const bounds<T> b(n, y, lead, random);
        const std::vector<int> label{static_cast<int>(y)};
        const auto m = static_cast<index>(n);
        std::vector<T> dl(n, T(7)), du(n, T(7)), dm(n, T(7)), margins;
        const matrix_view<const T> lower(b.lower.data(), 1, m), upper(b.upper.data(), 1, m);
        const perdita::certified_cross_entropy<T> loss;
        const T value = loss(lower, upper, label, matrix_view<T>(dl.data(), 1, m),
                             matrix_view<T>(du.data(), 1, m));
        CHECK(value == loss(lower, upper, label));
        const expectation e(b.margins(y), y);
        worst_value = worse(worst_value, relative(value, e.value));
        worst = worse(worst, relative(T(-dl[y]), e.miss));
        for (std::size_t k = 0; k < n; ++k) {
          worst = worse(worst, relative(du[k], e.share[k]));
          CHECK((k == y || dl[k] == 0));
        }
        // margins that are T
        std::vector<wide> given;
        for (const wide& x : b.margins(y)) {
          margins.push_back(static_cast<T>(x));
          given.push_back(margins.back());
        }
        margins[y] = static_cast<T>(nan); // of no effect
        const expectation f(given, y);
        const T of_margins = perdita::certified_margin_loss<T>()(
            matrix_view<const T>(margins.data(), 1, m), label, matrix_view<T>(dm.data(), 1, m));
        worst_value = worse(worst_value, relative(of_margins, f.value));
        for (std::size_t k = 0; k < n; ++k)
          worst = worse(worst, relative(T(-dm[k]), f.share[k]));
      }
  const double budget = sizeof(T) == 4 ? 2 : 64; // e^u in double, u to 60
  report_accuracy<T>("certified_cross_entropy, certified_margin_loss", "", in_epsilons,
                     {worst_value, worst, std::max(worst_value, worst) / budget});
  INFO(worst_value << " and " << worst);
  CHECK(worst_value < budget);
  CHECK(worst < budget);
}

TEST_CASE("certified: golden value", "[certified]") {
  using Catch::Matchers::WithinAbs;
  std::vector<double> dl, du;
  CHECK_THAT(run({.1, -.5, 1, 0}, {.6, .2, 1.4, .3}, 0, dl, du), WithinAbs(1.94532002409, 1e-11));
  CHECK_THAT(du[1], WithinAbs(0.157974757, 1e-9));
  CHECK_THAT(du[2], WithinAbs(0.524494664, 1e-9));
  CHECK_THAT(du[3], WithinAbs(0.174589107, 1e-9));
  CHECK(du[0] == 0);
}

TEST_CASE("certified: nothing between the bounds is cross-entropy", "[certified]") {
  random_numbers random(22);
  std::vector<double> dl, du, g;
  for (const row_kind kind :
       {row_kind::normal, row_kind::masked, row_kind::spread_500, row_kind::gap_60, row_kind::huge,
        row_kind::all_minus_1000, row_kind::equal})
    for (const index n : {index(1), index(30)}) {
      const auto x = make_scores(kind, n, n / 2, random);
      const int y = static_cast<int>(n / 2);
      g.assign(x.size(), 0);
      const double expected = perdita::cross_entropy<double>()(
          matrix_view<const double>(x.data(), 1, n), std::vector<int>{y},
          matrix_view<double>(g.data(), 1, n));
      const double value = run(x, x, y, dl, du);
      INFO(static_cast<int>(kind) << " " << n);
      CHECK(std::abs(value - expected) <= 1e-13 * expected);
      for (std::size_t k = 0; k < x.size(); ++k)
        CHECK(std::abs(dl[k] + du[k] - g[k]) <= 1e-12 * std::abs(g[k]));
    }
}

TEST_CASE("certified: no scores between the bounds are worse", "[certified]") {
  random_numbers random(23);
  std::vector<double> dl, du;
  const bounds<double> b(6, 2, 1, random);
  const double value = run(b.lower, b.upper, 2, dl, du);
  for (int repeat = 0; repeat < 200; ++repeat) {
    std::vector<double> z;
    for (std::size_t k = 0; k < 6; ++k)
      z.push_back(random.uniform(b.lower[k], b.upper[k]));
    CHECK(perdita::cross_entropy<double>()(matrix_view<const double>(z.data(), 1, 6),
                                           std::vector<int>{2}) <= value);
  }
}

TEST_CASE("certified: the gradients are the value's derivatives", "[certified]") {
  random_numbers random(24);
  bounds<double> b(5, 1, 0, random);
  std::vector<double> dl, du, a, c;
  run(b.lower, b.upper, 1, dl, du);
  const auto list = [](const auto& x) { return std::vector<double>(x.begin(), x.end()); };
  const std::vector<double> lower = b.lower, upper = b.upper;
  const auto of_lower = perdita::testing::check_gradient(
      [&](const auto& x) { return run(list(x), upper, 1, a, c); }, b.lower, dl);
  INFO(of_lower.message());
  CHECK(of_lower.ok);
  const auto of_upper = perdita::testing::check_gradient(
      [&](const auto& x) { return run(lower, list(x), 1, a, c); }, b.upper, du);
  INFO(of_upper.message());
  CHECK(of_upper.ok);
}

TEST_CASE("certified: special rows", "[certified]") {
  std::vector<double> dl, du;
  CHECK(run({3}, {4}, 0, dl, du) == 0); // one class
  CHECK((dl[0] == 0 && du[0] == 0));
  CHECK(run({1, -inf}, {2, -inf}, 0, dl, du) == 0);
  CHECK((dl[0] == 0 && du[0] == 0 && du[1] == 0));
  CHECK(std::isinf(run({-inf, 0, 0}, {5, 1, 1}, 0, dl, du))); // nothing is known of the label
  CHECK((dl[0] == -1 && du[1] == 0.5 && du[2] == 0.5 && du[0] == 0));
  for (const double bad : {nan, inf}) {
    CHECK(std::isnan(run({1, 0, 0}, {2, bad, 0}, 0, dl, du)));
    CHECK((std::isnan(dl[0]) && std::isnan(dl[2]) && std::isnan(du[0]) && std::isnan(du[2])));
    CHECK(std::isnan(run({bad, 0, 0}, {2, 1, 0}, 0, dl, du)));
    CHECK(!std::isnan(run({1, bad, bad}, {bad, 1, 0}, 0, dl, du))); // of no effect
  }
  CHECK(std::isnan(run({-inf, -inf}, {-inf, -inf}, 0, dl, du)));
  const double far = run({0, 0}, {0, -700}, 0, dl, du); // the label wins: all digits
  CHECK(std::abs(far / std::exp(-700) - 1) < 1e-13);
  CHECK(std::abs(-dl[0] / std::exp(-700) - 1) < 1e-13);
  CHECK(run({0, 0}, {0, 1e300}, 0, dl, du) == 1e300);
  CHECK((dl[0] == -1 && du[1] == 1));

  const auto margins = [&](const std::vector<double>& m) {
    const auto n = static_cast<index>(m.size());
    du = m; // in place
    const matrix_view<double> at(du.data(), 1, n);
    return perdita::certified_margin_loss<double>()(at, std::vector<int>{0}, at);
  };
  CHECK(margins({nan, inf}) == 0);
  CHECK((du[0] == 0 && du[1] == 0));
  CHECK(margins({5, 0, inf}) == std::log1p(1));
  CHECK((du[0] == 0 && du[1] == -0.5 && du[2] == 0));
  CHECK(std::isnan(margins({0, -inf})));
  CHECK(std::isnan(du[0]));
  CHECK(std::isnan(margins({0, nan})));
}

TEST_CASE("certified: rows, reductions, strides and threads", "[certified]") {
  random_numbers random(25);
  const index rows = 700, n = 130;
  std::vector<float> lower, upper;
  std::vector<std::int16_t> labels;
  for (index r = 0; r < rows; ++r) {
    labels.push_back(static_cast<std::int16_t>(r % 7 == 3 ? -100 : r % n));
    const bounds<float> b(static_cast<std::size_t>(n), static_cast<std::size_t>(r % n), 2, random);
    lower.insert(lower.end(), b.lower.begin(), b.lower.end());
    upper.insert(upper.end(), b.upper.begin(), b.upper.end());
  }
  const matrix_view<const float> lo(lower.data(), rows, n), up(upper.data(), rows, n);
  const auto size = lower.size();
  std::vector<float> dl(size), du(size), el(size), eu(size), values(static_cast<std::size_t>(rows));
  perdita::call_options<float> call;
  call.run_on = perdita::serial;
  call.values = values;
  const perdita::certified_cross_entropy<float> loss;
  const float value = loss(lo, up, labels, matrix_view<float>(dl.data(), rows, n),
                           matrix_view<float>(du.data(), rows, n), call);
  double sum = 0;
  int count = 0;
  for (index r = 0; r < rows; ++r) {
    sum += static_cast<double>(values[static_cast<std::size_t>(r)]);
    if (labels[static_cast<std::size_t>(r)] >= 0) {
      ++count;
    } else {
      CHECK(values[static_cast<std::size_t>(r)] == 0);
      CHECK(du[static_cast<std::size_t>(r * n)] == 0);
    }
  }
  CHECK(std::abs(static_cast<double>(value) - sum / count) < 1e-6);
  const threads_executor threads(3, task_order::shuffled);
  call.run_on = threads;
  // columns of a wider buffer, and transposed
  std::vector<float> transposed(size);
  for (index r = 0; r < rows; ++r)
    for (index c = 0; c < n; ++c)
      transposed[static_cast<std::size_t>(c * rows + r)] = up(r, c);
  CHECK(value == loss(lo, matrix_view<const float>(transposed.data(), rows, n, 1, rows), labels,
                      matrix_view<float>(el.data(), rows, n),
                      matrix_view<float>(eu.data(), rows, n), call));
  CHECK((dl == el && du == eu));
  call.accumulate = true;
  call.scale = 2;
  loss(lo, up, labels, matrix_view<float>(el.data(), rows, n),
       matrix_view<float>(eu.data(), rows, n), call);
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < size; ++i)
    wrong += std::abs(eu[i] - 3 * du[i]) > 1e-6F * du[i] || std::abs(el[i] - 3 * dl[i]) > 1e-8F;
  CHECK(wrong == 0);
}

TEST_CASE("certified: what is refused", "[certified]") {
  using Catch::Matchers::ContainsSubstring;
  const perdita::certified_cross_entropy<float> loss;
  std::vector<float> x(6), y(6), g(6, 7.0F), h(6, 7.0F);
  const std::vector<int> labels{0, 1};
  const matrix_view<float> lower(x.data(), 2, 3), upper(y.data(), 2, 3), d(g.data(), 2, 3),
      e(h.data(), 2, 3);
  CHECK_THROWS_WITH(loss(lower, matrix_view<float>(y.data(), 3, 2), labels),
                    ContainsSubstring("other bounds is 3"));
  CHECK_THROWS_WITH(loss(lower, upper, std::vector<int>{0, 3}),
                    ContainsSubstring("labels[1] is 3"));
  CHECK_THROWS_WITH(loss(lower, upper, labels, d, d), ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(loss(lower, upper, labels, upper, e), ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(loss(lower, upper, labels, lower, d), ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(loss(lower, upper, labels, d, lower), ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(loss(lower, upper, labels, matrix_view<float>(g.data(), 1, 3), e),
                    ContainsSubstring("gradient is 1"));
  CHECK_THROWS_WITH(loss(lower, upper, labels, d, matrix_view<float>(nullptr, 2, 3)),
                    ContainsSubstring("gradient"));
  CHECK_THROWS_WITH(perdita::certified_margin_loss<float>()(lower, std::vector<int>{0}),
                    ContainsSubstring("labels is 1"));
  CHECK((g == std::vector<float>(6, 7.0F) && h == g));
  CHECK(loss(matrix_view<float>(nullptr, 0, 3), matrix_view<float>(nullptr, 0, 3),
             std::vector<int>{}) == 0);
}

namespace {

template <class T> struct layer {
  index rows = 6, classes = 5, dims = 7;
  std::vector<T> center, radius, weights, bias, dc, dr, dw, db;
  std::vector<int> labels{0, 3, -100, 4, 1, 3};

  explicit layer(random_numbers& random) : dc(42, T(7)), dr(42, T(7)), dw(35, T(7)), db(5, T(7)) {
    const auto fill = [&](std::vector<T>& to, index n, double low, double high) {
      for (index i = 0; i < n; ++i)
        to.push_back(static_cast<T>(random.uniform(low, high)));
    };
    fill(center, rows * dims, -2, 2);
    fill(radius, rows * dims, 0, 0.3);
    fill(weights, classes * dims, -1, 1);
    fill(bias, classes, -1, 1);
  }
  T run(const perdita::certified_linear<T>& loss, const perdita::call_options<T>& call = {}) {
    return loss(in(center, rows), in(radius, rows), in(weights, classes), bias, labels,
                out(dc, rows), out(dr, rows), out(dw, classes), db, call);
  }
  matrix_view<const T> in(const std::vector<T>& m, index n) const { return {m.data(), n, dims}; }
  matrix_view<T> out(std::vector<T>& m, index n) { return {m.data(), n, dims}; }
  auto gradients() const { return std::vector<std::vector<T>>{dc, dr, dw, db}; }
};

/// The sum over rows in wide arithmetic, of inputs of which one is moved.
template <class T>
wide expect_layer(const layer<T>& in, int which, std::size_t at, const wide& by,
                  const wide& share = 0) {
  const auto get = [&](const std::vector<T>& m, int number, index i) {
    const auto k = static_cast<std::size_t>(i);
    return wide(m[k]) + (number == which && k == at ? by : wide(0));
  };
  wide total = 0;
  for (index r = 0; r < in.rows; ++r) {
    const index y = in.labels[static_cast<std::size_t>(r)];
    if (y < 0)
      continue;
    const auto difference = [&](index k, index j) {
      return wide(get(in.weights, 2, y * in.dims + j) - get(in.weights, 2, k * in.dims + j));
    };
    // Margins, the least of them and what the chords of e^−m say: constants, and sums of slopes.
    std::vector<wide> m, slopes(static_cast<std::size_t>(in.dims), 0);
    wide chords = 1;
    for (index k = 0; k < in.classes; ++k) {
      wide middle = get(in.bias, 3, y) - get(in.bias, 3, k), reach = 0;
      for (index j = 0; j < in.dims; ++j) {
        middle += difference(k, j) * get(in.center, 0, r * in.dims + j);
        reach += size_of(difference(k, j)) * get(in.radius, 1, r * in.dims + j);
      }
      m.push_back(middle - reach);
      if (k == y)
        continue;
      const wide least = exp(wide(-middle - reach)), most = exp(wide(reach - middle)),
                 slope = (most - least) / (2 * reach);
      chords += (most + least) / 2;
      for (index j = 0; j < in.dims; ++j)
        slopes[static_cast<std::size_t>(j)] += slope * difference(k, j);
    }
    for (index j = 0; share > 0 && j < in.dims; ++j)
      chords += size_of(slopes[static_cast<std::size_t>(j)]) * get(in.radius, 1, r * in.dims + j);
    const wide of_intervals = expectation(m, static_cast<std::size_t>(y)).value;
    total +=
        share == 0 ? of_intervals : log(wide(share * chords + (1 - share) * exp(of_intervals)));
  }
  return total;
}

} // namespace

TEMPLATE_TEST_CASE("certified_linear: value and all gradients", "[certified]", float, double) {
  using T = TestType;
  random_numbers random(26);
  const wide epsilon = std::numeric_limits<T>::epsilon();
  layer<T> in(random);
  double worst_value = 0, worst = 0;
  for (const double share : {0.0, 1.0, 0.375}) {
    const T value = in.run({{.crown_share = share, .reduction = reduction::sum}});
    worst_value = worse(worst_value, relative(value, expect_layer(in, 0, 0, 0, share)));
    const auto gradients = in.gradients();
    for (int which = 0; which < 4; ++which)
      for (std::size_t i = 0; i < gradients[static_cast<std::size_t>(which)].size(); ++i) {
        const wide step = ldexp(wide(1), -38); // errors of 1e-22 or so
        const auto at = [&](int n) { return expect_layer(in, which, i, wide(n * step), share); };
        const wide expected = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step);
        const wide got = gradients[static_cast<std::size_t>(which)][i];
        worst = worse(worst, static_cast<double>(size_of(wide(got - expected)) /
                                                 (epsilon * (size_of(expected) + 0.25))));
      }
  }
  report_accuracy<T>("certified_linear", "", in_epsilons_of_terms,
                     {worst_value, worst, std::max(worst_value / 8, worst / 16)});
  CHECK(worst_value < 8);
  INFO(worst);
  CHECK(worst < 16);
}

TEST_CASE(
    "certified_linear: an exact input is cross-entropy, and a box is no worse than its scores'",
    "[certified]") {
  random_numbers random(27);
  layer<double> in(random);
  const auto scores = [&](double sign) {
    std::vector<double> z;
    for (index r = 0; r < in.rows; ++r)
      for (index k = 0; k < in.classes; ++k) {
        z.push_back(in.bias[static_cast<std::size_t>(k)]);
        for (index j = 0; j < in.dims; ++j) {
          const double w = in.weights[static_cast<std::size_t>(k * in.dims + j)];
          z.back() += w * in.center[static_cast<std::size_t>(r * in.dims + j)] +
                      sign * std::abs(w) * in.radius[static_cast<std::size_t>(r * in.dims + j)];
        }
      }
    return z;
  };
  const auto lower = scores(-1), upper = scores(1), middle = scores(0);
  const auto view = [&](const std::vector<double>& z) {
    return matrix_view<const double>(z.data(), in.rows, in.classes);
  };
  const double boxed = in.run({});
  CHECK(boxed < perdita::certified_cross_entropy<double>()(view(lower), view(upper), in.labels));
  const double exact = perdita::cross_entropy<double>()(view(middle), in.labels);
  CHECK(boxed > exact);
  std::fill(in.radius.begin(), in.radius.end(), 0.0);
  CHECK(std::abs(in.run({}) - exact) < 1e-14);
}

TEST_CASE("certified_linear: chords are tighter than intervals, and still bounds", "[certified]") {
  random_numbers random(29);
  const auto of = [](double share) {
    return perdita::certified_linear<double>({.crown_share = share});
  };
  layer<double> in(random);
  for (const double grow : {0.01, 1.0, 10.0, 1000.0}) {
    layer<double> box = in;
    for (double& r : box.radius)
      r *= grow;
    const double chords = box.run(of(1)), half = box.run(of(0.5)), intervals = box.run(of(0));
    CHECK(chords < half);
    CHECK(half < intervals);
    CHECK(std::isfinite(chords));
    // No input in the box is worse, corners included.
    layer<double> point = box;
    std::fill(point.radius.begin(), point.radius.end(), 0.0);
    for (int repeat = 0; repeat < 100; ++repeat) {
      for (std::size_t i = 0; i < point.center.size(); ++i) {
        const double side = repeat % 2 == 0 ? random.uniform(-1, 1) : random.below(2) ? 1 : -1;
        point.center[i] = box.center[i] + side * box.radius[i];
      }
      CHECK(point.run(of(1)) <= chords);
      CHECK(point.run(of(0)) <= chords);
    }
  }
  // One rival has its worst corner to itself.
  layer<double> two = in;
  two.classes = 2;
  two.weights.resize(14);
  two.dw.resize(14);
  two.bias.resize(2);
  two.db.resize(2);
  two.labels = {0, 1, -100, 1, 0, 0};
  const double intervals = two.run(of(0));
  const auto expected = two.gradients();
  CHECK(std::abs(two.run(of(1)) - intervals) < 1e-14);
  for (std::size_t i = 0; i < 4; ++i)
    for (std::size_t j = 0; j < expected[i].size(); ++j)
      CHECK(std::abs(two.gradients()[i][j] - expected[i][j]) < 1e-14);
  // Nothing to be bounded: cross-entropy, its gradients too
  layer<double> exact = in, same = in;
  std::fill(exact.radius.begin(), exact.radius.end(), 0.0);
  same.radius = exact.radius;
  CHECK(exact.run(of(1)) == same.run(of(0)));
  CHECK((exact.dc == same.dc && exact.dw == same.dw && exact.db == same.db));
}

TEST_CASE("certified_linear: rows that are not numbers, or far away", "[certified]") {
  random_numbers random(30);
  for (const double share : {0.0, 0.5, 1.0}) {
    const perdita::certified_linear<double> loss(
        {.crown_share = share, .reduction = reduction::none});
    layer<double> in(random);
    const layer<double> plain = [&] {
      layer<double> copy = in;
      copy.run(loss);
      return copy;
    }();
    std::vector<double> values(6);
    perdita::call_options<double> call;
    call.values = values;
    for (const double bad : {nan, inf}) {
      layer<double> spoilt = in;
      spoilt.radius[9] = bad; // of row 1
      CHECK(std::isnan(spoilt.run(loss, call)));
      CHECK((std::isnan(values[1]) && values[2] == 0 && values[3] > 0));
      for (std::size_t i = 0; i < 42; ++i)
        CHECK((i / 7 == 1 ? std::isnan(spoilt.dc[i]) : spoilt.dc[i] == plain.dc[i]));
    }
    layer<double> far = in; // no rival comes near, or the rivals are all there is
    far.bias = {900, 0, 0, 0, 0};
    far.labels = {0, 0, -100, 0, 0, 0};
    CHECK(far.run(loss, call) == 0);
    far.labels = {1, 2, -100, 3, 4, 1};
    far.run(loss, call);
    CHECK((values[0] > 850 && std::isfinite(values[0])));
    CHECK(far.db[0] == 5);
    far = in; // a class that cannot be
    far.bias[0] = -inf;
    far.labels[0] = 1;
    CHECK(std::isfinite(far.run(loss, call)));
    CHECK((far.db[0] == 0 && far.dw[3] == 0 && std::isfinite(far.dw[10])));
  }
}

TEST_CASE("certified_linear: options, threads, and what is refused", "[certified]") {
  using Catch::Matchers::ContainsSubstring;
  random_numbers random(28);
  layer<float> a(random);
  layer<float> b = a;
  const std::vector<float> weights{1, 2, 5, 0, 0.5F, 1}, upstream{1, -1, 1, 2, 1, 1};
  std::vector<float> values(6, 7.0F);
  perdita::call_options<float> call;
  call.row_weights = weights;
  call.values = values;
  call.run_on = perdita::serial;
  const float value = a.run({}, call);
  const threads_executor threads(3, task_order::shuffled);
  call.run_on = threads;
  CHECK(value == b.run({}, call));
  CHECK(a.gradients() == b.gradients());
  CHECK((values[2] == 0 && values[3] == 0));
  float sum = 0;
  for (const float v : values)
    sum += v;
  CHECK(std::abs(sum / 4.5F - value) < 1e-6F);
  call.accumulate = true;
  call.scale = 2;
  b.run({}, call);
  for (std::size_t i = 0; i < 4; ++i)
    for (std::size_t j = 0; j < a.gradients()[i].size(); ++j)
      CHECK(std::abs(b.gradients()[i][j] - 3 * a.gradients()[i][j]) < 1e-6F);
  call = {};
  call.upstream = upstream;
  layer<float> c = a;
  c.run({{.reduction = reduction::none}}, call);
  layer<float> d = a;
  d.run({{.reduction = reduction::none}});
  for (std::size_t j = 0; j < 42; ++j)
    CHECK(std::abs(c.dc[j] - upstream[j / 7] * d.dc[j]) < 1e-6F);

  const auto before = d.gradients();
  const auto refuse = [&](auto change, const char* message) {
    layer<float> e = d;
    change(e);
    CHECK_THROWS_WITH(e.run({}), ContainsSubstring(message));
    CHECK(e.gradients()[2] == before[2]);
  };
  for (const double bad : {-0.5, 1.5, nan})
    CHECK_THROWS_WITH(perdita::certified_linear<float>({.crown_share = bad}),
                      ContainsSubstring("crown_share is"));
  refuse([](auto& e) { e.labels[1] = 5; }, "labels[1] is 5");
  refuse([](auto& e) { e.labels.pop_back(); }, "labels is 5");
  refuse([](auto& e) { e.bias.pop_back(); }, "size of bias is 4");
  refuse([](auto& e) { e.db.pop_back(); }, "columns of d_bias is 4");
  CHECK_THROWS_WITH(perdita::certified_linear<float>()(d.in(d.center, 6), d.in(d.radius, 5),
                                                       d.in(d.weights, 5), d.bias, d.labels),
                    ContainsSubstring("rows of radius is 5"));
  CHECK_THROWS_WITH(perdita::certified_linear<float>()(
                        d.in(d.center, 6), d.in(d.radius, 6), d.in(d.weights, 5), d.bias, d.labels,
                        d.out(d.dc, 6), d.out(d.dc, 6), d.out(d.dw, 5), d.db),
                    ContainsSubstring("overlaps"));
}

} // namespace perdita_tests
