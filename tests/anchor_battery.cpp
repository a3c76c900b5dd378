// SPDX-License-Identifier: MIT

// What the tests of losses of anchors share. Also linked into the [threads] tests.

#include "support/anchors.hpp"

#include <algorithm>
#include <cmath>

namespace perdita_tests {

namespace {

void scale_to_unit(wide_matrix& x, perdita::index r) {
  wide square = 0;
  for (perdita::index c = 0; c < x.cols; ++c)
    square += x(r, c) * x(r, c);
  const wide length = square > 0 ? sqrt(square) : wide(1);
  for (perdita::index c = 0; c < x.cols; ++c)
    x(r, c) /= length;
}

} // namespace

wide_matrix unit_rows(wide_matrix x) {
  for (perdita::index r = 0; r < x.rows; ++r)
    scale_to_unit(x, r);
  return x;
}
void comparer::side::become(const wide_matrix& m, bool normalise) {
  const bool first = raw.x.size() != m.x.size();
  if (first)
    raw = unit = m;
  moved.assign(static_cast<std::size_t>(m.rows), first);
  for (perdita::index r = 0; r < m.rows; ++r) {
    const auto begin = m.x.begin() + r * m.cols;
    const auto kept = raw.x.begin() + r * m.cols;
    if (!first && std::equal(begin, begin + m.cols, kept))
      continue;
    moved[static_cast<std::size_t>(r)] = true;
    std::copy_n(begin, m.cols, kept);
    std::copy_n(begin, m.cols, unit.x.begin() + r * m.cols);
    if (normalise)
      scale_to_unit(unit, r);
  }
}
const wide_comparisons& comparer::operator()(const wide_matrix& x, const wide_matrix& y) {
  x_.become(x, subject_.normalise);
  y_.become(y, subject_.normalise);
  if (now_.score.x.size() != static_cast<std::size_t>(x.rows * y.rows))
    now_.score = wide_matrix(x.rows, y.rows);
  for (perdita::index i = 0; i < x.rows; ++i)
    for (perdita::index j = 0; j < y.rows; ++j) {
      if (!x_.moved[static_cast<std::size_t>(i)] && !y_.moved[static_cast<std::size_t>(j)])
        continue;
      wide sum = 0;
      for (perdita::index k = 0; k < x.cols; ++k) {
        const wide& a = x_.unit(i, k);
        const wide& b = y_.unit(j, k);
        const wide d = subject_.distances ? wide(a - b) : wide(0);
        sum += subject_.distances ? wide(d * d) : wide(a * b);
      }
      now_.score(i, j) = subject_.distances ? wide(sqrt(sum)) : sum;
    }
  return now_;
}
std::vector<std::vector<int>> relations(const std::vector<int>& x, const std::vector<int>& y,
                                        bool alone) {
  std::vector<std::vector<int>> result(x.size(), std::vector<int>(y.size()));
  for (std::size_t i = 0; i < x.size(); ++i)
    for (std::size_t j = 0; j < y.size(); ++j)
      result[i][j] = alone && i == j ? 0 : x[i] == y[j] ? 1 : -1;
  return result;
}

wide_matrix differences(wide_matrix& m, const std::function<wide()>& f) {
  const wide h = 1e-11;
  wide_matrix result(m.rows, m.cols);
  for (std::size_t k = 0; k < m.x.size(); ++k) {
    const wide kept = m.x[k];
    m.x[k] = kept + h;
    const wide above = f();
    m.x[k] = kept - h;
    result.x[k] = (above - f()) / (2 * h);
    m.x[k] = kept;
  }
  return result;
}

template <class T>
void check_values_of_calls(const std::string& name, const anchor_calls<T>& loss,
                           const anchor_subject& subject, const anchor_definition& definition,
                           const anchor_shape& shape) {
  const auto [n, m, d, classes] = shape;
  error_judge values, slopes;
  const auto close = [&](T got, const wide& expected) {
    const wide unit = std::numeric_limits<T>::epsilon() * (1 + size_of(expected));
    CHECK(values.within(size_of(wide(got - expected)), subject.value_budget, unit));
  };
  for (const std::uint64_t seed : {1U, 2U}) {
    const auto x = random_batch<T>(n, d, seed), y = random_batch<T>(m, d, seed + 10);
    wide_matrix wide_x(x), wide_y(y);
    std::vector<int> labels_x, labels_y;
    for (int i = 0; i < n; ++i)
      labels_x.push_back((i * i + i / 3) % classes);
    for (int j = 0; j < m; ++j)
      labels_y.push_back(classes - 1 - (j * j + j / 5) % classes); // in another order
    {
      INFO(name << ", with themselves, seed " << seed);
      comparer compared(relations(labels_x, labels_x, true), subject);
      const auto value = [&] { return definition(compared(wide_x, wide_x)); };
      batch<T> g(n, d, T(7));
      const wide expected = value();
      close(loss(x.view(), labels_x, g.view()), expected);
      close(loss(x.view(), labels_x), expected);
      CHECK(slopes_within(slopes, g, differences(wide_x, value), subject.gradient_budget));
    }
    {
      INFO(name << ", with others, seed " << seed);
      comparer compared(relations(labels_x, labels_y, false), subject);
      const auto value = [&] { return definition(compared(wide_x, wide_y)); };
      batch<T> g(n, d, T(7)), h(m, d, T(7));
      close(loss(x.view(), y.view(), labels_x, labels_y, g.view(), h.view()), value());
      CHECK(slopes_within(slopes, g, differences(wide_x, value), subject.gradient_budget));
      CHECK(slopes_within(slopes, h, differences(wide_y, value), subject.gradient_budget));
    }
  }
  report_accuracy<T>(name, "", in_epsilons, values, slopes);
}

template <class T> void check_calls_of(const anchor_calls<T>& loss) {
  using Catch::Matchers::ContainsSubstring;
  using perdita::index;
  const index n = 30, m = 75, d = 7;
  const auto x = random_batch<T>(n, d, 3), y = random_batch<T>(m, d, 4);
  std::vector<int> of_x, of_y;
  for (int i = 0; i < n; ++i)
    of_x.push_back(i % 5 - 2);
  for (int j = 0; j < m; ++j)
    of_y.push_back(j % 5 - 2);
  batch<T> g(n, d), h(m, d);
  const T value =
      loss(x.view(), y.view(), of_x, of_y, g.view(), h.view(), {.run_on = perdita::serial});
  const T alone = loss(x.view(), of_x, {.run_on = perdita::serial});

  for (const std::size_t threads : {2U, 7U}) {
    const threads_executor pool(threads, task_order::shuffled);
    batch<T> again(n, d), other(m, d);
    CHECK(loss(x.view(), y.view(), of_x, of_y, again.view(), other.view(), {.run_on = pool}) ==
          value);
    CHECK(again.x == g.x);
    CHECK(other.x == h.x);
  }
  { // Added to what is there, and by columns.
    batch<T> again(d, n, T(1)), other(m, 2 * d, T(1)), turned(d, n);
    for (index i = 0; i < n; ++i)
      for (index k = 0; k < d; ++k)
        turned(k, i) = x(i, k);
    const perdita::matrix_view<const T> columns(turned.x.data(), n, d, 1, n);
    const perdita::matrix_view<T> to(again.x.data(), n, d, 1, n);
    const perdita::matrix_view<T> spaced(other.x.data(), m, d, 2 * d, 2);
    CHECK(loss(columns, y.view(), of_x, of_y, to, spaced, {.scale = 3, .accumulate = true}) ==
          value);
    bool same = true;
    const T unit = 8 * std::numeric_limits<T>::epsilon();
    for (index i = 0; i < n; ++i)
      for (index k = 0; k < d; ++k)
        same &= std::abs(again(k, i) - (1 + 3 * g(i, k))) <= unit * (1 + 3 * std::abs(g(i, k)));
    for (index j = 0; j < m; ++j)
      for (index k = 0; k < d; ++k)
        same &= other(j, 2 * k + 1) == 1 &&
                std::abs(other(j, 2 * k) - (1 + 3 * h(j, k))) <= unit * (1 + 3 * std::abs(h(j, k)));
    CHECK(same);
  }
  { // Weights of 0 and 1 are a choice of anchors; a filter can take candidates away.
    std::vector<T> weights(static_cast<std::size_t>(n), 1), values(weights);
    for (std::size_t i = 20; i < 30; ++i)
      weights[i] = 0;
    const T some = loss(x.view(), y.view(), of_x, of_y, {.row_weights = weights, .values = values});
    const perdita::matrix_view<const T> first(x.x.data(), 20, d);
    const std::vector<int> first_of_x(of_x.begin(), of_x.begin() + 20);
    CHECK(near(static_cast<double>(some),
               static_cast<double>(loss(first, y.view(), first_of_x, of_y)), 1e-5));
    CHECK(values[25] == 0);
    const auto near_only = [](index, T* relation, index count) {
      for (index j = 40; j < count; ++j)
        relation[j] = 0;
    };
    const perdita::matrix_view<const T> nearer(y.x.data(), 40, d);
    const std::vector<int> nearer_of_y(of_y.begin(), of_y.begin() + 40);
    CHECK(near(static_cast<double>(loss(x.view(), y.view(), of_x, of_y, {.filter = near_only})),
               static_cast<double>(loss(x.view(), nearer, of_x, nearer_of_y)), 1e-5));
  }
  { // What is compared with nothing is nothing, whatever it is.
    const index gone = 4;
    const auto without = [](index anchor, T* relation, index count) {
      if (anchor == gone)
        std::fill_n(relation, count, T(0));
      relation[gone] = 0;
    };
    const perdita::anchor_options<T> call{.filter = without};
    for (const T odd : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity()}) {
      auto anchors = x, candidates = y;
      anchors(gone, d - 1) = candidates(gone, 0) = odd;
      batch<T> sound(n, d), of_others(m, d), again(n, d, T(5)), other(m, d, T(5));
      const T apart = loss(x.view(), y.view(), of_x, of_y, sound.view(), of_others.view(), call);
      CHECK(loss(anchors.view(), candidates.view(), of_x, of_y, again.view(), other.view(), call) ==
            apart);
      CHECK((again.x == sound.x && other.x == of_others.x));
      const T with_itself = loss(x.view(), of_x, sound.view(), call);
      CHECK(loss(anchors.view(), of_x, again.view(), call) == with_itself);
      CHECK(again.x == sound.x);
    }
  }
  { // An anchor of weight 0 is nothing, whatever it is, and whatever it is compared with.
    std::vector<T> weights(static_cast<std::size_t>(n), 1);
    weights[3] = 0;
    const perdita::anchor_options<T> call{.row_weights = weights};
    batch<T> sound(n, d), of_others(m, d), again(n, d, T(5)), other(m, d, T(5));
    const T without = loss(x.view(), y.view(), of_x, of_y, sound.view(), of_others.view(), call);
    auto spoilt = x;
    spoilt(3, 2) = std::numeric_limits<T>::quiet_NaN();
    spoilt(3, 1) = std::numeric_limits<T>::infinity();
    CHECK(loss(spoilt.view(), y.view(), of_x, of_y, again.view(), other.view(), call) == without);
    CHECK((again.x == sound.x && other.x == of_others.x));
    auto rival = y;
    rival(1, 0) = std::numeric_limits<T>::quiet_NaN();
    CHECK(std::isnan(loss(x.view(), rival.view(), of_x, of_y, again.view(), other.view(), call)));
    CHECK((std::isnan(again(2, 0)) && again(3, 0) == 0));
  }
  { // What is no number stays one; nothing at all is 0.
    auto spoilt = x;
    spoilt(3, 2) = std::numeric_limits<T>::quiet_NaN();
    CHECK(std::isnan(loss(spoilt.view(), y.view(), of_x, of_y)));
    CHECK(std::isnan(loss(spoilt.view(), of_x)));
    spoilt(3, 2) = std::numeric_limits<T>::infinity();
    CHECK(std::isnan(loss(spoilt.view(), of_x)));
    const std::vector<int> none;
    CHECK(loss(perdita::matrix_view<const T>(nullptr, 0, d), none) == 0);
  }
  { // Equal and zero vectors, whoever belongs to whom, make numbers; one row is compared with none.
    const batch<T> equal(6, d, T(2)), zero(6, d), one(1, d, T(2));
    batch<T> to(6, d), to_one(1, d, T(7));
    const std::vector<int> alike(6, 1), apart{1, 2, 3, 4, 5, 6}, twos{1, 2, 3, 1, 2, 3};
    for (const auto& labels : {alike, apart, twos}) {
      CHECK(std::isfinite(loss(equal.view(), labels, to.view())));
      CHECK(std::all_of(to.x.begin(), to.x.end(), [](T slope) { return std::isfinite(slope); }));
      CHECK(std::isfinite(loss(zero.view(), labels, to.view())));
      CHECK(to.x == std::vector<T>(to.x.size(), T(0)));
    }
    CHECK(loss(one.view(), std::vector<int>{1}, to_one.view()) == 0);
    CHECK(to_one.x == std::vector<T>(to_one.x.size(), T(0)));
  }
  // Refused, with nothing written.
  const auto kept = g;
  const std::vector<int> few(3);
  CHECK_THROWS_WITH(loss(x.view(), few, g.view()), ContainsSubstring("labels is 3, expected 30"));
  CHECK_THROWS_WITH(loss(x.view(), of_x, h.view()),
                    ContainsSubstring("rows of the gradient of x is 75"));
  auto overlapping = x;
  CHECK_THROWS_WITH(loss(overlapping.view(), of_x, overlapping.view()),
                    ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(loss.views(x.view(), 4, g.view()), ContainsSubstring("views is 4"));
  CHECK(g.x == kept.x);
  CHECK(loss(x.view(), of_x) == alone);
}

#define PERDITA_TEST_ANCHOR_CHECKS(T)                                                              \
  template void check_values_of_calls(const std::string&, const anchor_calls<T>&,                  \
                                      const anchor_subject&, const anchor_definition&,             \
                                      const anchor_shape&);                                        \
  template void check_calls_of(const anchor_calls<T>&);
PERDITA_TEST_ANCHOR_CHECKS(float)
PERDITA_TEST_ANCHOR_CHECKS(double)

} // namespace perdita_tests
