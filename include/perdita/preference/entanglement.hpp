// SPDX-License-Identifier: MIT
#pragma once

/// What a step on a margin does to each of the two log-probabilities, and three remedies.

#include <cmath>
#include <vector>

#include "../core/sequences.hpp"

namespace perdita::inline PERDITA_ABI {

/// How log π of both responses moves in a small step down the gradient of a loss of pairs.
enum class entanglement {
  ideal,     ///< the chosen's rises (or stays), the rejected's falls (or stays)
  both_fall, ///< and the margin grows all the same, if the slopes are of one size
  both_rise, ///< as well
  reversed   ///< the chosen's falls, the rejected's rises: only if a slope has the other sign
};

/// Per unit of step size.
struct entangled_step {
  double chosen, rejected; ///< changes of log π
  entanglement kind;
};

/// From the slopes of the loss by the log-probabilities (as a loss writes them to d_chosen and
/// d_rejected), and the products of the gradients g and g′ of log π by the parameters:
///
///   chosen = c ‖g‖² − c′ ⟨g, g′⟩,  rejected = c ⟨g, g′⟩ − c′ ‖g′‖²
///
/// with c = −d_chosen and c′ = d_rejected.
/// For equal slopes both move as wanted just if ⟨g, g′⟩ ≤ min(‖g‖², ‖g′‖²).
/// Source: Yuan, Zeng, Wu et al., "A common pitfall of margin-based language model alignment:
/// gradient entanglement", ICLR 2025.
inline entangled_step entangle(double d_chosen, double d_rejected, double chosen_norm_squared,
                               double rejected_norm_squared, double product) {
  const double c = -d_chosen, other = d_rejected;
  const double w = c * chosen_norm_squared - other * product;
  const double l = c * product - other * rejected_norm_squared;
  const entanglement kind = w >= 0 && l <= 0 ? entanglement::ideal
                            : w < 0 && l > 0 ? entanglement::reversed
                            : w < 0          ? entanglement::both_fall
                                             : entanglement::both_rise;
  return {w, l, kind};
}

namespace core {

/// Σ_k (e_y − p)_k (e_y′ − p′)_k
template <class T>
double residual_product(const matrix_view<const T>& p, index t, std::int64_t y,
                        const matrix_view<const T>& q, index s, std::int64_t other) {
  exact_sum sum;
  for (index k = 0; k < p.cols; ++k) {
    const double a = (k == y ? 1 : 0) - static_cast<double>(p(t, k));
    const double b = (k == other ? 1 : 0) - static_cast<double>(q(s, k));
    sum.add(a * b);
  }
  return sum.value();
}

} // namespace core

/// A sequence at a linear head of weights W (classes × features): what went into it, the
/// probabilities that came out, and the labels.
template <class T> struct head_sequence {
  matrix_view<const T> hidden, probabilities; ///< tokens × features, tokens × classes
  core::integer_rows labels;

  template <core::labels_like L>
  head_sequence(matrix_view<const T> states, matrix_view<const T> distribution, L&& of)
      : hidden(states), probabilities(distribution), labels(core::as_vector(of)) {
    const core::sequence_checks<T> checks{"head_sequence"};
    checks.size("rows of probabilities", probabilities.rows, hidden.rows, "the hidden rows");
    checks.size("size of labels", labels.cols, hidden.rows, "the hidden rows");
    checks.memory("hidden", hidden.data, hidden.rows * hidden.cols);
    checks.memory("probabilities", probabilities.data, hidden.rows * probabilities.cols);
    checks.memory("labels", labels.data, hidden.rows);
    for (index t = 0; t < hidden.rows; ++t)
      if (const auto y = labels.at(0, t); y < 0 || y >= probabilities.cols)
        core::fail_at("head_sequence", "labels", t, core::to_text(y), "a class");
  }
};

/// ⟨∂ log π/∂W, ∂ log π′/∂W⟩ of two sequences (or one and itself: the squared norm) at the same
/// head: Σ_ts ⟨e_t − p_t, e_s − p_s⟩ ⟨h_t, h_s⟩, the cheap stand-in for all parameters. Time:
/// tokens × tokens × (classes + features). Throws std::invalid_argument where the widths differ.
template <class T>
double head_gradient_product(const head_sequence<T>& a, const head_sequence<T>& b) {
  const core::sequence_checks<T> checks{"head_gradient_product"};
  checks.size("features", b.hidden.cols, a.hidden.cols, "of the other sequence");
  checks.size("classes", b.probabilities.cols, a.probabilities.cols, "of the other sequence");
  core::exact_sum total;
  for (index t = 0; t < a.hidden.rows; ++t)
    for (index s = 0; s < b.hidden.rows; ++s) {
      core::exact_sum states;
      for (index k = 0; k < a.hidden.cols; ++k)
        states.add(static_cast<double>(a.hidden(t, k)) * static_cast<double>(b.hidden(s, k)));
      if (states.value() != 0)
        total.add(states.value() * core::residual_product(a.probabilities, t, a.labels.at(0, t),
                                                          b.probabilities, s, b.labels.at(0, s)));
    }
  return total.value();
}

/// Pairwise normalised gradient: divides the slopes of each pair by the norms of the gradients of
/// their log-probabilities, so that for equal slopes log π of the chosen cannot fall nor that of
/// the rejected rise, to first order. A norm of 0 leaves its slope (there is nothing to move).
/// Throws std::invalid_argument for sizes that differ, a norm below 0 or NaN.
/// Source: Yuan, Zeng, Wu et al., as for entangle; form verified to have that property.
template <class T>
void normalise_pairs(vector_view<T> d_chosen, vector_view<T> d_rejected,
                     vector_view<const T> chosen_norms, vector_view<const T> rejected_norms) {
  const core::sequence_checks<T> checks{"normalise_pairs"};
  const auto each = [&](const char* what, const auto& view) {
    checks.entries(what, view, d_chosen.size, "as many as there are pairs");
  };
  each("d_chosen", d_chosen);
  each("d_rejected", d_rejected);
  each("chosen_norms", chosen_norms);
  each("rejected_norms", rejected_norms);
  for (index i = 0; i < d_chosen.size; ++i)
    for (const auto& norms : {chosen_norms, rejected_norms})
      if (!(norms[i] >= 0))
        core::fail_at("normalise_pairs", "norms", i, core::to_text(norms[i]), "0 or more");
  for (index i = 0; i < d_chosen.size; ++i) {
    d_chosen[i] /= chosen_norms[i] > 0 ? chosen_norms[i] : T(1);
    d_rejected[i] /= rejected_norms[i] > 0 ? rejected_norms[i] : T(1);
  }
}

/// A log-ratio of a sequence in which tokens count by a mask that is learnt, kept sparse by its L1
/// norm: s = Σ_t M_t (l_t − q_t), penalty α Σ |M_t|. For the reference-free losses of pairs: give
/// them s in the place of log π and let `gradients` turn their slopes into those of the tokens.
/// Source: as for entangle (sparse token masking).
struct masked_log_ratio {
  double sum = 0, penalty = 0;

  template <class T>
  masked_log_ratio(vector_view<const T> log_probabilities, vector_view<const T> reference,
                   vector_view<const T> mask, double alpha = 0) {
    check(log_probabilities, reference, mask, alpha);
    core::exact_sum total, size;
    for (index t = 0; t < mask.size; ++t) {
      const double m = static_cast<double>(mask[t]);
      if (m != 0)
        total.add(m *
                  (static_cast<double>(log_probabilities[t]) - static_cast<double>(reference[t])));
      size.add(std::fabs(m));
    }
    sum = total.value();
    penalty = alpha * size.value();
  }
  /// ∂/∂l_t = M_t c and ∂/∂M_t = c (l_t − q_t) + α scale sign M_t, c the slope by the sum; `scale`
  /// is that of the penalty in what is minimised.
  template <class T>
  static void gradients(vector_view<const T> log_probabilities, vector_view<const T> reference,
                        vector_view<const T> mask, double alpha, double slope, double scale,
                        vector_view<T> d_log_probabilities, vector_view<T> d_mask) {
    check(log_probabilities, reference, mask, alpha);
    const core::sequence_checks<T> checks{"masked_log_ratio"};
    checks.entries("d_log_probabilities", d_log_probabilities, mask.size, "the tokens");
    checks.entries("d_mask", d_mask, mask.size, "the tokens");
    for (index t = 0; t < mask.size; ++t) {
      const double m = static_cast<double>(mask[t]);
      const double ratio =
          static_cast<double>(log_probabilities[t]) - static_cast<double>(reference[t]);
      d_log_probabilities[t] = static_cast<T>(m * slope);
      d_mask[t] = static_cast<T>(slope * ratio + alpha * scale * ((m > 0) - (m < 0)));
    }
  }

private:
  template <class T>
  static void check(const vector_view<const T>& l, const vector_view<const T>& q,
                    const vector_view<const T>& mask, double alpha) {
    const core::sequence_checks<T> checks{"masked_log_ratio"};
    checks.entries("log_probabilities", l, mask.size, "the tokens of the mask");
    checks.entries("reference", q, mask.size, "the tokens of the mask");
    checks.memory("mask", mask.data, mask.size);
    core::require(alpha >= 0, "masked_log_ratio", "alpha", alpha, "0 or more");
  }
};

} // namespace perdita::inline PERDITA_ABI
