// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>

#include "budget_map.hpp"
#include "core/fenchel_young.hpp"
#include "core/row_loss.hpp"
#include "core/traits.hpp"
#include "entmax.hpp"

namespace perdita::inline PERDITA_ABI {

/// The maps that fenchel_young_loss can be made of, p = argmax ⟨p, x⟩ − Ω(p), by the functions of
/// the same names.
namespace prediction {
/// Ω = Σ p log p
struct softmax {};
/// Ω = ½ ‖p‖² − ½
struct sparsemax {};
/// Ω = (Σ p^α − 1)/(α(α−1)), α > 1
struct entmax {
  double alpha = 1.5;
};
/// Ω = ‖p‖_α, α > 1
struct normmax {
  double alpha = 2;
};
/// Ω = ½ ‖p‖² where 0 ≤ p ≤ 1 and Σ p = B, B > 0: budget_map()
struct budget {
  double budget = 1;
};
} // namespace prediction

namespace core {
inline shannon_young young_formula(const prediction::softmax&) { return {}; }
inline gini_young young_formula(const prediction::sparsemax&) { return {}; }
inline tsallis_young young_formula(const prediction::entmax& p) { return {p.alpha}; }
inline norm_young young_formula(const prediction::normmax& p) { return {p.alpha}; }
inline budget_young young_formula(const prediction::budget& p) { return {p.budget}; }

template <class Prediction>
concept prediction_map = requires(const Prediction& p) {
  young_formula(p);
};
} // namespace core

/// The Fenchel-Young loss of a regularised prediction map:
///
///   ℓ = max_p (⟨p, x⟩ − Ω(p)) + Ω(q) − ⟨q, x⟩,   ∂ℓ/∂x = p − q,   p the argmax
///
/// at least 0, and 0 exactly where q = p; nothing cancels near it. Ω is that of `Prediction`, one
/// of perdita::prediction. The target is a distribution q (rows × classes; of multi-label rows q =
/// y/|y|), or labels, which are q = e_y.
///   softmax:    cross-entropy less the entropy of q, KL(q ‖ p)
///   sparsemax, entmax, normmax: sparsemax_loss, entmax_loss and normmax_loss, which are faster
///               for labels
///   budget:     the k-subsets' loss; q between 0 and 1 with the sum B, and labels only for B = 1
/// Numbers q_j ≥ 0 whose sum is s times what it should be count as s times their distribution,
/// gradient s p − q; a row of zeros counts for nothing. Everything is computed in double.
/// Special values: a masked class (-inf) has p = 0, and makes ℓ +inf where q_j > 0; a row with
/// NaN, in q too, or +inf is NaN. Shapes, reductions, errors: as cross_entropy. No by-products but
/// `values`. Needs whole rows, so not on the linear head.
/// Throws std::invalid_argument if α or B is not a finite number above 1 or 0; the call also if B
/// is more than the classes.
/// Source: Blondel, Martins and Niculae, "Learning with Fenchel-Young losses", JMLR 2020.
template <class T = float, core::prediction_map Prediction = prediction::softmax>
class fenchel_young_loss : public row_loss<fenchel_young_loss<T, Prediction>, T> {
public:
  struct options {
    Prediction prediction{}; ///< the map, with its α or B
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "fenchel_young_loss";
  static constexpr bool takes_soft_targets = true;
  static constexpr bool has_softmax = false;
  static constexpr loss_traits traits{.convex = true,
                                      .smooth = true,
                                      .exact_gradient = true,
                                      .nonnegative = true,
                                      .shift_invariant = true};

  fenchel_young_loss() : fenchel_young_loss(options{}) {}
  explicit(false) fenchel_young_loss(const options& o) : options_(o) {
    if constexpr (requires { o.prediction.alpha; })
      core::require_entmax_alpha(name, o.prediction.alpha);
    if constexpr (has_budget)
      core::positive(name, "budget", o.prediction.budget);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend row_loss<fenchel_young_loss<T, Prediction>, T>;
  static constexpr bool has_budget = requires(const Prediction& p) { p.budget; };

  void check(const core::row_job<T>& job) const {
    if constexpr (has_budget) {
      const double budget = options_.prediction.budget;
      core::require(budget <= static_cast<double>(job.scores.cols), name, "budget", budget,
                    "no more than there are classes");
      core::require(!job.labels || budget == 1, name, "budget", budget, "1 where there are labels");
    }
  }
  template <class F> void visit(const core::row_job<T>&, F f) const {
    f(core::young_formula(options_.prediction));
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
