// SPDX-License-Identifier: MIT

// CTC with PyTorch's semantics. Small cases against all alignments one by one, long ones against
// alpha-beta, both in wide arithmetic.

#include <perdita/ctc.hpp>

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

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double not_a_number_d = std::numeric_limits<double>::quiet_NaN();
std::size_t at(index n) { return static_cast<std::size_t>(n); }

template <class T> struct problem {
  index steps, classes, blank;
  std::vector<T> scores;
  std::vector<std::vector<int>> targets;
  std::vector<int> inputs;

  problem(index s, index c, index empty) : steps(s), classes(c), blank(empty) {}
  index sequences() const { return static_cast<index>(targets.size()); }
  T& x(index b, index t, index k) { return scores[at((b * steps + t) * classes + k)]; }
  T x(index b, index t, index k) const { return scores[at((b * steps + t) * classes + k)]; }
  /// A sequence more.
  void add(std::vector<int> target, index length, double spread, random_numbers& random) {
    targets.push_back(std::move(target));
    inputs.push_back(static_cast<int>(length));
    for (index i = 0; i < steps * classes; ++i)
      scores.push_back(static_cast<T>(random.uniform(-spread, spread)));
  }
  std::vector<int> lengths() const {
    std::vector<int> n;
    for (const auto& target : targets)
      n.push_back(static_cast<int>(target.size()));
    return n;
  }
  std::vector<int> concatenated() const {
    std::vector<int> all;
    for (const auto& target : targets)
      all.insert(all.end(), target.begin(), target.end());
    return all;
  }
  matrix_view<const T> view() const { return {scores.data(), sequences() * steps, classes}; }
};

struct expected {
  wide value = 0;
  std::vector<wide> gradient, occupancy;
};
template <class T> std::vector<wide> log_softmax(const problem<T>& p, index b, index t) {
  std::vector<wide> z;
  for (index k = 0; k < p.classes; ++k)
    z.push_back(p.x(b, t, k));
  const wide lse = log_sum_exp(z, [](std::size_t) { return true; });
  for (wide& x : z)
    x = x - lse;
  return z;
}
/// From the shares P(a_t = k | target): the gradient.
template <class T> void finish(const problem<T>& p, index b, expected& e) {
  for (index t = 0; t < p.inputs[at(b)]; ++t) {
    const auto z = log_softmax(p, b, t);
    const auto leader = std::max_element(z.begin(), z.end()) - z.begin();
    for (index k = 0; k < p.classes; ++k) {
      const wide share = e.occupancy[at(t * p.classes + k)], q = exp(z[at(k)]);
      wide others = 0, rivals = 0;
      for (index j = 0; j < p.classes; ++j)
        if (j != k) {
          others += e.occupancy[at(t * p.classes + j)];
          rivals += exp(z[at(j)]);
        }
      const bool leads = k == leader;
      e.gradient[at(t * p.classes + k)] = leads ? wide(others - rivals) : wide(q - share);
    }
  }
}

/// All alignments, one by one.
template <class T> expected by_alignments(const problem<T>& p, index b) {
  const index n = p.inputs[at(b)];
  expected e;
  e.gradient.resize(at(p.steps * p.classes));
  e.occupancy = e.gradient;
  std::vector<std::vector<wide>> z;
  index count = 1;
  for (index t = 0; t < n; ++t, count *= p.classes)
    z.push_back(log_softmax(p, b, t));
  wide sum = 0, others = 0;
  for (index c = 0; c < count; ++c) {
    std::vector<int> said, path;
    wide score = 0;
    for (index t = 0, rest = c; t < n; ++t, rest /= p.classes) {
      const int k = static_cast<int>(rest % p.classes);
      if (k != p.blank && (t == 0 || path.back() != k))
        said.push_back(k);
      path.push_back(k);
      score += z[at(t)][at(k)];
    }
    if (said != p.targets[at(b)]) {
      others += exp(score);
      continue;
    }
    sum += exp(score);
    for (index t = 0; t < n; ++t)
      e.occupancy[at(t * p.classes + path[at(t)])] += exp(score);
  }
  e.value = sum > 0 ? wide(sum > others ? -log1p(wide(-others)) : -log(sum)) : infinity();
  if (sum == 0)
    return e;
  for (wide& x : e.occupancy)
    x = x / sum;
  finish(p, b, e);
  return e;
}

/// Alpha-beta over the labels with blanks between.
template <class T> expected by_recursion(const problem<T>& p, index b) {
  const index n = p.inputs[at(b)], states = 2 * static_cast<index>(p.targets[at(b)].size()) + 1;
  expected e;
  e.gradient.resize(at(p.steps * p.classes));
  e.occupancy = e.gradient;
  const auto k = [&](index s) {
    return s % 2 ? static_cast<index>(p.targets[at(b)][at(s / 2)]) : p.blank;
  };
  const auto jumps = [&](index s) { return s > 1 && s % 2 && k(s) != k(s - 2); };
  const auto all = [](std::size_t) { return true; };
  std::vector<std::vector<wide>> z, alpha(at(n), std::vector<wide>(at(states), -infinity())),
      beta = alpha;
  for (index t = 0; t < n; ++t)
    z.push_back(log_softmax(p, b, t));
  for (index t = 0; t < n; ++t)
    for (index s = 0; s < states; ++s) {
      std::vector<wide> ways;
      if (t == 0)
        ways = {s < 2 ? wide(0) : wide(-infinity())};
      else
        for (index d = 0; d <= 2; ++d)
          if (s >= d && (d < 2 || jumps(s)))
            ways.push_back(alpha[at(t - 1)][at(s - d)]);
      alpha[at(t)][at(s)] = log_sum_exp(ways, all) + z[at(t)][at(k(s))];
    }
  for (index t = n - 1; t >= 0; --t)
    for (index s = 0; s < states; ++s) {
      std::vector<wide> ways;
      if (t == n - 1)
        ways = {s >= states - 2 ? wide(0) : wide(-infinity())};
      else
        for (index d = 0; d <= 2; ++d)
          if (s + d < states && (d < 2 || jumps(s + d)))
            ways.push_back(beta[at(t + 1)][at(s + d)] + z[at(t + 1)][at(k(s + d))]);
      beta[at(t)][at(s)] = log_sum_exp(ways, all);
    }
  std::vector<wide> ends(alpha.back().end() - std::min<index>(states, 2), alpha.back().end());
  const wide total = log_sum_exp(ends, all);
  e.value = -total;
  for (index t = 0; t < n; ++t)
    for (index s = 0; s < states; ++s)
      e.occupancy[at(t * p.classes + k(s))] +=
          exp(wide(alpha[at(t)][at(s)] + beta[at(t)][at(s)] - total));
  finish(p, b, e);
  return e;
}

template <class T> struct results {
  T value = 0;
  std::vector<T> gradient, values;
  explicit results(const problem<T>& p)
      : gradient(p.scores.size(), T(-77)), values(p.targets.size(), T(-77)) {}
  bool operator==(const results& o) const {
    const auto same = [](const std::vector<T>& x, const std::vector<T>& y) {
      return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.size() * sizeof(T)) == 0;
    };
    return same(gradient, o.gradient) && same(values, o.values) &&
           std::memcmp(&value, &o.value, sizeof(T)) == 0;
  }
};
template <class T>
results<T> evaluate(const problem<T>& p, typename perdita::ctc_loss<T>::options options = {},
                    perdita::call_options<T> call = {}) {
  results<T> r(p);
  options.blank = p.blank;
  call.values = r.values;
  r.value = perdita::ctc_loss<T>(options)(
      p.view(), p.concatenated(), p.inputs, p.lengths(),
      matrix_view<T>(r.gradient.data(), p.sequences() * p.steps, p.classes), call);
  return r;
}
constexpr auto sum = perdita::reduction::sum;
constexpr auto mean = perdita::reduction::mean;

// --- What rounding may do ------------------------------------------------------------------------

using row = std::vector<double>;

/// The errors of one sequence's results.
struct errors {
  double value = 0;
  row gradient;
};
template <class T> class error_analysis {
public:
  error_analysis(const problem<T>& p, index b)
      : p_(p), b_(b), n_(at(p.inputs[at(b)])), classes_(at(p.classes)),
        states_(2 * p.targets[at(b)].size() + 1) {}

  errors run() {
    errors r;
    r.gradient.resize(at(p_.steps) * classes_);
    if (n_ == 0)
      return r;
    for (std::size_t t = 0; t < n_; ++t)
      read_step(t);
    const double direct = forward(), sure = 0x1p-4; // the value below which it is computed anew
    const double margin = (1 + direct_error_) * std::numeric_limits<double>::epsilon();
    if (direct > sure - margin)
      r.value = direct_error_;
    if (direct < sure + margin)
      r.value = std::max(r.value, sure_error());
    backward(r.gradient);
    return r;
  }

private:
  std::size_t class_of(std::size_t s) const {
    return at(s % 2 ? static_cast<index>(p_.targets[at(b_)][s / 2]) : p_.blank);
  }
  bool jumps(std::size_t s) const { return s > 1 && s % 2 == 1 && class_of(s) != class_of(s - 2); }

  /// Softmax. A score is lowered (half of it), its image has a kernel; Σ of the rivals' images has
  /// theirs and the sum's, relative to the whole. log p: what log1p and its argument have, and the
  /// difference. p: what both images have, 1 / Σ, and the product.
  void read_step(std::size_t t) {
    row z(classes_), p(classes_), log_error(classes_), error(classes_);
    for (std::size_t k = 0; k < classes_; ++k)
      z[k] = p_.x(b_, static_cast<index>(t), static_cast<index>(k));
    z = lowered(z);
    double rivals = -1, of_rivals = 0;
    for (const double x : z)
      rivals += std::exp(x);
    const double log_sum = std::log1p(rivals);
    for (std::size_t k = 0; k < classes_; ++k)
      if (z[k] > -inf) {
        p[k] = std::exp(z[k]) / (1 + rivals);
        if (z[k] < 0)
          of_rivals += p[k] * (-z[k] / 2 + kernel_error + summed(classes_));
      }
    for (std::size_t k = 0; k < classes_; ++k)
      if (z[k] > -inf) {
        log_error[k] = -z[k] / 2 + of_rivals + kernel_error * log_sum + (log_sum - z[k]) / 2;
        error[k] = -z[k] / 2 + kernel_error + of_rivals + 1.5;
        z[k] -= log_sum;
      }
    score_.push_back(z);
    score_error_.push_back(log_error);
    p_k_.push_back(p);
    p_error_.push_back(error);
  }
  /// The up to three ways into a state: their scores, and the shares that they have.
  struct arrival {
    std::size_t from[3];
    double z[3], share[3], top = -inf, log_sum = -inf;
    std::size_t count = 0;
  };
  arrival arrive(const row& before, std::size_t s) const {
    arrival a;
    for (std::size_t d = 0; d <= 2; ++d)
      if (s >= d && (d < 2 || jumps(s)) && before[s - d] > -inf) {
        a.from[a.count] = s - d;
        a.z[a.count++] = before[s - d];
      }
    for (std::size_t i = 0; i < a.count; ++i)
      a.top = std::max(a.top, a.z[i]);
    double total = 0;
    for (std::size_t i = 0; i < a.count; ++i)
      total += a.share[i] = std::exp(a.z[i] - a.top);
    for (std::size_t i = 0; i < a.count; ++i)
      a.share[i] /= total;
    if (a.count > 0)
      a.log_sum = a.top + std::log(total);
    return a;
  }
  /// Of log Σ: by its shares, the errors of the scores, of their differences, a kernel and the sum;
  /// then log1p and what it is added to.
  static double error_of(const arrival& a, const row& errors) {
    double error = 0;
    for (std::size_t i = 0; i < a.count; ++i)
      error += a.share[i] * (errors[a.from[i]] + (a.top - a.z[i]) / 2 + kernel_error + 0.5);
    return a.count == 0 ? 0 : error + kernel_error * (a.log_sum - a.top) + std::abs(a.log_sum) / 2;
  }
  /// −log of the probability, and its error: what was taken off the rows is added exactly.
  double forward() {
    double offset = 0;
    for (std::size_t t = 0; t < n_; ++t) {
      row alpha(states_, -inf), error(states_);
      for (std::size_t s = 0; s < states_; ++s) {
        const std::size_t k = class_of(s);
        const arrival a = t > 0 ? arrive(alpha_.back(), s) : arrival{};
        alpha[s] = (t > 0 ? a.log_sum : s < 2 ? 0 : -inf) + score_[t][k];
        if (alpha[s] > -inf)
          error[s] = score_error_[t][k] +
                     (t > 0 ? error_of(a, alpha_error_.back()) + std::abs(alpha[s]) / 2 : 0);
      }
      const double top = *std::max_element(alpha.begin(), alpha.end());
      if (top == -inf)
        return inf;
      offset += top;
      alpha = lowered(alpha);
      for (std::size_t s = 0; s < states_; ++s)
        error[s] += alpha[s] > -inf ? std::abs(alpha[s]) / 2 : 0;
      alpha_.push_back(alpha);
      alpha_error_.push_back(error);
    }
    // The end: the last two states, as if both led to one.
    row last = alpha_.back();
    std::fill(last.begin(), last.end() - std::min<index>(2, static_cast<index>(states_)), -inf);
    const double high = *std::max_element(last.begin(), last.end());
    if (high == -inf)
      return inf;
    double total = 0, error = 0;
    for (const double x : last)
      total += std::exp(x - high);
    for (std::size_t s = 0; s < states_; ++s)
      if (last[s] > -inf)
        error += std::exp(last[s] - high) / total *
                 (alpha_error_.back()[s] + (high - last[s]) / 2 + kernel_error);
    const double value = -(offset + high + std::log(total));
    direct_error_ = error + kernel_error * std::log(total) + std::abs(value);
    return value;
  }
  /// Of −log1p(−Q), Q = Σ of what leads elsewhere: every way there has the errors of its steps'
  /// probabilities, a product and up to two sums in each; the last, whose class is among what the
  /// wanted ones are taken off from, three times what images have, and the sums over classes and
  /// states. At the end, 1 / (1 − Q) of all that, log1p and the result.
  double sure_error() const {
    row ways(states_), error(states_);
    double q = 0, q_error = 0;
    for (std::size_t t = 0; t < n_; ++t) {
      double worst = 0;
      for (std::size_t k = 0; k < classes_; ++k)
        worst = std::max(worst, p_k_[t][k] > 0 ? p_error_[t][k] : 0);
      const auto leave = [&](double way, double way_error, const std::vector<std::size_t>& inside) {
        for (std::size_t k = 0; k < classes_; ++k)
          if (std::find(inside.begin(), inside.end(), k) == inside.end()) {
            q += way * p_k_[t][k];
            q_error += way * p_k_[t][k] *
                       (way_error + 3 * (worst + summed(classes_)) + summed(states_ + n_ + 4));
          }
      };
      row next(states_), next_error(states_);
      for (std::size_t s = 0; s < states_; ++s) {
        double from = t == 0 && s < 2 ? 1 : 0, carried = 0;
        for (std::size_t d = 0; t > 0 && d <= 2; ++d)
          if (s >= d && (d < 2 || jumps(s))) {
            from += ways[s - d];
            carried += ways[s - d] * error[s - d];
          }
        next[s] = from * p_k_[t][class_of(s)];
        next_error[s] = (from > 0 ? carried / from : 0) + p_error_[t][class_of(s)] + 1.5;
      }
      if (t == 0) {
        std::vector<std::size_t> inside{class_of(0)};
        if (states_ > 1)
          inside.push_back(class_of(1));
        leave(1, 0, inside);
      }
      for (std::size_t s = 0; t > 0 && s < states_; ++s) {
        std::vector<std::size_t> inside{class_of(0), class_of(s)};
        if (const std::size_t label = s + (s % 2 ? 2 : 1); label < states_)
          inside.push_back(class_of(label));
        leave(ways[s], error[s], inside);
      }
      ways = next;
      error = next_error;
    }
    for (std::size_t s = 0; s + 2 < states_; ++s) {
      q += ways[s];
      q_error += ways[s] * (error[s] + summed(states_));
    }
    return q_error / (1 - q) + 2 * kernel_error * -std::log1p(-q);
  }
  /// Shares of states from the last step on. At the end a sigmoid of two scores; at each step what
  /// a way's share among up to three has: its own score and, by their shares, all (each a
  /// difference and a kernel), their sum, two products, and up to two sums.
  void backward(row& gradient) const {
    if (alpha_.size() < n_ || direct_error_ == 0)
      return;
    row share(states_), error(states_);
    const row &last = alpha_.back(), &last_error = alpha_error_.back();
    share[states_ - 1] = 1;
    if (states_ > 1) {
      const double ahead = last[states_ - 1] - last[states_ - 2];
      share[states_ - 1] = 1 / (1 + std::exp(-ahead));
      share[states_ - 2] = 1 / (1 + std::exp(ahead));
      const double off = std::isfinite(ahead) ? last_error[states_ - 1] + last_error[states_ - 2] +
                                                    std::abs(ahead) / 2
                                              : 0;
      error[states_ - 1] = share[states_ - 2] * off + sigmoid_error;
      error[states_ - 2] = share[states_ - 1] * off + sigmoid_error;
    }
    for (std::size_t t = n_; t-- > 0;) {
      slope(t, share, error, gradient);
      if (t == 0)
        return;
      row before(states_), carried(states_);
      for (std::size_t s = 0; s < states_; ++s) {
        const arrival a = arrive(alpha_[t - 1], s);
        const auto own = [&](std::size_t i) {
          return alpha_error_[t - 1][a.from[i]] + (a.top - a.z[i]) / 2 + kernel_error;
        };
        double all = error[s] + 3.5;
        for (std::size_t i = 0; i < a.count; ++i)
          all += a.share[i] * own(i);
        for (std::size_t i = 0; i < a.count; ++i) {
          before[a.from[i]] += share[s] * a.share[i];
          carried[a.from[i]] += grown(share[s] * a.share[i], all + own(i));
        }
      }
      for (std::size_t s = 0; s < states_; ++s)
        error[s] = before[s] > 0 ? carried[s] / before[s] : 0;
      share = before;
    }
  }
  /// p_k − (the shares of the states of class k), times the scale: of both the errors, the sum over
  /// states, and the difference; of the leader, the others' of either.
  void slope(std::size_t t, const row& share, const row& error, row& gradient) const {
    row states_error(classes_), image_error(classes_);
    const auto z = score_[t];
    const auto leader = at(std::max_element(z.begin(), z.end()) - z.begin());
    for (std::size_t s = 0; s < states_; ++s)
      states_error[class_of(s)] += grown(share[s], error[s] + summed(states_) + 1);
    for (std::size_t k = 0; k < classes_; ++k)
      image_error[k] = grown(p_k_[t][k], p_error_[t][k] + summed(classes_) + 1);
    row out(classes_);
    for (std::size_t k = 0; k < classes_; ++k)
      if (k != leader) {
        out[k] = states_error[k] + image_error[k];
        out[leader] += out[k];
      }
    std::copy(out.begin(), out.end(), gradient.begin() + static_cast<index>(t * classes_));
  }

  const problem<T>& p_;
  index b_;
  std::size_t n_, classes_, states_;
  std::vector<row> score_, score_error_, p_k_, p_error_, alpha_, alpha_error_;
  double direct_error_ = 0;
};

/// Errors against those of error_analysis and, in float, one more for the result; what is below
/// `least` may be 0, as images below e^-690 are.
template <class T, class Reference>
void check(const problem<T>& p, const char* what, Reference reference) {
  const results<T> r = evaluate(p, {.reduction = sum});
  const wide own = sizeof(T) == 4 ? wide(std::numeric_limits<T>::epsilon()) : wide(0),
             least = sizeof(T) == 4 ? wide(1e-37) : wide(1e-298);
  wide worst_value = 0, worst_gradient = 0;
  const auto judge = [&](wide& worst, const wide& got, const wide& want, double error) {
    if (got == want)
      return;
    const wide allowed =
        own * size_of(want) + error * wide(std::numeric_limits<double>::epsilon()) + least;
    const wide ratio = size_of(wide(got - want)) / allowed;
    worst = worse(worst, ratio);
  };
  for (index b = 0; b < p.sequences(); ++b) {
    const expected e = reference(p, b);
    const errors off = error_analysis<T>(p, b).run();
    judge(worst_value, r.values[at(b)], e.value, off.value);
    for (index i = 0; i < p.steps * p.classes; ++i)
      judge(worst_gradient, r.gradient[at(b * p.steps * p.classes + i)], e.gradient[at(i)],
            off.gradient[at(i)]);
  }
  report_accuracy<T>("ctc_loss", what, in_allowances,
                     {static_cast<double>(worst_value), static_cast<double>(worst_gradient),
                      static_cast<double>(larger(worst_value, worst_gradient))});
  INFO(what);
  CHECK(worst_value <= 1);
  CHECK(worst_gradient <= 1);
}
constexpr auto alignments = [](const auto& p, index b) { return by_alignments(p, b); };
constexpr auto recursion = [](const auto& p, index b) { return by_recursion(p, b); };

template <class T> problem<T> small(index blank, double spread) {
  problem<T> p(5, 3, blank);
  random_numbers random(static_cast<std::uint64_t>(blank) + 7);
  const int a = blank == 0 ? 1 : 0, c = blank == 2 ? 1 : 2;
  const std::vector<std::vector<int>> targets{
      {}, {a}, {a, c}, {a, a}, {c, a, c}, {a, a, c}, {c, c, c}, {a, c, a, c}, {a, c, a, c, a}};
  for (const auto& target : targets)
    for (const index n : {5, 4, 3, 2, 1, 0})
      p.add(target, n, spread, random);
  return p;
}
/// A target, and scores that go with it along an alignment, by `lead`.
template <class T>
problem<T> make(index steps, index classes, index labels, double spread, double lead,
                std::uint64_t seed) {
  problem<T> p(steps, classes, classes - 1);
  random_numbers random(seed);
  std::vector<int> target;
  for (index i = 0; i < labels; ++i)
    target.push_back(static_cast<int>(random.below(static_cast<std::uint64_t>(classes - 1))));
  p.add(target, steps, spread, random);
  for (index t = 0; t < steps; ++t) {
    const index i = t * labels / steps;
    const bool says = t * labels % steps < steps / 2 && labels > 0;
    p.x(0, t, says ? target[at(i)] : p.blank) += static_cast<T>(lead);
  }
  return p;
}

} // namespace

TEMPLATE_TEST_CASE("ctc_loss: all alignments, one by one", "[ctc]", float, double) {
  using T = TestType;
  for (const index blank : {0, 1, 2})
    for (const double spread : {0.0, 1.0, 5.0, 40.0})
      check(small<T>(blank, spread), "alignments", alignments);
}

TEST_CASE("ctc_loss: the references agree, and are each other's derivatives", "[ctc]") {
  auto p = small<double>(1, 2);
  for (index b = 0; b < p.sequences(); ++b) {
    const expected one = by_alignments(p, b);
    if (p.inputs[at(b)] == 0 || !is_finite(one.value))
      continue;
    const expected two = by_recursion(p, b);
    CHECK(size_of(wide(one.value - two.value)) < 1e-30);
    for (std::size_t i = 0; i < one.gradient.size(); ++i) {
      CHECK(size_of(wide(one.gradient[i] - two.gradient[i])) < 1e-30);
      double& x = p.scores[at(b) * one.gradient.size() + i];
      const double home = x, h = 0x1p-20;
      x = home + h;
      const wide up = by_alignments(p, b).value, high = x;
      x = home - h;
      const wide down = by_alignments(p, b).value, low = x;
      x = home;
      CHECK(size_of(wide((up - down) / (high - low) - one.gradient[i])) < 1e-11);
    }
  }
}

TEMPLATE_TEST_CASE("ctc_loss: every kind of score", "[ctc]", float, double) {
  using T = TestType;
  for (const std::uint64_t seed : {1U, 2U, 3U}) {
    check(make<T>(40, 7, 12, 3, 0, seed), "ordinary", recursion);
    check(make<T>(60, 40, 25, 3, 4, seed), "led", recursion);
    check(make<T>(40, 7, 12, 1, 25, seed), "sure", recursion);
    check(make<T>(40, 7, 3, 150, 0, seed), "spread 150", recursion);
    check(make<T>(30, 2, 8, 3, 0, seed), "two classes", recursion);
    check(make<T>(33, 5, 0, 3, 0, seed), "empty", recursion);
    auto far = make<T>(40, 7, 12, 3, 0, seed);
    for (T& x : far.scores)
      x += T(3000);
    check(far, "at 3000", recursion);
    check(make<T>(20, 7, 6, 1e30, 0, seed), "huge", recursion);
  }
}

TEMPLATE_TEST_CASE("ctc_loss: long sequences", "[ctc]", float, double) {
  using T = TestType;
  check(make<T>(4000, 4, 5, 2, 0, 1), "long", recursion);
  check(make<T>(4000, 4, 5, 1, 20, 1), "long and sure", recursion);
  // Half a million states: finite, and the shares of a step add up to 1.
  const auto p = make<T>(2000, 9, 900, 2, 1, 5);
  const auto r = evaluate(p, {.reduction = sum});
  CHECK(std::isfinite(r.value));
  for (index t = 0; t < p.steps; ++t) {
    double total = 0;
    for (index k = 0; k < p.classes; ++k)
      total += static_cast<double>(r.gradient[at(t * p.classes + k)]);
    CHECK(std::abs(total) <= 10 * static_cast<double>(std::numeric_limits<T>::epsilon()) + 1e-12);
  }
}

TEMPLATE_TEST_CASE("ctc_loss: log-probabilities", "[ctc]", float, double) {
  using T = TestType;
  auto p = small<T>(0, 2);
  const double slack = 32 * static_cast<double>(std::numeric_limits<T>::epsilon());
  std::vector<expected> want;
  for (index b = 0; b < p.sequences(); ++b) {
    want.push_back(by_alignments(p, b));
    for (index t = 0; t < p.steps; ++t) {
      const auto z = log_softmax(p, b, t);
      for (index k = 0; k < p.classes; ++k)
        p.x(b, t, k) = static_cast<T>(z[at(k)]);
    }
  }
  const auto r = evaluate(p, {.log_probabilities = true, .reduction = sum});
  for (index b = 0; b < p.sequences(); ++b) {
    const expected& e = want[at(b)];
    if (!is_finite(e.value)) {
      CHECK(r.values[at(b)] == T(inf));
      continue;
    }
    CHECK(size_of(wide(wide(r.values[at(b)]) - e.value)) <= slack * (1 + e.value));
    for (std::size_t i = 0; i < e.occupancy.size(); ++i)
      CHECK(size_of(wide(wide(r.gradient[at(b) * e.occupancy.size() + i]) + e.occupancy[i])) <=
            slack);
  }
  // Behind a softmax, the same as the raw scores.
  const auto raw = evaluate(p, {.reduction = sum});
  for (index b = 0; b < p.sequences(); ++b)
    if (is_finite(want[at(b)].value))
      CHECK(std::abs(static_cast<double>(raw.values[at(b)] - r.values[at(b)])) <=
            slack * (1 + static_cast<double>(r.values[at(b)])));
}

TEMPLATE_TEST_CASE("ctc_loss: impossible sequences", "[ctc]", float, double) {
  using T = TestType;
  problem<T> p(4, 3, 0);
  random_numbers random(3);
  p.add({1, 2}, 4, 1, random);
  p.add({1, 1, 2}, 3, 1, random); // needs a blank: 4
  p.add({1, 1, 2}, 4, 1, random);
  p.add({2}, 0, 1, random);
  p.add({2}, 4, 1, random);
  for (index t = 0; t < 4; ++t)
    p.x(4, t, 2) = T(-inf);
  const std::vector<bool> possible{true, false, true, false, false};
  for (const bool zero : {false, true}) {
    const auto r = evaluate(p, {.zero_infinity = zero, .reduction = mean});
    double total = 0;
    for (index b = 0; b < 5; ++b) {
      if (possible[at(b)]) {
        CHECK(std::isfinite(r.values[at(b)]));
        total +=
            static_cast<double>(r.values[at(b)]) / static_cast<double>(p.targets[at(b)].size());
      } else {
        CHECK(r.values[at(b)] == (zero ? T(0) : T(inf)));
      }
      for (index i = 0; i < 12; ++i)
        CHECK((r.gradient[at(b * 12 + i)] == 0) == !possible[at(b)]);
    }
    if (zero)
      CHECK(std::abs(static_cast<double>(r.value) - total / 5) <=
            8 * static_cast<double>(std::numeric_limits<T>::epsilon()) * total);
    else
      CHECK(r.value == T(inf));
  }
}

TEMPLATE_TEST_CASE("ctc_loss: masked classes", "[ctc]", float, double) {
  using T = TestType;
  auto p = make<T>(12, 5, 4, 2, 0, 3);
  auto fewer = problem<T>(12, 4, 3);
  random_numbers random(1);
  for (int& y : p.targets[0])
    y = y % 3;
  fewer.add(p.targets[0], 12, 1, random);
  for (index t = 0; t < 12; ++t) { // class 3 out, and the blank from 4 to 3
    p.x(0, t, 3) = t % 2 ? T(-inf) : -std::numeric_limits<T>::max();
    for (index k = 0; k < 4; ++k)
      fewer.x(0, t, k) = p.x(0, t, k < 3 ? k : 4);
  }
  const auto all = evaluate(p, {.reduction = sum}), four = evaluate(fewer, {.reduction = sum});
  const T slack = 8 * std::numeric_limits<T>::epsilon();
  CHECK(std::abs(all.value - four.value) <= slack * four.value);
  for (index t = 0; t < 12; ++t) {
    CHECK(all.gradient[at(t * 5 + 3)] == 0);
    for (index k = 0; k < 4; ++k)
      CHECK(std::abs(all.gradient[at(t * 5 + (k < 3 ? k : 4))] - four.gradient[at(t * 4 + k)]) <=
            slack);
  }
}

TEMPLATE_TEST_CASE("ctc_loss: NaN and infinity stay in their sequence, the tail is not read",
                   "[ctc]", float, double) {
  using T = TestType;
  auto p = small<T>(0, 2);
  const auto clean = evaluate(p, {.reduction = sum});
  for (index b = 0; b < p.sequences(); ++b)
    for (index i = p.inputs[at(b)] * 3; i < 15; ++i)
      p.scores[at(b * 15 + i)] = static_cast<T>(not_a_number_d);
  const auto tail = evaluate(p, {.reduction = sum});
  CHECK(std::memcmp(tail.gradient.data(), clean.gradient.data(),
                    clean.gradient.size() * sizeof(T)) == 0);
  CHECK(tail.values == clean.values);
  for (const double bad : {not_a_number_d, inf}) {
    auto q = p;
    q.x(13, 2, 1) = static_cast<T>(bad);
    REQUIRE(q.inputs[13] == 4);
    const auto r = evaluate(q, {.zero_infinity = true, .reduction = sum});
    CHECK(std::isnan(r.value));
    for (index b = 0; b < p.sequences(); ++b) {
      CHECK(std::isnan(r.values[at(b)]) == (b == 13));
      for (index i = 0; i < 15; ++i) {
        const T g = r.gradient[at(b * 15 + i)];
        CHECK((b == 13 && i < 12 ? std::isnan(g) : g == clean.gradient[at(b * 15 + i)]));
      }
    }
  }
}

TEMPLATE_TEST_CASE("ctc_loss: reductions, weights, upstream, scale, accumulation", "[ctc]", float,
                   double) {
  using T = TestType;
  problem<T> p(6, 4, 0);
  random_numbers random(9);
  p.add({1, 2, 3}, 6, 2, random);
  p.add({}, 6, 2, random);
  p.add({3, 3}, 5, 2, random);
  p.add({2}, 4, 2, random);
  const std::vector<T> weights{1, T(0.5), 0, 3}, upstream{2, 1, 1, -1};
  const auto plain = evaluate(p, {.reduction = sum});
  const double epsilon = static_cast<double>(std::numeric_limits<T>::epsilon());
  for (const bool is_mean : {false, true})
    for (const double normaliser : {0.0, 10.0}) {
      const auto r = evaluate(
          p, {.reduction = is_mean ? mean : sum},
          {.row_weights = weights, .upstream = upstream, .scale = T(2), .normaliser = normaliser});
      double value = 0;
      for (std::size_t b = 0; b < 4; ++b) {
        const double length = std::max(1.0, static_cast<double>(p.targets[b].size()));
        const double share = is_mean ? 1 / (normaliser > 0 ? normaliser : 4.5) / length : 1;
        const double w = static_cast<double>(weights[b]);
        const double factor = share * w * 2 * static_cast<double>(upstream[b]);
        value += w * share * static_cast<double>(plain.values[b]);
        CHECK(
            std::abs(static_cast<double>(r.values[b]) - w * static_cast<double>(plain.values[b])) <=
            4 * epsilon * w * static_cast<double>(plain.values[b]));
        for (std::size_t i = b * 24; i < b * 24 + 24; ++i)
          CHECK(std::abs(static_cast<double>(r.gradient[i]) -
                         factor * static_cast<double>(plain.gradient[i])) <=
                4 * epsilon * std::abs(factor));
      }
      CHECK(std::abs(static_cast<double>(r.value) - value) <= 8 * epsilon * value);
    }
  // PyTorch's mean, as it stands.
  const auto r = evaluate(p);
  const double by_hand =
      (static_cast<double>(plain.values[0]) / 3 + static_cast<double>(plain.values[1]) +
       static_cast<double>(plain.values[2]) / 2 + static_cast<double>(plain.values[3])) /
      4;
  CHECK(std::abs(static_cast<double>(r.value) - by_hand) <= 8 * epsilon * by_hand);
  auto twice = plain;
  perdita::ctc_loss<T>({.reduction = sum})(p.view(), p.concatenated(), p.inputs, p.lengths(),
                                           matrix_view<T>(twice.gradient.data(), 24, 4),
                                           {.accumulate = true});
  for (std::size_t i = 0; i < twice.gradient.size(); ++i)
    CHECK(std::abs(twice.gradient[i] - 2 * plain.gradient[i]) <=
          2 * std::numeric_limits<T>::epsilon());
}

TEMPLATE_TEST_CASE("ctc_loss: layouts, in place, storage, values alone", "[ctc]", float, double) {
  using T = TestType;
  const auto p = small<T>(2, 2);
  const auto want = evaluate(p, {.reduction = sum});
  const index n = p.sequences();
  const perdita::ctc_loss<T> ctc({.blank = 2, .reduction = sum});
  // PyTorch's steps × sequences × classes, and padded targets, in columns.
  std::vector<T> steps_first(p.scores.size());
  std::vector<std::int64_t> padded(at(n * 5), 99);
  std::vector<std::uint8_t> inputs(p.inputs.begin(), p.inputs.end());
  for (index b = 0; b < n; ++b) {
    for (index t = 0; t < 5; ++t)
      for (index k = 0; k < 3; ++k)
        steps_first[at((t * n + b) * 3 + k)] = p.x(b, t, k);
    for (std::size_t i = 0; i < p.targets[at(b)].size(); ++i)
      padded[i * at(n) + at(b)] = p.targets[at(b)][i];
  }
  matrix_view<T> view(steps_first.data(), n * 5, 3, n * 3, 1);
  view.plane_rows = 5;
  view.plane_stride = 3;
  const matrix_view<const std::int64_t> targets(padded.data(), n, 5, 1, n);
  CHECK(ctc(view, targets, inputs, p.lengths()) == want.value);
  CHECK(ctc(view, targets, inputs, p.lengths(), view) == want.value);
  for (index b = 0; b < n; ++b)
    for (index t = 0; t < 5; ++t)
      for (index k = 0; k < 3; ++k)
        CHECK(steps_first[at((t * n + b) * 3 + k)] == want.gradient[at((b * 5 + t) * 3 + k)]);
  if constexpr (sizeof(T) == 4) {
    auto q = p;
    std::vector<perdita::bfloat16> narrow(p.scores.size()), g(narrow);
    for (std::size_t i = 0; i < narrow.size(); ++i) {
      narrow[i].bits = perdita::core::narrow_bfloat16(p.scores[i]);
      q.scores[i] = perdita::core::widen_bfloat16(narrow[i].bits);
    }
    const auto r = evaluate(q, {.reduction = sum});
    CHECK(ctc(matrix_view(narrow.data(), n * 5, 3), p.concatenated(), p.inputs, p.lengths(),
              matrix_view(g.data(), n * 5, 3)) == r.value);
    for (std::size_t i = 0; i < g.size(); ++i)
      CHECK(g[i].bits == perdita::core::narrow_bfloat16(r.gradient[i]));
  }
}

TEMPLATE_TEST_CASE("ctc_loss: nothing to do", "[ctc]", float, double) {
  using T = TestType;
  const problem<T> none(4, 3, 0);
  CHECK(evaluate(none).value == 0);
  problem<T> p(0, 3, 0);
  random_numbers random(1);
  p.add({}, 0, 1, random);
  CHECK(evaluate(p).value == 0);
  auto q = small<T>(0, 2);
  const std::vector<T> zero(q.targets.size(), T(0));
  for (T& x : q.scores)
    x = static_cast<T>(not_a_number_d);
  const auto r = evaluate(q, {}, {.row_weights = zero});
  CHECK(r.value == 0);
  CHECK(r.gradient == std::vector<T>(q.scores.size(), T(0)));
  CHECK(r.values == zero);
}

TEST_CASE("ctc_loss: bad input is refused, and nothing written", "[ctc]") {
  using Catch::Matchers::ContainsSubstring;
  const std::vector<float> x(2 * 4 * 3, 1);
  std::vector<float> g(24, -77), two(2), three(3);
  const auto untouched = g;
  const std::vector<int> targets{1, 2, 1}, inputs{4, 3}, lengths{2, 1};
  const perdita::ctc_loss<float> ctc;
  const auto attempt = [&](const std::vector<int>& y, const std::vector<int>& n,
                           const std::vector<int>& m, const perdita::call_options<float>& call = {},
                           index rows = 8) {
    ctc(matrix_view(x.data(), rows, 3), y, n, m, matrix_view(g.data(), 8, 3), call);
  };
  attempt(targets, inputs, lengths);
  g = untouched;
  CHECK_THROWS_WITH(attempt({1, 3, 1}, inputs, lengths),
                    ContainsSubstring("targets[1] is 3, expected 0 to 2 without the blank, 0"));
  CHECK_THROWS_WITH(attempt({1, 2, 0}, inputs, lengths), ContainsSubstring("targets[2] is 0"));
  CHECK_THROWS_WITH(attempt({1, 2, -1}, inputs, lengths), ContainsSubstring("targets[2] is -1"));
  CHECK_THROWS_WITH(attempt({1, 2}, inputs, lengths), ContainsSubstring("target_lengths[1] is 1"));
  CHECK_THROWS_WITH(attempt({1, 2, 1, 1}, inputs, lengths),
                    ContainsSubstring("size of targets is 4, expected 3"));
  CHECK_THROWS_WITH(attempt(targets, {4, 5}, lengths),
                    ContainsSubstring("input_lengths[1] is 5, expected 0 to 4"));
  CHECK_THROWS_WITH(attempt(targets, {4, -1}, lengths), ContainsSubstring("input_lengths[1]"));
  CHECK_THROWS_WITH(attempt(targets, {4}, lengths), ContainsSubstring("input_lengths is 1"));
  CHECK_THROWS_WITH(attempt(targets, inputs, {3, -1}), ContainsSubstring("target_lengths[1]"));
  CHECK_THROWS_WITH(attempt(targets, inputs, lengths, {}, 7), ContainsSubstring("score rows is 7"));
  CHECK_THROWS_WITH(attempt(targets, inputs, lengths, {}, 6),
                    ContainsSubstring("input_lengths[0]"));
  CHECK_THROWS_WITH(attempt(targets, inputs, lengths, {.values = three}),
                    ContainsSubstring("values is 3"));
  CHECK_THROWS_WITH(attempt(targets, inputs, lengths, {.log_sum_exp = two}),
                    ContainsSubstring("by-product"));
  CHECK_THROWS_WITH(
      ctc(matrix_view(x.data(), 8, 3), matrix_view(targets.data(), 1, 3), inputs, lengths),
      ContainsSubstring("target rows is 1"));
  CHECK_THROWS_WITH(ctc(matrix_view(x.data(), 8, 3), targets, inputs, lengths,
                        matrix_view(const_cast<float*>(x.data()) + 1, 8, 3)),
                    ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(
      perdita::ctc_loss<float>({.blank = 3})(matrix_view(x.data(), 8, 3), targets, inputs, lengths),
      ContainsSubstring("blank is 3"));
  CHECK_THROWS_AS(perdita::ctc_loss<float>({.blank = -1}), std::invalid_argument);
  CHECK_THROWS_AS(perdita::ctc_loss<float>({.reduction = perdita::reduction(7)}),
                  std::invalid_argument);
  CHECK(g == untouched);
}

TEMPLATE_TEST_CASE("ctc_loss: the same bits for any number of threads", "[ctc][threads]", float,
                   double) {
  using T = TestType;
  const auto p = small<T>(0, 2);
  const auto one = evaluate(p, {.zero_infinity = true}, {.run_on = perdita::serial});
  perdita::workspace memory;
  for (const std::size_t n : {2U, 7U}) {
    const threads_executor pool(n, task_order::shuffled);
    CHECK(evaluate(p, {.zero_infinity = true}, {.run_on = pool, .memory = &memory}) == one);
  }
  // A sequence by itself, too.
  for (index b = 0; b < p.sequences(); b += 7) {
    problem<T> alone(p.steps, p.classes, p.blank);
    alone.targets = {p.targets[at(b)]};
    alone.inputs = {p.inputs[at(b)]};
    alone.scores.assign(p.scores.begin() + b * 15, p.scores.begin() + b * 15 + 15);
    const auto all = evaluate(p, {.reduction = sum}), r = evaluate(alone, {.reduction = sum});
    CHECK(r.values[0] == all.values[at(b)]);
    CHECK(std::equal(r.gradient.begin(), r.gradient.end(), all.gradient.begin() + b * 15));
  }
}

} // namespace perdita_tests
