// SPDX-License-Identifier: MIT
#pragma once

/// The call operators of every loss of anchors and candidates.

#include <cmath>
#include <cstdint>
#include <string>
#include <unordered_map>

#include "anchor_kernel.hpp"
#include "errors.hpp"
#include "row_loss.hpp"
#include "views.hpp"

namespace perdita::inline PERDITA_ABI {

/// Everything that changes a call of a loss of anchors but not the mathematics.
template <class T> struct anchor_options {
  /// One factor per anchor, of value and slopes; counts in the mean's denominator. 0 removes an
  /// anchor, but not the candidate.
  vector_view<const T> row_weights{};
  vector_view<const T> upstream{}; ///< ∂(what is minimised)/∂(value of the anchor)
  T scale = 1;                     ///< multiplies the gradients only
  double normaliser = 0;           ///< what the mean divides by, where this is not 0
  bool accumulate = false;         ///< adds to the gradients instead of overwriting them
  /// One number per anchor: its value times its weight; 0 of those that do not count.
  vector_view<T> values{};
  /// Who is compared with whom, beyond the labels: bad pairs, groups, a queue.
  relation_filter<T> filter{};

  executor run_on{};
  workspace* memory = nullptr; ///< scratch to reuse
};

namespace core {
/// Opens a loss to its base.
struct anchor_access {
  template <class Loss> static auto formula(const Loss& loss) { return loss.formula(); }
  template <class Loss, class T> static void set_extra(const Loss& loss, anchor_job<T>& job) {
    if constexpr (requires { loss.set_extra(job); })
      loss.set_extra(job);
  }
};

inline void require_temperature(const char* name, double temperature) {
  require(temperature > 0 && std::isfinite(temperature), name, "temperature", temperature,
          "a finite number above 0");
}
} // namespace core

/// Base of every loss of anchors, each of which is compared with all candidates. Derived declares
///
///   name        for messages
///   settings()  options, among them reduction (of what the anchors that count make) and normalise
///   formula()   the mathematics, a core::anchor_formula; open to core::anchor_access
///
/// and, where options have gradients, set_extra(job), which sets job.extra.
///
/// Three ways to say who is compared with whom, with the gradients after the inputs, or without:
///
///   loss(x, labels, d_x)                      x with itself; equal labels belong together; no row
///                                             is compared with itself
///   loss.views(x, n, d_x)                     the same: x holds n views of each item, all first
///                                             views, then all second, …
///   loss(x, y, labels_x, labels_y, d_x, d_y)  x with y
///   loss.pairs(x, y, d_x, d_y)                the same: y_i, and no other, belongs to x_i
///
/// Without d_y, in the last two, only the gradient of x is made, a third faster.
///
/// Shapes: x rows × features, y columns × features, of T (or 16-bit storage where T is float), any
/// strides; labels one per row, of any integral type and value.
///
/// A vector shorter than the smallest normal number is taken for 0 where vectors are normalised:
/// its cosines are 0, its gradient too. Rows that are equal are ordinary rows. A NaN or an infinity
/// makes each anchor that is compared with its row NaN. Nothing that counts: value 0, gradient 0.
///
/// Memory: some numbers for each row, rows of comparisons of up to 128 anchors (4.3 MiB at most,
/// but no fewer than 16 rows), and 0.3 MiB per thread. Same bits for any number of threads and on
/// every instruction set with FMA. Throws std::invalid_argument.
template <class Derived, class T> class anchor_loss {
public:
  using value_type = T;

  template <class X, core::labels_like L>
  requires core::scores_like<X, T> T operator()(X&& x, L&& labels,
                                                const anchor_options<T>& call = {}) const {
    return run<false>(x, x, labels, labels, none_, none_, call, true);
  }
  template <class X, core::labels_like L, class DX>
  requires core::scores_like<X, T> && core::gradient_like<DX, T>
      T operator()(X&& x, L&& labels, DX&& d_x, const anchor_options<T>& call = {}) const {
    return run<true>(x, x, labels, labels, d_x, none_, call, true);
  }

  template <class X, class Y, core::labels_like L, core::labels_like M>
  requires core::scores_like<X, T> && core::scores_like<Y, T> T
  operator()(X&& x, Y&& y, L&& labels_x, M&& labels_y, const anchor_options<T>& call = {}) const {
    return run<false>(x, y, labels_x, labels_y, none_, none_, call, false);
  }
  template <class X, class Y, core::labels_like L, core::labels_like M, class DX, class DY>
  requires core::scores_like<X, T> && core::scores_like<Y, T> && core::gradient_like<DX, T> &&
      core::gradient_like<DY, T>
          T operator()(X&& x, Y&& y, L&& labels_x, M&& labels_y, DX&& d_x, DY&& d_y,
                       const anchor_options<T>& call = {}) const {
    return run<true>(x, y, labels_x, labels_y, d_x, d_y, call, false);
  }
  template <class X, class Y, core::labels_like L, core::labels_like M, class DX>
  requires core::scores_like<X, T> && core::scores_like<Y, T> && core::gradient_like<DX, T>
      T operator()(X&& x, Y&& y, L&& labels_x, M&& labels_y, DX&& d_x,
                   const anchor_options<T>& call = {}) const {
    return run<true, false>(x, y, labels_x, labels_y, d_x, none_, call, false);
  }

  template <class X, class Y>
  requires core::scores_like<X, T> && core::scores_like<Y, T>
      T pairs(X&& x, Y&& y, const anchor_options<T>& call = {})
  const { return run<false>(x, y, numbers{}, numbers{}, none_, none_, call, false); }
  template <class X, class Y, class DX, class DY>
  requires core::scores_like<X, T> && core::scores_like<Y, T> && core::gradient_like<DX, T> &&
      core::gradient_like<DY, T>
          T pairs(X&& x, Y&& y, DX&& d_x, DY&& d_y, const anchor_options<T>& call = {})
  const { return run<true>(x, y, numbers{}, numbers{}, d_x, d_y, call, false); }
  template <class X, class Y, class DX>
  requires core::scores_like<X, T> && core::scores_like<Y, T> && core::gradient_like<DX, T>
      T pairs(X&& x, Y&& y, DX&& d_x, const anchor_options<T>& call = {})
  const { return run<true, false>(x, y, numbers{}, numbers{}, d_x, none_, call, false); }

  template <class X>
  requires core::scores_like<X, T> T views(X&& x, index n, const anchor_options<T>& call = {})
  const {
    const numbers items = items_of(core::as_matrix(x).rows, n);
    return run<false>(x, x, items, items, none_, none_, call, true);
  }
  template <class X, class DX>
  requires core::scores_like<X, T> && core::gradient_like<DX, T>
      T views(X&& x, index n, DX&& d_x, const anchor_options<T>& call = {})
  const {
    const numbers items = items_of(core::as_matrix(x).rows, n);
    return run<true>(x, x, items, items, d_x, none_, call, true);
  }

private:
  const Derived& self() const { return static_cast<const Derived&>(*this); }
  inline static const matrix_view<T> none_{};

  /// Row r has label r, or r modulo a period.
  struct numbers {
    index period = 0;
  };
  numbers items_of(index rows, index n) const {
    core::require(n > 0 && rows % n == 0, Derived::name, "views", n,
                  "a divisor of the number of rows");
    return {rows / n};
  }

  /// Labels as numbers that T holds exactly; equal where the labels are.
  class numbering {
  public:
    void set(const numbers& n, index rows, T* to) {
      for (index r = 0; r < rows; ++r)
        to[r] = static_cast<T>(n.period > 0 ? r % n.period : r);
    }
    template <class L> void set(const L& labels, index rows, T* to) {
      const auto view = core::as_vector(labels);
      for (index r = 0; r < rows; ++r)
        to[r] = static_cast<T>(
            seen_.try_emplace(static_cast<std::int64_t>(view[r]), seen_.size()).first->second);
    }

  private:
    std::unordered_map<std::int64_t, std::size_t> seen_;
  };
  void check_labels(const char*, const numbers&, index) const {}
  template <class L> void check_labels(const char* what, const L& labels, index rows) const {
    const auto view = core::as_vector(labels);
    check(what, view.size, rows);
    check_memory(what, view.data, rows);
  }

  static void check(const std::string& what, index got, index expected) {
    if (got != expected) [[unlikely]]
      core::fail(Derived::name, what, core::to_text(got), core::to_text(expected));
  }
  static void check_memory(const std::string& what, const void* data, index elements) {
    if (!data && elements > 0) [[unlikely]]
      core::fail(Derived::name, what, "null", "a pointer to memory");
  }
  template <bool Gradient, bool Both>
  static void check_shapes(const core::anchor_job<T>& job, const anchor_options<T>& call) {
    check("columns of y", job.y.cols, job.x.cols);
    check_memory("x", job.x.data, job.x.rows * job.x.cols);
    check_memory("y", job.y.data, job.y.rows * job.y.cols);
    core::require(job.y.rows <= index(1) << 24, Derived::name, "rows of y", job.y.rows,
                  "2^24 at the most");
    const auto per_row = [&](const char* what, const auto& v) {
      if (v.data || v.size > 0)
        check(what, v.size, job.x.rows);
    };
    per_row("row_weights", call.row_weights);
    per_row("upstream", call.upstream);
    per_row("values", call.values);
    core::require(call.normaliser >= 0 && std::isfinite(call.normaliser), Derived::name,
                  "normaliser", call.normaliser,
                  "a finite number above 0, or 0 for the reduction's own");
    for (index r = 0; r < call.row_weights.size; ++r)
      if (!(call.row_weights[r] >= T(0)) || !std::isfinite(call.row_weights[r]))
        core::fail_at(Derived::name, "row_weights", r, core::to_text(call.row_weights[r]),
                      "a finite number, not negative");
    if constexpr (Gradient) {
      const auto fits = [](const char* side, const auto& d, const auto& x) {
        check(std::string("rows of the gradient of ") + side, d.rows, x.rows);
        check(std::string("columns of the gradient of ") + side, d.cols, x.cols);
        check_memory(std::string("gradient of ") + side, d.data, x.rows * x.cols);
      };
      fits("x", job.d_x, job.x);
      if (Both && !job.alone)
        fits("y", job.d_y, job.y);
      const core::extent all[] = {core::bytes_of(job.d_x),
                                  !Both || job.alone ? core::extent{0, 0} : core::bytes_of(job.d_y),
                                  core::bytes_of(job.x), core::bytes_of(job.y)};
      core::require_apart(Derived::name, all, 2);
    }
  }

  template <bool Gradient, bool Both = true, class X, class Y, class L, class M, class DX, class DY>
  T run(X& x, Y& y, const L& labels_x, const M& labels_y, DX& d_x, DY& d_y,
        const anchor_options<T>& call, bool alone) const {
    core::anchor_job<T> job;
    job.x = core::matrix_data<T>(core::as_matrix(x));
    job.y = core::matrix_data<T>(core::as_matrix(y));
    job.d_x = core::matrix_data<T, true>(core::as_matrix(d_x));
    job.d_y = core::matrix_data<T, true>(core::as_matrix(d_y));
    job.alone = alone;
    job.normalise = self().settings().normalise;
    job.accumulate = call.accumulate;
    job.filter = call.filter;
    job.weight = {call.row_weights};
    job.upstream = call.upstream;
    job.values = call.values;
    job.scale = call.scale;
    job.normaliser = call.normaliser;
    job.mean = self().settings().reduction == reduction::mean;
    core::anchor_access::set_extra(self(), job);
    check_shapes<Gradient, Both>(job, call);
    check_labels(alone ? "labels" : "labels of x", labels_x, job.x.rows);
    if (!alone)
      check_labels("labels of y", labels_y, job.y.rows);

    workspace own; // of the labels: the kernel's is the call's
    T* const label = reinterpret_cast<T*>(
        own.request(static_cast<std::size_t>(job.x.rows + job.y.rows) * sizeof(T)));
    numbering number;
    number.set(labels_x, job.x.rows, label);
    if (!alone)
      number.set(labels_y, job.y.rows, label + job.x.rows);
    job.label_x = label;
    job.label_y = alone ? label : label + job.x.rows;
    const auto formula = core::anchor_access::formula(self());
    return static_cast<T>(core::run_anchors<T>(core::anchor_function<T>(formula), job, Gradient,
                                               call.run_on, call.memory));
  }
};

} // namespace perdita::inline PERDITA_ABI
