// SPDX-License-Identifier: MIT

// The sequence head: formula sheet 0, 1, 2 and 12. Every source of
// log-probabilities against wide arithmetic, the gradient of a loss that couples
// the batch against differences, and losses of divergences from hidden states.

#include <perdita/preference/degrees.hpp>
#include <perdita/preference/dpo.hpp>
#include <perdita/preference/token_level.hpp>
#include <perdita/preference/unlearning.hpp>
#include <perdita/sequence.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/numbers.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

using perdita::affine;
using perdita::matrix_view;
using perdita::sequence_call;
using perdita::sequence_gradient;
using perdita::sequence_layout;
using perdita::sequence_options;

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan_d = std::numeric_limits<double>::quiet_NaN();
std::size_t at(index n) { return static_cast<std::size_t>(n); }
/// The size of a number, for allowances.
judged about(const wide& x) { return std::abs(static_cast<judged>(x)); }

/// Hidden states and weights of a model, and the scores that another one has.
template <class T> struct model {
  index features, classes;
  std::vector<T> hidden, weights, bias, scores;
  model(index rows, index d, index v, std::uint64_t seed) : features(d), classes(v) {
    random_numbers random(seed);
    const auto fill = [&](std::vector<T>& x, index n, double spread) {
      for (index i = 0; i < n; ++i)
        x.push_back(static_cast<T>(spread * random.normal()));
    };
    fill(hidden, rows * d, 1);
    fill(weights, v * d, 2 / std::sqrt(static_cast<double>(d)));
    fill(bias, v, 1);
    fill(scores, rows * v, 3);
  }
  index rows() const { return static_cast<index>(hidden.size()) / std::max<index>(features, 1); }
  auto x() const { return matrix_view<const T>(hidden.data(), rows(), features); }
  auto a() const { return matrix_view<const T>(weights.data(), classes, features); }
  auto z() const { return matrix_view<const T>(scores.data(), rows(), classes); }
};

/// Ragged sequences, some tokens of which do not count.
template <class T> struct tokens {
  std::vector<int> offsets{0};
  model<T> policy, reference;
  std::vector<int> labels;
  std::vector<T> token_weights, log_p;

  tokens(const std::vector<int>& lengths, index d, index v, std::uint64_t seed)
      : policy(total(lengths), d, v, seed), reference(total(lengths), d + 2, v, seed + 1) {
    for (const int n : lengths)
      offsets.push_back(offsets.back() + n);
    random_numbers random(seed + 2);
    for (index t = 0; t < rows(); ++t) {
      const bool prompt = random.below(4) == 0;
      labels.push_back(prompt ? -100 : static_cast<int>(random.below(static_cast<unsigned>(v))));
      token_weights.push_back(static_cast<T>(random.below(5) == 0 ? 0 : random.uniform(-0.5, 1.5)));
      log_p.push_back(static_cast<T>(-8 * random.uniform(0, 1)));
    }
  }
  static index total(const std::vector<int>& lengths) {
    index n = 0;
    for (const int k : lengths)
      n += k;
    return n;
  }
  index rows() const { return policy.rows(); }
  index sequences() const { return static_cast<index>(offsets.size()) - 1; }
  sequence_layout layout() const { return sequence_layout::ragged(offsets); }
};

enum class source { log_probabilities, scores, hidden };
constexpr source all_sources[] = {source::log_probabilities, source::scores, source::hidden};

// ---- what is right

/// A row's prediction that counts: of which token, in which sequence.
struct prediction {
  index row, token, sequence;
  wide factor; ///< W_t
};
template <class T>
std::vector<prediction> predictions(const tokens<T>& p, const sequence_options& o, bool weighed,
                                    std::vector<index>& counts) {
  std::vector<prediction> all;
  counts.assign(at(p.sequences()), 0);
  for (index s = 0; s < p.sequences(); ++s) {
    std::vector<prediction> mine;
    for (index token = p.offsets[at(s)]; token < p.offsets[at(s + 1)]; ++token) {
      const index row = o.shift ? token - 1 : token;
      const wide w = weighed ? wide(p.token_weights[at(token)]) : wide(1);
      if (row >= p.offsets[at(s)] && p.labels[at(token)] != -100 && w != 0)
        mine.push_back({row, token, s, w});
    }
    counts[at(s)] = static_cast<index>(mine.size());
    for (prediction& x : mine) {
      if (o.average)
        x.factor = x.factor / static_cast<double>(mine.size());
      all.push_back(x);
    }
  }
  return all;
}

/// Scores of a row over the temperature, their soft-max, and how large what is added up to them
/// is.
struct wide_row {
  std::vector<wide> z, p;
  wide lse;
  judged size = 0;
  wide log_p(index k) const { return z[at(k)] - lse; }
  wide entropy() const {
    wide sum = 0;
    for (std::size_t j = 0; j < z.size(); ++j)
      sum -= weighted(p[j], wide(z[j] - lse));
    return sum;
  }
  wide divergence_from(const wide_row& q) const {
    wide sum = 0;
    for (std::size_t j = 0; j < z.size(); ++j)
      sum += weighted(p[j], wide((z[j] - lse) - (q.z[j] - q.lse)));
    return sum;
  }
};
template <class T> wide_row row_of(const model<T>& m, source from, index row, double temperature) {
  wide_row r;
  wide top = -infinity(), sum = 0;
  for (index k = 0; k < m.classes; ++k) {
    wide z = 0;
    judged size = 0;
    const auto add = [&](const wide& part) {
      z += part;
      size += about(part);
    };
    if (from == source::scores) {
      add(m.scores[at(row * m.classes + k)]);
    } else {
      add(m.bias[at(k)]);
      for (index d = 0; d < m.features; ++d)
        add(wide(m.hidden[at(row * m.features + d)]) * wide(m.weights[at(k * m.features + d)]));
    }
    r.z.push_back(z / temperature);
    top = larger(top, r.z.back());
    if (std::isfinite(size)) // a masked class has no rounding
      r.size = std::max(r.size, size / static_cast<judged>(temperature));
  }
  for (const wide& z : r.z) {
    r.p.push_back(exp(wide(z - top)));
    sum += r.p.back();
  }
  for (wide& share : r.p)
    share /= sum;
  r.lse = top + log(sum);
  return r;
}

// ---- what the library says

template <class T> struct answer {
  std::vector<double> scores;
  std::vector<T> log_p, lse, entropy, reverse, forward, of_reference;
  std::vector<std::int64_t> counts;
  std::vector<T> d_first, d_weights,
      d_bias; // of log-probabilities, scores or hidden states
  bool operator==(const answer&) const = default;
};

template <class T>
answer<T> ask(const tokens<T>& p, source from, const sequence_options& o,
              const std::vector<double>& d_scores, sequence_call<T> call,
              const sequence_layout& layout, bool by_products, const sequence_gradient<T>& how = {},
              T before = 7) {
  const perdita::sequence_head<T> head(o);
  answer<T> a;
  const auto rows = at(layout.rows());
  a.scores.assign(at(layout.sequences()), 7);
  a.counts.assign(a.scores.size(), 7);
  call.counts = a.counts;
  a.log_p.assign(rows, 7);
  call.target_log_probability = a.log_p;
  if (by_products && from != source::log_probabilities) {
    for (auto* v : {&a.lse, &a.entropy, &a.reverse, &a.forward, &a.of_reference})
      v->assign(rows, 7);
    call.log_sum_exp = a.lse;
    call.entropy = a.entropy;
    call.reverse_kl = a.reverse;
    call.forward_kl = a.forward;
    call.reference_log_probability = a.of_reference;
    const auto of_reference = p.reference.a();
    if (from == source::scores)
      call.reference = perdita::reference_model<T>(p.reference.z());
    else
      call.reference =
          perdita::reference_model<T>(p.reference.x(), affine(of_reference, p.reference.bias));
  }
  const index classes = p.policy.classes, features = p.policy.features;
  if (from == source::log_probabilities) {
    a.d_first.assign(rows, before);
    head.scores(p.log_p, p.labels, layout, a.scores, call).backward(d_scores, a.d_first, how);
  } else if (from == source::scores) {
    a.d_first.assign(p.policy.scores.size(), before);
    head.scores(p.policy.z(), p.labels, layout, a.scores, call)
        .backward(d_scores, matrix_view<T>(a.d_first.data(), layout.rows(), classes), how);
  } else {
    a.d_first.assign(p.policy.hidden.size(), before);
    a.d_weights.assign(p.policy.weights.size(), before);
    a.d_bias.assign(p.policy.bias.size(), before);
    matrix_view<T> d_weights(a.d_weights.data(), classes, features);
    const auto a_view = p.policy.a();
    head.scores(p.policy.x(), affine(a_view, p.policy.bias), p.labels, layout, a.scores, call)
        .backward(d_scores, matrix_view<T>(a.d_first.data(), layout.rows(), features),
                  affine(d_weights, a.d_bias), how);
  }
  return a;
}

std::vector<double> some_slopes(index n, std::uint64_t seed) {
  random_numbers random(seed);
  std::vector<double> d;
  for (index i = 0; i < n; ++i)
    d.push_back(random.uniform(-1, 1));
  return d;
}

/// The same text in rows of equal length; what is between must not be read.
template <class T> tokens<T> pad(const tokens<T>& p, index steps, std::vector<int>& lengths) {
  tokens<T> q = p;
  const index rows = p.sequences() * steps;
  const auto spread = [&](const auto& from, auto& to, index width, auto filler) {
    to.assign(at(rows * width), filler);
    for (index s = 0; s < p.sequences(); ++s)
      std::copy(from.begin() + p.offsets[at(s)] * width,
                from.begin() + p.offsets[at(s + 1)] * width, to.begin() + s * steps * width);
  };
  const T poison = static_cast<T>(nan_d);
  spread(p.labels, q.labels, 1, 1000000);
  spread(p.token_weights, q.token_weights, 1, poison);
  spread(p.log_p, q.log_p, 1, poison);
  for (const auto& [from, to] : {std::pair(&p.policy, &q.policy), {&p.reference, &q.reference}}) {
    spread(from->hidden, to->hidden, from->features, poison);
    spread(from->scores, to->scores, from->classes, poison);
  }
  lengths.clear();
  for (index s = 0; s < p.sequences(); ++s)
    lengths.push_back(p.offsets[at(s + 1)] - p.offsets[at(s)]);
  return q;
}

/// What is right of the gradients, and what their errors are judged by.
template <class T> struct expected_gradients {
  const tokens<T>& p;
  source from;
  std::vector<wide> d_first, d_weights, d_bias;
  std::vector<judged> u_first, u_weights, u_bias;

  expected_gradients(const tokens<T>& data, source of) : p(data), from(of) {
    const model<T>& m = p.policy;
    if (from == source::log_probabilities) {
      d_first.resize(at(p.rows()));
    } else if (from == source::scores) {
      d_first.resize(m.scores.size());
    } else {
      d_first.resize(m.hidden.size());
      d_weights.resize(m.weights.size());
      d_bias.resize(m.bias.size());
    }
    u_first.resize(d_first.size());
    u_weights.resize(d_weights.size());
    u_bias.resize(d_bias.size());
  }
  /// The gradient of a row's score of class k, and its unit.
  void add(index row, index k, const wide& g, judged u) {
    const model<T>& m = p.policy;
    const index v = m.classes, d = m.features;
    if (from == source::scores) {
      d_first[at(row * v + k)] = g;
      u_first[at(row * v + k)] = u;
      return;
    }
    d_bias[at(k)] += g;
    u_bias[at(k)] += u;
    for (index i = 0; i < d; ++i) {
      const wide in = m.hidden[at(row * d + i)], w = m.weights[at(k * d + i)];
      d_first[at(row * d + i)] += g * w;
      u_first[at(row * d + i)] += u * about(w);
      d_weights[at(k * d + i)] += g * in;
      u_weights[at(k * d + i)] += u * about(in);
    }
  }
  void judge(const answer<T>& a, double allowed, error_judge& of_slopes) const {
    const judged epsilon = std::numeric_limits<T>::epsilon();
    const auto each = [&](const std::vector<T>& got, const auto& right, const auto& units) {
      for (std::size_t i = 0; i < got.size(); ++i)
        of_slopes.within(size_of(wide(got[i] - right[i])), allowed, epsilon * units[i]);
    };
    each(a.d_first, d_first, u_first);
    each(a.d_weights, d_weights, u_weights);
    each(a.d_bias, d_bias, u_bias);
  }
};

template <class T>
void check(const tokens<T>& p, source from, const sequence_options& o, bool weighed,
           error_judge& of_values, error_judge& of_slopes) {
  const judged epsilon = std::numeric_limits<T>::epsilon();
  const double allowed = 4;
  std::vector<index> counts;
  const auto predicted = predictions(p, o, weighed, counts);
  const auto d_scores = some_slopes(p.sequences(), 5);
  sequence_call<T> call;
  if (weighed)
    call.token_weights = p.token_weights;
  const auto a = ask(p, from, o, d_scores, call, p.layout(), true);

  std::vector<wide> score(at(p.sequences()));
  std::vector<judged> unit(score.size());
  expected_gradients<T> right(p, from);
  std::vector<bool> counted(at(p.rows()), false);
  for (const prediction& x : predicted) {
    const auto r = at(x.row);
    counted[r] = true;
    const wide c = x.factor * d_scores[at(x.sequence)];
    if (from == source::log_probabilities) {
      score[at(x.sequence)] += x.factor * p.log_p[r];
      unit[at(x.sequence)] += about(x.factor * p.log_p[r]) * 0x1p-52L / epsilon;
      right.d_first[r] = c;
      right.u_first[r] = about(c);
      CHECK(a.log_p[r] == p.log_p[r]);
      continue;
    }
    const index y = p.labels[at(x.token)];
    const wide_row z = row_of(p.policy, from, x.row, o.temperature),
                   q = row_of(p.reference, from, x.row, o.temperature);
    const wide lp = z.log_p(y), lq = q.log_p(y), reverse = z.divergence_from(q),
               forward = q.divergence_from(z);
    // A score's error, over ε: that of log p.
    const judged reach = 1 + z.size, both = reach + q.size;
    score[at(x.sequence)] += x.factor * lp;
    unit[at(x.sequence)] += about(x.factor) * (about(lp) + z.size);
    const auto near = [&](T got, const wide& expected, judged of) {
      of_values.within(size_of(wide(got - expected)), allowed, epsilon * of);
    };
    near(a.log_p[r], lp, about(lp) + reach);
    near(a.lse[r], z.lse, reach);
    near(a.entropy[r], z.entropy(), reach * 2);
    near(a.reverse[r], reverse, both * (2 + static_cast<judged>(reverse)));
    near(a.forward[r], forward, both * (2 + static_cast<judged>(forward)));
    near(a.of_reference[r], lq, about(lq) + 1 + q.size);
    const judged of_c = about(c) / static_cast<judged>(o.temperature);
    for (index k = 0; k < p.policy.classes; ++k) {
      const wide& share = z.p[at(k)];
      const wide off = (k == y ? 1 : 0) - share;
      right.add(x.row, k, c * off / o.temperature, of_c * (about(share) * reach + about(off)));
    }
  }
  for (std::size_t s = 0; s < score.size(); ++s) {
    of_values.within(size_of(wide(a.scores[s] - score[s])), allowed, epsilon * unit[s]);
    CHECK(a.counts[s] == counts[s]);
    if (counts[s] == 0)
      CHECK(a.scores[s] == 0);
  }
  right.judge(a, allowed, of_slopes);
  for (std::size_t r = 0; r < counted.size(); ++r)
    if (!counted[r])
      for (const auto* of : {&a.log_p, &a.lse, &a.entropy, &a.reverse, &a.forward, &a.of_reference})
        if (!of->empty())
          CHECK((*of)[r] == 0);
}

// ---- slopes of what belongs to a row

/// ∂L/∂ of every row's log p, KL(p ‖ q), KL(q ‖ p) and H(p); 0 where `kinds` lacks the bit.
template <class T> struct row_slopes {
  std::vector<T> log_p, reverse, forward, entropy;

  explicit row_slopes(index rows, int kinds = 15, std::uint64_t seed = 40) {
    int kind = 1;
    for (auto* of : {&log_p, &reverse, &forward, &entropy}) {
      for (const double x : some_slopes(rows, ++seed))
        of->push_back(static_cast<T>((kinds & kind) != 0 ? x : 0));
      kind *= 2;
    }
  }
  sequence_gradient<T> how() const {
    sequence_gradient<T> g;
    g.d_log_probability = log_p;
    g.d_reverse_kl = reverse;
    g.d_forward_kl = forward;
    g.d_entropy = entropy;
    return g;
  }
};

/// The formulas of gradients, of Σ d_i s_i and of what the slopes are of.
template <class T>
expected_gradients<T> right_slopes(const tokens<T>& p, source from, const sequence_options& o,
                                   const std::vector<double>& d_scores,
                                   const row_slopes<T>& slopes) {
  expected_gradients<T> right(p, from);
  std::vector<index> counts;
  for (const prediction& x : predictions(p, o, true, counts)) {
    const auto row = at(x.row);
    const wide_row z = row_of(p.policy, from, x.row, o.temperature),
                   q = row_of(p.reference, from, x.row, o.temperature);
    const wide c = x.factor * d_scores[at(x.sequence)] + slopes.log_p[row], a = slopes.reverse[row],
               b = slopes.forward[row], e = slopes.entropy[row];
    const wide kl = a == 0 ? wide(0) : z.divergence_from(q), h = z.entropy();
    const judged reach = 1 + z.size, both = reach + q.size;
    for (index k = 0; k < p.policy.classes; ++k) {
      const wide log_p = z.log_p(k), log_q = q.log_p(k), share = z.p[at(k)], other = q.p[at(k)];
      const wide hit = k == p.labels[at(x.token)] ? 1 : 0;
      const wide of_kl = weighted(share, wide(log_p - log_q - kl)),
                 of_h = weighted(share, wide(log_p + h));
      const wide g = c * (hit - share) + weighted(a, of_kl) + b * (share - other) - e * of_h;
      const judged s = about(share);
      const judged u = about(c) * (s * reach + about(hit - share)) +
                       (a == 0 ? judged(0) : about(a) * (s * both + reach * about(of_kl))) +
                       about(b) * (s * reach + about(other) * (1 + q.size)) +
                       about(e) * reach * (s + about(of_h));
      right.add(x.row, k, g / o.temperature, u / static_cast<judged>(o.temperature));
    }
  }
  return right;
}
template <class T>
void check_slopes(const tokens<T>& p, source from, const sequence_options& o, int kinds,
                  error_judge& judge) {
  const row_slopes<T> slopes(p.rows(), kinds);
  auto d_scores = some_slopes(p.sequences(), 5);
  if ((kinds & 1) == 0) // a divergence or an entropy alone
    std::fill(d_scores.begin(), d_scores.end(), 0);
  sequence_call<T> call;
  call.token_weights = p.token_weights;
  const auto a = ask(p, from, o, d_scores, call, p.layout(), true, slopes.how());
  right_slopes(p, from, o, d_scores, slopes).judge(a, 4, judge);
}

/// The same numbers in wide arithmetic, where they can be moved by little.
template <class T> tokens<wide> widened(const tokens<T>& p) {
  tokens<wide> q({}, p.policy.features, p.policy.classes, 1);
  q.offsets = p.offsets;
  q.labels = p.labels;
  q.token_weights.assign(p.token_weights.begin(), p.token_weights.end());
  for (const auto& [from, to] : {std::pair(&p.policy, &q.policy), {&p.reference, &q.reference}}) {
    to->features = from->features;
    to->hidden.assign(from->hidden.begin(), from->hidden.end());
    to->weights.assign(from->weights.begin(), from->weights.end());
    to->bias.assign(from->bias.begin(), from->bias.end());
  }
  return q;
}
/// Judges the gradients of hidden states, weights and bias by differences of loss(p).
template <class T, class Loss>
void compare_with_differences(const tokens<T>& p, const std::vector<T>& d_hidden,
                              const std::vector<T>& d_weights, const std::vector<T>& d_bias,
                              double allowed, error_judge& judge, Loss loss) {
  tokens<wide> q = widened(p);
  const wide h = 1e-9;
  const auto compare = [&](std::vector<wide>& in, const std::vector<T>& found) {
    REQUIRE(in.size() == found.size());
    wide most = 0;
    std::vector<wide> slopes;
    for (wide& x : in) {
      const wide before = x;
      x = before + h;
      const wide up = loss(q);
      x = before - h;
      slopes.push_back((up - loss(q)) / (2 * h));
      x = before;
      most = larger(most, size_of(slopes.back()));
    }
    CHECK(most > 0.01);
    for (std::size_t i = 0; i < found.size(); ++i)
      judge.within(size_of(wide(found[i] - slopes[i])), allowed,
                   (1 + most) * wide(std::numeric_limits<T>::epsilon()) + h * h * (1 + most));
  };
  compare(q.policy.hidden, d_hidden);
  compare(q.policy.weights, d_weights);
  compare(q.policy.bias, d_bias);
}

} // namespace

TEMPLATE_TEST_CASE("sequence_head: scores, by-products and gradients against the formula",
                   "[sequence]", float, double) {
  using T = TestType;
  const tokens<T> p({7, 1, 12, 0, 5, 2}, 5, 11, 3);
  const char* const names[] = {"of log-probabilities", "of scores", "of hidden states"};
  for (const source from : all_sources) {
    error_judge of_values, of_slopes;
    for (const bool shift : {true, false})
      for (const bool average : {false, true})
        for (const bool weighed : {false, true})
          for (const double temperature : {1.0, 1.75}) {
            INFO(static_cast<int>(from) << shift << average << weighed << temperature);
            check(p, from, {.average = average, .shift = shift, .temperature = temperature},
                  weighed, of_values, of_slopes);
            REQUIRE(of_values.all_within());
            REQUIRE(of_slopes.all_within());
          }
    report_accuracy<T>("sequence_head", names[static_cast<int>(from)], in_epsilons_of_terms,
                       of_values, of_slopes);
  }
}

TEMPLATE_TEST_CASE("sequence_head: more rows and classes than a block and a piece", "[sequence]",
                   float, double) {
  using T = TestType;
  tokens<T> p({90, 130, 75, 40}, 3, 140, 8);
  error_judge of_values, of_slopes;
  for (const source from : {source::scores, source::hidden})
    check(p, from, {.average = true}, false, of_values, of_slopes);
  CHECK(of_values.all_within());
  CHECK(of_slopes.all_within());
  for (auto* m : {&p.policy, &p.reference}) // sums that must move to another shift, and matter
    for (index k = 0; k < 140; ++k)
      m->bias[at(k)] += static_cast<T>(17 * (k / 64));
  error_judge of_far_slopes;
  check(p, source::hidden, {.average = true}, false, of_values, of_far_slopes);
  CHECK(of_values.all_within());
  CHECK(of_far_slopes.share() <= 4); // scores of up to 40, whose rounding the slopes have
}

TEST_CASE("sequence_head: the gradient of a loss that couples the batch, by "
          "differences",
          "[sequence]") {
  tokens<double> p({4, 6, 3, 5}, 3, 7, 21);
  std::fill(p.labels.begin() + p.offsets[2] + 1, p.labels.begin() + p.offsets[3], 2);
  const perdita::sequence_head<double> head({.average = true});
  // softplus(s1 − s0) + softplus(s3 − s2) + the product of all
  const auto loss = [](std::span<const double> s, std::span<double> d) {
    double value = s[0] * s[1] * s[2] * s[3];
    for (std::size_t i = 0; i < 4; ++i)
      d[i] = s[(i + 1) % 4] * s[(i + 2) % 4] * s[(i + 3) % 4];
    for (const std::size_t i : {0U, 2U}) {
      const double x = s[i + 1] - s[i], slope = 1 / (1 + std::exp(-x));
      value += std::log1p(std::exp(x));
      d[i + 1] += slope;
      d[i] -= slope;
    }
    return value;
  };
  sequence_call<double> call;
  call.token_weights = p.token_weights;
  const index v = p.policy.classes, d = p.policy.features;
  std::vector<double> d_log_p(p.log_p.size()), d_scores(p.policy.scores.size()),
      d_hidden(p.policy.hidden.size()), d_weights(p.policy.weights.size()),
      d_bias(p.policy.bias.size());
  const auto value = [&](source from) {
    matrix_view<double> dx(d_hidden.data(), p.rows(), d), da(d_weights.data(), v, d);
    const auto a = p.policy.a();
    if (from == source::log_probabilities)
      return head(loss, p.log_p, p.labels, p.layout(), d_log_p, call);
    if (from == source::scores)
      return head(loss, p.policy.z(), p.labels, p.layout(),
                  matrix_view<double>(d_scores.data(), p.rows(), v), call);
    return head(loss, p.policy.x(), affine(a, p.policy.bias), p.labels, p.layout(), dx,
                affine(da, d_bias), call);
  };
  const auto compare = [&](source from, std::vector<double>& input,
                           const std::vector<double>& slopes) {
    value(from);
    const std::vector<double> found = slopes;
    double size = 0, worst = 0;
    for (std::size_t i = 0; i < input.size(); ++i) {
      const double before = input[i], h = 1e-4;
      const auto moved = [&](double by) {
        input[i] = before + by;
        return value(from);
      };
      const double slope = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h);
      input[i] = before;
      size = std::max(size, std::fabs(slope));
      worst = worse(worst, std::fabs(slope - found[i]));
    }
    CHECK(size > 0.01);
    CHECK(worst < 1e-9 * (1 + size));
  };
  compare(source::log_probabilities, p.log_p, d_log_p);
  compare(source::scores, p.policy.scores, d_scores);
  compare(source::hidden, p.policy.hidden, d_hidden);
  compare(source::hidden, p.policy.weights, d_weights);
  compare(source::hidden, p.policy.bias, d_bias);
}

TEST_CASE("sequence_head: gradients of divergences, by differences", "[sequence]") {
  tokens<double> p({4, 3, 5}, 3, 6, 33);
  const perdita::sequence_head<double> head({.temperature = 1.5});
  const std::vector<double> d_scores = some_slopes(3, 1), k = some_slopes(p.rows(), 2),
                            m = some_slopes(p.rows(), 3);
  std::vector<double> scores(3), reverse(k.size()), forward(k.size());
  sequence_call<double> call;
  call.reference = perdita::reference_model<double>(p.reference.z());
  call.reverse_kl = reverse;
  call.forward_kl = forward;
  std::vector<double> slopes(p.policy.scores.size());
  const auto value = [&] {
    const auto pass = head.scores(p.policy.z(), p.labels, p.layout(), scores, call);
    sequence_gradient<double> how{.scale = 2};
    how.d_forward_kl = k;
    how.d_reverse_kl = m;
    pass.backward(d_scores, matrix_view<double>(slopes.data(), p.rows(), p.policy.classes), how);
    double sum = 0;
    for (std::size_t i = 0; i < 3; ++i)
      sum += 2 * d_scores[i] * scores[i];
    for (std::size_t r = 0; r < k.size(); ++r)
      sum += 2 * (k[r] * forward[r] + m[r] * reverse[r]);
    return sum;
  };
  value();
  const std::vector<double> found = slopes;
  for (std::size_t i = 0; i < found.size(); ++i) {
    double& x = p.policy.scores[i];
    const double before = x, h = 1e-4;
    const auto moved = [&](double by) {
      x = before + by;
      return value();
    };
    const double slope = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h);
    x = before;
    REQUIRE(std::fabs(slope - found[i]) < 1e-9);
  }
}

TEMPLATE_TEST_CASE("sequence_head: slopes of log-probabilities, divergences and entropies",
                   "[sequence]", float, double) {
  using T = TestType;
  const char* const names[] = {"", "slopes of rows, of scores", "slopes of rows, of hidden states"};
  for (const source from : {source::scores, source::hidden}) {
    error_judge judge, none;
    const tokens<T> p({7, 1, 12, 0, 5, 2}, 5, 11, 3);
    for (const bool shift : {true, false})
      for (const double temperature : {1.0, 1.75})
        for (const int kinds : {1, 2, 4, 8, 15})
          check_slopes(p, from, {.average = shift, .shift = shift, .temperature = temperature},
                       kinds, judge);
    CHECK(judge.all_within());
    tokens<T> sure = p; // of its labels, in both models
    for (auto* m : {&sure.policy, &sure.reference})
      for (std::size_t k = 0; k < 11; ++k)
        m->bias[k] = static_cast<T>(k == 4 ? 25 : 0);
    for (int& label : sure.labels)
      label = label < 0 ? label : 4;
    for (std::size_t r = 0; r < at(p.rows()); ++r)
      sure.policy.scores[11 * r + 4] = sure.reference.scores[11 * r + 4] = 30;
    tokens<T> near = p; // almost the same model
    near.reference = near.policy;
    for (auto* of : {&near.reference.hidden, &near.reference.scores})
      for (T& x : *of)
        x *= static_cast<T>(1 + 0x1p-12);
    for (const auto* q : {&sure, &near})
      for (const int kinds : {2, 4, 8, 15})
        check_slopes(*q, from, {.temperature = 1.25}, kinds, judge);
    CHECK(judge.all_within());
    report_accuracy<T>("sequence_head", names[static_cast<int>(from)], in_epsilons_of_terms, none,
                       judge);
  }
  // More rows than a block has, classes in parts of a piece, and pieces that are not held.
  error_judge of_many;
  check_slopes(tokens<T>({150, 130, 40}, 3, 140, 8), source::hidden, {}, 15, of_many);
  check_slopes(tokens<T>({3, 4}, 3, 4200, 9), source::hidden, {.shift = false}, 15, of_many);
  CHECK(of_many.all_within());
}

TEMPLATE_TEST_CASE("sequence_head: slopes of rows, by differences in wide arithmetic", "[sequence]",
                   float, double) {
  using T = TestType;
  const tokens<T> p({4, 3, 5}, 3, 6, 33);
  const sequence_options o{.average = true, .temperature = 1.5};
  const auto d_scores = some_slopes(3, 1);
  const row_slopes<T> slopes(p.rows());
  sequence_call<T> call;
  call.token_weights = p.token_weights;
  const auto a = ask(p, source::hidden, o, d_scores, call, p.layout(), true, slopes.how());
  error_judge judge, none;
  compare_with_differences(
      p, a.d_first, a.d_weights, a.d_bias, 4, judge, [&](const tokens<wide>& q) {
        std::vector<index> counts;
        wide sum = 0;
        for (const prediction& x : predictions(q, o, true, counts)) {
          const auto r = at(x.row);
          const wide_row z = row_of(q.policy, source::hidden, x.row, o.temperature),
                         y = row_of(q.reference, source::hidden, x.row, o.temperature);
          sum += (x.factor * d_scores[at(x.sequence)] + slopes.log_p[r]) *
                     z.log_p(q.labels[at(x.token)]) +
                 slopes.reverse[r] * z.divergence_from(y) +
                 slopes.forward[r] * y.divergence_from(z) + slopes.entropy[r] * z.entropy();
        }
        return sum;
      });
  CHECK(judge.all_within());
  report_accuracy<T>("sequence_head", "slopes of rows, by differences", in_epsilons_of_terms, none,
                     judge);
}

TEMPLATE_TEST_CASE("sequence_head: slopes of rows, ragged or padded, on any threads", "[sequence]",
                   float, double) {
  using T = TestType;
  for (const index v : {70, 4200}) { // held, and not
    const tokens<T> p(v == 70 ? std::vector{90, 0, 230, 1} : std::vector{5, 0, 7, 1}, 4, v, 12);
    std::vector<int> lengths;
    const index steps = v == 70 ? 231 : 9;
    const tokens<T> padded = pad(p, steps, lengths);
    const auto lies = sequence_layout::padded(p.sequences(), steps, lengths);
    const row_slopes<T> slopes(p.rows());
    row_slopes<T> apart(padded.rows());
    const auto spread = [&](const std::vector<T>& from, std::vector<T>& to) {
      to.assign(to.size(), static_cast<T>(nan_d));
      for (index s = 0; s < p.sequences(); ++s)
        std::copy(from.begin() + p.offsets[at(s)], from.begin() + p.offsets[at(s + 1)],
                  to.begin() + s * steps);
    };
    spread(slopes.log_p, apart.log_p);
    spread(slopes.reverse, apart.reverse);
    spread(slopes.forward, apart.forward);
    spread(slopes.entropy, apart.entropy);
    const auto d_scores = some_slopes(p.sequences(), 9);
    sequence_call<T> call, wide_call;
    call.run_on = perdita::serial;
    call.token_weights = p.token_weights;
    wide_call.token_weights = padded.token_weights;
    const auto expected =
        ask<T>(p, source::hidden, {}, d_scores, call, p.layout(), true, slopes.how());
    const threads_executor run_on(3, task_order::shuffled);
    call.run_on = run_on;
    CHECK(ask<T>(p, source::hidden, {}, d_scores, call, p.layout(), true, slopes.how()) ==
          expected);
    const auto other =
        ask<T>(padded, source::hidden, {}, d_scores, wide_call, lies, true, apart.how());
    CHECK(other.d_weights == expected.d_weights);
    CHECK(other.d_bias == expected.d_bias);
    bool same = true;
    for (index s = 0; s < p.sequences(); ++s)
      for (index t = 0; t < steps; ++t)
        for (index i = 0; i < 4; ++i)
          same =
              same && other.d_first[at((s * steps + t) * 4 + i)] ==
                          (t < lengths[at(s)] ? expected.d_first[at((p.offsets[at(s)] + t) * 4 + i)]
                                              : T(0));
    CHECK(same);

    auto how = slopes.how();
    how.accumulate = true;
    how.scale = 4;
    const auto more = ask<T>(p, source::hidden, {}, d_scores, call, p.layout(), true, how, T(1));
    error_judge added;
    const auto compare = [&](const std::vector<T>& twice, const std::vector<T>& once) {
      for (std::size_t i = 0; i < twice.size(); ++i)
        added.within(size_of(wide(twice[i] - (1 + 4 * wide(once[i])))), 32,
                     wide(std::numeric_limits<T>::epsilon()) * (1 + 4 * size_of(wide(once[i]))));
    };
    compare(more.d_weights, expected.d_weights);
    compare(more.d_bias, expected.d_bias);
    compare(more.d_first, expected.d_first);
    CHECK(added.all_within());
  }
}

TEST_CASE("sequence_head: slopes of log-probabilities are as good as scores' slopes",
          "[sequence]") {
  using T = float;
  const tokens<T> p({6, 9}, 4, 9, 17);
  row_slopes<T> slopes(p.rows());
  const std::vector<double> ones(2, 1), zeros(2, 0);
  sequence_gradient<T> how;
  how.d_log_probability = slopes.log_p;
  sequence_call<T> call;
  call.token_weights = slopes.log_p;
  const sequence_options o{.shift = false};
  for (const source from : all_sources) {
    const auto by_weight = ask<T>(p, from, o, ones, call, p.layout(), false);
    const auto by_slope = ask<T>(p, from, o, zeros, {}, p.layout(), false, how);
    CHECK(by_slope.d_first == by_weight.d_first);
    CHECK(by_slope.d_weights == by_weight.d_weights);
    CHECK(by_slope.d_bias == by_weight.d_bias);
  }
}

TEMPLATE_TEST_CASE("sequence_head: a model is no distance from itself", "[sequence]", float,
                   double) {
  using T = TestType;
  tokens<T> p({9, 8}, 4, 70, 23);
  p.reference = p.policy;
  row_slopes<T> slopes(p.rows(), 2 + 4);
  for (const double size : {1.0, 100.0}) {
    for (std::size_t k = 0; k < 70; ++k)
      p.policy.bias[k] = p.reference.bias[k] = static_cast<T>(size) * p.policy.bias[k];
    const auto a =
        ask<T>(p, source::hidden, {.temperature = 0.7}, {0, 0}, {}, p.layout(), true, slopes.how());
    for (const auto* of : {&a.reverse, &a.forward, &a.d_first, &a.d_weights, &a.d_bias})
      CHECK(std::count(of->begin(), of->end(), T(0)) == static_cast<index>(of->size()));
  }
}

TEMPLATE_TEST_CASE("sequence_head: slopes where classes are masked", "[sequence]", float, double) {
  using T = TestType;
  tokens<T> p({4, 3}, 3, 9, 18);
  const T masked = static_cast<T>(-inf);
  for (const int label : {1, 5})        // another, and the masked class itself
    for (const int where : {1, 2, 3}) { // the policy, its reference, both
      std::fill(p.labels.begin(), p.labels.end(), label);
      p.policy.bias[5] = (where & 1) != 0 ? masked : T(0);
      p.reference.bias[5] = (where & 2) != 0 ? masked : T(0);
      INFO(label << where);
      // KL(p ‖ q) is inf where the reference alone has it masked: with a slope there is no finite
      // gradient; all else is what the formula says.
      for (const int kinds : {1, 2, 4, 8, 13}) {
        const row_slopes<T> slopes(p.rows(), kinds);
        const auto a = ask<T>(p, source::hidden, {}, {1, 1}, {}, p.layout(), true, slopes.how());
        if (kinds == 2 && where == 2) {
          for (std::size_t i = 0; i < a.d_first.size(); ++i)
            CHECK((i / 3 == 3 || i / 3 == 6 ? a.d_first[i] == 0 : !std::isfinite(a.d_first[i])));
          continue;
        }
        tokens<T> q = p;
        q.token_weights.assign(q.token_weights.size(), T(1));
        error_judge judge;
        right_slopes(q, source::hidden, {}, {1, 1}, slopes).judge(a, 4, judge);
        CHECK(judge.all_within());
      }
    }
}

TEST_CASE("sequence_head: slopes of rows from 16 bits, without a bias, without a reference",
          "[sequence]") {
  tokens<float> p({6, 6}, 4, 150, 15);
  std::fill(p.policy.bias.begin(), p.policy.bias.end(), 0.0F);
  std::fill(p.reference.bias.begin(), p.reference.bias.end(), 0.0F);
  std::vector<perdita::bfloat16> rounded[2];
  std::vector<float>* const whole[] = {&p.policy.hidden, &p.reference.weights};
  for (int i = 0; i < 2; ++i)
    for (float& x : *whole[i]) {
      rounded[i].push_back({static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(x) >> 16)});
      x = std::bit_cast<float>(std::bit_cast<std::uint32_t>(x) & 0xFFFF0000U);
    }
  const row_slopes<float> slopes(p.rows());
  const perdita::sequence_head<float> head;
  std::vector<double> s(2);
  const std::vector<double> d{1, -1};
  std::vector<float> dx(p.policy.hidden.size()), da(p.policy.weights.size());
  const auto go = [&](const sequence_call<float>& call, const sequence_gradient<float>& how) {
    using perdita::bfloat16;
    head.scores(matrix_view<const bfloat16>(rounded[0].data(), p.rows(), 4), p.policy.a(), p.labels,
                p.layout(), s, call)
        .backward(d, matrix_view<float>(dx.data(), p.rows(), 4),
                  matrix_view<float>(da.data(), 150, 4), how);
  };
  sequence_call<float> call;
  call.reference = perdita::reference_model<float>(
      p.reference.x(), matrix_view<const perdita::bfloat16>(rounded[1].data(), 150, 6));
  go(call, slopes.how());
  auto a = ask<float>(p, source::hidden, {}, d, {}, p.layout(), true, slopes.how());
  CHECK(dx == a.d_first);
  CHECK(da == a.d_weights);

  // A bonus on entropy asks for no reference.
  std::vector<float> entropy(at(p.rows()));
  sequence_gradient<float> how;
  how.d_entropy = slopes.entropy;
  go({.entropy = entropy}, how);
  a.d_first = dx;
  a.d_weights = da;
  a.d_bias.clear();
  p.token_weights.assign(entropy.size(), 1);
  error_judge judge;
  right_slopes(p, source::hidden, {}, d, row_slopes<float>(p.rows(), 8)).judge(a, 4, judge);
  CHECK(judge.all_within());
}

/// TDPO of a pair of completions from hidden states, in wide arithmetic. `held`: where given, the
/// chosen one's Σ KL(q ‖ p) that the second form takes for a constant.
wide tdpo_value(const tokens<wide>& q, const perdita::tdpo_options& o, const wide* held,
                wide* divergence_of_chosen = nullptr) {
  wide s[2] = {}, kl[2] = {};
  std::vector<index> counts;
  for (const prediction& x : predictions(q, {}, false, counts)) {
    const wide_row z = row_of(q.policy, source::hidden, x.row, 1),
                   y = row_of(q.reference, source::hidden, x.row, 1);
    const index label = q.labels[at(x.token)];
    s[x.sequence] += z.log_p(label) - y.log_p(label);
    kl[x.sequence] += y.divergence_from(z);
  }
  if (divergence_of_chosen)
    *divergence_of_chosen = kl[0];
  const wide chosen = o.second && held ? *held : kl[0], alpha = o.second ? o.alpha : 1;
  return softplus(wide(-o.beta * ((s[0] + alpha * chosen) - (s[1] + alpha * kl[1]))));
}

TEMPLATE_TEST_CASE("sequence_head: TDPO from hidden states to the gradients of both", "[sequence]",
                   float, double) {
  using T = TestType;
  // The same lengths, so that rows are the cells of a matrix of sequences and steps; token 0 is a
  // prompt, and so are some others.
  tokens<T> p({5, 5}, 3, 6, 61);
  const index d = 3, v = 6, steps = 5;
  const auto layout = sequence_layout::padded(2, steps);
  const perdita::sequence_head<T> head;
  error_judge values, slopes;
  for (const bool second : {false, true}) {
    std::vector<T> log_p(10), log_q(10), kl(10), d_log_p(10), d_kl(10);
    std::vector<T> dx(at(10 * d)), da(at(v * d)), db(at(v));
    std::vector<double> scores(2), none(2, 0);
    const auto weights = p.policy.a(), of_reference = p.reference.a();
    sequence_call<T> call;
    call.reference =
        perdita::reference_model<T>(p.reference.x(), affine(of_reference, p.reference.bias));
    call.target_log_probability = log_p;
    call.reference_log_probability = log_q;
    call.forward_kl = kl;
    const auto pass =
        head.scores(p.policy.x(), affine(weights, p.policy.bias), p.labels, layout, scores, call);
    const perdita::tdpo_options o{.beta = 0.4, .alpha = 0.7, .second = second};
    const auto cells = [&](std::vector<T>& x) { return matrix_view<T>(x.data(), 2, steps); };
    const T value = perdita::tdpo<T>(o)(
        {.policy = cells(log_p), .reference = cells(log_q), .divergence = cells(kl)},
        {.gradient = cells(d_log_p), .divergence_gradient = cells(d_kl)});
    sequence_gradient<T> how;
    how.d_log_probability = d_log_p;
    how.d_forward_kl = d_kl;
    matrix_view<T> d_weights(da.data(), v, d);
    pass.backward(none, matrix_view<T>(dx.data(), 10, d), affine(d_weights, db), how);

    wide held;
    const wide right = tdpo_value(widened(p), o, nullptr, &held);
    values.within(size_of(wide(value - right)), 4, wide(std::numeric_limits<T>::epsilon()));
    compare_with_differences(p, dx, da, db, 4, slopes,
                             [&](const tokens<wide>& q) { return tdpo_value(q, o, &held); });
  }
  CHECK(values.all_within());
  CHECK(slopes.all_within());
  report_accuracy<T>("sequence_head", "TDPO from hidden states", in_epsilons_of_terms, values,
                     slopes);
}

TEST_CASE("sequence_head: unlearning with a divergence that retains, from hidden states",
          "[sequence]") {
  using T = double;
  // Sequence 0 is to be forgotten, 1 and 2 are to be kept.
  tokens<T> p({5, 4, 6}, 3, 6, 71);
  const index d = 3, v = 6, forgotten = 5;
  const auto rows = at(p.rows());
  std::vector<T> log_q(rows), kl(rows), counts(rows), d_kl(rows, T(0));
  std::vector<T> scores(3), of_reference(1), d_scores(3);
  const auto weights = p.policy.a(), other = p.reference.a();
  sequence_call<T> call;
  call.reference = perdita::reference_model<T>(p.reference.x(), affine(other, p.reference.bias));
  call.forward_kl = kl;
  call.reference_log_probability = log_q;
  std::vector<std::int64_t> n(3);
  call.counts = n;
  const perdita::sequence_head<T> head;
  const auto pass =
      head.scores(p.policy.x(), affine(weights, p.policy.bias), p.labels, p.layout(), scores, call);
  for (index r = 0; r < forgotten; ++r)
    of_reference[0] += log_q[at(r)];
  for (std::size_t r = at(forgotten); r < rows; ++r) // 0 in rows that predict nothing that counts
    counts[r] = log_q[r] != 0 ? T(1) : T(0);
  const auto kept = [&](auto& x) { return std::span(x).subspan(at(forgotten)); };
  const perdita::retaining loss(perdita::npo<T>({.beta = 0.3}),
                                {.forget_weight = 0.9, .retain_weight = 0.6, .kl_weight = 1.7});
  const std::vector<std::int64_t> lengths{n[1], n[2]};
  perdita::retained<T> keep;
  keep.sequences.policy = std::span(scores).subspan(1);
  keep.sequences.lengths = lengths;
  keep.kl = kept(kl);
  keep.kl_weights = kept(counts);
  perdita::sequence_scores<T> forget;
  forget.policy = std::span(scores).first(1);
  forget.reference = of_reference;
  const T value = loss(forget, keep,
                       {std::span(d_scores).first(1), std::span(d_scores).subspan(1), kept(d_kl)});
  std::vector<T> dx(p.policy.hidden.size()), da(p.policy.weights.size()), db(at(v));
  matrix_view<T> d_weights(da.data(), v, d);
  sequence_gradient<T> how;
  how.d_forward_kl = d_kl;
  pass.backward(d_scores, matrix_view<T>(dx.data(), p.rows(), d), affine(d_weights, db), how);

  const auto right = [&](const tokens<wide>& q) {
    wide ratio = 0, likelihood = 0, divergence = 0, kept_rows = 0;
    std::vector<index> of_sequence;
    for (const prediction& x : predictions(q, {}, false, of_sequence)) {
      const wide_row z = row_of(q.policy, source::hidden, x.row, 1),
                     y = row_of(q.reference, source::hidden, x.row, 1);
      const index label = q.labels[at(x.token)];
      if (x.sequence == 0) {
        ratio += z.log_p(label) - y.log_p(label);
        continue;
      }
      likelihood += z.log_p(label);
      divergence += y.divergence_from(z);
      kept_rows += 1;
    }
    const wide beta = 0.3;
    return 0.9 * (2 / beta) * softplus(wide(beta * ratio)) - 0.6 * likelihood / kept_rows +
           1.7 * divergence / kept_rows;
  };
  error_judge values, slopes;
  const wide expected = right(widened(p));
  values.within(size_of(wide(value - expected)), 4,
                (1 + size_of(expected)) * wide(std::numeric_limits<T>::epsilon()));
  compare_with_differences(p, dx, da, db, 4, slopes, right);
  CHECK(values.all_within());
  CHECK(slopes.all_within());
  report_accuracy<T>("sequence_head", "unlearning from hidden states", in_epsilons_of_terms, values,
                     slopes);
}

TEMPLATE_TEST_CASE("sequence_head: ragged or padded, on any threads, the same bits", "[sequence]",
                   float, double) {
  using T = TestType;
  const tokens<T> p({90, 0, 130, 1, 75}, 4, 70, 12);
  std::vector<int> lengths;
  const index steps = 131;
  const tokens<T> padded = pad(p, steps, lengths);
  const auto rows_lie = sequence_layout::padded(p.sequences(), steps, lengths);
  const auto d_scores = some_slopes(p.sequences(), 9);
  for (const source from : all_sources)
    for (const bool by_products : {false, true}) {
      sequence_call<T> call;
      call.token_weights = p.token_weights;
      const auto expected =
          ask<T>(p, from, {.average = true}, d_scores, call, p.layout(), by_products);
      for (const std::size_t threads : {1U, 2U, 3U, 4U}) {
        const threads_executor run_on(threads, task_order::shuffled);
        call.run_on = run_on;
        CHECK(ask<T>(p, from, {.average = true}, d_scores, call, p.layout(), by_products) ==
              expected);
      }
      call = {};
      call.token_weights = padded.token_weights;
      const auto other =
          ask<T>(padded, from, {.average = true}, d_scores, call, rows_lie, by_products);
      CHECK(other.scores == expected.scores);
      CHECK(other.counts == expected.counts);
      CHECK(other.d_weights == expected.d_weights);
      CHECK(other.d_bias == expected.d_bias);
      const auto compare = [&](const std::vector<T>& ragged, const std::vector<T>& wide_rows) {
        const index width = static_cast<index>(ragged.size()) / p.rows();
        std::vector<bool> right;
        for (index s = 0; s < p.sequences(); ++s)
          for (index t = 0; t < steps; ++t)
            for (index i = 0; i < width; ++i)
              right.push_back(
                  wide_rows[at((s * steps + t) * width + i)] ==
                  (t < lengths[at(s)] ? ragged[at((p.offsets[at(s)] + t) * width + i)] : T(0)));
        CHECK(std::find(right.begin(), right.end(), false) == right.end());
      };
      compare(expected.d_first, other.d_first);
      compare(expected.log_p, other.log_p);
      compare(expected.entropy, other.entropy);
      compare(expected.reverse, other.reverse);
      compare(expected.forward, other.forward);
    }
}

TEMPLATE_TEST_CASE("sequence_head: gradients are scaled and added", "[sequence]", float, double) {
  using T = TestType;
  const tokens<T> p({6, 9}, 4, 9, 17);
  const std::vector<double> d_scores{0.5, -2};
  for (const source from : all_sources) {
    const auto once = ask<T>(p, from, {}, d_scores, {}, p.layout(), false, {}, T(0));
    const auto more = ask<T>(p, from, {}, d_scores, {}, p.layout(), false,
                             {.accumulate = true, .scale = 4}, T(1));
    const auto compare = [&](const std::vector<T>& a, const std::vector<T>& b) {
      for (std::size_t i = 0; i < a.size(); ++i)
        CHECK(std::fabs(static_cast<double>(b[i] - (1 + 4 * a[i]))) <=
              16 * static_cast<double>(std::numeric_limits<T>::epsilon()) *
                  (1 + std::fabs(static_cast<double>(4 * a[i]))));
    };
    compare(once.d_first, more.d_first);
    compare(once.d_weights, more.d_weights);
    compare(once.d_bias, more.d_bias);
  }
}

TEMPLATE_TEST_CASE("sequence_head: sequences without a token that counts", "[sequence]", float,
                   double) {
  using T = TestType;
  tokens<T> p({5, 1, 0, 6}, 4, 9, 4);
  for (int t = p.offsets[0]; t < p.offsets[1]; ++t)
    p.labels[at(t)] = -100;
  p.labels[at(p.offsets[3] + 2)] = 3;
  const std::vector<double> d_scores{nan_d, nan_d, inf, 1};
  for (const source from : all_sources)
    for (const bool average : {false, true}) {
      auto a = ask<T>(p, from, {.average = average}, d_scores, {}, p.layout(), true);
      CHECK((a.counts[0] == 0 && a.counts[1] == 0 && a.counts[2] == 0 && a.counts[3] > 0));
      CHECK((a.scores[0] == 0 && a.scores[1] == 0 && a.scores[2] == 0 && a.scores[3] < 0));
      const auto width = a.d_first.size() / at(p.rows());
      for (std::size_t i = 0; i < a.d_first.size(); ++i)
        CHECK((i < 6 * width ? a.d_first[i] == 0 : std::isfinite(a.d_first[i])));
      CHECK(*std::max_element(a.d_first.begin(), a.d_first.end()) > 0);

      tokens<T> masked = p;
      std::fill(masked.labels.begin(), masked.labels.end(), -100);
      sequence_call<T> call;
      for (const bool by_weights : {false, true}) {
        const std::vector<T> nothing(at(p.rows()), T(0));
        if (by_weights)
          call.token_weights = nothing;
        const tokens<T>& q = by_weights ? p : masked;
        a = ask(q, from, {.average = average}, d_scores, call, q.layout(), true);
        CHECK(a.scores == std::vector<double>(4, 0));
        CHECK(a.counts == std::vector<std::int64_t>(4, 0));
        for (const auto* of : {&a.d_first, &a.d_weights, &a.d_bias, &a.log_p, &a.reverse})
          CHECK(std::count(of->begin(), of->end(), T(0)) == static_cast<index>(of->size()));
      }
    }
}

TEST_CASE("sequence_head: no sequences, and sequences of no rows", "[sequence]") {
  const tokens<float> p({}, 4, 9, 4), q({0, 0}, 4, 9, 4);
  for (const source from : all_sources) {
    CHECK(ask<float>(p, from, {}, {}, {}, p.layout(), true).scores.empty());
    const auto a = ask<float>(q, from, {}, {1, 1}, {}, q.layout(), true);
    CHECK(a.scores == std::vector<double>(2, 0));
    CHECK(std::count(a.d_weights.begin(), a.d_weights.end(), 0.0F) ==
          static_cast<index>(a.d_weights.size()));
  }
}

TEST_CASE("sequence_head: averaged lengths in a published loss", "[sequence]") {
  // IPO of formula sheet 13: sums −12 and −20 over 5 and 8 tokens, the
  // reference −12.5 and −19.2
  std::vector<double> log_p{0}, d(15);
  std::vector<int> labels(15, 1);
  for (int i = 0; i < 5; ++i)
    log_p.push_back(-1.5 - 0.45 * i);
  log_p.push_back(0);
  for (int i = 0; i < 8; ++i)
    log_p.push_back(-6 + i);
  labels[0] = labels[6] = -100;
  const auto ipo = [](std::span<const double> s, std::span<double> slope) {
    const double off = (s[0] + 12.5 / 5) - (s[1] + 19.2 / 8) - 1 / (2 * 0.1);
    slope[0] = 2 * off;
    slope[1] = -2 * off;
    return off * off;
  };
  std::vector<double> sums(2);
  const std::vector<int> offsets{0, 6, 15};
  const auto layout = sequence_layout::ragged(offsets);
  perdita::sequence_head<double>({.shift = false}).scores(log_p, labels, layout, sums);
  CHECK(std::fabs(sums[0] + 12) < 1e-14);
  CHECK(std::fabs(sums[1] + 20) < 1e-14);
  const perdita::sequence_head<double> head({.average = true, .shift = false});
  CHECK(std::fabs(head(ipo, log_p, labels, layout, d) - 23.04) < 1e-12);
  for (std::size_t r = 0; r < d.size(); ++r) {
    const double right = r == 0 || r == 6 ? 0 : r < 6 ? -1.92 : 1.2;
    CHECK(std::fabs(d[r] - right) < 1e-12);
  }
}

TEST_CASE("spo: a loss of pairs and a classifier of degrees", "[sequence]") {
  using Catch::Matchers::ContainsSubstring;
  const std::vector<double> w{-3, -9}, l{-4, -7}, q(2), row_weights{1, 3};
  const std::vector<double> z{0.5, -1, 2, 1, 0, -3, 0.25, 2, 1, -1, 1, 0};
  const std::vector<int> degrees{0, 2, -100, 1};
  const matrix_view<const double> scores(z.data(), 4, 3);
  const perdita::preference_pairs<double> pairs{
      .chosen = w, .rejected = l, .chosen_reference = q, .rejected_reference = q};
  const perdita::dpo<double> dpo;
  const perdita::cross_entropy<double> classes;
  const perdita::spo loss(dpo, {.gamma = 0.25});
  std::vector<double> d_w(2), d_l(2), d_z(12), e_w(2, 1), e_l(2, 1), e_z(12, 1);
  const perdita::call_options<double> call{.row_weights = row_weights};
  const double of_pairs = dpo(pairs, d_w, d_l, call);
  const double of_degrees = classes(scores, degrees, matrix_view<double>(d_z.data(), 4, 3));
  auto adding = call;
  adding.scale = 2;
  adding.accumulate = true;
  perdita::spo_terms terms;
  const matrix_view<double> e(e_z.data(), 4, 3);
  const double value = loss(pairs, scores, degrees, e_w, e_l, e, adding, &terms);
  CHECK(value == of_pairs + 0.25 * of_degrees);
  CHECK(loss(pairs, scores, degrees, call) == value);
  CHECK((terms.pairs == of_pairs && terms.degrees == of_degrees));
  for (std::size_t i = 0; i < 2; ++i)
    CHECK(
        (std::fabs(e_w[i] - 1 - 2 * d_w[i]) < 1e-15 && std::fabs(e_l[i] - 1 - 2 * d_l[i]) < 1e-15));
  for (std::size_t i = 0; i < 12; ++i)
    CHECK(std::fabs(e_z[i] - 1 - 0.5 * d_z[i]) < 1e-15);
  const auto before = e_z;
  CHECK_THROWS_WITH(loss({.chosen = w, .rejected = l}, scores, degrees, e_w, e_l, e),
                    ContainsSubstring("chosen_reference"));
  CHECK_THROWS_WITH(loss(pairs, scores, degrees, e_w, {}, e), ContainsSubstring("d_rejected is 0"));
  const std::vector<int> wrong{0, 3, 1, 1};
  CHECK_THROWS_WITH(loss(pairs, scores, wrong, e_w, e_l, e), ContainsSubstring("labels[1] is 3"));
  std::vector<double> few(1, 7), values(2, 7);
  CHECK_THROWS_WITH(loss(pairs, scores, degrees, e_w, e_l, e, {.values = few}),
                    ContainsSubstring("values is 1"));
  CHECK_THROWS_WITH(loss(pairs, scores, degrees, e_w, e_w, e), ContainsSubstring("same memory"));
  CHECK_THROWS_WITH(loss(pairs, scores, degrees, {e_z.data() + 3, 2}, e_l, e),
                    ContainsSubstring("overlaps"));
  auto in_place = pairs;
  in_place.chosen = {e_z.data(), 2};
  CHECK_THROWS_WITH(loss(in_place, scores, degrees, e_w, e_l, e), ContainsSubstring("overlaps"));
  CHECK(e_z == before);
  CHECK_THROWS_WITH(loss(pairs, scores, wrong, {.values = values}),
                    ContainsSubstring("labels[1] is 3"));
  CHECK(values == std::vector<double>(2, 7));
  const std::vector<double> masked{-std::numeric_limits<double>::infinity(), 0};
  CHECK(perdita::spo(dpo, {.gamma = 0})(pairs, matrix_view<const double>(masked.data(), 1, 2),
                                        std::vector<int>{0}, call) == of_pairs);
  CHECK_THROWS_WITH(perdita::spo(dpo, {.gamma = -1}), ContainsSubstring("gamma is -1"));
}

TEST_CASE("sequence_head: log Σ p² from two temperatures (WPO)", "[sequence]") {
  const tokens<double> p({6}, 4, 9, 4);
  std::vector<double> s(1), cold(6), plain(6);
  std::vector<int> labels(6, 1);
  const auto sums = [&](double temperature, std::vector<double>& to) {
    perdita::sequence_head<double>({.shift = false, .temperature = temperature})
        .scores(p.policy.z(), labels, p.layout(), s, {.log_sum_exp = to});
  };
  sums(0.5, cold);
  sums(1, plain);
  for (index r = 0; r < 6; ++r) {
    double sum = 0, squares = 0;
    for (index k = 0; k < 9; ++k) {
      const double image = std::exp(p.policy.z()(r, k));
      sum += image;
      squares += image * image;
    }
    CHECK(std::fabs(cold[at(r)] - 2 * plain[at(r)] - std::log(squares / (sum * sum))) < 1e-14);
  }
}

TEMPLATE_TEST_CASE("sequence_head: what is not finite stays in its sequence", "[sequence]", float,
                   double) {
  using T = TestType;
  tokens<T> p({4, 4, 4}, 3, 6, 6);
  std::fill(p.labels.begin(), p.labels.end(), 2);
  p.policy.scores[at(1 * 6 + 2)] = static_cast<T>(-inf); // row 1 cannot say token 2
  p.policy.scores[at(5 * 6 + 2)] = static_cast<T>(nan_d);
  p.policy.hidden[at(5 * 3)] = static_cast<T>(nan_d);
  p.log_p[1] = static_cast<T>(-inf);
  p.log_p[5] = static_cast<T>(nan_d);
  for (const source from : all_sources) {
    const auto a = ask<T>(p, from, {}, {1, 1, 1}, {}, p.layout(), false);
    CHECK((from == source::hidden ? std::isfinite(a.scores[0]) : a.scores[0] == -inf));
    CHECK(std::isnan(a.scores[1]));
    CHECK(std::isfinite(a.scores[2]));
    const auto width = a.d_first.size() / 12;
    for (std::size_t i = 0; i < a.d_first.size(); ++i)
      if (i / width != 5)
        CHECK(std::isfinite(a.d_first[i]));
    if (from == source::scores)
      CHECK(a.d_first[1 * 6 + 2] == 1);
  }
  // Long log-probabilities: nothing is lost in a sum of many.
  const std::vector<T> small(4096, T(-0.1));
  const std::vector<int> labels(4096, 0);
  std::vector<double> s(1);
  perdita::sequence_head<T>({.shift = false})
      .scores(small, labels, sequence_layout::padded(1, 4096), s);
  CHECK(s[0] == 4096 * static_cast<double>(T(-0.1)));
}

TEST_CASE("sequence_head: going back leaves the by-products", "[sequence]") {
  const tokens<float> p({6, 6}, 4, 9, 14);
  for (const source from : all_sources) {
    const auto a = ask<float>(p, from, {}, {0, 0}, {}, p.layout(), true);
    const auto b = ask<float>(p, from, {}, {1, 1}, {}, p.layout(), true);
    CHECK(a.log_p == b.log_p);
    CHECK(a.lse == b.lse);
    CHECK(a.entropy == b.entropy);
    CHECK(a.scores == b.scores);
    CHECK(std::count(a.d_first.begin(), a.d_first.end(), 0.0F) ==
          static_cast<index>(a.d_first.size()));
  }
}

TEMPLATE_TEST_CASE("sequence_head: divergences where classes are masked", "[sequence]", float,
                   double) {
  using T = TestType;
  tokens<T> p({4, 3}, 3, 9, 18);
  std::fill(p.labels.begin(), p.labels.end(), 1);
  for (const int masked : {0, 1, 2, 3}) { // for none, the policy, its reference, both
    for (auto* m : {&p.policy, &p.reference}) {
      const bool mine = masked == 3 || masked == (m == &p.policy ? 1 : 2);
      m->bias[5] = mine ? static_cast<T>(-inf) : T(0);
      for (index r = 0; r < p.rows(); ++r)
        for (index k = 0; k < 9; ++k)
          m->scores[at(r * 9 + k)] = static_cast<T>(row_of(*m, source::hidden, r, 1).z[at(k)]);
    }
    const auto a = ask<T>(p, source::hidden, {}, {1, 1}, {}, p.layout(), true),
               b = ask<T>(p, source::scores, {}, {1, 1}, {}, p.layout(), true);
    const double near = 64 * static_cast<double>(std::numeric_limits<T>::epsilon());
    const auto same = [&](T x, T y) {
      return x == y || std::fabs(static_cast<double>(x - y)) <= near * (1 + std::fabs(double(y)));
    };
    for (std::size_t r = 0; r < at(p.rows()); ++r) {
      const bool counts = r != 3 && r != 6;
      CHECK(same(a.reverse[r], b.reverse[r]));
      CHECK(same(a.forward[r], b.forward[r]));
      CHECK(same(a.log_p[r], b.log_p[r]));
      CHECK(same(a.of_reference[r], b.of_reference[r]));
      CHECK(std::isinf(a.forward[r]) == (counts && masked == 1));
      CHECK(std::isinf(a.reverse[r]) == (counts && masked == 2));
    }
  }
}

TEMPLATE_TEST_CASE("sequence_head: from hidden states the bits of the linear head", "[sequence]",
                   float, double) {
  using T = TestType;
  const index v = 17000; // so many that the scores of a block are not held
  const tokens<T> p({90, 60}, 3, v, 19);
  const auto a = ask<T>(p, source::hidden, {.shift = false}, {-1, -1}, {}, p.layout(), false);
  const auto piece =
      perdita::core::linear_shape<T>{v}.slot(perdita::core::linear_shape<T>::columns);
  const perdita::linear head(perdita::cross_entropy<T>({.reduction = perdita::reduction::sum}),
                             {.budget = 4 * static_cast<std::size_t>(piece) * sizeof(T)});
  std::vector<T> dx(p.policy.hidden.size()), da(p.policy.weights.size()), db(p.policy.bias.size());
  matrix_view<T> d_weights(da.data(), v, 3);
  const auto weights = p.policy.a();
  const T value = head(p.policy.x(), affine(weights, p.policy.bias), p.labels,
                       matrix_view<T>(dx.data(), p.rows(), 3), affine(d_weights, db));
  CHECK((a.d_first == dx));
  CHECK((a.d_weights == da));
  CHECK((a.d_bias == db));
  CHECK(std::fabs(a.scores[0] + a.scores[1] + static_cast<double>(value)) <=
        16 * static_cast<double>(std::numeric_limits<T>::epsilon() * value));
  const threads_executor run_on(3, task_order::reversed);
  CHECK(ask<T>(p, source::hidden, {.shift = false}, {-1, -1}, {.run_on = run_on}, p.layout(),
               false) == a);
}

TEST_CASE("sequence_head: scores of the head's type, weights without a bias, "
          "other storage",
          "[sequence]") {
  tokens<float> p({6, 6}, 4, 9, 15);
  const perdita::sequence_head<float> head;
  std::vector<float> narrow(2), d{1, -1};
  std::vector<double> full(2), d_full{1, -1};
  std::fill(p.policy.bias.begin(), p.policy.bias.end(), 0.0F);
  const auto zero_bias = ask<float>(p, source::hidden, {}, d_full, {}, p.layout(), false);
  std::vector<float> dx(p.policy.hidden.size()), da(p.policy.weights.size());
  head.scores(p.policy.x(), p.policy.a(), p.labels, p.layout(), narrow)
      .backward(d, matrix_view<float>(dx.data(), p.rows(), 4), matrix_view<float>(da.data(), 9, 4));
  CHECK(dx == zero_bias.d_first);
  CHECK(da == zero_bias.d_weights);
  CHECK(narrow[0] == static_cast<float>(zero_bias.scores[0]));

  std::vector<perdita::bfloat16> rounded;
  for (float& x : p.policy.hidden) {
    rounded.push_back({static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(x) >> 16)});
    x = std::bit_cast<float>(std::bit_cast<std::uint32_t>(x) & 0xFFFF0000U);
  }
  std::vector<float> lse(at(p.rows())), other(lse.size());
  head.scores(matrix_view<const perdita::bfloat16>(rounded.data(), p.rows(), 4), p.policy.a(),
              p.labels, p.layout(), full, {.log_sum_exp = lse});
  const auto expected = full;
  head.scores(p.policy.x(), p.policy.a(), p.labels, p.layout(), full, {.log_sum_exp = other});
  CHECK(full == expected);
  CHECK(lse == other);
}

TEST_CASE("sequence_head: bad input", "[sequence]") {
  using Catch::Matchers::ContainsSubstring;
  const tokens<float> p({5, 6}, 4, 9, 4);
  const perdita::sequence_head<float> head;
  const auto z = p.policy.z();
  std::vector<double> s(2, 7), d(2);
  const auto scores = [&](const auto& source, const auto& labels, auto& out,
                          const sequence_call<float>& call = {}) {
    return head.scores(source, labels, p.layout(), out, call);
  };
  const auto fails = [&](const std::function<void()>& call, const char* message) {
    CHECK_THROWS_WITH(call(), ContainsSubstring(message));
    CHECK(s == std::vector<double>(2, 7));
  };
  std::vector<int> few(10), wrong = p.labels;
  wrong[4] = 9;
  std::vector<double> three(3);
  fails([&] { scores(z, few, s); }, "size of labels is 10, expected 11");
  fails([&] { scores(z, p.labels, three); }, "size of scores is 3, expected 2");
  fails([&] { scores(z, wrong, s); }, "labels[4] is 9, expected 0 to the number of classes");
  wrong[4] = -1;
  fails([&] { scores(p.log_p, wrong, s); }, "labels[4] is -1");
  fails([&] { scores(matrix_view<const float>(p.policy.scores.data(), 10, 9), p.labels, s); },
        "rows is 10, expected 11");
  std::vector<float> weights(11, 1), view(10);
  weights[4] = static_cast<float>(inf);
  std::vector<int> all(11, 1);
  fails([&] { scores(z, all, s, {.token_weights = weights}); }, "token_weights[4] is inf");
  fails([&] { scores(z, all, s, {.token_weights = view}); }, "size of token_weights is 10");
  fails([&] { scores(z, all, s, {.entropy = view}); }, "size of entropy is 10, expected 11");
  fails([&] { scores(z, all, s, {.reference_log_probability = view}); },
        "size of reference_log_probability is 10, expected 11");
  std::vector<std::int64_t> counts(3);
  fails([&] { scores(z, all, s, {.counts = counts}); }, "size of counts is 3, expected 2");
  view.resize(11);
  fails([&] { scores(p.log_p, all, s, {.entropy = view}); }, "a by-product of the scores");
  fails([&] { scores(z, all, s, {.forward_kl = view}); }, "reference is missing");
  sequence_call<float> call;
  call.reverse_kl = view;
  call.reference = perdita::reference_model<float>(p.reference.x(), p.reference.a());
  fails([&] { scores(z, all, s, call); }, "reference is missing");
  fails([&] { head.scores(p.policy.x(), p.policy.a(), all, p.layout(), s, {.forward_kl = view}); },
        "reference is missing");
  call.reference = perdita::reference_model<float>(
      p.reference.x(), matrix_view<const float>(p.reference.weights.data(), 8, 6));
  fails([&] { head.scores(p.policy.x(), p.policy.a(), all, p.layout(), s, call); },
        "rows of the reference's weights is 8, expected 9");
  fails([&] { head.scores(p.policy.x(), p.reference.a(), all, p.layout(), s); },
        "columns of the weights is 6, expected 4");

  const auto pass = scores(z, all, s);
  std::vector<float> g(11 * 9, 7);
  const std::vector<float> untouched = g;
  const matrix_view<float> gradient(g.data(), 11, 9);
  s = {7, 7};
  fails([&] { pass.backward(three, gradient); }, "size of d_scores is 3, expected 2");
  fails([&] { pass.backward(d, matrix_view<float>(g.data(), 10, 9)); }, "gradient rows");
  fails([&] { pass.backward(d, gradient, {.d_forward_kl = view}); }, "reference is missing");
  std::vector<float> q = p.reference.scores;
  const matrix_view<float> own(q.data(), 11, 9);
  const auto against =
      head.scores(z, all, p.layout(), s, {.reference = perdita::reference_model<float>(own)});
  s = {7, 7};
  fails([&] { against.backward(d, own, {.d_forward_kl = view}); }, "or the reference's, expected");
  CHECK(q == p.reference.scores);
  const perdita::sequence_head<float> capped({.softcap = 5});
  call.reference = perdita::reference_model<float>(p.reference.z());
  fails([&] { capped.scores(z, all, p.layout(), s, call); }, "softcap is 5, expected 0");
  std::vector<double> out(2);
  const auto of_capped = capped.scores(z, all, p.layout(), out, {.reference = call.reference});
  fails([&] { of_capped.backward(d, gradient, {.d_forward_kl = view}); }, "softcap is 5");
  fails([&] { of_capped.backward(d, gradient, {.d_entropy = view}); }, "softcap is 5, expected 0");
  const std::vector<float> ten(10);
  fails([&] { pass.backward(d, gradient, {.d_log_probability = ten}); },
        "size of d_log_probability is 10, expected 11");
  fails([&] { pass.backward(d, gradient, {.d_entropy = ten}); }, "size of d_entropy is 10");
  const auto of_log_p = scores(p.log_p, all, out);
  std::vector<float> row(11, 7);
  fails([&] { of_log_p.backward(d, row, {.d_entropy = view}); },
        "the gradient of a divergence or an entropy is given");
  CHECK(row == std::vector<float>(11, 7));
  CHECK(g == untouched);

  // from hidden states
  std::vector<float> reference_weights = p.reference.weights;
  const matrix_view<float> dx(g.data(), 11, 4), da(g.data() + 44, 9, 4);
  const matrix_view<float> w(reference_weights.data(), 9, 6);
  const auto plain = head.scores(p.policy.x(), p.policy.a(), all, p.layout(), out);
  fails([&] { plain.backward(d, dx, da, {.d_forward_kl = view}); },
        "reference is missing, expected a reference_model of hidden states and weights");
  fails([&] { plain.backward(d, dx, da, {.d_reverse_kl = view}); }, "reference is missing");
  fails([&] { plain.backward(d, dx, da, {.d_entropy = view}); }, "entropy is missing");
  fails([&] { plain.backward(d, dx, da, {.d_log_probability = ten}); },
        "size of d_log_probability is 10, expected 11");
  const perdita::sequence_head<float> filtered({.head = {.drop_mass = 0.5}});
  call = {};
  call.reference = perdita::reference_model<float>(p.reference.x(), w);
  for (const auto* by : {&head, &filtered}) {
    const auto compared = by->scores(p.policy.x(), p.policy.a(), all, p.layout(), out, call);
    if (by == &filtered) {
      fails([&] { compared.backward(d, dx, da, {.d_forward_kl = view}); }, "drop_mass");
      continue;
    }
    fails([&] { compared.backward(d, dx, da, {.d_reverse_kl = ten}); },
          "size of d_reverse_kl is 10, expected 11");
    fails([&] { compared.backward(d, dx, da, {.d_forward_kl = ten}); }, "size of d_forward_kl");
    fails([&] { compared.backward(three, dx, da, {.d_forward_kl = view}); }, "size of d_scores");
    fails(
        [&] {
          compared.backward(d, dx, matrix_view<float>(g.data() + 44, 8, 4), {.d_forward_kl = view});
        },
        "rows of the gradient of the weights");
    fails(
        [&] {
          compared.backward(d, dx, matrix_view<float>(reference_weights.data() + 8, 9, 4),
                            {.d_forward_kl = view});
        },
        "a gradient overlaps an input");
  }
  CHECK(reference_weights == p.reference.weights);
  CHECK(g == untouched);

  using layout = sequence_layout;
  const std::vector<int> falls{0, 3, 2}, late{1, 3}, none{}, longer{3, 5}, one{1};
  fails([&] { layout::ragged(falls); }, "offsets[2] is 2, expected numbers that rise from 0");
  fails([&] { layout::ragged(late); }, "offsets[0] is 1");
  fails([&] { layout::ragged(none); }, "size of offsets is 0, expected at least 1");
  fails([&] { layout::padded(2, 4, longer); }, "lengths[1] is 5, expected 0 to 4");
  fails([&] { layout::padded(2, 4, one); }, "lengths is 1, expected 2");
  fails([&] { layout::padded(-1, 4); }, "batch is -1");
  fails([&] { head.scores(z, all, layout::padded(2, 5), s); }, "size of labels is 11, expected 10");
  fails([] { perdita::sequence_head<float>({.temperature = 0}); }, "temperature is 0");
  fails([] { perdita::sequence_head<float>({.softcap = -1}); }, "softcap is -1");
  for (const double small : {1e-40, 1e-50}) {
    fails([&] { perdita::sequence_head<float>({.temperature = small}); },
          "whose inverse is finite");
    fails([&] { perdita::sequence_head<float>({.softcap = small}); }, "whose inverse is finite");
  }
}

} // namespace perdita_tests
