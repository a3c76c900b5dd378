// SPDX-License-Identifier: MIT
#pragma once

#include "../config.hpp"

namespace perdita::inline PERDITA_ABI {

/// What a loss promises of its value as a function of one row of scores. Tests hold it to that.
struct loss_traits {
  bool convex;          ///< in the scores
  bool smooth;          ///< differentiable wherever all scores are finite
  bool exact_gradient;  ///< the gradient is the derivative of the value
  bool nonnegative;     ///< never below 0
  bool shift_invariant; ///< a number added to all scores changes nothing
};

} // namespace perdita::inline PERDITA_ABI
