// SPDX-License-Identifier: MIT
#pragma once

/// The one loop of all policy-gradient losses.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../core/batch_call.hpp"
#include "batch.hpp"

namespace perdita::inline PERDITA_ABI::core {

template <class Term>
concept term_of_tokens = requires {
  requires Term::only_of_tokens;
};

/// A term that clips the log-ratios of tokens before their sum or mean is taken.
template <class Term>
concept limits_tokens = requires(const Term& t) {
  t.side(0.0, 0.0);
};

/// A call, checked.
template <class T> struct policy_job {
  static constexpr index inputs = 6;
  matrix_data<T> in[inputs]; // l, old, reference, sampler, advantages, entropies
  vector_view<const T> advantages;
  counted_tokens tokens;
  matrix_data<T, true> gradient, entropy_gradient;
  double share = 1; // of the sum over sequences
};

/// What a sequence adds up to.
struct policy_sums {
  double value = 0, ratio_excess = 0, squares = 0, kl = 0, entropy = 0;
  index tokens = 0, low = 0, high = 0, dropped = 0;
};

/// 1 over the number of sequences or tokens, or whatever takes its place.
template <class T>
double policy_share(const policy::options& options, const counted_tokens& tokens,
                    const call_options<T>& call) {
  if (options.reducer == policy::reducer::sum)
    return 1;
  if (options.reducer != policy::reducer::token_mean || call.normaliser != 0)
    return share_of(call, reduction::mean, tokens.rows);
  std::vector<std::int64_t> counts(static_cast<std::size_t>(tokens.cols));
  exact_sum sum;
  for (index i = 0; i < tokens.rows; ++i)
    if (const double weight = weight_of(call, i); weight != 0)
      sum.add(weight * static_cast<double>(tokens.read(i, counts.data())));
  return sum.value() != 0 ? 1 / sum.value() : 0;
}

template <class T>
policy_job<T> check_policy_call(const char* name, const policy::options& options,
                                const policy::batch<T>& in, const policy::outputs<T>& out,
                                const call_options<T>& call) {
  const batch_checks<T> checks{{name}};
  policy_job<T> job;
  job.tokens = {in.mask, in.lengths, in.policy.rows, in.policy.cols};
  std::vector<extent> memory;
  const auto view = [&](const char* what, auto& to, const auto& from) {
    to = from;
    if (!from.data && from.rows * from.cols == 0)
      return;
    checks.size((std::string("rows of ") + what).c_str(), from.rows, in.policy.rows,
                "as many as of policy");
    checks.size((std::string("columns of ") + what).c_str(), from.cols, in.policy.cols,
                "as many as of policy");
    checks.memory(what, from.data, from.rows * from.cols);
    memory.push_back(bytes_of(to));
  };
  view("gradient", job.gradient, out.gradient);
  view("entropy_gradient", job.entropy_gradient, out.entropy_gradient);
  memory.push_back(bytes_of(call.values));
  const std::size_t written = memory.size();
  const matrix_view<const T>* const given[] = {
      &in.policy, &in.old, &in.reference, &in.sampler, &in.token_advantages, &in.entropies};
  const char* const names[] = {"policy",           "old",      "reference", "sampler",
                               "token_advantages", "entropies"};
  for (index k = 0; k < job.inputs; ++k)
    view(names[k], job.in[k], *given[k]);
  job.tokens.check(name);

  const bool some = in.policy.rows * in.policy.cols > 0;
  const bool each = in.advantages.data || in.advantages.size > 0;
  if (some && each == bool(in.token_advantages.data))
    fail(name, "advantages", each ? "given with token_advantages" : "missing",
         "one of advantages and token_advantages");
  if (each) {
    checks.entries("advantages", in.advantages, in.policy.rows, "as many as there are sequences");
  }
  job.advantages = in.advantages;
  if (some && options.kl_weight > 0 && !in.reference.data)
    fail(name, "reference", "missing", "log-probabilities, as kl_weight is above 0");
  if (some && options.entropy_weight > 0 && !in.entropies.data)
    fail(name, "entropies", "missing", "entropies, as entropy_weight is above 0");
  checks.call(call, in.policy.rows, false);
  for (const auto& v : {in.advantages, call.row_weights, call.upstream})
    memory.push_back(bytes_of(v));
  require_apart(name, memory, written);
  job.share = policy_share(options, job.tokens, call);
  return job;
}

inline policy::metrics measure_policy(const policy_sums* sums, index n) {
  policy::metrics m;
  exact_sum excess, squares, kl, entropy;
  index low = 0, high = 0;
  for (index i = 0; i < n; ++i) {
    m.tokens += sums[i].tokens;
    m.dropped += sums[i].dropped;
    low += sums[i].low;
    high += sums[i].high;
    excess.add(sums[i].ratio_excess);
    squares.add(sums[i].squares);
    kl.add(sums[i].kl);
    entropy.add(sums[i].entropy);
  }
  if (m.tokens == 0)
    return m;
  const auto tokens = static_cast<double>(m.tokens);
  m.clip_low = static_cast<double>(low) / tokens;
  m.clip_high = static_cast<double>(high) / tokens;
  m.clip_region = static_cast<double>(low + high) / tokens;
  m.mean_ratio = 1 + excess.value() / tokens;
  m.old_kl = squares.value() / tokens;
  m.kl = kl.value() / tokens;
  m.entropy = entropy.value() / tokens;
  return m;
}

/// One worker's way through sequences.
template <class Term, class T> class policy_pass {
public:
  policy_pass(const Term& term, const policy::options& o, const policy_job<T>& job,
              const call_options<T>& call, carver& memory)
      : term_(term), options_(o), job_(job), call_(call) {
    const auto n = static_cast<std::size_t>(job.tokens.cols);
    counts_ = memory.take<std::int64_t>(n);
    for (T*& x : in_)
      x = memory.take<T>(n);
    out_ = memory.take<T>(n);
    slopes_ = memory.take<double>(n);
    sides_ = memory.take<signed char>(n);
  }

  policy_sums run(index i) {
    const double weight = weight_of(call_, i);
    const index n = weight == 0 ? 0 : job_.tokens.read(i, counts_);
    const index cols = job_.tokens.cols;
    std::fill_n(slopes_, cols, 0.0);
    policy_sums sums;
    if (n > 0) {
      for (index k = 0; k < job_.inputs; ++k)
        if (job_.in[k])
          job_.in[k].read(i, 0, cols, in_[k]);
      add_up(i, n, sums);
    } else {
      std::fill_n(counts_, cols, 0);
    }
    const double within = weight * inner_weight(n);
    sums.value = n > 0 ? within * sums.value : 0;
    const double factor =
        within * job_.share * static_cast<double>(call_.scale) * upstream_of(call_, i);
    if (job_.gradient)
      write(job_.gradient, i, [&](index t) { return times_or_nan(factor, slopes_[t]); });
    if (job_.entropy_gradient)
      write(job_.entropy_gradient, i, [&](index) { return -factor * options_.entropy_weight; });
    return sums;
  }

private:
  enum input { own, old, reference, sampler, advantages, entropies };

  double at(input k, index t) const { return static_cast<double>(in_[k][t]); }
  double log_ratio(index t) const {
    const double l = at(own, t);
    return job_.in[old] ? l - at(old, t) : l != l ? l : 0;
  }
  double advantage(index i, index t) const {
    return job_.in[advantages] ? at(advantages, t) : static_cast<double>(job_.advantages[i]);
  }
  /// log of what the sampler's token should weigh.
  double mismatch(index t) const { return at(job_.in[old] ? old : own, t) - at(sampler, t); }
  bool of_sequence() const { return options_.level != policy::level::token; }

  double inner_weight(index n) const {
    switch (options_.reducer) {
    case policy::reducer::sequence_mean:
      return n > 0 ? 1 / static_cast<double>(n) : 0;
    case policy::reducer::constant_length:
      return 1 / options_.constant_length;
    default:
      return 1;
    }
  }

  double importance(double log_weight) const {
    const double weight = std::exp(log_weight);
    if (!(weight > options_.correction_cap))
      return weight;
    using enum policy::correction;
    const bool held = options_.correction == truncate || options_.correction == truncate_sequence;
    return held ? options_.correction_cap : 0;
  }

  struct sequence_view {
    double log_ratio = 0, per_token = 0; // of the sequence; its derivative by a token's
    double importance = 1;
    bool dropped = false;
  };
  sequence_view look(index i, index n) {
    exact_sum log_ratios, drift, mismatches;
    for (index t = 0; t < job_.tokens.cols; ++t) {
      sides_[t] = 0;
      if (!counts_[t])
        continue;
      double x = log_ratio(t);
      drift.add(-x);
      if constexpr (limits_tokens<Term>) {
        sides_[t] = static_cast<signed char>(term_.side(x, advantage(i, t)));
        x = sides_[t] == 0 ? x : sides_[t] < 0 ? -term_.low : term_.high;
      }
      log_ratios.add(x);
      if (job_.in[sampler])
        mismatches.add(mismatch(t));
    }
    const auto count = static_cast<double>(n);
    const bool whole = options_.level == policy::level::sequence;
    sequence_view seen;
    seen.per_token = whole ? 1 : 1 / count;
    seen.log_ratio = whole ? log_ratios.value() : log_ratios.value() / count;
    seen.dropped = drift.value() / count > options_.off_policy_limit;
    if (job_.in[sampler])
      seen.importance = importance(mismatches.value());
    return seen;
  }

  void add_up(index i, index n, policy_sums& sums) {
    const sequence_view seen = look(i, n);
    const bool shared =
        of_sequence() && !Term::direct && options_.level != policy::level::sequence_mean_of_token;
    const bool same_correction = options_.correction == policy::correction::truncate_sequence ||
                                 options_.correction == policy::correction::mask_sequence;
    exact_sum value, through, ratios, squares, kls, entropy;
    bool dropped = false;
    for (index t = 0; t < job_.tokens.cols; ++t) {
      if (!counts_[t])
        continue;
      const double own_ratio = log_ratio(t), limit = options_.log_ratio_limit;
      const double x = of_sequence() ? seen.log_ratio : own_ratio,
                   held = std::clamp(x, -limit, limit), a = advantage(i, t);
      policy::part part = term_({at(own, t), held, std::exp(held), a});
      if (std::fabs(x) > limit && !Term::direct)
        part.slope = 0;
      const int side = limits_tokens<Term> ? sides_[t] : part.clipped;
      sums.low += side < 0;
      sums.high += side > 0;
      double weight = 1;
      if (job_.in[sampler])
        weight = same_correction ? seen.importance : importance(mismatch(t));
      if (seen.dropped && a < 0) {
        dropped = true;
        weight = 0;
        part = {0, 0};
      }
      double own_value = times_or_nan(weight, part.value);
      const double slope = times_or_nan(weight, part.slope);
      if (shared)
        through.add(slope);
      else
        slopes_[t] += slope;
      ratios.add(std::expm1(held));
      squares.add(own_ratio * own_ratio / 2);
      double estimate = 0;
      if (job_.in[reference]) {
        estimate = add_kl(t, own_ratio, kls);
        // Of an impossible token the steeper part wins: the estimates but k1, a line as the term
        // is.
        if (std::isinf(estimate) && own_value == -estimate) {
          own_value = 0;
          if (options_.kl == policy::kl_estimator::k1)
            estimate *= (slope + options_.kl_weight) / options_.kl_weight;
        }
      }
      value.add(own_value);
      value.add(estimate);
      if (job_.in[entropies]) {
        entropy.add(at(entropies, t));
        value.add(-times_or_nan(options_.entropy_weight, at(entropies, t)));
      }
    }
    if (shared)
      for (index t = 0; t < job_.tokens.cols; ++t)
        if (counts_[t] && sides_[t] == 0)
          slopes_[t] += through.value() * seen.per_token;
    sums.value = value.value();
    sums.ratio_excess = ratios.value();
    sums.squares = squares.value();
    sums.kl = kls.value();
    sums.entropy = entropy.value();
    sums.tokens = n;
    sums.dropped = dropped;
  }

  /// Its part of the value.
  double add_kl(index t, double own_ratio, exact_sum& kls) {
    const double x = at(own, t) - at(reference, t), limit = options_.kl_limit;
    const double held = std::clamp(x, -limit, limit);
    // log(ref/old), which l has no part in, but where x is held
    const double apart =
        std::isinf(own_ratio) && held == x ? at(reference, t) - at(old, t) : own_ratio - held;
    const policy::kl_part kl = estimate_kl(options_.kl, held, own_ratio, apart);
    kls.add(kl.value);
    if (options_.kl_weight == 0)
      return 0;
    if (!(std::fabs(x) > limit))
      slopes_[t] += options_.kl_weight * kl.slope;
    return options_.kl_weight * kl.value;
  }

  /// Of the tokens that count; 0 for the others.
  template <class Slope> void write(const matrix_data<T, true>& to, index i, const Slope& slope) {
    const index cols = job_.tokens.cols;
    if (call_.accumulate)
      to.read(i, 0, cols, out_);
    for (index t = 0; t < cols; ++t) {
      const double more = counts_[t] ? slope(t) : 0;
      out_[t] = static_cast<T>(call_.accumulate ? static_cast<double>(out_[t]) + more : more);
    }
    to.write(i, 0, cols, out_);
  }

  const Term& term_;
  const policy::options& options_;
  const policy_job<T>& job_;
  const call_options<T>& call_;
  std::int64_t* counts_;
  T *in_[policy_job<T>::inputs], *out_;
  double* slopes_;
  signed char* sides_;
};

} // namespace perdita::inline PERDITA_ABI::core
