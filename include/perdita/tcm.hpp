// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>

#include "pair_margin.hpp"

namespace perdita::inline PERDITA_ABI {

struct tcm_options {
  double positive_margin = 0.9; ///< m₊: cosines of what belongs together should be above it
  double negative_margin = 0.5; ///< m₋: those of others below
  double positive_factor = 1;   ///< λ₊ ≥ 0
  double negative_factor = 1;   ///< λ₋ ≥ 0
  bool normalise = true;
  perdita::reduction reduction = reduction::mean;
};

/// The threshold-consistent margin: a regulariser, to be added to a loss of the same embeddings
/// (by `accumulate`), that wants one threshold to tell pairs apart in all classes. Of cosines s,
///
///   ℓ = λ₊ Σ_{s ≤ m₊} (m₊ − s)/#{s ≤ m₊} + λ₋ Σ_{s ≥ m₋} (s − m₋)/#{s ≥ m₋}
///
/// over all pairs of an anchor and a candidate that belong together, and over all others; the
/// numbers count as constants: slopes −λ₊/#, λ₋/#, but 0 at the kink. A kind of which there are
/// none counts as 0. With weights w of anchors, Σ w (m₊ − s)/Σ w. reduction::sum: the sums, not
/// divided. Every anchor is looked at twice; anchor_options::normaliser is not used. See
/// anchor_loss for calls, shapes, special values and errors.
///
/// Source: Zhang et al., "Threshold-consistent margin loss for open-world deep metric learning",
/// 2024; the defaults are pytorch-metric-learning's.
template <class T> class tcm : public anchor_loss<tcm<T>, T> {
public:
  using options = tcm_options;
  static constexpr const char* name = "tcm";

  tcm() : tcm(options{}) {}
  explicit tcm(const options& o) : options_(o) {
    core::finite(name, "positive_margin", o.positive_margin);
    core::finite(name, "negative_margin", o.negative_margin);
    core::not_negative(name, "positive_factor", o.positive_factor);
    core::not_negative(name, "negative_factor", o.negative_factor);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::anchor_access;
  auto formula() const {
    core::pair_hinges<false> f; // of −s
    f.at[0] = -options_.positive_margin;
    f.at[1] = -options_.negative_margin;
    f.factor[0] = options_.positive_factor;
    f.factor[1] = options_.negative_factor;
    f.apart = options_.reduction == reduction::mean;
    f.ties = true;
    return f;
  }
  void set_extra(core::anchor_job<T>& job) const { job.mean = false; }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
