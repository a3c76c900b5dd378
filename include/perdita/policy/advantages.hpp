// SPDX-License-Identifier: MIT
#pragma once

/// From rewards to the advantages of policy_gradient. All is computed in double, in one order;
/// std::invalid_argument before anything is written.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#include "../core/batch_call.hpp"
#include "kl_estimators.hpp"
#include "tokens.hpp"

namespace perdita::inline PERDITA_ABI::core {

template <class V>
concept real_vector =
    vector_like<V> && std::is_floating_point_v<std::remove_const_t<typename element_of<V>::type>>;
template <class M>
concept real_matrix =
    matrix_like<M> && std::is_floating_point_v<std::remove_const_t<typename element_of<M>::type>>;
template <class V>
concept real_output_vector = real_vector<V> && !std::is_const_v<typename element_of<V>::type>;
template <class M>
concept real_output_matrix = real_matrix<M> && !std::is_const_v<typename element_of<M>::type>;

template <class E> void put(E& to, double x) { to = static_cast<E>(x); }

/// All but count and equal is in `unit`s of the values, so that no square overflows or vanishes.
struct mean_and_spread {
  double unit = 1;              ///< what a value is multiplied by: a power of 2
  double mean = 0, squares = 0; ///< Σ (x − mean)²
  index count = 0;
  bool equal = true; ///< all values are
  /// Of the values that each(f) hands to f, three times. Equal values have no spread at all.
  template <class Each> static mean_and_spread of(const Each& each) {
    mean_and_spread result;
    exact_sum sum, squares;
    double first = 0, top = 0;
    each([&](double x) {
      first = result.count == 0 ? x : first;
      result.equal = result.equal && x == first;
      top = std::fabs(x) > top ? std::fabs(x) : top;
      ++result.count;
    });
    if (result.count == 0)
      return result;
    if (top > 0 && std::isfinite(top))
      result.unit = std::ldexp(1.0, std::clamp(-std::ilogb(top), -1022, 1022));
    each([&](double x) { sum.add(x * result.unit); });
    result.mean =
        result.equal ? first * result.unit : sum.value() / static_cast<double>(result.count);
    each([&](double x) { squares.add(result.off(x) * result.off(x)); });
    result.squares = squares.value();
    return result;
  }
  double off(double x) const { return x * unit - mean; }
  double deviation() const {
    return count > 1 ? std::sqrt(squares / static_cast<double>(count - 1)) : 0;
  }
};

} // namespace perdita::inline PERDITA_ABI::core

namespace perdita::inline PERDITA_ABI::policy {

/// Which completions answer the same prompt: each `size` of them in a row, or those of equal id
/// (integers, in any order).
struct groups {
  groups(index size) : size_(size) {}
  template <core::labels_like V> groups(V&& ids) : ids_(core::as_vector(ids)) {}

  /// f(members, their number) for each group of n completions, in the order of size or id.
  template <class F> void each(const char* name, index n, const F& f) const {
    const core::sequence_checks<double> checks{name};
    std::vector<index> order(static_cast<std::size_t>(n));
    std::iota(order.begin(), order.end(), index(0));
    if (!ids_.reader) {
      core::require(size_ > 0 && n % size_ == 0, name, "groups", size_,
                    "a size above 0 that divides the number of rewards");
      for (index i = 0; i < n; i += size_)
        f(order.data() + i, size_);
      return;
    }
    checks.size("groups", ids_.cols, n, "as many ids as rewards");
    checks.memory("groups", ids_.data, n);
    const auto id = [&](index i) { return ids_.at(0, i); };
    std::stable_sort(order.begin(), order.end(), [&](index a, index b) { return id(a) < id(b); });
    for (index i = 0, end; i < n; i = end) {
      end = i + 1;
      while (end < n &&
             id(order[static_cast<std::size_t>(end)]) == id(order[static_cast<std::size_t>(i)]))
        ++end;
      f(order.data() + i, end - i);
    }
  }

private:
  index size_ = 0;
  core::integer_rows ids_;
};

/// What the difference to the group's mean is divided by, plus epsilon: nothing (Dr. GRPO), the
/// group's standard deviation, or the batch's; with n − 1.
enum class scaling { none, group, batch };

struct group_options {
  policy::scaling scaling = policy::scaling::group;
  double epsilon = 1e-4;  ///< 1e-4: TRL; 1e-6: verl
  bool keep_lone = false; ///< the advantage of a group of one: its reward (verl), not 0 (TRL)
};

struct group_report {
  index groups = 0;
  double without_spread = 0; ///< fraction of the groups whose rewards are all equal: no gradient
};

/// A = (r − mean of the group)/(deviation + ε); 0 in groups whose rewards are all equal. A NaN
/// makes NaN of its group (of the batch where the batch's deviation is asked for). May be in place.
/// Source: Shao et al., DeepSeekMath, 2024.
template <core::real_vector R, core::real_output_vector A>
group_report group_advantages(R&& rewards, const groups& of, A&& advantages,
                              const group_options& o = {}) {
  constexpr const char* name = "group_advantages";
  const auto r = core::as_vector(rewards);
  const auto out = core::as_vector(advantages);
  const core::sequence_checks<double> checks{name};
  checks.entries("advantages", out, r.size, "as many as rewards");
  checks.memory("rewards", r.data, r.size);
  core::not_negative(name, "epsilon", o.epsilon);
  core::require_enumerator(name, "scaling", o.scaling, policy::scaling::batch,
                           "none, group or batch");
  const auto reward = [&](index i) { return static_cast<double>(r[i]); };
  const auto of_batch = core::mean_and_spread::of([&](const auto& f) {
    for (index i = 0; i < r.size; ++i)
      f(reward(i));
  });
  group_report report;
  index flat = 0;
  of.each(name, r.size, [&](const index* member, index n) {
    const auto seen = core::mean_and_spread::of([&](const auto& f) {
      for (index k = 0; k < n; ++k)
        f(reward(member[k]));
    });
    ++report.groups;
    flat += seen.equal;
    const double unit = seen.unit, epsilon = o.epsilon * unit;
    const double deviation = o.scaling == scaling::none ? unit
                             : o.scaling == scaling::batch
                                 ? of_batch.deviation() * (unit / of_batch.unit) + epsilon
                                 : seen.deviation() + epsilon;
    const bool kept = n == 1 && o.keep_lone;
    for (index k = 0; k < n; ++k) {
      const double off = seen.off(reward(member[k]));
      const bool none = off == 0 && deviation == deviation;
      core::put(out[member[k]], kept ? reward(member[k]) : none ? 0 : off / deviation);
    }
  });
  if (report.groups > 0)
    report.without_spread = static_cast<double>(flat) / static_cast<double>(report.groups);
  return report;
}

/// A = r − mean of the others of the group = (r − mean of all) K/(K − 1). Groups of one are
/// refused: they have no baseline. May be in place. Source: Kool et al. 2019; Ahmadian et al.,
/// RLOO, 2024.
template <core::real_vector R, core::real_output_vector A>
group_report leave_one_out_advantages(R&& rewards, const groups& of, A&& advantages) {
  constexpr const char* name = "leave_one_out_advantages";
  const auto r = core::as_vector(rewards);
  const core::sequence_checks<double> checks{name};
  checks.memory("rewards", r.data, r.size);
  of.each(name, r.size, [](const index*, index n) {
    core::require(n > 1, name, "groups", n, "groups of two or more");
  });
  const auto report = group_advantages(rewards, of, advantages, {.scaling = scaling::none});
  const auto out = core::as_vector(advantages);
  of.each(name, r.size, [&](const index* member, index n) {
    for (index k = 0; k < n; ++k)
      core::put(out[member[k]], static_cast<double>(out[member[k]]) * static_cast<double>(n) /
                                    static_cast<double>(n - 1));
  });
  return report;
}

struct kl_penalty {
  double weight = 0.05; ///< ≥ 0
  kl_estimator estimator = kl_estimator::k1;

  void check(const char* name) const {
    core::not_negative(name, "weight", weight);
    core::require_enumerator(name, "estimator", estimator, kl_estimator::k3_plus,
                             "one of kl_estimator");
  }
};

namespace detail {
struct token_views {
  core::counted_tokens tokens;
  std::vector<std::int64_t> counts;
  const char* name;

  template <class M>
  token_views(const char* loss, const M& first, const token_mask& mask,
              const sequence_lengths& lengths)
      : tokens{mask, lengths, first.rows, first.cols}, counts(static_cast<std::size_t>(first.cols)),
        name(loss) {
    tokens.check(name);
  }
  template <class M> void same(const char* what, const M& m) const {
    const core::sequence_checks<double> checks{name};
    checks.size((std::string("rows of ") + what).c_str(), m.rows, tokens.rows,
                "as many as there are sequences");
    checks.size((std::string("columns of ") + what).c_str(), m.cols, tokens.cols,
                "as many as there are tokens");
    checks.memory(what, m.data, m.rows * m.cols);
  }
  template <class L, class Q> static double penalty_of(const kl_penalty& p, L l, Q q) {
    const double x = static_cast<double>(l) - static_cast<double>(q);
    return core::times_or_nan(p.weight, core::estimate_kl(p.estimator, x, 0, -x).value);
  }
};
/// Of tokens that count: more(i, t) less the penalty, and the score in the last; 0 in the others.
template <class L, class Q, class S, class R, class More>
void write_rewards(const char* name, const L& l, const Q& q, const S& scores, const R& rewards,
                   const kl_penalty& penalty, const core::counted_tokens& tokens,
                   const More& more) {
  token_views views(name, l, tokens.mask, tokens.lengths);
  views.same("the policy", l);
  views.same("reference", q);
  views.same("rewards", rewards);
  penalty.check(name);
  const core::sequence_checks<double> checks{name};
  checks.entries("scores", scores, l.rows, "as many as there are sequences");
  core::require_same_or_apart(name, rewards, l);
  core::require_same_or_apart(name, rewards, q);
  core::require_same_or_apart(name, rewards, core::as_column(scores));
  for (index i = 0; i < l.rows; ++i) {
    views.tokens.read(i, views.counts.data());
    double last = static_cast<double>(scores[i]);
    for (index t = l.cols; t-- > 0;) {
      double reward = 0;
      if (views.counts[static_cast<std::size_t>(t)]) {
        reward = last + more(i, t) - views.penalty_of(penalty, l(i, t), q(i, t));
        last = 0;
      }
      core::put(rewards(i, t), reward);
    }
  }
}
} // namespace detail

/// The rewards of PPO's tokens, which may be in place of `old` or `reference`: −weight · k(old −
/// ref) for each, and the sequence's score at its last token that counts (that of a sequence
/// without tokens is lost); 0 where none counts. As a reward, k1 has the right expected gradient.
template <core::real_matrix O, core::real_matrix F, core::real_vector S, core::real_output_matrix R>
void token_rewards(O&& old, F&& reference, S&& scores, R&& rewards, const kl_penalty& penalty = {},
                   const token_mask& mask = {}, const sequence_lengths& lengths = {}) {
  const auto l = core::as_matrix(old);
  detail::write_rewards("token_rewards", l, core::as_matrix(reference), core::as_vector(scores),
                        core::as_matrix(rewards), penalty, {mask, lengths, l.rows, l.cols},
                        [](index, index) { return 0; });
}

/// r − weight · Σ_t k(old − ref), RLOO's rewards of sequences. May be in place of the scores.
template <core::real_matrix O, core::real_matrix F, core::real_vector S, core::real_output_vector R>
void sequence_rewards(O&& old, F&& reference, S&& scores, R&& rewards,
                      const kl_penalty& penalty = {}, const token_mask& mask = {},
                      const sequence_lengths& lengths = {}) {
  constexpr const char* name = "sequence_rewards";
  const auto l = core::as_matrix(old);
  const auto q = core::as_matrix(reference);
  const auto score = core::as_vector(scores);
  const auto out = core::as_vector(rewards);
  detail::token_views views(name, l, mask, lengths);
  views.same("old", l);
  views.same("reference", q);
  penalty.check(name);
  const core::sequence_checks<double> checks{name};
  checks.entries("scores", score, l.rows, "as many as there are sequences");
  checks.entries("rewards", out, l.rows, "as many as there are sequences");
  core::require_same_or_apart(name, core::as_column(out), core::as_column(score));
  core::require_same_or_apart(name, core::as_column(out), l);
  core::require_same_or_apart(name, core::as_column(out), q);
  for (index i = 0; i < l.rows; ++i) {
    views.tokens.read(i, views.counts.data());
    core::exact_sum kl;
    for (index t = 0; t < l.cols; ++t)
      if (views.counts[static_cast<std::size_t>(t)])
        kl.add(views.penalty_of(penalty, l(i, t), q(i, t)));
    core::put(out[i], static_cast<double>(score[i]) - kl.value());
  }
}

struct gae_options {
  double gamma = 1, lambda = 0.95; ///< in [0, 1]
  /// The recursion goes from token to token that counts (verl). Otherwise it goes through all
  /// columns (TRL), where rewards and values of the padding are 0 or mean something.
  bool skip_masked = true;
};

/// Generalised advantage estimation: from the last token back,
///
///   δ_t = r_t + γ V_{t+1} − V_t,   A_t = δ_t + γ λ A_{t+1},   returns = A + V
///
/// both 0 where a token does not count. Each may be in place of rewards or values. Source: Schulman
/// et al., GAE, 2016.
template <core::real_matrix R, core::real_matrix V, core::real_output_matrix A,
          core::real_output_matrix G>
void generalised_advantages(R&& rewards, V&& values, A&& advantages, G&& returns,
                            const gae_options& o = {}, const token_mask& mask = {},
                            const sequence_lengths& lengths = {}) {
  constexpr const char* name = "generalised_advantages";
  const auto r = core::as_matrix(rewards);
  const auto v = core::as_matrix(values);
  const auto a = core::as_matrix(advantages);
  const auto g = core::as_matrix(returns);
  detail::token_views views(name, r, mask, lengths);
  views.same("rewards", r);
  views.same("values", v);
  views.same("advantages", a);
  views.same("returns", g);
  const core::extent outputs[] = {core::bytes_of(a), core::bytes_of(g)};
  core::require_apart(name, outputs, 1);
  core::require_same_or_apart(name, a, r);
  core::require_same_or_apart(name, a, v);
  core::require_same_or_apart(name, g, r);
  core::require_same_or_apart(name, g, v);
  core::require(o.gamma >= 0 && o.gamma <= 1, name, "gamma", o.gamma, "a number in [0, 1]");
  core::require(o.lambda >= 0 && o.lambda <= 1, name, "lambda", o.lambda, "a number in [0, 1]");
  for (index i = 0; i < r.rows; ++i) {
    views.tokens.read(i, views.counts.data());
    double next_value = 0, next = 0;
    for (index t = r.cols; t-- > 0;) {
      const bool counts = views.counts[static_cast<std::size_t>(t)] != 0;
      double advantage = 0, value = 0;
      if (counts || !o.skip_masked) {
        value = static_cast<double>(v(i, t));
        next =
            static_cast<double>(r(i, t)) + o.gamma * next_value - value + o.gamma * o.lambda * next;
        next_value = value;
        advantage = next;
      }
      core::put(a(i, t), counts ? advantage : 0);
      core::put(g(i, t), counts ? advantage + value : 0);
    }
  }
}

struct whitening_options {
  bool shift = true;     ///< to mean 0; otherwise the mean stays (TRL's rewards)
  double epsilon = 1e-8; ///< added to the variance
};

/// (A − mean)/√(var + ε) over the tokens that count, var with n − 1; the others become 0. In place.
/// Fewer than two tokens have no variance, and are refused.
template <core::real_output_matrix A>
void whiten(A&& advantages, const whitening_options& o = {}, const token_mask& mask = {},
            const sequence_lengths& lengths = {}) {
  constexpr const char* name = "whiten";
  const auto a = core::as_matrix(advantages);
  detail::token_views views(name, a, mask, lengths);
  views.same("advantages", a);
  core::not_negative(name, "epsilon", o.epsilon);
  const auto each = [&](const auto& f, const auto& other) {
    for (index i = 0; i < a.rows; ++i) {
      views.tokens.read(i, views.counts.data());
      for (index t = 0; t < a.cols; ++t)
        views.counts[static_cast<std::size_t>(t)] ? f(a(i, t)) : other(a(i, t));
    }
  };
  const auto seen = core::mean_and_spread::of(
      [&](const auto& f) { each([&](auto& x) { f(static_cast<double>(x)); }, [](auto&) {}); });
  core::require(seen.count > 1, name, "tokens that count", seen.count, "two or more");
  const double deviation = std::hypot(seen.deviation(), std::sqrt(o.epsilon) * seen.unit);
  each(
      [&](auto& x) {
        const double off = seen.off(static_cast<double>(x));
        core::put(x, (off == 0 ? 0 : off / deviation) + (o.shift ? 0 : seen.mean / seen.unit));
      },
      [](auto& x) { x = 0; });
}

} // namespace perdita::inline PERDITA_ABI::policy
