// SPDX-License-Identifier: MIT
#pragma once

/// What losses of whole batches of embeddings have in common: calls, copies of the batch in double,
/// and products of feature by feature.

#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "errors.hpp"
#include "executor.hpp"
#include "product.hpp"
#include "row_job.hpp"
#include "row_loss.hpp"
#include "simd.hpp"
#include "storage.hpp"
#include "views.hpp"
#include "workspace.hpp"

namespace perdita::inline PERDITA_ABI {

/// What a call of a loss of a batch of embeddings may ask for. There is no mean over rows that
/// another reduction could replace.
template <class T> struct embedding_options {
  T scale = 1;             ///< multiplies the gradients only
  bool accumulate = false; ///< adds to the gradients instead of overwriting them
  executor run_on{};
};

namespace core {

// --- A batch in double --------------------------------------------------------------------------

inline constexpr index embedding_rows_per_task = 64;

/// A matrix of doubles in panels of as many columns as a pack has lanes, zeros after the last.
class panelled {
public:
  using W = pack<double>;
  static constexpr auto width = static_cast<index>(lanes<double>);

  panelled(index rows, index cols) : rows_(rows), cols_(cols), count_((cols + width - 1) / width) {
    const auto n = static_cast<std::size_t>(rows_ * count_ * width);
    data_ = reinterpret_cast<double*>(memory_.request(n * sizeof(double)));
    std::fill_n(data_, n, 0.0);
  }
  index rows() const { return rows_; }
  index cols() const { return cols_; }
  index count() const { return count_; } ///< of panels
  index apart() const { return rows_ * width; }
  double* at(index row, index panel) { return data_ + panel * apart() + row * width; }
  const double* at(index row, index panel) const { return data_ + panel * apart() + row * width; }
  W pack_at(index row, index panel) const { return W::load(at(row, panel)); }
  double& operator()(index row, index col) { return at(row, col / width)[col % width]; }
  double operator()(index row, index col) const { return at(row, col / width)[col % width]; }

private:
  index rows_, cols_, count_;
  workspace memory_;
  double* data_;
};

/// f(p) for every panel, on any thread.
template <class F> void for_panels(const panelled& x, const executor& run_on, F f) {
  const auto work = [&](std::size_t p) { f(static_cast<index>(p)); };
  run_on(static_cast<std::size_t>(x.count()), work);
}
/// f(first, last) for blocks of rows, on any thread.
template <class F> void for_row_blocks(index rows, const executor& run_on, F f) {
  const auto work = [&](std::size_t t) {
    const index first = static_cast<index>(t) * embedding_rows_per_task;
    f(first, std::min(rows, first + embedding_rows_per_task));
  };
  run_on(static_cast<std::size_t>((rows + embedding_rows_per_task - 1) / embedding_rows_per_task),
         work);
}

/// Copies a batch; false where something is not finite.
template <class T>
bool load_batch(const matrix_view<const T>& from, panelled& to, const executor& run_on) {
  std::vector<unsigned char> finite(static_cast<std::size_t>(to.rows()), 1);
  for_row_blocks(to.rows(), run_on, [&](index first, index last) {
    for (index r = first; r < last; ++r)
      for (index j = 0; j < to.cols(); ++j) {
        const double x = static_cast<double>(from(r, j));
        to(r, j) = x;
        if (!std::isfinite(x))
          finite[static_cast<std::size_t>(r)] = 0;
      }
  });
  return std::all_of(finite.begin(), finite.end(), [](unsigned char f) { return f != 0; });
}
/// Writes or adds slope(row, column) times the call's scale.
template <class T, class Slope>
void store_slopes(const matrix_view<T>& to, const embedding_options<T>& call, Slope slope) {
  const double scale = static_cast<double>(call.scale);
  for_row_blocks(to.rows, call.run_on, [&](index first, index last) {
    for (index r = first; r < last; ++r)
      for (index j = 0; j < to.cols; ++j) {
        const double g = scale * slope(r, j);
        to(r, j) = static_cast<T>(call.accumulate ? static_cast<double>(to(r, j)) + g : g);
      }
  });
}

/// Takes the mean from each column; what is constant becomes 0 exactly.
inline void centre_panel(panelled& x, index p) {
  using W = panelled::W;
  const W base = x.pack_at(0, p);
  W sum(0);
  for (index r = 0; r < x.rows(); ++r)
    sum += x.pack_at(r, p) - base;
  const W offset = sum / W(static_cast<double>(x.rows()));
  for (index r = 0; r < x.rows(); ++r)
    ((x.pack_at(r, p) - base) - offset).store(x.at(r, p));
}
/// Σ over the rows of x y, column by column.
inline panelled::W dot_panel(const panelled& x, const panelled& y, index p) {
  panelled::W sum(0);
  for (index r = 0; r < x.rows(); ++r)
    sum = fma(x.pack_at(r, p), y.pack_at(r, p), sum);
  return sum;
}

// --- Products -----------------------------------------------------------------------------------

/// xᵀ y, features × features. Each element is one sum of sums over blocks of rows.
inline panelled cross_product(const panelled& x, const panelled& y, const executor& run_on) {
  constexpr index width = panelled::width, depth = 256, together = product_shape<double>::packs;
  panelled result(x.cols(), y.cols());
  for_panels(x, run_on, [&](index p) {
    const index rows = std::min(width, x.cols() - p * width);
    for (index k = 0; k < x.rows(); k += depth)
      for (index q = 0; q < y.count(); q += together)
        multiply<double>({x.at(k, p), 1, width, width * width}, {y.at(k, q), y.apart()},
                         {result.at(p * width, q), width, result.apart()}, rows,
                         std::min(together * width, y.cols() - q * width),
                         std::min(depth, x.rows() - k), k > 0);
  });
  return result;
}
/// result += x m, rows × features.
inline void add_product(const panelled& x, const panelled& m, panelled& result,
                        const executor& run_on) {
  constexpr index width = panelled::width;
  for_row_blocks(x.rows(), run_on, [&](index first, index last) {
    multiply<double>({x.at(first, 0), width, 1, x.apart()}, {m.at(0, 0), m.apart()},
                     {result.at(first, 0), width, result.apart()}, last - first, m.cols(), m.rows(),
                     true);
  });
}
inline panelled transpose(const panelled& m, const executor& run_on) {
  panelled result(m.cols(), m.rows());
  for_row_blocks(m.rows(), run_on, [&](index first, index last) {
    for (index i = first; i < last; ++i)
      for (index j = 0; j < m.cols(); ++j)
        result(j, i) = m(i, j);
  });
  return result;
}

/// Σ of the squares off the diagonal; then m becomes `factor` m, with zeros on the diagonal.
inline double scale_off_diagonal(panelled& m, double factor, const executor& run_on) {
  using W = panelled::W;
  for (index i = 0; i < m.rows(); ++i)
    m(i, i) = 0;
  std::vector<double> squares(static_cast<std::size_t>(m.count()));
  for_panels(m, run_on, [&](index p) {
    W sum(0);
    for (index i = 0; i < m.rows(); ++i) {
      const W x = m.pack_at(i, p);
      sum = fma(x, x, sum);
      (x * factor).store(m.at(i, p));
    }
    squares[static_cast<std::size_t>(p)] = sum_lanes(sum);
  });
  exact_sum total;
  for (const double s : squares)
    total.add(s);
  return total.value();
}
/// (1/d) Σ over i ≠ j of Cov_ij², of n centred rows, Cov = xᵀx/(n − 1); adds `weight` times its
/// gradient, (4/(d (n − 1))) x Cov without its diagonal, to *slopes.
inline double covariance_penalty(const panelled& x, double weight, panelled* slopes,
                                 const executor& run_on) {
  const double n = static_cast<double>(x.rows() - 1), d = static_cast<double>(x.cols());
  panelled products = cross_product(x, x, run_on);
  const double sum = scale_off_diagonal(products, 4 * weight / (d * n * n), run_on);
  if (slopes)
    add_product(x, products, *slopes, run_on);
  return sum / (d * n * n);
}

// --- Calls --------------------------------------------------------------------------------------

template <class T> struct embedding_checks {
  const char* name;

  void finite(const char* what, double x) const {
    require(std::isfinite(x), name, what, x, "a finite number");
  }
  void size(const std::string& what, index got, index expected) const {
    if (got != expected) [[unlikely]]
      fail(name, what, to_text(got), to_text(expected));
  }
  void memory(const std::string& what, const void* data, index elements) const {
    if (!data && elements > 0) [[unlikely]]
      fail(name, what, "null", "a pointer to memory");
  }

  /// Batches of one shape and, where `gradients` is not null, as many gradients, memory apart from
  /// each other, the batches and `others`.
  template <std::size_t N>
  void batches(const std::array<matrix_view<const T>, N>& x,
               const std::array<matrix_view<T>, N>* gradients,
               std::initializer_list<extent> others = {}) const {
    static constexpr const char* names[] = {"embeddings", "second embeddings"};
    std::vector<extent> pieces;
    for (std::size_t i = 0; i < N; ++i) {
      shape(names[i], x[i], x[0]);
      if (gradients) {
        shape(std::string("gradient of the ") + names[i], (*gradients)[i], x[0]);
        pieces.push_back(bytes_of(matrix_data<T, true>((*gradients)[i])));
      }
    }
    for (std::size_t i = 0; gradients && i < N; ++i)
      pieces.push_back(bytes_of(matrix_data<T>(x[i])));
    pieces.insert(pieces.end(), others);
    require_apart(name, pieces, gradients ? N : 0);
  }

private:
  template <class E>
  void shape(const std::string& what, const matrix_view<E>& m,
             const matrix_view<const T>& like) const {
    size("rows of the " + what, m.rows, like.rows);
    size("columns of the " + what, m.cols, like.cols);
    memory(what, m.data, m.rows * m.cols);
  }
};

/// NaN, as the value and in all gradients: of a batch with a sum that is no number.
template <class T, std::size_t N>
T give_up(const std::array<matrix_view<T>, N>* gradients, const embedding_options<T>& call) {
  const auto unknown = [](index, index) { return std::numeric_limits<double>::quiet_NaN(); };
  for (std::size_t i = 0; gradients && i < N; ++i)
    store_slopes((*gradients)[i], call, unknown);
  return std::numeric_limits<T>::quiet_NaN();
}

} // namespace core
} // namespace perdita::inline PERDITA_ABI
