// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "core/anchor_loss.hpp"
#include "core/anchor_sums.hpp"
#include "core/random.hpp"
#include "lifted_structure.hpp"
#include "multi_similarity.hpp"
#include "pair_margin.hpp"
#include "proxy.hpp"
#include "similarity.hpp"

namespace perdita::inline PERDITA_ABI {

/// Which rows are mixed: example k is share[k] of row first[k] and 1 − share[k] of row second[k].
template <class T> struct mixed_examples {
  std::vector<index> first, second;
  std::vector<T> share; ///< λ, in [0, 1]
  index size() const { return static_cast<index>(first.size()); }
};

/// n pairs of rows of different labels, each row as likely to be the first and each other row of
/// another label the second, with λ ~ Beta(2, 2), the median of three uniform numbers. Example k
/// depends on the seed, k and the labels alone. None where all labels are equal.
template <class T, core::labels_like L>
mixed_examples<T> draw_mixed_examples(const L& labels, index n, std::uint64_t seed) {
  const auto label = core::as_vector(labels);
  const index rows = label.size;
  core::require_memory("draw_mixed_examples", "labels", label.data, rows);
  std::vector<index> order; // by labels: those of one lie together
  for (index r = 0; r < rows; ++r)
    order.push_back(r);
  const auto less = [&](index a, index b) { return label[a] < label[b]; };
  std::stable_sort(order.begin(), order.end(), less);
  mixed_examples<T> result;
  for (index k = 0; k < n && rows > 0 && less(order.front(), order.back()); ++k) {
    const auto stream = core::split_mix(core::split_mix(seed, 0), static_cast<std::uint64_t>(k));
    const auto below = [&](index most, std::uint64_t at) {
      return static_cast<index>(core::uniform_at(stream, at) * static_cast<double>(most));
    };
    const index first = below(rows, 0);
    const auto [from, to] = std::equal_range(order.begin(), order.end(), first, less);
    index other = below(rows - (to - from), 1);
    other += other < from - order.begin() ? 0 : to - from;
    double u[3];
    for (std::uint64_t i = 0; i < 3; ++i)
      u[i] = core::uniform_at(stream, 2 + i);
    std::sort(u, u + 3);
    result.first.push_back(first);
    result.second.push_back(order[static_cast<std::size_t>(other)]);
    result.share.push_back(static_cast<T>(u[1]));
  }
  return result;
}

struct metrix_options {
  double weight = 0.4;    ///< w ≥ 0, of the loss of mixed examples
  bool own = true;        ///< an anchor is compared with what it is mixed into itself
  bool strangers = false; ///< and with mixed examples of other classes alone: negatives, then
};

namespace core {

/// a₊ log(1 + Σ y e^{−r₊(s − b₊)}) + a₋ log(1 + Σ (1 − y) e^{r₋(s − b₋)})
struct mixed_images : anchor_formula {
  struct side {
    double rate, base, factor;
  };
  side own, others;

  mixed_images(const side& positives, const side& negatives) : own(positives), others(negatives) {}

  template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>& row) const {
    using V = pack<T>;
    const chosen_images<T> positive(row, partly_belonging{}, -own.rate),
        negative(row, partly_rivalling{}, others.rate);
    const scalar_odds far(positive.log() + own.rate * own.base),
        near(negative.log() - others.rate * others.base);
    if constexpr (Gradient) {
      const V of_positive = positive.factor(-own.factor * own.rate * far.miss);
      const V of_negative = negative.factor(others.factor * others.rate * near.miss);
      put_slopes(
          row, [&](const V& x, const V& relation) __attribute__((always_inline)) {
            const V mine = partly_belonging{}.weight(relation);
            const V rest = partly_rivalling{}.weight(relation);
            return select(mine == V(0), V(0), mine * positive.images(x) * of_positive) +
                   select(rest == V(0), V(0), rest * negative.images(x) * of_negative);
          });
    }
    return {own.factor * far.surprise + others.factor * near.surprise};
  }
};

/// y h(D − at₀) + (1 − y) h(at₁ − D), h a hinge or half its square.
struct mixed_hinges : anchor_formula {
  static constexpr bool distances = true;
  static constexpr index notes = 2; ///< how many terms are not 0, of either kind

  double at[2];
  bool squared, apart;
  bool takes_notes() const { return apart; }

  explicit mixed_hinges(const pair_margin_options& o)
      : at{o.positive_margin, o.negative_margin}, squared(o.squared),
        apart(o.mean == pair_mean::nonzero && o.reduction == reduction::mean) {}

  template <class T> void note(const anchor_row<T>& row, double* to) const {
    lane_sums<T, 2> sums;
    for_hinges(
        row, [&](index, const pack<T>&, const auto& h) __attribute__((always_inline)) {
          for (int k = 0; k < 2; ++k)
            sums.some[k] += select(h[k].weight * h[k].miss > pack<T>(0), pack<T>(1), pack<T>(0));
          sums.count_pack();
        });
    to[0] = sums.total(0);
    to[1] = sums.total(1);
  }

  template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>& row) const {
    using V = pack<T>;
    if (spoilt<Gradient>(row))
      return spoilt_outcome(count_of(row, compared{}));
    double by[2];
    for (int k = 0; k < 2; ++k)
      by[k] = !apart ? 1 : row.total[k] > 0 ? 1 / row.total[k] : 0;
    const V own(static_cast<T>(by[0])), other(static_cast<T>(by[1]));
    lane_sums<T, 3> sums;
    for_hinges(
        row, [&](index j, const V& d, const auto& h) __attribute__((always_inline)) {
          V steep[2];
          for (int k = 0; k < 2; ++k) {
            const V miss = h[k].miss, half = squared ? miss * miss * V(T(0.5)) : miss;
            sums.some[k] += h[k].weight * half;
            steep[k] = h[k].weight * (squared ? miss : select(miss > V(0), V(1), V(0)));
          }
          sums.some[2] += select(compared{}(V::load(row.relation + j)), V(1), V(0));
          sums.count_pack();
          if constexpr (Gradient)
            slope_of_square(own * steep[0] - other * steep[1], d).store(row.scores + j);
        });
    anchor_outcome out;
    out.value = by[0] * sums.total(0) + by[1] * sums.total(1);
    out.terms = sums.total(2);
    out.counts = out.terms > 0;
    return out;
  }

private:
  template <class T> struct hinge { pack<T> weight, miss; };
  template <class T, class F> PERDITA_INLINE void for_hinges(const anchor_row<T>& row, F f) const {
    using V = pack<T>;
    const V near(static_cast<T>(at[0])), far(static_cast<T>(at[1]));
    for (index j = 0; j < row.size; j += static_cast<index>(lanes<T>)) {
      const V d = sqrt(V::load(row.scores + j)), relation = V::load(row.relation + j);
      // A distance that is not compared may be anything: no weight makes NaN 0.
      const V known = select(relation == V(0), V(0), d);
      const hinge<T> h[2] = {{partly_belonging{}.weight(relation), max(known - near, V(0))},
                             {partly_rivalling{}.weight(relation), max(far - known, V(0))}};
      f(j, d, h);
    }
  }
};

/// [log Σ y e^D + log Σ (1 − y) e^{m − D}]₊
struct mixed_lift : anchor_formula {
  static constexpr bool distances = true;
  double margin;

  explicit mixed_lift(double m) : margin(m) {}

  template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>& row) const {
    using V = pack<T>;
    if (spoilt<Gradient>(row))
      return spoilt_outcome();
    take_roots(row);
    const chosen_images<T> positive(row, partly_belonging{}, 1),
        negative(row, partly_rivalling{}, -1);
    const double level = positive.log() + (margin + negative.log());
    if constexpr (Gradient) {
      const V pull = positive.factor(level > 0 ? 1 : 0), push = negative.factor(level > 0 ? -1 : 0);
      for (index j = 0; j < row.size; j += static_cast<index>(lanes<T>)) {
        const V d = V::load(row.scores + j), relation = V::load(row.relation + j);
        const V mine = partly_belonging{}.weight(relation);
        const V rest = partly_rivalling{}.weight(relation);
        const V slope = select(mine == V(0), V(0), mine * positive.images(d) * pull) +
                        select(rest == V(0), V(0), rest * negative.images(d) * push);
        slope_of_square(slope, d).store(row.scores + j);
      }
    }
    return {level <= 0 ? 0 : level, !positive.none() && !negative.none()};
  }
};

/// log Σ (1 − y) e^{r s}, or log Σ e^{r s}, − log Σ y e^{r s}
struct mixed_neighbours : anchor_formula {
  double rate;
  bool all;

  mixed_neighbours(double r, bool of_all) : rate(r), all(of_all) {}

  template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>& row) const {
    return all ? against<Gradient>(row, compared{}) : against<Gradient>(row, partly_rivalling{});
  }

private:
  template <bool Gradient, class T, class Rivals>
  anchor_outcome against(const anchor_row<T>& row, Rivals rivals) const {
    using V = pack<T>;
    const chosen_images<T> positive(row, partly_belonging{}, rate), rival(row, rivals, rate);
    const double share = rival.none() ? 0 : rate;
    if constexpr (Gradient) {
      const V pull = positive.factor(-share), push = rival.factor(share);
      put_slopes(
          row, [&](const V& x, const V& relation) __attribute__((always_inline)) {
            const V mine = partly_belonging{}.weight(relation);
            V rest(1);
            if constexpr (requires { rivals.weight(relation); })
              rest = rivals.weight(relation);
            return select(mine == V(0), V(0), mine * positive.images(x) * pull) +
                   select(rest == V(0), V(0), rest * rival.images(x) * push);
          });
    }
    const double apart = static_cast<double>(rival.top()) - static_cast<double>(positive.top());
    return {rival.none() ? 0 : apart + (rival.log_above() - positive.log_above()),
            !positive.none()};
  }
};

/// A formula as a loss of its own.
template <class T, class Formula> class mixed_loss : public anchor_loss<mixed_loss<T, Formula>, T> {
public:
  static constexpr const char* name = "metrix";
  struct options {
    bool normalise;
    perdita::reduction reduction;
  };
  mixed_loss(const Formula& f, const options& o, bool mean)
      : formula_(f), options_(o), mean_(mean) {}
  const options& settings() const { return options_; }

private:
  friend anchor_access;
  const Formula& formula() const { return formula_; }
  void set_extra(anchor_job<T>& job) const { job.mean = mean_; }

  Formula formula_;
  options options_;
  bool mean_;
};

} // namespace core

/// What a loss of mixed examples is made of; specialise it for a loss of your own:
///
///   proxies      whether the loss is called with proxies, which are its anchors
///   normalise(loss)               whether unit vectors are compared, and so mixed
///   make(loss)                    a core::mixed_loss
///   make(loss, p, all)            the same with proxies, p of all having part of a mixed example
///   check(loss)                   where there is one: throws at options that have no such form
///   call(loss, call, arguments...) where there is one: the clean loss, which has no call operator
///                                 for embeddings; mixed examples are its anchors, then, and
///                                 proxies what they are compared with
template <class Loss> struct mixed_form;

template <class T> struct mixed_form<multi_similarity<T>> {
  static constexpr bool proxies = false;
  static bool normalise(const multi_similarity<T>& loss) { return loss.settings().normalise; }
  static auto make(const multi_similarity<T>& loss) {
    const auto& o = loss.settings();
    const core::mixed_images f({o.alpha, o.base, 1 / o.alpha}, {o.beta, o.base, 1 / o.beta});
    return core::mixed_loss<T, core::mixed_images>(f, {o.normalise, o.reduction},
                                                   o.reduction == reduction::mean);
  }
};
template <class T> struct mixed_form<pair_margin<T>> {
  static constexpr bool proxies = false;
  static bool normalise(const pair_margin<T>& loss) { return loss.settings().normalise; }
  static auto make(const pair_margin<T>& loss) {
    const auto& o = loss.settings();
    const core::mixed_hinges f(o);
    return core::mixed_loss<T, core::mixed_hinges>(f, {o.normalise, o.reduction},
                                                   o.reduction == reduction::mean && !f.apart);
  }
};
template <class T> struct mixed_form<lifted_structure<T>> {
  static constexpr bool proxies = false;
  static void check(const lifted_structure<T>& loss) {
    if (loss.settings().terms != lifted_terms::anchors)
      core::fail("metrix", "terms of lifted_structure", "pairs",
                 "anchors, as a term of a pair is none of mixed examples");
  }
  static bool normalise(const lifted_structure<T>& loss) { return loss.settings().normalise; }
  static auto make(const lifted_structure<T>& loss) {
    const auto& o = loss.settings();
    return core::mixed_loss<T, core::mixed_lift>(
        core::mixed_lift(o.margin), {o.normalise, o.reduction}, o.reduction == reduction::mean);
  }
};
template <class T> struct mixed_form<proxy_nca<T>> {
  static constexpr bool proxies = true;
  static bool normalise(const proxy_nca<T>&) { return true; }
  static auto make(const proxy_nca<T>& loss) {
    const auto& o = loss.settings();
    return core::mixed_loss<T, core::mixed_neighbours>(
        core::mixed_neighbours(2 * static_cast<double>(o.scale), o.all_proxies),
        {true, o.reduction}, o.reduction == reduction::mean);
  }
  template <class... Arguments>
  static T call(const proxy_nca<T>& loss, const embedding_options<T>& call,
                const Arguments&... arguments) {
    return similarity<proxy_nca<T>>(loss)(
        arguments...,
        call_options<T>{.scale = call.scale, .accumulate = call.accumulate, .run_on = call.run_on});
  }
};
template <class T> struct mixed_form<proxy_anchor<T>> {
  static constexpr bool proxies = true;
  static bool normalise(const proxy_anchor<T>&) { return true; }
  static auto make(const proxy_anchor<T>& loss, double with_parts, double all) {
    const auto& o = loss.settings();
    const core::mixed_images f({o.alpha, o.margin, with_parts > 0 ? 1 / with_parts : 0},
                               {o.alpha, -o.margin, 1 / all});
    return core::mixed_loss<T, core::mixed_images>(f, {true, reduction::sum}, false);
  }
};

namespace core {

/// Mixed examples of x, and their gradient on its way to that of x.
template <class T> class mixture {
public:
  mixture(const matrix_view<const T>& x, const mixed_examples<T>& of, bool normalise)
      : of_(of), rows_(x.rows), cols_(x.cols), normalise_(normalise), factor_(at(x.rows, 1), 1),
        unit_(at(x.rows, x.cols)), mixed_(at(of.size(), x.cols)), slopes_(mixed_.size()) {
    std::vector<T> copy(static_cast<std::size_t>(cols_));
    for (index r = 0; r < rows_; ++r) {
      for (index j = 0; j < cols_; ++j)
        copy[at(j, 1)] = x(r, j);
      if (normalise_)
        factor_[at(r, 1)] = inverse_norm(copy.data(), cols_);
      for (index j = 0; j < cols_; ++j)
        unit_[at(r, cols_) + at(j, 1)] = factor_[at(r, 1)] * static_cast<double>(copy[at(j, 1)]);
    }
    for (index k = 0; k < of_.size(); ++k)
      for_both(k, [&](std::size_t row, double share) {
        for (std::size_t j = 0; j < copy.size(); ++j)
          mixed_[at(k, cols_) + j] += share * unit_[row * copy.size() + j];
      });
    rounded_.assign(mixed_.begin(), mixed_.end());
  }
  matrix_view<const T> examples() const { return {rounded_.data(), of_.size(), cols_}; }
  matrix_view<T> slopes() { return {slopes_.data(), of_.size(), cols_}; }

  /// Adds the slopes of x to d_x.
  void add_to(const matrix_view<T>& d_x) const {
    const auto width = static_cast<std::size_t>(cols_);
    std::vector<double> pull(unit_.size());
    std::vector<unsigned char> mixed(static_cast<std::size_t>(rows_));
    for (index k = 0; k < of_.size(); ++k)
      for_both(k, [&](std::size_t row, double share) {
        mixed[row] = 1;
        for (std::size_t j = 0; j < width; ++j)
          pull[row * width + j] += share * static_cast<double>(slopes_[at(k, cols_) + j]);
      });
    for (index r = 0; r < rows_; ++r) {
      if (!mixed[at(r, 1)])
        continue;
      const double* g = &pull[at(r, cols_)];
      if (std::all_of(g, g + width, [](double slope) { return slope == 0; }))
        continue; // nothing depends on it, whatever it is
      const double* u = &unit_[at(r, cols_)];
      double along = 0;
      for (std::size_t j = 0; normalise_ && j < width; ++j)
        along += g[j] * u[j];
      for (std::size_t j = 0; j < width; ++j)
        d_x(r, static_cast<index>(j)) += static_cast<T>(factor_[at(r, 1)] * (g[j] - along * u[j]));
    }
  }

private:
  static std::size_t at(index r, index cols) { return static_cast<std::size_t>(r * cols); }
  /// f(row, its part) of both rows of example k.
  template <class F> void for_both(index k, F f) const {
    const auto share = static_cast<double>(of_.share[at(k, 1)]);
    f(at(of_.first[at(k, 1)], 1), share);
    f(at(of_.second[at(k, 1)], 1), 1 - share);
  }

  const mixed_examples<T>& of_;
  index rows_, cols_;
  bool normalise_;
  std::vector<double> factor_, unit_, mixed_;
  std::vector<T> rounded_, slopes_;
};

} // namespace core

/// Metrix: to a loss of anchors or of proxies it adds w times the same loss of mixed examples,
///
///   v_k = λ x̂_i + (1 − λ) x̂_j,  λ = share[k], i = first[k], j = second[k]
///
/// (of x as it is, where the loss does not normalise), whose labels are interpolated: for an anchor
/// a, y_k is λ if i is of its class, plus 1 − λ if j is. v_k is positive by y_k and negative by
/// 1 − y_k:
///
///   multi_similarity   (1/α) log(1 + Σ_k y_k e^{−α(s_k − λ₀)})
///                      + (1/β) log(1 + Σ_k (1 − y_k) e^{β(s_k − λ₀)})
///
///   pair_margin        Σ_k y_k h(D_k − m₊) + (1 − y_k) h(m₋ − D_k)
///
///   lifted_structure   [log Σ_k y_k e^{D_k} + log Σ_k (1 − y_k) e^{m − D_k}]₊, where its terms
///                      are of anchors; pairs are refused. What is the anchor itself (λ = 1) is
///                      pulled by rounding alone, if `own` does not leave it out
///
///   proxy_anchor       (1/|P⁺|) Σ_p log(1 + Σ_k y_k e^{−α(s_k − δ)})
///                      + (1/|P|) Σ_p log(1 + Σ_k (1 − y_k) e^{α(s_k + δ)})
///
///   proxy_nca          log Σ_p (1 − y_kp) e^{2κ s_kp} − log Σ_p y_kp e^{2κ s_kp}, with all_proxies
///                      log Σ_p e^{2κ s_kp} instead of the first
///
/// s being ⟨â, v̂_k⟩, D = ‖â − v̂_k‖ and λ₀ the loss's base, each with its loss's reduction:
/// pair_mean::nonzero divides by the numbers of terms y h and (1 − y) h above 0, the other mean by
/// that of comparisons; P⁺ are the proxies with some part of an example. proxy_nca's anchors are
/// rows, so mixed examples are anchors here, each compared with all proxies, of which y_kp is that
/// of class p; the mean is over them. An anchor of lifted_structure counts if something is positive
/// and something negative. There is no mining among mixed examples. An anchor is compared with v_k
/// if i or j is of its class (with `strangers`, with all), and, unless `own` is false, also if it
/// is i or j itself: positive–negative pairs, and anchor–negative pairs. λ = 1 is example i, λ = 0
/// example j: the clean loss's terms.
///
/// The gradient goes through v_k: x̂_i has λ, x̂_j 1 − λ of its own; λ is a constant. All else is as
/// in the clean loss: calls with labels, and with proxies; weights, `values` and upstream gradients
/// of anchors count in both parts, a filter in the clean one alone. No examples: the clean loss. A
/// mixture that is 0 has cosines 0. A proxy loss's mixed part is computed in T; an example of a
/// row with ignore_index is left out. proxy_nca is called with embeddings as proxy_anchor is.
///
/// Memory: 16 bytes per number of x, and three copies of the mixed examples. Throws where a row of
/// an example does not exist, λ is not in [0, 1] or candidates (mixed examples, of proxy_nca
/// proxies) are more than 2^24, before anything is written.
///
/// Source: Venkataramanan et al., "It takes two to tango: mixup for deep metric learning", ICLR
/// 2022. (The contrastive loss's mixed terms are those of the authors' code; the others are
/// instances of the paper's general form, not compared with code.)
///
///   const perdita::metrix loss(perdita::multi_similarity<float>(), {.weight = 0.4});
///   const auto mixed = perdita::draw_mixed_examples<float>(labels, 256, seed++);
///   float value = loss(x, labels, mixed, d_x);
template <class Loss> class metrix {
public:
  using value_type = typename Loss::value_type;
  using options = metrix_options;
  static constexpr const char* name = "metrix";

  metrix() : metrix(Loss{}) {}
  explicit metrix(const Loss& loss, const metrix_options& o = {}) : loss_(loss), options_(o) {
    core::require(o.weight >= 0 && std::isfinite(o.weight), name, "weight", o.weight,
                  "a finite number, not negative");
    if constexpr (requires { form::check(loss); })
      form::check(loss);
  }
  const options& settings() const { return options_; }

private:
  using T = value_type;
  using form = mixed_form<Loss>;
  using X = matrix_view<const T>;
  using G = matrix_view<T>;

public:
  template <core::labels_like L>
  requires(!form::proxies) T operator()(X x, const L& labels, const mixed_examples<T>& mixed,
                                        const anchor_options<T>& call = {}) const {
    return run(x, labels, mixed, static_cast<G*>(nullptr), call);
  }
  template <core::labels_like L>
  requires(!form::proxies) T operator()(X x, const L& labels, const mixed_examples<T>& mixed, G d_x,
                                        const anchor_options<T>& call = {}) const {
    return run(x, labels, mixed, &d_x, call);
  }

  template <core::labels_like L>
  requires(form::proxies) T operator()(X x, X proxies, const L& labels,
                                       const mixed_examples<T>& mixed,
                                       const embedding_options<T>& call = {}) const {
    check(mixed, x.rows, proxies.rows);
    const T clean = call_clean(call, x, proxies, labels);
    return run_proxies(clean, x, proxies, labels, mixed, nullptr, nullptr, call);
  }
  template <core::labels_like L>
  requires(form::proxies) T operator()(X x, X proxies, const L& labels,
                                       const mixed_examples<T>& mixed, G d_x, G d_proxies,
                                       const embedding_options<T>& call = {}) const {
    check(mixed, x.rows, proxies.rows);
    const T clean = call_clean(call, x, proxies, labels, d_x, d_proxies);
    return run_proxies(clean, x, proxies, labels, mixed, &d_x, &d_proxies, call);
  }

private:
  static constexpr bool examples_are_anchors = requires { &form::template call<X, X>; };

  void check(const mixed_examples<T>& mixed, index rows, index proxies = 0) const {
    const core::embedding_checks<T> checks{name};
    if constexpr (examples_are_anchors)
      core::require(proxies <= index(1) << 24, name, "proxies", proxies, "2^24 at the most");
    else
      core::require(mixed.size() <= index(1) << 24, name, "mixed examples", mixed.size(),
                    "2^24 at the most");
    checks.size("second of the mixed examples", static_cast<index>(mixed.second.size()),
                mixed.size());
    checks.size("share of the mixed examples", static_cast<index>(mixed.share.size()),
                mixed.size());
    for (index k = 0; k < mixed.size(); ++k) {
      const auto at = static_cast<std::size_t>(k);
      const auto row = [&](const char* what, index r) {
        if (r < 0 || r >= rows)
          core::fail_at(name, what, k, core::to_text(r), "0 to " + core::to_text(rows - 1));
      };
      row("first", mixed.first[at]);
      row("second", mixed.second[at]);
      if (!(mixed.share[at] >= T(0) && mixed.share[at] <= T(1)))
        core::fail_at(name, "share", k, core::to_text(mixed.share[at]), "a number in [0, 1]");
    }
  }
  /// Relations of an anchor: of_class(r) says whether row r is of its class.
  template <class Skip, class Of>
  void relate(const mixed_examples<T>& mixed, T* relation, Skip left_out, Of of_class) const {
    for (std::size_t k = 0; k < mixed.first.size(); ++k) {
      const index i = mixed.first[k], j = mixed.second[k];
      const bool first = of_class(i), second = of_class(j);
      const T share = mixed.share[k], y = first && second ? T(1)
                                          : first         ? share
                                          : second        ? T(1) - share
                                                          : T(0);
      relation[k] = left_out(i, j) || !(first || second || options_.strangers) ? T(0)
                    : y > T(0)                                                 ? y
                                                                               : T(-1);
    }
  }
  /// Relations of example k to all proxies.
  template <class Skip, class Of>
  void relate_proxies(const mixed_examples<T>& mixed, index k, T* relation, index proxies,
                      Skip left_out, Of of) const {
    const auto at = static_cast<std::size_t>(k);
    const index i = mixed.first[at], j = mixed.second[at];
    std::fill_n(relation, proxies, left_out(i, j) ? T(0) : T(-1));
    if (left_out(i, j))
      return;
    const T share = mixed.share[at];
    const auto belong = [&](index r, T y) {
      if (y > T(0))
        relation[of(r)] = y;
    };
    belong(i, of(i) == of(j) ? T(1) : share);
    belong(j, of(i) == of(j) ? T(1) : T(1) - share);
  }
  template <class... Arguments>
  T call_clean(const embedding_options<T>& call, const Arguments&... arguments) const {
    if constexpr (examples_are_anchors)
      return form::call(loss_, call, arguments...);
    else
      return loss_(arguments..., call);
  }
  T total(T clean, T mixed) const {
    return static_cast<T>(static_cast<double>(clean) +
                          options_.weight * static_cast<double>(mixed));
  }

  template <class L>
  T run(const X& x, const L& labels, const mixed_examples<T>& mixed, G* d_x,
        const anchor_options<T>& call) const {
    check(mixed, x.rows);
    const T clean = d_x ? loss_(x, labels, *d_x, call) : loss_(x, labels, call);
    if (mixed.size() == 0 || options_.weight == 0)
      return clean;
    const auto label = core::as_vector(labels);
    const auto relation = [&](index anchor, T* to, index) {
      relate(
          mixed, to,
          [&](index i, index j) { return !options_.own && (i == anchor || j == anchor); },
          [&](index r) { return label[r] == label[anchor]; });
    };
    std::vector<T> values(static_cast<std::size_t>(call.values.size));
    anchor_options<T> again = call;
    again.filter = relation;
    again.scale = call.scale * static_cast<T>(options_.weight);
    again.accumulate = true;
    if (call.values.data)
      again.values = values;
    core::mixture<T> mixture(x, mixed, form::normalise(loss_));
    const auto loss = form::make(loss_);
    const T extra = d_x ? loss.pairs(x, mixture.examples(), *d_x, mixture.slopes(), again)
                        : loss.pairs(x, mixture.examples(), again);
    if (d_x)
      mixture.add_to(*d_x);
    for (index r = 0; r < call.values.size; ++r)
      call.values[r] = total(call.values[r], values[static_cast<std::size_t>(r)]);
    return total(clean, extra);
  }

  template <class L>
  T run_proxies(T clean, const X& x, const X& proxies, const L& labels,
                const mixed_examples<T>& mixed, G* d_x, G* d_proxies,
                const embedding_options<T>& call) const {
    if (mixed.size() == 0 || options_.weight == 0 || proxies.rows == 0)
      return clean;
    const auto label = core::as_vector(labels);
    const std::int64_t ignored = loss_.settings().ignore_index;
    const auto of = [&](index r) { return static_cast<std::int64_t>(label[r]); };
    const auto left_out = [&](index i, index j) { return of(i) == ignored || of(j) == ignored; };
    anchor_options<T> again;
    again.scale = call.scale * static_cast<T>(options_.weight);
    again.accumulate = true;
    again.run_on = call.run_on;
    core::mixture<T> mixture(x, mixed, true);
    const auto add = [&](const auto& loss, const X& a, const X& b, auto d_a, auto d_b) {
      return total(clean, d_x ? loss.pairs(a, b, d_a(), d_b(), again) : loss.pairs(a, b, again));
    };
    const auto d_examples = [&] { return mixture.slopes(); };
    const auto d_others = [&] { return *d_proxies; };
    T value;
    if constexpr (examples_are_anchors) {
      const auto relation = [&](index k, T* to, index n) {
        relate_proxies(mixed, k, to, n, left_out, of);
      };
      again.filter = relation;
      value = add(form::make(loss_), mixture.examples(), proxies, d_examples, d_others);
    } else {
      const auto relation = [&](index proxy, T* to, index) {
        relate(mixed, to, left_out, [&](index r) { return of(r) == proxy; });
      };
      again.filter = relation;
      std::vector<T> row(mixed.first.size());
      double with_parts = 0;
      for (index p = 0; p < proxies.rows; ++p) {
        relation(p, row.data(), mixed.size());
        with_parts += std::any_of(row.begin(), row.end(), [](T y) { return y > T(0); }) ? 1 : 0;
      }
      value = add(form::make(loss_, with_parts, static_cast<double>(proxies.rows)), proxies,
                  mixture.examples(), d_others, d_examples);
    }
    if (d_x)
      mixture.add_to(*d_x);
    return value;
  }

  Loss loss_;
  metrix_options options_;
};

} // namespace perdita::inline PERDITA_ABI
