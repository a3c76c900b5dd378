// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/row_values.hpp"

namespace perdita::inline PERDITA_ABI {

/// What a sample's place h ∈ [−δ, δ] between the least and the largest loss says of its weight.
enum class reweighting_strategy {
  lin_upper, ///< min(h + δ, δ): samples of little loss count less, the others alike
  quadratic, ///< 1 − h²/δ²: the middle counts most
  extremes,  ///< |h|: both ends count most
  upper      ///< (h + δ)/2: the more, the larger the loss
};

struct reweighting_options {
  reweighting_strategy strategy = reweighting_strategy::lin_upper;
  double temperature = 0.4; ///< r > 0; infinite: all weights alike, for the first steps
  double delta = 1;         ///< δ > 0
};

namespace core {

/// softmax(f(h)/r) over the samples that count, with multiplicities.
class loss_based_softmax {
public:
  explicit loss_based_softmax(const reweighting_options& o) : options_(o) {}

  /// w_i = m_i e^{f(h_i)/r} / Σ_k m_k e^{f(h_k)/r} for samples of multiplicity m_i, and then times
  /// `total`, or if that is 0 times Σ m.
  template <class T>
  void operator()(const vector_view<const T>& values, const double* multiplicity, double total,
                  const vector_view<T>& weights) {
    const auto size = [&](index i) { return multiplicity ? multiplicity[i] : 1.0; };
    // Samples that are not numbers are nobody's yardstick.
    const auto counts = [&](index i) { return size(i) > 0 && !std::isnan(values[i]); };
    low_ = inf;
    high_ = -inf;
    for (index i = 0; i < values.size; ++i)
      if (counts(i)) {
        low_ = std::min(low_, static_cast<double>(values[i]));
        high_ = std::max(high_, static_cast<double>(values[i]));
      }
    double top = -inf;
    for (index i = 0; i < values.size; ++i)
      if (counts(i))
        top = std::max(top, preference(static_cast<double>(values[i])));
    exact_sum sum, all;
    const auto share = [&](index i) {
      const double f = preference(static_cast<double>(values[i]));
      return size(i) * std::exp((f - top) / options_.temperature);
    };
    for (index i = 0; i < values.size; ++i)
      if (counts(i)) {
        sum.add(share(i));
        all.add(size(i));
      }
    const double scale = (total == 0 ? all.value() : total) / sum.value();
    for (index i = 0; i < values.size; ++i)
      weights[i] = size(i) == 0 ? T(0)
                   : counts(i)  ? static_cast<T>(share(i) * scale)
                                : static_cast<T>(values[i]); // NaN
  }

private:
  static constexpr double inf = std::numeric_limits<double>::infinity();

  /// (2ℓ − ℓmin − ℓmax)/max(ℓmax − ℓmin, 10⁻⁶) δ, and its limits for infinite losses.
  double place(double loss) const {
    if (low_ == high_)
      return 0;
    if (std::isinf(loss))
      return loss > 0 ? options_.delta : -options_.delta;
    if (std::isinf(low_) || std::isinf(high_))
      return low_ == -high_ ? 0 : std::isinf(high_) ? -options_.delta : options_.delta;
    // A quarter of everything, so that nothing overflows.
    const double above = loss / 4 - low_ / 4, below = high_ / 4 - loss / 4;
    return (above - below) / std::max(high_ / 4 - low_ / 4, 0.25e-6) * options_.delta;
  }
  double preference(double loss) const {
    const double h = place(loss), delta = options_.delta;
    switch (options_.strategy) {
    case reweighting_strategy::lin_upper:
      return std::min(h + delta, delta);
    case reweighting_strategy::quadratic:
      return 1 - (h / delta) * (h / delta);
    case reweighting_strategy::extremes:
      return std::abs(h);
    default:
      return h / 2 + delta / 2;
    }
  }

  const reweighting_options& options_;
  double low_ = 0, high_ = 0;
};

inline void require_reweighting(const char* name, const reweighting_options& o) {
  require_enumerator(name, "strategy", o.strategy, reweighting_strategy::upper,
                     "lin_upper, quadratic, extremes or upper");
  require(o.temperature > 0, name, "temperature", o.temperature, "a number above 0");
  positive(name, "delta", o.delta);
}

} // namespace core

/// Weights of samples by their losses, all of a batch (of all its machines) at once:
///
///   h_i = δ (2ℓ_i − ℓmin − ℓmax) / max(ℓmax − ℓmin, 10⁻⁶) ∈ [−δ, δ]
///   w = softmax(f(h)/r),   Σ w = 1,   f as reweighting_strategy says
///
/// For losses that are means over the tokens of a sample, say; reweighted does the same for a loss
/// of rows. `losses` and `weights` are vectors of float or double of one size, or the same vector.
/// Where all losses are equal, so are the weights. An infinite loss is an extreme, and all finite
/// ones are then the other (or the middle, if both infinities occur). A NaN gets the weight NaN
/// and changes no other's. Throws std::invalid_argument.
/// Source: Sow, Woisetschläger, Bulusu, Wang, Jacobsen, Liang, "Dynamic loss-based sample
/// reweighting for improved large language model pretraining", ICLR 2025; `upper`: their code.
template <core::vector_like V, core::vector_like W>
void loss_based_weights(V&& losses, W&& weights, const reweighting_options& options = {}) {
  constexpr const char* name = "loss_based_weights";
  const auto from = core::as_vector(losses);
  const auto to = core::as_vector(weights);
  using T = std::remove_reference_t<decltype(to[0])>;
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>,
                "the weights must be a vector of float or double that can be written to");
  static_assert(std::is_same_v<std::remove_cvref_t<decltype(from[0])>, T>,
                "the losses must be of the weights' type");
  core::require_reweighting(name, options);
  core::require(to.size == from.size, name, "size of weights", to.size, "the number of losses");
  core::require(to.size == 0 || (from.data && to.data), name, "memory", 0,
                "pointers that are not null");
  const core::extent read = core::bytes_of(from), written = core::bytes_of(to);
  if (!(from.data == to.data && from.stride == to.stride) && written.begin < read.end &&
      read.begin < written.end)
    core::fail(name, "weights", "memory of the losses", "the same vector or memory apart");
  core::loss_based_softmax{options}(vector_view<const T>(from), nullptr, 1, to);
}

/// Any loss of rows, with weights that its rows' own values decide, anew in each call:
///
///   value Σ_i w_i ℓ_i,   gradient w_i ∂ℓ_i,   w = softmax(f(h)/r) (see loss_based_weights)
///
/// No gradient passes through w. `mean` is that sum, since Σ w = 1. In general row i counts n w_i
/// times, n the number of rows that count, and the loss reduces as it always does: `sum` gives
/// n Σ w_i ℓ_i, with class weights `mean` divides by Σ w_i c_y, and temperature = inf gives the
/// plain loss.
/// Ignored rows have no part in w. A row weight (finite, ≥ 0) of 2 is as good as the row twice.
/// The by-product `values` has n w_i ℓ_i; the others are of the plain loss, also where w_i
/// underflows. A row whose value is NaN counts once; its gradient is NaN, the others' are not.
/// Cost: two passes, one of values only, and some numbers per row, allocated. Threads do not
/// matter. Shapes, domain, errors: as the loss. Throws std::invalid_argument.
/// Source: as loss_based_weights. They take ℓmin, ℓmax and the softmax over the global batch: if
/// that is spread over machines, gather the losses, use loss_based_weights and pass row_weights.
///
///   perdita::reweighted loss(perdita::cross_entropy<float>(), {.temperature = 1});
///   float value = loss(logits, labels, d_logits);
template <class Loss> class reweighted {
public:
  using T = typename Loss::value_type;
  using value_type = T;
  using options = reweighting_options;
  static constexpr const char* name = "reweighted";

  explicit(false) reweighted(Loss loss) : reweighted(std::move(loss), options{}) {}
  reweighted(Loss loss, const options& o) : loss_(std::move(loss)), options_(o) {
    core::require_reweighting(name, o);
  }
  const options& settings() const { return options_; }
  const Loss& loss() const { return loss_; }

  template <class X, class Y>
  requires core::scores_like<X, T> T operator()(X&& scores, Y&& target,
                                                const call_options<T>& call = {}) const {
    const auto weights = weigh(scores, target, call);
    return loss_(scores, target, core::second_pass(call, weights));
  }
  template <class X, class Y, class G>
  requires core::scores_like<X, T> && core::gradient_like<G, T>
      T operator()(X&& scores, Y&& target, G&& gradient, const call_options<T>& call = {}) const {
    core::require_gradient<T>(name, core::as_matrix(scores), target, core::as_matrix(gradient),
                              call.accumulate);
    const auto weights = weigh(scores, target, call);
    return loss_(scores, target, gradient, core::second_pass(call, weights));
  }

private:
  template <class X, class Y>
  std::vector<T> weigh(X& scores, Y& target, const call_options<T>& call) const {
    const auto found = core::find_row_values(name, loss_, scores, target, call);
    std::vector<T> weights(found.value.size());
    core::loss_based_softmax{options_}(vector_view<const T>(found.value), found.weight.data(), 0,
                                       vector_view<T>(weights));
    // A row that is not a number says so itself; its weight must not spoil the mean of the others.
    for (std::size_t i = 0; i < weights.size(); ++i)
      if (std::isnan(found.value[i]))
        weights[i] = static_cast<T>(found.weight[i]);
    return weights;
  }

  Loss loss_;
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
