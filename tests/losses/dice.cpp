// SPDX-License-Identifier: MIT

// Formula sheet 16: what two sets have in common. The references are the textbook's quotients, in
// wide arithmetic.

#include <perdita/dice.hpp>

#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include <perdita/testing/gradient_check.hpp>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/normaliser.hpp"
#include "support/numbers.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

using Catch::Matchers::ContainsSubstring;
using perdita::index;
using perdita::matrix_view;
using perdita::reduction;
constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

struct expectation {
  wide value;
  std::vector<wide> slopes, sizes; ///< sizes: of the terms that make a slope
};

template <class T>
expectation expect_dice(const std::vector<T>& p, const std::vector<T>& t, const wide& s,
                        bool squared) {
  wide shared = 0, all = s;
  for (std::size_t i = 0; i < p.size(); ++i) {
    const wide a = p[i], b = t[i];
    shared += a * b;
    all += squared ? wide(a * a + b * b) : wide(a + b);
  }
  const wide over = 2 * shared + s;
  expectation e;
  e.value = 1 - over / all;
  for (std::size_t i = 0; i < p.size(); ++i) {
    const wide own = squared ? wide(2 * wide(p[i])) : wide(1);
    e.slopes.push_back((own * over - 2 * wide(t[i]) * all) / (all * all));
    e.sizes.push_back(
        squared ? wide(2 * size_of(wide(wide(p[i]) - t[i])) / all + own * size_of(e.value) / all)
                : wide((1 + wide(t[i])) / all));
  }
  return e;
}

template <class T>
expectation expect_tversky(const std::vector<T>& p, const std::vector<T>& t, const wide& a,
                           const wide& g, const wide& s) {
  wide tp = 0, fn = 0, fp = 0;
  for (std::size_t i = 0; i < p.size(); ++i) {
    tp += wide(p[i]) * wide(t[i]);
    fn += (1 - wide(p[i])) * wide(t[i]);
    fp += wide(p[i]) * (1 - wide(t[i]));
  }
  const wide d = tp + s + a * fn + (1 - a) * fp, ratio = (tp + s) / d;
  expectation e;
  e.value = pow(wide(1 - ratio), g);
  const wide steep = -g * pow(wide(1 - ratio), wide(g - 1));
  for (std::size_t i = 0; i < p.size(); ++i) {
    e.slopes.push_back(steep * (wide(t[i]) * d - (tp + s) * (1 - a)) / (d * d));
    e.sizes.push_back(size_of(steep) / d);
  }
  return e;
}

template <class T> struct masks {
  std::vector<T> p, t;
  masks(std::size_t n, bool soft, random_numbers& random) {
    for (std::size_t i = 0; i < n; ++i) {
      const double label = random.below(3) == 0 ? 1 : 0;
      t.push_back(static_cast<T>(soft ? random.uniform(0, 1) : label));
      p.push_back(static_cast<T>(random.uniform(0, 1)));
    }
  }
};

template <class T> struct worst_errors {
  double value = 0, slope = 0;
  void add(const wide& got, const std::vector<T>& gradient, const expectation& e) {
    const wide epsilon = std::numeric_limits<T>::epsilon();
    value = std::max(
        value, static_cast<double>(size_of(wide(got - e.value)) / (epsilon * size_of(e.value))));
    for (std::size_t i = 0; i < gradient.size(); ++i)
      slope = std::max(slope, static_cast<double>(size_of(wide(gradient[i] - e.slopes[i])) /
                                                  (epsilon * e.sizes[i])));
  }
  void report(const char* loss, double value_budget, double slope_budget) const {
    report_accuracy<T>(loss, "", in_epsilons_of_terms,
                       {value, slope, std::max(value / value_budget, slope / slope_budget)});
  }
};

/// One row with one value.
template <class T, class Loss>
T call(const Loss& loss, const std::vector<T>& p, const std::vector<T>& t, std::vector<T>& g) {
  const auto n = static_cast<index>(p.size());
  g.assign(p.size(), T(7));
  return loss(matrix_view<const T>(p.data(), 1, n), matrix_view<const T>(t.data(), 1, n),
              matrix_view<T>(g.data(), 1, n));
}

} // namespace

TEMPLATE_TEST_CASE("dice: value and gradient", "[dice]", float, double) {
  using T = TestType;
  random_numbers random(5);
  worst_errors<T> worst;
  for (const bool squared : {false, true})
    for (const double s : {0.0, 1.0, 0.125})
      for (const bool soft : {false, true})
        for (const std::size_t n : {1U, 4U, 17U, 511U, 513U, 9000U}) {
          const masks<T> m(n, soft, random);
          std::vector<T> g;
          const expectation e = expect_dice(m.p, m.t, s, squared);
          const perdita::dice<T> loss({.smoothing = static_cast<T>(s), .squared = squared});
          worst.add(call(loss, m.p, m.t, g), g, e);
        }
  worst.report("dice", 4, 4);
  INFO(worst.value << " and " << worst.slope);
  CHECK(worst.value < 4);
  CHECK(worst.slope < 4);
}

TEMPLATE_TEST_CASE("tversky: value and gradient", "[dice]", float, double) {
  using T = TestType;
  random_numbers random(6);
  worst_errors<T> worst;
  for (const T a : {T(0), T(0.5), T(0.7), T(1)})
    for (const T g : {T(0.75), T(1), T(2)})
      for (const double s : {0.0, 1.0})
        for (const bool soft : {false, true})
          for (const std::size_t n : {17U, 700U, 3000U}) {
            const masks<T> m(n, soft, random);
            std::vector<T> slopes;
            const perdita::tversky<T> loss(
                {.alpha = a, .exponent = g, .smoothing = static_cast<T>(s)});
            worst.add(call(loss, m.p, m.t, slopes), slopes, expect_tversky(m.p, m.t, a, g, s));
          }
  worst.report("tversky, mip_tversky", 6, 8);
  INFO(worst.value << " and " << worst.slope);
  CHECK(worst.value < 6);
  CHECK(worst.slope < 8);
}

TEMPLATE_TEST_CASE("dice: digits where predictions are almost right", "[dice]", float, double) {
  using T = TestType;
  worst_errors<T> worst;
  for (const double off : {1e-5, 1e-12}) {
    const std::vector<T> t{1, 0, 1, 0, 0}, p{1, static_cast<T>(off), 1, 0, 0};
    std::vector<T> g;
    worst.add(call(perdita::dice<T>(), p, t, g), g, expect_dice(p, t, 1, false));
    worst.add(call(perdita::tversky<T>({.alpha = T(0.75), .exponent = 2}), p, t, g), g,
              expect_tversky(p, t, 0.75, 2, 1));
  }
  INFO(worst.value << " and " << worst.slope);
  CHECK(worst.value < 4);
  CHECK(worst.slope < 4);
}

TEST_CASE("dice: golden values", "[dice]") {
  using Catch::Matchers::WithinAbs;
  const std::vector<double> p{.9, .2, .6, .1}, t{1, 0, 1, 1};
  std::vector<double> g;
  CHECK_THAT(call(perdita::dice<double>(), p, t, g), WithinAbs(0.275862068966, 1e-11));
  CHECK_THAT(g[0], WithinAbs(-0.219976219, 1e-8));
  CHECK_THAT(g[1], WithinAbs(0.124851367, 1e-8));
  CHECK_THAT(call(perdita::tversky<double>(), p, t, g), WithinAbs(0.390794971391, 1e-11));
  CHECK_THAT(g[3], WithinAbs(-0.22143259, 1e-8));
  CHECK_THAT(g[1], WithinAbs(0.0603907064, 1e-8));
  std::vector<double> other;
  const double half =
      call(perdita::tversky<double>({.alpha = .5, .exponent = 1, .smoothing = 2}), p, t, other);
  CHECK_THAT(half, WithinAbs(call(perdita::dice<double>({.smoothing = 4}), p, t, g), 1e-15));
  for (std::size_t i = 0; i < 4; ++i)
    CHECK_THAT(other[i], WithinAbs(g[i], 1e-15));
}

TEST_CASE("dice: the gradient is the derivative of the value", "[dice]") {
  random_numbers random(9);
  masks<double> m(12, true, random);
  std::vector<double> g;
  const auto check = [&](const auto& loss) {
    call(loss, m.p, m.t, g);
    const auto value = [&](const auto& p) {
      std::vector<double> unused;
      return call(loss, std::vector<double>(p.begin(), p.end()), m.t, unused);
    };
    const auto report = perdita::testing::check_gradient(value, m.p, g);
    INFO(report.message());
    CHECK(report.ok);
  };
  check(perdita::dice<double>());
  check(perdita::dice<double>({.squared = true}));
  check(perdita::tversky<double>());
  check(perdita::mip_tversky<double>({.depth = 2, .height = 3, .width = 2, .axis = 1}));
}

TEST_CASE("dice: edges", "[dice]") {
  std::vector<double> g;
  const std::vector<double> zeros(3, 0.0), ones(3, 1.0);
  for (const bool squared : {false, true}) { // nothing there, nothing predicted
    CHECK(call(perdita::dice<double>({.smoothing = 0, .squared = squared}), zeros, zeros, g) == 0);
    CHECK(g == zeros);
  }
  CHECK(call(perdita::tversky<double>({.smoothing = 0}), zeros, zeros, g) == 0);
  CHECK(g == zeros);
  CHECK(call(perdita::tversky<double>(), ones, ones, g) == 0); // TI = 1: 0, not infinite
  CHECK(g == zeros);
  CHECK(call(perdita::tversky<double>({.exponent = 1}), ones, ones, g) == 0);
  CHECK(std::abs(g[1] + 0.7 / 4) < 1e-16); // and where it is finite, what it is
  CHECK(call(perdita::dice<double>({.smoothing = 0}), ones, zeros, g) == 1);
  for (const double bad : {nan, inf, -inf})
    for (const double t : {0.0, 0.5, 1.0}) {
      for (const bool squared : {false, true}) {
        CHECK(std::isnan(
            call(perdita::dice<double>({.squared = squared}), {bad, 0.5, 0.25}, {t, 1, 0}, g)));
        CHECK((std::isnan(g[0]) && std::isnan(g[1]) && std::isnan(g[2])));
      }
      for (const double a : {0.0, 0.7, 1.0})
        CHECK(std::isnan(call(perdita::tversky<double>({.alpha = a, .exponent = 1}),
                              {bad, 0.5, 0.25}, {t, 1, 0}, g)));
    }
  // Outside [0, 1]: |1 − TI|^γ
  std::vector<double> p{1.5, 1.25}, t{1, 1};
  const expectation e = expect_tversky(p, t, 0.75, 2, 1);
  const double value = call(perdita::tversky<double>({.alpha = 0.75, .exponent = 2}), p, t, g);
  CHECK(std::abs(value - static_cast<double>(e.value)) < 1e-15);
  CHECK(std::abs(g[0] - static_cast<double>(e.slopes[0])) < 1e-15);
}

TEST_CASE("dice: rows, reductions, layouts and options", "[dice]") {
  random_numbers random(10);
  const index rows = 5, cols = 600;
  const masks<float> m(static_cast<std::size_t>(rows * cols), false, random);
  const matrix_view<const float> p(m.p.data(), rows, cols), t(m.t.data(), rows, cols);
  const auto size = m.p.size();
  std::vector<float> each(5), g(size), h(size), one;

  perdita::tversky<float> none({.reduction = reduction::none});
  const std::vector<float> weights{1, 2, 0, 1, 0.5F}, upstream{1, -1, 3, 0.5F, 2};
  perdita::call_options<float> options;
  options.values = each;
  options.row_weights = weights;
  options.upstream = upstream;
  options.scale = 2;
  none(p, t, matrix_view<float>(g.data(), rows, cols), options);
  double sum = 0;
  for (std::size_t r = 0; r < 5; ++r) {
    const auto at = [&](const std::vector<float>& x) {
      return std::vector<float>(x.begin() + static_cast<std::ptrdiff_t>(r * 600),
                                x.begin() + static_cast<std::ptrdiff_t>(r * 600 + 600));
    };
    const float value = call(none, at(m.p), at(m.t), one) * weights[r];
    CHECK(std::abs(each[r] - value) <= 1e-7F);
    sum += static_cast<double>(value);
    for (std::size_t i = 0; i < 600; ++i)
      CHECK(std::abs(at(g)[i] - 2 * weights[r] * upstream[r] * one[i]) <= 1e-9F);
  }
  options = {};
  options.row_weights = weights;
  CHECK(std::abs(static_cast<double>(perdita::tversky<float>()(p, t, options)) - sum / 4.5) < 1e-7);

  const perdita::dice<float> all({.over_batch = true});
  const float value = all(p, t, matrix_view<float>(g.data(), rows, cols));
  const expectation e = expect_dice(m.p, m.t, 1, false);
  worst_errors<float> worst;
  worst.add(value, g, e);
  CHECK((worst.value < 4 && worst.slope < 4));

  // The same numbers in columns, in place, and added to
  for (const bool over_batch : {false, true})
    for (const bool squared : {false, true}) {
      const perdita::dice<float> loss({.squared = squared, .over_batch = over_batch});
      const float plain = loss(p, t, matrix_view<float>(g.data(), rows, cols));
      std::vector<float> columns(size), labels(size);
      for (index r = 0; r < rows; ++r)
        for (index c = 0; c < cols; ++c) {
          columns[static_cast<std::size_t>(c * rows + r)] = p(r, c);
          labels[static_cast<std::size_t>(c * rows + r)] = t(r, c);
        }
      const matrix_view<float> in_place(columns.data(), rows, cols, 1, rows);
      CHECK(plain ==
            loss(in_place, matrix_view<const float>(labels.data(), rows, cols, 1, rows), in_place));
      h.assign(size, 1.0F);
      perdita::call_options<float> add;
      add.accumulate = true;
      CHECK(plain == loss(p, t, matrix_view<float>(h.data(), rows, cols), add));
      for (index r = 0; r < rows; ++r)
        for (index c = 0; c < cols; ++c) {
          const auto i = static_cast<std::size_t>(r * cols + c);
          CHECK(in_place(r, c) == g[i]);
          CHECK(h[i] == 1.0F + g[i]);
        }
    }
}

TEST_CASE("dice: bits do not depend on who does what", "[dice]") {
  random_numbers random(12);
  const index rows = 3, cols = 50000;
  const masks<float> m(static_cast<std::size_t>(rows * cols), true, random);
  const matrix_view<const float> p(m.p.data(), rows, cols), t(m.t.data(), rows, cols);
  const auto same = [&](const auto& loss) {
    std::vector<float> first(m.p.size()), other(m.p.size());
    perdita::call_options<float> call;
    call.run_on = perdita::serial;
    const float value = loss(p, t, matrix_view<float>(first.data(), rows, cols), call);
    for (const std::size_t threads : {2U, 3U}) {
      const threads_executor shuffled(threads, task_order::shuffled);
      perdita::workspace memory;
      call.run_on = shuffled;
      call.memory = &memory;
      CHECK(value == loss(p, t, matrix_view<float>(other.data(), rows, cols), call));
      CHECK(first == other);
    }
  };
  same(perdita::dice<float>());
  same(perdita::tversky<float>({.over_batch = true}));
  same(perdita::mip_tversky<float>({.depth = 5, .height = 10, .width = 1000}));
  same(perdita::mip_tversky<float>({.depth = 5, .height = 1000, .width = 10, .axis = 2}));
}

TEMPLATE_TEST_CASE("dice of squares: nothing there, and nothing to be done about it", "[dice]",
                   float, double) {
  using T = TestType;
  for (const double size : {1., 1e-2, 1e-5, 1e-10, 1e-18}) {
    std::vector<T> p(37), t(37), g(37, 9);
    for (std::size_t i = 0; i < 37; ++i)
      p[i] = static_cast<T>(size * (1 + 0.1 * static_cast<double>(i)));
    const perdita::dice<T> loss({.smoothing = 0, .squared = true});
    CHECK(loss(matrix_view<const T>(p.data(), 1, 37), matrix_view<const T>(t.data(), 1, 37),
               matrix_view<T>(g.data(), 1, 37)) == 1);
    CHECK(g == std::vector<T>(37, T(0)));
  }
}

TEMPLATE_TEST_CASE("dice, tversky: predictions whose reciprocals overflow", "[dice]", float,
                   double) {
  using T = TestType;
  const T least = std::numeric_limits<T>::denorm_min();
  std::vector<T> g;
  for (const T size : {least, 9 * least, std::numeric_limits<T>::min() / 64}) {
    const std::vector<T> p{size, 2 * size, size}, none{0, 0, 0}, zeros(3, 0);
    CHECK(call(perdita::dice<T>({.smoothing = 0}), p, none, g) == 1);
    CHECK(g == zeros);
    for (const T exponent : {T(0.75), T(1), T(2)}) {
      CHECK(call(perdita::tversky<T>({.exponent = exponent, .smoothing = 0}), p, none, g) == 1);
      CHECK(g == zeros);
    }
  }
}

TEST_CASE("mip_tversky: the largest voxel along an axis", "[dice]") {
  random_numbers random(13);
  const index shape[] = {4, 5, 600};
  const index rows = 2, voxels = shape[0] * shape[1] * shape[2];
  masks<double> m(static_cast<std::size_t>(rows * voxels), false, random);
  for (double& x : m.p) // many ties
    x = std::floor(x * 6) / 8;
  const matrix_view<const double> p(m.p.data(), rows, voxels), t(m.t.data(), rows, voxels);
  for (int axis = 0; axis < 3; ++axis) {
    const index pixels = voxels / shape[axis];
    // where a voxel is seen
    const auto pixel = [&](index v) {
      const index z = v / (shape[1] * shape[2]), y = v / shape[2] % shape[1], x = v % shape[2];
      return axis == 0 ? y * shape[2] + x : axis == 1 ? z * shape[2] + x : z * shape[1] + y;
    };
    const auto size = static_cast<std::size_t>(rows * pixels);
    std::vector<double> top(size, -1), label(size, -1), ties(size, 0), slope(size), g(m.p.size());
    const auto each = [&](auto f) {
      for (index r = 0; r < rows; ++r)
        for (index v = 0; v < voxels; ++v)
          f(static_cast<std::size_t>(r * voxels + v),
            static_cast<std::size_t>(r * pixels + pixel(v)));
    };
    each([&](std::size_t v, std::size_t i) {
      top[i] = std::max(top[i], m.p[v]);
      label[i] = std::max(label[i], m.t[v]);
    });
    each([&](std::size_t v, std::size_t i) { ties[i] += m.p[v] == top[i] ? 1 : 0; });
    const perdita::tversky<double> flat({.reduction = reduction::sum});
    const double expected = flat(matrix_view<const double>(top.data(), rows, pixels),
                                 matrix_view<const double>(label.data(), rows, pixels),
                                 matrix_view<double>(slope.data(), rows, pixels));
    const perdita::mip_tversky<double> loss({.depth = shape[0],
                                             .height = shape[1],
                                             .width = shape[2],
                                             .axis = axis,
                                             .reduction = reduction::sum});
    CHECK(loss(p, t, matrix_view<double>(g.data(), rows, voxels)) == expected);
    CHECK(loss(p, t) == expected);
    std::size_t wrong = 0;
    each([&](std::size_t v, std::size_t i) {
      wrong += g[v] != (m.p[v] == top[i] ? slope[i] / ties[i] : 0);
    });
    CHECK(wrong == 0);
    // labels that are projections already; added to, and in place
    std::vector<double> h(m.p.size(), 1), q = m.p;
    perdita::call_options<double> add;
    add.accumulate = true;
    const matrix_view<const double> projected(label.data(), rows, pixels);
    CHECK(loss(p, projected, matrix_view<double>(h.data(), rows, voxels), add) == expected);
    const matrix_view<double> in_place(q.data(), rows, voxels);
    CHECK(loss(in_place, projected, in_place) == expected);
    CHECK(q == g);
    wrong = 0;
    each([&](std::size_t v, std::size_t) { wrong += h[v] != 1 + g[v]; });
    CHECK(wrong == 0);
  }
  const perdita::mip_tversky<double> small({.depth = 2, .height = 1, .width = 2});
  std::vector<double> g;
  CHECK(std::isnan(call(small, {0.5, nan, 0.25, 0.5}, {1, 0, 0, 0}, g)));
  for (const double x : g)
    CHECK(std::isnan(x));
}

TEMPLATE_TEST_CASE("dice: label maps are one-hot targets that are not made", "[dice]",
                   unsigned char, int, std::int64_t) {
  using L = TestType;
  random_numbers random(14);
  const index images = 3, classes = 4, pixels = 700, rows = images * classes;
  const auto size = static_cast<std::size_t>(rows * pixels);
  const masks<float> m(size, false, random);
  std::vector<L> map(static_cast<std::size_t>(images * pixels)), turned(map.size());
  for (L& label : map)
    label = static_cast<L>(random.below(5)); // 4 is ignored
  std::vector<float> with_holes = m.p, hot(size), g(size), h(size), each(12), other(12);
  for (index r = 0; r < rows; ++r)
    for (index c = 0; c < pixels; ++c) {
      const L label = map[static_cast<std::size_t>(r / classes * pixels + c)];
      const auto at = static_cast<std::size_t>(r * pixels + c);
      turned[static_cast<std::size_t>(c * images + r / classes)] = label;
      hot[at] = label == r % classes ? 1.0F : 0.0F;
      if (label == 4)
        with_holes[at] = 0;
    }
  std::vector<float> given = m.p;
  for (std::size_t i = 0; i < size; ++i) // what is predicted where nothing counts is of no effect
    if (with_holes[i] == 0 && i % 3 == 0)
      given[i] = static_cast<float>(i % 2 == 0 ? nan : inf);
  const matrix_view<const float> p(given.data(), rows, pixels), q(with_holes.data(), rows, pixels),
      t(hot.data(), rows, pixels);
  const matrix_view<const L> labels(map.data(), images, pixels),
      columns(turned.data(), images, pixels, 1, images);
  const auto check = [&](const auto& loss, bool one) {
    perdita::call_options<float> call, plain;
    call.values = one ? perdita::vector_view<float>(each.data(), 1) : each;
    plain.values = one ? perdita::vector_view<float>(other.data(), 1) : other;
    std::vector<float> weights;
    for (index r = 0; r < (one ? 1 : rows); ++r) // without the background
      weights.push_back(!one && r % classes == 0 ? 0.0F : 1.5F);
    call.row_weights = plain.row_weights = weights;
    const float value = loss(q, t, matrix_view<float>(g.data(), rows, pixels), plain);
    CHECK(loss(p, labels, matrix_view<float>(h.data(), rows, pixels), call) == value);
    CHECK(each == other);
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < size; ++i)
      wrong += h[i] != (with_holes[i] == 0 ? 0 : g[i]);
    CHECK(wrong == 0);
    CHECK(loss(p, columns, call) == value);
    // Added to, by several threads
    const threads_executor threads(3, task_order::shuffled);
    std::vector<float> sum(size, 1.0F);
    call.run_on = threads;
    call.accumulate = true;
    CHECK(loss(p, labels, matrix_view<float>(sum.data(), rows, pixels), call) == value);
    for (std::size_t i = 0; i < size; ++i)
      wrong += sum[i] != 1.0F + h[i];
    CHECK(wrong == 0);
  };
  for (const bool one : {false, true}) {
    check(perdita::dice<float>({.over_batch = one, .ignore_index = 4}), one);
    check(perdita::dice<float>({.squared = true, .over_batch = one, .ignore_index = 4}), one);
    check(perdita::tversky<float>({.over_batch = one, .ignore_index = 4}), one);
  }
}

TEST_CASE("dice: masks of integers, and label maps that are refused", "[dice]") {
  // The golden values' mask
  const std::vector<double> p{.9, .2, .6, .1};
  std::vector<short> mask{1, 0, 1, 1};
  std::vector<double> g(4, 7);
  const matrix_view<const double> row(p.data(), 1, 4);
  const matrix_view<short> of_row(mask.data(), 1, 4);
  const matrix_view<double> gradient(g.data(), 1, 4);
  using Catch::Matchers::WithinAbs;
  CHECK_THAT(perdita::dice<double>()(row, of_row, gradient), WithinAbs(0.275862068966, 1e-11));
  CHECK_THAT(g[1], WithinAbs(0.124851367, 1e-8));
  CHECK_THAT(g[2], WithinAbs(-0.219976219, 1e-8));
  mask[1] = -100; // nothing there: U = 1.6 + 3 + 1
  CHECK_THAT(perdita::dice<double>()(row, of_row, gradient), WithinAbs(1 - 4.2 / 5.6, 1e-15));
  CHECK(g[1] == 0);

  g.assign(4, 7);
  const perdita::dice<double> loss;
  mask[1] = 2;
  CHECK_THROWS_WITH(loss(row, of_row, gradient),
                    ContainsSubstring("labels[1] is 2, expected 0 to 1, or ignore_index -100"));
  std::vector<std::uint64_t> large{0, std::uint64_t(-100), 0, 1}; // not −100
  CHECK_THROWS_WITH(loss(row, matrix_view<std::uint64_t>(large.data(), 1, 4), gradient),
                    ContainsSubstring("labels[1] is 18446744073709551516"));
  const matrix_view<const double> two(p.data(), 2, 2);
  const matrix_view<short> wide_map(mask.data(), 1, 2), tall(mask.data(), 3, 2),
      narrow(mask.data(), 1, 1), missing(nullptr, 1, 2);
  CHECK_THROWS_WITH(loss(two, wide_map), ContainsSubstring("labels[1] is 2, expected 0 to 1"));
  CHECK_THROWS_WITH(loss(two, tall), ContainsSubstring("rows of the predictions is 2"));
  CHECK_THROWS_WITH(loss(matrix_view<const double>(p.data(), 0, 2), tall),
                    ContainsSubstring("rows of the predictions is 0"));
  CHECK_THROWS_WITH(loss(two, narrow), ContainsSubstring("shape of the labels is 1 x 1"));
  CHECK_THROWS_WITH(loss(two, missing), ContainsSubstring("targets"));
  CHECK_THROWS_WITH(loss(row, of_row, matrix_view<double>(g.data(), 1, 3)),
                    ContainsSubstring("shape of the gradient"));
  CHECK(g == std::vector<double>(4, 7));
  CHECK(loss(matrix_view<const double>(p.data(), 0, 2), matrix_view<short>(mask.data(), 0, 2)) ==
        0);
}

TEST_CASE("dice: what is refused", "[dice]") {
  using dice = perdita::dice<float>;
  using tversky = perdita::tversky<float>;
  using mip = perdita::mip_tversky<float>;
  CHECK_THROWS_WITH(dice({.smoothing = -1}), ContainsSubstring("smoothing is -1"));
  CHECK_THROWS_WITH(tversky({.alpha = 1.5F}), ContainsSubstring("alpha is 1.5"));
  CHECK_THROWS_WITH(tversky({.exponent = 0}), ContainsSubstring("exponent is 0"));
  CHECK_THROWS_WITH(mip({.depth = 0}), ContainsSubstring("depth is 0"));
  CHECK_THROWS_WITH(mip({.axis = 3}), ContainsSubstring("axis is 3"));
  std::vector<float> x(12), g(12, 7.0F);
  const matrix_view<float> in(x.data(), 2, 6);
  CHECK_THROWS_WITH(dice()(in, matrix_view<float>(x.data(), 3, 4)),
                    ContainsSubstring("shape of the targets is 3 x 4, expected 2 x 6"));
  CHECK_THROWS_WITH(dice()(in, in, matrix_view<float>(g.data(), 2, 5)),
                    ContainsSubstring("shape of the gradient is 2 x 5"));
  CHECK_THROWS_WITH(dice()(in, matrix_view<float>(nullptr, 2, 6)), ContainsSubstring("targets"));
  CHECK_THROWS_WITH(mip({.depth = 5})(in, in),
                    ContainsSubstring("columns of the predictions is 6"));
  CHECK_THROWS_WITH(dice()(matrix_view<float>(x.data(), 1, 6), matrix_view<float>(g.data(), 1, 6),
                           matrix_view<float>(x.data() + 1, 1, 6)),
                    ContainsSubstring("overlaps"));
  perdita::call_options<float> call;
  call.accumulate = true;
  const matrix_view<float> target(g.data(), 2, 6);
  CHECK_THROWS_WITH(dice()(in, target, in, call), ContainsSubstring("accumulate"));
  call = {};
  call.entropy = g;
  CHECK_THROWS(dice()(in, target, call));
  CHECK(g == std::vector<float>(12, 7.0F));
  CHECK(dice()(matrix_view<float>(nullptr, 0, 6), matrix_view<float>(nullptr, 0, 6)) == 0);
  CHECK(dice({.over_batch = true})(matrix_view<float>(nullptr, 0, 6),
                                   matrix_view<float>(nullptr, 0, 6)) == 0);
}

TEST_CASE("dice: what the mean divides by", "[dice]") {
  random_numbers random(12);
  const masks<double> m(60, false, random);
  const matrix_view<const double> p(m.p.data(), 3, 20), t(m.t.data(), 3, 20);
  const auto of = [&](const auto& loss, const perdita::call_options<double>& call) {
    std::vector<double> g(60);
    const double value = loss(p, t, matrix_view<double>(g.data(), 3, 20), call);
    return all_of(value, g);
  };
  check_normaliser<double>([&](perdita::reduction how, const perdita::call_options<double>& call) {
    return of(perdita::dice<double>({.reduction = how}), call);
  });
  check_normaliser<double>([&](perdita::reduction how, const perdita::call_options<double>& call) {
    return of(perdita::tversky<double>({.reduction = how}), call);
  });
}

} // namespace perdita_tests
