// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>
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
    core::require(o.scale > 0 && std::isfinite(o.scale), name, "scale", o.scale,
                  "a finite number above 0");
  }
  const options& settings() const { return options_; }
  const Loss& loss() const { return loss_; }

  /// The reduced value of pairs: y_i belongs to x_i.
  template <class X, class Y>
  requires core::scores_like<X, T> && core::scores_like<Y, T>
      T operator()(X&& x, Y&& y, const call_options<T>& call = {}) const {
    const pair_numbers pairs{core::as_matrix(x).rows};
    return run<false>(x, y, pairs, empty_, empty_, call);
  }
  /// The reduced value of pairs, and the gradients with respect to both.
  template <class X, class Y, class DX, class DY>
  requires core::scores_like<X, T> && core::scores_like<Y, T> && core::gradient_like<DX, T> &&
      core::gradient_like<DY, T>
          T operator()(X&& x, Y&& y, DX&& d_x, DY&& d_y, const call_options<T>& call = {}) const {
    const pair_numbers pairs{core::as_matrix(x).rows};
    return run<true>(x, y, pairs, d_x, d_y, call);
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

private:
  /// Labels that number the rows.
  struct pair_numbers {
    index rows;
  };
  static void count_up(const void*, index, index first, index n, std::int64_t* out) {
    for (index i = 0; i < n; ++i)
      out[i] = first + i;
  }
  inline static const matrix_view<T> empty_{};

  void set_labels(core::row_job<T>& job, const pair_numbers&) const {
    job.labels = this;
    job.label_reader = &count_up;
  }
  template <class L> void set_labels(core::row_job<T>& job, const vector_view<L>& labels) const {
    core::row_head::set_labels(loss_, job, labels);
  }
  static void check(const char* what, index got, index expected, const char* of) {
    if (got != expected) [[unlikely]] // no text, and no heap, before
      core::fail(name, what, core::to_text(got), core::to_text(expected) + " (" + of + ")");
  }
  static void check_memory(const char* what, const void* data, index elements) {
    if (!data && elements > 0) [[unlikely]]
      core::fail(name, what, "null", "a pointer to memory");
  }

  template <bool Gradient, class X, class Y, class L, class DX, class DY>
  T run(X& x, Y& y, const L& labels, DX& d_x, DY& d_y, const call_options<T>& call,
        bool alone = false) const {
    core::similarity_job<T> pairs;
    pairs.x = core::matrix_data<T>(core::as_matrix(x));
    pairs.y = core::matrix_data<T>(core::as_matrix(y));
    pairs.d_x = core::matrix_data<T, true>(core::as_matrix(d_x));
    pairs.d_y = core::matrix_data<T, true>(core::as_matrix(d_y));
    pairs.scale = options_.scale;
    pairs.normalise = options_.normalise;
    pairs.alone = alone;
    pairs.both = options_.both && !alone;
    pairs.d_scale = Gradient ? options_.d_scale : nullptr;
    core::row_job<T> job;
    job.name = name;
    job.scores.rows = pairs.x.rows;
    job.scores.cols = pairs.y.rows;
    check_shapes<Gradient>(pairs);
    if constexpr (std::is_same_v<L, pair_numbers>)
      check("rows of y", pairs.y.rows, pairs.x.rows, "the rows of x, as these are pairs");
    else
      core::require(!pairs.both, name, "labels", 0, "none where both directions are asked for");
    set_labels(job, labels);
    if (pairs.both || pairs.alone)
      check_all_count(job, call);
    if (pairs.d_scale && job.scores.rows == 0)
      *pairs.d_scale = 0;
    return core::row_head::drive(loss_, job, call, [&](const auto& formula) {
      using formula_type = std::remove_cvref_t<decltype(formula)>;
      static_assert(!core::whole_row_formula<formula_type>,
                    "perdita::similarity: this loss needs a whole row of scores at once, and the "
                    "similarity head never holds one");
      if constexpr (core::whole_row_formula<formula_type>)
        return 0.0;
      else
        return job.scores.rows == 0
                   ? 0.0
                   : core::run_similarity<Gradient>(formula, job, pairs, call.run_on, call.memory);
    });
  }

  template <bool Gradient> static void check_shapes(const core::similarity_job<T>& pairs) {
    const auto &x = pairs.x, &y = pairs.y;
    check("columns of y", y.cols, x.cols, "the columns of x");
    check_memory("x", x.data, x.rows * x.cols);
    check_memory("y", y.data, y.rows * y.cols);
    if constexpr (Gradient) {
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

} // namespace perdita::inline PERDITA_ABI
