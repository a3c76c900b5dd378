// SPDX-License-Identifier: MIT
#pragma once

// Batches of embeddings, and what every loss of one or two of them promises of a call.

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <perdita/core/embeddings.hpp>
#include <perdita/testing/gradient_check.hpp>

#include "accuracy.hpp"
#include "catch.hpp"
#include "executors.hpp"
#include "numbers.hpp"
#include "wide.hpp"

namespace perdita_tests {

/// Row-major and packed.
template <class T> struct batch {
  perdita::index rows, cols;
  std::vector<T> x;

  batch(perdita::index n, perdita::index d, T filler = 0)
      : rows(n), cols(d), x(static_cast<std::size_t>(n * d), filler) {}
  T& operator()(perdita::index r, perdita::index c) {
    return x[static_cast<std::size_t>(r * cols + c)];
  }
  T operator()(perdita::index r, perdita::index c) const {
    return x[static_cast<std::size_t>(r * cols + c)];
  }
  perdita::matrix_view<T> view() { return {x.data(), rows, cols}; }
  perdita::matrix_view<const T> view() const { return {x.data(), rows, cols}; }
  perdita::matrix_view<const T> seen() const { return view(); }
};

template <class T>
batch<T> random_batch(perdita::index rows, perdita::index cols, std::uint64_t seed,
                      double spread = 1, double offset = 0) {
  random_numbers random(seed);
  batch<T> result(rows, cols);
  for (T& x : result.x)
    x = static_cast<T>(offset + spread * random.normal());
  return result;
}

/// The formula sheet's X (sines) and Y (cosines), 6 × 4.
inline batch<double> sheet_x() {
  batch<double> result(6, 4);
  for (std::size_t k = 0; k < 24; ++k) {
    const double t = static_cast<double>(k);
    result.x[k] = std::sin(0.7 * t + 0.3 + 0.15 * t * t);
  }
  return result;
}
inline batch<double> sheet_y() {
  batch<double> result(6, 4);
  for (std::size_t k = 0; k < 24; ++k) {
    const double t = static_cast<double>(k);
    result.x[k] = std::cos(0.9 * t + 0.1 + 0.15 * t * t);
  }
  return result;
}
/// Rows of length 1.
inline batch<double> unit_rows(batch<double> x) {
  for (perdita::index r = 0; r < x.rows; ++r) {
    double square = 0;
    for (perdita::index c = 0; c < x.cols; ++c)
      square += x(r, c) * x(r, c);
    for (perdita::index c = 0; c < x.cols; ++c)
      x(r, c) /= std::sqrt(square);
  }
  return x;
}
inline double length_of(const std::vector<double>& x) {
  double square = 0;
  for (const double a : x)
    square += a * a;
  return std::sqrt(square);
}
inline bool near(double got, double expected, double relative) {
  return std::abs(got - expected) <= relative * std::abs(expected);
}

/// A matrix in 113 bits.
struct wide_matrix {
  perdita::index rows, cols;
  std::vector<wide> x;

  wide_matrix(perdita::index n, perdita::index d)
      : rows(n), cols(d), x(static_cast<std::size_t>(n * d), 0) {}
  template <class T> explicit wide_matrix(const batch<T>& b) : wide_matrix(b.rows, b.cols) {
    for (std::size_t i = 0; i < x.size(); ++i)
      x[i] = b.x[i];
  }
  wide& operator()(perdita::index r, perdita::index c) {
    return x[static_cast<std::size_t>(r * cols + c)];
  }
  const wide& operator()(perdita::index r, perdita::index c) const {
    return x[static_cast<std::size_t>(r * cols + c)];
  }
};
/// Eigenvalues of a symmetric matrix, which becomes diagonal; the columns of `vectors` are theirs.
inline wide_matrix diagonalise(wide_matrix& a) {
  const auto n = a.rows;
  wide_matrix vectors(n, n);
  for (perdita::index i = 0; i < n; ++i)
    vectors(i, i) = 1;
  for (int sweep = 0; sweep < 20; ++sweep)
    for (perdita::index p = 0; p < n; ++p)
      for (perdita::index q = p + 1; q < n; ++q) {
        if (size_of(a(p, q)) < wide(1e-40))
          continue;
        const wide theta = (a(q, q) - a(p, p)) / (2 * a(p, q));
        const wide root = size_of(theta) + sqrt(wide(theta * theta + 1));
        const wide t = theta < 0 ? wide(-1 / root) : wide(1 / root);
        const wide c = 1 / sqrt(wide(t * t + 1)), s = t * c;
        const auto turn = [&](wide& x, wide& y) {
          const wide first = c * x - s * y;
          y = s * x + c * y;
          x = first;
        };
        for (perdita::index k = 0; k < n; ++k)
          turn(a(k, p), a(k, q));
        for (perdita::index k = 0; k < n; ++k)
          turn(a(p, k), a(q, k));
        for (perdita::index k = 0; k < n; ++k)
          turn(vectors(k, p), vectors(k, q));
      }
  return vectors;
}
/// Singular values of m by the eigenvalues of m mᵀ, and Σ_k f(k, σ_k) u_k v_kᵀ, u_kᵀ m being
/// σ_k v_kᵀ.
struct wide_spectrum {
  wide_matrix m, vectors;
  std::vector<wide> sigma;

  explicit wide_spectrum(const wide_matrix& from) : m(from), vectors(0, 0) {
    wide_matrix gram(m.rows, m.rows);
    for (perdita::index i = 0; i < m.rows; ++i)
      for (perdita::index j = 0; j < m.rows; ++j)
        for (perdita::index k = 0; k < m.cols; ++k)
          gram(i, j) += m(i, k) * m(j, k);
    vectors = diagonalise(gram);
    for (perdita::index i = 0; i < m.rows; ++i)
      sigma.push_back(gram(i, i) > 1e-28 ? sqrt(gram(i, i)) : wide(0));
  }
  template <class F> wide_matrix combine(F f) const {
    wide_matrix result(m.rows, m.cols);
    for (std::size_t k = 0; k < sigma.size(); ++k) {
      if (sigma[k] == 0)
        continue;
      const auto col = static_cast<perdita::index>(k);
      for (perdita::index j = 0; j < m.cols; ++j) {
        wide along = 0;
        for (perdita::index i = 0; i < m.rows; ++i)
          along += vectors(i, col) * m(i, j);
        for (perdita::index i = 0; i < m.rows; ++i)
          result(i, j) += f(k) * vectors(i, col) * along / sigma[k];
      }
    }
    return result;
  }
};

/// Errors of a gradient against its largest entry.
template <class T>
bool slopes_within(error_judge& judge, const batch<T>& got, const wide_matrix& expected,
                   double budget) {
  wide top = 1e-6; // where all are 0, and the expected ones differences of a constant
  for (const wide& g : expected.x)
    top = larger(top, size_of(g));
  bool all = true;
  for (std::size_t i = 0; i < got.x.size(); ++i)
    all = judge.within(size_of(wide(got.x[i] - expected.x[i])), budget,
                       std::numeric_limits<T>::epsilon() * top) &&
          all;
  return all;
}

/// One or two batches and their gradients in one call.
template <class T, std::size_t N> using views_of = std::array<perdita::matrix_view<const T>, N>;
template <class T, std::size_t N> using gradients_of = std::array<perdita::matrix_view<T>, N>;
template <std::size_t N, class T, class Loss>
T apply(const Loss& loss, const views_of<T, N>& x, const gradients_of<T, N>& g,
        const perdita::embedding_options<T>& call = {}) {
  if constexpr (N == 1)
    return loss(x[0], g[0], call);
  else
    return loss(x[0], x[1], g[0], g[1], call);
}

/// The gradients are the derivatives.
template <std::size_t N, class Loss>
void check_derivative(const Loss& loss, std::array<batch<double>, N> x) {
  std::array<batch<double>, N> g = x, spare = x;
  views_of<double, N> views;
  gradients_of<double, N> to, aside;
  for (std::size_t i = 0; i < N; ++i)
    views[i] = x[i].seen(), to[i] = g[i].view(), aside[i] = spare[i].view();
  apply<N>(loss, views, to);
  for (std::size_t i = 0; i < N; ++i) {
    const auto report = perdita::testing::check_gradient(
        [&] { return apply<N>(loss, views, aside); }, x[i].x, g[i].x);
    INFO(report.message());
    CHECK(report.ok);
  }
}

/// Layouts, threads, scale and accumulate, numbers that are not finite, nothing, and refusals.
template <std::size_t N, class Loss>
void check_calls(const Loss& loss, perdita::index rows, perdita::index cols) {
  using T = typename Loss::value_type;
  using Catch::Matchers::ContainsSubstring;
  using perdita::matrix_view;
  std::vector<batch<T>> x, g;
  views_of<T, N> views;
  gradients_of<T, N> to;
  for (std::size_t i = 0; i < N; ++i) {
    x.push_back(random_batch<T>(rows, cols, 5 + i));
    g.emplace_back(rows, cols, T(7));
  }
  for (std::size_t i = 0; i < N; ++i)
    views[i] = x[i].seen(), to[i] = g[i].view();
  const T value = apply<N>(loss, views, to, {.run_on = perdita::serial});
  if constexpr (N == 1)
    CHECK(loss(views[0]) == value);
  else if constexpr (requires { loss(views[0], views[1]); })
    CHECK(loss(views[0], views[1]) == value);

  const auto repeat = [&](const perdita::embedding_options<T>& call) {
    std::vector<batch<T>> again;
    for (std::size_t i = 0; i < N; ++i)
      again.emplace_back(rows, cols, T(1));
    gradients_of<T, N> into;
    for (std::size_t i = 0; i < N; ++i)
      into[i] = again[i].view();
    CHECK(apply<N>(loss, views, into, call) == value);
    return again;
  };
  for (const std::size_t n : {2U, 7U}) {
    const threads_executor pool(n, task_order::shuffled);
    const auto again = repeat({.run_on = pool});
    for (std::size_t i = 0; i < N; ++i)
      CHECK(again[i].x == g[i].x);
  }
  const auto added = repeat({.scale = 3, .accumulate = true});
  for (std::size_t i = 0; i < N; ++i)
    for (std::size_t k = 0; k < g[i].x.size(); ++k)
      REQUIRE(std::abs(added[i].x[k] - (1 + 3 * g[i].x[k])) <=
              4 * std::numeric_limits<T>::epsilon() * (1 + 3 * std::abs(g[i].x[k])));

  { // Columns two apart, from the last to the first; the gradients with gaps between.
    std::vector<batch<T>> turned, gaps;
    for (std::size_t i = 0; i < N; ++i) {
      turned.emplace_back(cols, rows);
      gaps.emplace_back(rows, 2 * cols, T(9));
      for (perdita::index r = 0; r < rows; ++r)
        for (perdita::index c = 0; c < cols; ++c)
          turned[i](cols - 1 - c, r) = x[i](r, c);
    }
    views_of<T, N> strided;
    gradients_of<T, N> spaced;
    for (std::size_t i = 0; i < N; ++i) {
      strided[i] =
          matrix_view<const T>(turned[i].x.data() + (cols - 1) * rows, rows, cols, 1, -rows);
      spaced[i] = matrix_view<T>(gaps[i].x.data(), rows, cols, 2 * cols, 2);
    }
    CHECK(apply<N>(loss, strided, spaced) == value);
    bool same = true;
    for (std::size_t i = 0; i < N; ++i)
      for (perdita::index r = 0; r < rows; ++r)
        for (perdita::index c = 0; c < cols; ++c)
          same = same && gaps[i](r, 2 * c) == g[i](r, c) && gaps[i](r, 2 * c + 1) == 9;
    CHECK(same);
  }

  // Refused, with nothing written.
  const auto kept = g;
  auto wrong = views;
  wrong[N - 1].data = nullptr;
  CHECK_THROWS_WITH(apply<N>(loss, wrong, to), ContainsSubstring("embeddings is null"));
  auto narrow = to;
  narrow[N - 1].cols -= 1;
  CHECK_THROWS_WITH(apply<N>(loss, views, narrow),
                    ContainsSubstring("columns of the gradient of the"));
  narrow = to;
  narrow[0].rows -= 1;
  CHECK_THROWS_WITH(apply<N>(loss, views, narrow),
                    ContainsSubstring("rows of the gradient of the embeddings is"));
  narrow = to;
  narrow[0] = x[0].view();
  CHECK_THROWS_WITH(apply<N>(loss, views, narrow), ContainsSubstring("overlaps"));
  if constexpr (N == 2) {
    wrong = views;
    wrong[1].rows -= 1;
    CHECK_THROWS_WITH(apply<N>(loss, wrong, to),
                      ContainsSubstring("rows of the second embeddings is"));
    narrow = to;
    narrow[0] = narrow[1];
    CHECK_THROWS_WITH(apply<N>(loss, views, narrow), ContainsSubstring("overlaps"));
  }
  for (std::size_t i = 0; i < N; ++i)
    CHECK(g[i].x == kept[i].x);
}

/// Any number that is not finite makes the value and all gradients NaN; nothing at all is 0.
template <std::size_t N, class Loss>
void check_special_calls(const Loss& loss, perdita::index rows, perdita::index cols) {
  using T = typename Loss::value_type;
  for (const T bad : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity(),
                      -std::numeric_limits<T>::infinity()})
    for (std::size_t where = 0; where < N; ++where) {
      std::vector<batch<T>> x, g;
      for (std::size_t i = 0; i < N; ++i) {
        x.push_back(random_batch<T>(rows, cols, 5 + i));
        g.emplace_back(rows, cols);
      }
      x[where](1, 1) = bad;
      views_of<T, N> views;
      gradients_of<T, N> to;
      for (std::size_t i = 0; i < N; ++i)
        views[i] = x[i].seen(), to[i] = g[i].view();
      CHECK(std::isnan(apply<N>(loss, views, to)));
      bool all = true;
      for (std::size_t i = 0; i < N; ++i)
        for (const T slope : g[i].x)
          all = all && std::isnan(slope);
      CHECK(all);
    }
  for (const perdita::index n : {0, 4}) {
    views_of<T, N> views;
    gradients_of<T, N> to;
    for (std::size_t i = 0; i < N; ++i) {
      views[i] = {nullptr, n, n == 0 ? cols : 0};
      to[i] = {nullptr, n, n == 0 ? cols : 0};
    }
    CHECK(apply<N>(loss, views, to) == 0);
  }
}

} // namespace perdita_tests
