// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

#include "core/linear_kernel.hpp"
#include "core/row_loss.hpp"

namespace perdita::inline PERDITA_ABI {

/// Class weights with a bias: `matrix` is classes × features, `bias` one number per class. Also
/// what their gradients are written to.
template <class M, class B> struct affine {
  M& matrix;
  B& bias;
  affine(M& m, B& b) : matrix(m), bias(b) {}
};

/// Soft targets of a head that makes its own scores: lists of (class, probability). Row r has the
/// entries row_starts[r] to row_starts[r + 1] - 1, or, without row_starts, as many as every row.
/// Entries of one row may come in any order; those of the same class add up; the other classes have
/// probability 0.
template <class T, class I = std::int32_t> struct sparse_targets {
  vector_view<const I> classes;
  vector_view<const T> probabilities;
  vector_view<const std::int64_t> row_starts{}; ///< rows + 1 of them, or none
};

struct linear_options {
  /// Bytes of scores that may be held at once; 0: 64 MiB where that lets nothing be computed twice,
  /// else as little as the threads need. An error below one piece.
  std::size_t budget = 0;
  /// Adds to the gradients of weights and bias (call_options::accumulate is for the gradient of the
  /// hidden states).
  bool accumulate_weights = false;
  /// Gradient filtering, in [0, 1): of each row of G, entries that together are at most this share
  /// of Σ_j |G_ij| may be dropped, where that spares work: then ‖Δ∂X_i‖ ≤ share Σ_j |G_ij| max
  /// ‖W_j‖ and ‖Δ∂W‖ ≤ share Σ_ij |G_ij| ‖X_i‖. The gradient of the bias is exact. 0: nothing is
  /// dropped. A slice keeps to its part of the classes' share.
  double drop_mass = 0;
  /// The same for entries below this size, with all that is in them (row weight, upstream, class
  /// weight, penalty) but the scale and the denominator that all rows have in common. This bounds
  /// no row's error: a flat row may be dropped whole. Not together with drop_mass; both are refused
  /// where a loss's gradient is not a softmax's.
  double drop_below = 0;
  /// Where given, the mass that drop_mass let go at the most, of each row: pieces that keep all
  /// entries count with what could have been dropped of them. 0 where nothing was dropped by it.
  vector_view<double> dropped{};
};

/// What a slice of the classes says of a row: plain numbers, to be stored or sent.
using linear_record = core::row_record;

template <class Loss> class linear_slice;

/// The linear head: a loss of the scores X Wᵀ + b, with its gradients, of which the scores are
/// never held.
///
///   scores z = X Wᵀ + b;   ∂/∂X = G W,  ∂/∂W = Gᵀ X,  ∂/∂b = Gᵀ 1   with G = ∂value/∂z
///
/// Takes every streaming loss of rows, with all its options and by-products, as if it were called
/// with the scores. Losses that need whole rows (sparsemax) are refused when compiled.
///
/// Shapes: hidden X rows × features, weights W classes × features, bias and its gradient one number
/// per class, of T; matrices of T or (for float) of 16 bits, any strides. Rows of T whose elements
/// lie side by side are used where they lie; others are copied piece by piece. Gradients of another
/// kind are made in memory of their own (the hidden states' for 256 rows at a time) and rounded
/// once.
///
/// Memory: where linear_options::budget takes the scores of 64 rows (or of all), as many as it
/// takes up to 256 are kept and nothing is computed twice: 6 N D V operations for value and
/// gradients. Otherwise a piece of 256 rows × 512 classes per thread is, and the scores are made
/// twice: 8 N D V operations, in about 1 MiB a thread whatever the shape.
///
/// Accuracy: a score is a sum of D fused multiply-adds in T, in pieces of 256; all else is as in
/// the loss. Same bits for any number of threads, and on every instruction set with FMA. Rows that
/// do not count cost nothing, and their gradient is 0. Throws std::invalid_argument.
///
/// Source: Wijmans et al., "Cut your losses in large-vocabulary language models", 2024 (for
/// cross-entropy).
///
///   perdita::linear head(perdita::cross_entropy<float>{});
///   float value = head(hidden, weights, labels, d_hidden, d_weights);
template <class Loss> class linear {
public:
  using value_type = typename Loss::value_type;
  using T = value_type;

  using options = linear_options;
  static constexpr const char* name = "linear";

  explicit linear(Loss loss) : linear(std::move(loss), options{}) {}
  linear(Loss loss, const options& o) : loss_(std::move(loss)), options_(o) {
    core::require(o.drop_mass >= 0 && o.drop_mass < 1, name, "drop_mass", o.drop_mass,
                  "a number in [0, 1)");
    core::not_negative(name, "drop_below", o.drop_below);
    core::require(o.drop_mass == 0 || o.drop_below == 0, name, "drop_below", o.drop_below,
                  "0 where drop_mass is given");
  }

  const options& settings() const { return options_; }
  const Loss& loss() const { return loss_; }

  /// The reduced value.
  template <class X, class M, class Y>
  T operator()(X&& hidden, M&& weights, Y&& target, const call_options<T>& call = {}) const {
    core::row_job<T> job;
    core::linear_job<T> io;
    set_inputs(job, io, hidden, weights, target);
    return run<false>(job, io, call);
  }

  /// The reduced value, and its gradients with respect to the hidden states and to the weights (or
  /// both of affine(weights, bias)), written or added to the last two.
  template <class X, class M, class Y, class DX, class DM>
  T operator()(X&& hidden, M&& weights, Y&& target, DX&& d_hidden, DM&& d_weights,
               const call_options<T>& call = {}) const {
    core::row_job<T> job;
    core::linear_job<T> io;
    set_inputs(job, io, hidden, weights, target);
    set_outputs(io, d_hidden, d_weights);
    return run<true>(job, io, call);
  }

  /// A slice of the classes (of a vocabulary that is spread over machines, say), whose `weights`
  /// are those of the classes from `first_class` on, out of `classes`. See linear_slice.
  template <class X, class M, class Y>
  linear_slice<Loss> slice(X&& hidden, M&& weights, Y&& target, index first_class, index classes,
                           const call_options<T>& call = {}) const {
    linear_slice<Loss> result(*this, call);
    set_inputs(result.job_, result.io_, hidden, weights, target, classes);
    core::require(first_class >= 0 && first_class + result.io_.weights.rows <= classes, name,
                  "first_class", first_class,
                  "a slice of the classes: 0 to classes - rows of weights");
    core::require(result.io_.weights.rows > 0 || classes == 0, name, "rows of the weights", 0,
                  "at least one class");
    result.io_.first_class = first_class;
    return result;
  }

private:
  friend linear_slice<Loss>;
  template <class V> struct is_affine : std::false_type {};
  template <class M, class B> struct is_affine<affine<M, B>> : std::true_type {};
  template <class V> struct is_sparse : std::false_type {};
  template <class I> struct is_sparse<sparse_targets<T, I>> : std::true_type {};

  template <class M, bool Mutable> static void set(core::matrix_data<T, Mutable>& to, M& from) {
    static_assert(
        Mutable ? core::gradient_like<M, T> : core::scores_like<M, T>,
        "perdita::linear: matrices are views, Eigen matrices or std::mdspan of the loss's "
        "type, or of a 16-bit type where that is float");
    to = core::matrix_data<T, Mutable>(core::as_matrix(from));
  }

  template <class X, class M, class Y>
  void set_inputs(core::row_job<T>& job, core::linear_job<T>& io, X& hidden, M& weights, Y& target,
                  index classes = -1) const {
    set(io.hidden, hidden);
    if constexpr (is_affine<std::remove_cvref_t<M>>::value) {
      set(io.weights, weights.matrix);
      io.bias = vector_view<const T>(core::as_vector(weights.bias));
      check("bias", io.bias.size, io.weights.rows, "the classes that the weights have");
      core::require(io.bias.stride == 1, name, "stride of bias", io.bias.stride, "1");
      check_memory("bias", io.bias.data, io.bias.size);
    } else {
      set(io.weights, weights);
    }
    const auto& x = io.hidden;
    const auto& w = io.weights;
    check("columns of the weights", w.cols, x.cols, "the columns that the hidden states have");
    check_memory("hidden", x.data, x.rows * x.cols);
    check_memory("weights", w.data, w.rows * w.cols);
    job.name = name;
    job.scores.rows = x.rows;
    job.scores.cols = classes < 0 ? w.rows : classes;
    set_target(job, target);
  }
  template <class Y> void set_target(core::row_job<T>& job, Y& target) const {
    if constexpr (is_sparse<std::remove_cvref_t<Y>>::value) {
      static_assert(Loss::takes_soft_targets, "perdita::linear: this loss takes labels only");
      set_sparse(job, target);
    } else {
      static_assert(core::labels_like<Y>,
                    "perdita::linear: the target must be a vector of integral labels, or "
                    "perdita::sparse_targets of the loss's type");
      core::row_head::set_labels(loss_, job, core::as_vector(target));
    }
  }
  template <class I>
  void set_sparse(core::row_job<T>& job, const sparse_targets<T, I>& target) const {
    const index rows = job.scores.rows, entries = target.classes.size;
    check("size of probabilities", target.probabilities.size, entries, "the number of classes");
    check_memory("classes", target.classes.data, entries);
    check_memory("probabilities", target.probabilities.data, entries);
    auto& s = job.sparse;
    if (target.row_starts.data) {
      check("size of row_starts", target.row_starts.size, rows + 1, "one more than there are rows");
      for (index r = 0; r <= rows; ++r) {
        const std::int64_t least = r > 0 ? target.row_starts[r - 1] : 0, at = target.row_starts[r];
        if (at < least || at > entries || (r == 0 && at != 0) || (r == rows && at != entries))
          core::fail_at(name, "row_starts", r, core::to_text(at),
                        "numbers that rise from 0 to the number of entries, " +
                            core::to_text(entries));
      }
    } else if (rows > 0) {
      s.per_row = entries / rows;
      check("number of entries", entries, s.per_row * rows, "as many for every row");
    }
    for (index e = 0; e < entries; ++e)
      if (target.classes[e] < 0 || static_cast<index>(target.classes[e]) >= job.scores.cols)
        core::fail_at(name, "classes", e, core::to_text(target.classes[e]),
                      "0 to " + core::to_text(job.scores.cols - 1));
    s.classes = target.classes.data;
    s.class_stride = target.classes.stride;
    s.class_reader = [](const void* classes, index at) {
      return static_cast<std::int64_t>(static_cast<const I*>(classes)[at]);
    };
    s.probabilities = target.probabilities;
    s.row_starts = target.row_starts;
  }

  template <class DX, class DM>
  void set_outputs(core::linear_job<T>& io, DX& d_hidden, DM& d_weights) const {
    set(io.d_hidden, d_hidden);
    if constexpr (is_affine<std::remove_cvref_t<DM>>::value) {
      set(io.d_weights, d_weights.matrix);
      io.d_bias = vector_view<T>(core::as_vector(d_weights.bias));
      check("gradient of the bias", io.d_bias.size, io.weights.rows, "the number of classes");
      check_memory("gradient of the bias", io.d_bias.data, io.d_bias.size);
    } else {
      set(io.d_weights, d_weights);
    }
    const auto same = [&](const char* what, const auto& gradient, const auto& of) {
      check("rows of the gradient of the ", gradient.rows, of.rows, what, what);
      check("columns of the gradient of the ", gradient.cols, of.cols, what, what);
      check_memory("gradient", gradient.data, gradient.rows * gradient.cols);
    };
    same("hidden states", io.d_hidden, io.hidden);
    same("weights", io.d_weights, io.weights);
    check_apart(io);
  }

  void check(const char* what, index got, index expected, const char* of,
             const char* whose = "") const {
    if (got != expected) [[unlikely]] // no text, and no heap, before
      core::fail(name, std::string(what) + whose, core::to_text(got),
                 core::to_text(expected) + " (" + of + ")");
  }
  void check_memory(const char* what, const void* data, index elements) const {
    core::require_memory(name, what, data, elements);
  }
  /// Inputs are read to the end: no result may lie on them, or on another one.
  void check_apart(const core::linear_job<T>& l) const {
    const auto vector = [](const auto& v) {
      const auto base = reinterpret_cast<std::uintptr_t>(v.data);
      if (v.size == 0)
        return core::extent{0, 0};
      const auto reach = static_cast<std::uintptr_t>((v.size - 1) * v.stride) * sizeof(T);
      return v.stride > 0 ? core::extent{base, base + reach + sizeof(T)}
                          : core::extent{base + reach, base + sizeof(T)};
    };
    const auto matrix = [](const auto& m) {
      return m.rows * m.cols > 0 ? core::bytes_of(m) : core::extent{0, 0};
    };
    const std::pair<const char*, core::extent> all[] = {
        {"gradient of the hidden states", matrix(l.d_hidden)},
        {"gradient of the weights", matrix(l.d_weights)},
        {"gradient of the bias", vector(l.d_bias)},
        {"hidden states", matrix(l.hidden)},
        {"weights", matrix(l.weights)},
        {"bias", vector(l.bias)}};
    for (int i = 0; i < 3; ++i)
      for (int j = i + 1; j < 6; ++j)
        if (all[i].second.begin < all[j].second.end && all[j].second.begin < all[i].second.end)
          core::fail(std::string("perdita::linear: ") + all[i].first + " overlaps " + all[j].first +
                     ", expected memory apart");
  }

  /// How many rows go together, and how many pieces of their scores are kept.
  void plan(core::linear_job<T>& io, bool gradient, index rows, index concurrency) const {
    using shape = core::linear_shape<T>;
    const shape s{io.weights.rows};
    if (s.classes == 0)
      return; // an error if there are rows, and nothing to do if not
    const index whole = (rows + shape::width - 1) / shape::width * shape::width;
    const index most = std::min(shape::columns, whole);
    const auto bytes = [&](index pieces, index n) {
      return static_cast<std::size_t>(pieces * s.slot(n)) * sizeof(T);
    };
    if (options_.budget != 0 && options_.budget < bytes(1, most))
      core::fail(name, "budget", core::to_text(options_.budget),
                 "0, or at least " + core::to_text(bytes(1, most)) + " bytes for this shape");
    const std::size_t budget = options_.budget != 0 ? options_.budget : std::size_t{64} << 20;
    const auto affordable =
        static_cast<index>(budget / bytes(s.pieces(), shape::width)) * shape::width;
    io.block_rows = std::min(most, affordable);
    io.slots = s.pieces();
    if (!gradient || io.block_rows < std::min<index>(most, 64)) { // tight
      io.block_rows = most;
      const auto n =
          options_.budget != 0 ? static_cast<index>(budget / bytes(1, most)) : concurrency;
      // Fewer than pieces, if more than one: threads must not decide whether all can be kept.
      io.slots = std::clamp<index>(n, 1, std::max<index>(std::min(concurrency, s.pieces() - 1), 1));
    }
  }

  template <bool Gradient>
  T run(core::row_job<T>& job, core::linear_job<T>& io, const call_options<T>& call,
        const core::row_record* records = nullptr) const {
    return run_with<Gradient>(job, io, call, [&](const auto& formula) {
      if constexpr (Gradient)
        for (index r = 0; r < io.dropped.size; ++r)
          io.dropped[r] = 0;
      return core::run_linear<Gradient>(formula, job, io, call.run_on, call.memory, records);
    });
  }
  /// Plans a call, and has use(formula) do it.
  template <bool Gradient, class Use>
  T run_with(core::row_job<T>& job, core::linear_job<T>& io, const call_options<T>& call,
             Use use) const {
    io.accumulate_weights = options_.accumulate_weights;
    io.filter.share = options_.drop_mass;
    io.filter.threshold = options_.drop_below;
    io.dropped = options_.dropped;
    if (io.dropped.data || io.dropped.size > 0) {
      check("size of dropped", io.dropped.size, job.scores.rows, "one number per row");
      core::require_memory(name, "dropped", io.dropped.data, io.dropped.size);
    }
    plan(io, Gradient, std::max<index>(job.scores.rows, 1),
         static_cast<index>(call.run_on.concurrency()));
    return core::row_head::drive(loss_, job, call, [&](const auto& formula) {
      using formula_type = std::remove_cvref_t<decltype(formula)>;
      static_assert(
          !core::whole_row_formula<formula_type>,
          "perdita::linear: this loss needs a whole row of scores at once, and the linear "
          "head never holds one; make the scores and call the loss itself");
      if constexpr (!core::whole_row_formula<formula_type>) {
        if (!formula_type::statistic::has_image && io.filter)
          core::fail(name, "drop_mass or drop_below",
                     core::to_text(options_.drop_mass + options_.drop_below),
                     "0 for a loss whose gradient is not that of a softmax");
        if (io.weights.rows == 0)
          return 0.0;
        return use(formula);
      }
    });
  }

  Loss loss_;
  options options_;
};

/// A call of the linear head of which only some of the classes are at hand. Everybody who has a
/// slice
///
///   1. summarise()s it into one record per row;
///   2. gets the records of all others and merge()s them, everybody in the same order;
///   3. finish()es: values and by-products of whole rows, the same for everybody;
///   4. goes backward(): all of the gradient of the slice's weights, and of the gradient of the
///      hidden states what is due to these classes; the sum over all slices is the gradient.
///
/// Refers to the memory of the arguments of linear::slice(), and so must not outlive it. The
/// entropy, where it is wanted, is asked for in every step. Records of rows that do not count are
/// left alone. Throws std::invalid_argument.
template <class Loss> class linear_slice {
public:
  using T = typename Loss::value_type;

  void summarise(std::span<linear_record> records) const {
    check(records.size());
    run_with([&](const auto& formula, auto& job, auto& io) {
      core::summarise_linear(formula, job, io, call_.run_on, call_.memory, records.data());
    });
  }
  /// into = what both know.
  void merge(std::span<linear_record> into, std::span<const linear_record> other) const {
    check(into.size());
    check(other.size());
    run_with([&](const auto& formula, auto&, auto&) {
      using block = core::linear_block<std::remove_cvref_t<decltype(formula)>, T>;
      for (std::size_t i = 0; i < into.size(); ++i)
        block::merge_records(into[i], other[i]);
    });
  }
  /// The reduced value, from the records of all classes.
  T finish(std::span<const linear_record> all) const {
    check(all.size());
    auto job = job_;
    auto io = io_;
    return head_.template run<false>(job, io, call_, all.data());
  }
  /// The gradients that belong to this slice, from the records of all classes.
  template <class DX, class DM>
  void backward(std::span<const linear_record> all, DX&& d_hidden, DM&& d_weights) const {
    check(all.size());
    auto io = io_;
    head_.set_outputs(io, d_hidden, d_weights);
    auto job = job_;
    head_.template run<true>(job, io, call_, all.data());
  }

private:
  friend linear<Loss>;
  linear_slice(const linear<Loss>& head, const call_options<T>& call) : head_(head), call_(call) {}

  void check(std::size_t records) const {
    head_.check("number of records", static_cast<index>(records), job_.scores.rows,
                "the rows that the hidden states have");
  }
  template <class Use> void run_with(Use use) const {
    auto job = job_;
    auto io = io_;
    head_.template run_with<false>(job, io, call_, [&](const auto& formula) {
      use(formula, job, io);
      return 0.0;
    });
  }

  linear<Loss> head_;
  call_options<T> call_;
  core::row_job<T> job_;
  core::linear_job<T> io_;
};

} // namespace perdita::inline PERDITA_ABI
