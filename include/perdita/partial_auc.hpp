// SPDX-License-Identifier: MIT
#pragma once

/// Losses for the part of the area under the ROC curve with few false positives, and perhaps many
/// true ones too: of each positive, what counts is the negatives that come nearest to it or above
/// it. Both have a state that is the caller's. Shapes and errors: beginning of auc.hpp.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <type_traits>
#include <vector>

#include "auc.hpp"
#include "core/batch_call.hpp"

namespace perdita::inline PERDITA_ABI {

/// One number for each sample of a data set, of those that have been positives of a batch, and one
/// for all; plain numbers, to be kept and stored. Start with Loss::new_state(samples).
struct partial_auc_state {
  std::vector<double> inner;
  double outer = 0;
};

namespace core {

/// Every positive against every negative of a batch, by l = max(0, m − (f₊ − f₋))². Derived has
///
///   step find_step(step)           of what is known of the positives: the new state, and factors
///   W share(W l, double known)     a pair's share of its positive's factor, that being known of it
template <class Derived, class T> class pairs_of_classes {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;

  /// The value of the step that a call with a gradient would be.
  template <batch_of<T> X, labels_like Y, labels_like I>
  T operator()(X&& scores, Y&& labels, I&& ids, const partial_auc_state& state) const {
    const binary_batch<T> batch{as_vector(scores), integer_rows(as_vector(labels))};
    const integer_rows samples(as_vector(ids));
    check_batch<T>(Derived::name, batch, nullptr, false);
    return static_cast<T>(step(*this, batch, samples, state).value);
  }
  /// A step: the new state, the value, and the gradient.
  template <batch_of<T> X, labels_like Y, labels_like I, batch_of<T> G>
  T operator()(X&& scores, Y&& labels, I&& ids, partial_auc_state& state, G&& gradient,
               const auc_call<T>& call = {}) const {
    const binary_batch<T> batch{as_vector(scores), integer_rows(as_vector(labels))};
    const integer_rows samples(as_vector(ids));
    vector_view<T> to = as_vector(gradient);
    check_batch<T>(Derived::name, batch, &to, call.accumulate);
    const step found(*this, batch, samples, state);
    const auto put_all = [&](const std::vector<index>& places, const auto& slope) {
      for (std::size_t k = 0; k < places.size(); ++k)
        put(to, places[k], slope(k) * static_cast<double>(call.scale), call.accumulate);
    };
    if (std::isnan(found.value)) {
      const auto unknown = [&](std::size_t) { return found.value; };
      put_all(found.positives, unknown);
      put_all(found.negatives, unknown);
      return static_cast<T>(found.value);
    }
    for (std::size_t i = 0; i < found.positives.size(); ++i)
      state.inner[static_cast<std::size_t>(samples.at(0, found.positives[i]))] = found.inner[i];
    state.outer = found.outer;
    std::vector<double> pull(found.positives.size()), push(found.rivals.size());
    for (std::size_t i = 0; i < pull.size(); ++i)
      pull[i] = found.factor[i] == 0 ? 0 : add_slopes(found, i, push.data());
    put_all(found.positives, [&](std::size_t k) { return -pull[k]; });
    put_all(found.negatives, [&](std::size_t k) { return push[k]; });
    return static_cast<T>(found.value);
  }

protected:
  using W = pack<double>;

  struct step {
    double value = std::numeric_limits<double>::quiet_NaN();
    std::vector<index> positives, negatives; ///< places in the batch
    std::vector<double> own, rivals;         ///< their scores; the negatives' in whole packs
    std::vector<double> known, inner;        ///< of the state: what weighs pairs, and what is new
    std::vector<double> factor;              ///< of the pairs of a positive, in the gradient
    double outer = 0;

    step(const pairs_of_classes& loss, const binary_batch<T>& batch, const integer_rows& samples,
         const partial_auc_state& state)
        : outer(state.outer) {
      check_samples<T>(Derived::name, samples, batch.scores.size, state.inner.size());
      bool finite = true;
      for (index i = 0; i < batch.scores.size; ++i) {
        const bool positive = batch.positive(i);
        (positive ? positives : negatives).push_back(i);
        (positive ? own : rivals).push_back(static_cast<double>(batch.scores[i]));
        finite = finite && std::isfinite(batch.scores[i]);
        if (positive)
          known.push_back(state.inner[static_cast<std::size_t>(samples.at(0, i))]);
      }
      require(!positives.empty(), Derived::name, "number of positives", 0, "1 or more");
      require(!negatives.empty(), Derived::name, "number of negatives", 0, "1 or more");
      rivals.resize(static_cast<std::size_t>(whole_packs(static_cast<index>(rivals.size()))),
                    no_score);
      if (finite)
        static_cast<const Derived&>(loss).find_step(*this);
    }
    auto count() const { return static_cast<double>(negatives.size()); }
    auto anchors() const { return static_cast<double>(positives.size()); }
  };

  explicit pairs_of_classes(double margin) : margin_(margin) {
    require(margin > 0 && std::isfinite(margin), Derived::name, "margin", margin,
            "a finite number above 0");
  }

  /// f(m − (f_i − f_j) or 0, which are negatives, index of the first) of packs of negatives.
  template <class F> void for_rivals(const step& s, std::size_t i, F f) const {
    const W own(s.own[i]), margin(margin_); // what all scores share cancels first
    for (std::size_t j = 0; j < s.rivals.size(); j += static_cast<std::size_t>(per_pack)) {
      const W score = W::load(s.rivals.data() + j);
      f(max(W(0), (score - own) + margin), score > W(no_score), j);
    }
  }

private:
  /// Adds a positive's part to the slopes of the negatives; returns the sum of what was added.
  double add_slopes(const step& s, std::size_t i, double* push) const {
    wide_lanes<double> sum;
    sum.clear();
    for_rivals(s, i, [&](const W& miss, const auto& negative, std::size_t j) {
      const W share = static_cast<const Derived&>(*this).share(miss * miss, s.known[i]);
      const W more = select(negative, share * miss * W(2 * s.factor[i]), W(0));
      sum.add(more);
      (W::load(push + j) + more).store(push + j);
    });
    return sum.total();
  }

  double margin_;
};

} // namespace core

/// Partial AUC by distributional robustness (SOPA-s; with two ways, SOTA-s): of each positive i
/// the soft maximum of its pairs with the negatives of a batch, l_ij = max(0, m − (f_i − f_j))²,
///
///   u_i ← (1 − γ) u_i + γ mean_j e^{l_ij/Λ}          (just the mean for a sample without a past)
///   one way    L = Λ mean_i log u_i                  (few false positives)
///              ∂L/∂l_ij = e^{l_ij/Λ}/(u_i P M)
///   two ways   w ← (1 − γ') w + γ' mean_i u_i^{Λ/Λ'},  L = Λ' log w  (and many true positives)
///              ∂L/∂l_ij = e^{l_ij/Λ} u_i^{Λ/Λ' − 1}/(w P M)
///   ∂l_ij/∂f_j = 2 max(0, m − (f_i − f_j)) = −∂l_ij/∂f_i
///
/// with the new u and w, P positives, M negatives. L is the robust objective, with a penalty by
/// KL divergence: Λ → 0 is the largest l of each positive, Λ → ∞ their mean. The gradient is L's
/// where γ = γ' = 1 or nothing has a past; otherwise that with weights taken for constants. `ids`
/// says which samples of the state the batch consists of: different numbers, from 0 on. A call with
/// a gradient is a step, and updates u of the batch's positives, and w; one without is its value.
///
/// The state has log u (−inf: no past) and log w, so nothing overflows for small Λ. A batch without
/// positives, or without negatives, throws. A score that is NaN or infinite makes the value and all
/// slopes NaN, and the state stays as it was. O(P M), in double, on the calling thread. Source:
/// Zhu, Li, Wang, Wu, Yang, "When AUC meets DRO: optimizing partial AUC for deep learning with
/// non-convex convergence guarantee", ICML 2022. (Two ways: written from the
/// paper's objective, not compared with the authors' code.)
///
///   perdita::partial_auc_dro<float> loss({.outer_temperature = 1});
///   auto state = loss.new_state(samples);
///   float value = loss(scores, labels, ids, state, d_scores);
template <class T = float>
class partial_auc_dro : public core::pairs_of_classes<partial_auc_dro<T>, T> {
  using base = core::pairs_of_classes<partial_auc_dro<T>, T>;
  using typename base::step;
  using typename base::W;

public:
  struct options {
    double margin = 1;            ///< m > 0
    double temperature = 1;       ///< Λ > 0
    double outer_temperature = 0; ///< Λ' > 0 for two ways; 0: one way
    double gamma = 0.9;           ///< γ in (0, 1], the weight of what is new in u
    double outer_gamma = 0.9;     ///< γ', of w
  };
  static constexpr const char* name = "partial_auc_dro";

  partial_auc_dro() : partial_auc_dro(options{}) {}
  explicit(false) partial_auc_dro(const options& o) : base(o.margin), options_(o) {
    core::invertible<double>(name, "temperature", o.temperature);
    core::require(o.outer_temperature >= 0 && std::isfinite(o.outer_temperature), name,
                  "outer_temperature", o.outer_temperature, "a finite number, not negative");
    core::require(o.gamma > 0 && o.gamma <= 1, name, "gamma", o.gamma, "a number in (0, 1]");
    core::require(o.outer_gamma > 0 && o.outer_gamma <= 1, name, "outer_gamma", o.outer_gamma,
                  "a number in (0, 1]");
  }
  const options& settings() const { return options_; }
  static partial_auc_state new_state(std::size_t samples) {
    return {std::vector<double>(samples, core::no_score), core::no_score};
  }

private:
  friend base;

  /// log((1 − γ) e^before + γ e^fresh)
  static double average(double before, double fresh, double gamma) {
    if (before == core::no_score || gamma == 1)
      return fresh;
    const double a = std::log1p(-gamma) + before, b = std::log(gamma) + fresh;
    return std::fmax(a, b) + std::log1p(std::exp(-std::fabs(a - b)));
  }
  void find_step(step& s) const {
    std::vector<double> logits(s.rivals.size()), images(s.own.size());
    const double ratio =
        options_.outer_temperature > 0 ? options_.temperature / options_.outer_temperature : 0;
    core::exact_sum logs;
    for (std::size_t i = 0; i < s.own.size(); ++i) {
      this->for_rivals(s, i, [&](const W& miss, const auto& negative, std::size_t j) {
        select(negative, miss * miss * W(1 / options_.temperature), W(core::no_score))
            .store(logits.data() + j);
      });
      const double fresh =
          core::sum_of_images(logits.data(), static_cast<index>(logits.size())).log() -
          std::log(s.count());
      s.inner.push_back(average(s.known[i], fresh, options_.gamma));
      logs.add(s.inner.back());
      images[i] = ratio * s.inner.back();
    }
    s.known = s.inner;
    s.factor.assign(s.own.size(), 1 / (s.anchors() * s.count()));
    s.value = options_.temperature * (logs.value() / s.anchors());
    if (ratio == 0)
      return;
    images.resize(static_cast<std::size_t>(core::whole_packs(static_cast<index>(images.size()))),
                  core::no_score);
    const double fresh =
        core::sum_of_images(images.data(), static_cast<index>(images.size())).log() -
        std::log(s.anchors());
    s.outer = average(s.outer, fresh, options_.outer_gamma);
    s.value = options_.outer_temperature * s.outer;
    for (std::size_t i = 0; i < s.own.size(); ++i)
      s.factor[i] *= std::exp(images[i] - s.outer);
  }
  W share(const W& l, double log_u) const {
    return exp(l * W(1 / options_.temperature) - W(log_u));
  }

  options options_;
};

/// Partial AUC by conditional values at risk (SOPA; with two ways, SOTA): of each positive i the
/// mean of the largest β of its pairs with negatives, l_ij = max(0, m − (f_i − f_j))², and of the
/// positives the mean of the worst α, by thresholds that are descended as well,
///
///   v_i = u_i + Σ_j max(0, l_ij − u_i)/(β M)
///   one way (α = 1)   L = mean_i v_i,  ∂L/∂l_ij = [l_ij > u_i]/(β P M)
///   two ways          L = s + Σ_i max(0, v_i − s)/(α P),
///                     ∂L/∂l_ij = [v_i > s] [l_ij > u_i]/(α β P M)
///
///   step: u_i ← u_i − η [v_i > s or one way] (1 − #{j: l_ij > u_i}/(β M))
///         s ← s − η (1 − #{i: v_i > s}/(α P))
///
/// with P positives and M negatives in the batch, and the old u and s in L, whose derivative the
/// gradient is. For the best u and s, L is the mean over the β M largest l of each positive: the
/// square loss of the false-positive rates up to β (and, of those, of the α P worst positives: true
/// positive rates from 1 − α on). A term at its threshold has no slope. `ids`, steps, special
/// values and errors: see partial_auc_dro; the state has u and s, 0 at first. The authors' value,
/// mean of the weighted l, says nothing. Source: Zhu, Li, Wang, Wu, Yang 2022, as there;
/// Rockafellar, Uryasev 2000. (Two ways: written from the paper's objective, not compared with the
/// authors' code.)
template <class T = float>
class partial_auc_cvar : public core::pairs_of_classes<partial_auc_cvar<T>, T> {
  using base = core::pairs_of_classes<partial_auc_cvar<T>, T>;
  using typename base::step;
  using typename base::W;

public:
  struct options {
    double margin = 1;      ///< m > 0
    double negatives = 0.1; ///< β in (0, 1], the largest false-positive rate
    double positives = 1;   ///< α in (0, 1]: 1 for one way
    double rate = 0.1;      ///< η ≥ 0
  };
  static constexpr const char* name = "partial_auc_cvar";

  partial_auc_cvar() : partial_auc_cvar(options{}) {}
  explicit(false) partial_auc_cvar(const options& o) : base(o.margin), options_(o) {
    core::require(o.negatives > 0 && o.negatives <= 1, name, "negatives", o.negatives,
                  "a number in (0, 1]");
    core::require(o.positives > 0 && o.positives <= 1, name, "positives", o.positives,
                  "a number in (0, 1]");
    core::require(o.rate >= 0 && std::isfinite(o.rate), name, "rate", o.rate,
                  "a finite number, not negative");
  }
  const options& settings() const { return options_; }
  static partial_auc_state new_state(std::size_t samples) {
    return {std::vector<double>(samples), 0};
  }

private:
  friend base;

  void find_step(step& s) const {
    const bool one_way = options_.positives == 1;
    const double of_pair = 1 / (options_.negatives * s.count()),
                 of_positive = 1 / (options_.positives * s.anchors());
    core::exact_sum sum;
    double above = 0;
    for (std::size_t i = 0; i < s.own.size(); ++i) {
      const double u = s.known[i];
      core::wide_lanes<double> excess, number;
      excess.clear();
      number.clear();
      this->for_rivals(s, i, [&](const W& miss, const auto& negative, std::size_t) {
        const W l = miss * miss;
        const auto counts = negative & (l > W(u));
        excess.add(select(counts, l - W(u), W(0)));
        number.add(select(counts, W(1), W(0)));
      });
      const double v = u + of_pair * excess.total();
      const bool counts = one_way || v > s.outer;
      if (counts)
        sum.add(one_way ? v : v - s.outer);
      above += counts ? 1 : 0;
      s.factor.push_back(counts ? of_pair * of_positive : 0);
      s.inner.push_back(counts ? u - options_.rate * (1 - of_pair * number.total()) : u);
    }
    s.value = (one_way ? 0 : s.outer) + of_positive * sum.value();
    if (!one_way)
      s.outer -= options_.rate * (1 - of_positive * above);
  }
  W share(const W& l, double u) const { return select(l > W(u), W(1), W(0)); }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
