// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/row_loss.hpp"
#include "core/solved_row.hpp"
#include "core/traits.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// With g_k = 1/((K−1)(a + p_k)) and r = Σ_{k≠y} p_k g_k:
///   ∂ℓ/∂x_k = p_k (g_k + p_y/(a + p_y) − r),  ∂ℓ/∂x_y = −p_y ((1 − p_y)/(a + p_y) + r)
/// Where p_k is near 1, g_k − r would have no digits: of a rival with more than half, the leader,
/// it is (1 − p_k) g_k less the other rivals' part of r.
template <class T> struct robust_log_formula : solved_formula {
  using statistic = solved_row_of<4>;
  double a;
  double per_rival; // 1/(K − 1)

  template <class V, class C> auto image(const C* c) const {
    return [near = to_lanes<V>(c[0])](const V& x) __attribute__((always_inline)) {
      return exp(x - near);
    };
  }
  template <class V, class C> auto slopes(const C* c) const {
    // With q = p/a, as p/(a + p) = q/(1 + q).
    return [
      share = to_lanes<V>(c[1] / a), even = to_lanes<V>(c[2] * a), of_leader = to_lanes<V>(c[3]),
      each = V(static_cast<T>(per_rival)), leading = V(static_cast<T>(0.625 / a))
    ](const V& image) __attribute__((always_inline)) {
      const V q = image * share;
      // Not from ½, on which solve() and the rounding of q may differ.
      return select(q > leading, of_leader, q * (each / (q + 1) + even));
    };
  }
  summary<statistic, double> solve(const T* x, index n, index y, double*, T* images) const {
    image_sweep<T> sweep(1, images);
    const rival_scores<T> rivals(x, n, y, sweep);
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    if (rivals.lost)
      return {0, {nan, nan, nan, nan, nan, nan}};
    if (rivals.all_masked()) { // p_y = 1, or, with the label masked too, 0
      std::fill_n(images, n, T(0));
      return {0, {x[y] > rivals.top ? 0.0 : std::log1p(1 / a), 0, 0, 0, 0, 0}};
    }
    const double sum = sweep.sum.total(0);
    const auto near = static_cast<double>(rivals.near);
    // Of the rivals and of the label, on the larger one's scale.
    const double lead = static_cast<double>(x[y]) - near, e = std::exp(-std::fabs(lead));
    const double against = lead > 0 ? sum * e : sum, both = against + (lead > 0 ? 1 : e);
    const double miss = against / both, hit = (lead > 0 ? 1 : e) / both, share = miss / sum;
    constexpr auto width = static_cast<index>(lanes<T>);
    const index packs = (n + width - 1) / width;
    const pack<T> factor(static_cast<T>(share / a));
    // The leader is taken out of the sums.
    T* leader = nullptr;
    double first = 0, behind = 1; // p of the leader, and 1 − p
    if (std::exp(static_cast<double>(rivals.top) - near) * share > 0.5) {
      index at = 0;
      while (x[at] != rivals.top || at == y)
        ++at;
      leader = images + at;
      first = static_cast<double>(*leader) * share;
      *leader = 0;
      wide_lanes<T> others;
      others.clear();
      for (index i = 0; i < packs; ++i)
        others.add(pack<T>::load(images + i * width));
      behind = others.total() * share + hit;
    }
    wide_lanes<T> logs, shares;
    logs.clear();
    shares.clear();
    add_up(
        packs,
        [&](index i)
            __attribute__((always_inline)) { return pack<T>::load(images + i * width) * factor; },
        [&](const pack<T>& log, const pack<T>& part) __attribute__((always_inline)) {
          logs.add(log);
          shares.add(part);
        });
    const double h = hit / (a + hit), others = shares.total() * per_rival;
    const double g = per_rival / (a + first), all = others + first * g;
    if (leader != nullptr)
      *leader = static_cast<T>(first / share);
    return {0,
            {std::log1p(miss / (a + hit)) + (logs.total() + std::log1p(first / a)) * per_rival,
             -hit * (miss / (a + hit) + all), near, share, h - all,
             first * (behind * g - others + h)}};
  }
  summary<statistic, pack<double>> solve_rows(pack<T>* x, index n, const pack<T>& label) const {
    using W = pack<double>;
    const W nothing(-std::numeric_limits<double>::infinity()), zero(0), one(1);
    const short_rivals<T> rivals(x, n, label);
    const W own = first_rows(rivals.own), top = first_rows(rivals.top);
    const auto alone = top == nothing, masked = own == nothing;
    const W from = select(alone, zero, top);
    W images[most_short_columns], sum(0);
    for (index j = 0; j < n; ++j) {
      images[j] = exp_to<T>(rivals.score(j) - from);
      sum += images[j];
    }
    sum = select(alone, select(masked, one, zero), sum);
    const W lead = select(alone, select(masked, nothing, zero), own - from);
    const W e = exp(-abs(lead));
    const W against = select(lead > zero, sum * e, sum), supporting = select(lead > zero, one, e);
    const W scale = one / (against + supporting), miss = against * scale, hit = supporting * scale;
    const W share = select(lead > zero, e * scale, scale), factor = share * W(1 / a);
    // The leader is taken out of the sums; its image is 1.
    const auto leads = (share > W(0.5)) & !alone;
    const W first = select(leads, share, zero);
    W rest(0);
    for (index j = 0; j < n; ++j) {
      images[j] = select(leads & (rivals.score(j) == top), zero, images[j]);
      rest += images[j];
    }
    W logs(0), shares(0);
    add_up(
        n, [&](index j) __attribute__((always_inline)) { return images[j] * factor; },
        [&](const W& log, const W& part) __attribute__((always_inline)) {
          logs += log;
          shares += part;
        });
    logs += log1p(first * W(1 / a));
    const W inverse = one / (W(a) + hit), h = hit * inverse, others = shares * W(per_rival);
    const W g = W(per_rival) / (W(a) + first), all = others + first * g;
    return solutions(first_rows(rivals.spoilt) + (top - from),
                     {log1p(miss * inverse) + logs * W(per_rival), -hit * (miss * inverse + all),
                      from, share, h - all, first * ((rest * share + hit) * g - others + h)});
  }

private:
  /// Calls add(Σ log(1 + q), Σ q/(1 + q)) for several of n packs q at a time: a logarithm takes
  /// long, and so does a division. Logarithms are put together as their product less 1, to which
  /// (e, q) → e (1 + q) + q adds one and, with nothing subtracted, keeps its digits; fractions as
  /// one over that product.
  template <class Term, class Add>
  PERDITA_INLINE void add_up(index n, const Term& term, const Add& add) const {
    using V = decltype(term(index{}));
    constexpr index most_at_once = 64;
    // The logarithm of what a product may be. It is no more than Σ q, and that no more than 1/a.
    const double most =
        std::log(static_cast<double>(std::numeric_limits<typename V::value_type>::max())) - 6;
    const auto at_once =
        1 / a < most
            ? most_at_once
            : static_cast<index>(std::fmax(1, std::fmin(most_at_once, most / std::log1p(1 / a))));
    for (index i = 0; i < n;) {
      V product(0), fractions(0), whole(1); // whole = 1 + product
      for (const index end = std::min(n, i + at_once); i < end; ++i) {
        const V q = term(i), with = q + 1;
        fractions = fma(fractions, with, q * whole);
        product = fma(product, with, q);
        whole = whole * with;
      }
      add(log1p(product), fractions / whole);
    }
  }
};

} // namespace core

/// Robust log loss (RLL), made for noisy labels:
///
///   ℓ = log((a + 1)/(a + p_y)) + (1/(K − 1)) Σ_{k≠y} log((a + p_k)/a),   p = softmax(x)
///   ∂ℓ/∂x_j = p_j (g_j − Σ_k p_k g_k),   g_y = −1/(a + p_y),  g_k = 1/((K − 1)(a + p_k))
///
/// Between 0, where p_y = 1, and log(1 + 1/a) + log(1 + 1/((K − 1) a)).
/// Masked classes (-inf) have p = 0; a masked label costs log(1 + 1/a) and more, with slope 0; +inf
/// but at the label, or NaN, makes the row NaN. One class costs nothing.
/// Shapes, reductions, errors: as cross_entropy. No by-products but `values`. Needs whole rows (p
/// enters term by term), so not on the linear head.
/// Source: Patel and Sastry, "Memorization in deep neural networks: does the loss function
/// matter?", PAKDD 2021.
template <class T = float> class robust_log_loss : public row_loss<robust_log_loss<T>, T> {
public:
  struct options {
    T a = T(0.1); ///< a > 0, not subnormal: the smaller, the closer to cross-entropy
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "robust_log_loss";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = false;
  static constexpr loss_traits traits{.convex = false,
                                      .smooth = true,
                                      .exact_gradient = true,
                                      .nonnegative = true,
                                      .shift_invariant = true};

  robust_log_loss() : robust_log_loss(options{}) {}
  explicit(false) robust_log_loss(const options& o) : options_(o) {
    core::require(o.a >= std::numeric_limits<T>::min() && std::isfinite(o.a), name, "a", o.a,
                  "a finite number above 0 and not subnormal");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend row_loss<robust_log_loss<T>, T>;
  template <class F> void visit(const core::row_job<T>& job, F f) const {
    const auto rivals = static_cast<double>(job.scores.cols - 1);
    f(core::robust_log_formula<T>{
        {}, static_cast<double>(options_.a), rivals > 0 ? 1 / rivals : 0});
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
