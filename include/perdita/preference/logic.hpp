// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "pairs.hpp"
#include "reference_free.hpp"

namespace perdita::inline PERDITA_ABI {

/// Where a case of two events counts.
enum class mark : unsigned { none = 0, numerator = 1, denominator = 2, both = 3 };

/// What a preference loss counts for and against the model, by the truth of "the model accepts the
/// chosen response" and "it accepts the rejected one". Any marks that leave neither numerator nor
/// denominator empty (225 tables) make a loss.
struct truth_table {
  /// Chosen and rejected accepted: both, the first alone, the second alone, neither.
  std::array<mark, 4> marks{};

  constexpr truth_table(mark both, mark chosen, mark rejected, mark neither)
      : marks{both, chosen, rejected, neither} {}

  /// Of a preference structure of Boolean functions of the two events, as their truth in the four
  /// cases: what is preferred P, what both sides are conditioned on, and what both are given.
  /// Numerator: (P or given) and condition; denominator: (not P or given) and condition.
  static constexpr truth_table of(const std::array<bool, 4>& preferred,
                                  const std::array<bool, 4>& condition = {true, true, true, true},
                                  const std::array<bool, 4>& given = {}) {
    std::array<mark, 4> m{};
    for (std::size_t k = 0; k < 4; ++k) {
      const unsigned for_it = (preferred[k] || given[k]) && condition[k] ? 1U : 0U;
      const unsigned against = (!preferred[k] || given[k]) && condition[k] ? 2U : 0U;
      m[k] = static_cast<mark>(for_it | against);
    }
    return {m[0], m[1], m[2], m[3]};
  }
  constexpr bool counts(std::size_t row, mark in) const {
    return (static_cast<unsigned>(marks[row]) & static_cast<unsigned>(in)) != 0;
  }
  constexpr bool has(mark in) const {
    return counts(0, in) || counts(1, in) || counts(2, in) || counts(3, in);
  }
  /// Numerator and denominator exchanged: the log-ratio changes its sign.
  constexpr truth_table swapped() const {
    std::array<mark, 4> m = marks;
    for (mark& x : m)
      x = x == mark::numerator ? mark::denominator : x == mark::denominator ? mark::numerator : x;
    return {m[0], m[1], m[2], m[3]};
  }
  friend constexpr bool operator==(const truth_table&, const truth_table&) = default;
};

/// Tables of published losses, with e^ρ for the probabilities p of the chosen and q of the
/// rejected.
namespace truth_tables {
inline constexpr mark none = mark::none, num = mark::numerator, den = mark::denominator,
                      both = mark::both;
inline constexpr truth_table ce{num, num, den, den};      ///< p/(1 − p)
inline constexpr truth_table ce_unl{den, num, den, den};  ///< p(1 − q)/(q + (1 − q)(1 − p))
inline constexpr truth_table cpo{both, num, den, none};   ///< p/q; with references DPO
inline constexpr truth_table orpo{none, num, den, none};  ///< p(1 − q)/(q(1 − p))
inline constexpr truth_table un_cpo{num, num, den, num};  ///< (1 − q(1 − p))/(q(1 − p))
inline constexpr truth_table c_cpo{num, num, den, none};  ///< p/((1 − p)q)
inline constexpr truth_table cf_unl{none, num, den, num}; ///< (1 − q)/((1 − p)q)
inline constexpr truth_table f_unl{den, num, den, num};   ///< (1 − q)/q
inline constexpr truth_table qf_unl{den, num, den, none}; ///< p(1 − q)/q
inline constexpr truth_table s_cpo{both, num, den, num};  ///< (pq + 1 − q)/q
} // namespace truth_tables

/// A log-ratio and its slopes.
struct core_ratio {
  double value, by_chosen, by_rejected;
};

namespace core {

/// log Σ of the weights of the cases that are marked.
inline double log_sum_of_cases(const std::array<double, 4>& logs, const truth_table& table,
                               mark in) {
  double top = -std::numeric_limits<double>::infinity(), sum = 0;
  for (std::size_t k = 0; k < 4; ++k)
    if (table.counts(k, in) && !(logs[k] <= top))
      top = logs[k];
  for (std::size_t k = 0; k < 4; ++k)
    if (table.counts(k, in))
      sum += std::exp(logs[k] - top);
  return top + std::log(sum);
}

/// How often (1, 0 or −1) the product of the weights of a case in which an event is false and of
/// one in which it is true is in the slope of ρ: if the first is in the denominator and the second
/// in the numerator, less the other way round.
inline int product_in_slope(const truth_table& table, std::size_t no, std::size_t yes) {
  const auto both = [&](std::size_t above, std::size_t below) {
    return table.counts(above, mark::numerator) && table.counts(below, mark::denominator) ? 1 : 0;
  };
  return both(yes, no) - both(no, yes);
}

} // namespace core

/// ρ = log Σ of the weights that count in the numerator − log Σ of those in the denominator, N and
/// D, where both events are independent with the log-probabilities a = log p and b = log q:
///
///   ∂ρ/∂a = p (c_1 q² + c_2 (1 − q)² + c_3 q (1 − q))/(N D),  c from the marks, whole numbers
///
/// and the same in b: no part of the weights that N and D share cancels in it. Error of ρ and
/// relative error of each of the three parts: some 2^-52 (30 + |a| + |b|). Log-probabilities end at
/// −1e-15, with slope 0 beyond, as a probability of 1 has no odds; −inf makes NaN.
inline core_ratio log_ratio_of(const truth_table& table, double a, double b) {
  constexpr double impossible = -std::numeric_limits<double>::infinity();
  if (a == impossible || b == impossible)
    a = b = std::numeric_limits<double>::quiet_NaN();
  const bool end_a = a >= core::certain, end_b = b >= core::certain;
  a = end_a ? core::certain : a;
  b = end_b ? core::certain : b;
  const double not_a = links::log1mexp(a), not_b = links::log1mexp(b);
  const std::array<double, 4> logs{a + b, a + not_b, not_a + b, not_a + not_b};
  const double up = core::log_sum_of_cases(logs, table, mark::numerator),
               down = core::log_sum_of_cases(logs, table, mark::denominator);
  // `yes` and `no` are those of the other event.
  const auto slope = [&](int in_yes, int in_no, int across, double own, double yes, double no) {
    const auto part = [&](int times, double x) {
      return times == 0 ? 0.0 : times * std::exp((own + x) - (up + down));
    };
    return part(in_yes, 2 * yes) + part(in_no, 2 * no) + part(across, yes + no);
  };
  const auto c = [&](std::size_t no, std::size_t yes) {
    return core::product_in_slope(table, no, yes);
  };
  return {up - down, end_a ? 0 : slope(c(2, 0), c(3, 1), c(2, 1) + c(3, 0), a, b, not_b),
          end_b ? 0 : slope(c(1, 0), c(3, 2), c(1, 2) + c(3, 0), b, a, not_a)};
}

/// What the model's ratio is compared with.
enum class logic_reference {
  none,      ///< nothing
  log_ratio, ///< log ref − log ref′, the form for all tables in the paper
  same_table ///< ρ of the reference's probabilities
};

/// Losses by their logic: a base function of the log-ratio of a truth table,
///
///   ℓ = link(β (ρ(a, b) − ρ_ref) − offset),   a = log π/n of the chosen, b of the rejected
///
/// which with links::logistic and β = 1 is −log of the numerator's share of both. Base functions of
/// others: links::square(1/(2β)) and β = 1 (IPO), links::hinge(β) and 1 (SLiC), links::hinge(0) and
/// 1 (RRHF). Lengths make averages; without them log-probabilities are taken as they are, and
/// should be averages: of sums, 1 − p is 1 to rounding, and many tables become one.
/// Log-probabilities end at −1e-15, see log_ratio_of. Arguments are what the link is given; rewards
/// β a and β b (less the reference, where there is one). Everything else: preference_loss.
///
/// Source:
/// Richardson, Srikumar, Sabharwal, "Understanding the logic of direct preference alignment through
/// logic", ICML 2025.
///
///   perdita::logic_preference<float> loss({.table = perdita::truth_tables::un_cpo});
///   float value = loss({.chosen = a, .rejected = b, .chosen_lengths = na, .rejected_lengths = nb},
///                      d_a, d_b);
template <class T = float> class logic_preference : public preference_loss<T> {
public:
  struct options {
    truth_table table = truth_tables::cpo;
    std::function<links::outcome(double)> link = links::logistic{};
    T beta = 1;   ///< β > 0
    T offset = 0; ///< what is taken off the link's argument, finite
    logic_reference reference = logic_reference::none;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "logic_preference";

  logic_preference() : logic_preference(options{}) {}
  explicit(false) logic_preference(const options& o)
      : preference_loss<T>(name, {term(o)}, reward(o), o.reduction), options_(o) {}
  const options& settings() const { return options_; }

private:
  static typename preference_loss<T>::reward_function reward(const options& o) {
    const bool compared = o.reference != logic_reference::none;
    return [beta = static_cast<double>(o.beta), compared](const preference_side& s) {
      return beta * (s.log_probability - (compared ? s.reference : 0)) / s.length;
    };
  }
  static preference_term term(const options& o) {
    core::require(o.table.has(mark::numerator) && o.table.has(mark::denominator), name,
                  "number of cases in the numerator or the denominator of the table", 0,
                  "at least 1");
    core::require(static_cast<bool>(o.link), name, "link", 0, "a function");
    core::require_enumerator(name, "reference", o.reference, logic_reference::same_table,
                             "one of logic_reference");
    const double beta = core::positive(name, "beta", o.beta);
    const double offset = core::finite(name, "offset", o.offset);
    const auto of_pair = [=, table = o.table, link = o.link,
                          reference = o.reference](const preference_pair& p) -> pair_outcome {
      const preference_side &w = p.chosen, &l = p.rejected;
      const core_ratio rho =
          log_ratio_of(table, w.log_probability / w.length, l.log_probability / l.length);
      const double a = w.reference / w.length, b = l.reference / l.length;
      const double from = reference == logic_reference::none ? 0
                          : reference == logic_reference::log_ratio
                              ? a - b
                              : log_ratio_of(table, a, b).value;
      const double t = beta * (rho.value - from) - offset - p.margin;
      const links::outcome found = link(t);
      const double slope = beta * found.slope;
      return {found.value, links::times(slope, rho.by_chosen) / w.length,
              links::times(slope, rho.by_rejected) / l.length, t, true};
    };
    const unsigned inputs = o.reference == logic_reference::none ? needs_nothing : needs_reference;
    return pairwise_term(of_pair, inputs | divides_by_lengths);
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
