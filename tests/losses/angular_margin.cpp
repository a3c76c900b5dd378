// SPDX-License-Identifier: MIT

// Margins of angles and cosines against 113-bit formulas, on given cosines and on the similarity
// head.

#include <perdita/angular_margin.hpp>
#include <perdita/unpg.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include <perdita/testing/gradient_check.hpp>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/embeddings.hpp"
#include "support/executors.hpp"
#include "support/numbers.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

using perdita::index;
using perdita::matrix_view;
using perdita::vector_view;

using labels = std::vector<std::int64_t>;

std::size_t at(index i) { return static_cast<std::size_t>(i); }

struct wide_point {
  wide value, slope, by_margin = 0;
};

/// By Newton's method, from an angle in double.
wide angle_of(const wide& c) {
  wide angle = std::acos(static_cast<double>(c));
  for (int step = 0; step < 4; ++step)
    angle += (cos(angle) - c) / sin(angle);
  return angle;
}
const wide& pi() {
  static const wide value = 2 * angle_of(0);
  return value;
}
wide size_of_sine(const wide& c) { return sqrt(wide((1 - c) * (1 + c))); }

// ψ by the papers, where |c| < 1 − 1e-7.
wide_point added_angle(const wide& c, const wide& m) {
  const wide theta = angle_of(c);
  return {cos(wide(theta + m)), sin(wide(theta + m)) / size_of_sine(c), -sin(wide(theta + m))};
}
wide_point arc(const wide& c, const wide& m, bool easy, bool shifted) {
  if (easy && c <= 0)
    return {c, 1};
  if (!easy && shifted && angle_of(c) + m > pi())
    return {c - m * sin(wide(pi() - m)), 1, -sin(m) - m * cos(m)};
  return added_angle(c, m);
}
wide_point sphere(const wide& c, int m) {
  const wide theta = angle_of(c);
  int k = 0;
  while (k < m - 1 && m * theta >= (k + 1) * pi())
    ++k;
  const wide sign = k % 2 == 0 ? 1 : -1;
  return {sign * cos(wide(m * theta)) - 2 * k, sign * m * sin(wide(m * theta)) / size_of_sine(c)};
}
wide_point ada(const wide& c, const wide& m, const wide& k) {
  const wide theta = angle_of(c), low = 1e-3, moved = theta - m * k;
  const bool below = moved<low, above = moved> pi() - low;
  const wide kept = below ? low : above ? wide(pi() - low) : moved;
  return {cos(kept) - (m + m * k), below || above ? wide(0) : wide(sin(moved) / size_of_sine(c))};
}

/// A row's loss and slopes from its cosines, and ∂/∂(margin).
struct wide_row {
  wide value = 0, by_margin = 0;
  std::vector<wide> slopes;

  wide_row(const std::vector<wide>& c, std::size_t y, const wide& s, const wide_point& psi) {
    wide rivals = 0;
    for (std::size_t j = 0; j < c.size(); ++j)
      if (j != y)
        rivals += exp(wide(s * (c[j] - psi.value)));
    value = log1p(rivals);
    for (std::size_t j = 0; j < c.size(); ++j)
      slopes.push_back(j == y ? wide(-s * psi.slope * rivals / (1 + rivals))
                              : wide(s * exp(wide(s * (c[j] - psi.value))) / (1 + rivals)));
    by_margin = -s * rivals / (1 + rivals) * psi.by_margin;
  }
};

template <class T> batch<T> random_cosines(index rows, index cols, std::uint64_t seed) {
  random_numbers random(seed);
  batch<T> c(rows, cols);
  for (T& x : c.x)
    x = static_cast<T>(random.uniform(-1, 1) * (1 - 1e-6));
  return c;
}
labels some_labels(index rows, index classes) {
  labels result;
  for (index r = 0; r < rows; ++r)
    result.push_back(r * 7 % classes);
  return result;
}

struct judges {
  error_judge values, slopes;
};

/// The margin of a row, from its target's cosine.
using margin_of_row = std::function<wide_point(const wide&, index)>;
/// A call of any loss of given cosines.
template <class T>
using given_call =
    std::function<T(const batch<T>&, const labels&, batch<T>&, const perdita::call_options<T>&)>;

/// The sum over rows.
template <class T>
void check_given(const std::string& name, double s, const given_call<T>& loss,
                 const margin_of_row& psi, judges& judge) {
  const wide epsilon = std::numeric_limits<T>::epsilon();
  struct shape {
    index rows, cols;
  };
  for (const shape& n : {shape{1, 1}, shape{3, 2}, shape{37, 3}, shape{19, 70}, shape{9, 600}}) {
    INFO(name << ", " << n.rows << " x " << n.cols);
    const auto c = random_cosines<T>(n.rows, n.cols, 3);
    const labels y = some_labels(n.rows, n.cols);
    batch<T> g(n.rows, n.cols);
    std::vector<T> values(at(n.rows));
    const T total = loss(c, y, g, perdita::call_options<T>{.values = values});
    wide sum = 0, unit = 0;
    bool right = true;
    for (index r = 0; r < n.rows; ++r) {
      std::vector<wide> row;
      for (index j = 0; j < n.cols; ++j)
        row.push_back(c(r, j));
      const auto label = static_cast<std::size_t>(y[at(r)]);
      const wide_point p = psi(row[label], r);
      const wide_row expected(row, label, s, p);
      // The target's score is rounded before ψ magnifies that.
      const wide noise = s * (1 + size_of(p.slope) * size_of(row[label]));
      const wide of_row = epsilon * (n.cols == 1 ? wide(0) : wide(noise + expected.value));
      right =
          judge.values.within(size_of(wide(values[at(r)] - expected.value)), 2, of_row) && right;
      sum += expected.value, unit += of_row;
      const wide lost = s * 1e-30L; // slopes that softmax leaves out
      const wide flat =
          p.slope == 0 ? wide(0) : wide(1 / p.slope); // ψ' errs by an ε, however small
      for (index j = 0; j < n.cols; ++j) {
        const wide size = size_of(expected.slopes[at(j)]);
        const wide scale = noise + 1 + (at(j) == label ? size_of(flat) : wide(0));
        right = judge.slopes.within(size_of(wide(g(r, j) - expected.slopes[at(j)])), 2,
                                    wide(epsilon * scale * size + lost)) &&
                right;
      }
    }
    CHECK(right);
    CHECK(judge.values.within(size_of(wide(total - sum)), 2, unit));
  }
}

template <class T> std::vector<T> row_numbers(double low, double high) {
  random_numbers random(8);
  std::vector<T> result(64);
  for (T& x : result)
    x = static_cast<T>(random.uniform(low, high));
  return result;
}

/// A call of a loss of rows, with gradient.
template <class Loss> given_call<typename Loss::value_type> of_rows(const Loss& loss) {
  using T = typename Loss::value_type;
  return [loss](const batch<T>& c, const labels& y, batch<T>& g,
                const perdita::call_options<T>& call) { return loss(c.seen(), y, g.view(), call); };
}
template <class T> vector_view<const T> first(const std::vector<T>& numbers, index n) {
  return {numbers.data(), n};
}

constexpr auto sum = perdita::reduction::sum;

} // namespace

// A score's rounding, at most ε s/2, is an error of the loss, and relative to a slope; of the
// target's score, ψ' times that.
TEMPLATE_TEST_CASE("angular margins: given cosines", "[angular_margin]", float, double) {
  using T = TestType;
  const auto report = [](const char* name, const judges& j) {
    report_accuracy<T>(name, "given cosines", in_allowances, j.values, j.slopes);
  };
  {
    judges j;
    check_given<T>(
        "normalised_softmax", 20, of_rows(perdita::normalised_softmax<T>({.reduction = sum})),
        [](const wide& c, index) {
          return wide_point{c, 1};
        },
        j);
    report("normalised_softmax", j);
  }
  {
    judges j;
    const T m = T(0.35);
    for (const T s : {T(64), T(30)})
      check_given<T>(
          "cosface", s, of_rows(perdita::cosface<T>({.scale = s, .margin = m, .reduction = sum})),
          [m](const wide& c, index) {
            return wide_point{c - m, 1};
          },
          j);
    report("cosface", j);
  }
  {
    judges j;
    for (const T m : {T(0.5), T(0), T(2.5)})
      for (const bool easy : {false, true})
        for (const bool shifted : {true, false})
          check_given<T>(
              "arcface", 16,
              of_rows(perdita::arcface<T>(
                  {.scale = 16,
                   .margin = m,
                   .easy_margin = easy,
                   .beyond = shifted ? perdita::beyond_pi::shifted : perdita::beyond_pi::cosine,
                   .reduction = sum})),
              [=](const wide& c, index) { return arc(c, m, easy, shifted); }, j);
    report("arcface", j);
  }
  {
    judges j;
    for (const int m : {1, 2, 4, 5})
      check_given<T>(
          "sphereface", 30, of_rows(perdita::sphereface<T>({.margin = m, .reduction = sum})),
          [m](const wide& c, index) { return sphere(c, m); }, j);
    report("sphereface", j);
  }
  {
    judges j;
    const auto quality = row_numbers<T>(-1, 1);
    const T m = T(0.4);
    check_given<T>(
        "adaface", 64,
        [&](const batch<T>& c, const labels& y, batch<T>& g, const perdita::call_options<T>& call) {
          const perdita::adaface<T> loss({.quality = first(quality, c.rows), .reduction = sum});
          return loss(c.seen(), y, g.view(), call);
        },
        [&](const wide& c, index r) { return ada(c, m, quality[at(r)]); }, j);
    check_given<T>(
        "adaface, no qualities", 64, of_rows(perdita::adaface<T>({.reduction = sum})),
        [&](const wide& c, index) { return ada(c, m, 0); }, j);
    report("adaface", j);
  }
}

TEMPLATE_TEST_CASE("magface: given cosines and norms", "[angular_margin]", float, double) {
  using T = TestType;
  judges j;
  const auto norms = row_numbers<T>(2, 140);
  for (const bool easy : {true, false}) {
    const perdita::magface_options<T> o{.scale = 32, .easy_margin = easy, .reduction = sum};
    const perdita::magface<T> loss(o);
    const auto margin = [&](index r) {
      const wide a = norms[at(r)] < 10    ? wide(10)
                     : norms[at(r)] > 110 ? wide(110)
                                          : wide(norms[at(r)]);
      return wide(o.least_margin + (wide(o.most_margin) - o.least_margin) / 100 * (a - 10));
    };
    const auto psi = [&](const wide& c, index r) { return arc(c, margin(r), easy, true); };
    const auto extra = [&](index r) {
      const wide a = norms[at(r)] < 10    ? wide(10)
                     : norms[at(r)] > 110 ? wide(110)
                                          : wide(norms[at(r)]);
      return wide(35 * (a / (110 * 110) + 1 / a));
    };
    check_given<T>(
        "magface", 32,
        [&](const batch<T>& c, const labels& y, batch<T>& g, const perdita::call_options<T>& call) {
          std::vector<T> d_norms(at(c.rows), 7);
          const T value =
              loss(c.seen(), first(norms, c.rows), y, g.view(), vector_view<T>(d_norms), call);
          CHECK(loss(c.seen(), first(norms, c.rows), y) == value);
          for (index r = 0; r < c.rows; ++r) {
            std::vector<wide> row;
            for (index k = 0; k < c.cols; ++k)
              row.push_back(c(r, k));
            const auto label = static_cast<std::size_t>(y[at(r)]);
            const wide n = norms[at(r)];
            const wide_row expected(row, label, 32, psi(row[label], r));
            const wide regular = 35 * (wide(1) / (110 * 110) - 1 / (n * n));
            const bool inside = n >= 10 && n <= 110;
            const wide by_margin =
                expected.by_margin * ((wide(o.most_margin) - o.least_margin) / 100);
            const wide want = inside ? wide(by_margin + regular) : wide(0);
            const wide unit = std::numeric_limits<T>::epsilon() *
                              (32 * 3 * size_of(by_margin) + size_of(regular) +
                               32 * wide(o.most_margin - o.least_margin) / 100);
            CHECK(j.slopes.within(size_of(wide(d_norms[at(r)] - want)), 2, unit));
          }
          // What the reference below leaves out.
          T all = value;
          for (index r = 0; r < c.rows; ++r) {
            call.values[r] -= static_cast<T>(extra(r));
            all -= static_cast<T>(extra(r));
          }
          return all;
        },
        psi, j);
  }
  report_accuracy<T>("magface", "given cosines", in_allowances, j.values, j.slopes);
}

namespace {

/// Values and gradients through both normalisations, of the mean over rows.
struct wide_head {
  wide value = 0;
  wide_matrix d_x, d_w;

  wide_head(const wide_matrix& a, const wide_matrix& b, const labels& y, const wide& s,
            const margin_of_row& psi)
      : d_x(a.rows, a.cols), d_w(b.rows, b.cols) {
    std::vector<wide> of_x, of_w;
    const auto norm = [](const wide_matrix& m, index r) {
      wide square = 0;
      for (index k = 0; k < m.cols; ++k)
        square += m(r, k) * m(r, k);
      return wide(sqrt(square));
    };
    for (index r = 0; r < a.rows; ++r)
      of_x.push_back(norm(a, r));
    for (index c = 0; c < b.rows; ++c)
      of_w.push_back(norm(b, c));
    for (index r = 0; r < a.rows; ++r) {
      std::vector<wide> row;
      for (index c = 0; c < b.rows; ++c) {
        wide dot = 0;
        for (index k = 0; k < a.cols; ++k)
          dot += a(r, k) * b(c, k);
        row.push_back(dot / of_x[at(r)] / of_w[at(c)]);
      }
      const auto label = static_cast<std::size_t>(y[at(r)]);
      const wide_row of(row, label, s, psi(row[label], r));
      value += of.value / a.rows;
      for (index c = 0; c < b.rows; ++c) {
        const wide g = of.slopes[at(c)] / a.rows, cosine = row[at(c)];
        for (index k = 0; k < a.cols; ++k) {
          const wide one = a(r, k) / of_x[at(r)], other = b(c, k) / of_w[at(c)];
          d_x(r, k) += g * (other - cosine * one) / of_x[at(r)];
          d_w(c, k) += g * (one - cosine * other) / of_w[at(c)];
        }
      }
    }
  }
};

/// A call of any loss on the similarity head; its gradients where they are wanted.
template <class T>
using head_call = std::function<T(const batch<T>& x, const batch<T>& w, const labels&,
                                  batch<T>* d_x, batch<T>* d_w, const perdita::call_options<T>&)>;
template <class Loss> head_call<typename Loss::value_type> on_head(const Loss& loss) {
  using T = typename Loss::value_type;
  return [head = perdita::similarity(loss)](const batch<T>& x, const batch<T>& w, const labels& y,
                                            batch<T>* d_x, batch<T>* d_w,
                                            const perdita::call_options<T>& call) {
    return d_x ? head(x.seen(), w.seen(), y, d_x->view(), d_w->view(), call)
               : head(x.seen(), w.seen(), y, call);
  };
}

template <class T>
void check_head(const head_call<T>& head, double s, const margin_of_row& psi, judges& judge) {
  for (const index classes : {5, 40}) {
    const auto x = random_batch<T>(23, 9, 1), w = random_batch<T>(classes, 9, 2);
    const labels y = some_labels(x.rows, w.rows);
    batch<T> d_x(x.rows, x.cols), d_w(w.rows, w.cols);
    const T value = head(x, w, y, &d_x, &d_w, {});
    CHECK(head(x, w, y, nullptr, nullptr, {}) == value);
    const wide_head expected(wide_matrix(x), wide_matrix(w), y, s, psi);
    // Cosines err by a few ε; these are not near ±1.
    CHECK(judge.values.within(size_of(wide(value - expected.value)), 4,
                              wide(std::numeric_limits<T>::epsilon() * (s + expected.value))));
    CHECK(slopes_within(judge.slopes, d_x, expected.d_x, 8 * s));
    CHECK(slopes_within(judge.slopes, d_w, expected.d_w, 8 * s));
  }
}

} // namespace

TEMPLATE_TEST_CASE("angular margins: on the similarity head", "[angular_margin]", float, double) {
  using T = TestType;
  judges j;
  check_head<T>(
      on_head(perdita::arcface<T>({.scale = 16})), 16,
      [](const wide& c, index) { return arc(c, T(0.5), false, true); }, j);
  check_head<T>(
      on_head(perdita::cosface<T>({.scale = 16})), 16,
      [](const wide& c, index) {
        return wide_point{c - T(0.35), 1};
      },
      j);
  check_head<T>(
      on_head(perdita::sphereface<T>({.scale = 16, .margin = 3})), 16,
      [](const wide& c, index) { return sphere(c, 3); }, j);
  std::vector<T> quality = row_numbers<T>(-1, 1);
  check_head<T>(
      on_head(perdita::adaface<T>({.scale = 16, .quality = first(quality, 23)})), 16,
      [&](const wide& c, index r) { return ada(c, T(0.4), quality[at(r)]); }, j);
  report_accuracy<T>("arcface", "similarity head", in_allowances,
                     {j.values.worst(), -1, std::max(j.values.share(), j.slopes.share())});
}

TEST_CASE("angular margins: golden values", "[angular_margin]") {
  const auto x = sheet_x();
  batch<double> w(3, 4), d_x(6, 4), d_w(3, 4);
  for (std::size_t k = 0; k < 12; ++k) {
    const double t = static_cast<double>(k);
    w.x[k] = std::sin(1.1 * t + 0.2 + 0.15 * t * t);
  }
  const labels y{0, 0, 1, 1, 2, 2};
  const auto check = [&](const head_call<double>& head, double value, double of_x, double of_w) {
    CHECK(near(head(x, w, y, &d_x, &d_w, {}), value, 1e-11));
    CHECK(near(length_of(d_x.x), of_x, 1e-8));
    CHECK(near(length_of(d_w.x), of_w, 1e-8));
  };
  check(on_head(perdita::arcface<double>({.scale = 16})), 5.35974712224, 4.43844034, 4.40052729);
  check(on_head(perdita::cosface<double>({.scale = 16})), 4.72660491702, 4.90987481, 4.1031594);
  check(on_head(perdita::normalised_softmax<double>()), 3.13775709496, 3.81001512, 3.55066128);
}

TEST_CASE("angular margins: the gradients are the derivatives", "[angular_margin]") {
  const perdita::testing::gradient_check_options fine{.step = 1e-3};
  auto x = random_batch<double>(6, 5, 21), w = random_batch<double>(4, 5, 22);
  for (index r = 0; r < 6; ++r) // norms in MagFace's range and on both sides
    for (index k = 0; k < 5; ++k)
      x(r, k) *= 4 + 20 * static_cast<double>(r);
  const labels y{0, 3, 1, -100, 2, 0};
  const std::vector<double> weights{1, 2, 0.5, 1, 0, 3}, upstream{1, 1, 1, 1, 1, 1},
      quality{-1, 0.5, 0.2, 0, 1, -0.3};
  const perdita::call_options<double> call{.row_weights = weights, .upstream = upstream};
  using run_of_both = std::function<double(batch<double> & d_x, batch<double> & d_w)>;
  const auto check = [&](const run_of_both& run) {
    auto d_x = x, d_w = w, aside_x = x, aside_w = w;
    run(d_x, d_w);
    for (const bool of_x : {true, false}) {
      const auto report = perdita::testing::check_gradient(
          [&] { return run(aside_x, aside_w); }, of_x ? x.x : w.x, of_x ? d_x.x : d_w.x, fine);
      INFO(report.message());
      CHECK(report.ok);
    }
  };
  const auto check_head_of = [&](const head_call<double>& head) {
    check([&](batch<double>& d_x, batch<double>& d_w) { return head(x, w, y, &d_x, &d_w, call); });
  };
  check_head_of(on_head(perdita::arcface<double>({.scale = 8})));
  check_head_of(on_head(perdita::sphereface<double>({.scale = 8})));
  check_head_of(on_head(perdita::adaface<double>({.scale = 8, .quality = quality})));
  for (const bool easy : {true, false}) {
    const perdita::magface<double> loss({.scale = 8, .easy_margin = easy});
    const run_of_both embedded = [&](batch<double>& d_x, batch<double>& d_w) {
      return loss.embedded(x.seen(), w.seen(), y, d_x.view(), d_w.view(), call);
    };
    check(embedded);
    auto d_x = x, d_w = w;
    CHECK(loss.embedded(x.seen(), w.seen(), y, call) == embedded(d_x, d_w));
  }
  // The norm's part alone, with scale and upstream, added to what is there.
  const perdita::magface<double> loss({.scale = 8});
  auto once = x, twice = x, d_w = w;
  const std::vector<double> up{2, 1, 3, 1, 1, 0.5};
  loss.embedded(x.seen(), w.seen(), y, once.view(), d_w.view(), {.upstream = up});
  twice = once;
  loss.embedded(x.seen(), w.seen(), y, twice.view(), d_w.view(),
                {.upstream = up, .scale = 2, .accumulate = true});
  for (std::size_t k = 0; k < once.x.size(); ++k)
    CHECK(std::abs(twice.x[k] - 3 * once.x[k]) <= 1e-13 * (1 + std::abs(once.x[k])));
}

TEMPLATE_TEST_CASE("angular margins: special values", "[angular_margin]", float, double) {
  using T = TestType;
  constexpr T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  constexpr T epsilon = std::numeric_limits<T>::epsilon();
  const auto evaluate = [&](const given_call<T>& loss, T target, T rival, batch<T>& g) {
    batch<T> c(2, 3);
    c.x = {target, rival, T(-0.5), T(0.1), T(0.2), T(0.3)};
    std::vector<T> values(2);
    loss(c, labels{0, 1}, g, {.values = values});
    CHECK(std::isfinite(values[1]));
    CHECK(std::isfinite(g(1, 0) + g(1, 1) + g(1, 2)));
    return values[0];
  };
  batch<T> g(2, 3);
  const auto everywhere = [&](const given_call<T>& loss) {
    for (const T c : {T(1), T(-1), T(1) + epsilon, T(-1) - epsilon, T(0), T(1) - epsilon}) {
      CHECK(std::isfinite(evaluate(loss, c, T(0.5), g)));
      CHECK(std::isfinite(g(0, 0)));
      CHECK(g(0, 0) <= 0);
    }
    CHECK(evaluate(loss, -inf, T(0.5), g) == inf); // a masked label
    CHECK(std::isfinite(evaluate(loss, T(0.5), -inf, g)));
    CHECK(g(0, 1) == 0);
    CHECK(std::isnan(evaluate(loss, nan, T(0.5), g)));
    CHECK(std::isnan(g(0, 0)));
    CHECK(std::isnan(evaluate(loss, T(0.5), nan, g)));
  };
  everywhere(of_rows(perdita::cosface<T>()));
  everywhere(of_rows(perdita::arcface<T>()));
  everywhere(of_rows(perdita::arcface<T>({.easy_margin = true})));
  everywhere(of_rows(perdita::sphereface<T>()));
  const std::vector<T> quality{T(-1), T(0.5)}, bad{nan, T(0)};
  everywhere(of_rows(perdita::adaface<T>({.quality = quality})));
  CHECK(std::isnan(evaluate(of_rows(perdita::adaface<T>({.quality = bad})), T(0.5), T(0.1), g)));

  // The tangent: value and slope at c = 1 and −1.
  const auto arc_s1 = of_rows(perdita::arcface<T>({.scale = 1, .margin = T(0.5)}));
  const auto sphere_s1 = of_rows(perdita::sphereface<T>({.scale = 1}));
  const auto slope_at = [&](const given_call<T>& loss, T c) { // less the softmax's part
    const T value = evaluate(loss, c, T(0), g);
    return -static_cast<double>(g(0, 0)) * 2 / -std::expm1(-static_cast<double>(value));
  };
  const double m = static_cast<double>(T(0.5)), sine = std::sqrt(1e-7 * (2 - 1e-7));
  CHECK(near(slope_at(arc_s1, 1), std::cos(m) + (1 - 1e-7) * std::sin(m) / sine, 1e-4));
  CHECK(near(slope_at(arc_s1, -1), 1, 1e-4)); // beyond π
  CHECK(near(slope_at(sphere_s1, 1), 16, 1e-4));
  CHECK(near(slope_at(sphere_s1, -1), 16, 1e-4));

  // The head: a zero embedding, a zero class vector, a class without rows, embeddings that equal
  // their class vector.
  batch<T> x(3, 2), w(4, 2), d_x(3, 2), d_w(4, 2);
  x.x = {0, 0, 1, 2, 3, T(0.5)};
  w.x = {1, 2, 0, 0, 3, T(0.5), 1, -1};
  const labels y{1, 0, 2};
  const auto finite = [&](T value) {
    bool all = std::isfinite(value);
    for (const auto* v : {&d_x.x, &d_w.x})
      for (const T slope : *v)
        all = all && std::isfinite(slope);
    return all && d_x(0, 0) == 0 && d_x(0, 1) == 0 && d_w(1, 0) == 0 && d_w(1, 1) == 0 &&
           d_w(3, 0) != 0;
  };
  CHECK(finite(
      perdita::similarity(perdita::arcface<T>{})(x.seen(), w.seen(), y, d_x.view(), d_w.view())));
  CHECK(finite(perdita::magface<T>{}.embedded(x.seen(), w.seen(), y, d_x.view(), d_w.view())));
  std::vector<T> norms(3);
  perdita::embedding_norms<T>(x.seen(), norms);
  CHECK(norms[0] == 0);
  CHECK(near(static_cast<double>(norms[1]), std::sqrt(5.0), 2 * static_cast<double>(epsilon)));
  x(0, 0) = nan;
  perdita::embedding_norms<T>(x.seen(), norms);
  CHECK(std::isnan(norms[0]));
  CHECK(norms[2] > 3);
}

namespace {

/// UNPG by its definition: value, and slopes of all cosines with class vectors and of pairs.
/// Of CosFace, with a margin of a half.
wide unpg_of(const wide_matrix& x, const wide_matrix& w, const labels& y, double s,
             double whiskers) {
  const auto cosine = [](const wide_matrix& a, index i, const wide_matrix& b, index j) {
    wide ab = 0, aa = 0, bb = 0;
    for (index k = 0; k < a.cols; ++k) {
      ab += a(i, k) * b(j, k);
      aa += a(i, k) * a(i, k);
      bb += b(j, k) * b(j, k);
    }
    return wide(ab / sqrt(wide(aa * bb)));
  };
  std::vector<wide> r;
  for (index i = 0; i < x.rows; ++i)
    for (index j = i + 1; j < x.rows; ++j)
      if (y[at(i)] >= 0 && y[at(j)] >= 0 && y[at(i)] != y[at(j)])
        r.push_back(cosine(x, i, x, j));
  std::sort(r.begin(), r.end());
  wide total = 0, rows = 0, extra = 0;
  if (!r.empty()) {
    const wide low = r[r.size() / 4], high = r[3 * r.size() / 4], reach = whiskers * (high - low);
    for (const wide& c : r)
      if (whiskers > 100 || (c >= low - reach && c <= high + reach))
        extra += exp(wide(s * c));
  }
  for (index i = 0; i < x.rows; ++i) {
    if (y[at(i)] < 0)
      continue;
    const wide target = cosine(x, i, w, y[at(i)]) - 0.5;
    wide rivals = extra;
    for (index c = 0; c < w.rows; ++c)
      rivals += c == y[at(i)] ? wide(0) : wide(exp(wide(s * cosine(x, i, w, c))));
    total += log1p(wide(rivals / exp(wide(s * target))));
    rows += 1;
  }
  return total / rows;
}

} // namespace

TEMPLATE_TEST_CASE("unpg is its definition", "[angular_margin]", float, double) {
  using T = TestType;
  judges j;
  const double infinite = std::numeric_limits<double>::infinity();
  for (const index classes : {1, 4, 9})
    for (const double whiskers : {1.5, 0.25, infinite}) {
      INFO(classes << " classes, whiskers " << whiskers);
      const auto x = random_batch<T>(11, 3, 1), w = random_batch<T>(classes, 3, 2);
      labels y = some_labels(11, classes);
      y[5] = -100;
      batch<T> d_x(11, 3), d_w(classes, 3);
      const perdita::unpg loss(perdita::cosface<T>({.scale = 8, .margin = T(0.5)}),
                               {.whiskers = whiskers});
      const T value = loss(x.seen(), w.seen(), y, d_x.view(), d_w.view());
      CHECK(loss(x.seen(), w.seen(), y) == value);
      wide_matrix wide_x(x), wide_w(w);
      const auto reference = [&] { return unpg_of(wide_x, wide_w, y, 8, whiskers); };
      const wide expected = reference();
      const auto derivative = [&](wide_matrix& of) {
        wide_matrix g(of.rows, of.cols);
        const wide step = 1e-11L;
        for (std::size_t k = 0; k < g.x.size(); ++k) {
          const wide kept = of.x[k];
          of.x[k] = kept + step;
          const wide above = reference();
          of.x[k] = kept - step;
          g.x[k] = (above - reference()) / (2 * step);
          of.x[k] = kept;
        }
        return g;
      };
      CHECK(j.values.within(size_of(wide(value - expected)), 4,
                            wide(std::numeric_limits<T>::epsilon() * (8 + expected))));
      if (classes > 1) {
        CHECK(slopes_within(j.slopes, d_x, derivative(wide_x), 64));
        CHECK(slopes_within(j.slopes, d_w, derivative(wide_w), 64));
      } else {
        CHECK(value == 0); // no rival, and no pair
      }
    }
  report_accuracy<T>("unpg", "", in_allowances,
                     {j.values.worst(), -1, std::max(j.values.share(), j.slopes.share())});
}

TEST_CASE("unpg: calls", "[angular_margin]") {
  using T = double;
  using Catch::Matchers::ContainsSubstring;
  const auto x = random_batch<T>(150, 6, 1), w = random_batch<T>(20, 6, 2);
  const labels y = some_labels(150, 20);
  batch<T> d_x(150, 6), d_w(20, 6), again_x(150, 6, 1), again_w(20, 6, 1);
  const perdita::unpg loss(perdita::arcface<T>({.scale = 32}));
  const T value = loss(x.seen(), w.seen(), y, d_x.view(), d_w.view(), {.run_on = perdita::serial});
  const threads_executor pool(3, task_order::shuffled);
  CHECK(loss(x.seen(), w.seen(), y, again_x.view(), again_w.view(), {.run_on = pool}) == value);
  CHECK((again_x.x == d_x.x && again_w.x == d_w.x));
  again_x = batch<T>(150, 6, 1);
  loss(x.seen(), w.seen(), y, again_x.view(), again_w.view(), {.scale = 2, .accumulate = true});
  bool right = true;
  for (std::size_t k = 0; k < d_x.x.size(); ++k)
    right = right && std::abs(again_x.x[k] - (1 + 2 * d_x.x[k])) <=
                         8 * std::numeric_limits<T>::epsilon() * (1 + 2 * std::abs(d_x.x[k]));
  CHECK(right);
  // One class in the batch: the loss alone.
  const labels same(150, 3);
  CHECK(loss(x.seen(), w.seen(), same, d_x.view(), d_w.view()) ==
        perdita::similarity(loss.loss())(x.seen(), w.seen(), same, again_x.view(), again_w.view()));
  CHECK(again_x.x == d_x.x);
  auto zero = x;
  for (index k = 0; k < 6; ++k)
    zero(2, k) = 0;
  CHECK(std::isfinite(loss(zero.seen(), w.seen(), y, d_x.view(), d_w.view())));
  CHECK(d_x(2, 3) == 0);
  zero(2, 1) = std::numeric_limits<T>::quiet_NaN();
  CHECK(std::isnan(loss(zero.seen(), w.seen(), y, d_x.view(), d_w.view())));
  for (const double whiskers :
       {1.5, HUGE_VAL}) { // a row that is ignored is in no pair, whatever it is
    const perdita::unpg ignoring(perdita::arcface<T>({.scale = 32}), {.whiskers = whiskers});
    labels without = y;
    without[2] = -100;
    const T expected = ignoring(x.seen(), w.seen(), without, d_x.view(), d_w.view());
    CHECK(ignoring(zero.seen(), w.seen(), without, again_x.view(), again_w.view()) == expected);
    CHECK((again_x.x == d_x.x && again_w.x == d_w.x));
  }
  batch<T> none(0, 6);
  CHECK(loss(none.seen(), w.seen(), labels{}, none.view(), d_w.view()) == 0);
  labels wrong = y;
  wrong[1] = 20;
  CHECK_THROWS_WITH(loss(x.seen(), w.seen(), wrong, d_x.view(), d_w.view()),
                    ContainsSubstring("labels[1] is 20"));
  CHECK_THROWS_WITH(loss(x.seen(), w.seen(), labels{1}), ContainsSubstring("labels is 1"));
  CHECK_THROWS_WITH(perdita::unpg(perdita::cosface<T>{}, {.whiskers = -1}),
                    ContainsSubstring("whiskers is -1"));
}

TEST_CASE("adaface: what it knows of norms", "[angular_margin]") {
  perdita::norm_statistics now;
  CHECK(now.mean() == 20);
  CHECK(now.deviation() == 100);
  const std::vector<double> norms{1, 3, 500, 0, std::nan("")}, one{7};
  now.update<double>(norms); // of 1, 3, 100 and 0.001
  const double mean = 104.001 / 4;
  const double squares = (1 - mean) * (1 - mean) + (3 - mean) * (3 - mean) +
                         (100 - mean) * (100 - mean) + (0.001 - mean) * (0.001 - mean);
  CHECK(near(now.mean(), mean, 1e-15));
  CHECK(near(now.deviation(), std::sqrt(squares / 3), 1e-14));
  std::vector<double> k(5);
  now.quality<double>(norms, k);
  CHECK(near(k[0], 0.333 * (1 - mean) / (std::sqrt(squares / 3) + 1e-3), 1e-14));
  CHECK(std::isnan(k[4]));
  const double deviation = now.deviation();
  now.update<double>(one);
  CHECK(now.mean() == 7);
  CHECK(now.deviation() == deviation);
  now.update<double>({});
  CHECK(now.mean() == 7);

  perdita::norm_statistics slow({.weight = 0.25, .concentration = 100});
  slow.update<double>(norms);
  CHECK(near(slow.mean(), 20 + 0.25 * (mean - 20), 1e-15));
  CHECK(near(slow.deviation(), 100 + 0.25 * (deviation - 100), 1e-14));
  slow.quality<double>(norms, k);
  CHECK(k[0] == -1);
  CHECK(k[2] == 1);
}

TEST_CASE("angular margins: calls", "[angular_margin]") {
  using Catch::Matchers::ContainsSubstring;
  using T = float;
  const auto x = random_batch<T>(150, 8, 1), w = random_batch<T>(30, 8, 2);
  const labels y = some_labels(150, 30);
  const auto quality = [] {
    auto q = row_numbers<T>(-1, 1);
    q.resize(150);
    return q;
  }();
  const perdita::similarity head(perdita::adaface<T>({.quality = quality}));
  batch<T> d_x(150, 8), d_w(30, 8), again_x(150, 8), again_w(30, 8);
  const T value = head(x.seen(), w.seen(), y, d_x.view(), d_w.view(), {.run_on = perdita::serial});
  const threads_executor pool(3, task_order::shuffled);
  CHECK(head(x.seen(), w.seen(), y, again_x.view(), again_w.view(), {.run_on = pool}) == value);
  CHECK(again_x.x == d_x.x);
  CHECK(again_w.x == d_w.x);

  // By-products are of the scores with the margin.
  const auto c = random_cosines<T>(20, 5, 4);
  const labels few = some_labels(20, 5);
  std::vector<T> values(20), log_p(20);
  perdita::adaface<T>({.quality = first(quality, 20)})(
      c.seen(), few, perdita::call_options<T>{.values = values, .target_log_probability = log_p});
  for (std::size_t r = 0; r < 20; ++r)
    CHECK(std::abs(values[r] + log_p[r]) <= 1e-6f * values[r]);

  batch<T> g(20, 5, 7);
  CHECK_THROWS_WITH(perdita::adaface<T>({.quality = quality})(c.seen(), few, g.view()),
                    ContainsSubstring("quality is 150, expected 20"));
  labels wrong = few;
  wrong[3] = 5;
  CHECK_THROWS_WITH(perdita::arcface<T>{}(c.seen(), wrong, g.view()),
                    ContainsSubstring("labels[3] is 5, expected 0 to 4"));
  const std::vector<T> norms(20, T(30));
  std::vector<T> d_norms(20, T(7));
  CHECK_THROWS_WITH(
      perdita::magface<T>{}(c.seen(), norms, wrong, g.view(), vector_view<T>(d_norms)),
      ContainsSubstring("magface: labels[3] is 5"));
  CHECK_THROWS_WITH(
      perdita::magface<T>{}(c.seen(), first(norms, 19), few, g.view(), vector_view<T>(d_norms)),
      ContainsSubstring("norms is 19, expected 20"));
  CHECK_THROWS_WITH(
      perdita::magface<T>{}(c.seen(), norms, few, g.view(), vector_view<T>(d_norms.data(), 19)),
      ContainsSubstring("gradient of the norms is 19"));
  CHECK(g.x == batch<T>(20, 5, 7).x);
  CHECK(d_norms == std::vector<T>(20, T(7)));
  // In place; ignored rows have no part.
  labels gaps = few;
  gaps[2] = -100;
  auto place = c;
  perdita::magface<T>{}(c.seen(), norms, gaps, g.view(), vector_view<T>(d_norms));
  std::vector<T> d_again(20);
  perdita::magface<T>{}(place.view(), norms, gaps, place.view(), vector_view<T>(d_again));
  CHECK(place.x == g.x);
  CHECK(d_again == d_norms);
  CHECK(d_norms[2] == 0);
  CHECK(d_norms[1] != 0);

  CHECK_THROWS_WITH(perdita::arcface<T>({.scale = 0}), ContainsSubstring("scale is 0"));
  CHECK_THROWS_WITH(perdita::arcface<T>({.margin = 4}), ContainsSubstring("margin is 4"));
  CHECK_THROWS_WITH(perdita::cosface<T>({.margin = NAN}), ContainsSubstring("margin is"));
  CHECK_THROWS_WITH(perdita::sphereface<T>({.margin = 0}), ContainsSubstring("margin is 0"));
  CHECK_THROWS_WITH(perdita::adaface<T>({.margin = 2}), ContainsSubstring("margin is 2"));
  CHECK_THROWS_WITH(perdita::magface<T>({.most_norm = 5}), ContainsSubstring("most_norm is 5"));
  CHECK_THROWS_WITH(perdita::magface<T>({.least_norm = 0}), ContainsSubstring("least_norm is 0"));
  CHECK_THROWS_WITH(perdita::norm_statistics({.weight = 2}), ContainsSubstring("weight is 2"));

  const vector_view<const T> none, nowhere(nullptr, 20);
  CHECK_THROWS_WITH(perdita::magface<T>{}(c.seen(), none, few), ContainsSubstring("norms is 0"));
  CHECK_THROWS_WITH(perdita::magface<T>{}(c.seen(), nowhere, few),
                    ContainsSubstring("norms is null"));
  perdita::norm_statistics statistics;
  CHECK_THROWS_WITH(statistics.update(nowhere), ContainsSubstring("norms is null"));
  CHECK_THROWS_WITH(statistics.quality(nowhere, vector_view<T>(d_norms)),
                    ContainsSubstring("norms is null"));
}

TEST_CASE("magface: norms, margins and a regulariser of one's own", "[angular_margin]") {
  const perdita::magface_options<double> o{.scale = 8,
                                           .least_norm = 2,
                                           .most_norm = 6,
                                           .least_margin = 0.1,
                                           .most_margin = 0.5,
                                           .regulariser = 3,
                                           .easy_margin = true};
  batch<double> c(1, 3), g(1, 3);
  c.x = {0.6, -0.2, 0.3};
  std::vector<double> norms{3}, d_norms(1);
  const labels y{0};
  const perdita::magface<double> loss(o);
  const auto value = [&] { return loss(c.seen(), norms, y); };
  // m(3) = 0.1 + 0.4 (3 − 2)/(6 − 2), and 3 (a/36 + 1/a)
  const double own = 8 * std::cos(std::acos(0.6) + 0.2);
  CHECK(near(value(),
             std::log1p(std::exp(-1.6 - own) + std::exp(2.4 - own)) + 3 * (3.0 / 36 + 1.0 / 3),
             1e-14));
  loss(c.seen(), norms, y, g.view(), vector_view<double>(d_norms));
  CHECK(perdita::testing::check_gradient(value, norms, d_norms).ok);
  const perdita::norm_statistics start({.mean = 7, .deviation = 2});
  CHECK((start.mean() == 7 && start.deviation() == 2));
}

} // namespace perdita_tests
