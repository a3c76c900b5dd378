// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <concepts>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/row_values.hpp"

namespace perdita::inline PERDITA_ABI {

struct feasible_options {
  double level = 0;        ///< ε: what every row's value should not exceed
  double dual_rate = 1e-3; ///< η ≥ 0: step of the multipliers; 0 leaves them
  /// α > 0: a row may exceed the level by u at a cost of α u²/2. Infinite: it may not.
  double slack_cost = std::numeric_limits<double>::infinity();
};

namespace core {
template <class V>
concept multipliers_like = vector_like<V> &&
    (std::same_as<std::remove_const_t<typename element_of<V>::type>, float> ||
     std::same_as<std::remove_const_t<typename element_of<V>::type>, double>);

/// λ/α; 0 for α = ∞, where λ may be infinite too.
inline double slack_of(double multiplier, const feasible_options& o) {
  return std::isinf(o.slack_cost) ? 0 : multiplier / o.slack_cost;
}

/// λ ← [λ + η (ℓ − ε − λ/α)]₊
template <class V> void raise_multiplier(V& multiplier, double loss, const feasible_options& o) {
  const auto before = static_cast<double>(multiplier);
  const double excess = loss - o.level - slack_of(before, o);
  const double next = o.dual_rate == 0 ? before : before + o.dual_rate * excess;
  multiplier = next < 0 ? V(0) : static_cast<V>(next);
}

inline void check_feasible(const char* name, const feasible_options& o) {
  finite(name, "level", o.level);
  not_negative(name, "dual_rate", o.dual_rate);
  require(o.slack_cost > 0, name, "slack_cost", o.slack_cost, "a number above 0");
}
} // namespace core

/// Feasible learning: not the least mean, but every row's value at most ε. A saddle point of
///
///   L = Σ_i λ_i (ℓ_i − ε) − λ_i²/(2α),   minimised over the scores, maximised over λ ≥ 0
///
/// where the second term, left out for α = ∞, is what remains of the slacks u_i = λ_i/α of the
/// resilient form. A call with a gradient is a step of both players: first the multipliers,
///
///   λ_i ← [λ_i + η (ℓ_i − ε − λ_i/α)]₊
///
/// then, with the new ones, the value L and the gradient λ_i ∂ℓ_i. A call without a gradient is L
/// alone and leaves the multipliers as they are. With λ at its best, α [ℓ_i − ε]₊ (which η = α
/// reaches in one step), L = (α/2) Σ [ℓ_i − ε]₊².
///
/// The multipliers are the caller's: one number of float or double per row of the call, 0 to begin
/// with. Those of a data set are gathered for a batch and put back after it. In float they no
/// longer move when η (ℓ − ε) is less than 2⁻²⁵ λ.
/// Ignored rows and rows of weight 0 have no part, and their multipliers stay. Row weights
/// (finite, ≥ 0) count constraints: they multiply the row's part of L, not its step. `mean` divides
/// by their sum (the number of rows that count), whatever class weights the loss has. The
/// by-product `values` has the rows' parts of L; the others are of the plain loss. A value that is
/// +inf or NaN makes the row's multiplier the same.
/// Cost: two passes, one of values only, and some numbers per row, allocated. Threads do not
/// matter. Shapes, domain, errors: as the loss. Throws std::invalid_argument, and then no
/// multiplier has moved.
/// Source: Ramirez, Hounie, Elenter, Gallego-Posada, Hashemizadeh, Ribeiro, Lacoste-Julien,
/// "Feasible learning", AISTATS 2025. For classification they take ε = −log of the probability that
/// each label should get, 0.6 say, and η = 1e-4.
///
///   perdita::feasible loss(perdita::cross_entropy<float>(), {.level = 0.5, .dual_rate = 1e-4});
///   float value = loss(logits, labels, multipliers, d_logits);
template <class Loss> class feasible {
public:
  using T = typename Loss::value_type;
  using value_type = T;
  using options = feasible_options;
  static constexpr const char* name = "feasible";

  explicit(false) feasible(Loss loss) : feasible(std::move(loss), options{}) {}
  feasible(Loss loss, const options& o) : loss_(std::move(loss)), options_(o) {
    core::check_feasible(name, o);
  }
  const options& settings() const { return options_; }
  const Loss& loss() const { return loss_; }

  /// L for these multipliers.
  template <class X, class Y, core::multipliers_like V>
  requires core::scores_like<X, T> T operator()(X&& scores, Y&& target, V&& multipliers,
                                                const call_options<T>& call = {}) const {
    const auto lambda = core::as_vector(multipliers);
    check(lambda, core::as_matrix(scores).rows);
    const auto found = core::find_row_values(name, loss_, scores, target, call);
    return value(found, lambda, call);
  }

  /// Updates the multipliers; L and its gradient for the new ones.
  template <class X, class Y, core::multipliers_like V, class G>
  requires core::scores_like<X, T> && core::gradient_like<G, T>
      T operator()(X&& scores, Y&& target, V&& multipliers, G&& gradient,
                   const call_options<T>& call = {}) const {
    const auto lambda = core::as_vector(multipliers);
    check(lambda, core::as_matrix(scores).rows);
    core::require_gradient<T>(name, core::as_matrix(scores), target, core::as_matrix(gradient),
                              call.accumulate);
    const auto found = core::find_row_values(name, loss_, scores, target, call);
    std::vector<T> weights(found.value.size());
    for (index i = 0; i < found.size(); ++i) {
      const auto r = static_cast<std::size_t>(i);
      if (found.weight[r] == 0)
        continue;
      core::raise_multiplier(lambda[i], static_cast<double>(found.value[r]), options_);
      weights[r] = static_cast<T>(found.weight[r] * static_cast<double>(lambda[i]));
    }
    const T result = value(found, lambda, call);
    auto second = core::second_pass(call, weights);
    second.values = {};
    second.normaliser = denominator(found, call);
    loss_(scores, target, gradient, second);
    return result;
  }

private:
  template <class V> void check(const vector_view<V>& lambda, index rows) const {
    core::require_rows(name, "multipliers", lambda.size, rows);
    core::require_memory(name, "multipliers", lambda.data, rows);
  }

  static double denominator(const core::row_values<T>& found, const call_options<T>& call) {
    if (call.normaliser != 0)
      return call.normaliser;
    core::exact_sum count;
    for (const double w : found.weight)
      count.add(w);
    return count.value();
  }

  template <class V>
  T value(const core::row_values<T>& found, const vector_view<V>& lambda,
          const call_options<T>& call) const {
    core::exact_sum sum;
    for (index i = 0; i < found.size(); ++i) {
      const auto r = static_cast<std::size_t>(i);
      const double weight = found.weight[r];
      const auto l = weight == 0 ? 0.0 : static_cast<double>(lambda[i]);
      const double excess = static_cast<double>(found.value[r]) - options_.level;
      const double part = l == 0 ? 0 : weight * l * (excess - core::slack_of(l, options_) / 2);
      sum.add(part);
      if (call.values.data)
        call.values[i] = static_cast<T>(part);
    }
    if (loss_.settings().reduction != reduction::mean)
      return static_cast<T>(sum.value());
    const double count = denominator(found, call);
    return static_cast<T>(count == 0 ? 0 : sum.value() / count);
  }

  Loss loss_;
  options options_;
};

/// The same step of the multipliers for losses of pairs or sequences, from their values: the plain
/// losses, one number each. Then the multipliers are row weights:
///
///   dpo(pairs, {.values = values});
///   perdita::update_multipliers(values, multipliers, {.level = 0.3, .dual_rate = 1});
///   value = dpo(pairs, d_chosen, d_rejected, {.row_weights = multipliers, .normaliser = n});
///
/// makes (1/n) Σ λ ℓ and its gradient. (The authors' code takes the old multipliers for these: call
/// in the other order.) Throws std::invalid_argument.
template <core::multipliers_like X, core::multipliers_like V>
void update_multipliers(X&& values, V&& multipliers, const feasible_options& o) {
  constexpr const char* name = "update_multipliers";
  core::check_feasible(name, o);
  const auto loss = core::as_vector(values);
  const auto lambda = core::as_vector(multipliers);
  core::require(lambda.size == loss.size, name, "size of multipliers", lambda.size,
                "as many as there are values");
  core::require_memory(name, "values", loss.data, loss.size);
  core::require_memory(name, "multipliers", lambda.data, lambda.size);
  for (index i = 0; i < loss.size; ++i)
    core::raise_multiplier(lambda[i], static_cast<double>(loss[i]), o);
}

} // namespace perdita::inline PERDITA_ABI
