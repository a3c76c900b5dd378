// SPDX-License-Identifier: MIT
#pragma once

/// An output layer that learns at a cost that does not depend on how many outputs it has.

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <new>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/product.hpp"
#include "linear.hpp"
#include "spherical.hpp"
#include "z_loss.hpp"

namespace perdita::inline PERDITA_ABI {

/// Squared distance of the outputs to a target that is zero but for a few classes, which have the
/// weights y (a label: y = 1). Classes that a row names twice add up.
///
///   ℓ = Σ_j (o_j − y_j)² = ‖o‖² − 2 Σ_k y_k o_k + Σ_k y_k²,   ∂ℓ/∂o_j = 2 (o_j − y_j)
template <class T = float> class sparse_squared_error {
public:
  using value_type = T;
  struct options {
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "sparse_squared_error";

  sparse_squared_error() : sparse_squared_error(options{}) {}
  explicit(false) sparse_squared_error(const options& o) : options_(o) {
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  options options_;
};

/// What changes a call of the layer but not its mathematics.
template <class T> struct spherical_call {
  vector_view<T> values{}; ///< the value of each row, before the reduction
  executor run_on{};
};

/// A step of gradient descent: W ← (1 − rate · decay) W − rate · ∂value/∂W.
struct spherical_step {
  double rate = 0.01; ///< ≥ 0
  double decay = 0;   ///< ≥ 0; rate · decay < 1
};

namespace core {

// ---- the losses: what they make of ‖o‖², Σ o and the target's outputs

/// A class of a row's target, its output, and the derivative of the row's value with respect to it.
struct spherical_target {
  index row, number;
  double weight, output, slope;
};
struct spherical_row {
  double squares, sum, outputs; // ‖o‖², Σ o, how many
  std::span<spherical_target> target;
};
/// The value, and its derivatives where ‖o‖², Σ o and the target's outputs vary independently.
struct spherical_slopes {
  double value = 0, squares = 0, sum = 0;
};

template <class T>
spherical_slopes differentiate(const sparse_squared_error<T>&, const spherical_row& row) {
  spherical_slopes out{row.squares, 1, 0};
  for (spherical_target& t : row.target) {
    out.value += t.weight * (t.weight - 2 * t.output);
    t.slope = -2 * t.weight;
  }
  return out;
}

template <class T>
spherical_slopes differentiate(const spherical_softmax<T>& loss, const spherical_row& row) {
  const auto epsilon = static_cast<double>(loss.settings().epsilon);
  const double total = row.squares + row.outputs * epsilon;
  spherical_slopes out;
  for (spherical_target& t : row.target) {
    const double share = t.output * t.output + epsilon;
    out.value += t.weight * (std::log(total) - std::log(share));
    out.squares += t.weight / total;
    t.slope = -2 * t.weight * t.output / share;
  }
  return out;
}

template <class T>
spherical_slopes differentiate(const taylor_softmax<T>&, const spherical_row& row) {
  const double total = row.outputs + row.sum + row.squares / 2;
  spherical_slopes out;
  for (spherical_target& t : row.target) {
    const double share = 1 + t.output * (1 + t.output / 2);
    out.value += t.weight * (std::log(total) - std::log(share));
    out.squares += t.weight / (2 * total);
    out.sum += t.weight / total;
    t.slope = -t.weight * (1 + t.output) / share;
  }
  return out;
}

template <class T> spherical_slopes differentiate(const z_loss<T>& loss, const spherical_row& row) {
  const auto a = static_cast<double>(loss.settings().a), b = static_cast<double>(loss.settings().b);
  const double n = row.outputs, mean = row.sum / n;
  const double variance = row.squares / n - mean * mean;
  // Of a variance this small next to the mean square only rounding is known.
  const bool flat = variance <= 1e-13 * row.squares / n;
  const double inverse = flat ? 0 : 1 / std::sqrt(variance);
  spherical_slopes out;
  for (spherical_target& t : row.target) {
    const double z = (t.output - mean) * inverse, u = a * (b - z);
    const double steep = t.weight * inverse / (1 + std::exp(-u)); // −∂ℓ/∂z / σ
    out.value += t.weight * (std::max(u, 0.0) + std::log1p(std::exp(-std::abs(u)))) / a;
    out.squares += steep * z * inverse / (2 * n);
    out.sum += steep * (1 - z * mean * inverse) / n;
    t.slope = -steep;
  }
  return out;
}

template <class Loss>
concept spherical_loss = requires(const Loss& loss, const spherical_row& row) {
  { differentiate(loss, row) } -> std::same_as<spherical_slopes>;
};

// ---- a little linear algebra on the lanes; all in double

template <class T> struct aligned_allocator {
  using value_type = T;
  aligned_allocator() = default;
  template <class U> aligned_allocator(const aligned_allocator<U>&) {}
  T* allocate(std::size_t n) {
    return static_cast<T*>(::operator new (n * sizeof(T), std::align_val_t{64}));
  }
  void deallocate(T* p, std::size_t) { ::operator delete (p, std::align_val_t{64}); }
  template <class U> bool operator==(const aligned_allocator<U>&) const { return true; }
};

/// A row-major matrix of numbers; every row is aligned where the columns fill whole packs.
template <class T> class dense {
public:
  dense() = default;
  dense(index rows, index cols) { resize(rows, cols); }
  /// Keeps its memory; of its numbers only those are known that were set since.
  void resize(index rows, index cols) {
    cols_ = cols;
    numbers_.resize(static_cast<std::size_t>(rows * cols));
  }
  void clear() { std::fill(numbers_.begin(), numbers_.end(), T(0)); }
  T* row(index r) { return numbers_.data() + r * cols_; }
  const T* row(index r) const { return numbers_.data() + r * cols_; }
  index cols() const { return cols_; }
  std::size_t size() const { return numbers_.size(); }
  T* begin() { return numbers_.data(); }
  T* end() { return numbers_.data() + numbers_.size(); }
  const T* begin() const { return numbers_.data(); }
  const T* end() const { return numbers_.data() + numbers_.size(); }

private:
  index cols_ = 0;
  std::vector<T, aligned_allocator<T>> numbers_;
};

/// Calls use(i, pack<double>) for the numbers v[i], v[i + W], … of n, which fill whole packs of T.
template <class T, class Use> PERDITA_INLINE void for_packs(const T* v, index n, Use use) {
  constexpr auto width = static_cast<index>(lanes<T>);
  constexpr auto narrower = static_cast<index>(lanes<double>);
  for (index i = 0; i < n; i += width) {
    pack<double> wide[static_cast<std::size_t>(width / narrower)];
    widen(pack<T>::load(v + i), wide);
    for (index k = 0; k < width / narrower; ++k)
      use(i + k * narrower, wide[k]);
  }
}
template <class T> double dot(const T* a, const double* b, index n) {
  pack<double> sum(0);
  for_packs(
      a, n, [&](index i, const pack<double>& x) __attribute__((always_inline)) {
        sum = fma(x, pack<double>::load(b + i), sum);
      });
  return sum_lanes(sum);
}
/// to += factor v
template <class T> void add(double factor, const T* v, double* to, index n) {
  for_packs(
      v, n, [&](index i, const pack<double>& x) __attribute__((always_inline)) {
        fma(pack<double>(factor), x, pack<double>::load(to + i)).store(to + i);
      });
}
/// Σ x²
inline double squares_of(const double* x, index n) { return dot(x, x, n); }

/// What Gaussian elimination met.
struct elimination {
  double smallest_pivot = std::numeric_limits<double>::infinity(), log_determinant = 0;
};
/// b ← a⁻¹ b for n × n numbers a and n rows b, by elimination with partial pivoting; a is lost. An
/// exact zero for a pivot ends it, and b is lost too. Rows are whole packs.
inline elimination solve(index n, dense<double>& a, dense<double>& b) {
  constexpr auto width = static_cast<index>(lanes<double>);
  elimination met;
  for (index k = 0; k < n; ++k) {
    index best = k;
    for (index r = k + 1; r < n; ++r)
      if (std::abs(a.row(r)[k]) > std::abs(a.row(best)[k]))
        best = r;
    if (best != k) {
      std::swap_ranges(a.row(k), a.row(k) + a.cols(), a.row(best));
      std::swap_ranges(b.row(k), b.row(k) + b.cols(), b.row(best));
    }
    const double pivot = a.row(k)[k];
    met.smallest_pivot = std::min(met.smallest_pivot, std::abs(pivot));
    met.log_determinant += std::log(std::abs(pivot));
    if (pivot == 0)
      return met;
    const index from = k / width * width;
    for (index r = k + 1; r < n; ++r) {
      const double factor = -a.row(r)[k] / pivot;
      add(factor, a.row(k) + from, a.row(r) + from, a.cols() - from);
      add(factor, b.row(k), b.row(r), b.cols());
    }
  }
  for (index k = n - 1; k >= 0; --k) {
    const double pivot = a.row(k)[k];
    for (double *x = b.row(k), *end = x + b.cols(); x < end; ++x)
      *x /= pivot;
    for (index r = 0; r < k; ++r)
      add(-a.row(r)[k], b.row(k), b.row(r), b.cols());
  }
  return met;
}

/// A square matrix in panels: element (r, c) is data[c / W][r][c % W]; zeros fill the last panel.
struct panels {
  static constexpr auto width = static_cast<index>(lanes<double>);
  double* data;
  index size; ///< rows

  index stride() const { return size * width; } ///< from panel to panel
  index count() const { return (size + width - 1) / width; }
  double& operator()(index r, index c) const {
    return data[c / width * stride() + r * width + c % width];
  }
  double* end() const { return data + count() * stride(); }
  void set_identity() const {
    std::fill(data, end(), 0.0);
    for (index i = 0; i < size; ++i)
      (*this)(i, i) = 1;
  }
  /// y = A x; x fills whole packs.
  void times(const double* x, double* y) const {
    std::fill_n(y, size, 0.0);
    for (index p = 0; p < count(); ++p)
      for (index r = 0; r < size; ++r)
        y[r] += sum_lanes(pack<double>::load(data + p * stride() + r * width) *
                          pack<double>::load(x + p * width));
  }
  /// y = Aᵀ x; y fills whole packs.
  void transposed_times(const double* x, double* y) const {
    for (index p = 0; p < count(); ++p) {
      pack<double> sum(0);
      for (index r = 0; r < size; ++r)
        sum = fma(pack<double>(x[r]), pack<double>::load(data + p * stride() + r * width), sum);
      sum.store(y + p * width);
    }
  }
  /// A += factor u vᵀ; v fills whole packs.
  void add_product(double factor, const double* u, const double* v) const {
    for (index p = 0; p < count(); ++p)
      for (index r = 0; r < size; ++r)
        add(factor * u[r], v + p * width, data + p * stride() + r * width, width);
  }
  /// Below the diagonal as above it: the result is symmetric to the bit.
  void mirror(const executor& run_on) const {
    const auto columns = [this](std::size_t p) {
      const index first = static_cast<index>(p) * width, last = std::min(size, first + width);
      for (index r = first; r < size; ++r)
        for (index c = first; c < std::min(r, last); ++c)
          (*this)(r, c) = (*this)(c, r);
    };
    run_on(static_cast<std::size_t>(count()), columns);
  }
};

/// n rows as a panelled operand: element (i, j) is to[j / W][i][j % W].
inline void copy_to_panels(const double* rows, index stride, index n, index cols, double* to) {
  constexpr auto width = panels::width;
  for (index j = 0; j < cols; j += width)
    for (index i = 0; i < n; ++i, to += width)
      pack<double>::load(rows + i * stride + j).store(to);
}
/// n rows, each a column of a panelled operand, in whole panels: element (k, i) is
/// to[i / W][k][i % W].
inline void copy_to_columns(const double* rows, index stride, index n, index depth, double* to) {
  constexpr auto width = panels::width;
  for (index i = 0; i < n; i += width, to += depth * width) {
    if (n - i < width)
      std::fill_n(to, depth * width, 0.0);
    copy_transposed(rows + i * stride, stride, std::min(width, n - i), depth, to, width);
  }
}
inline broadcast_operand<double> as_rows(const double* rows, index stride) {
  return {rows, stride, 1, panels::width};
}
/// The same rows, as the columns of the operand.
inline broadcast_operand<double> as_columns(const double* rows, index stride) {
  return {rows, 1, stride, stride * panels::width};
}

/// Runs work(first, last) on pieces of 0 … n − 1; where these are does not depend on the executor.
template <class F> void in_pieces(const executor& run_on, index n, index piece, F work) {
  const auto part = [&](std::size_t i) {
    const index first = static_cast<index>(i) * piece;
    work(first, std::min(n, first + piece));
  };
  run_on(static_cast<std::size_t>((n + piece - 1) / piece), part);
}

/// A batch, and everything that is computed of it: one row (of m) per example that counts.
struct spherical_batch {
  index all_rows = 0, m = 0;
  std::vector<index> row_of;             ///< its row in the caller's matrices
  std::vector<spherical_target> targets; ///< by row
  std::vector<index> starts;             ///< of the rows in it
  std::vector<spherical_slopes> slopes;
  std::vector<double> sum, offset, target_slope; ///< h · w̄, h · ω, Σ of the target's slopes
  double scale = 1, total = 0;
  dense<double> hidden;
  dense<double> product; ///< [h Q | U h | U⁻ᵀ h]
  dense<double> target_rows, target_part, d_hidden;
  dense<double> columns, transposed, gram, gradient_gram, small, solved, stack, scaled, operand;
  std::vector<index> by_class;

  std::span<spherical_target> target(index i) {
    return std::span(targets).subspan(
        static_cast<std::size_t>(starts[static_cast<std::size_t>(i)]),
        static_cast<std::size_t>(starts[static_cast<std::size_t>(i) + 1] -
                                 starts[static_cast<std::size_t>(i)]));
  }
};

} // namespace core

struct spherical_layer_options {
  /// How far the factor U may get from a multiple of an orthogonal matrix, ‖U‖_F ‖U⁻¹‖_F / d, which
  /// is also by how much it magnifies the rounding of V; ≥ 1.
  double max_condition = 20;
  index check_every = 16; ///< steps between two looks at that; ≥ 1
};

/// An output layer o = W h with any number D of outputs, for losses that know the outputs by ‖o‖²,
/// Σ o and the few outputs of the target alone (the spherical family): z_loss, spherical_softmax,
/// taylor_softmax, sparse_squared_error. Value, gradient of the hidden states and gradient descent
/// on W are exact, up to rounding, and cost O(d²) for an example, whatever D is.
///
/// W (D × d) is never touched as a whole. It is kept as W = V U + 1 ωᵀ, with Q = WᵀW and w̄ = Wᵀ1;
/// of V only the rows of target classes change. For a batch of m hidden states (the columns of H),
/// with the scale of the reduction in L, outputs O = W H, and
///
///   γ_i = ∂L/∂‖o_i‖²,  σ_i = ∂L/∂(Σ o_i),  Y_ci = ∂L/∂O_ci for the targets c (sparse),
///   Γ = diag(γ),  y = Yᵀ1,  s = 1 − rate · decay,  η = rate:
///
///   ‖o_i‖² = h_iᵀ Q h_i,   Σ o_i = w̄ᵀ h_i,   o_ci = V_c (U h_i) + ωᵀ h_i
///   ∂L/∂O = 2 O Γ + 1 σᵀ + Y
///   ∂L/∂H = 2 Q H Γ + Z,   Z = Wᵀ (Y + 1 σᵀ) = Uᵀ (Vᵀ Y) + ω yᵀ + w̄ σᵀ
///
/// W ← s W − η (∂L/∂O) Hᵀ is, all right sides with the old values,
///
///   U   ← s U − 2 η (U H) Γ Hᵀ
///   U⁻ᵀ ← (U⁻ᵀ + 2 (η/s) P Γ Hᵀ) / s,  P = U⁻ᵀ H (I − 2 (η/s) Γ HᵀH)⁻¹       (Woodbury)
///   ω   ← s ω − η H (2 Γ Hᵀ ω + σ)
///   V_c ← V_c − (η/s) Σ_i Y_ci P_iᵀ                                      (target classes alone)
///   Q   ← s² Q − s η (∂L/∂H Hᵀ + H (∂L/∂H)ᵀ) + η² H M Hᵀ,
///         M = (∂L/∂O)ᵀ ∂L/∂O = 4 Γ HᵀQH Γ + 2 Γ HᵀZ + 2 ZᵀH Γ + D σσᵀ + σyᵀ + yσᵀ + YᵀY
///   w̄   ← s w̄ − η H (2 Γ Hᵀ w̄ + D σ + y)
///
/// Classes that occur in several rows, or twice in one row, add up.
///
/// Stability: every `check_every` steps ‖U‖_F ‖U⁻¹‖_F / d is looked at, O(d²). Where it is above
/// `max_condition`, singular values of U beyond half and twice their geometric mean go over to V,
/// O(D d) for each, or all of U where those are many, O(D d²). The same is done at once where a
/// step (of squared errors with a rate that all but solves them) makes U almost singular. Where U⁻¹
/// is found to drift it is computed anew, O(d³).
///
/// Accuracy: V is in T, everything else in double. W then follows the explicit layer to a few
/// roundings of T for each step that touched a row, magnified by the condition of U. Q and w̄ do
/// not see the rounding of V; recompute() brings them back to W.
///
/// Cost: 7 d² + O(m d + m² + K d) multiply-adds for an example with K targets; memory D d of T and
/// 3 d² doubles. Batches should have no more than about d rows. Setting the weights: O(D d²).
///
/// Loss options: reduction and ignore_index as everywhere. Several targets: perdita::sparse_targets
/// with weights y; sparse_squared_error takes them as the target vector, the other losses as
/// Σ_k y_k ℓ(class k). Targets of any weight may be named, and none.
///
/// Special values: a row with NaN or infinite numbers has the value NaN and a gradient that is not
/// finite; no other row changes. A step with such a row leaves the layer as it was. z_loss: outputs
/// whose variance is below 1e-13 of their mean square count as equal: standard scores 0, zero
/// gradient. So W = 0 does not learn with it, nor with spherical_softmax.
///
/// Results do not depend on the number of threads. Throws std::invalid_argument, before anything
/// changes. Calls of const members may run concurrently.
///
/// Source: Vincent, de Brébisson, Bouthillier, "Efficient exact gradient update for training deep
/// networks with very large sparse targets", NIPS 2015 (their weight decay leaves out Q and w̄).
///
///   perdita::spherical_layer<float> layer(weights);
///   float value = layer.step(perdita::z_loss<float>{}, hidden, labels, d_hidden, {.rate = 0.1});
template <class T = float> class spherical_layer {
public:
  using value_type = T;
  using options = spherical_layer_options;
  static constexpr const char* name = "spherical_layer";

  /// Of these weights, outputs × features.
  template <core::matrix_like M>
  explicit spherical_layer(const M& weights, const options& o = {}, const executor& run_on = {})
      : options_(o) {
    core::require(o.max_condition >= 1 && std::isfinite(o.max_condition), name, "max_condition",
                  o.max_condition, "a finite number, 1 or more");
    core::require(o.check_every >= 1, name, "check_every", o.check_every, "1 or more");
    set_weights(weights, run_on);
  }

  const options& settings() const { return options_; }
  index outputs() const { return outputs_; }
  index features() const { return features_; }

  /// The reduced value.
  template <class Loss, class X, class Y>
  T operator()(const Loss& loss, X&& hidden, Y&& target, const spherical_call<T>& call = {}) const {
    core::spherical_batch batch;
    read(batch, loss, hidden, target, call);
    forward(batch, loss, 2, call);
    return static_cast<T>(batch.total);
  }

  /// The reduced value, and its gradient with respect to the hidden states, which may take their
  /// place.
  template <class Loss, class X, class Y, class DX>
  T operator()(const Loss& loss, X&& hidden, Y&& target, DX&& d_hidden,
               const spherical_call<T>& call = {}) const {
    core::spherical_batch batch;
    const auto out = read(batch, loss, hidden, target, d_hidden, call);
    forward(batch, loss, 2, call);
    backward(batch, call.run_on);
    write_gradient(batch, out);
    return static_cast<T>(batch.total);
  }

  /// The same, and a step of gradient descent on W. The value and the gradient are those before it.
  template <class Loss, class X, class Y, class DX>
  T step(const Loss& loss, X&& hidden, Y&& target, DX&& d_hidden, const spherical_step& by,
         const spherical_call<T>& call = {}) {
    core::not_negative(name, "rate", by.rate);
    core::require(by.decay >= 0 && by.rate * by.decay < 1, name, "decay", by.decay,
                  "a number from 0 to 1 / rate, exclusively");
    auto& batch = batch_;
    const auto out = read(batch, loss, hidden, target, d_hidden, call);
    forward(batch, loss, 3, call);
    backward(batch, call.run_on);
    write_gradient(batch, out);
    const auto finite = [](double x) { return std::isfinite(x); };
    if (std::isfinite(batch.total) &&
        std::all_of(batch.d_hidden.begin(), batch.d_hidden.end(), finite)) {
      update(batch, by, call.run_on);
      if (++steps_ % options_.check_every == 0)
        check(call.run_on);
    }
    return static_cast<T>(batch.total);
  }

  /// o = W h for one hidden state. O(D d)
  template <class X, class O>
  void scores(const X& hidden, O&& out, const executor& run_on = {}) const {
    const auto h = core::as_vector(hidden);
    const auto o = core::as_vector(out);
    check_size("size of hidden", h.size, features_, "the features");
    check_size("size of out", o.size, outputs_, "the outputs");
    check_memory("hidden", h.data, h.size);
    check_memory("out", o.data, o.size);
    core::dense<double> x(1, width_), y(1, width_);
    for (index j = 0; j < features_; ++j)
      x.row(0)[j] = static_cast<double>(h[j]);
    u_transposed().transposed_times(x.row(0), y.row(0));
    const double offset = core::dot(offset_.row(0), x.row(0), width_);
    core::in_pieces(run_on, outputs_, 1024, [&](index first, index last) {
      for (index c = first; c < last; ++c)
        o[c] = static_cast<T>(core::dot(v_.row(c), y.row(0), width_) + offset);
    });
  }

  /// The weights of one class. O(d²)
  template <class R> void row(index number, R&& out) const {
    const auto w = core::as_vector(out);
    core::require(number >= 0 && number < outputs_, name, "class", number,
                  "a number from 0 to the number of outputs - 1");
    check_size("size of out", w.size, features_, "the features");
    check_memory("out", w.data, w.size);
    for_weights(number, number + 1, [&](index, index, const double* rows) {
      for (index j = 0; j < features_; ++j)
        w[j] = static_cast<T>(rows[j]);
    });
  }

  /// All of W, outputs × features. O(D d²)
  template <class M> void weights(M&& out, const executor& run_on = {}) const {
    static_assert(core::gradient_like<M, T>,
                  "perdita::spherical_layer: weights go to a matrix of the layer's type, or of a "
                  "16-bit type where that is float");
    const core::matrix_data<T, true> to(core::as_matrix(out));
    check_size("rows of out", to.rows, outputs_, "the outputs");
    check_size("columns of out", to.cols, features_, "the features");
    check_memory("out", to.data, to.rows * to.cols);
    core::in_pieces(run_on, outputs_, 1024, [&](index first, index last) {
      std::vector<T> line(static_cast<std::size_t>(features_));
      for_weights(first, last, [&](index at, index n, const double* rows) {
        for (index i = 0; i < n; ++i) {
          for (index j = 0; j < features_; ++j)
            line[static_cast<std::size_t>(j)] = static_cast<T>(rows[i * width_ + j]);
          to.write(at + i, 0, features_, line.data());
        }
      });
    });
  }

  /// Other weights, of any number of outputs and features. O(D d²)
  template <class M> void set_weights(const M& weights, const executor& run_on = {}) {
    static_assert(core::scores_like<const M, T>,
                  "perdita::spherical_layer: weights are a matrix of the layer's type, or of a "
                  "16-bit type where that is float");
    const core::matrix_data<T> from(core::as_matrix(weights));
    core::require(from.rows > 0 && from.cols > 0, name, "number of weights", from.rows * from.cols,
                  "at least one output and one feature");
    check_memory("weights", from.data, from.rows * from.cols);
    outputs_ = from.rows;
    features_ = from.cols;
    constexpr auto most = static_cast<index>(core::lanes<float>);
    width_ = (features_ + most - 1) / most * most;
    steps_ = 0;
    v_.resize(outputs_, width_);
    v_.clear();
    state_.resize(3, width_ * features_);
    state_.clear();
    offset_.resize(1, width_);
    sum_.resize(1, width_);
    core::in_pieces(run_on, outputs_, 1024, [&](index first, index last) {
      for (index c = first; c < last; ++c)
        from.read(c, 0, features_, v_.row(c));
    });
    forget_factor();
    recompute(run_on);
  }

  /// ‖U‖_F ‖U⁻¹‖_F / d ≥ 1: by how much U magnifies the rounding of V.
  double condition() const {
    return std::sqrt(squares(u_transposed()) * squares(inverse())) / static_cast<double>(features_);
  }
  /// How often U, or some of it, has gone over to V.
  index refactorings() const { return refactorings_; }

  /// Brings the singular values of U to within a factor of about two of one another now, with as
  /// little work as that takes; W stays.
  void stabilise(const executor& run_on = {}) {
    ++refactorings_;
    const double typical = invert();
    if (!(typical > 0))
      return multiply_out(run_on);
    const core::dense<double> before = state_;
    const auto repairs = find_repairs(typical);
    // A third of all, and the products with the whole of U are faster.
    if (3 * static_cast<index>(repairs.size()) > features_) {
      state_ = before;
      return multiply_out(run_on);
    }
    move_to_v(repairs, typical, run_on);
  }

  /// V ← V U + 1 ωᵀ = W, U ← I, ω ← 0. O(D d²)
  void refactor(const executor& run_on = {}) {
    ++refactorings_;
    multiply_out(run_on);
  }

  /// Computes Q = WᵀW and w̄ = Wᵀ1 anew from W. O(D d²)
  void recompute(const executor& run_on = {}) {
    constexpr index parts = 16; // each with a sum of its own, in an order that is always the same
    const index piece = (outputs_ + parts - 1) / parts;
    std::vector<core::dense<double>> squares(parts), sums(parts);
    core::in_pieces(run_on, outputs_, piece, [&](index first, index last) {
      const auto part = static_cast<std::size_t>(first / piece);
      squares[part].resize(1, width_ * features_);
      sums[part].resize(1, width_);
      core::dense<double> copy(1, block_rows * width_);
      for_weights(first, last, [&](index, index n, const double* rows) {
        core::copy_to_panels(rows, width_, n, width_, copy.row(0));
        for (index j = 0; j < width_; j += column_piece)
          add_upper(squares[part].row(0), rows, copy.row(0), n, j,
                    std::min(width_, j + column_piece));
        for (index i = 0; i < n; ++i)
          core::add(1, rows + i * width_, sums[part].row(0), width_);
      });
    });
    std::fill_n(state_.row(0), state_.cols(), 0.0);
    sum_.clear();
    for (std::size_t p = 0; p < static_cast<std::size_t>(parts); ++p)
      if (squares[p].size() > 0) {
        core::add(1, squares[p].row(0), state_.row(0), state_.cols());
        core::add(1, sums[p].row(0), sum_.row(0), width_);
      }
    products().mirror(run_on);
  }

private:
  using batch_type = core::spherical_batch;
  static constexpr index lane = core::panels::width, block_rows = 64, column_piece = 64;

  // ---- arguments

  void check_size(const char* what, index got, index expected, const char* of) const {
    if (got != expected) [[unlikely]]
      core::fail(name, what, core::to_text(got), core::to_text(expected) + " (" + of + ")");
  }
  static void check_memory(const char* what, const void* data, index elements) {
    core::require_memory(name, what, data, elements);
  }

  template <class Loss, class X, class Y, class DX>
  core::matrix_data<T, true> read(batch_type& batch, const Loss& loss, X& hidden, Y& target,
                                  DX& d_hidden, const spherical_call<T>& call) const {
    static_assert(core::gradient_like<DX, T>,
                  "perdita::spherical_layer: the gradient of the hidden states goes to a matrix of "
                  "the layer's type, or of a 16-bit type where that is float");
    const core::matrix_data<T, true> out(core::as_matrix(d_hidden));
    check_size("rows of the gradient of the hidden states", out.rows, core::as_matrix(hidden).rows,
               "as the hidden states");
    check_size("columns of the gradient of the hidden states", out.cols, features_, "the features");
    check_memory("gradient of the hidden states", out.data, out.rows * out.cols);
    read(batch, loss, hidden, target, call);
    return out;
  }
  template <class Loss, class X, class Y>
  void read(batch_type& batch, const Loss& loss, X& hidden, Y& target,
            const spherical_call<T>& call) const {
    static_assert(core::spherical_loss<Loss>,
                  "perdita::spherical_layer: the loss must be one of the spherical family: z_loss, "
                  "spherical_softmax, taylor_softmax or sparse_squared_error");
    static_assert(core::scores_like<X, T>,
                  "perdita::spherical_layer: hidden states are a matrix of the layer's type, or of "
                  "a 16-bit type where that is float");
    const core::matrix_data<T> x(core::as_matrix(hidden));
    check_size("columns of the hidden states", x.cols, features_, "the features");
    check_memory("hidden states", x.data, x.rows * x.cols);
    if (call.values.data || call.values.size > 0) {
      check_size("size of values", call.values.size, x.rows, "the rows of the hidden states");
      check_memory("values", call.values.data, call.values.size);
    }
    batch.all_rows = x.rows;
    batch.row_of.clear();
    batch.targets.clear();
    if constexpr (core::labels_like<Y>)
      read_labels(batch, core::as_vector(target), loss.settings().ignore_index);
    else
      read_sparse(batch, target);
    batch.m = static_cast<index>(batch.row_of.size());
    merge_targets(batch);
    batch.scale = loss.settings().reduction == reduction::mean && batch.m > 0
                      ? 1 / static_cast<double>(batch.m)
                      : 1;
    batch.hidden.resize(batch.m, width_);
    batch.hidden.clear();
    std::vector<T> line(static_cast<std::size_t>(features_));
    for (index i = 0; i < batch.m; ++i) {
      x.read(batch.row_of[at(i)], 0, features_, line.data());
      std::copy(line.begin(), line.end(), batch.hidden.row(i));
    }
  }
  template <class L>
  void read_labels(batch_type& batch, vector_view<L> labels, std::int64_t ignored) const {
    check_size("size of labels", labels.size, batch.all_rows, "the rows of the hidden states");
    check_memory("labels", labels.data, labels.size);
    for (index r = 0; r < labels.size; ++r) {
      const auto y = static_cast<std::int64_t>(labels[r]);
      if (std::cmp_equal(labels[r], ignored))
        continue;
      check_class("labels", r, labels[r], y);
      add_target(batch, static_cast<index>(y), 1);
      batch.row_of.push_back(r);
    }
  }
  template <class I> void read_sparse(batch_type& batch, const sparse_targets<T, I>& target) const {
    const index rows = batch.all_rows, entries = target.classes.size;
    check_size("size of probabilities", target.probabilities.size, entries,
               "the number of classes");
    check_memory("classes", target.classes.data, entries);
    check_memory("probabilities", target.probabilities.data, entries);
    index each = 0;
    if (target.row_starts.data) {
      check_size("size of row_starts", target.row_starts.size, rows + 1,
                 "one more than there are rows");
      for (index r = 0; r <= rows; ++r) {
        const std::int64_t start = target.row_starts[r];
        const std::int64_t before = r > 0 ? target.row_starts[r - 1] : 0;
        if (start < before || (r == 0 && start != 0) || (r == rows && start != entries))
          core::fail_at(name, "row_starts", r, core::to_text(start),
                        "numbers that rise from 0 to the number of entries, " +
                            core::to_text(entries));
      }
    } else if (rows > 0) {
      each = entries / rows;
      check_size("number of entries", entries, each * rows, "as many for every row");
    } else {
      check_size("number of entries", entries, 0, "there are no rows");
    }
    for (index r = 0; r < rows; ++r) {
      const index first =
          target.row_starts.data ? static_cast<index>(target.row_starts[r]) : r * each;
      const index last =
          target.row_starts.data ? static_cast<index>(target.row_starts[r + 1]) : first + each;
      for (index e = first; e < last; ++e) {
        const I c = target.classes[e];
        check_class("classes", e, c, static_cast<std::int64_t>(c));
        add_target(batch, static_cast<index>(c), static_cast<double>(target.probabilities[e]));
      }
      batch.row_of.push_back(r);
    }
  }
  template <class I>
  void check_class(const char* what, index where, I given, std::int64_t number) const {
    if (number < 0 || number >= outputs_) [[unlikely]]
      core::fail_at(name, what, where, core::to_text(given), "0 to " + core::to_text(outputs_ - 1));
  }
  static void add_target(batch_type& batch, index number, double weight) {
    batch.targets.push_back({static_cast<index>(batch.row_of.size()), number, weight, 0, 0});
  }
  /// Orders the targets by row and class, those of the same class made one.
  static void merge_targets(batch_type& batch) {
    auto& all = batch.targets;
    std::stable_sort(all.begin(), all.end(), [](const auto& a, const auto& b) {
      return a.row != b.row ? a.row < b.row : a.number < b.number;
    });
    std::size_t kept = 0;
    for (const auto& t : all)
      if (kept > 0 && all[kept - 1].row == t.row && all[kept - 1].number == t.number)
        all[kept - 1].weight += t.weight;
      else
        all[kept++] = t;
    all.resize(kept);
    batch.starts.assign(at(batch.m) + 1, 0);
    for (const auto& t : all)
      ++batch.starts[at(t.row) + 1];
    for (std::size_t i = 1; i < batch.starts.size(); ++i)
      batch.starts[i] += batch.starts[i - 1];
  }
  static std::size_t at(index i) { return static_cast<std::size_t>(i); }

  // ---- value and gradient

  /// The first `parts` of h Q, U h and U⁻ᵀ h; values and slopes.
  template <class Loss>
  void forward(batch_type& batch, const Loss& loss, index parts,
               const spherical_call<T>& call) const {
    const index m = batch.m;
    batch.product.resize(m, 3 * width_);
    multiply_state(batch, 0, parts, call.run_on);
    batch.slopes.resize(at(m));
    for (auto* v : {&batch.sum, &batch.offset, &batch.target_slope})
      v->resize(at(m));
    core::in_pieces(call.run_on, m, 8, [&](index first, index last) {
      for (index i = first; i < last; ++i)
        evaluate(batch, loss, i);
    });
    for (index r = 0; r < call.values.size; ++r)
      call.values[r] = 0;
    batch.total = 0;
    for (index i = 0; i < m; ++i) {
      const double value = batch.slopes[at(i)].value;
      batch.total += value;
      if (call.values.data)
        call.values[batch.row_of[at(i)]] = static_cast<T>(value);
    }
    batch.total *= batch.scale;
  }
  /// Parts [from, to) of h Q, U h and U⁻ᵀ h.
  void multiply_state(batch_type& batch, index from, index to, const executor& run_on) const {
    core::in_pieces(run_on, (to - from) * width_, column_piece, [&](index first, index last) {
      first += from * width_;
      last += from * width_;
      core::multiply<double>(core::as_rows(batch.hidden.row(0), width_),
                             {state_.row(0) + first * features_, features_ * lane},
                             {batch.product.row(0) + first, 3 * width_, lane}, batch.m,
                             last - first, features_, false);
    });
  }
  template <class Loss> void evaluate(batch_type& batch, const Loss& loss, index i) const {
    const double *h = batch.hidden.row(i), *product = batch.product.row(i);
    const double squares = core::dot(h, product, width_);
    batch.sum[at(i)] = core::dot(h, sum_.row(0), width_);
    batch.offset[at(i)] = core::dot(h, offset_.row(0), width_);
    const auto target = batch.target(i);
    for (auto& t : target)
      t.output = core::dot(v_.row(t.number), product + width_, width_) + batch.offset[at(i)];
    auto& slopes = batch.slopes[at(i)];
    // Q is positive semidefinite, but for rounding. NaN stays.
    slopes = differentiate(loss, core::spherical_row{squares < 0 ? 0 : squares, batch.sum[at(i)],
                                                     static_cast<double>(outputs_), target});
    if (squares != squares)
      slopes.value = squares; // of a row without targets too
    slopes.squares *= batch.scale;
    slopes.sum *= batch.scale;
    batch.target_slope[at(i)] = 0;
    for (auto& t : target)
      batch.target_slope[at(i)] += t.slope *= batch.scale;
  }

  void backward(batch_type& batch, const executor& run_on) const {
    const index m = batch.m;
    for (auto* rows : {&batch.target_rows, &batch.target_part, &batch.d_hidden})
      rows->resize(m, width_);
    batch.target_rows.clear();
    for (const auto& t : batch.targets)
      core::add(t.slope, v_.row(t.number), batch.target_rows.row(t.row), width_);
    times_u(batch.target_rows.row(0), m, batch.target_part.row(0), batch.columns, batch.transposed,
            run_on);
    for (index i = 0; i < m; ++i) {
      const auto& slopes = batch.slopes[at(i)];
      double* const part = batch.target_part.row(i);
      core::add(batch.target_slope[at(i)], offset_.row(0), part, width_);
      core::add(slopes.sum, sum_.row(0), part, width_);
      std::copy_n(part, width_, batch.d_hidden.row(i));
      core::add(2 * slopes.squares, batch.product.row(i), batch.d_hidden.row(i), width_);
    }
  }
  void write_gradient(const batch_type& batch, const core::matrix_data<T, true>& out) const {
    std::vector<T> line(at(features_), T(0));
    index next = 0; // ignored rows have a zero gradient
    for (index i = 0; i <= batch.m; ++i) {
      const index row = i < batch.m ? batch.row_of[at(i)] : batch.all_rows;
      std::fill(line.begin(), line.end(), T(0));
      for (; next < row; ++next)
        out.write(next, 0, features_, line.data());
      if (i == batch.m)
        break;
      for (index j = 0; j < features_; ++j)
        line[at(j)] = static_cast<T>(batch.d_hidden.row(i)[j]);
      out.write(next++, 0, features_, line.data());
    }
  }

  // ---- the step

  void update(batch_type& batch, const spherical_step& by, const executor& run_on) {
    if (batch.m == 0 && by.decay == 0)
      return;
    const double shrink = 1 - by.rate * by.decay;
    make_grams(batch, run_on);
    make_gradient_gram(batch, by.rate);
    const bool regular = solve_for_rows(batch, by.rate / shrink);
    update_products(batch, by.rate, shrink, run_on);
    update_factor(batch, by.rate, shrink, run_on);
    update_vectors(batch, by.rate, shrink);
    if (regular)
      return update_rows(batch, by.rate / shrink, run_on);
    // U has all but lost a direction: better done before V has to make up for it.
    stabilise(run_on);
    multiply_state(batch, 2, 3, run_on);
    for (index i = 0; i < batch.m; ++i)
      std::copy_n(batch.product.row(i) + 2 * width_, width_, batch.solved.row(i));
    update_rows(batch, by.rate, run_on);
  }

  /// gram = [HᵀH; HᵀQH; ZᵀH].
  void make_grams(batch_type& batch, const executor& run_on) const {
    const index m = batch.m, cols = whole(m);
    batch.columns.resize(1, cols * width_);
    core::copy_to_columns(batch.hidden.row(0), width_, m, width_, batch.columns.row(0));
    batch.gram.resize(3 * m, cols);
    const core::broadcast_operand<double> left[] = {
        core::as_rows(batch.hidden.row(0), width_), core::as_rows(batch.product.row(0), 3 * width_),
        core::as_rows(batch.target_part.row(0), width_)};
    core::in_pieces(run_on, 3, 1, [&](index k, index) {
      core::multiply<double>(left[k], {batch.columns.row(0), width_ * lane},
                             {batch.gram.row(k * m), cols, lane}, m, cols, width_, false);
    });
  }
  /// gradient_gram = ½ η² M.
  void make_gradient_gram(batch_type& batch, double rate) const {
    const index m = batch.m;
    const double *squares = batch.gram.row(m), *part = batch.gram.row(2 * m);
    const index cols = batch.gram.cols();
    const double outputs = static_cast<double>(outputs_);
    batch.gradient_gram.resize(m, cols);
    for (index i = 0; i < m; ++i)
      for (index j = 0; j < m; ++j) {
        const auto &a = batch.slopes[at(i)], &b = batch.slopes[at(j)];
        batch.gradient_gram.row(i)[j] =
            4 * a.squares * b.squares * squares[i * cols + j] +
            2 * (a.squares * part[j * cols + i] + b.squares * part[i * cols + j]) +
            outputs * a.sum * b.sum + a.sum * batch.target_slope[at(j)] +
            b.sum * batch.target_slope[at(i)];
      }
    for_classes(batch, [&](std::span<const index> same) {
      for (const index i : same)
        for (const index j : same) {
          const auto &a = batch.targets[at(i)], &b = batch.targets[at(j)];
          batch.gradient_gram.row(a.row)[b.row] += a.slope * b.slope;
        }
    });
    for (double& x : batch.gradient_gram)
      x *= 0.5 * rate * rate;
  }
  /// solved = Pᵀ. False where that makes U almost singular.
  bool solve_for_rows(batch_type& batch, double rate) const {
    const index m = batch.m;
    batch.small.resize(m, batch.gram.cols());
    batch.solved.resize(m, width_);
    for (index i = 0; i < m; ++i) {
      for (index j = 0; j < m; ++j)
        batch.small.row(i)[j] =
            (i == j ? 1 : 0) - 2 * rate * batch.gram.row(i)[j] * batch.slopes[at(j)].squares;
      std::copy_n(batch.product.row(i) + 2 * width_, width_, batch.solved.row(i));
    }
    return core::solve(m, batch.small, batch.solved).smallest_pivot > 1e-2;
  }
  /// Q += Fᵀ Hᵀ + H F with F = ½ η² M Hᵀ − s η (∂L/∂H)ᵀ.
  void update_products(batch_type& batch, double rate, double shrink, const executor& run_on) {
    const index m = batch.m;
    batch.stack.resize(3 * m, width_); // F, Hᵀ, F
    for (index i = 0; i < m; ++i) {
      std::fill_n(batch.stack.row(i), width_, 0.0);
      core::add(-shrink * rate, batch.d_hidden.row(i), batch.stack.row(i), width_);
    }
    std::copy(batch.hidden.begin(), batch.hidden.end(), batch.stack.row(m));
    batch.operand.resize(1, 2 * m * width_);
    core::copy_to_panels(batch.hidden.row(0), width_, m, width_, batch.operand.row(0));
    core::in_pieces(run_on, width_, column_piece, [&](index first, index last) {
      core::multiply<double>(core::as_rows(batch.gradient_gram.row(0), batch.gram.cols()),
                             {batch.operand.row(0) + first * m, m * lane},
                             {batch.stack.row(0) + first, width_, lane}, m, last - first, m, true);
    });
    std::copy_n(batch.stack.row(0), m * width_, batch.stack.row(2 * m));
    core::copy_to_panels(batch.stack.row(m), width_, 2 * m, width_, batch.operand.row(0));
    core::in_pieces(run_on, width_, column_piece, [&](index first, index last) {
      double* const q = state_.row(0);
      if (shrink != 1)
        for (index k = first * features_; k < last * features_; ++k)
          q[k] *= shrink * shrink;
      add_upper(q, batch.stack.row(0), batch.operand.row(0), 2 * m, first, last);
    });
    products().mirror(run_on);
  }
  /// U and U⁻¹.
  void update_factor(batch_type& batch, double rate, double shrink, const executor& run_on) {
    const index m = batch.m;
    factored_ = true;
    batch.scaled.resize(m, width_);
    batch.stack.resize(2 * m, width_);
    batch.stack.clear();
    batch.operand.resize(1, 2 * m * width_);
    for (index i = 0; i < m; ++i) {
      std::fill_n(batch.scaled.row(i), width_, 0.0);
      core::add(2 * batch.slopes[at(i)].squares, batch.hidden.row(i), batch.scaled.row(i), width_);
      core::add(-rate, batch.product.row(i) + width_, batch.stack.row(i), width_);
      core::add(rate / (shrink * shrink), batch.solved.row(i), batch.stack.row(m + i), width_);
    }
    for (index k = 0; k < 2; ++k)
      core::copy_to_panels(batch.stack.row(k * m), width_, m, width_,
                           batch.operand.row(0) + k * m * width_);
    core::in_pieces(run_on, 2 * width_, column_piece, [&](index first, index last) {
      double* const to = state_.row(1) + first * features_;
      if (shrink != 1)
        for (index k = 0; k < last - first; ++k) {
          const double factor = first + k < width_ ? shrink : 1 / shrink;
          for (index r = 0; r < features_; ++r)
            to[k * features_ + r] *= factor;
        }
      core::multiply<double>(core::as_columns(batch.scaled.row(0), width_),
                             {batch.operand.row(0) + first * m, m * lane},
                             {to, lane, features_ * lane}, features_, last - first, m, true);
    });
  }
  /// ω and w̄.
  void update_vectors(batch_type& batch, double rate, double shrink) {
    for (auto* v : {&offset_, &sum_})
      for (double& x : *v)
        x *= shrink;
    for (index i = 0; i < batch.m; ++i) {
      const auto& slopes = batch.slopes[at(i)];
      core::add(-rate * (2 * slopes.squares * batch.offset[at(i)] + slopes.sum),
                batch.hidden.row(i), offset_.row(0), width_);
      core::add(-rate * (2 * slopes.squares * batch.sum[at(i)] +
                         static_cast<double>(outputs_) * slopes.sum + batch.target_slope[at(i)]),
                batch.hidden.row(i), sum_.row(0), width_);
    }
  }
  /// V_c −= rate Σ_i Y_ci solved_i: in double, rounded once.
  void update_rows(batch_type& batch, double rate, const executor& run_on) {
    std::vector<std::span<const index>> classes;
    for_classes(batch, [&](std::span<const index> same) { classes.push_back(same); });
    core::in_pieces(run_on, static_cast<index>(classes.size()), 16, [&](index first, index last) {
      core::dense<double> sum(1, width_);
      for (index k = first; k < last; ++k) {
        T* const v = v_.row(batch.targets[at(classes[at(k)].front())].number);
        std::copy_n(v, width_, sum.row(0));
        for (const index i : classes[at(k)]) {
          const auto& t = batch.targets[at(i)];
          core::add(-rate * t.slope, batch.solved.row(t.row), sum.row(0), width_);
        }
        for (index j = 0; j < width_; ++j)
          v[j] = static_cast<T>(sum.row(0)[j]);
      }
    });
  }
  /// Calls use(targets of one class) for every class that has any.
  template <class Use> static void for_classes(batch_type& batch, Use use) {
    auto& order = batch.by_class;
    order.resize(batch.targets.size());
    for (std::size_t i = 0; i < order.size(); ++i)
      order[i] = static_cast<index>(i);
    const auto number = [&](index i) { return batch.targets[at(i)].number; };
    std::sort(order.begin(), order.end(), [&](index a, index b) {
      return number(a) != number(b) ? number(a) < number(b) : a < b;
    });
    for (std::size_t first = 0, last = 0; first < order.size(); first = last) {
      while (last < order.size() && number(order[last]) == number(order[first]))
        ++last;
      use(std::span<const index>(order).subspan(first, last - first));
    }
  }

  // ---- the matrices

  /// To read from, where the layer is const.
  core::panels part(index k) const { return {const_cast<double*>(state_.row(k)), features_}; }
  core::panels products() const { return part(0); } // Q
  core::panels u_transposed() const { return part(1); }
  core::panels inverse() const { return part(2); } // U⁻¹
  static double squares(const core::panels& a) {
    return core::squares_of(a.data, a.end() - a.data);
  }
  static index whole(index n) { return (n + lane - 1) / lane * lane; }

  /// out = rows U, for n rows.
  void times_u(const double* rows, index n, double* out, core::dense<double>& columns,
               core::dense<double>& transposed, const executor& run_on) const {
    const index cols = whole(n);
    columns.resize(1, cols * features_);
    transposed.resize(features_, cols);
    core::copy_to_columns(rows, width_, n, features_, columns.row(0));
    core::in_pieces(run_on, features_, 48, [&](index first, index last) {
      core::multiply<double>({u_transposed().data + first * lane, lane, 1, features_ * lane},
                             {columns.row(0), features_ * lane},
                             {transposed.row(first), cols, lane}, last - first, cols, features_,
                             false);
    });
    for (index i = 0; i < n; ++i)
      std::fill(out + i * width_ + features_, out + (i + 1) * width_, 0.0);
    core::copy_transposed(transposed.row(0), cols, features_, n, out, width_);
  }
  /// Calls use(class, n, rows of W) for blocks of classes, one after another.
  template <class Use> void for_weights(index first, index last, Use use) const {
    core::dense<double> v(block_rows, width_), w(block_rows, width_), columns, transposed;
    for (index c = first; c < last; c += block_rows) {
      const index n = std::min(block_rows, last - c);
      std::copy_n(v_.row(c), n * width_, v.row(0));
      if (factored_) {
        times_u(v.row(0), n, w.row(0), columns, transposed, serial);
        for (index i = 0; i < n; ++i)
          core::add(1, offset_.row(0), w.row(i), width_);
      }
      use(c, n, factored_ ? w.row(0) : v.row(0));
    }
  }
  /// Columns [first, last) of q += leftᵀ right, on and above the diagonal at least.
  void add_upper(double* q, const double* left, const double* right, index depth, index first,
                 index last) const {
    core::multiply<double>(core::as_columns(left, width_), {right + first * depth, depth * lane},
                           {q + first * features_, lane, features_ * lane},
                           std::min(last, features_), last - first, depth, true);
  }

  // ---- stability

  void forget_factor() {
    u_transposed().set_identity();
    inverse().set_identity();
    offset_.clear();
    factored_ = false;
  }
  void multiply_out(const executor& run_on) {
    core::in_pieces(run_on, outputs_, 1024, [&](index first, index last) {
      for_weights(first, last, [&](index c, index n, const double* rows) {
        for (index k = 0; k < n * width_; ++k)
          v_.row(c)[k] = static_cast<T>(rows[k]);
      });
    });
    forget_factor();
  }
  void check(const executor& run_on) {
    const double size = std::sqrt(squares(u_transposed()) / static_cast<double>(features_));
    double trace = 0;
    for (index i = 0; i < features_; ++i)
      trace += products()(i, i);
    const double offset = static_cast<double>(outputs_) * core::squares_of(offset_.row(0), width_);
    // The offset must not be much longer than the weights, or it cancels against V U.
    if (!(condition() <= options_.max_condition) || !(size > 1e-6 && size < 1e6) ||
        offset > 1e4 * trace)
      stabilise(run_on);
    else if (inverse_error() > 1e-11)
      invert();
  }
  /// ‖U U⁻¹ x − x‖ / ‖x‖ for a vector of signs.
  double inverse_error() const {
    core::dense<double> x(1, width_), y(1, width_), z(1, width_);
    set_signs(x.row(0));
    inverse().times(x.row(0), y.row(0));
    u_transposed().transposed_times(y.row(0), z.row(0));
    core::add(-1, x.row(0), z.row(0), width_);
    return std::sqrt(core::squares_of(z.row(0), width_) / static_cast<double>(features_));
  }
  void set_signs(double* x, std::size_t which = 0) const {
    for (index j = 0; j < features_; ++j)
      x[j] = (at(j + 1) * 0x9e3779b97f4a7c15U) >> (63 - which % 32) & 1 ? 1 : -1;
  }
  /// Computes U⁻¹ from U. Returns the geometric mean of the singular values, 0 for a singular U.
  double invert() {
    core::dense<double> a(features_, width_), b(features_, width_);
    for (index i = 0; i < features_; ++i) {
      for (index j = 0; j < features_; ++j)
        a.row(i)[j] = u_transposed()(j, i);
      b.row(i)[i] = 1;
    }
    const auto met = core::solve(features_, a, b);
    if (!(met.smallest_pivot > 0))
      return 0;
    core::copy_to_panels(b.row(0), width_, features_, core::panels::width * inverse().count(),
                         inverse().data);
    return std::exp(met.log_determinant / static_cast<double>(features_));
  }

  /// V ← V (I + factor u uᵀ), where U was multiplied by the inverse of that from the left.
  struct repair {
    core::dense<double> direction;
    double factor;
  };
  /// Takes singular values that are too small or too large out of U.
  std::vector<repair> find_repairs(double typical) {
    std::vector<repair> found;
    const auto take = [&](const core::panels& a, bool small) {
      core::dense<double> u = dominant(a, found);
      core::dense<double> image(1, width_);
      a.times(u.row(0), image.row(0));
      const double length = std::sqrt(core::squares_of(image.row(0), width_));
      const double value = small ? 1 / length : length;
      const double ratio = value / typical;
      if (!(small ? ratio < 0.5 : ratio > 2))
        return false;
      repair_factor(u.row(0), 1 / ratio);
      found.push_back({std::move(u), ratio - 1});
      return true;
    };
    while (3 * static_cast<index>(found.size()) <= features_ &&
           (take(inverse(), true) || take(u_transposed(), false)))
      continue;
    return found;
  }
  /// U ← (I + (factor − 1) u uᵀ) U for a unit vector u.
  void repair_factor(const double* u, double factor) {
    core::dense<double> image(1, width_);
    u_transposed().times(u, image.row(0));
    u_transposed().add_product(factor - 1, image.row(0), u);
    inverse().times(u, image.row(0));
    inverse().add_product(1 / factor - 1, image.row(0), u);
  }
  /// About the unit vector u, orthogonal to those found, with the longest A u: by power iteration.
  /// It need not be exact: whatever it is, V and U change by inverse factors.
  core::dense<double> dominant(const core::panels& a, const std::vector<repair>& found) const {
    core::dense<double> u(1, width_), image(1, width_);
    set_signs(u.row(0), found.size());
    for (int round = 0; round < 16; ++round) {
      if (round > 0) {
        a.times(u.row(0), image.row(0));
        a.transposed_times(image.row(0), u.row(0));
      }
      for (int twice = 0; twice < 2; ++twice)
        for (const repair& r : found)
          core::add(-core::dot(r.direction.row(0), u.row(0), width_), r.direction.row(0), u.row(0),
                    width_);
      const double length = std::sqrt(core::squares_of(u.row(0), width_));
      for (double& x : u)
        x /= length;
    }
    return u;
  }
  /// Does to V what undoes the repairs, with U's size and with ω: one pass.
  void move_to_v(const std::vector<repair>& repairs, double typical, const executor& run_on) {
    for (double *x = u_transposed().data, *end = u_transposed().end(); x < end; ++x)
      *x /= typical;
    for (double *x = inverse().data, *end = inverse().end(); x < end; ++x)
      *x *= typical;
    core::dense<double> offset(1, width_);
    inverse().transposed_times(offset_.row(0), offset.row(0));
    offset_.clear();
    core::in_pieces(run_on, outputs_, 1024, [&](index first, index last) {
      core::dense<double> row(1, width_);
      std::vector<double> along(repairs.size());
      for (index c = first; c < last; ++c) {
        T* const v = v_.row(c);
        for (std::size_t k = 0; k < repairs.size(); ++k)
          along[k] = core::dot(v, repairs[k].direction.row(0), width_);
        std::copy_n(offset.row(0), width_, row.row(0));
        core::add(typical, v, row.row(0), width_);
        for (std::size_t k = 0; k < repairs.size(); ++k)
          core::add(typical * repairs[k].factor * along[k], repairs[k].direction.row(0), row.row(0),
                    width_);
        for (index j = 0; j < width_; ++j)
          v[j] = static_cast<T>(row.row(0)[j]);
      }
    });
  }

  options options_;
  index outputs_ = 0, features_ = 0, width_ = 0; // a row of V, with zeros to fill packs
  index steps_ = 0, refactorings_ = 0;
  bool factored_ = false; ///< U is not I, or ω not 0
  core::dense<T> v_;
  core::dense<double> state_;        ///< Q, Uᵀ and U⁻¹, each in panels
  core::dense<double> offset_, sum_; ///< ω, w̄
  core::spherical_batch batch_;      ///< scratch
};

} // namespace perdita::inline PERDITA_ABI
