// SPDX-License-Identifier: MIT

// Losses of embeddings and the proxies or prototypes of their classes, against 113-bit sums over
// all pairs.

#include <perdita/proxy.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include <perdita/prototype.hpp>
#include <perdita/similarity.hpp>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/embeddings.hpp"
#include "support/executors.hpp"
#include "support/numbers.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

using perdita::index;

using labels = std::vector<std::int64_t>;

std::size_t at(index i) { return static_cast<std::size_t>(i); }

labels some_labels(index rows, index classes) {
  labels result;
  for (index r = 0; r < rows; ++r)
    result.push_back(r * 5 % classes);
  return result;
}
batch<double> sheet_w() {
  batch<double> w(3, 4);
  for (std::size_t k = 0; k < 12; ++k) {
    const double t = static_cast<double>(k);
    w.x[k] = std::sin(1.1 * t + 0.2 + 0.15 * t * t);
  }
  return w;
}

/// Unit vectors, and from slopes of cosines to those of the vectors.
struct wide_pairs {
  wide_matrix x, w;
  std::vector<wide> of_x, of_w;

  template <class T> wide_pairs(const batch<T>& a, const batch<T>& b) : x(a), w(b) {
    normalise(x, of_x);
    normalise(w, of_w);
  }
  wide cosine(index i, index p) const {
    wide sum = 0;
    for (index k = 0; k < x.cols; ++k)
      sum += x(i, k) * w(p, k);
    return sum;
  }
  void add(index i, index p, const wide& slope, wide_matrix& d_x, wide_matrix& d_w) const {
    const wide c = cosine(i, p);
    for (index k = 0; k < x.cols; ++k) {
      d_x(i, k) += of_x[at(i)] == 0 ? wide(0) : wide(slope * (w(p, k) - c * x(i, k)) / of_x[at(i)]);
      d_w(p, k) += of_w[at(p)] == 0 ? wide(0) : wide(slope * (x(i, k) - c * w(p, k)) / of_w[at(p)]);
    }
  }

private:
  static void normalise(wide_matrix& m, std::vector<wide>& lengths) {
    for (index r = 0; r < m.rows; ++r) {
      wide square = 0;
      for (index k = 0; k < m.cols; ++k)
        square += m(r, k) * m(r, k);
      lengths.push_back(sqrt(square));
      for (index k = 0; k < m.cols; ++k)
        m(r, k) = square == 0 ? wide(0) : wide(m(r, k) / lengths.back());
    }
  }
};

struct wide_result {
  wide value = 0;
  wide_matrix d_x, d_w;
};

template <class T>
wide_result anchors(const batch<T>& x, const batch<T>& w, const labels& y, const wide& alpha,
                    const wide& margin) {
  wide_result out{0, wide_matrix(x.rows, x.cols), wide_matrix(w.rows, w.cols)};
  const wide_pairs pairs(x, w);
  wide with = 0;
  std::vector<wide> sums[2];
  for (index p = 0; p < w.rows; ++p) {
    wide sum[2] = {0, 0};
    bool any = false;
    for (index i = 0; i < x.rows; ++i)
      if (y[at(i)] >= 0) {
        const bool own = y[at(i)] == p;
        any = any || own;
        sum[own ? 0 : 1] += exp(wide(alpha * (margin + (own ? -1 : 1) * pairs.cosine(i, p))));
      }
    with += any ? 1 : 0;
    sums[0].push_back(sum[0]), sums[1].push_back(sum[1]);
  }
  for (index p = 0; p < w.rows; ++p) {
    out.value += with > 0 ? wide(log1p(sums[0][at(p)]) / with) : wide(0);
    out.value += log1p(sums[1][at(p)]) / w.rows;
    for (index i = 0; i < x.rows; ++i)
      if (y[at(i)] >= 0) {
        const bool own = y[at(i)] == p;
        const wide sign = own ? -1 : 1, share = own ? with : wide(w.rows);
        const wide e = exp(wide(alpha * (margin + sign * pairs.cosine(i, p))));
        pairs.add(i, p, wide(sign * alpha * e / (1 + sums[own ? 0 : 1][at(p)]) / share), out.d_x,
                  out.d_w);
      }
  }
  return out;
}

template <class T>
wide_result nca(const batch<T>& x, const batch<T>& w, const labels& y, const wide& kappa,
                bool all) {
  wide_result out{0, wide_matrix(x.rows, x.cols), wide_matrix(w.rows, w.cols)};
  const wide_pairs pairs(x, w);
  for (index i = 0; i < x.rows; ++i) {
    wide sum = 0;
    std::vector<wide> e;
    for (index p = 0; p < w.rows; ++p) {
      wide square = 0;
      for (index k = 0; k < x.cols; ++k) {
        const wide off = pairs.x(i, k) - pairs.w(p, k);
        square += off * off;
      }
      e.push_back(exp(wide(-kappa * square)));
      sum += all || p != y[at(i)] ? e.back() : wide(0);
    }
    out.value += log(wide(sum / e[at(y[at(i)])])) / x.rows;
    for (index p = 0; p < w.rows; ++p) {
      const bool own = p == y[at(i)];
      const wide q = all || !own ? wide(e[at(p)] / sum) : wide(0);
      pairs.add(i, p, wide(2 * kappa * (q - (own ? 1 : 0)) / x.rows), out.d_x, out.d_w);
    }
  }
  return out;
}

} // namespace

// Everything is in double: of T, the roundings of the results; of double, those of cosines, times
// α.
TEMPLATE_TEST_CASE("proxy_anchor: values and gradients", "[proxy_anchor]", float, double) {
  using T = TestType;
  error_judge of_values, of_slopes;
  struct shape {
    index rows, classes, features;
  };
  for (const shape& n :
       {shape{1, 1, 1}, shape{2, 3, 2}, shape{9, 8, 5}, shape{70, 19, 17}, shape{150, 5, 9}})
    for (const double alpha : {32.0, 1.0, 2000.0}) {
      INFO(n.rows << " x " << n.classes << " x " << n.features << ", alpha " << alpha);
      const auto x = random_batch<T>(n.rows, n.features, 1);
      const auto w = random_batch<T>(n.classes, n.features, 2);
      labels y = some_labels(n.rows, n.classes);
      if (n.rows > 8)
        y[3] = -100;
      batch<T> d_x(n.rows, n.features), d_w(n.classes, n.features);
      const perdita::proxy_anchor<T> loss({.alpha = alpha, .margin = 0.1});
      const T value = loss(x.seen(), w.seen(), y, d_x.view(), d_w.view());
      CHECK(loss(x.seen(), w.seen(), y) == value);
      const auto expected = anchors(x, w, y, alpha, 0.1);
      const double noise = sizeof(T) == 4 ? 1 : 1 + 4 * alpha;
      const wide unit = std::numeric_limits<T>::epsilon() * noise;
      CHECK(of_values.within(size_of(wide(value - expected.value)), 1,
                             wide(unit * (expected.value + (sizeof(T) == 4 ? 0 : 1)) + 1e-300L)));
      CHECK((n.features == 1 || slopes_within(of_slopes, d_x, expected.d_x, 4 * noise)));
      CHECK((n.features == 1 || slopes_within(of_slopes, d_w, expected.d_w, 4 * noise)));
    }
  report_accuracy<T>("proxy_anchor", "", in_epsilons, {-1, of_slopes.worst(), of_values.share()});
}

TEMPLATE_TEST_CASE("proxy_nca: values and gradients", "[proxy_nca]", float, double) {
  using T = TestType;
  const wide epsilon = std::numeric_limits<T>::epsilon();
  error_judge of_values, of_slopes;
  for (const index classes : {2, 5, 40})
    for (const T kappa : {T(1), T(16)})
      for (const bool all : {false, true}) {
        const auto x = random_batch<T>(23, 9, 1), w = random_batch<T>(classes, 9, 2);
        const labels y = some_labels(x.rows, w.rows);
        batch<T> d_x(x.rows, x.cols), d_w(w.rows, w.cols);
        const perdita::similarity head(perdita::proxy_nca<T>({.scale = kappa, .all_proxies = all}));
        const T value = head(x.seen(), w.seen(), y, d_x.view(), d_w.view());
        CHECK(head(x.seen(), w.seen(), y) == value);
        const auto expected = nca(x, w, y, kappa, all);
        CHECK(of_values.within(size_of(wide(value - expected.value)), 4,
                               wide(epsilon * (2 * kappa + size_of(expected.value)))));
        CHECK(slopes_within(of_slopes, d_x, expected.d_x, 4 + 4 * static_cast<double>(kappa)));
        CHECK(slopes_within(of_slopes, d_w, expected.d_w, 4 + 4 * static_cast<double>(kappa)));
      }
  report_accuracy<T>("proxy_nca", "", in_allowances,
                     {of_values.worst(), -1, std::max(of_values.share(), of_slopes.share())});
}

TEST_CASE("proxies: golden values", "[proxy_anchor][proxy_nca]") {
  const auto x = sheet_x(), w = sheet_w();
  batch<double> d_x(6, 4), d_w(3, 4);
  const labels y{0, 0, 1, 1, 2, 2};
  const auto check = [&](double got, double value, double of_x, double of_w) {
    CHECK(near(got, value, 1e-11));
    CHECK(near(length_of(d_x.x), of_x, 1e-8));
    CHECK(near(length_of(d_w.x), of_w, 1e-8));
  };
  const perdita::similarity nca(perdita::proxy_nca<double>({.scale = 3}));
  check(nca(x.seen(), w.seen(), y, d_x.view(), d_w.view()), -1.64768055997, 2.15346845, 2.1611873);
  const perdita::similarity all(perdita::proxy_nca<double>({.scale = 3, .all_proxies = true}));
  check(all(x.seen(), w.seen(), y, d_x.view(), d_w.view()), 1.10368945816, 1.24125189, 1.01960061);
  const perdita::proxy_anchor<double> anchor;
  check(anchor(x.seen(), w.seen(), y, d_x.view(), d_w.view()), 16.1675049744, 13.181507,
        18.2267955);
}

TEST_CASE("proxies: the gradients are the derivatives", "[proxy_anchor][proxy_nca]") {
  auto x = random_batch<double>(7, 4, 3), w = random_batch<double>(5, 4, 4);
  const labels y{0, 2, 2, 1, -100, 4, 0}; // a class without samples
  const auto check = [&](const auto& loss) {
    auto d_x = x, d_w = w, aside_x = x, aside_w = w;
    loss(x.seen(), w.seen(), y, d_x.view(), d_w.view());
    for (const bool of_x : {true, false}) {
      const auto report = perdita::testing::check_gradient(
          [&] { return loss(x.seen(), w.seen(), y, aside_x.view(), aside_w.view()); },
          of_x ? x.x : w.x, of_x ? d_x.x : d_w.x);
      INFO(report.message());
      CHECK(report.ok);
    }
  };
  check(perdita::proxy_anchor<double>({.alpha = 5}));
  check(perdita::similarity(perdita::proxy_nca<double>({.scale = 2})));
}

TEMPLATE_TEST_CASE("proxies: special values and calls", "[proxy_anchor][proxy_nca]", float,
                   double) {
  using T = TestType;
  using Catch::Matchers::ContainsSubstring;
  const perdita::proxy_anchor<T> loss;
  const auto x = random_batch<T>(150, 6, 1), w = random_batch<T>(20, 6, 2);
  const labels y = some_labels(150, 20);
  batch<T> d_x(150, 6), d_w(20, 6), again_x(150, 6, 1), again_w(20, 6, 1);
  const T value = loss(x.seen(), w.seen(), y, d_x.view(), d_w.view(), {.run_on = perdita::serial});
  const threads_executor pool(3, task_order::shuffled);
  CHECK(loss(x.seen(), w.seen(), y, again_x.view(), again_w.view(), {.run_on = pool}) == value);
  CHECK(again_x.x == d_x.x);
  CHECK(again_w.x == d_w.x);
  again_x = batch<T>(150, 6, 1);
  loss(x.seen(), w.seen(), y, again_x.view(), again_w.view(), {.scale = 3, .accumulate = true});
  for (std::size_t k = 0; k < d_x.x.size(); ++k)
    REQUIRE(std::abs(again_x.x[k] - (1 + 3 * d_x.x[k])) <=
            4 * std::numeric_limits<T>::epsilon() * (1 + 3 * std::abs(d_x.x[k])));

  // Zero vectors; classes without samples; only ignored samples; one class; nothing.
  const auto finite = [](const batch<T>& g) {
    bool all = true;
    for (const T slope : g.x)
      all = all && std::isfinite(slope);
    return all;
  };
  {
    auto zero_x = x, zero_w = w;
    for (index k = 0; k < 6; ++k)
      zero_x(4, k) = zero_w(7, k) = 0;
    CHECK(
        std::isfinite(loss(zero_x.seen(), zero_w.seen(), labels(150, 3), d_x.view(), d_w.view())));
    CHECK((finite(d_x) && finite(d_w)));
    CHECK((d_x(4, 2) == 0 && d_w(7, 2) == 0 && d_w(6, 2) != 0));
  }
  const T alone = loss(x.seen(), w.seen(), labels(150, -100), d_x.view(), d_w.view());
  CHECK(alone == 0);
  CHECK((d_x.x == batch<T>(150, 6).x && d_w.x == batch<T>(20, 6).x));
  batch<T> none(0, 6);
  CHECK(loss(none.view(), w.seen(), labels{}, none.view(), d_w.view()) == 0);
  CHECK(d_w.x == batch<T>(20, 6).x);
  CHECK(loss(none.view(), none.view(), labels{}) == 0);
  batch<T> d_three(3, 6, 9);
  CHECK(loss(random_batch<T>(3, 6, 4).seen(), none.view(), labels(3, -100), d_three.view(),
             none.view()) == 0);
  CHECK(d_three.x == batch<T>(3, 6).x);
  const auto one = random_batch<T>(1, 6, 8);
  CHECK(loss(one.seen(), one.seen(), labels{0}) > 0); // at a cosine of 1, log(1 + e^(−28.8))
  CHECK(loss(one.seen(), one.seen(), labels{0}) < T(1e-12));
  const perdita::similarity nca(perdita::proxy_nca<T>{});
  batch<T> d_one(1, 6), d_proxy(1, 6);
  CHECK(nca(one.seen(), random_batch<T>(1, 6, 9).seen(), labels{0}, d_one.view(), d_proxy.view()) ==
        0);
  CHECK(d_one.x == batch<T>(1, 6).x);
  {
    auto bad = x;
    bad(9, 1) = std::numeric_limits<T>::infinity();
    CHECK(std::isnan(loss(bad.seen(), w.seen(), y, d_x.view(), d_w.view())));
    CHECK((std::isnan(d_x(3, 3)) && std::isnan(d_w(19, 5))));
    labels without = y; // a sample that is ignored has no part, whatever it is
    without[9] = -100;
    const T expected = loss(x.seen(), w.seen(), without, d_x.view(), d_w.view());
    CHECK(loss(bad.seen(), w.seen(), without, again_x.view(), again_w.view()) == expected);
    CHECK((again_x.x == d_x.x && again_w.x == d_w.x));
  }
  {
    constexpr T inf = std::numeric_limits<T>::infinity();
    const perdita::proxy_nca<T> on_cosines({.scale = 2});
    batch<T> c(2, 3), g(2, 3);
    c.x = {T(0.25), -inf, T(0.25), -inf, -inf, -inf};
    CHECK(on_cosines(c.seen(), labels{1, -100}, g.view()) == inf);
    CHECK(g.x == std::vector<T>{2, -4, 2, 0, 0, 0});
    CHECK(on_cosines(c.seen(), labels{-100, 1}) == inf);
  }
  { // By hand: cosines 1 and 0 with α = 2.
    batch<T> a(1, 2), p(2, 2);
    a.x = {3, 0};
    p.x = {2, 0, 0, 5};
    const T hand =
        perdita::proxy_anchor<T>({.alpha = 2, .margin = 0.5})(a.seen(), p.seen(), labels{0});
    CHECK(near(static_cast<double>(hand),
               std::log1p(std::exp(-1.0)) + std::log1p(std::exp(1.0)) / 2,
               4 * static_cast<double>(std::numeric_limits<T>::epsilon())));
  }

  // Refused, with nothing written.
  batch<T> kept_x(150, 6, 7), kept_w(20, 6, 7);
  labels wrong = y;
  wrong[149] = 20;
  CHECK_THROWS_WITH(loss(x.seen(), w.seen(), wrong, kept_x.view(), kept_w.view()),
                    ContainsSubstring("labels[149] is 20, expected 0 to 19"));
  CHECK_THROWS_WITH(loss(x.seen(), w.seen(), labels(3, 0), kept_x.view(), kept_w.view()),
                    ContainsSubstring("labels is 3, expected 150"));
  CHECK_THROWS_WITH(loss(x.seen(), w.seen(), y, kept_x.view(), kept_x.view()),
                    ContainsSubstring("rows of the gradient of the proxies is 150"));
  auto in_place = x;
  CHECK_THROWS_WITH(loss(in_place.seen(), w.seen(), y, in_place.view(), kept_w.view()),
                    ContainsSubstring("overlaps"));
  const auto narrow = random_batch<T>(20, 5, 2);
  CHECK_THROWS_WITH(loss(x.seen(), narrow.seen(), y), ContainsSubstring("columns of the proxies"));
  CHECK((kept_x.x == batch<T>(150, 6, 7).x && kept_w.x == batch<T>(20, 6, 7).x));
  CHECK_THROWS_WITH(perdita::proxy_anchor<T>({.alpha = 0}), ContainsSubstring("alpha is 0"));
  CHECK_THROWS_WITH(perdita::proxy_anchor<T>({.margin = NAN}), ContainsSubstring("margin is"));
  CHECK_THROWS_WITH(perdita::proxy_nca<T>({.scale = -1}), ContainsSubstring("scale is -1"));
}

namespace {

/// ‖a_i − b_k‖² + 1e-6 of one a and b after another, which differ by little where differences are
/// taken: only those of rows that are not what they were are made anew.
class squares {
public:
  const wide_matrix& operator()(const wide_matrix& a, const wide_matrix& b) {
    const auto moved_a = moved(a_, a), moved_b = moved(b_, b);
    if (of_.x.size() != at(a.rows * b.rows))
      of_ = wide_matrix(a.rows, b.rows);
    for (index i = 0; i < a.rows; ++i)
      for (index k = 0; k < b.rows; ++k) {
        if (!moved_a[at(i)] && !moved_b[at(k)])
          continue;
        wide square = 1e-6;
        for (index j = 0; j < a.cols; ++j) {
          const wide off = a(i, j) - b(k, j);
          square += off * off;
        }
        of_(i, k) = square;
      }
    return of_;
  }

private:
  static std::vector<bool> moved(wide_matrix& from, const wide_matrix& to) {
    std::vector<bool> result(at(to.rows), from.x.size() != to.x.size());
    for (std::size_t e = 0; e < to.x.size(); ++e)
      if (from.x.size() == to.x.size() && from.x[e] != to.x[e])
        result[e / at(to.cols)] = true;
    from = to;
    return result;
  }
  wide_matrix a_{0, 0}, b_{0, 0}, of_{0, 0};
};
/// By its definition, from 113-bit distances.
wide proto_triplet_of(const wide_matrix& square, const labels& y, const wide& margin) {
  wide sum = 0, n = 0;
  for (index i = 0; i < square.rows; ++i) {
    if (y[at(i)] < 0)
      continue;
    wide nearest = infinity();
    for (index k = 0; k < square.cols; ++k)
      if (k != y[at(i)])
        nearest = smaller(nearest, square(i, k));
    const wide miss = sqrt(square(i, y[at(i)])) - sqrt(nearest) + margin;
    sum += miss > 0 ? miss : wide(0);
    n += 1;
  }
  return sum / n;
}

struct icnn_setting {
  index k = 4, considered = 0;
  bool drop = true;
};
/// By the sheet's text: all distances, sorted.
wide icnn_of(const wide_matrix& square, const labels& of, const labels& to, const icnn_setting& s) {
  const index origins = square.rows, targets = square.cols,
              k = s.k + 2 >= targets ? targets - 2 : s.k;
  const index ipc = s.considered ? s.considered : k + 1;
  const wide e = 1e-7;
  wide alike = 0, apart = 0, farthest = -1, rows_c = 0, rows_e = 0, gamma = 0;
  std::vector<wide> others, counts;
  for (index i = 0; i < origins; ++i) {
    std::vector<std::pair<wide, index>> d;
    for (index j = 0; j < targets; ++j)
      d.emplace_back(square(i, j), j);
    std::sort(d.begin(), d.end());
    if (s.drop)
      d.erase(d.begin());
    d.resize(std::min(d.size(), at(std::max(ipc, k)))); // no other is looked at
    for (auto& [distance, j] : d)
      distance = sqrt(distance);
    const auto same = [&](index j) { return to[at(d[at(j)].second)] == of[at(i)]; };
    wide r = -1, c = 0, top = 0, of_same = 0, of_others = 0;
    for (index j = 0; j < ipc && j < static_cast<index>(d.size()); ++j)
      if (r < 0 && !same(j))
        r = d[at(j)].first;
    for (index j = 0; j < k; ++j) {
      const wide n = r < 0 ? wide(0) : wide(d[at(j)].first / (r + e));
      top = larger(top, n);
      c += same(j) ? 1 : 0;
      of_same += same(j) ? n : wide(0);
      of_others += same(j) ? wide(0) : d[at(j)].first;
      if (!same(j))
        farthest = larger(farthest, d[at(j)].first);
    }
    alike += of_same / larger(wide(1), top) / (c + e);
    apart += of_others / (k - c + e);
    rows_c += c > 0 ? 1 : 0;
    rows_e += c < k ? 1 : 0;
    gamma += c / k / origins;
  }
  const wide a = 1 - alike / (rows_c + e);
  const wide b = farthest < 0 ? wide(1) : wide(apart / (farthest + e) / (rows_e + e));
  return -log(wide(((a + b) / 2 + (k + 2 < targets ? gamma : wide(1))) / 2));
}

/// Central differences in 113 bits.
template <class F> wide_matrix derivative(wide_matrix& x, F f) {
  wide_matrix g(x.rows, x.cols);
  const wide step = 1e-11L;
  for (std::size_t i = 0; i < x.x.size(); ++i) {
    const wide kept = x.x[i];
    x.x[i] = kept + step;
    const wide above = f();
    x.x[i] = kept - step;
    g.x[i] = (above - f()) / (2 * step);
    x.x[i] = kept;
  }
  return g;
}

} // namespace

TEMPLATE_TEST_CASE("proto_triplet", "[proto_triplet]", float, double) {
  using T = TestType;
  using Catch::Matchers::ContainsSubstring;
  error_judge of_values, of_slopes;
  const perdita::proto_triplet<T> loss;
  for (const index classes : {2, 7, 20}) {
    const auto q = random_batch<T>(31, 6, 1), c = random_batch<T>(classes, 6, 2);
    labels y = some_labels(31, classes);
    y[4] = -100;
    batch<T> d_q(31, 6), d_c(classes, 6);
    const T value = loss(q.seen(), c.seen(), y, d_q.view(), d_c.view());
    CHECK(loss(q.seen(), c.seen(), y) == value);
    wide_matrix wide_q(q), wide_c(c);
    squares square;
    const auto reference = [&] { return proto_triplet_of(square(wide_q, wide_c), y, 0.5); };
    const wide expected = reference();
    CHECK(expected > 0.1);
    CHECK(of_values.within(size_of(wide(value - expected)), 2,
                           wide(std::numeric_limits<T>::epsilon() * expected)));
    CHECK(slopes_within(of_slopes, d_q, derivative(wide_q, reference), 2));
    CHECK(slopes_within(of_slopes, d_c, derivative(wide_c, reference), 4));
  }
  report_accuracy<T>("proto_triplet", "", in_epsilons, of_values, of_slopes);

  const auto q = random_batch<T>(100, 6, 1), c = random_batch<T>(9, 6, 2);
  const labels y = some_labels(100, 9);
  batch<T> d_q(100, 6), d_c(9, 6), again_q(100, 6), again_c(9, 6);
  const T value = loss(q.seen(), c.seen(), y, d_q.view(), d_c.view(), {.run_on = perdita::serial});
  const threads_executor pool(3, task_order::shuffled);
  CHECK(loss(q.seen(), c.seen(), y, again_q.view(), again_c.view(), {.run_on = pool}) == value);
  CHECK((again_q.x == d_q.x && again_c.x == d_c.x));

  auto spoilt = q; // a query that is ignored has no part, whatever it is
  spoilt(3, 1) = std::numeric_limits<T>::quiet_NaN();
  labels without = y;
  without[3] = -100;
  const T of_others = loss(q.seen(), c.seen(), without, d_q.view(), d_c.view());
  CHECK(loss(spoilt.seen(), c.seen(), without, again_q.view(), again_c.view()) == of_others);
  CHECK((again_q.x == d_q.x && again_c.x == d_c.x));

  // One prototype alone; a query at its prototype; ties; only ignored; what is not finite.
  batch<T> a(1, 2), p(3, 2), d_a(1, 2), d_p(3, 2);
  a.x = {1, 2};
  p.x = {1, 2, 1, 2, 3, 4};
  CHECK(near(static_cast<double>(loss(a.seen(), p.seen(), labels{0}, d_a.view(), d_p.view())), 0.5,
             1e-6)); // both distances are √ε
  CHECK((d_a.x == batch<T>(1, 2).x && d_p.x == batch<T>(3, 2).x));
  batch<T> d_one(1, 2, 7);
  CHECK(loss(a.seen(), p.seen(), labels{-100}, d_a.view(), d_p.view()) == 0);
  CHECK(loss(a.seen(), a.seen(), labels{0}, d_a.view(), d_one.view()) == 0);
  CHECK(d_one.x == batch<T>(1, 2).x);
  p(2, 1) = std::numeric_limits<T>::quiet_NaN();
  CHECK(std::isnan(loss(a.seen(), p.seen(), labels{0}, d_a.view(), d_p.view())));
  CHECK(std::isnan(d_p(0, 0)));
  CHECK_THROWS_WITH(loss(a.seen(), p.seen(), labels{3}), ContainsSubstring("labels[0] is 3"));
  CHECK_THROWS_WITH(loss(a.seen(), c.seen(), labels{0}),
                    ContainsSubstring("columns of the prototypes is 6"));
  CHECK_THROWS_WITH(loss(a.seen(), p.seen(), labels{0}, d_a.view(), p.view()),
                    ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(perdita::proto_triplet<T>({.epsilon = -1}), ContainsSubstring("epsilon is -1"));

  // Means, and back: of a sum of the means' entries times weights.
  batch<T> x(3, 2), means(3, 2), d_x(3, 2);
  x.x = {1, 2, 3, 5, 8, 13};
  perdita::class_means<T>(x.seen(), labels{2, 0, 2}, means.view());
  CHECK(means.x == std::vector<T>{3, 5, 0, 0, T(4.5), T(7.5)});
  const batch<T> weights = means;
  perdita::class_means_gradient<T>(weights.seen(), labels{2, 0, 2}, d_x.view());
  CHECK(d_x.x == std::vector<T>{T(2.25), T(3.75), 3, 5, T(2.25), T(3.75)});
  CHECK_THROWS_WITH(perdita::class_means<T>(x.seen(), labels{2, 3, 2}, means.view()),
                    ContainsSubstring("labels[1] is 3"));
  CHECK_THROWS_WITH(perdita::class_means_gradient<T>(d_x.seen(), labels{2, 0, 2}, d_x.view()),
                    ContainsSubstring("overlaps"));
}

TEMPLATE_TEST_CASE("icnn", "[icnn]", float, double) {
  using T = TestType;
  using Catch::Matchers::ContainsSubstring;
  error_judge of_values, of_slopes;
  const wide epsilon = std::numeric_limits<T>::epsilon();
  struct shape {
    index rows, targets, classes;
  };
  for (const shape& n : {shape{6, 3, 2}, shape{5, 6, 2}, shape{10, 20, 3}, shape{12, 24, 8}})
    for (const icnn_setting& s : {icnn_setting{}, icnn_setting{2, 0, false}, icnn_setting{3, 12}}) {
      INFO(n.rows << ", " << n.targets << ", k " << s.k);
      const auto o = random_batch<T>(n.rows, 4, 3), t = random_batch<T>(n.targets, 4, 4);
      const labels of = some_labels(n.rows, n.classes), to = some_labels(n.targets, n.classes);
      const perdita::icnn<T> loss(
          {.neighbours = s.k, .considered = s.considered, .drop_nearest = s.drop});
      batch<T> d_o(n.rows, 4), d_t(n.targets, 4);
      const T value = loss(o.seen(), of, t.seen(), to, d_o.view(), d_t.view());
      CHECK(loss(o.seen(), of, t.seen(), to) == value);
      wide_matrix wide_o(o), wide_t(t);
      squares square;
      const auto reference = [&] { return icnn_of(square(wide_o, wide_t), of, to, s); };
      const wide expected = reference();
      CHECK(of_values.within(size_of(wide(value - expected)), 4, wide(epsilon * (1 + expected))));
      CHECK(slopes_within(of_slopes, d_o, derivative(wide_o, reference), 16));
      CHECK(slopes_within(of_slopes, d_t, derivative(wide_t, reference), 16));
    }
  { // Within one set, of which the first is far from everything.
    auto x = random_batch<T>(25, 4, 5);
    for (index k = 0; k < 4; ++k)
      x(0, k) *= 100;
    const labels y = some_labels(25, 3);
    batch<T> d_x(25, 4), again(25, 4);
    const perdita::icnn<T> loss;
    const T value = loss.within(x.seen(), y, d_x.view(), {.run_on = perdita::serial});
    CHECK(loss.within(x.seen(), y) == value);
    const threads_executor pool(3, task_order::shuffled);
    CHECK(loss.within(x.seen(), y, again.view(), {.run_on = pool}) == value);
    CHECK(again.x == d_x.x);
    wide_matrix wide_x(x);
    squares square;
    const auto reference = [&] { return icnn_of(square(wide_x, wide_x), y, y, {}); };
    CHECK(of_values.within(size_of(wide(value - reference())), 4, epsilon));
    CHECK(slopes_within(of_slopes, d_x, derivative(wide_x, reference), 16));

    // All of one class; none of one's own; equal embeddings; what is not finite; nothing.
    CHECK(loss.within(x.seen(), labels(25, 5), d_x.view()) == 0);
    CHECK(d_x.x == batch<T>(25, 4).x);
    labels each;
    for (index i = 0; i < 25; ++i)
      each.push_back(i);
    CHECK(std::isfinite(loss.within(x.seen(), each, d_x.view())));
    CHECK(std::isfinite(d_x(0, 0)));
    const batch<T> equal(25, 4, 3);
    CHECK(std::isfinite(loss.within(equal.seen(), y, d_x.view())));
    CHECK(d_x.x == batch<T>(25, 4).x);
    batch<T> none(0, 4);
    CHECK(loss(none.seen(), labels{}, x.seen(), y, none.view(), d_x.view()) == 0);
    x(3, 3) = std::numeric_limits<T>::infinity();
    CHECK(std::isnan(loss.within(x.seen(), y, d_x.view())));
    CHECK(std::isnan(d_x(0, 0)));
    CHECK_THROWS_WITH(loss.within(random_batch<T>(2, 4, 1).seen(), labels{0, 1}),
                      ContainsSubstring("targets is 2, expected at least 3"));
    CHECK_THROWS_WITH(loss.within(x.seen(), labels{0, 1}),
                      ContainsSubstring("labels of the origins is 2, expected 25"));
    CHECK_THROWS_WITH(loss.within(x.seen(), y, x.view()), ContainsSubstring("overlaps"));
    CHECK_THROWS_WITH(perdita::icnn<T>({.neighbours = 0}), ContainsSubstring("neighbours is 0"));
    CHECK_THROWS_WITH(perdita::icnn<T>({.considered = 3}), ContainsSubstring("considered is 3"));
  }
  report_accuracy<T>("icnn", "", in_epsilons, of_values, of_slopes);
}

TEST_CASE("proto_triplet, icnn: margin and epsilon; a gradient of means that is added", "") {
  // Distances √(4 + 5) to its own prototype, √(11 + 5) to the other
  batch<double> q(1, 2), p(2, 2);
  q.x = {0, 0}, p.x = {2, 0, 1, std::sqrt(10.0)};
  const perdita::proto_triplet<double> loss({.margin = 3, .epsilon = 5});
  CHECK(near(loss(q.seen(), p.seen(), labels{0}), 3 - 4 + 3, 1e-14));

  const auto x = random_batch<double>(12, 3, 5);
  const labels y = some_labels(12, 3);
  CHECK(perdita::icnn<double>({.epsilon = 1})(x.seen(), y, x.seen(), y) !=
        perdita::icnn<double>()(x.seen(), y, x.seen(), y));

  batch<double> weights(3, 2), d_x(3, 2, 1.0);
  weights.x = {3, 5, 0, 0, 4.5, 7.5};
  perdita::class_means_gradient<double>(weights.seen(), labels{2, 0, 2}, d_x.view(),
                                        {.scale = 2, .accumulate = true});
  CHECK(d_x.x == std::vector<double>{5.5, 8.5, 7, 11, 5.5, 8.5});
}

} // namespace perdita_tests
