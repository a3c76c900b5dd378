// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "barlow_twins.hpp"
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

/// Which loss is made adaptive.
enum class amcl_form {
  contrastive, ///< SimCLR's and MoCo's: positives, and the nearest negative
  sim_siam     ///< SimSiam's: positives alone
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
  amcl_form form = amcl_form::contrastive;        ///< which loss is made adaptive
  bool normalise = true;                          ///< cosines, and not products
  perdita::reduction reduction = reduction::mean; ///< of the anchors that count
  double* d_temperature = nullptr; ///< where ∂value/∂t goes, of the temperature of every pair
};

namespace core {

struct amcl_formula : anchor_formula {
  const amcl_options& o;

  explicit amcl_formula(const amcl_options& options) : o(options) {}
  bool has_negatives() const { return o.form == amcl_form::contrastive; }

  template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>& row) const {
    const chosen_scores<T> own(row, belonging{}), rivals(row, rivalling{});
    const bool contrasts = o.form == amcl_form::contrastive;
    if (own.count == 0 || (contrasts && rivals.count == 0))
      return {0, false};
    anchor_outcome out;
    const bool lost = !std::isfinite(contrasts ? own.sum + rivals.sum : own.sum);
    if (lost)
      out.value = std::numeric_limits<double>::quiet_NaN();
    const double share = 1 / static_cast<double>(own.count);
    const double steepness = contrasts ? 1 : 0.5;
    bool nearest = contrasts && !lost;
    for (index j = 0; j < row.size; ++j) {
      const double s = static_cast<double>(row.scores[j]);
      double slope = 0;
      if (lost) {
        slope = out.value;
      } else if (row.relation[j] > 0) {
        slope = add<Gradient>(row.anchor, j, s * steepness, share, out) * steepness;
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
  /// Adds weight (β Ω(t) − s/t); returns the slope by s.
  template <bool Gradient>
  double add(index anchor, index candidate, double s, double weight, anchor_outcome& out) const {
    double t = o.temperatures ? o.temperatures(anchor, candidate) : o.temperature;
    if (!(t > 0))
      t = std::numeric_limits<double>::quiet_NaN();
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
/// and the mean over anchors that have a positive and a negative. With amcl_form::sim_siam s/(2t)
/// stands for s/t, there are no negatives, and anchors count that have a positive; the candidates
/// are constants in a call without their gradient,
///
///   loss.pairs(p, z, d_p)     of predictions p of one view and embeddings z of the other
///
/// See amcl_barlow for Barlow Twins. The nearest negative is that of
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
    core::positive(name, "width", o.width);
    core::invertible<double>(name, "temperature", o.temperature);
    core::require(o.beta >= 0 && std::isfinite(o.beta), name, "beta", o.beta,
                  "a finite number, not negative");
    core::require_enumerator(name, "form", o.form, amcl_form::sim_siam, "contrastive or sim_siam");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::anchor_access;
  core::amcl_formula formula() const { return core::amcl_formula(options_); }
  void set_extra(core::anchor_job<T>& job) const { job.extra[0] = options_.d_temperature; }

  options options_;
};

/// Adaptive Barlow Twins, of one head: two views a and b of a batch of n, each standardised column
/// by column as in barlow_twins, C = âᵀb̂/n, and a temperature for every pair of features,
///
///   L = Σ_l (1 − C_ll/t_ll)² + λ Σ_{l≠m} C_lm²/t_lm + β (Σ_l Ω(t_ll) − Σ_{l≠m} Ω(t_lm))
///   Ω(t) = (d'/2) log t + 1/t
///   ∂L/∂C_ll = −(2/t)(1 − C_ll/t),  ∂L/∂C_lm = 2 λ C_lm/t
///   ∂L/∂t_ll = (2 C_ll/t²)(1 − C_ll/t) + β (d'/(2t) − 1/t²)
///   ∂L/∂t_lm = −λ C_lm²/t² − β (d'/(2t) − 1/t²)
///
/// C_lm, l a feature of a and m of b, has the temperature t(l, m). Shapes: a, b and their gradients
/// rows × features, temperatures and their gradient features × features, all of T, memory apart;
/// C in double, twice, and both batches, twice for gradients. Special values as barlow_twins; a
/// temperature that is not above 0, or not finite, makes the value and all gradients NaN. With all
/// t = 1 and β = 0 it is barlow_twins, but for digits that 1 − C_ll has there where views agree.
/// Throws std::invalid_argument. Source: as amcl.
template <class T = float> class amcl_barlow {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    double width = 0;             ///< d' of Ω; 0: the number of features
    double beta = 0.1;            ///< β, not negative
    double off_diagonal = 0.0051; ///< λ
    double epsilon = 1e-5;        ///< > 0, added to the variances
  };
  static constexpr const char* name = "amcl_barlow";

  amcl_barlow() : amcl_barlow(options{}) {}
  explicit(false) amcl_barlow(const options& o) : options_(o) {
    const auto not_negative = [](const char* what, double x) {
      core::require(x >= 0 && std::isfinite(x), name, what, x, "a finite number, not negative");
    };
    not_negative("width", o.width);
    not_negative("beta", o.beta);
    checks.finite("off_diagonal", o.off_diagonal);
    core::positive(name, "epsilon", o.epsilon);
  }
  const options& settings() const { return options_; }

  T operator()(matrix_view<const T> a, matrix_view<const T> b, matrix_view<const T> temperatures,
               const embedding_options<T>& call = {}) const {
    return run({a, b, temperatures}, nullptr, call);
  }
  /// The value, and the gradients with respect to both views and the temperatures.
  T operator()(matrix_view<const T> a, matrix_view<const T> b, matrix_view<const T> temperatures,
               matrix_view<T> d_a, matrix_view<T> d_b, matrix_view<T> d_temperatures,
               const embedding_options<T>& call = {}) const {
    const std::array<matrix_view<T>, 3> gradients{d_a, d_b, d_temperatures};
    return run({a, b, temperatures}, &gradients, call);
  }

private:
  static constexpr core::embedding_checks<T> checks{name};

  static void check(const std::array<matrix_view<const T>, 3>& x,
                    const std::array<matrix_view<T>, 3>* gradients) {
    static constexpr const char* names[] = {"first view", "second view", "temperatures"};
    std::vector<core::extent> pieces, inputs;
    const auto shape = [&](const std::string& what, const auto& m, std::size_t k) {
      checks.size("rows of the " + what, m.rows, k < 2 ? x[0].rows : x[0].cols);
      checks.size("columns of the " + what, m.cols, x[0].cols);
      checks.memory("the " + what, m.data, m.rows * m.cols);
    };
    for (std::size_t k = 0; k < 3; ++k) {
      shape(names[k], x[k], k);
      inputs.push_back(core::bytes_of(core::matrix_data<T>(x[k])));
      if (!gradients)
        continue;
      shape(std::string("gradient of the ") + names[k], (*gradients)[k], k);
      pieces.push_back(core::bytes_of(core::matrix_data<T, true>((*gradients)[k])));
    }
    const std::size_t written = pieces.size();
    pieces.insert(pieces.end(), inputs.begin(), inputs.end());
    core::require_apart(name, pieces, written);
  }

  T run(const std::array<matrix_view<const T>, 3>& x,
        const std::array<matrix_view<T>, 3>* gradients, const embedding_options<T>& call) const {
    check(x, gradients);
    const index n = x[0].rows, d = x[0].cols;
    if (n == 0 || d == 0) {
      if (gradients)
        core::store_slopes((*gradients)[2], call, [](index, index) { return 0.0; });
      return 0;
    }
    core::standardised_batch a(n, d), b(n, d);
    if (!core::load_batch(x[0], a.values, call.run_on) ||
        !core::load_batch(x[1], b.values, call.run_on))
      return core::give_up(gradients, call);
    a.standardise(options_.epsilon, call.run_on);
    b.standardise(options_.epsilon, call.run_on);

    const auto count = static_cast<double>(n);
    core::panelled h = core::cross_product(a.values, b.values, call.run_on);
    core::panelled by_temperature(d, d);
    const double half_width = (options_.width > 0 ? options_.width : static_cast<double>(d)) / 2;
    core::exact_sum value;
    for (index l = 0; l < d; ++l)
      for (index m = 0; m < d; ++m) {
        const auto t = static_cast<double>(x[2](l, m));
        if (!(t > 0 && std::isfinite(t)))
          return core::give_up(gradients, call);
        const term of = l == m ? own(h(l, m) / count, t) : other(h(l, m) / count, t);
        const double beta = l == m ? options_.beta : -options_.beta;
        value.add(of.value + beta * (half_width * std::log(t) + 1 / t));
        h(l, m) = of.by_correlation / count;
        by_temperature(l, m) = of.by_temperature + beta * (half_width - 1 / t) / t;
      }
    if (!std::isfinite(value.value()))
      return core::give_up(gradients, call);
    if (gradients) {
      core::differentiate_view(a, b, core::transpose(h, call.run_on), (*gradients)[0], call);
      core::differentiate_view(b, a, h, (*gradients)[1], call);
      core::store_slopes((*gradients)[2], call,
                         [&](index l, index m) { return by_temperature(l, m); });
    }
    return static_cast<T>(value.value());
  }

  struct term {
    double value, by_correlation, by_temperature;
  };
  term own(double c, double t) const {
    const double miss = 1 - c / t;
    return {miss * miss, -2 * miss / t, 2 * c / (t * t) * miss};
  }
  term other(double c, double t) const {
    const double share = options_.off_diagonal * c / t;
    return {share * c, 2 * share, -share * c / t};
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
