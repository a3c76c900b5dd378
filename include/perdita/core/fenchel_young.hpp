// SPDX-License-Identifier: MIT
#pragma once

/// Fenchel-Young losses of a target that is a distribution: formulas for paired_kernel.hpp.
///
///   FY(x; q) = Ω*(x) + Ω(q) − ⟨q, x⟩,   p = argmax ⟨p, x⟩ − Ω(p),   ∂FY/∂x = p − q
///
/// With τ such that x_j − τ = Ω'(p)_j where p_j > 0, and x_j ≤ τ elsewhere (Ω' is 0 there), it is
///
///   FY(x; q) = Σ_j D(q_j, p_j) + Σ_{p_j = 0} q_j (τ − x_j)
///
/// with the Bregman divergence D of Ω: no term is below 0, and nothing cancels near q = p. A target
/// whose sum is s times what it should be counts as s times its distribution, so that value and
/// gradient s p − q belong together whatever rounding has done to q.

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "solved_row.hpp"
#include "threshold.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// D(q, p) of t^α/(α(α−1)), or of t log t for α = 1:
///
///   D = (q (q^{α−1} − p^{α−1})/(α−1) − p^{α−1} (q − p)) / α
///     = p^α Σ_{k≥2} (1 + α + … + α^{k−2}) log(q/p)^k / k!   where q and p are near each other
class bregman_term {
  using W = pack<double>;

public:
  explicit bregman_term(double order) : order_(order), alpha_(order + 1) {
    double factorial = 1, sum = 0, power = 1;
    for (std::size_t k = 0; k < series_.size(); ++k) {
      sum += power; // (1 + … + α^k)/α^k
      power /= alpha_;
      factorial *= static_cast<double>(k + 2);
      series_[k] = sum / factorial;
    }
  }
  /// `log_p` may be finite where p is too small for a number; d = q − p.
  W operator()(const W& q, const W& p, const W& log_p, const W& d) const {
    const W zero(0), alpha(alpha_);
    const auto near = (abs(d) * (W(4) * alpha) <= p) & (p > zero);
    const W slope = order_ == 0 ? W(1) : exp(log_p * order_); // p^{α−1}
    const W log_q = log(q), ratio = log_q - log_p;
    W rise = ratio; // of t^{α−1}/(α−1) from p to q
    if (order_ != 0)
      rise = select(ratio > zero, -(exp(log_q * order_) * expm1(-(ratio * order_))),
                    slope * expm1(ratio * order_)) /
             W(order_);
    const W far = (select(q == zero, zero, q * rise) - slope * d) / alpha;
    if (!any(near))
      return far;
    const W step = log1p(d / p), y = step * alpha;
    W sum(0);
    for (std::size_t k = series_.size(); k-- > 0;)
      sum = fma(sum, y, W(series_[k]));
    return select(near, p * slope * (step * step) * sum, far);
  }

private:
  double order_, alpha_; // α − 1, α
  std::array<double, 13> series_{};
};

/// A class's part of the loss, and q − p.
struct young_part {
  pack<double> loss, gap;
};

inline pack<double> times_or_zero(const pack<double>& q, const pack<double>& x) {
  return select(q == pack<double>(0), pack<double>(0), q * x);
}

/// q − p; where p is the largest probability, and more than a half, from 1 − p.
inline pack<double> gap_to_target(const pack<double>& q, const pack<double>& p,
                                  const pack<double>& behind, double rest) {
  using W = pack<double>;
  return select((behind == W(0)) & (p > W(0.5)), W(rest) - (W(1) - q), q - p);
}

inline double sum_of(const double* q, index n) {
  wide_lanes<double> sum;
  sum.clear();
  for_packs(q, n, 0.0, [&](const pack<double>& share, index) { sum.add(share); });
  return sum.total();
}
/// ‖q‖_α of numbers from 0 on, of which one is above 0.
inline double norm_of(double alpha, const double* q, index n) {
  using W = pack<double>;
  const double most = row_maxima<double>(q, n).top;
  wide_lanes<double> sum;
  sum.clear();
  for_packs(q, n, 0.0,
            [&](const W& share, index) { sum.add(exp(log(share / W(most)) * W(alpha))); });
  return most * row_exp(row_log(sum.total()) / alpha);
}

/// The value and slopes of a row whose target has the sum s·mass: with solve(x, n, top, room) →
/// part(x, q) → young_part.
template <class Solve>
double young_row(const double* x, const double* q, index n, double mass, double* slopes,
                 Solve solve) {
  using W = pack<double>;
  constexpr auto width = static_cast<index>(lanes<double>);
  constexpr double inf = std::numeric_limits<double>::infinity();
  const double total = sum_of(q, n) / mass, top = row_maxima<double>(x, n).top;
  double value = std::numeric_limits<double>::quiet_NaN();
  if (top == -inf && total >= 0) { // p is 0
    value = total > 0 ? inf : 0;
    for (index i = 0; i < n; ++i)
      slopes[i] = -q[i];
  } else if (top == top && total == 0) { // nothing is asked for
    value = 0;
    std::fill_n(slopes, n, 0.0);
  } else if (top == top && total > 0) {
    const auto part = solve(x, n, top, slopes + n);
    wide_lanes<double> sum;
    sum.clear();
    for_packs(x, n, -inf, [&](const W& z, index i) {
      const W share = i + width <= n ? W::load(q + i) : load_first(q + i, n - i, W(0));
      const young_part of = part(z, share / W(total));
      sum.add(of.loss);
      const W slope = W(0) - of.gap * W(total);
      if (i + width <= n)
        slope.store(slopes + i);
      else
        store_first(slope, slopes + i, n - i);
    });
    value = total * sum.total();
  }
  if (value != value)
    std::fill_n(slopes, n, value);
  return value;
}

/// Ω = Σ p log p: cross-entropy less the target's entropy, KL(q ‖ p).
struct shannon_young {
  static constexpr bool paired = true;

  double operator()(const double* x, const double* q, index n, index, double* slopes) const {
    using W = pack<double>;
    return young_row(x, q, n, 1, slopes, [](const double* z, index count, double top, double*) {
      W images(0), ties(0);
      for_packs(z, count, -std::numeric_limits<double>::infinity(), [&](const W& at, index) {
        const auto highest = at == W(top);
        images += select(highest, W(0), exp(at - W(top)));
        ties += select(highest, W(1), W(0));
      });
      const double others = sum_lanes(images) + (sum_lanes(ties) - 1);
      return [top, rest = others / (1 + others), most = 1 / (1 + others),
              log_sum = row_log1p(others), term = bregman_term(0)](const W& at, const W& share) {
        const W behind = at - W(top), p = W(most) * exp(behind);
        const W gap = gap_to_target(share, p, behind, rest);
        return young_part{term(share, p, behind - W(log_sum), gap), gap};
      };
    });
  }
};

/// Ω = ½ ‖p‖² − ½
struct gini_young {
  static constexpr bool paired = true;

  double operator()(const double* x, const double* q, index n, index, double* slopes) const {
    using W = pack<double>;
    return young_row(
        x, q, n, 1, slopes, [](const double* z, index count, double top, double* room) {
          const auto s = simplex_threshold::solve(z, count, room);
          const double size = s.term[0], sum = s.term[1];
          return [top, threshold = (sum - 1) / size,
                  rest = ((size - 1) + sum) / size](const W& at, const W& share) {
            const W behind = at - W(top), over = behind - W(threshold), p = max(W(0), over);
            const W gap = gap_to_target(share, p, behind, rest);
            const W outside = times_or_zero(share, max(W(0), -over));
            return young_part{fma(W(0.5) * gap, gap, outside), gap};
          };
        });
  }
};

/// Ω = (Σ p^α − 1)/(α(α−1))
struct tsallis_young {
  static constexpr bool paired = true;
  double alpha;

  double operator()(const double* x, const double* q, index n, index, double* slopes) const {
    using W = pack<double>;
    const tsallis_power power(alpha);
    const bregman_term term(power.order());
    return young_row(
        x, q, n, 1, slopes, [&](const double* z, index count, double top, double* room) {
          const tsallis_trial t = find_threshold(power, row_maxima<double>(z, count), room).at;
          return [=](const W& at, const W& share) {
            const W zero(0), behind = at - W(top), log_base = log1p(max(W(-1), W(t.rate) * behind));
            if (!any((log_base > W(-std::numeric_limits<double>::infinity())) | !(share == zero)))
              return young_part{zero, zero};
            const W log_p = log_base * W(1 / power.order()) - W(t.at), p = exp(log_p);
            const W gap = gap_to_target(share, p, behind, t.rest);
            const W outside = times_or_zero(share, max(zero, -behind - W(1 / t.rate)));
            return young_part{term(share, p, log_p, gap) + outside, gap};
          };
        });
  }
};

/// Ω = ‖p‖_α. With the dual norm of w (threshold.hpp) being 1, and v = p/‖p‖_α,
///
///   ‖q‖_α − ⟨q, w⟩ = ‖q‖_α (α−1) Σ D(q_j/‖q‖_α, v_j).
struct norm_young {
  static constexpr bool paired = true;
  double alpha;

  double operator()(const double* x, const double* q, index n, index, double* slopes) const {
    using W = pack<double>;
    const tsallis_power power(alpha), solver(power.order() / power.alpha(), 1);
    const bregman_term term(power.order());
    return young_row(
        x, q, n, 1, slopes, [&](const double* z, index count, double top, double* room) {
          const tsallis_root root = find_threshold(solver, row_maxima<double>(z, count), room);
          const tsallis_trial t = root.at;
          const double others = sum_rivals(power, t, room, root.rivals).powers;
          const double log_most = -t.at / power.alpha(); // of v
          return [=, size = norm_of(alpha, q, n) / sum_of(q, n), rest = others / (1 + others),
                  rest_of_v = -row_expm1(log_most)](const W& at, const W& share) {
            const W zero(0), behind = at - W(top), log_base = log1p(max(W(-1), W(t.rate) * behind));
            if (!any((log_base > W(-std::numeric_limits<double>::infinity())) | !(share == zero)))
              return young_part{zero, zero};
            const W log_image = log_base * W(1 / power.order()), image = exp(log_image);
            const W log_v = log_image + W(log_most), v = exp(log_v), unit = share / W(size);
            const W of_unit = gap_to_target(unit, v, behind, rest_of_v);
            const W outside = times_or_zero(share, max(zero, -behind - W(1 / t.rate)));
            return young_part{fma(W(size * power.order()), term(unit, v, log_v, of_unit), outside),
                              gap_to_target(share, image * W(1 / (1 + others)), behind, rest)};
          };
        });
  }
};

} // namespace perdita::inline PERDITA_ABI::core
