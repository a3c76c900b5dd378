// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstddef>

#include "core/sequences.hpp"
#include "sup_con.hpp"

namespace perdita::inline PERDITA_ABI {

struct n_pairs_options {
  double length_weight = 0.002; ///< λ ≥ 0
  perdita::reduction reduction = reduction::mean;
};

/// The N-pair loss: rows x_i and y_i of the same class, each class once, and products, not cosines,
///
///   ℓ_i = log Σ_j e^{⟨x_i, y_j⟩} − ⟨x_i, y_i⟩ + λ (‖x_i‖² + ‖y_i‖²)
///   ∂ℓ_i/∂⟨x_i, y_j⟩ = softmax(j) − [j = i],   and 2λx_i, 2λy_i by the lengths
///
/// for loss(x, y, d_x, d_y) or loss(x, y), rows × features each: sup_con's pairs() without
/// normalising, τ = 1, and the lengths, which every pair adds with its weight, whatever the filter
/// says. With several rows of a class, as in TensorFlow's npairs_loss (whose λ is four times this
/// one), take sup_con({.temperature = 1, .normalise = false})(x, y, labels, labels, …).
///
/// A batch of one: λ (‖x‖² + ‖y‖²). Zero vectors tie; none: 0. See anchor_loss for call options,
/// special values and errors.
///
/// Source: Sohn, "Improved deep metric learning with multi-class N-pair loss objective", 2016.
template <class T> class n_pairs {
public:
  using value_type = T;
  using options = n_pairs_options;
  static constexpr const char* name = "n_pairs";

  n_pairs() : n_pairs(options{}) {}
  explicit n_pairs(const options& o)
      : options_(o), products_({.temperature = 1, .normalise = false, .reduction = o.reduction}) {
    core::not_negative(name, "length_weight", o.length_weight);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  template <class X, class Y>
  requires core::scores_like<X, T> && core::scores_like<Y, T>
      T operator()(X&& x, Y&& y, const anchor_options<T>& call = {}) const {
    const lengths l = lengths_of(x, y);
    return add_lengths(products_.pairs(x, y, call), l, call);
  }
  template <class X, class Y, class DX, class DY>
  requires core::scores_like<X, T> && core::scores_like<Y, T> && core::gradient_like<DX, T> &&
      core::gradient_like<DY, T>
          T operator()(X&& x, Y&& y, DX&& d_x, DY&& d_y, const anchor_options<T>& call = {}) const {
    lengths l = lengths_of(x, y);
    l.gradient[0] = core::matrix_data<T, true>(core::as_matrix(d_x));
    l.gradient[1] = core::matrix_data<T, true>(core::as_matrix(d_y));
    return add_lengths(products_.pairs(x, y, d_x, d_y, call), l, call);
  }

private:
  struct lengths {
    core::matrix_data<T> of[2];
    core::matrix_data<T, true> gradient[2];
  };

  template <class X, class Y> static lengths lengths_of(X& x, Y& y) {
    const core::matrix_data<T> of_x(core::as_matrix(x)), of_y(core::as_matrix(y));
    core::require(of_y.cols == of_x.cols, name, "columns of y", of_y.cols, "as many as of x");
    core::require(of_y.rows == of_x.rows, name, "rows of y", of_y.rows, "as many as of x");
    return {{of_x, of_y}, {}};
  }
  /// Adds λ (‖x_i‖² + ‖y_i‖²) of every pair to the value, the by-products and the gradients.
  T add_lengths(T products, const lengths& l, const anchor_options<T>& call) const {
    const index rows = l.of[0].rows, cols = l.of[0].cols;
    const auto weight_of = [&](index r) {
      return call.row_weights.data ? static_cast<double>(call.row_weights[r]) : 1.0;
    };
    double all = 1;
    if (options_.reduction == reduction::mean && (all = call.normaliser) == 0)
      for (index r = 0; r < rows; ++r)
        all += weight_of(r);
    if (options_.length_weight == 0 || all == 0)
      return products;

    workspace own;
    const auto row = static_cast<std::size_t>(core::whole_packs(cols));
    const auto bytes = row * sizeof(double) + (row + 16) * sizeof(T) + 128;
    core::carver memory((call.memory ? *call.memory : own).request(bytes));
    double* const x = memory.template take<double>(row);
    T* const buffer = memory.template take<T>(row);
    core::exact_sum total;
    for (index r = 0; r < rows; ++r) {
      const double weight = weight_of(r);
      if (weight == 0)
        continue;
      double factor = 2 * options_.length_weight * weight * static_cast<double>(call.scale) / all;
      if (call.upstream.data)
        factor *= static_cast<double>(call.upstream[r]);
      double square = 0;
      for (int k = 0; k < 2; ++k) {
        core::read_row(l.of[k], r, buffer, x);
        for (index j = 0; j < cols; ++j) {
          square += x[j] * x[j];
          x[j] *= factor;
        }
        if (l.gradient[k])
          core::write_row(l.gradient[k], r, x, true, buffer);
      }
      const double value = weight * options_.length_weight * square;
      total.add(value);
      if (call.values.data)
        call.values[r] += static_cast<T>(value);
    }
    return static_cast<T>(static_cast<double>(products) + total.value() / all);
  }

  options options_;
  sup_con<T> products_;
};

} // namespace perdita::inline PERDITA_ABI
