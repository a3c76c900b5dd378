// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "../cross_entropy.hpp"
#include "pairs.hpp"

namespace perdita::inline PERDITA_ABI {

struct spo_options {
  double gamma = 1;                 ///< γ ≥ 0
  std::int64_t ignore_index = -100; ///< of degrees
};

/// The terms before they are weighted.
struct spo_terms {
  double pairs = 0, degrees = 0;
};

/// Self-supervised preference optimisation: a loss of pairs, and a classifier that shall see how
/// much of a response's key content has been taken away, in K + 1 degrees,
///
///   ℓ(pairs) + γ mean_r (−log softmax(z_r)_{degree r})
///
/// z: the classifier's scores, rows × degrees, one row for each response that it is shown (chosen
/// and rejected ones, whole and degraded), made of the response's pooled hidden states. class_means
/// pools by the mean over tokens (labels: the number of the sequence), and class_means_gradient
/// goes back. The pairs' loss is any that has slopes by chosen and rejected. Call options are the
/// pairs'; of them scale, accumulate, run_on and memory hold for the degrees too. Everything is
/// checked, and gradients lie apart, as in the two parts. Throws std::invalid_argument.
/// Source: Li et al., "Self-supervised preference optimization: enhance your language model with
/// preference degree awareness", Findings of EMNLP 2024, from its description: there is no code.
///
///   perdita::spo loss(perdita::dpo<float>{}, {.gamma = 0.1});
///   float value = loss(pairs, z, degrees, d_chosen, d_rejected, d_z);
template <class Pairs> class spo {
public:
  using T = typename Pairs::value_type;
  using value_type = T;
  using options = spo_options;
  static constexpr const char* name = "spo";

  explicit(false) spo(Pairs pairs) : spo(std::move(pairs), options{}) {}
  spo(Pairs pairs, const options& o)
      : pairs_(std::move(pairs)), degrees_({.ignore_index = o.ignore_index}), options_(o) {
    core::not_negative(name, "gamma", o.gamma);
  }
  const options& settings() const { return options_; }

  template <class X, core::labels_like Y>
  requires core::scores_like<X, T> T operator()(const preference_pairs<T>& pairs, X&& scores,
                                                Y&& degrees, const call_options<T>& call = {},
                                                spo_terms* terms = nullptr) const {
    // The degrees first: they have nothing to write, and may be wrong.
    const T of_degrees_value = degrees_(scores, degrees, of_degrees(call));
    return sum(pairs_(pairs, call), of_degrees_value, terms);
  }
  template <class X, core::labels_like Y, class G>
  requires core::scores_like<X, T> && core::gradient_like<G, T>
      T operator()(const preference_pairs<T>& pairs, X&& scores, Y&& degrees,
                   vector_view<T> d_chosen, vector_view<T> d_rejected, G&& d_scores,
                   const call_options<T>& call = {}, spo_terms* terms = nullptr) const {
    // What the second part would find wrong must be found before the first writes.
    const core::sequence_checks<T> checks{name};
    checks.entries("d_chosen", d_chosen, pairs.chosen.size, "as many as there are chosen");
    checks.entries("d_rejected", d_rejected, pairs.chosen.size, "as many as there are chosen");
    checks.call(call, pairs.chosen.size, false, "as many as there are chosen");
    core::check_pair_outputs(name, pairs, {d_chosen, d_rejected, {}}, call, {});
    const auto to = core::as_matrix(d_scores);
    core::require_memory(name, "d_scores", to.data, to.rows * to.cols);
    std::vector<core::extent> memory{core::bytes_of(core::matrix_data<T, true>(to)),
                                     core::bytes_of(d_chosen), core::bytes_of(d_rejected),
                                     core::bytes_of(call.values)};
    for (const auto& input : core::pair_inputs(pairs, call))
      memory.push_back(core::bytes_of(input));
    core::require_apart(name, memory, 1);
    call_options<T> silent = call;
    silent.values = {};
    pairs_(pairs, silent);
    const T of_degrees_value = degrees_(scores, degrees, d_scores, of_degrees(call));
    return sum(pairs_(pairs, d_chosen, d_rejected, call), of_degrees_value, terms);
  }

private:
  call_options<T> of_degrees(const call_options<T>& call) const {
    call_options<T> c;
    c.scale = call.scale * static_cast<T>(options_.gamma);
    c.accumulate = call.accumulate;
    c.run_on = call.run_on;
    c.memory = call.memory;
    return c;
  }
  T sum(T pairs, T degrees, spo_terms* terms) const {
    if (terms)
      *terms = {static_cast<double>(pairs), static_cast<double>(degrees)};
    return static_cast<T>(static_cast<double>(pairs) +
                          links::times(options_.gamma, static_cast<double>(degrees)));
  }

  Pairs pairs_;
  cross_entropy<T> degrees_;
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
