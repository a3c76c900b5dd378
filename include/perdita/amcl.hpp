// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>

#include "core/anchor_loss.hpp"
#include "core/anchor_sums.hpp"

namespace perdita::inline PERDITA_ABI {

/// Any callable of an anchor, a candidate and perhaps more, for some pairs of a call: called on any
/// thread. Does not own the callable.
template <class R, class... More> class pair_callback {
public:
  pair_callback() = default;
  template <class F>
  requires(!std::same_as<std::remove_cvref_t<F>, pair_callback> &&
           std::is_invocable_r_v<R, const F&, index, index, More...>) pair_callback(const F& f)
      : object_(std::addressof(f)),
        call_([](const void* object, index anchor, index candidate, More... more) -> R {
          return (*static_cast<const F*>(object))(anchor, candidate, more...);
        }) {}
  explicit operator bool() const { return call_ != nullptr; }
  R operator()(index anchor, index candidate, More... more) const {
    return call_(object_, anchor, candidate, more...);
  }

private:
  const void* object_ = nullptr;
  R (*call_)(const void*, index, index, More...) = nullptr;
};

/// t = low + (high − low)/(1 + e^{−φ}) for what a network makes of a pair.
struct bounded_temperature {
  double low = 1e-5, high = 2;

  double operator()(double phi) const { return low + (high - low) / (1 + std::exp(-phi)); }
  /// ∂t/∂φ where t is what it is.
  double slope(double t) const { return (t - low) * ((high - t) / (high - low)); }
};

struct amcl_options {
  double width = 0;       ///< d', of a head's embeddings, above 0: there is no default
  double beta = 0.1;      ///< β, not negative
  double temperature = 1; ///< of every pair, where there are no `temperatures`
  /// t(i, j) > 0, asked for the pairs that matter alone: of each anchor, its positives and one
  /// negative.
  pair_callback<double> temperatures{};
  /// Told ∂ℓ_i/∂t(i, j) of those pairs where gradients are asked for: of the anchor's own value,
  /// which the reduction has yet to weight.
  pair_callback<void, double> d_temperatures{};
  bool normalise = true;                          ///< cosines, and not products
  perdita::reduction reduction = reduction::mean; ///< of the anchors that count
  double* d_temperature = nullptr; ///< where ∂value/∂t goes, of the temperature of every pair
};

namespace core {

struct amcl_formula : anchor_formula {
  const amcl_options& o;

  explicit amcl_formula(const amcl_options& options) : o(options) {}

  template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>& row) const {
    const chosen_scores<T> own(row, belonging{}), rivals(row, rivalling{});
    if (own.count == 0 || rivals.count == 0)
      return {0, false};
    anchor_outcome out;
    const bool lost = !std::isfinite(own.sum + rivals.sum);
    if (lost)
      out.value = std::numeric_limits<double>::quiet_NaN();
    const double share = 1 / static_cast<double>(own.count);
    bool nearest = !lost;
    for (index j = 0; j < row.size; ++j) {
      const double s = static_cast<double>(row.scores[j]);
      double slope = 0;
      if (lost) {
        slope = out.value;
      } else if (row.relation[j] > 0) {
        slope = add<Gradient>(row.anchor, j, s, share, out);
      } else if (row.relation[j] < 0 && nearest && row.scores[j] == rivals.most) {
        slope = add<Gradient>(row.anchor, j, s, -1, out);
        nearest = false;
      }
      if constexpr (Gradient)
        row.scores[j] = static_cast<T>(slope);
    }
    return out;
  }

private:
  /// Adds weight (β Ω(t) − s/t); returns the slope.
  template <bool Gradient>
  double add(index anchor, index candidate, double s, double weight, anchor_outcome& out) const {
    const double t = o.temperatures ? o.temperatures(anchor, candidate) : o.temperature;
    out.value += weight * (o.beta * (o.width / 2 * std::log(t) + 1 / t) - s / t);
    if constexpr (Gradient) {
      const double d_t = weight * (o.beta * o.width / 2 - (o.beta - s) / t) / t;
      out.extra[0] += d_t;
      if (o.d_temperatures)
        o.d_temperatures(anchor, candidate, d_t);
    }
    return -weight / t;
  }
};

} // namespace core

/// Adaptive multi-head contrastive loss, of one head: an anchor i with its positives P, its nearest
/// negative n = argmax s_in, and a temperature t for every pair,
///
///   ℓ_i = (1/|P|) Σ_{p∈P} [β Ω(t_ip) − s_ip/t_ip] − [β Ω(t_in) − s_in/t_in]
///   Ω(t) = (d'/2) log t + 1/t
///   ∂ℓ_i/∂s_ip = −1/(|P| t_ip),  ∂ℓ_i/∂s_in = 1/t_in, 0 of other negatives
///   ∂ℓ_i/∂t_ip = (1/|P|) (s_ip/t_ip² + β (d'/(2 t_ip) − 1/t_ip²)), ∂ℓ_i/∂t_in = −(the same of n)
///
/// and the mean over anchors that have a positive and a negative. The nearest negative is that of
/// the largest cosine, before any temperature, and of those that tie the first. The temperatures
/// come from a callable, which is asked for |P| + 1 pairs per anchor: a network that makes them
/// never sees the others, and there is no matrix of them. A temperature that is not above 0 makes
/// its anchor NaN.
///
/// Heads are calls, each on its columns of the embeddings; their values add up. See anchor_loss for
/// calls, shapes, special values and errors. Throws where the width or the temperature is not above
/// 0, or β negative.
///
/// Source: Wang et al., "Adaptive multi-head contrastive learning", ECCV 2024.
template <class T> class amcl : public anchor_loss<amcl<T>, T> {
public:
  using options = amcl_options;
  static constexpr const char* name = "amcl";

  explicit amcl(const options& o) : options_(o) {
    const auto above_0 = [](const char* what, double x) {
      core::require(x > 0 && std::isfinite(x), name, what, x, "a finite number above 0");
    };
    above_0("width", o.width);
    above_0("temperature", o.temperature);
    core::require(o.beta >= 0 && std::isfinite(o.beta), name, "beta", o.beta,
                  "a finite number, not negative");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::anchor_access;
  core::amcl_formula formula() const { return core::amcl_formula(options_); }
  void set_extra(core::anchor_job<T>& job) const { job.extra[0] = options_.d_temperature; }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
