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
  /// anchor, whatever it is, but not the candidate.
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

/// The labels of one side of a call: the caller's, or the rows' numbers modulo a period (0: as they
/// are).
struct anchor_labels {
  index period = 0;
  std::int64_t (*reader)(const void*, index) = nullptr; ///< null: the rows' numbers
  const void* data = nullptr;
  index size = 0, stride = 1;

  template <class L> static anchor_labels of(const vector_view<L>& labels) {
    const auto read = [](const void* from, index i) {
      return static_cast<std::int64_t>(static_cast<const L*>(from)[i]);
    };
    return {0, read, labels.data, labels.size, labels.stride};
  }
  std::int64_t operator()(index r) const {
    return reader ? reader(data, r * stride) : period > 0 ? r % period : r;
  }
};

/// One call of any loss of anchors, its checks and its labels: what depends on neither the loss nor
/// the caller's types, so that it is compiled once.
template <class T> struct anchor_request {
  const char* name;
  anchor_job<T> job;
  anchor_labels labels_x, labels_y;
  bool gradient, both; ///< which gradients are wanted: any; that of y, too

  void take(const anchor_options<T>& call) {
    job.accumulate = call.accumulate;
    job.filter = call.filter;
    job.weight = {call.row_weights};
    job.upstream = call.upstream;
    job.values = call.values;
    job.scale = call.scale;
    job.normaliser = call.normaliser;
  }
  void check(const anchor_options<T>& call) const;
  /// After take().
  T run(const anchor_function<T>& formula, const anchor_options<T>& call);

private:
  void require_size(const std::string& what, index got, index expected) const {
    if (got != expected) [[unlikely]]
      fail(name, what, to_text(got), to_text(expected));
  }
  void require_memory(const std::string& what, const void* data, index elements) const {
    if (!data && elements > 0) [[unlikely]]
      fail(name, what, "null", "a pointer to memory");
  }
  template <class V> void check_per_row(const char* what, const V& v) const {
    if (v.data || v.size > 0) {
      require_size(what, v.size, job.x.rows);
      require_memory(what, v.data, job.x.rows);
    }
  }
  void check_gradient(const std::string& side, const matrix_data<T, true>& d,
                      const matrix_data<T>& x) const {
    require_size("rows of the gradient of " + side, d.rows, x.rows);
    require_size("columns of the gradient of " + side, d.cols, x.cols);
    require_memory("gradient of " + side, d.data, x.rows * x.cols);
  }
  void check_labels(const char* what, const anchor_labels& labels, index rows) const {
    if (!labels.reader)
      return;
    require_size(what, labels.size, rows);
    require_memory(what, labels.data, rows);
  }
};

template <class T> void anchor_request<T>::check(const anchor_options<T>& call) const {
  require_size("columns of y", job.y.cols, job.x.cols);
  require_memory("x", job.x.data, job.x.rows * job.x.cols);
  require_memory("y", job.y.data, job.y.rows * job.y.cols);
  require(job.y.rows <= index(1) << 24, name, "rows of y", job.y.rows, "2^24 at the most");
  check_per_row("row_weights", call.row_weights);
  check_per_row("upstream", call.upstream);
  check_per_row("values", call.values);
  require(call.normaliser >= 0 && std::isfinite(call.normaliser), name, "normaliser",
          call.normaliser, "a finite number above 0, or 0 for the reduction's own");
  for (index r = 0; r < call.row_weights.size; ++r)
    if (!(call.row_weights[r] >= T(0)) || !std::isfinite(call.row_weights[r]))
      fail_at(name, "row_weights", r, to_text(call.row_weights[r]),
              "a finite number, not negative");
  if (gradient) {
    const bool of_y = both && !job.alone;
    check_gradient("x", job.d_x, job.x);
    if (of_y)
      check_gradient("y", job.d_y, job.y);
    const extent all[] = {bytes_of(job.d_x), of_y ? bytes_of(job.d_y) : extent{0, 0},
                          bytes_of(job.x), bytes_of(job.y)};
    require_apart(name, all, 2);
  }
  check_labels(job.alone ? "labels" : "labels of x", labels_x, job.x.rows);
  if (!job.alone)
    check_labels("labels of y", labels_y, job.y.rows);
}

template <class T>
T anchor_request<T>::run(const anchor_function<T>& formula, const anchor_options<T>& call) {
  check(call);

  // Labels as numbers that T holds exactly; equal where the labels are.
  workspace own; // of the labels: the kernel's is the call's
  T* const label = reinterpret_cast<T*>(
      own.request(static_cast<std::size_t>(job.x.rows + job.y.rows) * sizeof(T)));
  std::unordered_map<std::int64_t, std::size_t> seen;
  const auto number = [&](const anchor_labels& labels, index rows, T* to) {
    for (index r = 0; r < rows; ++r)
      to[r] = static_cast<T>(labels.reader ? seen.try_emplace(labels(r), seen.size()).first->second
                                           : static_cast<std::size_t>(labels(r)));
  };
  number(labels_x, job.x.rows, label);
  if (!job.alone)
    number(labels_y, job.y.rows, label + job.x.rows);
  job.label_x = label;
  job.label_y = job.alone ? label : label + job.x.rows;
  return static_cast<T>(run_anchors<T>(formula, job, gradient, call.run_on, call.memory));
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
/// Four ways to say who is compared with whom, with the gradients after the inputs, or without:
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
/// makes each anchor that is compared with its row NaN, and no other. Nothing that counts: value 0,
/// gradient 0. Of distances that are not of unit vectors, gradients in float lose digits in
/// proportion to an offset that all points have in common (1 apart and at 100: errors of 4e-6 to
/// 4e-5 of the largest entry; at 1000 of 4e-5 to 3e-4): subtract it.
///
/// Memory: some numbers for each row, rows of comparisons of up to 128 anchors (4.3 MiB and 416
/// bytes for each candidate at most, but no fewer than 16 rows), and 0.4 MiB per thread. Same bits
/// for any number of threads and on every instruction set with FMA. Throws std::invalid_argument.
template <class Derived, class T> class anchor_loss {
public:
  using value_type = T;

  template <class X, core::labels_like L>
  requires core::scores_like<X, T> T operator()(X&& x, L&& labels,
                                                const anchor_options<T>& call = {}) const {
    const auto of = labels_of(labels);
    return run<false>(x, x, of, of, none_, none_, call, true);
  }
  template <class X, core::labels_like L, class DX>
  requires core::scores_like<X, T> && core::gradient_like<DX, T>
      T operator()(X&& x, L&& labels, DX&& d_x, const anchor_options<T>& call = {}) const {
    const auto of = labels_of(labels);
    return run<true>(x, x, of, of, d_x, none_, call, true);
  }

  template <class X, class Y, core::labels_like L, core::labels_like M>
  requires core::scores_like<X, T> && core::scores_like<Y, T> T
  operator()(X&& x, Y&& y, L&& labels_x, M&& labels_y, const anchor_options<T>& call = {}) const {
    return run<false>(x, y, labels_of(labels_x), labels_of(labels_y), none_, none_, call, false);
  }
  template <class X, class Y, core::labels_like L, core::labels_like M, class DX, class DY>
  requires core::scores_like<X, T> && core::scores_like<Y, T> && core::gradient_like<DX, T> &&
      core::gradient_like<DY, T>
          T operator()(X&& x, Y&& y, L&& labels_x, M&& labels_y, DX&& d_x, DY&& d_y,
                       const anchor_options<T>& call = {}) const {
    return run<true>(x, y, labels_of(labels_x), labels_of(labels_y), d_x, d_y, call, false);
  }
  template <class X, class Y, core::labels_like L, core::labels_like M, class DX>
  requires core::scores_like<X, T> && core::scores_like<Y, T> && core::gradient_like<DX, T>
      T operator()(X&& x, Y&& y, L&& labels_x, M&& labels_y, DX&& d_x,
                   const anchor_options<T>& call = {}) const {
    return run<true, false>(x, y, labels_of(labels_x), labels_of(labels_y), d_x, none_, call,
                            false);
  }

  template <class X, class Y>
  requires core::scores_like<X, T> && core::scores_like<Y, T>
      T pairs(X&& x, Y&& y, const anchor_options<T>& call = {})
  const { return run<false>(x, y, row_numbers, row_numbers, none_, none_, call, false); }
  template <class X, class Y, class DX, class DY>
  requires core::scores_like<X, T> && core::scores_like<Y, T> && core::gradient_like<DX, T> &&
      core::gradient_like<DY, T>
          T pairs(X&& x, Y&& y, DX&& d_x, DY&& d_y, const anchor_options<T>& call = {})
  const { return run<true>(x, y, row_numbers, row_numbers, d_x, d_y, call, false); }
  template <class X, class Y, class DX>
  requires core::scores_like<X, T> && core::scores_like<Y, T> && core::gradient_like<DX, T>
      T pairs(X&& x, Y&& y, DX&& d_x, const anchor_options<T>& call = {})
  const { return run<true, false>(x, y, row_numbers, row_numbers, d_x, none_, call, false); }

  template <class X>
  requires core::scores_like<X, T> T views(X&& x, index n, const anchor_options<T>& call = {})
  const {
    const auto items = items_of(core::as_matrix(x).rows, n);
    return run<false>(x, x, items, items, none_, none_, call, true);
  }
  template <class X, class DX>
  requires core::scores_like<X, T> && core::gradient_like<DX, T>
      T views(X&& x, index n, DX&& d_x, const anchor_options<T>& call = {})
  const {
    const auto items = items_of(core::as_matrix(x).rows, n);
    return run<true>(x, x, items, items, d_x, none_, call, true);
  }

private:
  const Derived& self() const { return static_cast<const Derived&>(*this); }
  inline static const matrix_view<T> none_{};

  static constexpr core::anchor_labels row_numbers{};
  template <class L> static core::anchor_labels labels_of(L& labels) {
    return core::anchor_labels::of(core::as_vector(labels));
  }
  static core::anchor_labels items_of(index rows, index n) {
    core::require(n > 0 && rows % n == 0, Derived::name, "views", n,
                  "a divisor of the number of rows");
    return {.period = rows / n};
  }

  template <bool Gradient, bool Both = Gradient, class X, class Y, class DX, class DY>
  T run(X& x, Y& y, const core::anchor_labels& labels_x, const core::anchor_labels& labels_y,
        DX& d_x, DY& d_y, const anchor_options<T>& call, bool alone) const {
    core::anchor_request<T> request{Derived::name, {}, labels_x, labels_y, Gradient, Both};
    auto& job = request.job;
    job.x = core::matrix_data<T>(core::as_matrix(x));
    job.y = core::matrix_data<T>(core::as_matrix(y));
    job.d_x = core::matrix_data<T, true>(core::as_matrix(d_x));
    job.d_y = core::matrix_data<T, true>(core::as_matrix(d_y));
    job.alone = alone;
    return settle_and_run(request, call);
  }
  T settle_and_run(core::anchor_request<T>& request, const anchor_options<T>& call) const {
    const auto& options = self().settings();
    request.take(call);
    request.job.normalise = options.normalise;
    request.job.mean = options.reduction == reduction::mean;
    core::anchor_access::set_extra(self(), request.job);
    const auto formula = core::anchor_access::formula(self());
    return request.run(core::anchor_function<T>(formula), call);
  }
};

} // namespace perdita::inline PERDITA_ABI
