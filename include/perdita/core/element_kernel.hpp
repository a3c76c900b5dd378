// SPDX-License-Identifier: MIT
#pragma once

/// Losses of one prediction and one target, element by element: the traversal, and the call
/// operators of every such loss.
///
/// What differs between losses is a formula, called for some hundred elements or more at a time;
/// all else is compiled once. Where the elements lie side by side, the formula's loop reads
/// predictions and targets, adds the values up in double and writes the gradient (past the caches
/// if it is too large for them), and nothing else happens. What is strided, of another type,
/// weighted or at the end is taken a chunk at a time by way of buffers that stay in cache. Elements
/// keep their lanes either way, so bits do not differ.

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <type_traits>
#include <utility>

#include "errors.hpp"
#include "executor.hpp"
#include "row_formula.hpp"
#include "row_loss.hpp"
#include "views.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// Integers are read as targets, but nothing is computed or stored in them.
template <class M, class T>
concept elements_like = (vector_like<M> || matrix_like<M>)&&(
    storable_as<std::remove_const_t<typename element_of<M>::type>, T> ||
    std::integral<typename element_of<M>::type>);
template <class M, class T>
concept reals_like = elements_like<M, T> && !std::integral<typename element_of<M>::type>;
template <class M, class T>
concept writable_elements_like = reals_like<M, T> && !std::is_const_v<typename element_of<M>::type>;

/// A vector is a matrix of one row.
template <class M> constexpr auto as_elements(M& m) {
  if constexpr (vector_like<M>) {
    const auto v = as_vector(m);
    return matrix_view(v.data, 1, v.size, v.size * v.stride, v.stride);
  } else {
    return as_matrix(m);
  }
}

} // namespace core

/// A vector or a matrix of T in somebody else's memory, or nothing.
template <class T> struct element_view {
  matrix_view<T> elements;

  constexpr element_view() = default;
  template <class M>
  requires((core::vector_like<M> || core::matrix_like<M>)&&std::same_as<
               std::remove_const_t<typename core::element_of<M>::type>, std::remove_const_t<T>> &&
           (std::is_const_v<T> ||
            !std::is_const_v<typename core::element_of<M>::type>)) constexpr element_view(M&& m)
      : elements(core::as_elements(m)) {}
};

/// Everything that changes a call of an element loss but not the mathematics. Views have the
/// predictions' shape.
template <class T> struct element_options {
  /// One factor per element, of value and gradient; counts in the mean's denominator, unless the
  /// loss says otherwise. 0 removes an element.
  element_view<const T> weights{};
  /// ∂(what is minimised)/∂(value of the element): multiplies the gradient of each element only.
  element_view<const T> upstream{};
  /// Multiplies the gradient only: a loss scale, or an upstream gradient common to all elements.
  T scale = 1;
  /// What the mean divides by, instead of its own denominator, where this is not 0.
  double normaliser = 0;
  /// Adds to the gradient buffer instead of overwriting it.
  bool accumulate = false;
  /// Value times weight of each element. No view, no cost.
  element_view<T> values{};

  executor run_on{};
  workspace* memory = nullptr; ///< scratch to reuse; without it a call allocates once
};

/// What an element loss promises of its value as a function of the prediction.
struct element_traits {
  bool convex;
  bool smooth;      ///< differentiable at every finite prediction
  bool nonnegative; ///< never below 0, for targets in the domain
  double lipschitz; ///< least upper bound of |∂ℓ/∂x|; infinite where there is none
};

namespace core {

/// What a formula makes of a pack of predictions and targets: ℓ, ∂ℓ/∂x and ∂²ℓ/∂x².
template <class V> struct element_outcome { V value, slope, curvature; };
/// The same with the derivatives by a second input.
template <class V> struct element_outcome_of_two : element_outcome<V> {
  V second_slope, second_curvature;
};

/// Base of formulas. They have an operator()(x, t), or (x, t, v) with a third input, which makes
/// an element_outcome of packs. Or, in two steps, early(x, t), which makes one pack of what takes
/// long, and late(x, t, early): a processor that looks a hundred operations ahead, and waits for
/// one after the other of a single pack's, finds those of its neighbours within a step.
struct element_formula {
  static constexpr int inputs = 2;
  static constexpr int slopes = 1; ///< 2: element_outcome_of_two
};

/// a with the sign of x; x itself, which is ±0 or NaN, where x has none.
template <class V> PERDITA_INLINE V with_sign_of(const V& x, const V& a) {
  return select(x > V(0), a, select(x < V(0), -a, x));
}
/// a >= 0 with the sign bit of x, whose absolute value is `size`.
template <class V> PERDITA_INLINE V with_sign_bit(const V& a, const V& x, const V& size) {
  return from_bits(as_bits(a) + (as_bits(x) + -as_bits(size)));
}
/// c; NaN where x is.
template <class V> PERDITA_INLINE V unless_nan(const V& x, const V& c) {
  return select(is_nan(x), x, c);
}

/// A piece of a call, side by side: whole packs. Null for what is not wanted.
template <class T> struct element_chunk {
  const T* in[3] = {};
  T* value = nullptr;     ///< where they go apart, instead of into the sum
  T* out[2] = {};         ///< slopes or curvatures
  T factor = 1;           ///< of these
  bool streaming = false; ///< past the caches: `out` is aligned to 64 bytes
  index ahead = 0;        ///< how far ahead inputs are asked for
  index size = 0;
};

template <class Formula, class T>
concept in_two_steps = requires(const Formula& f, const pack<T>& x) {
  f.early(x, x);
}
|| requires(const Formula& f, const pack<T>& x) { f.early(x, x, x); };

/// f(x), f(x, t) or f(x, t, v)
template <int Inputs, class T, class F>
PERDITA_INLINE auto with_inputs(const element_chunk<T>& c, index i, F f) {
  using V = pack<T>;
  const V x = V::load(c.in[0] + i);
  if constexpr (Inputs == 1)
    return f(x);
  else if constexpr (Inputs == 2)
    return f(x, V::load(c.in[1] + i));
  else
    return f(x, V::load(c.in[1] + i), V::load(c.in[2] + i));
}

/// A formula's loop, for slopes or for curvatures, of which the other costs nothing. What else is
/// wanted is asked for every pack, and always answered alike: that takes next to no time, where a
/// loop for each case would take a compiler several times as long.
template <bool SecondOrder, class Formula, class T>
void run_formula(const void* formula, const element_chunk<T>& chunk, wide_lanes<T>& total) {
  using V = pack<T>;
  // Copies: a compiler must take what it stores for a part of anything that it has an address of.
  const Formula f = *static_cast<const Formula*>(formula);
  const element_chunk<T> c = chunk;
  wide_lanes<T> sum = total;
  const V factor(c.factor);
  const auto put = [&](T * to, index i, const V& a) __attribute__((always_inline)) {
    if (to && c.streaming)
      (a * factor).stream(to + i);
    else if (to)
      (a * factor).store(to + i);
  };
  constexpr bool two_steps = in_two_steps<Formula, T>;
  constexpr index width = static_cast<index>(lanes<T>), block = 8 * width;
  alignas(64) T early[block], value[block];
  for (index first = 0; first < c.size; first += block) {
    const index n = std::min(block, c.size - first);
    if constexpr (two_steps)
      for (index k = 0; k < n; k += width)
        with_inputs<Formula::inputs>(
            c, first + k,
            [&](const auto&... x) __attribute__((always_inline)) { return f.early(x...); })
            .store(early + k);
    T* const values = c.value ? c.value + first : value;
    for (index k = 0; k < n; k += width) {
      const index i = first + k;
      if (c.ahead)
        for (int input = 0; input < Formula::inputs; ++input)
          prefetch(c.in[input] + i + c.ahead);
      const auto out = with_inputs<Formula::inputs>(
          c, i, [&](const auto&... x) __attribute__((always_inline)) {
            if constexpr (two_steps)
              return f.late(x..., V::load(early + k));
            else
              return f(x...);
          });
      if (two_steps || c.value)
        out.value.store(values + k);
      else
        sum.add(out.value);
      put(c.out[0], i, SecondOrder ? out.curvature : out.slope);
      if constexpr (Formula::slopes == 2)
        put(c.out[1], i, SecondOrder ? out.second_curvature : out.second_slope);
    }
    if (two_steps && !c.value)
      for (index k = 0; k < n; k += width)
        sum.add(V::load(value + k));
  }
  total = sum;
}

/// Any formula, which is not copied: all of them share one traversal.
template <class T> struct element_function {
  const void* formula;
  int inputs, slopes;
  void (*first_order)(const void*, const element_chunk<T>&, wide_lanes<T>&);
  void (*second_order)(const void*, const element_chunk<T>&, wide_lanes<T>&);

  template <class Formula>
  explicit element_function(const Formula& f)
      : formula(&f), inputs(Formula::inputs), slopes(Formula::slopes),
        first_order(&run_formula<false, Formula, T>), second_order(&run_formula<true, Formula, T>) {
  }
};

template <class I, class T>
void read_integers(const unsigned char* p, index stride, index n, T* out) {
  const I* x = reinterpret_cast<const I*>(p);
  for (index i = 0; i < n; ++i)
    out[i] = static_cast<T>(x[i * stride]);
}

/// An argument of a call. Its elements are numbered row by row.
template <class T, bool Mutable = false> class element_array {
  using pointer = std::conditional_t<Mutable, T*, const T*>;

public:
  element_array() = default;
  template <class S> explicit element_array(const matrix_view<S>& m) {
    if constexpr (std::integral<S>) {
      const auto bytes = reinterpret_cast<const unsigned char*>(m.data);
      at_.data = bytes;
      at_.rows = m.rows;
      at_.cols = m.cols;
      at_.row_stride = m.row_stride;
      at_.col_stride = m.col_stride;
      at_.plane_rows = m.plane_rows;
      at_.plane_stride = m.plane_stride;
      at_.width = sizeof(S);
      at_.reader = &read_integers<std::remove_const_t<S>, T>;
    } else {
      at_ = matrix_data<T, Mutable>(m);
      direct_ = std::same_as<std::remove_const_t<S>, T>;
    }
  }

  explicit operator bool() const { return static_cast<bool>(at_); }
  const matrix_data<T, Mutable>& memory() const { return at_; }
  index rows() const { return at_.rows; }
  index cols() const { return at_.cols; }
  bool is_column_major() const {
    return rows() > 1 && cols() > 1 && std::abs(at_.row_stride) < std::abs(at_.col_stride);
  }
  bool has_planes() const { return at_.plane_rows != at_.rows; }

  void transpose() {
    std::swap(at_.rows, at_.cols);
    std::swap(at_.row_stride, at_.col_stride);
    at_.plane_rows = at_.rows;
  }
  /// One row of all elements, where they are one stride apart.
  void flatten() {
    if (has_planes() || (rows() > 1 && cols() > 1 && at_.row_stride != cols() * at_.col_stride))
      return;
    if (cols() == 1)
      at_.col_stride = at_.row_stride;
    at_.cols *= at_.rows;
    at_.rows = at_.plane_rows = 1;
  }
  /// Every element may be used where it lies.
  bool is_side_by_side() const { return direct_ && rows() == 1 && at_.col_stride == 1; }

  /// Where these elements lie side by side; null if they do not.
  pointer in_place(index first, index n) const {
    const index r = first / cols(), c = first % cols();
    return direct_ && at_.col_stride == 1 && c + n <= cols() ? at_.pointer(r, c) : nullptr;
  }
  void read(index first, index n, T* out) const {
    in_rows(first, n, [&](auto* p, index count, index done) {
      at_.reader(p, at_.col_stride, count, out + done);
    });
  }
  void write(index first, index n, const T* in) const requires Mutable {
    in_rows(first, n, [&](auto* p, index count, index done) {
      at_.writer(p, at_.col_stride, count, in + done);
    });
  }

private:
  /// f(address, count, elements before) for each piece of a row.
  template <class F> void in_rows(index first, index n, F f) const {
    index r = first / cols(), c = first % cols();
    for (index done = 0; done < n; c = 0, ++r) {
      const index count = std::min(n - done, cols() - c);
      f(at_.at(r, c), count, done);
      done += count;
    }
  }

  matrix_data<T, Mutable> at_;
  bool direct_ = false;
};

/// Numbers from here to the next start of a cache line, of 64 bytes.
template <class T> index numbers_before_line(const T* p) {
  const auto beyond = reinterpret_cast<std::uintptr_t>(p) % 64;
  return static_cast<index>((64 - beyond) % 64 / sizeof(T));
}

/// What one call asks of the kernel.
template <class T> struct element_job {
  element_job(const char* loss, const element_function<T>& f) : name(loss), function(f) {}

  const char* name; ///< of the loss
  element_function<T> function;
  element_array<T> in[3];
  element_array<T, true> out[2]; ///< slopes or, for the second order, curvatures
  bool second_order = false;
  element_array<T> weights, upstream;
  element_array<T, true> values;
  bool accumulate = false;
  T factor = 1;
  index size = 0;
  bool fused = false;        ///< the formula's own loop does it all
  bool side_by_side = false; ///< and without buffers
  bool streaming = false;    ///< the slopes go past the caches
  bool on_lines = false;     ///< and start at cache lines

  template <class F> void each_array(F f) {
    for (auto& a : in)
      f(a);
    for (auto& a : out)
      f(a);
    f(weights);
    f(upstream);
    f(values);
  }
  /// Numbers the elements as they lie, and chooses how to go through them.
  void settle() {
    size = in[0].rows() * in[0].cols();
    bool planes = false;
    each_array([&](auto& a) { planes |= a && a.has_planes(); });
    const bool transposed = in[0].is_column_major() && !planes;
    int outputs = 0;
    for (const auto& a : out)
      outputs += static_cast<bool>(a);
    fused = (outputs == 0 || outputs == function.slopes) && !second_order && !accumulate &&
            !weights && !upstream && !values;
    side_by_side = true;
    each_array([&](auto& a) {
      if (!a)
        return;
      if (transposed)
        a.transpose();
      a.flatten();
      side_by_side &= a.is_side_by_side();
    });
    streaming = fused && side_by_side && outputs > 0 && !is_in_place() &&
                exceeds_caches(size * static_cast<index>(sizeof(T)));
    on_lines = true;
    for (const auto& a : out)
      on_lines &= !a || numbers_before_line(a.memory().data) == 0;
  }

private:
  /// check_overlap() has seen to it that what does not start alike is apart.
  bool is_in_place() const {
    for (const auto& a : in)
      for (const auto& b : out)
        if (a && b && static_cast<const void*>(a.memory().data) == b.memory().data)
          return true;
    return false;
  }
};

/// Sends numbers, by way of a buffer, past the caches to where they lie, whole lines at a time.
template <class T> class line_writer {
  using V = pack<T>;
  static constexpr index width = static_cast<index>(lanes<T>);

public:
  static index buffer_size(index most) { return most + width; }
  line_writer() = default;
  line_writer(T* to, T* buffer) : to_(to), buffer_(buffer) {}

  /// Where the next numbers go.
  T* buffer() const { return buffer_ + kept_; }
  /// Takes n numbers from there.
  void write(index n) {
    index at = std::min(kept_ + n, numbers_before_line(to_));
    std::copy_n(buffer_, at, to_);
    const index end = kept_ + n;
    for (; at + width <= end; at += width)
      V::load(buffer_ + at).stream(to_ + at);
    kept_ = end - at;
    std::copy_n(buffer_ + at, kept_, buffer_);
    to_ += at;
  }
  void finish() { std::copy_n(buffer_, kept_, to_); }

private:
  T *to_ = nullptr, *buffer_ = nullptr;
  index kept_ = 0; ///< numbers in the buffer, fewer than a line
};

/// Runs a job by blocks of chunks, which are the rows that run_blocks() shares out.
template <class T> class element_kernel {
  using V = pack<T>;
  static constexpr index width = static_cast<index>(lanes<T>);

public:
  static constexpr index chunk = 512;
  static constexpr index ahead = 1024;
  static index rows_per_sum(const row_job<T>&) { return 64; }
  static index rows_per_task(const row_job<T>&, std::size_t) { return 64; }

  element_kernel(const element_job<T>& job, const row_job<T>&, std::byte* scratch) : job_(job) {
    carver memory(scratch);
    const auto take = [&] { return memory.take<T>(static_cast<std::size_t>(chunk)); };
    for (T*& p : in_)
      p = take();
    for (T*& p : out_)
      p = memory.take<T>(static_cast<std::size_t>(line_writer<T>::buffer_size(chunk)));
    value_ = take();
    weight_ = take();
    upstream_ = take();
    before_ = take();
    scratch_bytes_ = memory.used();
  }
  static std::size_t scratch_bytes(const element_job<T>& job, const row_job<T>& blocks) {
    return element_kernel(job, blocks, nullptr).scratch_bytes_;
  }

  void run(index first_chunk, index last_chunk, value_sum* total) {
    const index last = std::min(last_chunk * chunk, job_.size);
    sum_.clear();
    for (index at = first_chunk * chunk; at < last;) {
      const index left = last - at, most = job_.fused && job_.side_by_side ? left : chunk;
      const index n = std::min(left, most), whole = job_.fused ? n / width * width : 0;
      if (whole > 0 && job_.streaming && !job_.on_lines)
        run_by_lines(at, whole);
      else if (whole > 0)
        run_fused(at, whole);
      if (whole < n)
        run_parts(at + whole, n - whole);
      at += n;
    }
    for (int p = 0; p < wide_lanes<T>::parts; ++p)
      total->add(sum_.folded(p));
  }
  void drain() {
    if (job_.streaming)
      stream_fence();
  }

private:
  void evaluate(const element_chunk<T>& c) {
    const auto& f = job_.function;
    (job_.second_order ? f.second_order : f.first_order)(f.formula, c, sum_);
  }

  element_chunk<T> gather(index first, index n) const {
    element_chunk<T> c;
    c.factor = job_.factor;
    c.size = (n + width - 1) / width * width;
    for (int k = 0; k < job_.function.inputs; ++k)
      c.in[k] = look(job_.in[k], first, n, in_[k]);
    return c;
  }

  void run_fused(index first, index n) {
    element_chunk<T> c = gather(first, n);
    c.streaming = job_.streaming;
    c.ahead = job_.streaming ? ahead : 0;
    const int outputs = job_.out[0] ? job_.function.slopes : 0;
    for (int k = 0; k < outputs; ++k)
      c.out[k] = place(job_.out[k], first, n, out_[k]);
    evaluate(c);
    for (int k = 0; k < outputs; ++k)
      if (c.out[k] == out_[k])
        job_.out[k].write(first, n, out_[k]);
  }

  /// Slopes that are to be streamed and do not start at lines are made in buffers.
  void run_by_lines(index first, index n) {
    const int outputs = job_.function.slopes;
    line_writer<T> lines[2];
    for (int k = 0; k < outputs; ++k)
      lines[k] = line_writer<T>(job_.out[k].in_place(first, n), out_[k]);
    for (index at = 0; at < n; at += chunk) {
      element_chunk<T> c = gather(first + at, std::min(chunk, n - at));
      c.ahead = ahead;
      for (int k = 0; k < outputs; ++k)
        c.out[k] = lines[k].buffer();
      evaluate(c);
      for (int k = 0; k < outputs; ++k)
        lines[k].write(c.size);
    }
    for (int k = 0; k < outputs; ++k)
      lines[k].finish();
  }

  void run_parts(index first, index n) {
    element_chunk<T> c = gather(first, n);
    c.value = value_;
    for (int k = 0; k < 2; ++k)
      c.out[k] = job_.out[k] ? out_[k] : nullptr;
    evaluate(c);
    const T* const weight = look(job_.weights, first, n, weight_);
    add_values(weight, first, n);
    const T* const upstream = look(job_.upstream, first, n, upstream_);
    for (int k = 0; k < 2; ++k)
      if (job_.out[k])
        emit(out_[k], weight, upstream, job_.out[k], first, n);
  }

  /// Elements to be read: where they lie, or in `buffer`; null if there are none.
  template <bool M>
  const T* look(const element_array<T, M>& a, index first, index n, T* buffer) const {
    if (!a)
      return nullptr;
    const T* const p = n % width == 0 ? a.in_place(first, n) : nullptr;
    if (p)
      return p;
    a.read(first, n, buffer);
    std::fill(buffer + n, buffer + (n + width - 1) / width * width, T(1));
    return buffer;
  }
  /// Where whole packs may be written: there, or to `buffer`, which is then to be copied.
  T* place(const element_array<T, true>& a, index first, index n, T* buffer) const {
    T* const p = n % width == 0 ? a.in_place(first, n) : nullptr;
    return p ? p : buffer;
  }

  void add_values(const T* weight, index first, index n) {
    for (index i = 0; i < n; i += width) {
      V v = V::load(value_ + i);
      if (weight)
        v = weighted(V::load(weight + i), v);
      v.store(value_ + i);
      sum_.add(n - i < width ? load_first(value_ + i, n - i, V(0)) : v);
    }
    if (job_.values)
      job_.values.write(first, n, value_);
  }

  /// A factor of 0 takes all, also what is not finite.
  void emit(const T* slope, const T* weight, const T* upstream, const element_array<T, true>& out,
            index first, index n) {
    const T* const before = job_.accumulate ? look(out, first, n, before_) : nullptr;
    T* const to = place(out, first, n, before_);
    for (index i = 0; i < n; i += width) {
      V s = V::load(slope + i);
      if (weight)
        s = weighted(V::load(weight + i), s);
      if (upstream)
        s = weighted(V::load(upstream + i), s);
      if (before)
        s += V::load(before + i);
      s.store(to + i);
    }
    if (to == before_)
      out.write(first, n, to);
  }

  const element_job<T>& job_;
  std::size_t scratch_bytes_ = 0;
  T *in_[3], *out_[2], *value_, *weight_, *upstream_, *before_;
  wide_lanes<T> sum_;
};

/// Σ of the weighted values of all elements; gradients and by-products on the way.
template <class T>
double run_elements(element_job<T>& job, const executor& run_on, workspace* memory) {
  job.settle();
  if (job.size == 0)
    return 0;
  row_job<T> blocks;
  blocks.scores.rows = (job.size + element_kernel<T>::chunk - 1) / element_kernel<T>::chunk;
  return run_blocks<element_kernel<T>>(job, blocks, run_on, memory);
}

/// Σ x
struct element_total : element_formula {
  static constexpr int inputs = 1;
  template <class V> PERDITA_INLINE element_outcome<V> operator()(const V& x) const {
    return {x, V(1), V(0)};
  }
};

/// That an argument has the predictions' shape, and memory.
template <class T, bool M>
void check_array(const element_job<T>& job, const char* what, const element_array<T, M>& a) {
  const auto shape = [](index rows, index cols) { return to_text(rows) + " x " + to_text(cols); };
  const index rows = job.in[0].rows(), cols = job.in[0].cols();
  if (a.rows() != rows || a.cols() != cols) [[unlikely]]
    fail(job.name, std::string("shape of ") + what, shape(a.rows(), a.cols()),
         shape(rows, cols) + ", the predictions' own (a vector is one row)");
  if (!a && rows * cols > 0) [[unlikely]]
    fail(job.name, what, "null", "a pointer to memory");
}

template <class T, class S>
void set_input(element_job<T>& job, int k, const char* what, const matrix_view<S>& m) {
  job.in[k] = element_array<T>(m);
  check_array(job, what, job.in[k]);
}
template <class T, class S>
void set_output(element_job<T>& job, int k, const char* what, const matrix_view<S>& m) {
  job.out[k] = element_array<T, true>(m);
  check_array(job, what, job.out[k]);
}

template <class T, class X, class Y>
element_job<T> make_element_job(const char* loss, const element_function<T>& function,
                                const matrix_view<X>& predictions, const matrix_view<Y>& targets) {
  element_job<T> job(loss, function);
  set_input(job, 0, "predictions", predictions);
  set_input(job, 1, "targets", targets);
  return job;
}

/// What is written lies apart from what is read or, unless `apart`, is the very same elements.
template <class T, bool M>
void check_overlap(const element_job<T>& job, const char* what, const element_array<T, true>& mine,
                   const char* other, const element_array<T, M>& theirs, bool apart) {
  if (!mine || !theirs || theirs.rows() * theirs.cols() == 0)
    return;
  const auto& a = mine.memory();
  const auto& b = theirs.memory();
  const bool same = static_cast<const void*>(a.data) == b.data && a.reader == b.reader &&
                    a.row_stride == b.row_stride && a.col_stride == b.col_stride &&
                    a.plane_rows == b.plane_rows && a.plane_stride == b.plane_stride;
  const extent x = bytes_of(a), y = bytes_of(b);
  if (x.begin < y.end && y.begin < x.end && (apart || !same))
    fail(std::string("perdita::") + job.name + ": " + what + " overlaps " + other +
         ", expected memory apart" +
         (apart ? "" : ", or the very same elements without accumulate"));
}

/// Takes over what the call brings, and checks it.
template <class T> void set_options(element_job<T>& job, const element_options<T>& call) {
  const auto optional = [&](const char* what, auto& a, const auto& view) {
    if (!view.elements.data && view.elements.rows * view.elements.cols == 0)
      return;
    a = std::remove_reference_t<decltype(a)>(view.elements);
    check_array(job, what, a);
  };
  optional("weights", job.weights, call.weights);
  optional("upstream", job.upstream, call.upstream);
  optional("values", job.values, call.values);
  require(call.normaliser >= 0 && std::isfinite(call.normaliser), job.name, "normaliser",
          call.normaliser, "a finite number above 0, or 0 for the reduction's own");
  job.accumulate = call.accumulate;

  constexpr const char* inputs[] = {"the predictions", "the targets", "the third input"};
  constexpr const char* outputs[] = {"the gradient", "the second gradient"};
  for (int k = 0; k < 2; ++k) {
    if (!job.out[k])
      continue;
    for (int i = 0; i < 3; ++i)
      check_overlap(job, outputs[k], job.out[k], inputs[i], job.in[i], call.accumulate);
    check_overlap(job, outputs[k], job.out[k], "the weights", job.weights, true);
    check_overlap(job, outputs[k], job.out[k], "upstream", job.upstream, true);
    check_overlap(job, outputs[k], job.out[k], "the values", job.values, true);
  }
  check_overlap(job, outputs[1], job.out[1], outputs[0], job.out[0], true);
  for (int i = 0; i < 3; ++i)
    check_overlap(job, "the view of values", job.values, inputs[i], job.in[i], true);
  check_overlap(job, "the view of values", job.values, "the weights", job.weights, true);
  check_overlap(job, "the view of values", job.values, "upstream", job.upstream, true);
}

/// The reduced value; what the job has outputs for on the way.
template <class T>
T reduce_elements(element_job<T>& job, const element_options<T>& call, reduction how,
                  bool mean_counts_elements) {
  set_options(job, call);
  double share = 1;
  if (how == reduction::mean) {
    double denominator = call.normaliser;
    if (denominator == 0 && job.weights && !mean_counts_elements) {
      const element_total total;
      element_job<T> sum(job.name, element_function<T>(total));
      sum.in[0] = job.weights;
      denominator = run_elements(sum, call.run_on, call.memory);
    } else if (denominator == 0) {
      denominator = static_cast<double>(job.in[0].rows() * job.in[0].cols());
    }
    share = denominator != 0 ? 1 / denominator : 0;
  }
  job.factor = static_cast<T>(static_cast<double>(call.scale) * share);
  const double total = run_elements(job, call.run_on, call.memory);
  return static_cast<T>(share == 0 ? 0 : total * share);
}

/// Opens a loss to its base.
struct element_access {
  /// f(formula): the one that formula() returns, or whichever visit(f) chooses.
  template <class Loss, class F> static auto visit(const Loss& loss, F f) {
    if constexpr (requires { loss.visit(f); })
      return loss.visit(f);
    else
      return f(loss.formula());
  }
  template <class Loss, class T> static void add_inputs(const Loss& loss, element_job<T>& job) {
    if constexpr (requires { loss.add_inputs(job); })
      loss.add_inputs(job);
  }
  template <class Loss> static auto function(const Loss& loss) { return loss.function(); }
};

} // namespace core

/// Base of every loss of a prediction and a target, element by element. Derived declares
///
///   name           for messages
///   settings()     options, among them reduction
///   formula()      the mathematics, a core::element_formula; open to core::element_access
///
/// and, where there is more than one formula, visit(f) instead, which calls f(formula); where one
/// has three inputs, add_inputs(job), which sets the third; and where the mean divides by the
/// number of elements whatever their weights, mean_counts_elements = true.
///
/// Predictions, targets and gradient are vectors or matrices of one shape, in any layout, of T (or
/// 16-bit storage where T is float); targets may also be integers.
template <class Derived, class T> class element_loss {
public:
  using value_type = T;
  static constexpr bool mean_counts_elements = false;

  /// The reduced value.
  template <class X, class Y>
  requires core::reals_like<X, T> && core::elements_like<Y, T>
      T operator()(X&& predictions, Y&& targets, const element_options<T>& call = {}) const {
    return first_order(predictions, targets, matrix_view<T>(), call, false);
  }

  /// The reduced value, and its gradient with respect to the predictions, written (or added) to
  /// `gradient`: a buffer of its own, or the predictions themselves.
  template <class X, class Y, class G>
  requires core::reals_like<X, T> && core::elements_like<Y, T> && core::writable_elements_like<G, T>
      T operator()(X&& predictions, Y&& targets, G&& gradient,
                   const element_options<T>& call = {}) const {
    return first_order(predictions, targets, core::as_elements(gradient), call, true);
  }

  /// The diagonal of the Hessian, into `result`: ∂²ℓ/∂x² of each element (all others are 0), with
  /// the weights, scales and reduction of the gradient. At a kink, that of one side.
  template <class X, class Y, class G>
  requires core::reals_like<X, T> && core::elements_like<Y, T> && core::writable_elements_like<G, T>
  void hessian_diagonal(X&& predictions, Y&& targets, G&& result,
                        const element_options<T>& call = {}) const {
    core::element_access::visit(self(), [&](const auto& formula) {
      auto job = make_job(formula, predictions, targets);
      job.second_order = true;
      core::set_output(job, 0, "result", core::as_elements(result));
      reduce(job, call);
    });
  }

protected:
  template <class Formula, class X, class Y>
  core::element_job<T> make_job(const Formula& formula, X& predictions, Y& targets) const {
    auto job = core::make_element_job(Derived::name, core::element_function<T>(formula),
                                      core::as_elements(predictions), core::as_elements(targets));
    core::element_access::add_inputs(self(), job);
    return job;
  }
  /// A job refers to its formula, which therefore has to outlive it.
  template <class Formula, class X, class Y>
  core::element_job<T> make_job(const Formula&& formula, X& predictions, Y& targets) const = delete;
  T reduce(core::element_job<T>& job, const element_options<T>& call) const {
    return core::reduce_elements(job, call, self().settings().reduction,
                                 Derived::mean_counts_elements);
  }

private:
  const Derived& self() const { return static_cast<const Derived&>(*this); }

  template <class X, class Y, class S>
  T first_order(X& predictions, Y& targets, const matrix_view<S>& gradient,
                const element_options<T>& call, bool has_gradient) const {
    return core::element_access::visit(self(), [&](const auto& formula) {
      auto job = make_job(formula, predictions, targets);
      if (has_gradient)
        core::set_output(job, 0, "gradient", gradient);
      return reduce(job, call);
    });
  }
};

} // namespace perdita::inline PERDITA_ABI
