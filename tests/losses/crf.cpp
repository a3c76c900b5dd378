// SPDX-License-Identifier: MIT

// Linear-chain CRF: formula sheet 12. Small cases against all paths one by one, all others against
// forward-backward, both in wide arithmetic and in the form that the formulas have.

#include <perdita/crf.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/numbers.hpp"
#include "support/running_error.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

using perdita::index;
using perdita::matrix_view;
using perdita::vector_view;

constexpr double inf = std::numeric_limits<double>::infinity();

template <class T> struct problem {
  index sequences, steps, tags;
  std::vector<T> emissions, transitions, start, end;
  std::vector<int> labels;
  std::vector<int> lengths;

  problem(index b, index s, index k)
      : sequences(b), steps(s), tags(k), emissions(size(b * s * k)), transitions(size(k * k)),
        start(size(k)), end(size(k)), labels(size(b * s)), lengths(size(b), static_cast<int>(s)) {}
  static std::size_t size(index n) { return static_cast<std::size_t>(n); }

  T& e(index b, index t, index j) { return emissions[size((b * steps + t) * tags + j)]; }
  T e(index b, index t, index j) const { return emissions[size((b * steps + t) * tags + j)]; }
  T& a(index i, index j) { return transitions[size(i * tags + j)]; }
  T a(index i, index j) const { return transitions[size(i * tags + j)]; }
  int& y(index b, index t) { return labels[size(b * steps + t)]; }
  int y(index b, index t) const { return labels[size(b * steps + t)]; }
  index length(index b) const { return lengths[size(b)]; }

  matrix_view<const T> emission_view() const { return {emissions.data(), sequences * steps, tags}; }
  perdita::chain_scores<const T> chain() const {
    return {matrix_view<const T>(transitions.data(), tags, tags), start, end};
  }
  matrix_view<const int> label_view() const { return {labels.data(), sequences, steps}; }
};

template <class T> problem<T> make(index b, index s, index k, double spread, std::uint64_t seed) {
  problem<T> p(b, s, k);
  random_numbers random(seed);
  for (auto* v : {&p.emissions, &p.transitions, &p.start, &p.end})
    for (T& x : *v)
      x = static_cast<T>(random.uniform(-spread, spread));
  for (int& y : p.labels)
    y = static_cast<int>(random.below(static_cast<std::uint64_t>(k)));
  for (index i = 0; i < b; ++i) // all lengths from the whole down to 0 and up again
    p.lengths[static_cast<std::size_t>(i)] = static_cast<int>(
        i % 7 == 0 ? s : static_cast<index>(random.below(static_cast<std::uint64_t>(s + 1))));
  return p;
}

/// Each gradient as the sum of what it gets and the sum of what is taken off.
struct moved {
  wide up = 0, down = 0;
  wide value() const { return up - down; }
  wide size() const { return up + down; }
};
/// Of one sequence.
struct expected {
  wide value = 0, log_sum_exp = 0;
  std::vector<moved> emissions, transitions, start, end;
};

template <class T> wide path_score(const problem<T>& p, index b, const std::vector<index>& path) {
  const auto n = static_cast<index>(path.size());
  const auto at = [&](index t) { return path[static_cast<std::size_t>(t)]; };
  wide score = 0;
  for (index t = 0; t < n; ++t) {
    score += wide(p.e(b, t, at(t)));
    if (t > 0)
      score += wide(p.a(at(t - 1), at(t)));
  }
  if (n > 0)
    score += wide(p.start[static_cast<std::size_t>(at(0))]) +
             wide(p.end[static_cast<std::size_t>(at(n - 1))]);
  return score;
}

/// All paths, one by one.
template <class T> expected by_paths(const problem<T>& p, index b) {
  const index n = p.length(b), k = p.tags;
  expected e;
  const auto size = [](index m) { return static_cast<std::size_t>(m); };
  e.emissions.resize(size(p.steps * k));
  e.transitions.resize(size(k * k));
  e.start.resize(size(k));
  e.end.resize(size(k));
  if (n == 0)
    return e;
  index count = 1;
  for (index t = 0; t < n; ++t)
    count *= k;
  const auto path_of = [&](index number) {
    std::vector<index> path;
    for (index t = 0; t < n; ++t, number /= k)
      path.push_back(number % k);
    return path;
  };
  std::vector<wide> scores;
  std::vector<index> own;
  for (index t = 0; t < n; ++t)
    own.push_back(p.y(b, t));
  for (index c = 0; c < count; ++c)
    scores.push_back(path_score(p, b, path_of(c)));
  e.log_sum_exp = log_sum_exp(scores, [](std::size_t) { return true; });
  wide others = 0;
  for (index c = 0; c < count; ++c)
    if (path_of(c) != own)
      others += exp(wide(scores[size(c)] - path_score(p, b, own)));
  e.value = log1p(others);
  const auto count_path = [&](const std::vector<index>& path, wide moved::*part,
                              const wide& share) {
    for (index t = 0; t < n; ++t) {
      e.emissions[size(t * k + path[size(t)])].*part += share;
      if (t > 0)
        e.transitions[size(path[size(t - 1)] * k + path[size(t)])].*part += share;
    }
    e.start[size(path.front())].*part += share;
    e.end[size(path.back())].*part += share;
  };
  for (index c = 0; c < count; ++c)
    count_path(path_of(c), &moved::up, exp(wide(scores[size(c)] - e.log_sum_exp)));
  count_path(own, &moved::down, 1);
  return e;
}

/// Forward-backward. What is taken off at a tag is the share of everything else.
template <class T> expected by_recursion(const problem<T>& p, index b) {
  const index n = p.length(b), k = p.tags;
  const auto size = [](index m) { return static_cast<std::size_t>(m); };
  expected e;
  e.emissions.resize(size(p.steps * k));
  e.transitions.resize(size(k * k));
  e.start.resize(size(k));
  e.end.resize(size(k));
  if (n == 0)
    return e;
  const auto all = [](std::size_t) { return true; };
  std::vector<std::vector<wide>> alpha(size(n), std::vector<wide>(size(k))), beta = alpha;
  std::vector<wide> z(size(k));
  for (index t = 0; t < n; ++t)
    for (index j = 0; j < k; ++j) {
      for (index i = 0; t > 0 && i < k; ++i)
        z[size(i)] = alpha[size(t - 1)][size(i)] + wide(p.a(i, j));
      alpha[size(t)][size(j)] =
          wide(p.e(b, t, j)) + (t > 0 ? log_sum_exp(z, all) : wide(p.start[size(j)]));
    }
  for (index t = n - 1; t >= 0; --t)
    for (index i = 0; i < k; ++i) {
      for (index j = 0; t + 1 < n && j < k; ++j)
        z[size(j)] = wide(p.a(i, j)) + wide(p.e(b, t + 1, j)) + beta[size(t + 1)][size(j)];
      beta[size(t)][size(i)] = t + 1 < n ? log_sum_exp(z, all) : wide(p.end[size(i)]);
    }
  for (index j = 0; j < k; ++j)
    z[size(j)] = alpha[size(n - 1)][size(j)] + wide(p.end[size(j)]);
  const wide lse = e.log_sum_exp = log_sum_exp(z, all);
  for (index t = 0; t < n; ++t) { // Σ −log P(y_t | y_{t−1}), which does not cancel
    for (index j = 0; j < k; ++j)
      z[size(j)] = wide(p.e(b, t, j)) + beta[size(t)][size(j)] +
                   wide(t > 0 ? p.a(p.y(b, t - 1), j) : p.start[size(j)]);
    const std::size_t own = size(p.y(b, t));
    const wide odds = exp(wide(log_sum_exp(z, [&](std::size_t j) { return j != own; }) - z[own]));
    e.value += is_finite(odds) ? log1p(odds) : wide(log_sum_exp(z, all) - z[own]);
  }
  for (index t = 0; t < n; ++t) {
    wide pair_miss = 0;
    const index y = p.y(b, t), before = t > 0 ? p.y(b, t - 1) : 0;
    for (index i = 0; t > 0 && i < k; ++i)
      for (index j = 0; j < k; ++j) {
        const wide xi = exp(wide(alpha[size(t - 1)][size(i)] + wide(p.a(i, j)) +
                                 wide(p.e(b, t, j)) + beta[size(t)][size(j)] - lse));
        if (i == before && j == y)
          continue;
        e.transitions[size(i * k + j)].up += xi;
        pair_miss += xi;
      }
    if (t > 0)
      e.transitions[size(before * k + y)].down += pair_miss;
    wide miss = 0;
    for (index j = 0; j < k; ++j)
      if (j != y) {
        const wide mu = exp(wide(alpha[size(t)][size(j)] + beta[size(t)][size(j)] - lse));
        e.emissions[size(t * k + j)].up += mu;
        miss += mu;
      }
    e.emissions[size(t * k + y)].down += miss;
  }
  for (index j = 0; j < k; ++j) {
    e.start[size(j)] = e.emissions[size(j)];
    e.end[size(j)] = e.emissions[size((n - 1) * k + j)];
  }
  return e;
}

template <class T> struct results {
  std::vector<T> emissions, transitions, start, end, values, log_sum_exp;
  T value = 0;

  explicit results(const problem<T>& p)
      : emissions(p.emissions.size(), T(-77)), transitions(p.transitions.size(), T(-77)),
        start(p.start.size(), T(-77)), end(start), values(p.lengths.size(), T(-77)),
        log_sum_exp(values) {}
  perdita::chain_scores<T> chain(index tags) {
    return {matrix_view<T>(transitions.data(), tags, tags), start, end};
  }
  bool operator==(const results& other) const {
    const auto same = [](const std::vector<T>& x, const std::vector<T>& y) {
      return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.size() * sizeof(T)) == 0;
    };
    return same(emissions, other.emissions) && same(transitions, other.transitions) &&
           same(start, other.start) && same(end, other.end) && same(values, other.values) &&
           same(log_sum_exp, other.log_sum_exp) &&
           std::memcmp(&value, &other.value, sizeof(T)) == 0;
  }
};

template <class T>
results<T> evaluate(const problem<T>& p, perdita::call_options<T> call = {},
                    perdita::reduction reduction = perdita::reduction::sum) {
  results<T> r(p);
  call.values = r.values;
  call.log_sum_exp = r.log_sum_exp;
  const perdita::linear_chain_crf<T> crf({.reduction = reduction});
  r.value =
      crf(p.emission_view(), p.chain(), perdita::with_lengths(p.label_view(), p.lengths),
          matrix_view<T>(r.emissions.data(), p.sequences * p.steps, p.tags), r.chain(p.tags), call);
  return r;
}

// --- What rounding may do ------------------------------------------------------------------------

using row = std::vector<double>;
/// Scores and the errors of them.
struct inexact_row {
  row x, error;
  explicit inexact_row(std::size_t n) : x(n), error(n) {}
  void set(std::size_t i, const inexact& to) { x[i] = to.value, error[i] = to.error; }
  /// Adds what a lowered row has, then takes the largest off again.
  void shift_by(const row& y) {
    for (std::size_t i = 0; i < x.size(); ++i) {
      x[i] += y[i];
      if (x[i] > -inf)
        error[i] += std::abs(y[i]) / 2 + std::abs(x[i]) / 2; // lowering y, and the sum
    }
    x = lowered(x);
    for (std::size_t i = 0; i < x.size(); ++i)
      if (x[i] > -inf)
        error[i] += std::abs(x[i]) / 2;
  }
};
/// log Σ e^(x_i + s_i). A term: the error of x_i, the lowering of s_i and two kernels for the
/// product of images; or, in logarithms, the sum and what its largest is taken off by. Then the
/// sum, the logarithm and what is added to that.
inexact merge(const inexact_row& from, const row& s) {
  row z(s);
  double top = -inf, sum = 0, error = 0;
  for (std::size_t i = 0; i < z.size(); ++i)
    top = std::max(top, z[i] += from.x[i]);
  if (top == -inf)
    return {-inf, 0};
  for (const double v : z)
    sum += std::exp(v - top);
  for (std::size_t i = 0; i < z.size(); ++i)
    if (z[i] > -inf)
      error += std::exp(z[i] - top) / sum *
               (from.error[i] + std::abs(s[i]) / 2 + std::abs(z[i]) + 2 * kernel_error);
  const double result = top + std::log(sum);
  return {result, error + summed(z.size()) + (kernel_error + 0.5) * std::abs(result) +
                      kernel_error * std::log(sum)};
}
/// −log of y's share in Σ e^(x_i + s_i): of a rival's share, the errors of both scores count (their
/// own, lowering, sum, difference) and, twice because they may be y's instead, a kernel and the
/// sum; then two operations on the result.
inexact surprise(const inexact_row& from, const row& s, std::size_t y) {
  row z(s);
  for (std::size_t i = 0; i < z.size(); ++i)
    z[i] += from.x[i];
  const double top = *std::max_element(z.begin(), z.end());
  if (z[y] == -inf)
    return {inf, 0};
  double sum = 0, rivals = 0, error = 0;
  const auto of_score = [&](std::size_t i) {
    return from.error[i] + std::abs(s[i]) / 2 + std::abs(z[i]);
  };
  for (std::size_t i = 0; i < z.size(); ++i)
    sum += std::exp(z[i] - top);
  for (std::size_t i = 0; i < z.size(); ++i)
    if (i != y && z[i] > -inf) {
      rivals += std::exp(z[i] - z[y]);
      error += std::exp(z[i] - top) / sum *
               (of_score(i) + of_score(y) + 2 * (kernel_error + summed(z.size())));
    }
  const double value = std::isfinite(rivals) ? std::log1p(rivals) : top - z[y] + std::log(sum);
  return {value, error + 2 * kernel_error * value};
}

/// The errors of one sequence's results.
struct errors {
  double value = 0, log_sum_exp = 0;
  row emissions, transitions, start, end;
};
template <class T> errors rounding(const problem<T>& p, index b) {
  const index n = p.length(b);
  const std::size_t k = problem<T>::size(p.tags), steps = problem<T>::size(n);
  errors r;
  r.emissions.resize(problem<T>::size(p.steps) * k);
  r.transitions.resize(k * k);
  r.start.resize(k);
  r.end.resize(k);
  if (n == 0)
    return r;
  const auto tag = [&](std::size_t t) { return problem<T>::size(p.y(b, static_cast<index>(t))); };
  const row a = lowered(row(p.transitions.begin(), p.transitions.end())),
            start = lowered(row(p.start.begin(), p.start.end())),
            end = lowered(row(p.end.begin(), p.end.end()));
  const auto emission = [&](std::size_t t) {
    const auto first = p.emissions.begin() + (b * p.steps + static_cast<index>(t)) * p.tags;
    return lowered(row(first, first + p.tags));
  };
  const auto column = [&](std::size_t j) {
    row result(k);
    for (std::size_t i = 0; i < k; ++i)
      result[i] = a[i * k + j];
    return result;
  };
  const auto as_given = [&](inexact_row& to, const row& x) {
    for (std::size_t j = 0; j < k; ++j)
      to.set(j, {x[j], x[j] > -inf ? std::abs(x[j]) / 2 : 0});
  };
  // Forward: the scores of paths to each tag. The value is Σ of the surprises, added exactly.
  std::vector<inexact_row> forward(steps, inexact_row(k));
  std::vector<inexact> surprises(steps);
  for (std::size_t t = 0; t < steps; ++t) {
    if (t == 0)
      as_given(forward[0], start);
    for (std::size_t j = 0; t > 0 && j < k; ++j)
      forward[t].set(j, merge(forward[t - 1], column(j)));
    forward[t].shift_by(emission(t));
    if (t > 0) {
      surprises[t] = surprise(forward[t - 1], column(tag(t)), tag(t - 1));
      r.value += surprises[t].error;
    }
  }
  r.value += surprise(forward.back(), end, tag(steps - 1)).error;
  r.log_sum_exp = merge(forward.back(), end).error;
  // Backward: `back` is the score of what follows each tag.
  inexact_row back(k);
  as_given(back, end);
  for (std::size_t t = steps; t-- > 0;) {
    // Probabilities of tags: the scores' errors, their sum, its lowering, a kernel; then those of
    // the whole, summing it, and three operations (1 / Σ, times that, times the scale).
    inexact_row z = forward[t];
    for (std::size_t j = 0; j < k; ++j) {
      z.x[j] += back.x[j];
      z.error[j] += back.error[j] + std::abs(z.x[j]) + kernel_error;
    }
    z.x = lowered(z.x);
    double sum = 0, whole = summed(k) + 1.5, miss = 0, miss_error = 0;
    for (std::size_t j = 0; j < k; ++j)
      sum += z.x[j] = std::exp(z.x[j]);
    for (std::size_t j = 0; j < k; ++j)
      whole += (z.x[j] /= sum) > 0 ? z.x[j] * z.error[j] : 0;
    for (std::size_t j = 0; j < k; ++j)
      if (j != tag(t)) {
        r.emissions[t * k + j] = grown(z.x[j], z.error[j] + whole);
        miss += z.x[j];
        miss_error += r.emissions[t * k + j];
      }
    miss_error += summed(k) * miss; // 1 − p is the sum of the others
    r.emissions[t * k + tag(t)] = miss_error;
    if (t == 0)
      break;
    // Pairs: three images, of which each has a kernel and a product, and the lowering of the
    // transition; in logarithms, some sums of up to all three scores instead.
    const inexact_row& before = forward[t - 1];
    back.shift_by(emission(t));
    row q(k * k), q_error(k * k);
    double top = -inf, total = 0, all = summed(k) + 1.5;
    for (std::size_t i = 0; i < k * k; ++i)
      top = std::max(top, q[i] = before.x[i / k] + a[i] + back.x[i % k]);
    for (std::size_t i = 0; i < k * k; ++i)
      if (q[i] > -inf) {
        q_error[i] = before.error[i / k] + back.error[i % k] + 2.5 * std::abs(q[i]) +
                     3 * (kernel_error + 0.5);
        total += std::exp(q[i] - top);
      }
    for (std::size_t i = 0; i < k * k; ++i) {
      q[i] = q[i] > -inf ? std::exp(q[i] - top) / total : 0;
      all += q[i] * q_error[i];
    }
    const std::size_t own = tag(t - 1) * k + tag(t);
    for (std::size_t i = 0; i < k * k; ++i)
      if (i != own)
        r.transitions[i] += grown(q[i], q_error[i] + all);
    // 1 − p(pair) = 1 − p(tag) + p(tag) (1 − p(the one before | tag)), of which the latter is
    // −expm1 of the surprise.
    const inexact& s = surprises[t];
    const double hit = z.x[tag(t)], left = -std::expm1(-s.value);
    r.transitions[own] += miss_error;
    if (s.value > 0 && std::isfinite(s.value))
      r.transitions[own] +=
          grown(hit * left, z.error[tag(t)] + whole + s.error / s.value + expm1_error + 1);
    inexact_row next(k);
    for (std::size_t i = 0; i < k; ++i)
      next.set(i, merge(back, row(a.begin() + static_cast<index>(i * k),
                                  a.begin() + static_cast<index>((i + 1) * k))));
    back = next;
    back.shift_by(row(k, 0.0));
  }
  std::copy_n(r.emissions.begin(), k, r.start.begin());
  std::copy_n(r.emissions.begin() + static_cast<index>((steps - 1) * k), k, r.end.begin());
  return r;
}

/// The largest error over what is allowed.
struct judge {
  wide worst = 0;
  void operator()(const wide& got, const wide& want, const wide& allowed) {
    const bool same = got == want || (is_nan(got) && is_nan(want));
    if (same)
      return;
    const wide ratio = size_of(wide(got - want)) / allowed;
    worst = worse(worst, ratio);
  }
};

/// What may be 0: of float, what is below the smallest numbers. Of double, what the images below
/// e^-690 leave, which are 0: as many as there are tags; of pairs, that over the smallest sum of
/// products that is used, 2^-500, at each step.
template <class T> wide least_of(index tags) {
  return sizeof(T) == 4 ? wide(1e-37) : wide(static_cast<double>(tags) * 2.3e-300);
}
template <class T> wide least_of_pairs(index tags, index steps) {
  return least_of<T>(tags) + wide(static_cast<double>(steps) * 2.3e-300 * 0x1p500);
}

/// Errors against those of rounding() and, in float, one more for the result.
template <class T, class Reference>
void check(const problem<T>& p, const char* what, Reference reference) {
  const results<T> r = evaluate(p);
  const auto size = [](index m) { return static_cast<std::size_t>(m); };
  const wide epsilon = std::numeric_limits<double>::epsilon(),
             own = sizeof(T) == 4 ? wide(std::numeric_limits<T>::epsilon()) : wide(0);
  const auto allowed = [&](const wide& want, double error) {
    return wide(own * size_of(want) + error * epsilon + least_of<T>(p.tags));
  };
  judge value, gradient, chain;
  wide total = 0;
  double total_error = 0;
  struct table {
    std::vector<moved> sum;
    row error;
    explicit table(std::size_t n) : sum(n), error(n) {}
    void add(const std::vector<moved>& x, const row& more) {
      for (std::size_t i = 0; i < sum.size(); ++i) {
        sum[i].up += x[i].up;
        sum[i].down += x[i].down;
        error[i] += more[i];
      }
    }
  };
  table transitions(size(p.tags * p.tags)), start(size(p.tags)), end(size(p.tags));
  for (index b = 0; b < p.sequences; ++b) {
    const expected e = reference(p, b);
    const errors off = rounding(p, b);
    value(r.values[size(b)], e.value, allowed(e.value, off.value));
    value(r.log_sum_exp[size(b)], e.log_sum_exp,
          allowed(e.log_sum_exp, off.log_sum_exp + static_cast<double>(size_of(e.log_sum_exp))));
    total += e.value;
    total_error += off.value + static_cast<double>(e.value);
    for (index i = 0; i < p.steps * p.tags; ++i)
      gradient(r.emissions[size(b * p.steps * p.tags + i)], e.emissions[size(i)].value(),
               allowed(e.emissions[size(i)].value(), off.emissions[size(i)]));
    transitions.add(e.transitions, off.transitions);
    start.add(e.start, off.start);
    end.add(e.end, off.end);
  }
  value(r.value, total, allowed(total, total_error));
  // Sums over steps and sequences round at each of them, relative to all that is added.
  const auto compare = [&](const std::vector<T>& got, const table& want, index terms) {
    for (std::size_t i = 0; i < got.size(); ++i)
      chain(got[i], want.sum[i].value(),
            allowed(want.sum[i].value(),
                    want.error[i] + summed(size(terms)) * static_cast<double>(want.sum[i].size())) +
                least_of_pairs<T>(p.tags, terms));
  };
  compare(r.transitions, transitions, p.sequences * p.steps);
  compare(r.start, start, p.sequences);
  compare(r.end, end, p.sequences);
  const wide slopes = larger(gradient.worst, chain.worst);
  report_accuracy<T>("linear_chain_crf", what, in_allowances,
                     {static_cast<double>(value.worst), static_cast<double>(slopes),
                      static_cast<double>(larger(value.worst, slopes))});
  INFO(what << ", " << p.tags << " tags, " << p.steps << " steps");
  CHECK(value.worst <= 1);
  CHECK(gradient.worst <= 1);
  CHECK(chain.worst <= 1);
}
constexpr auto paths = [](const auto& p, index b) { return by_paths(p, b); };
constexpr auto recursion = [](const auto& p, index b) { return by_recursion(p, b); };

} // namespace

TEMPLATE_TEST_CASE("linear_chain_crf: all paths, one by one", "[crf]", float, double) {
  using T = TestType;
  for (const index tags : {1, 2, 3, 4})
    for (const double spread : {0.5, 3.0})
      check(make<T>(12, 5, tags, spread, static_cast<std::uint64_t>(tags)), "paths", paths);
}

TEST_CASE("linear_chain_crf: the formula sheet's numbers", "[crf]") {
  const std::vector<double> e{.2, -.3, 1, .5, -.4, .8}, a{.1, -.2, .3, .4}, start{.05, -.05},
      end{.2, 0};
  const std::vector<double> want{-0.447312858, 0.447312858, 0.533877714,
                                 -0.533877714, 0.293556484, -0.293556484};
  const std::vector<int> tags{0, 1, 1};
  std::vector<double> g(6);
  const double value = perdita::linear_chain_crf<double>()(
      matrix_view(e.data(), 3, 2), {matrix_view(a.data(), 2, 2), start, end},
      matrix_view(tags.data(), 1, 3), matrix_view(g.data(), 3, 2), {});
  CHECK(std::abs(value - 1.74378976805) < 1e-11);
  for (std::size_t i = 0; i < 6; ++i)
    CHECK(std::abs(g[i] - want[i]) < 1e-9);
}

TEST_CASE("linear_chain_crf: the references agree, and are each other's derivatives", "[crf]") {
  auto p = make<double>(7, 4, 3, 2, 5);
  const wide exact = 1e-30;
  for (index b = 0; b < p.sequences; ++b) {
    const expected one = by_paths(p, b), two = by_recursion(p, b);
    CHECK(size_of(wide(one.value - two.value)) <= exact);
    for (std::size_t i = 0; i < one.emissions.size(); ++i)
      CHECK(size_of(wide(one.emissions[i].value() - two.emissions[i].value())) <= exact);
    for (std::size_t i = 0; i < one.transitions.size(); ++i)
      CHECK(size_of(wide(one.transitions[i].value() - two.transitions[i].value())) <= exact);
    for (std::size_t i = 0; i < one.start.size(); ++i) {
      CHECK(size_of(wide(one.start[i].value() - two.start[i].value())) <= exact);
      CHECK(size_of(wide(one.end[i].value() - two.end[i].value())) <= exact);
    }
    const auto slope = [&](double& x) {
      const double home = x, h = 0x1p-20;
      x = home + h;
      const wide up = by_recursion(p, b).value;
      const double high = x;
      x = home - h;
      const wide down = by_recursion(p, b).value;
      const wide step = wide(high) - wide(x);
      x = home;
      return wide((up - down) / step);
    };
    for (index i = 0; i < p.steps * p.tags; ++i)
      CHECK(size_of(wide(slope(p.emissions[static_cast<std::size_t>(b * p.steps * p.tags + i)]) -
                         one.emissions[static_cast<std::size_t>(i)].value())) < 1e-11);
    for (std::size_t i = 0; i < p.transitions.size(); ++i)
      CHECK(size_of(wide(slope(p.transitions[i]) - one.transitions[i].value())) < 1e-10);
    for (std::size_t i = 0; i < p.start.size(); ++i) {
      CHECK(size_of(wide(slope(p.start[i]) - one.start[i].value())) < 1e-11);
      CHECK(size_of(wide(slope(p.end[i]) - one.end[i].value())) < 1e-11);
    }
  }
}

TEMPLATE_TEST_CASE("linear_chain_crf: every kind of score", "[crf]", float, double) {
  using T = TestType;
  for (const index tags : {1, 2, 5, 8, 9, 33, 40}) {
    const auto seed = static_cast<std::uint64_t>(tags);
    const index steps = tags > 20 ? 6 : 25;
    check(make<T>(4, steps, tags, 3, seed), "ordinary", recursion);
    check(make<T>(4, steps, tags, 250, seed), "spread 250", recursion);
    auto sure = make<T>(4, steps, tags, 1, seed);
    auto ties = make<T>(4, steps, tags, 0, seed);
    auto barred = make<T>(4, steps, tags, 3, seed), masked = barred;
    for (index b = 0; b < sure.sequences; ++b)
      for (index t = 0; t < steps; ++t)
        sure.e(b, t, sure.y(b, t)) += T(24);
    random_numbers random(seed);
    for (index i = 0; i < tags; ++i)
      for (index j = 0; j < tags; ++j)
        if (i != j && random.below(3) == 0) {
          barred.a(i, j) = T(-1e4); // where the tags go that way, too
          masked.a(i, j) = T(-inf);
        }
    for (index b = 0; b < masked.sequences; ++b) // the tags' path is not masked
      for (index t = 1; t < steps; ++t)
        if (masked.a(masked.y(b, t - 1), masked.y(b, t)) == T(-inf))
          masked.y(b, t) = masked.y(b, t - 1);
    check(sure, "sure", recursion);
    check(ties, "ties", recursion);
    check(barred, "barred", recursion);
    check(masked, "masked", recursion);
  }
}

TEMPLATE_TEST_CASE("linear_chain_crf: long sequences", "[crf]", float, double) {
  using T = TestType;
  check(make<T>(1, 4000, 3, 2, 1), "long", recursion);
  auto large = make<T>(1, 4000, 3, 2, 2);
  for (T& x : large.emissions)
    x += T(1000);
  check(large, "at 1000", recursion);
  auto sticky = make<T>(1, 4000, 3, 0.05, 3); // forgets little: errors add up
  for (index i = 0; i < 3; ++i)
    sticky.a(i, i) = T(8);
  for (int& y : sticky.labels)
    y = 1;
  check(sticky, "sticky", recursion);
}

TEMPLATE_TEST_CASE("linear_chain_crf: huge scores", "[crf]", float, double) {
  using T = TestType;
  for (const double scale : {1e4, 1e30}) {
    auto p = make<T>(5, 12, 4, scale, 9);
    check(p, "huge", recursion);
    const auto r = evaluate(p);
    for (const T g : r.emissions) // one path takes all
      if (scale == 1e30)
        CHECK((g == 0 || g == 1 || g == -1));
  }
}

TEMPLATE_TEST_CASE("linear_chain_crf: without transitions, cross-entropies of the steps", "[crf]",
                   float, double) {
  using T = TestType;
  auto p = make<T>(3, 6, 5, 4, 3);
  for (auto* v : {&p.transitions, &p.start, &p.end})
    std::fill(v->begin(), v->end(), T(0));
  const auto r = evaluate(p);
  wide sum = 0;
  for (index b = 0; b < p.sequences; ++b)
    for (index t = 0; t < p.length(b); ++t) {
      std::vector<wide> z;
      for (index j = 0; j < p.tags; ++j)
        z.push_back(p.e(b, t, j));
      sum +=
          log_sum_exp(z, [](std::size_t) { return true; }) - z[static_cast<std::size_t>(p.y(b, t))];
    }
  CHECK(size_of(wide(wide(r.value) - sum)) <= 4 * wide(std::numeric_limits<T>::epsilon()) * sum);
  // Start and end may as well be left out.
  std::vector<T> g(p.emissions.size());
  const T value = perdita::linear_chain_crf<T>({.reduction = perdita::reduction::sum})(
      p.emission_view(), {p.chain().transitions}, perdita::with_lengths(p.label_view(), p.lengths),
      matrix_view<T>(g.data(), p.sequences * p.steps, p.tags), {});
  CHECK(value == r.value);
  CHECK(g == r.emissions);
}

TEMPLATE_TEST_CASE("linear_chain_crf: lengths given, and lengths by ignore_index", "[crf]", float,
                   double) {
  using T = TestType;
  auto p = make<T>(9, 7, 4, 2, 8);
  p.lengths[2] = 3;
  for (index b = 0; b < p.sequences; ++b)
    for (index t = p.length(b); t < p.steps; ++t) {
      p.y(b, t) = -100;
      for (index j = 0; j < p.tags; ++j)
        p.e(b, t, j) = std::numeric_limits<T>::quiet_NaN(); // not read
    }
  const auto one = evaluate(p);
  results<T> two(p);
  two.value = perdita::linear_chain_crf<T>({.reduction = perdita::reduction::sum})(
      p.emission_view(), p.chain(), p.label_view(),
      matrix_view<T>(two.emissions.data(), p.sequences * p.steps, p.tags), two.chain(p.tags),
      {.values = two.values, .log_sum_exp = two.log_sum_exp});
  CHECK(one == two);
  for (index b = 0; b < p.sequences; ++b)
    for (index i = p.length(b) * p.tags; i < p.steps * p.tags; ++i)
      CHECK(one.emissions[static_cast<std::size_t>(b * p.steps * p.tags + i)] == 0);
  // Values alone are the same.
  two.value = perdita::linear_chain_crf<T>({.reduction = perdita::reduction::sum})(
      p.emission_view(), p.chain(), p.label_view(),
      {.values = two.values, .log_sum_exp = two.log_sum_exp});
  CHECK(one == two);
}

TEMPLATE_TEST_CASE("linear_chain_crf: reductions, weights, upstream, scale, accumulation", "[crf]",
                   float, double) {
  using T = TestType;
  const auto p = make<T>(5, 4, 3, 2, 6);
  const std::vector<T> weights{1, 0, 2, T(0.5), 4}, upstream{1, 2, T(-0.5), 8, 1};
  const auto size = static_cast<std::size_t>(p.steps * p.tags);
  const double slack = 8 * static_cast<double>(std::numeric_limits<T>::epsilon());
  std::vector<results<T>> alone;
  for (index b = 0; b < p.sequences; ++b) {
    std::vector<T> only(5, T(0));
    only[static_cast<std::size_t>(b)] = 1;
    alone.push_back(evaluate(p, {.row_weights = only}));
  }
  for (const double divisor : {0.0, 7.5, 20.0}) {
    const bool mean = divisor > 0;
    perdita::call_options<T> call{
        .row_weights = weights, .upstream = upstream, .scale = T(3), .normaliser = 0};
    call.normaliser = divisor == 20 ? 20 : 0;
    const auto r = evaluate(p, call, mean ? perdita::reduction::mean : perdita::reduction::sum);
    double value = 0;
    std::vector<double> chain(p.transitions.size());
    for (std::size_t b = 0; b < 5; ++b) {
      const double w = static_cast<double>(weights[b]), share = mean ? 1 / divisor : 1;
      const double factor = w * share * 3 * static_cast<double>(upstream[b]);
      value += w * share * static_cast<double>(alone[b].value);
      CHECK(std::abs(static_cast<double>(r.values[b]) - w * static_cast<double>(alone[b].value)) <=
            slack * w * static_cast<double>(alone[b].value));
      for (std::size_t i = b * size; i < (b + 1) * size; ++i)
        CHECK(std::abs(static_cast<double>(r.emissions[i]) -
                       factor * static_cast<double>(alone[b].emissions[i])) <=
              slack * std::abs(factor));
      for (std::size_t i = 0; i < chain.size(); ++i)
        chain[i] += factor * static_cast<double>(alone[b].transitions[i]);
    }
    CHECK(std::abs(static_cast<double>(r.value) - value) <= slack * value);
    for (std::size_t i = 0; i < chain.size(); ++i)
      CHECK(std::abs(static_cast<double>(r.transitions[i]) - chain[i]) <= 64 * slack);
  }
  // Added to what is there, each by its own switch; NaN behind the removed sequence.
  auto q = p;
  std::fill_n(q.emissions.begin() + static_cast<index>(size), size,
              std::numeric_limits<T>::quiet_NaN());
  const auto once = evaluate(p, {.row_weights = weights});
  auto twice = evaluate(q, {.row_weights = weights});
  CHECK(once == twice);
  for (const bool chain : {false, true}) {
    twice = once;
    const T value = perdita::linear_chain_crf<T>(
        {.reduction = perdita::reduction::sum, .accumulate_chain = chain})(
        q.emission_view(), q.chain(), perdita::with_lengths(q.label_view(), q.lengths),
        matrix_view<T>(twice.emissions.data(), q.sequences * q.steps, q.tags), twice.chain(q.tags),
        {.row_weights = weights, .accumulate = !chain});
    CHECK(value == once.value);
    const auto doubled = [](const std::vector<T>& x, const std::vector<T>& y, T factor) {
      for (std::size_t i = 0; i < x.size(); ++i)
        CHECK(std::abs(x[i] - factor * y[i]) <=
              2 * std::numeric_limits<T>::epsilon() * std::abs(y[i]));
    };
    doubled(twice.emissions, once.emissions, chain ? T(1) : T(2));
    doubled(twice.transitions, once.transitions, chain ? T(2) : T(1));
    doubled(twice.start, once.start, chain ? T(2) : T(1));
    doubled(twice.end, once.end, chain ? T(2) : T(1));
  }
}

TEMPLATE_TEST_CASE("linear_chain_crf: NaN and infinity stay in their sequence", "[crf]", float,
                   double) {
  using T = TestType;
  const auto p = make<T>(8, 4, 3, 2, 6);
  const auto clean = evaluate(p);
  CHECK(p.length(7) == 4);
  for (const T bad : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity()}) {
    auto q = p;
    q.e(7, 2, 1) = bad;
    const auto r = evaluate(q);
    CHECK(std::isnan(r.value));
    CHECK(std::isnan(r.values[7]));
    CHECK(std::isnan(r.transitions[0]));
    CHECK(std::isnan(r.end[2]));
    for (std::size_t i = 0; i < r.emissions.size(); ++i)
      if (i >= 7 * 4 * 3)
        CHECK(std::isnan(r.emissions[i]));
      else
        CHECK(r.emissions[i] == clean.emissions[i]);
    for (std::size_t b = 0; b < 7; ++b)
      CHECK(r.values[b] == clean.values[b]);
    q = p;
    q.a(1, 1) = bad;
    const auto s = evaluate(q);
    for (index b = 0; b < p.sequences; ++b)
      CHECK(std::isnan(s.values[static_cast<std::size_t>(b)]) == (p.length(b) > 0));
  }
}

TEMPLATE_TEST_CASE("linear_chain_crf: masked paths", "[crf]", float, double) {
  using T = TestType;
  auto p = make<T>(1, 4, 3, 0, 6);
  for (int& y : p.labels)
    y = 1;
  const double slack = 8 * static_cast<double>(std::numeric_limits<T>::epsilon());
  const auto near = [&](T got, double want) {
    CHECK(std::abs(static_cast<double>(got) - want) <= slack);
  };
  p.a(1, 1) = T(-inf); // the tags' own path, 4 of whose pairs are (1, 1)
  const auto own = evaluate(p);
  CHECK(own.value == T(inf));
  // Paths of 4 without (1, 1): 2, 2, 2, 2 … counted by hand: n_t = 2 n_{t-1} + 2 n_{t-2}
  const double ways = 60, with_1_first = 16; // 3, 8, 22, 60; 1 then not 1: 2 · 8
  near(own.emissions[1], with_1_first / ways - 1);
  near(own.emissions[0], (ways - with_1_first) / ways / 2);
  near(own.transitions[4], -3);
  near(own.start[1], with_1_first / ways - 1);
  for (T& x : p.transitions)
    x = T(-inf);
  const auto all = evaluate(p);
  CHECK(all.value == T(inf));
  CHECK(all.log_sum_exp[0] == T(-inf));
  for (std::size_t i = 0; i < all.emissions.size(); ++i)
    CHECK(all.emissions[i] == T(i % 3 == 1 ? -1 : 0));
  for (std::size_t i = 0; i < all.transitions.size(); ++i)
    CHECK(all.transitions[i] == T(i == 4 ? -3 : 0));
  for (T& x : p.transitions)
    x = std::numeric_limits<T>::lowest();
  if (sizeof(T) == 8)
    CHECK(evaluate(p) == all);
  // A tag that cannot be: as if it were not there.
  auto q = make<T>(4, 5, 3, 2, 4);
  problem<T> fewer(4, 5, 2);
  for (index b = 0; b < 4; ++b)
    for (index t = 0; t < 5; ++t) {
      q.e(b, t, 2) = T(-inf);
      q.y(b, t) = fewer.y(b, t) = q.y(b, t) % 2;
      for (index j = 0; j < 2; ++j)
        fewer.e(b, t, j) = q.e(b, t, j);
    }
  fewer.lengths = q.lengths;
  for (index i = 0; i < 2; ++i) {
    for (index j = 0; j < 2; ++j)
      fewer.a(i, j) = q.a(i, j);
    fewer.start[static_cast<std::size_t>(i)] = q.start[static_cast<std::size_t>(i)];
    fewer.end[static_cast<std::size_t>(i)] = q.end[static_cast<std::size_t>(i)];
  }
  check(q, "masked tag", recursion);
  for (index b = 0; b < 4; ++b) {
    const expected big = by_recursion(q, b), small = by_recursion(fewer, b);
    CHECK(size_of(wide(big.value - small.value)) <= 1e-30);
    for (std::size_t i = 0; i < big.emissions.size(); ++i)
      CHECK(size_of(wide(big.emissions[i].value() -
                         (i % 3 == 2 ? wide(0) : small.emissions[i / 3 * 2 + i % 3].value()))) <=
            1e-30);
  }
}

TEMPLATE_TEST_CASE("linear_chain_crf: best paths", "[crf]", float, double) {
  using T = TestType;
  const auto p = make<T>(14, 5, 3, 2, 12);
  std::vector<int> out(p.labels.size(), 55);
  std::vector<T> scores(14);
  const perdita::linear_chain_crf<T> crf;
  crf.decode(p.emission_view(), p.chain(),
             perdita::with_lengths(matrix_view(out.data(), 14, 5), p.lengths), {.values = scores});
  for (index b = 0; b < p.sequences; ++b) {
    wide best = p.length(b) > 0 ? -infinity() : wide(0);
    std::vector<index> path, at;
    for (index c = 0; c < 243; ++c) {
      path.clear();
      for (index t = 0, rest = c; t < p.length(b); ++t, rest /= 3)
        path.push_back(rest % 3);
      if (const wide score = path_score(p, b, path); score > best) {
        best = score;
        at = path;
      }
    }
    for (index t = 0; t < p.steps; ++t)
      CHECK(out[static_cast<std::size_t>(b * 5 + t)] ==
            (t < p.length(b) ? static_cast<int>(at[static_cast<std::size_t>(t)]) : -100));
    CHECK(size_of(wide(wide(scores[static_cast<std::size_t>(b)]) - best)) <=
          8 * wide(std::numeric_limits<T>::epsilon()) * (1 + size_of(best)));
  }
  // More than one pack of tags, the whole length, no lengths; equal paths: the first.
  auto q = make<T>(2, 6, 19, 0, 1);
  std::vector<std::int64_t> tied(12, 55);
  crf.decode(q.emission_view(), q.chain(), matrix_view(tied.data(), 2, 6));
  CHECK(tied == std::vector<std::int64_t>(12, 0));
  for (index t = 0; t < 6; ++t)
    q.e(1, t, 18 - 2 * t) = T(1);
  crf.decode(q.emission_view(), q.chain(), matrix_view(tied.data(), 2, 6));
  CHECK(tied == std::vector<std::int64_t>{0, 0, 0, 0, 0, 0, 18, 16, 14, 12, 10, 8});
  q.e(0, 3, 4) = std::numeric_limits<T>::quiet_NaN();
  std::fill(q.start.begin(), q.start.end(), T(0));
  std::vector<T> two(2);
  crf.decode(q.emission_view(), q.chain(), matrix_view(tied.data(), 2, 6), {.values = two});
  CHECK(std::isnan(two[0]));
  CHECK(two[1] == 6);
  CHECK(tied == std::vector<std::int64_t>{0, 0, 0, 0, 0, 0, 18, 16, 14, 12, 10, 8});
}

TEMPLATE_TEST_CASE("linear_chain_crf: layouts, in place, storage", "[crf]", float, double) {
  using T = TestType;
  const auto p = make<T>(4, 5, 3, 2, 12);
  const auto want = evaluate(p);
  // Steps first, and everything else strided.
  std::vector<T> steps_first(p.emissions.size());
  for (index b = 0; b < 4; ++b)
    for (index t = 0; t < 5; ++t)
      for (index j = 0; j < 3; ++j)
        steps_first[static_cast<std::size_t>((t * 4 + b) * 3 + j)] = p.e(b, t, j);
  const auto view = [](T* data) {
    matrix_view<T> m(data, 20, 3, 4 * 3, 1);
    m.plane_rows = 5;
    m.plane_stride = 3;
    return m;
  };
  Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic> a(3, 3), d_a(3, 3);
  Eigen::Matrix<int, Eigen::Dynamic, Eigen::Dynamic> tags(4, 5);
  Eigen::Matrix<T, Eigen::Dynamic, 1> start(3), d_start(3);
  for (index i = 0; i < 3; ++i) {
    start[i] = p.start[static_cast<std::size_t>(i)];
    for (index j = 0; j < 3; ++j)
      a(i, j) = p.a(i, j);
  }
  for (index b = 0; b < 4; ++b)
    for (index t = 0; t < 5; ++t)
      tags(b, t) = p.y(b, t);
  const perdita::linear_chain_crf<T> crf({.reduction = perdita::reduction::sum});
  const std::vector<std::int16_t> lengths(p.lengths.begin(), p.lengths.end());
  const auto in_place = view(steps_first.data());
  const T value = crf(in_place, {a, start, p.end}, perdita::with_lengths(tags, lengths), in_place,
                      {d_a, d_start});
  CHECK(value == want.value);
  for (index b = 0; b < 4; ++b)
    for (index t = 0; t < 5; ++t)
      for (index j = 0; j < 3; ++j)
        CHECK(steps_first[static_cast<std::size_t>((t * 4 + b) * 3 + j)] ==
              want.emissions[static_cast<std::size_t>((b * 5 + t) * 3 + j)]);
  for (index i = 0; i < 3; ++i) {
    CHECK(d_start[i] == want.start[static_cast<std::size_t>(i)]);
    for (index j = 0; j < 3; ++j)
      CHECK(d_a(i, j) == want.transitions[static_cast<std::size_t>(i * 3 + j)]);
  }
  if constexpr (sizeof(T) == 4) {
    auto q = p;
    std::vector<perdita::bfloat16> narrow(p.emissions.size()), g(narrow);
    for (std::size_t i = 0; i < narrow.size(); ++i) {
      narrow[i].bits = perdita::core::narrow_bfloat16(p.emissions[i]);
      q.emissions[i] = perdita::core::widen_bfloat16(narrow[i].bits);
    }
    const auto r = evaluate(q);
    CHECK(crf(matrix_view<const perdita::bfloat16>(narrow.data(), 20, 3), p.chain(),
              perdita::with_lengths(p.label_view(), p.lengths), matrix_view(g.data(), 20, 3),
              {}) == r.value);
    for (std::size_t i = 0; i < g.size(); ++i)
      CHECK(g[i].bits == perdita::core::narrow_bfloat16(r.emissions[i]));
  }
}

TEMPLATE_TEST_CASE("linear_chain_crf: nothing to do", "[crf]", float, double) {
  using T = TestType;
  const problem<T> none(0, 5, 3), no_steps(3, 0, 2);
  const auto r = evaluate(none);
  CHECK(r.value == 0);
  CHECK(r.transitions == std::vector<T>(9, T(0)));
  const auto s = evaluate(no_steps, {}, perdita::reduction::mean);
  CHECK(s.value == 0);
  CHECK(s.values == std::vector<T>(3, T(0)));
  CHECK(s.end == std::vector<T>(2, T(0)));
  const std::vector<T> zero(2, T(0));
  const auto removed =
      evaluate(make<T>(2, 3, 2, 1, 1), {.row_weights = zero}, perdita::reduction::mean);
  CHECK(removed.value == 0);
  CHECK(removed.emissions == std::vector<T>(12, T(0)));
}

TEST_CASE("linear_chain_crf: decode refuses what belongs to the loss", "[crf]") {
  const auto p = make<float>(3, 4, 2, 1, 1);
  const std::vector<int> untouched(12, -7);
  auto found = untouched;
  const std::vector<float> ones(3, 1.0F);
  std::vector<float> scores(3, -7.0F), by_product(3);
  const auto refused = [&](perdita::call_options<float> call, const char* message) {
    call.values = scores;
    CHECK_THROWS_WITH(perdita::linear_chain_crf<float>().decode(
                          p.emission_view(), p.chain(), matrix_view(found.data(), 3, 4), call),
                      Catch::Matchers::ContainsSubstring(message));
    CHECK(found == untouched);
    CHECK(scores == std::vector<float>(3, -7.0F));
  };
  refused({.row_weights = ones}, "linear_chain_crf: row_weights is given, expected none");
  refused({.upstream = ones}, "linear_chain_crf: upstream is given, expected none");
  refused({.normaliser = 2}, "linear_chain_crf: normaliser is 2, expected 0");
  refused({.log_sum_exp = by_product}, "linear_chain_crf: log_sum_exp is given, expected none");
}

TEST_CASE("linear_chain_crf: bad input is refused, and nothing written", "[crf]") {
  using Catch::Matchers::ContainsSubstring;
  const auto p = make<float>(3, 4, 2, 1, 1);
  const results<float> untouched(p);
  auto r = untouched;
  const perdita::linear_chain_crf<float> crf;
  const auto attempt = [&](const problem<float>& q, const perdita::call_options<float>& call = {}) {
    r.value = crf(q.emission_view(), q.chain(), perdita::with_lengths(q.label_view(), q.lengths),
                  matrix_view(r.emissions.data(), 12, 2), r.chain(2), call);
  };
  const auto refused = [&](auto change, const char* message) {
    auto q = p;
    change(q);
    CHECK_THROWS_WITH(attempt(q), ContainsSubstring(message));
    CHECK(r == untouched);
  };
  refused([](auto& q) { q.y(0, 2) = 2; }, "tags[2] is 2, expected 0 to 1");
  refused([](auto& q) { q.y(0, 3) = -100; }, "tags[3] is -100");
  refused([](auto& q) { q.lengths[1] = 5; }, "lengths[1] is 5, expected 0 to 4");
  refused([](auto& q) { q.lengths[1] = -1; }, "lengths[1] is -1");
  refused([](auto& q) { q.lengths.pop_back(); }, "size of lengths is 2");
  refused([](auto& q) { q.start.pop_back(); }, "start is 1, expected 2");
  refused([](auto& q) { q.end.push_back(0); }, "end is 3, expected 2");
  std::vector<float> two(2), g(12);
  std::vector<unsigned char> hits(3);
  CHECK_THROWS_WITH(attempt(p, {.row_weights = two}), ContainsSubstring("row_weights is 2"));
  CHECK_THROWS_WITH(attempt(p, {.values = two}), ContainsSubstring("values is 2"));
  CHECK_THROWS_WITH(attempt(p, {.hits = hits}), ContainsSubstring("by-product"));
  CHECK_THROWS_WITH(attempt(p, {.normaliser = -1}), ContainsSubstring("normaliser"));
  CHECK_THROWS_WITH(crf(p.emission_view(), {matrix_view(two.data(), 1, 2)}, p.label_view()),
                    ContainsSubstring("transition rows is 1"));
  CHECK_THROWS_WITH(
      crf(p.emission_view(), p.chain(), p.label_view(), matrix_view(g.data(), 6, 2), {}),
      ContainsSubstring("gradient rows is 6, expected 12"));
  CHECK_THROWS_WITH(crf(matrix_view(g.data(), 6, 2), p.chain(), p.label_view()),
                    ContainsSubstring("emission rows is 6, expected 12"));
  CHECK_THROWS_WITH(crf(matrix_view<const float>(nullptr, 12, 2), p.chain(), p.label_view()),
                    ContainsSubstring("emissions is null"));
  CHECK_THROWS_WITH(crf(p.emission_view(), p.chain(), p.label_view(),
                        matrix_view(r.emissions.data(), 12, 2),
                        {matrix_view(r.emissions.data() + 3, 2, 2)}),
                    ContainsSubstring("gradient of the transitions overlaps"));
  auto gap = p;
  gap.y(1, 1) = -100;
  gap.y(1, 2) = 1;
  CHECK_THROWS_WITH(crf(gap.emission_view(), gap.chain(), gap.label_view()),
                    ContainsSubstring("tags[6] is 1, expected ignore_index"));
  CHECK(r == untouched);
  CHECK_THROWS_AS(perdita::linear_chain_crf<float>({.reduction = perdita::reduction(7)}),
                  std::invalid_argument);
}

TEMPLATE_TEST_CASE("linear_chain_crf: the same bits for any number of threads", "[crf][threads]",
                   float, double) {
  using T = TestType;
  const auto p = make<T>(150, 9, 11, 3, 31);
  const auto one = evaluate(p, {.run_on = perdita::serial});
  perdita::workspace memory;
  std::vector<int> path(p.labels.size()), other(path);
  const perdita::linear_chain_crf<T> crf;
  crf.decode(p.emission_view(), p.chain(),
             perdita::with_lengths(matrix_view(path.data(), 150, 9), p.lengths),
             {.run_on = perdita::serial});
  for (const std::size_t n : {2U, 7U}) {
    const threads_executor pool(n, task_order::shuffled);
    CHECK(evaluate(p, {.run_on = pool, .memory = &memory}) == one);
    crf.decode(p.emission_view(), p.chain(),
               perdita::with_lengths(matrix_view(other.data(), 150, 9), p.lengths),
               {.run_on = pool, .memory = &memory});
    CHECK(path == other);
  }
}

} // namespace perdita_tests
