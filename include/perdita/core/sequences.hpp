// SPDX-License-Identifier: MIT
#pragma once

/// What losses of sequences have in common: arithmetic on rows of doubles, and calls.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>

#include "errors.hpp"
#include "executor.hpp"
#include "math.hpp"
#include "row_loss.hpp"
#include "storage.hpp"
#include "views.hpp"
#include "workspace.hpp"

namespace perdita::inline PERDITA_ABI::core {

// --- Rows of doubles, padded to whole packs ------------------------------------------------------

inline constexpr double no_score = -std::numeric_limits<double>::infinity();
inline constexpr auto per_pack = static_cast<index>(lanes<double>);

constexpr index whole_packs(index n) { return (n + per_pack - 1) / per_pack * per_pack; }
inline double log1p_of(double x) { return first_lane(log1p(pack<double>(x))); }
/// a b + c, rounded once wherever the packs are.
inline double fma_of(double a, double b, double c) {
  return first_lane(fma(pack<double>(a), pack<double>(b), pack<double>(c)));
}
inline double log_of(double x) { return first_lane(log(pack<double>(x))); }

inline double largest_of(const double* x, index n) {
  pack<double> top(no_score);
  for (index i = 0; i < n; i += per_pack)
    top = max(pack<double>::load(x + i), top);
  return max_lanes(top);
}
/// out = e^x for x <= 0 up to rounding, and its sum.
inline double images_of(const double* x, index n, double* out) {
  using W = pack<double>;
  W sum(0);
  for (index i = 0; i < n; i += per_pack) {
    const W e = exp_shifted(W::load(x + i));
    e.store(out + i);
    sum += e;
  }
  return sum_lanes(sum);
}
/// x less its maximum, which is returned; where all is masked it stays so, and 0 is.
inline double lower_to_0(double* x, index n) {
  const double top = largest_of(x, n);
  if (top == no_score)
    return 0;
  for (index i = 0; i < n; i += per_pack)
    (pack<double>::load(x + i) - top).store(x + i);
  return top;
}
/// max (a + b)
inline double largest_sum(const double* a, const double* b, index n) {
  using W = pack<double>;
  W top(no_score);
  for (index i = 0; i < n; i += per_pack)
    top = max(W::load(a + i) + W::load(b + i), top);
  return max_lanes(top);
}
/// Σ e^(a + b − top), without what is at `left_out`.
inline double images_of_sum(const double* a, const double* b, double top, index n, index left_out) {
  using W = pack<double>;
  const W out(static_cast<double>(left_out));
  W sum(0);
  for (index i = 0; i < n; i += per_pack) {
    const W e = exp_shifted((W::load(a + i) + W::load(b + i)) - top);
    sum += select(iota<double>() + static_cast<double>(i) == out, W(0), e);
  }
  return sum_lanes(sum);
}
/// log Σ e^(a + b)
inline double log_sum_exp_of(const double* a, const double* b, index n) {
  const double top = largest_sum(a, b, n);
  return top == no_score ? top : top + log_of(images_of_sum(a, b, top, n, -1));
}
/// −log of the share of y in Σ e^(a + b): no digit is lost where y leads. +inf where it is masked.
inline double surprise_of(const double* a, const double* b, index n, index y) {
  const double target = a[y] + b[y];
  if (target == no_score)
    return -no_score;
  const double top = largest_sum(a, b, n);
  if (top == target)
    return log1p_of(images_of_sum(a, b, top, n, y));
  return (top - target) + log_of(images_of_sum(a, b, top, n, -1));
}

/// Cross-entropy of y among n scores, a whole number of packs that are overwritten; slope_j =
/// p_j − [j is y], with the digits of 1 − p_y.
inline double cross_entropy_among(double* scores, index n, index y, double* slope) {
  using W = pack<double>;
  lower_to_0(scores, n);
  images_of(scores, n, slope);
  const double own = slope[y], target = scores[y];
  slope[y] = 0;
  W rivals(0);
  for (index j = 0; j < n; j += per_pack)
    rivals += W::load(slope + j);
  const double rest = sum_lanes(rivals), sum = rest + own, part = sum > 0 ? 1 / sum : 0;
  for (index j = 0; j < n; j += per_pack)
    (W::load(slope + j) * part).store(slope + j);
  slope[y] = sum > 0 ? -(rest * part) : -1;
  if (target == no_score)
    return -no_score;
  return target == 0 ? log1p_of(rest) : log_of(sum) - target;
}

template <index Packs>
void multiply_columns(const double* x, const double* matrix, index rows, index width, double* y) {
  using W = pack<double>;
  W sum[Packs];
  for (W& s : sum)
    s = W(0);
  for (index i = 0; i < rows; ++i) {
    const W factor(x[i]);
    detail::unrolled<Packs>([&](auto p) __attribute__((always_inline)) {
      sum[p] = fma(factor, W::load(matrix + i * width + p * per_pack), sum[p]);
    });
  }
  for (index p = 0; p < Packs; ++p)
    sum[p].store(y + p * per_pack);
}
/// y_j = Σ_i x_i matrix_ij
inline void multiply_rows(const double* x, const double* matrix, index rows, index width,
                          double* y) {
  index j = 0;
  for (; j + 4 * per_pack <= width; j += 4 * per_pack)
    multiply_columns<4>(x, matrix + j, rows, width, y + j);
  for (; j < width; j += per_pack)
    multiply_columns<1>(x, matrix + j, rows, width, y + j);
}

/// Scores are taken for what they are up to this size. Beyond it, so that sums over a sequence do
/// not overflow, the negative are masked and the positive are no number.
inline constexpr double largest_score = 0x1p1000;

/// Settles what scores are; false where one of them is no number.
inline bool settle_scores(double* x, index n) {
  using W = pack<double>;
  auto wrong = W(0) > W(0);
  for (index i = 0; i < n; i += per_pack) {
    const W s = W::load(x + i);
    wrong = wrong | !(s <= W(largest_score));
    select(s < W(-largest_score), W(no_score), s).store(x + i);
  }
  return !any(wrong);
}

/// n numbers, at most a pack of them; -inf in the other lanes.
template <class T> PERDITA_INLINE pack<T> load_part(const T* x, index n) {
  const pack<T> filler(-std::numeric_limits<T>::infinity());
  return n < static_cast<index>(lanes<T>) ? load_first(x, n, filler) : pack<T>::load(x);
}
/// Row r as padded doubles, no_score after the last. `buffer` holds as many T.
template <class T> void read_row(const matrix_data<T>& m, index r, T* buffer, double* out) {
  using W = pack<double>;
  constexpr auto together = static_cast<index>(lanes<T>);
  const T* x = buffer;
  if (m.direct() && m.col_stride == 1)
    x = m.pointer(r, 0);
  else
    m.read(r, 0, m.cols, buffer);
  for (index j = 0; j < m.cols; j += together) {
    const index n = std::min(m.cols - j, together);
    W wide[together / per_pack];
    widen(load_part(x + j, n), wide);
    for (index p = 0; p * per_pack < n; ++p)
      wide[p].store(out + j + p * per_pack);
  }
}
/// Writes or adds x, padded, to row r.
template <class T>
void write_row(const matrix_data<T, true>& m, index r, const double* x, bool accumulate,
               T* buffer) {
  using W = pack<double>;
  constexpr auto together = static_cast<index>(lanes<T>);
  constexpr index parts = together / per_pack;
  const bool in_place = m.direct() && m.col_stride == 1;
  T* const to = in_place ? m.pointer(r, 0) : buffer;
  if (accumulate && !in_place)
    m.read(r, 0, m.cols, buffer);
  for (index j = 0; j < m.cols; j += together) {
    const index n = std::min(m.cols - j, together);
    W wide[parts], before[parts];
    if (accumulate)
      widen(load_part(to + j, n), before);
    for (index p = 0; p < parts; ++p) {
      const W more = p * per_pack < n ? W::load(x + j + p * per_pack) : W(0);
      wide[p] = accumulate ? before[p] + more : more;
    }
    if (n < together)
      store_first(narrow(wide), to + j, n);
    else
      narrow(wide).store(to + j);
  }
  if (!in_place)
    m.write(r, 0, m.cols, buffer);
}

// --- Calls of losses of sequences ----------------------------------------------------------------

/// Rows of integers of any type.
struct integer_rows {
  const void* data = nullptr;
  index rows = 0, cols = 0, row_bytes = 0, col_stride = 1;
  void (*reader)(const void*, index, index, index, std::int64_t*) = nullptr;

  integer_rows() = default;
  template <class I>
  explicit integer_rows(const matrix_view<I>& m)
      : data(m.data), rows(m.rows), cols(m.cols),
        row_bytes(m.row_stride * static_cast<index>(sizeof(I))), col_stride(m.col_stride),
        reader(&read_labels<std::remove_const_t<I>>) {}
  template <class I>
  explicit integer_rows(const vector_view<I>& v)
      : integer_rows(matrix_view<I>(v.data, 1, v.size, 0, v.stride)) {}

  void read(index r, index first, index n, std::int64_t* out) const {
    reader(static_cast<const unsigned char*>(data) + r * row_bytes, col_stride, first, n, out);
  }
  std::int64_t at(index r, index c) const {
    std::int64_t result;
    read(r, c, 1, &result);
    return result;
  }
};

/// That an output is an input itself, element by element, or memory apart from it.
template <class To, class From>
void require_same_or_apart(const char* name, const matrix_view<To>& to,
                           const matrix_view<From>& from) {
  const bool same = static_cast<const void*>(to.data) == static_cast<const void*>(from.data) &&
                    sizeof(To) == sizeof(From) && to.row_stride == from.row_stride &&
                    to.col_stride == from.col_stride && to.plane_rows == from.plane_rows &&
                    to.plane_stride == from.plane_stride;
  const extent memory[] = {bytes_of(to), bytes_of(from)};
  if (!same)
    require_apart(name, memory, 1);
}

template <class M>
concept label_rows = matrix_like<M> && label_type<typename element_of<M>::type>;

/// The checks that losses of sequences have in common, and what follows for the reduction.
template <class T> struct sequence_checks {
  const char* name;

  void size(const char* what, index got, index expected, const char* of) const {
    if (got != expected) [[unlikely]]
      fail(name, what, to_text(got), to_text(expected) + " (" + of + ")");
  }
  void memory(const char* what, const void* data, index elements) const {
    require_memory(name, what, data, elements);
  }
  template <class V>
  void entries(const char* what, const V& view, index expected, const char* of) const {
    size(what, view.size, expected, of);
    memory(what, view.data, expected);
  }
  /// Sets lengths, one for each sequence, of 0 to `most`.
  template <class I>
  void lengths(const char* what, integer_rows& to, vector_view<I> from, index sequences,
               index most) const {
    size(what, from.size, sequences, "as many as there are sequences");
    memory(what, from.data, from.size);
    to = integer_rows(from);
    for (index b = 0; b < sequences; ++b)
      if (const std::int64_t n = to.at(0, b); n < 0 || n > most)
        fail_at(name, what, b, to_text(n),
                most == std::numeric_limits<index>::max() ? "0 or more" : "0 to " + to_text(most));
  }
  /// Gradient against scores: the same elements, or memory apart.
  void gradient(const matrix_data<T>& scores, const matrix_data<T, true>& g,
                bool accumulate) const {
    size("gradient rows", g.rows, scores.rows, "the rows that the scores have");
    size("gradient columns", g.cols, scores.cols, "the columns that the scores have");
    memory("gradient", g.data, g.rows * g.cols);
    row_job<T> job;
    job.scores = scores;
    job.gradient = g;
    if (check_overlap(name, job) && accumulate)
      fail(std::string("perdita::") + name +
           ": accumulate is true, expected false where the gradient overwrites the scores");
  }
  /// All that a call may ask for, one number each of `count` sequences (or tokens).
  void call(const call_options<T>& c, index count, bool takes_log_sum_exp,
            const char* of = "as many as there are sequences") const {
    const auto each = [&](const char* what, const auto& v) {
      if (v.data || v.size > 0) {
        size(what, v.size, count, of);
        memory(what, v.data, v.size);
      }
    };
    each("row_weights", c.row_weights);
    each("upstream", c.upstream);
    each("values", c.values);
    each("log_sum_exp", c.log_sum_exp);
    if (c.target_log_probability.data || c.entropy.data || c.penalty.data || c.hits.data ||
        (c.log_sum_exp.data && !takes_log_sum_exp))
      fail(std::string("perdita::") + name + ": a by-product that it does not have is asked for, " +
           "expected none but values" + (takes_log_sum_exp ? " and log_sum_exp" : ""));
    require(c.normaliser >= 0 && std::isfinite(c.normaliser), name, "normaliser", c.normaliser,
            "a finite number above 0, or 0 for the reduction's own");
  }
  /// That a search, which has no loss, is asked for nothing that belongs to one.
  void search(const call_options<T>& c) const {
    const auto none = [&](const char* what, bool given) {
      if (given)
        fail(name, what, "given", "none: a search has no loss");
    };
    none("row_weights", c.row_weights.data);
    none("upstream", c.upstream.data);
    none("log_sum_exp", c.log_sum_exp.data);
    require(c.normaliser == 0, name, "normaliser", c.normaliser, "0: a search has no loss");
  }
};

/// Weight of a sequence; 0 removes it.
template <class T> double weight_of(const call_options<T>& call, index sequence) {
  return call.row_weights.data ? static_cast<double>(call.row_weights[sequence]) : 1.0;
}
template <class T> double upstream_of(const call_options<T>& call, index sequence) {
  return call.upstream.data ? static_cast<double>(call.upstream[sequence]) : 1.0;
}
/// What sums over the sequences are multiplied by: 1, or 1 over Σ of the weights.
template <class T> double share_of(const call_options<T>& call, reduction kind, index sequences) {
  if (kind != reduction::mean)
    return 1;
  exact_sum weights;
  for (index b = 0; call.normaliser == 0 && b < sequences; ++b)
    weights.add(weight_of(call, b));
  const double denominator = call.normaliser != 0 ? call.normaliser : weights.value();
  return denominator != 0 ? 1 / denominator : 0;
}

/// work(i) for i = 0 … n − 1, each once, where work = make(worker): what is not done yet goes to
/// whoever is free.
template <class Make>
void share_out(index n, std::size_t workers, const executor& run_on, Make make) {
  std::atomic<index> next{0};
  const auto run = [&](std::size_t worker) {
    auto work = make(worker);
    for (index i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;)
      work(i);
  };
  run_on(workers, run);
}

/// Σ of the values of n sequences, added in their order: pass.run(b) of each, where make(carver)
/// gives every worker a pass with its own scratch memory.
template <class T, class Make>
double sum_of_sequences(index n, const call_options<T>& call, Make make) {
  const auto workers = std::min(static_cast<std::size_t>(n), call.run_on.concurrency());
  carver count;
  count.template take<double>(static_cast<std::size_t>(n));
  const std::size_t shared = count.used();
  make(count);
  const std::size_t scratch = count.used() - shared;
  workspace own;
  std::byte* const bytes = (call.memory ? *call.memory : own).request(shared + workers * scratch);
  carver carve(bytes);
  double* const values = carve.template take<double>(static_cast<std::size_t>(n));
  share_out(n, workers, call.run_on, [&](std::size_t worker) {
    carver mine(bytes + shared + worker * scratch);
    return [&, pass = make(mine)](index b) mutable { values[b] = pass.run(b); };
  });
  exact_sum total;
  for (index b = 0; b < n; ++b)
    total.add(values[b]);
  return total.value();
}

} // namespace perdita::inline PERDITA_ABI::core
