// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>
#include <utility>

#include "core/row_loss.hpp"
#include "core/similarity_kernel.hpp"

namespace perdita::inline PERDITA_ABI {

struct similarity_options {
  double scale = 1;      ///< s: 1/temperature, above 0
  bool normalise = true; ///< cosines of the embeddings, and not their products
  bool both = false;     ///< the mean of the losses of rows and of columns: pairs only
  /// Where given, ∂value/∂s goes there if gradients are asked for.
  double* d_scale = nullptr;
};

/// What is known of a row from some of its candidates: plain numbers, to be stored or sent.
using similarity_record = core::row_record;

template <class Loss> class similarity_slice;

/// The similarity head: a loss of the scores of embeddings compared with embeddings, with its
/// gradients through the normalisation, of which the scores are never held.
///
///   S_ij = s ⟨x̂_i, ŷ_j⟩,  x̂ = x/‖x‖;   ∂/∂x_i = (g − ⟨g, x̂_i⟩ x̂_i)/‖x_i‖,  g = s Σ_j G_ij ŷ_j
///   ∂/∂s = Σ G∘S/s,   G = ∂value/∂S,   and for y with Gᵀ
///
/// Takes every streaming loss of rows. With cross_entropy and s = 1/τ
///
///   head(x, y)                 InfoNCE: y_i belongs to x_i
///   {.both = true}, head(x, y) CLIP's symmetric loss, whose directions share their products
///   head.within(v, partners)   NT-Xent: v = [x; y] with itself, no row compared with itself, the
///                              partner of each being its label
///   head(x, y, labels)         y of any number, labels[i] the one that belongs to x_i
///
/// Shapes: x rows × features, y columns × features, of T (or 16-bit storage where T is float), any
/// strides; labels one per row, of any integral type. Where each direction or each row of a matrix
/// is compared with each, every row has to count: no ignored label, no weight of 0. By-products and
/// row weights are the rows'; with `both`, row weights are the pairs', `values` the means of both
/// directions, other by-products those of the rows.
///
/// Special values: a vector shorter than the smallest normal number is taken for 0: its cosines are
/// 0, its gradient too. One row: cross-entropy 0, gradient 0; within(), nothing is left to compare
/// it with, and the loss is what it is of a masked label (+inf for cross-entropy). Equal embeddings
/// tie. A NaN or an infinity makes its row NaN, and each row that is compared with it. Norms of
/// float beyond 1e37, and products with unit vectors above the largest number, are out of range.
///
/// Memory: 11 numbers or so for each row, and per thread two tiles and a panel (256 KiB each);
/// gradients that are not of T, or whose rows do not lie side by side, and accumulated ones are
/// made in memory of their own first. Operations, for N rows, M columns, D features: 2 N M D for
/// the value, 8 N M D with gradients; within() half of each. Same bits for any number of threads
/// and on every instruction set with FMA. Throws std::invalid_argument.
///
/// Source: the losses' own; van den Oord, Li, Vinyals 2018 (InfoNCE); Chen et al. 2020 (NT-Xent);
/// Radford et al. 2021 (CLIP); tiles without the matrix: Cheng et al., "Breaking the memory
/// barrier", 2024.
///
///   double d_scale;
///   perdita::similarity head(perdita::cross_entropy<float>{},
///                            {.scale = 1 / 0.07, .both = true, .d_scale = &d_scale});
///   float value = head(images, texts, d_images, d_texts);
template <class Loss> class similarity {
public:
  using value_type = typename Loss::value_type;
  using T = value_type;
  using options = similarity_options;
  static constexpr const char* name = "similarity";

  explicit similarity(Loss loss) : similarity(std::move(loss), options{}) {}
  similarity(Loss loss, const options& o) : loss_(std::move(loss)), options_(o) {
    core::positive(name, "scale", o.scale);
  }
  const options& settings() const { return options_; }
  const Loss& loss() const { return loss_; }

  /// The reduced value of pairs: y_i belongs to x_i.
  template <class X, class Y>
  requires core::scores_like<X, T> && core::scores_like<Y, T>
      T operator()(X&& x, Y&& y, const call_options<T>& call = {}) const {
    return run<false>(x, y, pair_numbers{}, empty_, empty_, call);
  }
  /// The reduced value of pairs, and the gradients with respect to both.
  template <class X, class Y, class DX, class DY>
  requires core::scores_like<X, T> && core::scores_like<Y, T> && core::gradient_like<DX, T> &&
      core::gradient_like<DY, T>
          T operator()(X&& x, Y&& y, DX&& d_x, DY&& d_y, const call_options<T>& call = {}) const {
    return run<true>(x, y, pair_numbers{}, d_x, d_y, call);
  }
  /// The reduced value; labels[i] is the number of the row of y that belongs to x_i.
  template <class X, class Y, core::labels_like L>
  requires core::scores_like<X, T> && core::scores_like<Y, T>
      T operator()(X&& x, Y&& y, L&& labels, const call_options<T>& call = {}) const {
    return run<false>(x, y, core::as_vector(labels), empty_, empty_, call);
  }
  template <class X, class Y, core::labels_like L, class DX, class DY>
  requires core::scores_like<X, T> && core::scores_like<Y, T> && core::gradient_like<DX, T> &&
      core::gradient_like<DY, T>
          T operator()(X&& x, Y&& y, L&& labels, DX&& d_x, DY&& d_y,
                       const call_options<T>& call = {}) const {
    return run<true>(x, y, core::as_vector(labels), d_x, d_y, call);
  }

  /// The reduced value of x compared with itself; partners[i] is the number of the row that belongs
  /// to x_i.
  template <class X, core::labels_like L>
  requires core::scores_like<X, T> T within(X&& x, L&& partners, const call_options<T>& call = {})
  const { return run<false>(x, x, core::as_vector(partners), empty_, empty_, call, true); }
  template <class X, core::labels_like L, class DX>
  requires core::scores_like<X, T> && core::gradient_like<DX, T>
      T within(X&& x, L&& partners, DX&& d_x, const call_options<T>& call = {})
  const { return run<true>(x, x, core::as_vector(partners), d_x, empty_, call, true); }

  /// Some rows against some of the candidates, for batches larger than memory or spread over
  /// machines: y are the candidates from number `first_y` on, out of `candidates`, among which
  /// labels[i] is the number of the one that belongs to x_i. See similarity_slice.
  template <class X, class Y, core::labels_like L>
  similarity_slice<Loss> slice(X&& x, Y&& y, L&& labels, index first_y, index candidates,
                               const call_options<T>& call = {}) const {
    return slice_of(x, y, core::as_vector(labels), first_y, candidates, call);
  }
  /// The same of pairs: x are the first halves of those from number `first_x` on, y the second
  /// halves of those from `first_y` on, out of `pairs`.
  template <class X, class Y>
  similarity_slice<Loss> slice(X&& x, Y&& y, index first_x, index first_y, index pairs,
                               const call_options<T>& call = {}) const {
    check_part("first_x", first_x, core::as_matrix(x).rows, pairs);
    return slice_of(x, y, pair_numbers{first_x}, first_y, pairs, call);
  }
  /// Slices of within(): x and y are the rows of one batch of `rows` from number `first_x`, and
  /// from `first_y`, on, and partners[i] is the number of the row that belongs to x_i. No row is
  /// compared with itself. A row's gradient is what it has as one of x and as one of y, added.
  template <class X, class Y, core::labels_like L>
  similarity_slice<Loss> slice_within(X&& x, Y&& y, L&& partners, index first_x, index first_y,
                                      index rows, const call_options<T>& call = {}) const {
    check_part("first_x", first_x, core::as_matrix(x).rows, rows);
    auto result = slice_of(x, y, core::as_vector(partners), first_y, rows, call);
    result.pairs_.own = first_x;
    return result;
  }

private:
  friend similarity_slice<Loss>;
  /// Labels that number the rows, from one on.
  struct pair_numbers {
    index first = 0;
  };
  static void count_up(const void*, index start, index first, index n, std::int64_t* out) {
    for (index i = 0; i < n; ++i)
      out[i] = start + first + i;
  }
  inline static const matrix_view<T> empty_{};

  void set_labels(core::row_job<T>& job, const pair_numbers& pairs) const {
    job.labels = name; // which count_up() does not read
    job.label_reader = &count_up;
    job.label_stride = pairs.first;
  }
  template <class L> void set_labels(core::row_job<T>& job, const vector_view<L>& labels) const {
    core::row_head::set_labels(loss_, job, labels);
  }
  static void check(const char* what, index got, index expected, const char* of) {
    if (got != expected) [[unlikely]] // no text, and no heap, before
      core::fail(name, what, core::to_text(got), core::to_text(expected) + " (" + of + ")");
  }
  static void check_memory(const char* what, const void* data, index elements) {
    core::require_memory(name, what, data, elements);
  }
  static void check_part(const char* what, index first, index size, index all) {
    if (first < 0 || first > all - size) [[unlikely]]
      core::fail(name, what, core::to_text(first),
                 "the place of " + core::to_text(size) + " rows among " + core::to_text(all));
  }

  template <bool Gradient, class X, class Y, class L, class DX, class DY>
  T run(X& x, Y& y, const L& labels, DX& d_x, DY& d_y, const call_options<T>& call,
        bool alone = false) const {
    core::row_job<T> job;
    core::similarity_job<T> pairs;
    pairs.alone = alone;
    pairs.own = alone ? 0 : -1;
    pairs.both = options_.both && !alone;
    set_inputs(job, pairs, x, y, labels, core::as_matrix(y).rows);
    if constexpr (Gradient)
      set_outputs(pairs, d_x, d_y);
    if constexpr (std::is_same_v<L, pair_numbers>)
      check("rows of y", pairs.y.rows, pairs.x.rows, "the rows of x, as these are pairs");
    else
      core::require(!pairs.both, name, "labels", 0, "none where both directions are asked for");
    if (pairs.both || pairs.alone)
      check_all_count(job, call);
    return run_all(job, pairs, call);
  }
  T run_all(core::row_job<T>& job, const core::similarity_job<T>& pairs,
            const call_options<T>& call) const {
    return run_with(job, call, [&](const auto& formula) {
      return core::run_similarity(formula, job, pairs, call.run_on, call.memory);
    });
  }
  /// Checks a call, and has use(formula) do it.
  template <class Use>
  T run_with(core::row_job<T>& job, const call_options<T>& call, Use use) const {
    return core::row_head::drive(loss_, job, call, [&](const auto& formula) {
      using formula_type = std::remove_cvref_t<decltype(formula)>;
      static_assert(!core::whole_row_formula<formula_type>,
                    "perdita::similarity: this loss needs a whole row of scores at once, and the "
                    "similarity head never holds one");
      if constexpr (core::whole_row_formula<formula_type>)
        return 0.0;
      else
        return use(formula);
    });
  }

  template <class X, class Y, class L>
  similarity_slice<Loss> slice_of(X& x, Y& y, const L& labels, index first_y, index candidates,
                                  const call_options<T>& call) const {
    core::require(!options_.both, name, "both", true,
                  "false for a slice: the other direction is a slice with x and y exchanged");
    similarity_slice<Loss> result(*this, call);
    set_inputs(result.job_, result.pairs_, x, y, labels, candidates);
    check_part("first_y", first_y, result.pairs_.y.rows, candidates);
    result.pairs_.first = first_y;
    return result;
  }

  template <class X, class Y, class L>
  void set_inputs(core::row_job<T>& job, core::similarity_job<T>& pairs, X& x, Y& y,
                  const L& labels, index candidates) const {
    static_assert(core::scores_like<X, T> && core::scores_like<Y, T>,
                  "perdita::similarity: embeddings are views, Eigen matrices or std::mdspan of the "
                  "loss's type, or of a 16-bit type where that is float");
    pairs.x = core::matrix_data<T>(core::as_matrix(x));
    pairs.y = core::matrix_data<T>(core::as_matrix(y));
    pairs.scale = options_.scale;
    pairs.normalise = options_.normalise;
    check("columns of y", pairs.y.cols, pairs.x.cols, "the columns of x");
    check_memory("x", pairs.x.data, pairs.x.rows * pairs.x.cols);
    check_memory("y", pairs.y.data, pairs.y.rows * pairs.y.cols);
    job.name = name;
    job.scores.rows = pairs.x.rows;
    job.scores.cols = candidates;
    set_labels(job, labels);
  }
  template <class DX, class DY>
  void set_outputs(core::similarity_job<T>& pairs, DX& d_x, DY& d_y) const {
    pairs.d_x = core::matrix_data<T, true>(core::as_matrix(d_x));
    pairs.d_y = core::matrix_data<T, true>(core::as_matrix(d_y));
    pairs.d_scale = options_.d_scale;
    pairs.gradient = true;
    const auto &x = pairs.x, &y = pairs.y;
    check("rows of the gradient of x", pairs.d_x.rows, x.rows, "the rows of x");
    check("columns of the gradient of x", pairs.d_x.cols, x.cols, "the columns of x");
    check_memory("gradient of x", pairs.d_x.data, x.rows * x.cols);
    const core::extent all[] = {core::bytes_of(pairs.d_x),
                                pairs.alone ? core::extent{0, 0} : core::bytes_of(pairs.d_y),
                                core::bytes_of(x), core::bytes_of(y)};
    if (!pairs.alone) {
      check("rows of the gradient of y", pairs.d_y.rows, y.rows, "the rows of y");
      check("columns of the gradient of y", pairs.d_y.cols, y.cols, "the columns of y");
      check_memory("gradient of y", pairs.d_y.data, y.rows * y.cols);
    }
    core::require_apart(name, all, 2);
  }
  void check_all_count(const core::row_job<T>& job, const call_options<T>& call) const {
    for (index r = 0; r < job.scores.rows; ++r) {
      const std::int64_t label = job.label(r);
      if (label == loss_.settings().ignore_index)
        core::fail_at(name, "labels", r, core::to_text(label),
                      "one that is not ignored, as every row is compared with every other");
      if (call.row_weights.data && r < call.row_weights.size && call.row_weights[r] == T(0))
        core::fail_at(name, "row_weights", r, "0",
                      "above 0, as every row is compared with every other");
    }
  }

  Loss loss_;
  options options_;
};

/// A call of the similarity head of which only some candidates are at hand, and perhaps only some
/// rows. For each slice of the candidates, whoever has it
///
///   1. summarise()s it into one record per row;
///   2. has the records of all slices merge()d, in the order of the slices;
///   3. finish()es, with any of the slices: the value and by-products of these rows;
///   4. goes backward(), with the merged records: the gradient of the slice's y, and of those of x
///      and of s what is due to these candidates, so that sums over all slices are the gradients.
///
/// With call_options::accumulate gradients, also the head's d_scale, are added to what is there:
/// slices may come one after another. Made apart and added in that order, they have the same bits.
///
/// Rows may be cut too: values, d_y and d_scale of all rows are the sums of those of the pieces,
/// where call_options::normaliser is what the mean over all rows divides by (their number, or the
/// sum of their weights). CLIP's loss is half the sum of slices (x, y) and of slices (y, x), with
/// call_options::scale = 0.5 for its gradients; the head's `both` has to be false.
///
/// Bits: one slice that is the whole gives what the head's call does. Several round what is merged:
/// their value and gradients are the whole's to a few ε of the largest entry (24 are tested). A
/// record depends on its row and on the slice of the candidates, and not on the rows around it (at
/// most as many as there are candidates) or on threads; sums depend on the cuts alone.
///
/// Memory: a record per row; otherwise as the head, for the rows and candidates at hand. Refers to
/// the memory of the arguments of similarity::slice(), and so must not outlive it. Records of rows
/// that do not count are left alone. Throws std::invalid_argument, before anything is written.
///
///   std::vector<perdita::similarity_record> all(rows), more(rows);
///   const auto slice = [&](const auto& y, std::ptrdiff_t first) {
///     return head.slice(x, y, 0, first, pairs, {.accumulate = true});
///   };
///   slice(y_0, 0).summarise(all);
///   slice(y_1, first_1).summarise(more); // anywhere
///   slice(y_0, 0).merge(all, more);
///   float value = slice(y_0, 0).finish(all);
///   slice(y_0, 0).backward(all, d_x, d_y_0);
///   slice(y_1, first_1).backward(all, d_x, d_y_1);
template <class Loss> class similarity_slice {
public:
  using T = typename Loss::value_type;

  void summarise(std::span<similarity_record> records) const {
    check(records.size());
    run_with([&](const auto& formula, const auto& job) {
      core::summarise_similarity(formula, job, pairs_, call_.run_on, call_.memory, records.data());
      return 0.0;
    });
  }
  /// into = what both know.
  void merge(std::span<similarity_record> into, std::span<const similarity_record> other) const {
    check(into.size());
    check(other.size());
    run_with([&](const auto& formula, const auto&) {
      using block = core::linear_block<std::remove_cvref_t<decltype(formula)>, T>;
      for (std::size_t i = 0; i < into.size(); ++i)
        block::merge_records(into[i], other[i]);
      return 0.0;
    });
  }
  /// The reduced value of these rows, from the records of all candidates.
  T finish(std::span<const similarity_record> all) const {
    check(all.size());
    return resume(all, pairs_);
  }
  /// The gradients that belong to this slice, from the records of all candidates.
  template <class DX, class DY>
  requires core::gradient_like<DX, T> && core::gradient_like<DY, T>
  void backward(std::span<const similarity_record> all, DX&& d_x, DY&& d_y) const {
    check(all.size());
    auto pairs = pairs_;
    head_.set_outputs(pairs, d_x, d_y);
    pairs.accumulate_scale = call_.accumulate;
    resume(all, pairs);
  }

private:
  friend similarity<Loss>;
  similarity_slice(const similarity<Loss>& head, const call_options<T>& call)
      : head_(head), call_(call) {}

  void check(std::size_t records) const {
    head_.check("number of records", static_cast<index>(records), job_.scores.rows,
                "the rows of x");
  }
  T resume(std::span<const similarity_record> all, const core::similarity_job<T>& pairs) const {
    return run_with([&](const auto& formula, const auto& job) {
      return core::resume_similarity(formula, job, pairs, call_.run_on, call_.memory, all.data());
    });
  }
  template <class Use> T run_with(Use use) const {
    auto job = job_;
    return head_.run_with(job, call_, [&](const auto& formula) { return use(formula, job); });
  }

  similarity<Loss> head_;
  call_options<T> call_;
  core::row_job<T> job_;
  core::similarity_job<T> pairs_;
};

} // namespace perdita::inline PERDITA_ABI
