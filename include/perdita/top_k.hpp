// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <concepts>
#include <functional>
#include <limits>
#include <type_traits>
#include <utility>

#include "core/errors.hpp"
#include "core/executor.hpp"
#include "core/row_loss.hpp"
#include "core/workspace.hpp"
#include "softmax.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

template <class T> struct ranked_score {
  T value;
  index at;

  /// NaN before all numbers, larger before smaller ones, and of equals the earlier one.
  bool operator<(const ranked_score& other) const {
    const bool nan = value != value, other_nan = other.value != other.value;
    if (nan != other_nan)
      return nan;
    return value == other.value || nan ? at < other.at : value > other.value;
  }
};

/// The k largest scores of a row, with no sorting but of the result. A row is cut into blocks,
/// whose largest scores are found first: the k-th of those has at least k scores from it on, so
/// that only blocks with a larger one are looked into, and only scores from it on are kept.
/// Whenever k too many have come together, the best k of them are selected, and only what is above
/// the k-th is of interest from there on.
template <class T> class top_selection {
  using V = pack<T>;
  static constexpr index width = static_cast<index>(lanes<T>);
  static constexpr index streams = 4;
  static constexpr T inf = std::numeric_limits<T>::infinity();

public:
  using entry = ranked_score<T>;

  /// 1 ≤ k ≤ n
  top_selection(index n, index k, carver& memory) : n_(n), k_(k) {
    const index wanted = std::max<index>(64, 4 * k), least = streams * width;
    block_ = std::max<index>(1, n / (least * wanted)) * least;
    blocks_ = (n + block_ - 1) / block_;
    kept_ = memory.take<entry>(static_cast<std::size_t>(2 * k + width));
    most_ = memory.take<T>(static_cast<std::size_t>(blocks_));
    ranked_ = memory.take<T>(static_cast<std::size_t>(blocks_));
  }
  /// The k best, best first.
  const entry* operator()(const T* x) {
    count_ = 0;
    for (index b = 0; b < blocks_; ++b)
      most_[b] = largest(x, b * block_, std::min(n_, (b + 1) * block_));
    edge_ = below_kth_block();
    for (index b = 0; b < blocks_; ++b)
      if (!(most_[b] <= edge_))
        filter(x, b * block_, std::min(n_, (b + 1) * block_));
    keep_best();
    std::sort(kept_, kept_ + k_);
    return kept_;
  }

private:
  static V load(const T* x, index i, index end) {
    return i + width <= end ? V::load(x + i) : load_first(x + i, end - i, V(-inf));
  }
  /// +inf where there is a NaN.
  static T largest(const T* x, index i, index end) {
    V seen[streams];
    for (V& s : seen)
      s = V(-inf);
    const auto see = [&](V& s, const V& z) { s = max(select(is_nan(z), V(inf), z), s); };
    for (; i + streams * width <= end; i += streams * width)
      for (index s = 0; s < streams; ++s)
        see(seen[s], V::load(x + i + s * width));
    for (; i < end; i += width)
      see(seen[0], load(x, i, end));
    return max_lanes(max(max(seen[0], seen[1]), max(seen[2], seen[3])));
  }
  /// A number above which there are at least k scores, or NaN, where that is not known.
  T below_kth_block() const {
    constexpr T nan = std::numeric_limits<T>::quiet_NaN();
    if (blocks_ < k_)
      return nan;
    std::copy_n(most_, blocks_, ranked_);
    std::nth_element(ranked_, ranked_ + (k_ - 1), ranked_ + blocks_, std::greater<>());
    const T kth = ranked_[k_ - 1];
    return kth == -inf ? nan : std::nextafter(kth, -inf);
  }
  /// Keeps what is above the edge, or everything where that is NaN.
  void filter(const T* x, index i, index end) {
    for (; i < end; i += width) {
      if (!any(!(load(x, i, end) <= V(edge_))))
        continue;
      for (index j = i; j < std::min(end, i + width); ++j) {
        kept_[count_] = {x[j], j};
        count_ += !(x[j] <= edge_);
      }
      if (count_ >= 2 * k_)
        keep_best();
    }
  }
  void keep_best() {
    std::nth_element(kept_, kept_ + (k_ - 1), kept_ + count_);
    count_ = k_;
    edge_ = kept_[k_ - 1].value;
  }

  index n_, k_, block_, blocks_, count_ = 0;
  entry* kept_;
  T *most_, *ranked_; ///< the blocks' largest scores, and the same in some other order
  T edge_ = 0;
};

template <class T, class I> struct top_k_job {
  matrix_data<T> scores;
  matrix_data<T, true> values;
  matrix_data<I, true> indices;
  index k;

  bool in_place() const { return scores.direct() && scores.col_stride == 1; }
};

/// One thread's part of the work.
template <class T, class I> class top_k_worker {
public:
  top_k_worker(const top_k_job<T, I>& job, std::byte* scratch)
      : top_k_worker(job, carver(scratch)) {}
  std::size_t scratch_bytes() const { return scratch_bytes_; }

  void operator()(index row) {
    if (!job_.in_place())
      job_.scores.read(row, 0, job_.scores.cols, row_);
    const auto* const found = best_(job_.in_place() ? job_.scores.pointer(row, 0) : row_);
    for (index j = 0; j < job_.k; ++j) {
      values_[j] = found[j].value;
      indices_[j] = static_cast<I>(found[j].at);
    }
    job_.values.write(row, 0, job_.k, values_);
    job_.indices.write(row, 0, job_.k, indices_);
  }

private:
  top_k_worker(const top_k_job<T, I>& job, carver memory)
      : job_(job), best_(job.scores.cols, job.k, memory),
        row_(memory.take<T>(static_cast<std::size_t>(job.in_place() ? 0 : job.scores.cols))),
        values_(memory.take<T>(static_cast<std::size_t>(job.k))),
        indices_(memory.take<I>(static_cast<std::size_t>(job.k))), scratch_bytes_(memory.used()) {}

  const top_k_job<T, I>& job_;
  top_selection<T> best_;
  T *row_, *values_;
  I* indices_;
  std::size_t scratch_bytes_;
};

template <class T, class I>
void run_top_k(const top_k_job<T, I>& job, const executor& run_on, workspace* memory) {
  const std::size_t bytes = top_k_worker<T, I>(job, nullptr).scratch_bytes();
  const auto workers = std::min(static_cast<std::size_t>(job.scores.rows), run_on.concurrency());
  workspace own;
  std::byte* const base = (memory ? *memory : own).request(workers * bytes);
  std::atomic<index> next{0};
  const auto work = [&](std::size_t worker) {
    top_k_worker<T, I> find(job, base + worker * bytes);
    for (index r; (r = next.fetch_add(1, std::memory_order_relaxed)) < job.scores.rows;)
      find(r);
  };
  run_on(workers, work);
}

} // namespace core

/// What top_k() may be told.
struct top_k_options {
  executor run_on{};
  workspace* memory = nullptr; ///< scratch to reuse; without it a call allocates once
};

/// The k largest scores of each row, in descending order, and their classes: `values` and `indices`
/// are rows × k, which is where k comes from. Of equal scores (0 and −0 are equal) the lower class
/// comes first. A NaN comes before every number, the NaN of the lowest class first. −inf is a
/// number like any other. Throws std::invalid_argument on a mismatch of shapes, if k is more than
/// the classes or a class is too large for the type of `indices`, or if the results overlap each
/// other or the scores. Cost: one read of the scores; rows whose scores ascend are the slowest.
template <class X, class Y, class I, class T = core::compute_type<X>>
requires core::scores_like<X, T> && core::gradient_like<Y, T> && core::matrix_like<I> &&
    core::label_type<typename core::element_of<I>::type> &&
    (!std::is_const_v<typename core::element_of<I>::type>)void top_k(
        X&& scores, Y&& values, I&& indices, const top_k_options& options = {}) {
  constexpr const char* name = "top_k";
  const auto x = core::as_matrix(scores);
  const auto found = core::as_matrix(values);
  const auto at = core::as_matrix(indices);
  using place = typename core::element_of<I>::type;
  core::check_same_shape(name, "values", found.rows, found.cols, x.rows, found.cols);
  core::check_same_shape(name, "indices", at.rows, at.cols, x.rows, found.cols);
  core::require(found.cols <= x.cols, name, "columns of values", found.cols,
                "no more than the scores have");
  if (x.rows == 0 || found.cols == 0)
    return;
  for (const void* p : {static_cast<const void*>(x.data), static_cast<const void*>(found.data),
                        static_cast<const void*>(at.data)})
    if (!p)
      core::fail(name, "a matrix", "null", "a pointer to memory");
  core::require(std::in_range<place>(x.cols - 1), name, "columns", x.cols,
                "no more than the type of indices can number");
  const core::top_k_job<T, place> job{x, found, at, found.cols};
  const core::extent memory[] = {core::bytes_of(job.values), core::bytes_of(job.indices),
                                 core::bytes_of(job.scores)};
  core::require_apart(name, memory, 2);
  core::run_top_k(job, options.run_on, options.memory);
}

} // namespace perdita::inline PERDITA_ABI
