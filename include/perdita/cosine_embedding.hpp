// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>

#include "core/row_loss.hpp"
#include "core/traits.hpp"
#include "margin.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// What a pair's label says: 1 alike, -1 not, 0 neither.
template <class L> int read_sign(const void* labels, index at, bool zero_one) {
  const L label = static_cast<const L*>(labels)[at];
  if (label == L(1))
    return 1;
  if (zero_one)
    return label == L(0) ? -1 : 0;
  if constexpr (std::is_signed_v<L>)
    return label == L(-1) ? -1 : 0;
  else
    return 0;
}
struct pair_labels {
  const void* data = nullptr;
  index stride = 1;
  int (*reader)(const void*, index, bool) = nullptr;
  bool zero_one = false;

  int operator[](index r) const { return reader(data, r * stride, zero_one); }
};

template <class T> struct cosine_pairs {
  double margin, epsilon;
  pair_labels labels{};
  matrix_data<T, true> second_gradient{};
};

/// Both gradients of a pair in one go, the first of the job being that of its scores.
template <class T> class cosine_kernel {
  using V = pack<T>;
  using W = pack<double>;
  static constexpr index width = static_cast<index>(lanes<T>);
  static constexpr int parts = wide_lanes<T>::parts;

public:
  static index rows_per_sum(const row_job<T>& job) { return block_rows(job); }
  static index rows_per_task(const row_job<T>& job, std::size_t) { return block_rows(job); }

  cosine_kernel(const cosine_pairs<T>& pairs, const row_job<T>& job, std::byte* scratch)
      : pairs_(pairs), job_(job), cols_(job.scores.cols) {
    carver memory(scratch);
    for (T*& row : stage_)
      row = memory.take<T>(static_cast<std::size_t>(cols_));
    scratch_bytes_ = memory.used();
  }
  static std::size_t scratch_bytes(const cosine_pairs<T>& pairs, const row_job<T>& job) {
    return cosine_kernel(pairs, job, nullptr).scratch_bytes_;
  }

  void run(index first, index last, value_sum* total) {
    for (index r = first; r < last; ++r) {
      if (!job_.counts(r, 0)) {
        store_ignored(job_, r, stage_[0]);
        if (job_.has_gradient() && !job_.accumulate)
          write(pairs_.second_gradient, r, [](index) { return V(0); });
        continue;
      }
      embedding a{look(job_.scores, r, stage_[0])}, b{look(job_.soft, r, stage_[1])};
      const outcome found = find(a, b, pairs_.labels[r]);
      store_value(job_, r, found.value, *total);
      if (job_.has_gradient()) {
        const double scale = job_.row_scale(r);
        emit(job_.gradient, r, found.of_first, scale, a, b);
        emit(pairs_.second_gradient, r, found.of_second, scale, b, a);
      }
    }
  }
  void drain() {}

private:
  struct embedding {
    const T* data;
    double scale = 1; ///< so that no square overflows
  };
  /// The gradient of a row is factor shrink (other − share own), of scaled rows.
  struct direction {
    double factor, share, shrink;
  };
  struct outcome {
    double value;
    direction of_first, of_second;
  };

  /// Settles the rows' scales, too.
  outcome find(embedding& a, embedding& b, int sign) const {
    constexpr double inf = std::numeric_limits<double>::infinity();
    const auto measure = [&] {
      return sum<3>(a, b, [](const W& x, const W& y, W* s) {
        s[0] = fma(x, x, s[0]);
        s[1] = fma(y, y, s[1]);
        s[2] = fma(x, y, s[2]);
      });
    };
    auto sums = measure();
    if (!(sums[0] < inf && sums[1] < inf)) { // numbers too large, if they are numbers
      a.scale = sums[0] < inf ? 1 : 0x1p-600;
      b.scale = sums[1] < inf ? 1 : 0x1p-600;
      sums = measure();
    }
    const double aa = sums[0], bb = sums[1], ab = sums[2];
    const double of_a = pairs_.epsilon * a.scale * a.scale,
                 of_b = pairs_.epsilon * b.scale * b.scale;
    const double square_a = aa + of_a, square_b = bb + of_b;
    const double norm_a = std::sqrt(square_a), norm_b = std::sqrt(square_b),
                 cosine = ab / (norm_a * norm_b);
    if (!(aa < inf && bb < inf)) {
      constexpr double nan = std::numeric_limits<double>::quiet_NaN();
      return {nan, {nan, nan, nan}, {nan, nan, nan}};
    }
    const auto slopes = [&](double value, double factor) {
      return outcome{value,
                     {factor * a.scale / norm_a, ab / square_a, 1 / norm_b},
                     {factor * b.scale / norm_b, ab / square_b, 1 / norm_a}};
    };
    if (sign < 0) {
      const double excess = cosine - pairs_.margin;
      return excess > 0 ? slopes(excess, 1) : slopes(0, 0);
    }
    if (cosine <= 0.5)
      return slopes(1 - cosine, -1);
    // (1 − c)(1 + c) from what of b is not along a: 1 − c would lose its digits.
    const double across = sum<1>(a, b, [along = W(ab / aa)](const W& x, const W& y, W* s) {
      const W rest = less_product(y, along, x);
      s[0] = fma(rest, rest, s[0]);
    })[0];
    const double share = aa / square_a;
    const double apart = share * (across / square_b) + of_a / square_a + share * (of_b / square_b);
    return slopes(apart / (1 + cosine), -1);
  }

  /// y − a x, rounded once, also where there is no fused multiply-add (Dekker 1971).
  static W less_product(const W& y, const W& a, const W& x) {
    if constexpr (fused)
      return fnma(a, x, y);
    const auto upper = [](const W& v) {
      const W many = v * W(0x1p27 + 1);
      return many - (many - v);
    };
    const W a_high = upper(a), a_low = a - a_high, x_high = upper(x), x_low = x - x_high;
    const W product = a * x;
    const W lost = ((a_high * x_high - product) + a_high * x_low + a_low * x_high) + a_low * x_low;
    return (y - product) - lost;
  }

  /// Sums of N terms, which f(a, b, sums) adds up.
  template <int N, class F>
  std::array<double, N> sum(const embedding& a, const embedding& b, F f) const {
    wide_lanes<double> total[N]; // of short sums
    for (auto& t : total)
      t.clear();
    const W scale_a(a.scale), scale_b(b.scale);
    for (index done = 0; done < cols_; done += chunk_columns) {
      const index end = std::min(cols_, done + chunk_columns);
      W lane[N];
      for (W& l : lane)
        l = W(0);
      for (index i = done; i < end; i += width) {
        W x[parts], y[parts];
        widen(first(a.data + i, cols_ - i), x);
        widen(first(b.data + i, cols_ - i), y);
        for (int p = 0; p < parts; ++p)
          f(x[p] * scale_a, y[p] * scale_b, lane);
      }
      for (int k = 0; k < N; ++k)
        total[k].add(lane[k]);
    }
    std::array<double, N> result;
    for (int k = 0; k < N; ++k)
      result[static_cast<std::size_t>(k)] = total[k].total();
    return result;
  }

  void emit(const matrix_data<T, true>& to, index r, const direction& s, double scale,
            const embedding& own, const embedding& other) {
    const W factor(s.factor * scale), share(s.share * own.scale), shrink(s.shrink),
        scale_other(other.scale);
    write(to, r, [&](index i) {
      W x[parts], y[parts];
      widen(first(own.data + i, cols_ - i), x);
      widen(first(other.data + i, cols_ - i), y);
      for (int p = 0; p < parts; ++p)
        x[p] = factor * (shrink * fnma(share, x[p], y[p] * scale_other));
      return narrow(x);
    });
  }
  /// A row of the gradient, or what is added to it, from f(first column of a pack).
  template <class F> void write(const matrix_data<T, true>& to, index r, F f) {
    T *const out = stage_[2], *const before = stage_[3];
    if (job_.accumulate)
      to.reader(to.at(r, 0), to.col_stride, cols_, before);
    for (index i = 0; i < cols_; i += width) {
      V slope = f(i);
      if (job_.accumulate)
        slope += first(before + i, cols_ - i);
      if (i + width <= cols_)
        slope.store(out + i);
      else
        store_first(slope, out + i, cols_ - i);
    }
    to.write(r, 0, cols_, out);
  }
  const T* look(const matrix_data<T>& from, index r, T* stage) const {
    if (from.direct() && from.col_stride == 1)
      return from.pointer(r, 0);
    from.read(r, 0, cols_, stage);
    return stage;
  }
  static V first(const T* p, index n) { return n >= width ? V::load(p) : load_first(p, n, V(0)); }

  const cosine_pairs<T>& pairs_;
  const row_job<T>& job_;
  index cols_;
  std::size_t scratch_bytes_ = 0;
  T* stage_[4] = {};
};

} // namespace core

/// Cosine embedding loss, as PyTorch's cosine_embedding_loss, of pairs of embeddings a and b that
/// are alike (y = 1) or not (y = −1), with the margin m:
///
///   c = ⟨a, b⟩/q,  q = √((‖a‖² + ε)(‖b‖² + ε)),  ∂c/∂a = (b − ⟨a, b⟩ a/(‖a‖² + ε))/q
///   y = 1:   ℓ = 1 − c,            ∂ℓ/∂a = −∂c/∂a
///   y = −1:  ℓ = max(0, c − m),    ∂ℓ/∂a = ∂c/∂a for c > m, else 0 (at the kink too)
///
/// and so for b. Shapes: both matrices and both gradients are pairs × features, of T (or 16-bit
/// storage where T is float); one label per pair, of T or any integral type, 1 or −1 (0, with
/// binary_labels::zero_one). All else throws; PyTorch takes other labels for pairs without a loss
/// (here: row weight 0), and has the slope of the other side at the kink.
///
/// ε > 0 keeps zero vectors from being divided by: their cosine is 0 (ℓ = 1, or max(0, −m)), and
/// their gradient ∓b/√(ε (‖b‖² + ε)), 10⁶ long with PyTorch's ε = 10⁻¹²; where both are 0, so are
/// the gradients. 1 − c keeps its digits where a and b are almost parallel, and nothing overflows
/// unless ‖a‖ does. NaN or an infinity makes its pair NaN.
///
/// Both gradients are made in one pass; they lie apart from each other and from the embeddings.
/// Reductions, row weights, call options, errors: as cross_entropy, a pair being a row. No
/// by-products but `values`. Sums are in double, and no bit depends on the number of threads.
/// Source: PyTorch's CosineEmbeddingLoss; the idea: Bromley, Guyon, LeCun, Säckinger, Shah,
/// "Signature verification using a Siamese time delay neural network", NIPS 1993.
///
///   perdita::cosine_embedding<float> loss({.margin = 0.2f});
///   float value = loss(a, b, labels, d_a, d_b);
template <class T = float> class cosine_embedding : public row_loss<cosine_embedding<T>, T> {
public:
  struct options {
    T margin = 0;           ///< m, finite; −1 to 1 makes sense
    double epsilon = 1e-12; ///< ε > 0, added to the squares of both norms
    binary_labels labels = binary_labels::signed_one; ///< how labels are written
    perdita::reduction reduction = perdita::reduction::mean;
    std::int64_t ignore_index = -100; ///< without effect: there are no classes
  };
  static constexpr const char* name = "cosine_embedding";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = false;
  static constexpr loss_traits traits{.convex = false,
                                      .smooth = false,
                                      .exact_gradient = true,
                                      .nonnegative = true,
                                      .shift_invariant = false};

  cosine_embedding() : cosine_embedding(options{}) {}
  explicit(false) cosine_embedding(const options& o) : options_(o) {
    core::finite(name, "margin", o.margin);
    core::positive(name, "epsilon", o.epsilon);
    core::require_labels(name, o.labels);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  /// The reduced value.
  template <class A, class B, core::vector_like Y>
  requires core::scores_like<A, T> && core::scores_like<B, T>
      T operator()(A&& a, B&& b, Y&& labels, const call_options<T>& call = {}) const {
    const matrix_view<T> none;
    return run(core::as_matrix(a), core::as_matrix(b), core::as_vector(labels), none, none, call);
  }
  /// The reduced value, and the gradients with respect to both embeddings.
  template <class A, class B, core::vector_like Y, class G, class H>
  requires core::scores_like<A, T> && core::scores_like<B, T> && core::gradient_like<G, T> &&
      core::gradient_like<H, T>
          T operator()(A&& a, B&& b, Y&& labels, G&& a_gradient, H&& b_gradient,
                       const call_options<T>& call = {}) const {
    const auto first = core::as_matrix(a);
    const auto second = core::as_matrix(b);
    const auto to_first = core::as_matrix(a_gradient);
    const auto to_second = core::as_matrix(b_gradient);
    this->check_pair(first, second, to_first, to_second, "rows of the first gradient",
                     "columns of the first gradient", "first gradient");
    this->check_size("rows of the second gradient", to_second.rows, first.rows);
    this->check_size("columns of the second gradient", to_second.cols, first.cols);
    this->require_memory("second gradient", to_second.data, to_second.rows * to_second.cols);
    return run(first, second, core::as_vector(labels), to_first, to_second, call);
  }

private:
  friend row_loss<cosine_embedding<T>, T>;
  template <class F> void visit(const core::row_job<T>&, F f) const {
    f(core::cosine_pairs<T>{static_cast<double>(options_.margin), options_.epsilon});
  }

  template <class A, class B, class L, class G, class H>
  T run(const matrix_view<A>& first, const matrix_view<B>& second, const vector_view<L>& labels,
        const matrix_view<G>& to_first, const matrix_view<H>& to_second,
        const call_options<T>& call) const {
    auto job = this->paired_job(first, second, to_first, "the second embeddings");
    this->require_memory("first embeddings", first.data, first.rows * first.cols);
    const core::pair_labels read = read_labels(labels, first.rows);
    return this->drive(job, call, [&](core::cosine_pairs<T> pairs) {
      pairs.labels = read;
      pairs.second_gradient = core::matrix_data<T, true>(to_second);
      return first.rows == 0
                 ? 0.0
                 : core::run_blocks<core::cosine_kernel<T>>(pairs, job, call.run_on, call.memory);
    });
  }
  template <class L> core::pair_labels read_labels(const vector_view<L>& labels, index rows) const {
    static_assert(std::is_arithmetic_v<L>, "the labels must be numbers");
    this->check_size("labels", labels.size, rows);
    this->require_memory("labels", labels.data, rows);
    const bool zero_one = options_.labels == binary_labels::zero_one;
    const core::pair_labels read{labels.data, labels.stride,
                                 &core::read_sign<std::remove_const_t<L>>, zero_one};
    for (index r = 0; r < rows; ++r)
      if (read[r] == 0)
        core::fail_at(name, "labels", r, core::to_text(labels[r]), zero_one ? "0 or 1" : "1 or -1");
    return read;
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
