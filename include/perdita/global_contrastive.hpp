// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <unordered_set>
#include <vector>

#include "core/anchor_loss.hpp"
#include "core/anchor_sums.hpp"

namespace perdita::inline PERDITA_ABI {

/// What the global contrastive loss knows of each item of a training set: three numbers, which are
/// all there is to write to disk and to read again. Not to be shared by calls at the same time.
struct global_contrastive_state {
  std::vector<double> log_u;       ///< log of u, the moving average; -inf: not yet seen
  std::vector<double> temperature; ///< τ
  std::vector<double> velocity;    ///< v, the moving average of ∂/∂τ

  global_contrastive_state() = default;
  global_contrastive_state(index items, double tau) { resize(items, tau); }
  /// New items have not been seen, and have the temperature τ; the others keep what they have.
  void resize(index items, double tau) {
    const auto n = static_cast<std::size_t>(items);
    log_u.resize(n, -std::numeric_limits<double>::infinity());
    temperature.resize(n, tau);
    velocity.resize(n, 0.0);
  }
  index size() const { return static_cast<index>(log_u.size()); }
  bool operator==(const global_contrastive_state&) const = default;
};

/// The weight γ of what is new: constant, or from 1 down to `last` along a cosine.
struct gamma_schedule {
  double last = 0.9;
  index epochs = 0; ///< of the way down; 0: constant

  double at(index epoch) const {
    if (epoch >= epochs)
      return last;
    const double way = static_cast<double>(epoch) / static_cast<double>(epochs);
    return last + (1 - last) * (1 + std::cos(std::numbers::pi * way)) / 2;
  }
};

struct global_contrastive_options {
  gamma_schedule gamma{};         ///< γ, in (0, 1]
  bool learn_temperature = false; ///< false: SogCLR; true: iSogCLR, the descent on RGCL
  double rho = 0.3;               ///< ρ; the rest, too, matters for learnt temperatures only
  double rate = 0.01;             ///< η
  double beta = 0.9;              ///< weight of the new ∂/∂τ
  double most_slope = std::numeric_limits<double>::infinity(); ///< ∂/∂τ is cut to ± this
  double least_temperature = 0.05;                ///< above 0: the least of learnt ones
  double most_temperature = 0.7;                  ///< and the largest
  bool normalise = true;                          ///< cosines, and not products
  perdita::reduction reduction = reduction::mean; ///< of the 2b anchors of a batch
};

/// Everything that changes a call but not the mathematics, and the epoch of gamma_schedule.
template <class T> struct global_contrastive_call {
  index epoch = 0;             ///< for gamma_schedule, from 0 on
  double* objective = nullptr; ///< where the estimate of the true objective goes
  T scale = 1;                 ///< multiplies the gradients only
  bool accumulate = false;     ///< adds to the gradients instead of overwriting them

  executor run_on{};
  workspace* memory = nullptr; ///< scratch to reuse
};

namespace core {

/// log(e^a + e^b), of which one at least is above 0.
inline double log_of_sum(double a, double b) {
  return std::fmax(a, b) + std::log1p(std::exp(-std::fabs(a - b)));
}

/// What an anchor leaves behind.
struct global_contrastive_note {
  double log_u = 0, slope = 0, objective = 0;
  bool finite() const { return std::isfinite(log_u) && std::isfinite(slope); }
};

struct global_contrastive_formula : anchor_formula {
  const global_contrastive_options* options;
  const global_contrastive_state* state;
  const std::vector<index>* items;
  global_contrastive_note* found; // one per anchor
  double gamma;
  bool relative; // u is made of s − s⁺, and not of s

  template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>& row) const {
    using V = pack<T>;
    const auto batch = static_cast<index>(items->size());
    const auto item =
        static_cast<std::size_t>((*items)[static_cast<std::size_t>(row.anchor % batch)]);
    const double tau = state->temperature[item], before = state->log_u[item];
    const double positive = chosen_scores<T>(row, belonging{}).sum;
    const auto count = static_cast<double>((relative ? 1 : 2) * (batch - 1));
    const chosen_images<T> images(row, rivalling{}, 1 / tau);

    const double log_g = images.log() - std::log(count) - (relative ? positive / tau : 0);
    const double fresh = before == -std::numeric_limits<double>::infinity() ? 1 : gamma;
    const double kept = fresh == 1 ? 0 : (1 - fresh) * std::exp(before - log_g);
    const double mass = 1 / (fresh + kept); // g/u = Σ p
    const V of_negative = images.factor(mass);
    const V of_positive(static_cast<T>(relative ? -mass : -1));
    lane_sums<T, 1> along;
    for (index j = 0; j < row.size; j += static_cast<index>(lanes<T>)) {
      const V s = V::load(row.scores + j), relation = V::load(row.relation + j);
      const V slope = select(relation > V(0), of_positive,
                             select(relation < V(0), images.images(s) * of_negative, V(0)));
      along.some[0] += select(slope == V(0), V(0), slope * s);
      along.count_pack();
      if constexpr (Gradient)
        slope.store(row.scores + j);
    }
    const double value = along.total(0), offset = relative ? 0 : positive;
    const double log_u = log_of_sum(std::log1p(-fresh) + before, std::log(fresh) + log_g);
    const double rho = options->learn_temperature ? options->rho : 0;
    found[row.anchor] = {log_u, log_u + rho - (value + offset) / tau, tau * (log_u + rho) - offset};
    return {value};
  }
};

/// One direction of a call, with the checks of every loss of anchors.
template <class T>
class global_contrastive_pass : public anchor_loss<global_contrastive_pass<T>, T> {
public:
  static constexpr const char* name = "global_contrastive";
  explicit global_contrastive_pass(const global_contrastive_formula& formula) : formula_(formula) {}
  const global_contrastive_options& settings() const { return *formula_.options; }
  const global_contrastive_formula& formula() const { return formula_; }

private:
  global_contrastive_formula formula_;
};

} // namespace core

/// The global contrastive loss: each anchor i is to be set apart from all of the training set, not
/// only from the batch. A batch of b items has 2b anchors, each with one positive s⁺ = s(i, i⁺) and
/// with m negatives s_j in the batch, and each item has a state (u, τ, v). The objectives, over all
/// n items and all their negatives z,
///
///   GCL    (1/n) Σ_i τ log mean_z e^{h_z/τ},  h_z = s_z − s⁺
///   RGCL   (1/n) Σ_i (τ_i log mean_z e^{h_z/τ_i} + τ_i ρ),  τ_i ≥ least_temperature
///
/// are descended by SogCLR (fixed temperatures) and iSogCLR (`learn_temperature`). For each anchor,
///
///   two views    loss(x, items, state, d_x): x has 2b rows, all first views, then all second; the
///                negatives are both views of the other items, m = 2(b − 1);
///                g = mean_j e^{s_j/τ}, p_j = e^{s_j/τ}/(m u),
///                value −s⁺ + Σ_j p_j s_j, slopes −1 and p_j;  G = log u + ρ − Σ_j p_j s_j/τ
///   two kinds    loss(x, y, items, state_x, state_y, d_x, d_y), say of images and texts: x_i and
///                y_i belong together, anchors of x are compared with y and the other way round,
///                m = b − 1;  g = mean_j e^{h_j/τ}, p_j = e^{h_j/τ}/(m u),
///                value Σ_j p_j h_j, slopes −Σ_j p_j and p_j;      G = log u + ρ − Σ_j p_j h_j/τ
///
/// where u = (1 − γ) u_old + γ g, but g for an item that has not been seen yet.
///
/// The value is the mean of those (or their sum) and a SURROGATE: with p taken for constants, its
/// derivatives are the gradients, which estimate those of the objective. The number itself is no
/// measure of anything. Where call.objective is given, the estimate of the objective goes there, by
/// the same reduction: τ log u − s⁺, or τ log u between two kinds, and τ ρ for learnt temperatures.
/// If γ = 1 or all items are new, that is the objective on the batch, and the gradients are its.
///
/// A call with gradients ends with the new states, all made from the old ones: u (the mean of both
/// views' u; their G, too, is averaged), and for learnt temperatures v ← (1 − β) v + β G,
/// τ ← τ − η v, between its bounds. Of an item that is several times in a batch the last one stays
/// (to each other they are negatives). A call without gradients leaves the states as they are, and
/// so does one that throws.
///
/// A NaN or an infinity makes the value and the gradients of what is compared with it NaN; an item
/// whose new numbers would not be finite keeps its state. States and their arithmetic are doubles;
/// u is kept as its logarithm, which does not overflow for small τ (1/τ is a T all the same).
/// b = 0: value 0. Same bits for any number of threads. Shapes, special values and memory: see
/// anchor_loss; items: b, of any integral type. Throws std::invalid_argument for b = 1, an item
/// that the state has not, states that make no sense, the same object as both states, options out
/// of range.
///
/// Elsewhere: LibAUC's loss of views, and the authors', are the sum of both sides, twice this one;
/// LibAUC's of images and texts is b − 1 times it. Both start with γ g, and not g, for new items in
/// a batch with others that are not; and u is kept above a small number. Temperatures that are
/// used: 0.1 (0.05 to 0.7, ρ = 0.3) for views; 0.01 (0.005 to 0.05, ρ = 6) for images and texts.
///
/// Source: Yuan et al., "Provable stochastic optimization for global contrastive learning", 2022
/// (SogCLR); Qiu et al., "Not all semantics are created equal", 2023 (iSogCLR, RGCL).
template <class T> class global_contrastive {
public:
  using value_type = T;
  using options = global_contrastive_options;
  using state_type = global_contrastive_state;
  using call_type = global_contrastive_call<T>;
  static constexpr const char* name = "global_contrastive";

  global_contrastive() : global_contrastive(options{}) {}
  explicit global_contrastive(const options& o) : options_(o) {
    const auto share = [](const char* what, double x) {
      core::require(x > 0 && x <= 1, name, what, x, "a number above 0, 1 at the most");
    };
    share("gamma", o.gamma.last);
    core::require(o.gamma.epochs >= 0, name, "epochs of gamma", o.gamma.epochs, "0 or more");
    core::finite(name, "rho", o.rho);
    core::require(o.rate >= 0 && std::isfinite(o.rate), name, "rate", o.rate,
                  "a finite number, not negative");
    share("beta", o.beta);
    core::require(o.most_slope > 0, name, "most_slope", o.most_slope, "a number above 0");
    core::positive(name, "least_temperature", o.least_temperature);
    core::require(o.most_temperature >= o.least_temperature && std::isfinite(o.most_temperature),
                  name, "most_temperature", o.most_temperature,
                  "a finite number, not below least_temperature");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  /// Two views of each item.
  template <class X, core::labels_like I>
  requires core::scores_like<X, T> T operator()(X&& x, I&& items, const state_type& state,
                                                const call_type& call = {}) const {
    batch of(*this, items, core::as_matrix(x).rows, 2, call);
    of.add(state, false);
    const T value = of.pass(0).views(x, 2, of.anchors(false));
    of.report();
    return value;
  }
  template <class X, core::labels_like I, class DX>
  requires core::scores_like<X, T> && core::gradient_like<DX, T> T
  operator()(X&& x, I&& items, state_type& state, DX&& d_x, const call_type& call = {}) const {
    batch of(*this, items, core::as_matrix(x).rows, 2, call);
    of.add(state, false);
    const T value = of.pass(0).views(x, 2, d_x, of.anchors(false));
    of.report();
    of.update(state, 0);
    return value;
  }

  /// Two kinds of each item.
  template <class X, class Y, core::labels_like I>
  requires core::scores_like<X, T> && core::scores_like<Y, T>
      T operator()(X&& x, Y&& y, I&& items, const state_type& state_x, const state_type& state_y,
                   const call_type& call = {}) const {
    batch of(*this, items, core::as_matrix(x).rows, 1, call);
    check_partners(core::as_matrix(y).rows, core::as_matrix(x).rows);
    of.add(state_x, true);
    of.add(state_y, true);
    const double one = static_cast<double>(of.pass(0).pairs(x, y, of.anchors(false)));
    const double other = static_cast<double>(of.pass(1).pairs(y, x, of.anchors(false)));
    of.report();
    return static_cast<T>(one + other);
  }
  template <class X, class Y, core::labels_like I, class DX, class DY>
  requires core::scores_like<X, T> && core::scores_like<Y, T> && core::gradient_like<DX, T> &&
      core::gradient_like<DY, T>
          T operator()(X&& x, Y&& y, I&& items, state_type& state_x, state_type& state_y, DX&& d_x,
                       DY&& d_y, const call_type& call = {}) const {
    batch of(*this, items, core::as_matrix(x).rows, 1, call);
    check_partners(core::as_matrix(y).rows, core::as_matrix(x).rows);
    if (&state_x == &state_y)
      core::fail(name, "state_y", "state_x itself", "a state of its own");
    of.add(state_x, true);
    of.add(state_y, true);
    const double one = static_cast<double>(of.pass(0).pairs(x, y, d_x, d_y, of.anchors(false)));
    const double other = static_cast<double>(of.pass(1).pairs(y, x, d_y, d_x, of.anchors(true)));
    of.report();
    of.update(state_x, 0);
    of.update(state_y, 1);
    return static_cast<T>(one + other);
  }

private:
  static void check_partners(index got, index expected) {
    if (got != expected)
      core::fail(name, "rows of y", core::to_text(got), core::to_text(expected));
  }

  /// What one call needs besides embeddings.
  class batch {
  public:
    template <class I>
    batch(const global_contrastive& loss, const I& items, index rows, index views,
          const call_type& call)
        : options_(loss.options_), call_(call), views_(views) {
      core::require(rows % views == 0, name, "rows of x", rows, "an even number");
      core::require(rows != views, name, "items of the batch", index(1), "0, or 2 and more");
      core::require(call.epoch >= 0, name, "epoch", call.epoch, "0 or more");
      const auto view = core::as_vector(items);
      if (view.size != rows / views)
        core::fail(name, "size of items", core::to_text(view.size), core::to_text(rows / views));
      core::require_memory(name, "items", view.data, view.size);
      for (index i = 0; i < view.size; ++i)
        items_.push_back(static_cast<index>(view[i]));
      notes_.resize(2 * items_.size()); // anchors: two of each item
      passes_.reserve(2);
    }
    /// A direction, whose anchors' items have this state.
    void add(const state_type& state, bool relative) {
      check(state);
      auto* const found = notes_.data() + passes_.size() * items_.size();
      const double gamma = options_.gamma.at(call_.epoch);
      passes_.emplace_back(
          core::global_contrastive_formula{{}, &options_, &state, &items_, found, gamma, relative});
    }
    const core::global_contrastive_pass<T>& pass(std::size_t k) const { return passes_[k]; }
    anchor_options<T> anchors(bool again) const {
      anchor_options<T> result;
      result.scale = call_.scale;
      result.normaliser = static_cast<double>(notes_.size());
      result.accumulate = call_.accumulate || again;
      result.run_on = call_.run_on;
      result.memory = call_.memory;
      return result;
    }
    void report() const {
      if (!call_.objective)
        return;
      core::exact_sum sum;
      for (const auto& note : notes_)
        sum.add(note.objective);
      const bool mean = options_.reduction == reduction::mean && !notes_.empty();
      *call_.objective = sum.value() / (mean ? static_cast<double>(notes_.size()) : 1);
    }
    /// The last of each item; from there back, the others find it done.
    void update(state_type& state, std::size_t pass) const {
      std::unordered_set<index> done;
      for (std::size_t i = items_.size(); i-- > 0;) {
        core::global_contrastive_note note = notes_[pass * items_.size() + i];
        if (views_ == 2) {
          const auto& other = notes_[items_.size() + i];
          note.log_u = core::log_of_sum(note.log_u, other.log_u) - std::numbers::ln2;
          note.slope = (note.slope + other.slope) / 2;
        }
        if (note.finite() && done.insert(items_[i]).second)
          write(state, static_cast<std::size_t>(items_[i]), note);
      }
    }

  private:
    void write(state_type& state, std::size_t item,
               const core::global_contrastive_note& note) const {
      state.log_u[item] = note.log_u;
      if (!options_.learn_temperature)
        return;
      const double slope = std::clamp(note.slope, -options_.most_slope, options_.most_slope);
      double& v = state.velocity[item];
      v += options_.beta * (slope - v);
      double& tau = state.temperature[item];
      tau = std::clamp(tau - options_.rate * v, options_.least_temperature,
                       options_.most_temperature);
    }
    void check(const state_type& state) const {
      const auto same = [&](const char* what, std::size_t n) {
        if (n != state.log_u.size())
          core::fail(name, what, std::to_string(n), std::to_string(state.log_u.size()));
      };
      same("size of the state's temperature", state.temperature.size());
      same("size of the state's velocity", state.velocity.size());
      for (std::size_t i = 0; i < items_.size(); ++i) {
        const index item = items_[i];
        if (item < 0 || item >= state.size())
          core::fail_at(name, "items", static_cast<index>(i), core::to_text(item),
                        "0 or more and less than " + core::to_text(state.size()));
        const auto at = static_cast<std::size_t>(item);
        const auto require = [&](bool holds, const char* what, double got, const char* expected) {
          if (!holds)
            core::fail_at(name, what, item, core::to_text(got), expected);
        };
        const double log_u = state.log_u[at], tau = state.temperature[at];
        require(log_u < std::numeric_limits<double>::infinity(), "log_u", log_u,
                "a finite number, or -inf");
        require(tau > 0 && std::isfinite(tau), "temperature", tau, "a finite number above 0");
        require(std::isfinite(state.velocity[at]), "velocity", state.velocity[at],
                "a finite number");
      }
    }

    const options& options_;
    const call_type& call_;
    index views_;
    std::vector<index> items_;
    std::vector<core::global_contrastive_note> notes_;
    std::vector<core::global_contrastive_pass<T>> passes_;
  };

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
