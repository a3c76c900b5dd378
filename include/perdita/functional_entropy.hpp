// SPDX-License-Identifier: MIT
#pragma once

/// What the functional-entropy regulariser of multi-modal classifiers is made of. A classifier's
/// modalities are perturbed, f > 0 is how far its output then is from what it was (a cross-entropy,
/// of one sample or of many), and a modality tells much if f changes with it: by a log-Sobolev
/// inequality Ent(f) ≤ (σ²/2) E ‖∇f‖²/f, the functional Fisher information, for Gaussian
/// perturbations of variance σ². Training makes that information large for every modality,
///
///   R = ‖(1/I_1, …, 1/I_K)‖₂,  I_k = mean_b ‖∂f_b/∂x_kb‖²/f_b
///
/// to be added to the task's loss with a small weight (the authors' code: 1e-10). I holds
/// derivatives already, so training by it needs second ones, of your network: these functors have
/// the values, and their derivatives by what they are given. In double, on the calling thread (but
/// for the rows of fisher_information); throw std::invalid_argument, and then nothing is written.
///
/// Source: Gat, Schwartz, Schwing, Hazan, "Removing bias in multi-modal classifiers: regularization
/// by maximizing functional entropies", NeurIPS 2020.

#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "core/embeddings.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// Checks of numbers and their gradient, as matrices of one column.
template <class T>
void check_numbers(const char* name, const char* what, const vector_view<const T>& x,
                   const vector_view<T>* gradient) {
  const embedding_checks<T> checks{name};
  checks.memory(what, x.data, x.size);
  if (!gradient)
    return;
  checks.size(std::string("size of the gradient of ") + what, gradient->size, x.size);
  checks.memory(std::string("gradient of ") + what, gradient->data, x.size);
  const extent memory[] = {bytes_of(*gradient), bytes_of(x)};
  require_apart(name, memory, 1);
}
template <class T>
void put_slope(const vector_view<T>& to, index i, double slope, const embedding_options<T>& call) {
  const double g = slope * static_cast<double>(call.scale);
  to[i] = static_cast<T>(call.accumulate ? static_cast<double>(to[i]) + g : g);
}

} // namespace core

/// The functional entropy of n values f ≥ 0, with m = mean f and δ_i = f_i/m − 1,
///
///   Ent(f) = mean f log f − m log m = m mean_i ((1 + δ_i) log(1 + δ_i) − δ_i) ≥ 0
///   ∂Ent/∂f_i = log(f_i/m)/n = log(1 + δ_i)/n
///
/// by the second form of each, of which no term is negative: right to some 2⁻⁵³ mean |f − m|.
/// Ent(c f) = c Ent(f); constants have 0 and slopes 0. f_i = 0 adds m/n, and its slope is −inf. All
/// of them 0, or none: 0. A value that is negative or not finite makes all NaN. Gradient and values
/// lie apart.
template <class T = float> class functional_entropy {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  static constexpr const char* name = "functional_entropy";

  T operator()(vector_view<const T> f) const { return run(f, nullptr, {}); }
  T operator()(vector_view<const T> f, vector_view<T> gradient,
               const embedding_options<T>& call = {}) const {
    return run(f, &gradient, call);
  }

private:
  static T run(const vector_view<const T>& f, const vector_view<T>* gradient,
               const embedding_options<T>& call) {
    core::check_numbers(name, "values", f, gradient);
    core::exact_sum all, entropy;
    bool known = true;
    for (index i = 0; i < f.size; ++i) {
      known = known && f[i] >= T(0) && std::isfinite(f[i]);
      all.add(static_cast<double>(f[i]));
    }
    const auto n = static_cast<double>(f.size);
    const double mean = f.size > 0 ? all.value() / n : 0;
    const double nothing = known ? 0 : std::numeric_limits<double>::quiet_NaN();
    for (index i = 0; i < f.size; ++i) {
      const auto x = static_cast<double>(f[i]);
      const double away = x - mean;
      double log = nothing;
      if (known && mean > 0) // whichever of the two keeps its digits
        log = x < mean / 2 ? std::log(x / mean) : std::log1p(away / mean);
      entropy.add(x == 0 ? mean : x * log - away);
      if (gradient)
        core::put_slope(*gradient, i, log / n, call);
    }
    return static_cast<T>(known ? (f.size > 0 ? std::fmax(entropy.value() / n, 0) : 0) : nothing);
  }
};

/// The functional Fisher information of n samples, g_b = ∂f_b/∂x_b being the rows of a matrix:
///
///   I = mean_b ‖g_b‖²/f_b,  ∂I/∂g_b = 2 g_b/(n f_b),  ∂I/∂f_b = −‖g_b‖²/(n f_b²)
///
/// f has one number per row, or one for all (the authors' code: the mean loss of the batch), whose
/// slope is then their sum. No samples: 0. f_b ≤ 0, NaN and infinity make I NaN, as well as
/// the slopes of their sample.
template <class T = float> class fisher_information {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  static constexpr const char* name = "fisher_information";

  T operator()(matrix_view<const T> g, vector_view<const T> f) const {
    return run(g, f, nullptr, nullptr, {});
  }
  T operator()(matrix_view<const T> g, vector_view<const T> f, matrix_view<T> d_g,
               vector_view<T> d_f, const embedding_options<T>& call = {}) const {
    return run(g, f, &d_g, &d_f, call);
  }

private:
  static T run(const matrix_view<const T>& g, const vector_view<const T>& f,
               const matrix_view<T>* d_g, const vector_view<T>* d_f,
               const embedding_options<T>& call) {
    const core::embedding_checks<T> checks{name};
    const std::array<matrix_view<T>, 1> to{d_g ? *d_g : matrix_view<T>{}};
    checks.batches(std::array<matrix_view<const T>, 1>{g}, d_g ? &to : nullptr);
    core::check_numbers(name, "f", f, d_f);
    if (d_g) {
      const core::extent memory[] = {core::bytes_of(core::matrix_data<T, true>(*d_g)),
                                     core::bytes_of(*d_f), core::bytes_of(core::matrix_data<T>(g)),
                                     core::bytes_of(f)};
      core::require_apart(name, memory, 2);
    }
    const index n = g.rows;
    if (f.size != 1)
      checks.size("f", f.size, n);
    std::vector<double> value(static_cast<std::size_t>(n)), by(value.size());
    core::exact_sum sum, slope;
    for (index b = 0; b < n; ++b) {
      const auto of = static_cast<double>(f[f.size == 1 ? 0 : b]);
      const double known =
          of > 0 && std::isfinite(of) ? of : std::numeric_limits<double>::quiet_NaN();
      core::exact_sum squares;
      for (index j = 0; j < g.cols; ++j)
        squares.add(static_cast<double>(g(b, j)) * static_cast<double>(g(b, j)));
      const auto at = static_cast<std::size_t>(b);
      by[at] = 1 / (known * static_cast<double>(n));
      value[at] = squares.value() * by[at];
      sum.add(value[at]);
      slope.add(-value[at] / known);
      if (d_f && f.size == n && n != 1)
        core::put_slope(*d_f, b, -value[at] / known, call);
    }
    if (d_f && f.size == 1)
      core::put_slope(*d_f, 0, slope.value(), call);
    if (d_g)
      core::store_slopes(*d_g, call, [&](index b, index j) {
        return 2 * by[static_cast<std::size_t>(b)] * static_cast<double>(g(b, j));
      });
    return static_cast<T>(sum.value());
  }
};

/// What is minimised, of the information I > 0 of each of K modalities:
///
///   R = √(Σ_k I_k⁻²),  ∂R/∂I_k = −I_k⁻³/R
///
/// whose squares do not overflow: with L the least I, R = √(Σ (L/I_k)²)/L. No modalities: 0. An I
/// that is not above 0 or is NaN makes all NaN; an infinite one adds nothing.
template <class T = float> class inverse_information {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  static constexpr const char* name = "inverse_information";

  T operator()(vector_view<const T> information) const { return run(information, nullptr, {}); }
  T operator()(vector_view<const T> information, vector_view<T> gradient,
               const embedding_options<T>& call = {}) const {
    return run(information, &gradient, call);
  }

private:
  static T run(const vector_view<const T>& x, const vector_view<T>* gradient,
               const embedding_options<T>& call) {
    core::check_numbers(name, "information", x, gradient);
    double least = std::numeric_limits<double>::infinity();
    for (index k = 0; k < x.size; ++k) {
      const auto i = static_cast<double>(x[k]);
      least = !(i > 0) ? std::numeric_limits<double>::quiet_NaN() : i < least ? i : least;
      if (least != least)
        break;
    }
    const auto part = [&](index k) { return least / static_cast<double>(x[k]); };
    double squares = 0;
    for (index k = 0; k < x.size; ++k)
      squares += std::isinf(least) ? 0 : part(k) * part(k);
    const double root = std::sqrt(squares);
    for (index k = 0; gradient && k < x.size; ++k)
      core::put_slope(
          *gradient, k,
          root == 0 ? 0 : -(part(k) / root) / static_cast<double>(x[k]) * part(k) / least, call);
    return static_cast<T>(root / least);
  }
};

} // namespace perdita::inline PERDITA_ABI
