// SPDX-License-Identifier: MIT

// Formula sheet 7.

#include <perdita/h_calibration.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
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

template <class T> struct batch {
  index rows, cols;
  std::vector<T> p;
  std::vector<int> labels;

  batch(index n, index classes, std::uint64_t seed) : rows(n), cols(classes) {
    random_numbers random(seed);
    for (index r = 0; r < n; ++r) {
      std::vector<double> e;
      double sum = 0;
      for (index c = 0; c < classes; ++c) {
        e.push_back(std::exp(2 * random.normal()));
        sum += e.back();
      }
      for (const double x : e)
        p.push_back(static_cast<T>(x / sum));
      labels.push_back(static_cast<int>(random.below(static_cast<std::uint64_t>(classes))));
    }
  }
  matrix_view<const T> view() const { return {p.data(), rows, cols}; }
};

struct expectation {
  wide value = 0;
  std::vector<wide> gradient;
  wide largest = 0; ///< of the gradient
};

/// Nearest centres, one probability at a time.
std::vector<int> clusters_of(const std::vector<wide>& p, int count) {
  std::vector<wide> centres;
  const auto n = p.size();
  for (int k = 0; k < count; ++k)
    centres.push_back(
        p[static_cast<std::size_t>(2 * k + 1) * n / (2 * static_cast<std::size_t>(count))]);
  std::vector<int> in(n);
  for (int step = 0; step < 25; ++step) {
    for (std::size_t t = 0; t < n; ++t)
      for (int k = in[t] = 0; k < count; ++k)
        if (size_of(wide(p[t] - centres[std::size_t(k)])) <
            size_of(wide(p[t] - centres[std::size_t(in[t])])))
          in[t] = k;
    for (int k = 0; k < count; ++k) {
      wide sum = 0, members = 0;
      for (std::size_t t = 0; t < n; ++t)
        if (in[t] == k) {
          sum += p[t];
          members += 1;
        }
      if (members > 0)
        centres[std::size_t(k)] = sum / members;
    }
  }
  return in;
}

/// Term by term; no two probabilities of a set are equal.
template <class T>
expectation expect(const batch<T>& b, const typename perdita::h_calibration<T>::options& o) {
  expectation out;
  out.gradient.assign(b.p.size(), 0);
  const int events = o.leave_class_out ? static_cast<int>(b.cols) : 1;
  const wide width = static_cast<double>(o.window + 1);
  for (int e = 0; e < events; ++e) {
    std::vector<std::pair<wide, std::size_t>> pairs;
    for (std::size_t i = 0; i < b.p.size(); ++i) {
      const int y = b.labels[i / std::size_t(b.cols)];
      if (y != o.ignore_index && !(o.leave_class_out && y == e))
        pairs.emplace_back(b.p[i], i);
    }
    std::sort(pairs.begin(), pairs.end());
    if (pairs.empty())
      continue;
    std::vector<wide> p;
    for (const auto& pair : pairs)
      p.push_back(pair.first);
    const auto count = static_cast<int>(o.clusters);
    const auto in = count > 0 ? clusters_of(p, count) : std::vector<int>(p.size());
    const auto n = static_cast<index>(p.size());
    for (index t = 0; t < n; ++t) {
      const index low = std::max<index>(0, t - o.window / 2),
                  high = std::min(n - 1, t + o.window / 2);
      wide s = 0;
      for (index j = low; j <= high; ++j) {
        const std::size_t i = pairs[std::size_t(j)].second, row = i / std::size_t(b.cols);
        s += p[std::size_t(j)] - (b.labels[row] == static_cast<int>(i) % b.cols ? 1 : 0);
      }
      s /= width;
      const auto members =
          static_cast<double>(std::count(in.begin(), in.end(), in[std::size_t(t)]));
      const wide weight =
          count > 0 ? wide(1 / (count * (wide(members) + wide(1e-5)))) : wide(1 / wide(members));
      if (size_of(s) <= o.tolerance)
        continue;
      out.value += o.scale / events * weight * (size_of(s) - o.tolerance);
      for (index j = low; j <= high; ++j)
        out.gradient[pairs[std::size_t(j)].second] +=
            o.scale / events * weight * (s > 0 ? 1 : -1) / width;
    }
  }
  for (const wide& g : out.gradient)
    out.largest = larger(out.largest, size_of(g));
  return out;
}

} // namespace

TEMPLATE_TEST_CASE("h_calibration: value and gradient", "[h_calibration]", float, double) {
  using T = TestType;
  using loss_type = perdita::h_calibration<T>;
  using options = typename loss_type::options;
  const wide epsilon = std::numeric_limits<T>::epsilon();
  error_judge of_values, of_slopes;
  for (const auto& [rows, cols] : {std::pair<index, index>{1, 1}, {7, 3}, {40, 10}, {90, 2}})
    for (const options& o : {options{}, options{.window = 4, .clusters = 3, .scale = 1},
                             options{.window = 10, .tolerance = 0.05, .clusters = 0},
                             options{.window = 0, .leave_class_out = false, .scale = 2}}) {
      batch<T> b(rows, cols, static_cast<std::uint64_t>(rows));
      if (rows == 40)
        b.labels[3] = b.labels[17] = -100;
      std::vector<T> g(b.p.size(), 7);
      const loss_type loss(o);
      const T value = loss(b.view(), b.labels, matrix_view<T>(g.data(), rows, cols));
      CHECK(loss(b.view(), b.labels) == value);
      const auto e = expect(b, o);
      if (rows > 1)
        CHECK(value > 0);
      of_values.within(size_of(wide(value - e.value)), 4, epsilon * (e.value + wide(1e-30)));
      for (std::size_t i = 0; i < g.size(); ++i)
        of_slopes.within(size_of(wide(g[i] - e.gradient[i])), 4,
                         epsilon * (e.largest + wide(1e-30)));
    }
  report_accuracy<T>("h_calibration", "", in_epsilons_of_terms, of_values, of_slopes);
  INFO(of_values.worst() << " and " << of_slopes.worst());
  CHECK(of_values.all_within());
  CHECK(of_slopes.all_within());
}

TEST_CASE("h_calibration: the gradient is the derivative", "[h_calibration]") {
  for (const bool leave_out : {true, false}) {
    batch<double> b(12, 4, 5);
    std::vector<double> g(b.p.size());
    const perdita::h_calibration<double> loss(
        {.window = 6, .clusters = 4, .leave_class_out = leave_out, .scale = 1});
    perdita::call_options<double> call;
    call.run_on = perdita::serial;
    loss(b.view(), b.labels, matrix_view<double>(g.data(), 12, 4), call);
    const auto report = perdita::testing::check_gradient(
        [&] { return loss(b.view(), b.labels, call); }, b.p, g, {.step = 1e-5});
    INFO(report.message());
    CHECK(report.ok);
  }
}

TEST_CASE("h_calibration: calibrated, hand-made, scaled", "[h_calibration]") {
  using loss = perdita::h_calibration<double>;
  // One of two is right half of the time: calibrated, whatever the order.
  const std::vector<double> half(16, 0.5);
  const std::vector<int> mixed{0, 1, 1, 0, 1, 0, 0, 1};
  std::vector<double> g(16, 7);
  const matrix_view<const double> p(half.data(), 8, 2);
  CHECK(loss({.window = 2})(p, mixed, matrix_view<double>(g.data(), 8, 2)) == 0);
  CHECK(g == std::vector<double>(16, 0.0));
  // Two pairs, (¼, 1) and (¾, 0): S = (−¾, ¾), or with a window of 3 (0, 0)
  const std::vector<double> two{0.75, 0.25};
  const std::vector<int> label{1};
  std::vector<double> d(2);
  const matrix_view<const double> q(two.data(), 1, 2);
  const matrix_view<double> to(d.data(), 1, 2);
  CHECK(loss({.window = 0, .clusters = 0, .leave_class_out = false, .scale = 2})(q, label, to) ==
        1.5);
  CHECK(d == std::vector<double>{1, -1});
  CHECK(loss({.window = 2, .leave_class_out = false})(q, label, to) == 0);
  CHECK(d == std::vector<double>{0, 0});
  // The event that leaves class 1 out has no rows; that of class 0 has one.
  CHECK(loss({.window = 0, .clusters = 0, .scale = 2})(q, label, to) == 0.75);
  CHECK(d == std::vector<double>{0.5, -0.5});
  // Twice the scale, twice everything
  const batch<double> b(20, 5, 8);
  std::vector<double> first(100), second(100);
  const double once =
      loss({.scale = 1})(b.view(), b.labels, matrix_view<double>(first.data(), 20, 5));
  CHECK(loss({.scale = 2})(b.view(), b.labels, matrix_view<double>(second.data(), 20, 5)) ==
        2 * once);
  for (std::size_t i = 0; i < 100; ++i)
    CHECK(second[i] == 2 * first[i]);
}

TEST_CASE("h_calibration: the order of rows does not matter, with ties", "[h_calibration]") {
  batch<float> b(60, 4, 9);
  for (float& p : b.p) // many are equal
    p = std::round(p * 20) / 20;
  batch<float> c = b;
  for (index r = 0; r < b.rows; ++r) {
    const index from = (r * 37 + 11) % b.rows;
    c.labels[std::size_t(r)] = b.labels[std::size_t(from)];
    std::copy_n(b.p.begin() + from * 4, 4, c.p.begin() + r * 4);
  }
  std::vector<float> g(b.p.size()), h(g);
  const perdita::h_calibration<float> loss({.window = 8, .clusters = 5});
  CHECK(loss(b.view(), b.labels, matrix_view<float>(g.data(), 60, 4)) ==
        loss(c.view(), c.labels, matrix_view<float>(h.data(), 60, 4)));
  for (index r = 0; r < b.rows; ++r)
    for (index k = 0; k < 4; ++k)
      CHECK(h[std::size_t(r * 4 + k)] == g[std::size_t((r * 37 + 11) % b.rows * 4 + k)]);
}

TEST_CASE("h_calibration: special rows, calls, threads", "[h_calibration]") {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  batch<float> b(30, 12, 10);
  const perdita::h_calibration<float> loss({.window = 20});
  std::vector<float> g(360), h(360, 1), in_place = b.p;
  perdita::call_options<float> call;
  call.run_on = perdita::serial;
  const float value = loss(b.view(), b.labels, matrix_view<float>(g.data(), 30, 12), call);
  const threads_executor threads(3, task_order::shuffled);
  call.run_on = threads;
  const matrix_view<float> itself(in_place.data(), 30, 12);
  CHECK(loss(itself, b.labels, itself, call) == value);
  CHECK(in_place == g);
  call.accumulate = true;
  call.scale = 0.5F;
  CHECK(loss(b.view(), b.labels, matrix_view<float>(h.data(), 30, 12), call) == value);
  for (std::size_t i = 0; i < 360; ++i)
    CHECK(std::abs(h[i] - (1 + g[i] / 2)) <= 1e-6F * (1 + std::abs(g[i])));
  // An ignored row is no row, and a lost one none for the others.
  b.labels[29] = -100;
  std::vector<float> without(348), with(360, 7);
  const float rest = loss(matrix_view<const float>(b.p.data(), 29, 12),
                          perdita::vector_view<const int>(b.labels.data(), 29),
                          matrix_view<float>(without.data(), 29, 12));
  CHECK(loss(b.view(), b.labels, matrix_view<float>(with.data(), 30, 12)) == rest);
  CHECK(std::equal(without.begin(), without.end(), with.begin()));
  CHECK(std::all_of(with.begin() + 348, with.end(), [](float x) { return x == 0; }));
  b.labels[29] = 2;
  b.p[350] = nan;
  CHECK(std::isnan(loss(b.view(), b.labels, matrix_view<float>(with.data(), 30, 12))));
  CHECK(std::equal(without.begin(), without.end(), with.begin()));
  CHECK(std::all_of(with.begin() + 348, with.end(), [](float x) { return std::isnan(x); }));
  CHECK(loss(matrix_view<const float>(nullptr, 0, 12), std::vector<int>()) == 0);
}

TEST_CASE("h_calibration: what is refused", "[h_calibration]") {
  using Catch::Matchers::ContainsSubstring;
  using loss = perdita::h_calibration<double>;
  CHECK_THROWS_WITH(loss({.window = 3}), ContainsSubstring("window is 3"));
  CHECK_THROWS_WITH(loss({.tolerance = -1}), ContainsSubstring("tolerance is -1"));
  CHECK_THROWS_WITH(loss({.clusters = -1}), ContainsSubstring("clusters is -1"));
  CHECK_THROWS_WITH(loss({.scale = std::numeric_limits<double>::infinity()}),
                    ContainsSubstring("scale is inf"));
  std::vector<double> p(4, 0.5), g(4, 7), weights(2, 1);
  std::vector<int> labels{0, 2};
  const matrix_view<const double> x(p.data(), 2, 2);
  const matrix_view<double> to(g.data(), 2, 2);
  CHECK_THROWS_WITH(loss()(x, labels, to), ContainsSubstring("labels[1] is 2"));
  labels = {0};
  CHECK_THROWS_WITH(loss()(x, labels, to), ContainsSubstring("labels is 1"));
  labels = {0, 1};
  perdita::call_options<double> call;
  call.row_weights = weights;
  CHECK_THROWS_WITH(loss()(x, labels, to, call), ContainsSubstring("row_weights"));
  CHECK_THROWS_WITH(loss()(x, labels, matrix_view<double>(g.data(), 1, 4)),
                    ContainsSubstring("gradient rows is 1"));
  CHECK_THROWS_WITH(loss()(x, labels, matrix_view<double>(p.data() + 1, 1, 2)),
                    ContainsSubstring("gradient"));
  CHECK(g == std::vector<double>(4, 7));
}

} // namespace perdita_tests
