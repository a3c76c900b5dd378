// SPDX-License-Identifier: MIT

// Policy-gradient losses, advantages and target distributions: formula sheet of preference losses,
// 11, 13.

#include <perdita/policy_gradient.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include <perdita/policy/advantages.hpp>
#include <perdita/policy/target_distribution.hpp>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/numbers.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

namespace policy = perdita::policy;
using perdita::index;
using perdita::matrix_view;
using policy::kl_estimator;
using policy::level;
using policy::reducer;

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

bool close(double a, double b, double tolerance = 1e-12) {
  return std::abs(a - b) <= tolerance * std::max(1.0, std::abs(b));
}

// --- A reference in 113 bits ---------------------------------------------------------------------

/// Value of a token from l, x and their values when nothing moves, which stand for constants.
using token_value = std::function<wide(wide l, wide x, wide constant_x, wide a)>;
using limiter = std::function<wide(wide x, wide a)>;

struct reference_loss {
  token_value f;
  policy::options options;
  limiter limit = [](wide x, wide) { return x; };
  std::function<wide(wide)> growth = [](wide) { return 0; }; ///< of relative errors, besides by x
};

wide hold(const wide& x, const wide& low, const wide& high) {
  return smaller(larger(x, low), high);
}
wide kl_of(kl_estimator k, const wide& x, const wide& constant_x, const wide& ratio) {
  switch (k) {
  case kl_estimator::k1:
    return x;
  case kl_estimator::k2:
    return x * x / 2;
  case kl_estimator::k3:
    return expm1(-x) + x;
  case kl_estimator::k3_corrected:
    // ρ e^{−x} = e^{ref − old} does not move, and would drown what does.
    return x == constant_x ? ratio * (expm1(-x) + x) : ratio * (x - 1);
  case kl_estimator::k3_plus: // the value of k3; what moves is k2
    return x == constant_x ? expm1(-x) + x : x * x / 2;
  }
  return 0;
}

struct sequence {
  std::vector<wide> l, old, ref, sampler, a, h; // of the tokens that count
};

/// The parts of the policy's term and of the KL term of each token, where `moved` is added to l.
struct token_parts {
  std::vector<wide> policy, kl;
};
token_parts parts_of(const reference_loss& loss, const sequence& s, std::size_t token, wide moved) {
  const auto n = s.l.size();
  const auto& o = loss.options;
  std::vector<wide> l = s.l;
  if (n > 0)
    l[token] += moved;
  wide x = 0, constant = 0, mismatch = 0, drift = 0;
  for (std::size_t t = 0; t < n; ++t) {
    x += loss.limit(l[t] - s.old[t], s.a[t]);
    constant += loss.limit(s.l[t] - s.old[t], s.a[t]);
    mismatch += s.sampler.empty() ? wide(0) : wide(s.old[t] - s.sampler[t]);
    drift += (s.old[t] - s.l[t]) / wide(static_cast<double>(n));
  }
  if (o.level != level::sequence) {
    x /= static_cast<double>(n);
    constant /= static_cast<double>(n);
  }
  token_parts parts;
  for (std::size_t t = 0; t < n; ++t) {
    const wide own = l[t] - s.old[t], own_constant = s.l[t] - s.old[t];
    const wide seen = o.level == level::token                    ? own
                      : o.level == level::sequence_mean_of_token ? constant + own - own_constant
                                                                 : x;
    const wide bound = o.log_ratio_limit;
    wide f = loss.f(l[t], hold(seen, -bound, bound),
                    hold(o.level == level::token ? own_constant : constant, -bound, bound), s.a[t]);
    if (!s.sampler.empty()) {
      using enum policy::correction;
      const bool whole = o.correction == truncate_sequence || o.correction == mask_sequence;
      const wide w = exp(whole ? mismatch : wide(s.old[t] - s.sampler[t]));
      const bool truncates = o.correction == truncate || o.correction == truncate_sequence;
      f *= w <= o.correction_cap ? w : truncates ? wide(o.correction_cap) : wide(0);
    }
    parts.policy.push_back(drift > o.off_policy_limit && s.a[t] < 0 ? wide(0) : f);
    const wide kx = l[t] - s.ref[t], kl_bound = o.kl_limit;
    parts.kl.push_back(o.kl_weight * kl_of(o.kl, hold(kx, -kl_bound, kl_bound),
                                           hold(s.l[t] - s.ref[t], -kl_bound, kl_bound), exp(own)));
  }
  return parts;
}

wide token_weight(const policy::options& o, std::size_t n) {
  return o.reducer == reducer::sequence_mean     ? wide(wide(1) / wide(static_cast<double>(n)))
         : o.reducer == reducer::constant_length ? wide(wide(1) / wide(o.constant_length))
                                                 : wide(1);
}

// --- Sequences with log-ratios of given sizes ----------------------------------------------------

constexpr double sizes[] = {0, 1e-3, -1e-3, 1, -1, 50, -50, 500, -500, 0.5};
constexpr std::size_t count = 10, width = 6;

/// Numbers on a grid, so that differences are exact in float too; a mask with holes; every second
/// column and row of larger matrices.
template <class T> struct data_set {
  std::vector<T> l, old, ref, sampler, entropies, gradient, of_entropies;
  std::vector<T> a, token_a, weights, upstream, values;
  std::vector<unsigned char> mask;
  bool per_token;

  explicit data_set(bool token_advantages, double ref_size = 1) : per_token(token_advantages) {
    random_numbers random(11);
    const auto grid = [](double x) { return static_cast<T>(std::round(x * 0x1p13) * 0x1p-13); };
    for (auto* x : {&l, &old, &ref, &sampler, &entropies, &token_a})
      x->assign(4 * count * width, T(nan));
    gradient.assign(4 * count * width, 3);
    of_entropies = gradient;
    mask.assign(count * width, 1);
    for (std::size_t i = 0; i < count; ++i) {
      const double a_size = i % 2 ? 1 : -0.7;
      a.push_back(i == 9 ? T(0) : static_cast<T>(a_size * random.uniform(0.5, 2)));
      weights.push_back(static_cast<T>(i == 4 ? 0.5 : 1));
      upstream.push_back(static_cast<T>(i == 2 ? -2 : 1));
      for (std::size_t t = 0; t < width; ++t) {
        mask[i * width + t] = (t + i) % 3 != 0 || i == 1;
        const double r = sizes[i] * random.uniform(0.9, 1.1);
        const auto at = place(i, t);
        old[at] = grid(random.uniform(-2, -0.5) - 500);
        l[at] = grid(static_cast<double>(old[at]) + r);
        ref[at] = grid(static_cast<double>(l[at]) - ref_size * (t % 2 ? 1 : -1) * sizes[i]);
        sampler[at] = grid(static_cast<double>(old[at]) + random.uniform(-1.5, 0.5));
        entropies[at] = static_cast<T>(random.uniform(0, 3));
        token_a[at] = static_cast<T>((t % 2 ? 1 : -1) * random.uniform(0.1, 2));
      }
    }
    values.assign(count, 9);
  }
  static std::size_t place(std::size_t i, std::size_t t) { return (2 * i * width + t) * 2; }
  template <class V> auto view(V& x) const {
    return matrix_view(x.data(), index(count), index(width), index(4 * width), index(2));
  }
  policy::batch<T> batch(const policy::options& o, bool samples) const {
    policy::batch<T> b;
    b.policy = view(l);
    b.old = view(old);
    b.reference = view(ref);
    if (samples)
      b.sampler = view(sampler);
    if (per_token)
      b.token_advantages = view(token_a);
    else
      b.advantages = a;
    if (o.entropy_weight > 0)
      b.entropies = view(entropies);
    b.mask = matrix_view<const unsigned char>(mask.data(), count, width);
    return b;
  }
  policy::outputs<T> outputs() { return {view(gradient), view(of_entropies)}; }
  sequence wide_sequence(std::size_t i, bool samples) const {
    sequence s;
    for (std::size_t t = 0; t < width; ++t)
      if (mask[i * width + t]) {
        const auto at = place(i, t);
        s.l.push_back(l[at]);
        s.old.push_back(old[at]);
        s.ref.push_back(ref[at]);
        s.a.push_back(per_token ? token_a[at] : a[i]);
        s.h.push_back(entropies[at]);
        if (samples)
          s.sampler.push_back(sampler[at]);
      }
    return s;
  }
};

template <class T> struct judges {
  error_judge values, slopes;
  const wide epsilon = std::numeric_limits<T>::epsilon();
  /// Of a result that may leave the range of T; `known_to`: how well it is known.
  bool right(error_judge& judge, T got, const wide& wanted, const wide& scale, double budget,
             const wide& known_to = 0) {
    const wide most = std::numeric_limits<T>::max(), least = std::numeric_limits<T>::min();
    if (size_of(wanted) > most)
      return got == (wanted > 0 ? T(inf) : T(-inf));
    const wide error = size_of(wide(got - wanted));
    return error <= least + known_to || judge.within(error, budget, epsilon * scale);
  }
};

/// Compares value and gradients of a term with the derivative of the reference.
template <class T>
using any_loss = std::function<T(const policy::batch<T>&, const policy::outputs<T>&,
                                 const perdita::call_options<T>&)>;
template <class T>
void compare_loss(judges<T>& judge, const any_loss<T>& loss, const reference_loss& reference,
                  bool per_token, bool samples) {
  const auto& o = reference.options;
  data_set<T> data(per_token);
  const T scale = 2, before = per_token ? 3 : 0; // added, or written over
  const auto value = loss(data.batch(o, samples), data.outputs(),
                          {.row_weights = data.weights,
                           .upstream = data.upstream,
                           .scale = scale,
                           .accumulate = per_token,
                           .values = data.values});
  wide tokens = 0, sequences = 0;
  for (std::size_t i = 0; i < count; ++i) {
    sequences += data.weights[i];
    tokens += data.weights[i] * wide(static_cast<double>(data.wide_sequence(i, false).l.size()));
  }
  const wide share = o.reducer == reducer::sum          ? wide(1)
                     : o.reducer == reducer::token_mean ? wide(1 / tokens)
                                                        : wide(1 / sequences);
  wide total = 0, total_size = 0;
  for (std::size_t i = 0; i < count; ++i) {
    INFO("sequence of log-ratio " << sizes[i]);
    const auto s = data.wide_sequence(i, samples);
    const std::size_t n = s.l.size();
    const wide within = data.weights[i] * token_weight(o, n);
    const auto still = parts_of(reference, s, 0, 0);
    // What errs in x errs relatively in e^x.
    wide sum = 0, size = 0, x = 1;
    for (std::size_t t = 0; t < n; ++t) {
      x = larger(x, 1 + size_of(wide(s.l[t] - s.old[t])) + size_of(wide(s.l[t] - s.ref[t])));
      sum += still.policy[t] + still.kl[t] - o.entropy_weight * s.h[t];
      size += size_of(still.policy[t]) + size_of(still.kl[t]) + o.entropy_weight * s.h[t];
    }
    if (o.level == level::sequence)
      x *= static_cast<double>(n);
    x += reference.growth(x);
    total += within * sum;
    total_size += size_of(wide(within * sum)) + within * size * x;
    CHECK(judge.right(judge.values, data.values[i], within * sum, within * size * x, 2));
    std::size_t counted = 0;
    for (std::size_t t = 0; t < width; ++t) {
      const auto at = data.place(i, t);
      if (!data.mask[i * width + t]) {
        CHECK((data.gradient[at] == before && data.of_entropies[at] == before));
        continue;
      }
      const wide step = 1e-11;
      const auto up = parts_of(reference, s, counted, step),
                 down = parts_of(reference, s, counted, -step);
      wide slope = 0, slope_size = 0;
      for (std::size_t k = 0; k < n; ++k) {
        const wide d = (up.policy[k] - down.policy[k]) / (2 * step),
                   kl = (up.kl[k] - down.kl[k]) / (2 * step);
        slope += d + kl;
        slope_size += size_of(d) + size_of(kl);
      }
      const wide factor = within * share * scale * data.upstream[i];
      INFO("token " << t << ": " << text(data.gradient[at]) << " for "
                    << text(before + factor * slope) << " scale "
                    << text(size_of(factor) * slope_size * x));
      CHECK(judge.right(judge.slopes, data.gradient[at], before + factor * slope,
                        before + size_of(factor) * slope_size * x, 3,
                        size_of(factor) * (size + 1) * 1e-20)); // a difference of values

      CHECK(judge.right(judge.slopes, data.of_entropies[at],
                        before - (o.entropy_weight > 0 ? factor * o.entropy_weight : wide(0)),
                        before + size_of(factor), 2));
      ++counted;
    }
    // Nothing between the rows and columns is touched.
    CHECK(data.gradient[data.place(i, 0) + 1] == 3);
  }
  CHECK(judge.right(judge.values, value, share * total, share * total_size, 2));
}

template <class Term, class T>
void compare(judges<T>& judge, const Term& term, const reference_loss& reference, bool per_token,
             bool samples) {
  compare_loss<T>(judge, perdita::policy_gradient<Term, T>(term, reference.options), reference,
                  per_token, samples);
}

token_value clipped(double low, double high, double dual = inf, double delta = inf) {
  return [=](wide, wide x, wide, wide a) {
    if (a == 0)
      return wide(0);
    const wide rho = exp(x);
    const wide free = -a * smaller(rho, delta),
               held = -a * hold(rho, 1 - wide(low), 1 + wide(high));
    const wide l = larger(free, held);
    return a < 0 ? smaller(l, -a * dual) : l;
  };
}
// Library and reference take 1 ± ε from the same doubles.
wide vespo_weight(const wide& x, const wide& a) {
  const wide k = a >= 0 ? 2 : 3, lambda = a >= 0 ? 3 : 2, w = hold(x, -20, 20);
  return exp(lambda + k * w - lambda * exp(w));
}

constexpr reducer all_reducers[] = {reducer::sequence_mean, reducer::token_mean,
                                    reducer::constant_length, reducer::sequence_sum, reducer::sum};
constexpr kl_estimator all_estimators[] = {kl_estimator::k1, kl_estimator::k2, kl_estimator::k3,
                                           kl_estimator::k3_corrected, kl_estimator::k3_plus};
policy::options options_of(reducer r, level l, kl_estimator k, double weight) {
  policy::options o;
  o.reducer = r;
  o.level = l;
  o.constant_length = 7;
  o.kl = k;
  o.kl_weight = weight;
  return o;
}

/// A term at its levels with every reducer, and estimators in turn.
template <class T, class Term>
void battery(const std::string& name, const Term& term, const token_value& f,
             const std::vector<level>& levels, const limiter& limit = {},
             const std::function<wide(wide)>& growth = {}) {
  judges<T> judge;
  reference_loss reference{f, {}};
  if (limit)
    reference.limit = limit;
  if (growth)
    reference.growth = growth;
  std::size_t variety = 0;
  for (const level l : levels)
    for (const reducer r : all_reducers) {
      const kl_estimator k = all_estimators[(2 * variety + variety / 5) % 5];
      INFO(name << ", level " << int(l) << ", reducer " << int(r) << ", estimator " << int(k));
      reference.options = options_of(r, l, k, variety % 3 == 0 ? 0 : 0.04);
      reference.options.entropy_weight = variety % 2 ? 0.01 : 0;
      compare(judge, term, reference, variety % 4 >= 2, false);
      ++variety;
    }
  report_accuracy<T>(name, "", in_epsilons_of_terms, judge.values, judge.slopes);
}

const std::vector<level> only_tokens{level::token};
const std::vector<level> levels{level::token, level::sequence, level::sequence_mean,
                                level::sequence_mean_of_token};

// --- The golden values' batch --------------------------------------------------------------------

struct small_batch {
  std::vector<double> l{-1, -.5, -2, -.7, -1.2, nan}, old{-1.1, -.9, -1.9, -.5, -1.6, nan},
      ref{-1.2, -.4, -2.2, -.9, -1.1, nan}, a{1, -.5}, g = std::vector<double>(6, 5);
  std::vector<int> lengths{3, 2};
  static auto view(std::vector<double>& x) { return matrix_view<double>(x.data(), 2, 3); }
  policy::batch<double> batch() {
    policy::batch<double> b;
    b.policy = view(l);
    b.old = view(old);
    b.reference = view(ref);
    b.advantages = a;
    b.lengths = lengths;
    return b;
  }
};

} // namespace

TEMPLATE_TEST_CASE("policy_gradient: clipped ratios against the formula", "[policy_gradient]",
                   float, double) {
  using T = TestType;
  battery<T>("policy::clip", policy::clip{.low = 0.25, .high = 0.375}, clipped(0.25, 0.375),
             levels);
  battery<T>("policy::clip", policy::clip{.low = 0.25, .high = 0.375, .dual = 3},
             clipped(0.25, 0.375, 3), only_tokens);
  battery<T>("policy::clip", policy::clip{.low = 0.25, .high = 0.375, .delta = 2.5},
             clipped(0.25, 0.375, inf, 2.5), only_tokens);
  battery<T>(
      "policy::gmpo", policy::gmpo{.low = 0.5, .high = 0.25},
      [](wide, wide x, wide, wide a) { return wide(-a * exp(x)); }, {level::sequence_mean},
      [](wide x, wide a) { return a > 0   ? smaller(x, 0.25)
                                  : a < 0 ? larger(x, -0.5)
                                          : x; });
}

TEMPLATE_TEST_CASE("policy_gradient: other terms against the formula", "[policy_gradient]", float,
                   double) {
  using T = TestType;
  battery<T>(
      "policy::reinforce", policy::reinforce{},
      [](wide l, wide, wide, wide a) { return wide(-a * l); }, only_tokens);
  battery<T>(
      "policy::cispo", policy::cispo::around_one(0.25, 4),
      [](wide l, wide, wide x, wide a) { return wide(-a * l * hold(exp(x), 0.75, 5)); }, levels);
  battery<T>(
      "policy::sapo", policy::sapo{},
      [](wide, wide x, wide, wide a) {
        const wide tau = a > 0 ? wide(1) : wide(1.05);
        return wide(-4 / tau * a * logistic(tau * (exp(x) - 1)));
      },
      levels);
  battery<T>(
      "policy::vespo", policy::vespo{},
      [](wide l, wide, wide x, wide a) { return wide(-a * l * vespo_weight(x, a)); },
      {level::sequence, level::token}, {}, [](wide x) { return wide(3 * exp(smaller(x, 7))); });
  battery<T>(
      "policy::dro", policy::dro{.beta = 0.25},
      [](wide l, wide x, wide, wide a) { return wide(-a * l + x * x / 8); }, only_tokens);
}

TEMPLATE_TEST_CASE("policy_gradient: every reducer with every estimator", "[policy_gradient]",
                   float, double) {
  using T = TestType;
  judges<T> judge;
  for (const reducer r : all_reducers)
    for (const kl_estimator k : all_estimators) {
      INFO("reducer " << int(r) << ", estimator " << int(k));
      compare(judge, policy::clip{.low = 0.25, .high = 0.375},
              {clipped(0.25, 0.375), options_of(r, level::token, k, 0.5)}, false, false);
    }
  report_accuracy<T>("policy::clip", "estimators", in_epsilons_of_terms, judge.values,
                     judge.slopes);
}

TEMPLATE_TEST_CASE("policy_gradient: corrections and limits against the formula",
                   "[policy_gradient]", float, double) {
  using T = TestType;
  judges<T> judge;
  int variety = 0;
  for (const double off : {inf, 0.75, 1e-4, -1e-4})
    for (const auto how :
         {policy::correction::truncate, policy::correction::mask,
          policy::correction::truncate_sequence, policy::correction::mask_sequence}) {
      const level l = variety % 4 < 2 ? level::token : level::sequence_mean;
      reference_loss reference{clipped(0.25, 0.375),
                               options_of(reducer::token_mean, l, kl_estimator::k3, 0.5)};
      reference.options.correction = how;
      reference.options.correction_cap = 2.5;
      reference.options.off_policy_limit = off;
      reference.options.log_ratio_limit = 20;
      reference.options.kl_limit = 30;
      compare(judge, policy::clip{.low = 0.25, .high = 0.375}, reference, variety % 3 == 0,
              variety % 5 != 4);
      ++variety;
    }
  report_accuracy<T>("policy::clip", "corrections", in_epsilons_of_terms, judge.values,
                     judge.slopes);
}

TEST_CASE("policy_gradient: golden values", "[policy_gradient]") {
  small_batch data;
  const auto in = data.batch();
  const policy::options kl{.kl_weight = 0.04};
  CHECK(close(perdita::grpo<double>()(in), -0.24618195801202797));
  CHECK(close(perdita::grpo<double>({}, kl)(in), -0.2456587251389476));
  for (const double tokens : {0.0, 5.0, 10.0}) {
    const perdita::call_options<double> call{.normaliser = tokens};
    const double share = tokens == 10 ? 0.5 : 1;
    CHECK(close(perdita::bnpo<double>()(in, {}, call), share * -0.4109461221503962));
    CHECK(close(perdita::dapo<double>({}, kl)(in, {}, call), share * -0.41041384938731423));
    CHECK(close(perdita::cispo<double>()(in, {}, call), share * 0.49582150416122917));
  }
  CHECK(close(perdita::dr_grpo<double>({}, {.constant_length = 4})(in), -0.25684132634399764));
  CHECK(close(perdita::dr_grpo<double>({}, {.constant_length = 4, .kl_weight = 0.04})(in),
              -0.2565086558670714));
  CHECK(close(perdita::gspo<double>()(in), -0.2950226763789493));
  CHECK(close(perdita::rloo<double>()(in), -0.29464931045995746));
  // LUSPO is GSPO's loss times the length: clip(1.1426) and clip(1.1052) with 3 and 2 tokens
  CHECK(
      close(perdita::luspo<double>()(in), (3 * -std::exp(0.4 / 3) + 2 * 0.5 * std::exp(0.1)) / 2));
  // PPO is the token mean; REINFORCE, DRO the mean of sums
  CHECK(perdita::ppo<double>()(in) == perdita::bnpo<double>()(in));
  CHECK(close(perdita::reinforce<double>()(in), (3.5 + 0.5 * -1.9) / 2));
  CHECK(close(perdita::dro<double>({.beta = 2})(in),
              (3.5 + 0.5 * -1.9 + .01 + .16 + .01 + .04 + .16) / 2));
  { // Nash-MD: slopes β (l − ref) − A of the sequences' sums, over 2
    std::vector<double> slopes(6);
    const double value = perdita::nash_md<double>(0.5)(in, {.gradient = data.view(slopes)});
    double expected = (3.5 + 0.5 * -1.9) / 2;
    for (std::size_t k = 0; k < 5; ++k) {
      const double x = data.l[k] - data.ref[k], a = k < 3 ? 1 : -0.5;
      CHECK(close(slopes[k], (0.5 * x - a) / 2));
      expected += 0.5 * x * x / 2 / 2;
    }
    CHECK((close(value, expected) && slopes[5] == 0));
  }
  // By hand: one sequence of VESPO and GMPO
  const double w = std::exp(0.4), u = std::exp(0.2);
  CHECK(close(perdita::vespo<double>()(in),
              (3.5 * std::exp(3 + 2 * 0.4 - 3 * w) + 0.5 * -1.9 * std::exp(2 + 3 * 0.2 - 2 * u)) /
                  5));
  CHECK(close(perdita::gmpo<double>()(in), (-std::exp(0.4 / 3) + 0.5 * std::exp(0.1)) / 2));
  // Where the ratio is 1, SAPO has PPO's slope
  auto same = in;
  same.old = {};
  std::vector<double> other(6);
  (void)perdita::grpo<double>()(same, {.gradient = data.view(data.g)});
  (void)perdita::sapo<double>()(same, {.gradient = data.view(other)});
  for (std::size_t k = 0; k < 6; ++k)
    CHECK(close(data.g[k], other[k]));
  CHECK((close(data.g[0], -1.0 / 6) && close(data.g[3], 0.125) && data.g[5] == 0));
}

TEST_CASE("policy_gradient: by-products", "[policy_gradient]") {
  small_batch data;
  auto in = data.batch();
  std::vector<double> h{1, 2, 3, 4, 5, nan};
  in.entropies = data.view(h);
  policy::metrics m;
  // Ratios e^.1 e^.4 e^-.1, and e^-.2 e^.4 = 1.105 1.492 0.905, 0.819 1.492
  (void)perdita::grpo<double>({.low = 0.1})(in, {.metrics = &m});
  CHECK(m.tokens == 5);
  CHECK((close(m.clip_low, 0.2) && close(m.clip_high, 0.2) && close(m.clip_region, 0.4)));
  CHECK(close(m.mean_ratio, (std::exp(.1) + 2 * std::exp(.4) + std::exp(-.1) + std::exp(-.2)) / 5));
  CHECK(close(m.old_kl, (.01 + .16 + .01 + .04 + .16) / 10));
  const auto k3 = [](double x) { return std::exp(-x) - 1 + x; };
  CHECK(close(m.kl, (k3(.2) + 2 * k3(-.1) + 2 * k3(.2)) / 5));
  CHECK((m.entropy == 3 && m.dropped == 0));
  (void)perdita::gspo<double>({.low = 0.1, .high = 0.1})(in, {.metrics = &m});
  CHECK((m.clip_low == 0 && close(m.clip_high, 0.6) && close(m.clip_region, 0.6)));
  CHECK(close(m.mean_ratio, (3 * std::exp(.4 / 3) + 2 * std::exp(.1)) / 5));
  (void)perdita::gmpo<double>({.low = 0.15, .high = 0.35})(in, {.metrics = &m});
  CHECK((close(m.clip_low, 0.2) && close(m.clip_high, 0.2)));
  (void)perdita::cispo<double>({.floor = 0.9, .cap = 1.2})(in, {.metrics = &m});
  CHECK((close(m.clip_low, 0.2) && close(m.clip_high, 0.2)));
  // Mean of old − l: −0.133 and −0.1; only the second sequence has A < 0
  (void)perdita::grpo<double>({}, {.off_policy_limit = -0.2})(in, {.metrics = &m});
  CHECK(m.dropped == 1);
  const std::vector<double> none{0, 0};
  (void)perdita::grpo<double>()(in, {.metrics = &m}, {.row_weights = none});
  CHECK((m.tokens == 0 && m.mean_ratio == 0));
}

TEST_CASE("policy_gradient: values", "[policy_gradient]") {
  // v, v_old, R: free; held with a lower value; held above, which counts; below; on a tie
  std::vector<double> v{1, 2, 2, 0, 0.25}, old{1.1, 1, 1, 1, 0}, r{3, 0, 5, -3, 0.375}, g(5);
  const auto row = [](std::vector<double>& x) { return matrix_view<double>(x.data(), 1, 5); };
  policy::batch<double> in;
  in.policy = row(v);
  in.old = row(old);
  in.token_advantages = row(r);
  policy::metrics m;
  const double value = perdita::ppo_value<double>()(in, {.gradient = row(g), .metrics = &m});
  // held: 2 → 1.2 for R = 0: (2)² is larger, slope 2; 2 → 1.2 for R = 5: 3.8² above 3²
  // 0 → 0.8 for R = −3: 3.8² above 3²; 0.25 → 0.2 for R = 0.375: 0.175² above 0.125²
  CHECK(close(value, (4 + 4 + 3.8 * 3.8 + 3.8 * 3.8 + 0.175 * 0.175) / 10));
  const std::vector<double> slopes{-2.0 / 5, 2.0 / 5, 0, 0, 0};
  for (std::size_t k = 0; k < 5; ++k)
    CHECK(close(g[k], slopes[k]));
  CHECK((close(m.clip_low, 0.2) && close(m.clip_high, 0.4)));
  const double doubled = perdita::ppo_value<double>({.width = 0.25})(in, {.gradient = row(g)});
  CHECK((doubled < value && close(g[4], -0.125 / 5))); // on the edge nothing is held
  in.old = {};
  CHECK(close(perdita::ppo_value<double>()(in), (4 + 4 + 9 + 9 + 0.125 * 0.125) / 10));
}

TEST_CASE("policy_gradient: ratios beyond the largest number, impossible tokens",
          "[policy_gradient]") {
  std::vector<double> l{-1}, old{-1}, ref{-1}, a{1}, g(1);
  const auto at = [](std::vector<double>& x) { return matrix_view<double>(x.data(), 1, 1); };
  const auto call = [&](const auto& loss, const perdita::call_options<double>& options = {}) {
    policy::batch<double> in;
    in.policy = at(l);
    in.old = at(old);
    in.reference = at(ref);
    in.advantages = a;
    return loss(in, {.gradient = at(g)}, options);
  };
  const auto run = [&](const auto& loss, double log_ratio, double advantage,
                       const perdita::call_options<double>& options = {}) {
    l = {-1e4}, old = {-1e4 - log_ratio}, a = {advantage};
    return call(loss, options);
  };
  const auto plain = perdita::ppo<double>();
  CHECK((run(plain, 5000, 1) == -1.2 && g[0] == 0));
  // An upstream of 0 takes out an infinite slope, but not NaN.
  const std::vector<double> none{0};
  CHECK((run(plain, 5000, -1, {.upstream = none}) == inf && g[0] == 0));
  CHECK((std::isnan(run(plain, nan, -1, {.upstream = none})) && std::isnan(g[0])));
  CHECK((run(plain, 5000, -1) == inf && g[0] == inf));
  CHECK((run(plain, 5000, 0) == 0 && g[0] == 0));
  CHECK((run(plain, -5000, 1) == 0 && g[0] == 0));
  CHECK((run(plain, -5000, -1) == 0.8 && g[0] == 0));
  CHECK((run(plain, inf, 1) == -1.2 && run(plain, -inf, -1) == 0.8));
  CHECK((run(perdita::ppo<double>({.dual = 3}), 5000, -1) == 3 && g[0] == 0));
  CHECK((run(perdita::ppo<double>({.delta = 4}), 5000, -1) == 4 && g[0] == 0));
  CHECK((close(run(perdita::ppo<double>({}, {.log_ratio_limit = 20}), 5000, -1), std::exp(20.0)) &&
         g[0] == 0));
  CHECK((run(perdita::cispo<double>(), 5000, 1) == 5e4 && g[0] == -5));
  CHECK((run(perdita::sapo<double>(), 5000, 1) == -4 && g[0] == 0));
  CHECK((run(perdita::sapo<double>(), inf, -1) == 4 / 1.05 && g[0] == 0));
  CHECK((run(perdita::vespo<double>(), 5000, 1) == 0 && g[0] == 0));
  CHECK((run(perdita::vespo<double>(), inf, -1) == 0 && g[0] == 0));
  CHECK((run(perdita::dro<double>({.beta = 2}), 5000, 1) == 1e4 + 2.5e7 && g[0] == 1e4 - 1));
  CHECK((run(perdita::gmpo<double>(), 5000, 1) == -std::exp(0.4) && g[0] == 0));

  // KL terms: x = l − ref, first where l is 5000 below, then where the reference rules y out
  const auto kl = [&](kl_estimator k, double x, double log_ratio = 0) {
    l = {-1e4 + x}, old = {l[0] - log_ratio}, ref = {x == inf ? -inf : -1e4}, a = {0};
    l[0] = x == inf ? -1 : l[0];
    old[0] = x == inf ? -1 : old[0];
    policy::batch<double> in;
    in.policy = at(l);
    in.old = at(old);
    in.reference = at(ref);
    in.advantages = a;
    return perdita::ppo<double>({}, {.kl = k, .kl_weight = 1})(in, {.gradient = at(g)});
  };
  CHECK((kl(kl_estimator::k1, -5000) == -5000 && g[0] == 1));
  CHECK((kl(kl_estimator::k2, -5000) == 1.25e7 && g[0] == -5000));
  CHECK((kl(kl_estimator::k3, -5000) == inf && g[0] == -inf));
  CHECK((kl(kl_estimator::k3_plus, -5000) == inf && g[0] == -5000));
  CHECK((kl(kl_estimator::k3_corrected, -5000, -5000) == 1 && g[0] == 0));
  CHECK((kl(kl_estimator::k3_corrected, -5000, 5000) == inf && g[0] == -inf));
  CHECK((kl(kl_estimator::k3_corrected, 0, 5000) == 0 && g[0] == 0));
  CHECK((kl(kl_estimator::k3, 5000) == 4999 && g[0] == 1));
  CHECK((close(kl(kl_estimator::k3, -80), std::exp(80.0) - 81) && close(g[0], 1 - std::exp(80.0))));
  CHECK((kl(kl_estimator::k1, inf) == inf && g[0] == 1));
  CHECK((kl(kl_estimator::k2, inf) == inf && g[0] == inf));
  CHECK((kl(kl_estimator::k3, inf) == inf && g[0] == 1));
  CHECK((kl(kl_estimator::k3_corrected, inf) == inf && g[0] == inf));
  CHECK((kl(kl_estimator::k3_plus, inf) == inf && g[0] == inf));
  // What is impossible now, and was not when it was drawn, with the limits' values.
  const auto impossible = [&](const auto& loss, double advantage) {
    l = {-inf}, old = {-2}, ref = {-3}, a = {advantage};
    return call(loss);
  };
  const auto with = [](kl_estimator k) {
    return perdita::reinforce<double>({}, {.kl = k, .kl_weight = 0.5});
  };
  CHECK((close(impossible(with(kl_estimator::k3_corrected), 0), 0.5 * std::exp(-1)) && g[0] == 0));
  CHECK((impossible(with(kl_estimator::k2), -0.25) == inf && g[0] == -inf));
  CHECK(impossible(with(kl_estimator::k3), -0.25) == inf);
  CHECK((impossible(with(kl_estimator::k1), 1) == inf && g[0] == -0.5));
  CHECK((impossible(with(kl_estimator::k1), 0.25) == -inf && g[0] == 0.25));
  CHECK((impossible(perdita::nash_md<double>(0.5), -0.25) == inf && g[0] == -inf));
  CHECK((impossible(perdita::dro<double>({.beta = 2}), -1) == inf && g[0] == -inf));
  CHECK((impossible(perdita::dro<double>({.beta = 0}), -1) == -inf && g[0] == 1));
  l = {-inf}, ref = {-3}, a = {0}; // ρ = 1
  policy::batch<double> alone;
  alone.policy = at(l);
  alone.reference = at(ref);
  alone.advantages = a;
  CHECK((with(kl_estimator::k3_corrected)(alone, {.gradient = at(g)}) == inf && g[0] == -inf));
  // with all of its digits near 0
  CHECK(close(kl(kl_estimator::k3, 0x1p-20) * 0x1p41, 1 - 0x1p-20 / 3, 1e-11));
}

TEST_CASE("policy_gradient: NaN, masks, threads, memory", "[policy_gradient]") {
  small_batch data;
  data.l[1] = nan;
  auto in = data.batch();
  std::vector<double> values(2);
  const perdita::call_options<double> call{.values = values};
  CHECK(std::isnan(perdita::grpo<double>()(in, {.gradient = data.view(data.g)}, call)));
  CHECK((std::isnan(values[0]) && std::isfinite(values[1])));
  CHECK((std::isnan(data.g[1]) && std::isfinite(data.g[0]) && std::isfinite(data.g[3])));
  CHECK(std::isnan(perdita::gspo<double>()(in, {.gradient = data.view(data.g)}, call)));
  CHECK((std::isnan(data.g[0]) && std::isnan(data.g[2]) && std::isfinite(data.g[3])));
  for (const int kind : {0, 1, 2, 3}) {
    small_batch other;
    (kind == 0 ? other.old : kind == 1 ? other.a : other.l)[0] = nan;
    const auto from = other.batch();
    const policy::outputs<double> out{.gradient = other.view(other.g)};
    (void)(kind < 3 ? perdita::sapo<double>()(from, out) : perdita::vespo<double>()(from, out));
    CHECK((std::isnan(other.g[0]) && std::isfinite(other.g[3])));
  }
  // A sequence without tokens or weight adds nothing; it counts among the sequences.
  data = {};
  in = data.batch();
  const double two = perdita::grpo<double>()(in);
  data.lengths = {3, 0};
  const double one = perdita::grpo<double>()(in, {.gradient = data.view(data.g)}, call);
  CHECK((values[1] == 0 && close(values[0] / 2, one) && one != two));
  CHECK((data.g[3] == 0 && data.g[4] == 0 && data.g[5] == 0));
  const std::vector<double> first{1, 0};
  CHECK(close(perdita::grpo<double>()(in, {}, {.row_weights = first}), values[0]));
  data.lengths = {0, 0};
  for (const reducer r : all_reducers) {
    data.g.assign(6, 5);
    const perdita::policy_gradient<policy::clip, double> loss(
        {}, options_of(r, level::sequence_mean, kl_estimator::k3, 1));
    CHECK(loss(in, {.gradient = data.view(data.g)}) == 0);
    CHECK(data.g == std::vector<double>(6, 0.0));
  }
  CHECK(perdita::grpo<double>()(policy::batch<double>{}) == 0);
  // Lengths, a mask, and no padding at all are one
  data = {};
  in = data.batch();
  std::vector<std::int64_t> mask{1, 1, 7, -1, 1, 0};
  auto masked = in;
  masked.lengths = {};
  masked.mask = matrix_view<std::int64_t>(mask.data(), 2, 3);
  CHECK(perdita::grpo<double>()(masked) == perdita::grpo<double>()(in));

  data_set<float> many(true);
  const auto o = options_of(reducer::token_mean, level::sequence_mean, kl_estimator::k3, 0.1);
  const perdita::policy_gradient<policy::clip> loss({}, o);
  perdita::workspace memory;
  const float value = loss(many.batch(o, true), {.gradient = many.view(many.gradient)},
                           {.run_on = perdita::serial});
  const auto expected = many.gradient;
  for (const auto order : {task_order::forward, task_order::reversed, task_order::shuffled}) {
    const threads_executor threads(3, order);
    CHECK(loss(many.batch(o, true), {.gradient = many.view(many.gradient)},
               {.run_on = threads, .memory = &memory}) == value);
    CHECK(many.gradient == expected);
  }
}

TEST_CASE("policy_gradient: what is refused", "[policy_gradient]") {
  using Catch::Matchers::ContainsSubstring;
  small_batch data;
  const auto in = data.batch();
  const auto out = policy::outputs<double>{.gradient = data.view(data.g)};
  const auto refused = [&](const policy::batch<double>& b, const char* what,
                           const policy::options& o = {},
                           const perdita::call_options<double>& call = {}) {
    CHECK_THROWS_WITH((perdita::grpo<double>({}, o)(b, out, call)), ContainsSubstring(what));
  };
  auto bad = in;
  bad.advantages = {};
  refused(bad, "advantages is missing");
  bad = in;
  bad.token_advantages = in.reference;
  refused(bad, "advantages is given with token_advantages");
  const std::vector<double> three(3);
  bad = in;
  bad.advantages = three;
  refused(bad, "advantages is 3, expected 2");
  const auto narrow = matrix_view<const double>(data.ref.data(), 2, 2);
  bad = in;
  bad.old = narrow;
  refused(bad, "columns of old is 2, expected 3");
  bad.old = {data.ref.data(), 1, 3};
  refused(bad, "rows of old is 1, expected 2");
  bad.old = {nullptr, 2, 3};
  refused(bad, "old is null");
  bad = in;
  bad.policy = {nullptr, 2, 3};
  refused(bad, "policy is null");
  bad = in;
  bad.reference = {};
  refused(bad, "reference is missing", {.kl_weight = 0.1});
  refused(in, "entropies is missing", {.entropy_weight = 0.1});
  std::vector<int> lengths{3, 4}, mask(6);
  bad.lengths = lengths;
  refused(bad, "lengths[1] is 4, expected 0 to 3");
  bad.mask = matrix_view<int>(mask.data(), 2, 3);
  refused(bad, "given with lengths");
  bad.lengths = {};
  bad.mask = matrix_view<int>(mask.data(), 3, 2);
  refused(bad, "rows of the mask is 3");
  bad = in;
  bad.policy = data.view(data.g);
  refused(bad, "overlaps");
  for (double* const at : {data.g.data(), data.g.data() + 4}) {
    const perdita::vector_view<double> two(at, 2);
    bad = in;
    bad.advantages = two;
    refused(bad, "overlaps");
    refused(in, "overlaps", {}, {.row_weights = two});
    refused(in, "overlaps", {}, {.upstream = two});
    refused(in, "overlaps", {}, {.values = two});
  }
  refused(in, "row_weights", {}, {.row_weights = three});
  refused(in, "normaliser", {}, {.normaliser = -1});
  CHECK(data.g == std::vector<double>(6, 5));

  const auto unusable = [&](const policy::options& o, const char* what) {
    CHECK_THROWS_WITH((perdita::policy_gradient<policy::clip>({}, o)), ContainsSubstring(what));
  };
  unusable({.kl_weight = -0.1}, "kl_weight is -0.1");
  unusable({.kl_weight = inf}, "kl_weight is inf");
  unusable({.entropy_weight = -1}, "entropy_weight");
  unusable({.reducer = reducer::constant_length}, "constant_length is 0");
  unusable({.log_ratio_limit = 0}, "log_ratio_limit");
  unusable({.kl_limit = nan}, "kl_limit");
  unusable({.correction_cap = -1}, "correction_cap");
  unusable({.off_policy_limit = nan}, "off_policy_limit");
  unusable({.reducer = static_cast<reducer>(5)}, "reducer is 5");
  unusable({.level = static_cast<level>(4)}, "level is 4");
  unusable({.kl = static_cast<policy::kl_estimator>(5)}, "kl is 5");
  unusable({.correction = static_cast<policy::correction>(4)}, "correction is 4");
  CHECK_THROWS_WITH(perdita::grpo({.low = -0.1}), ContainsSubstring("low is -0.1"));
  CHECK_THROWS_WITH(perdita::grpo({.high = nan}), ContainsSubstring("high"));
  CHECK_THROWS_WITH(perdita::grpo({.dual = 0.5}), ContainsSubstring("dual"));
  CHECK_THROWS_WITH(perdita::grpo({.delta = 1.1}), ContainsSubstring("delta"));
  CHECK_THROWS_WITH(perdita::cispo({.cap = 0}), ContainsSubstring("cap"));
  CHECK_THROWS_WITH(perdita::sapo({.gain = 0}), ContainsSubstring("gain"));
  CHECK_THROWS_WITH(perdita::vespo({.limit = 1e3}), ContainsSubstring("limit"));
  CHECK_THROWS_WITH(perdita::dro({.beta = -1}), ContainsSubstring("beta"));
  CHECK_THROWS_WITH(perdita::nash_md<double>(0), ContainsSubstring("nash_md: beta is 0"));
  CHECK_THROWS_WITH(perdita::ppo_value({.width = -1}), ContainsSubstring("width"));
  CHECK_THROWS_WITH((perdita::policy_gradient<policy::dro>({}, {.level = level::sequence})),
                    ContainsSubstring("level"));
  CHECK_THROWS_WITH(perdita::dro({}, {.log_ratio_limit = 20}), ContainsSubstring("level"));
  CHECK_THROWS_WITH((perdita::policy_gradient<policy::gmpo>()), ContainsSubstring("level"));
}

// --- Expected gradients, by enumeration
// ------------------------------------------------------------

namespace {

/// A categorical distribution, from logits.
struct categorical {
  std::vector<double> p, log_p;
  explicit categorical(const std::vector<double>& logits) {
    double sum = 0;
    for (const double z : logits)
      sum += std::exp(z);
    for (const double z : logits) {
      log_p.push_back(z - std::log(sum));
      p.push_back(std::exp(z) / sum);
    }
  }
  /// What slopes with respect to the log-probabilities of all outcomes are in the logits.
  std::vector<double> in_logits(const std::vector<double>& slopes) const {
    double sum = 0;
    for (const double s : slopes)
      sum += s;
    std::vector<double> g;
    for (std::size_t k = 0; k < p.size(); ++k)
      g.push_back(slopes[k] - sum * p[k]);
    return g;
  }
};
bool near(const std::vector<double>& a, const std::vector<double>& b) {
  bool all = true;
  for (std::size_t k = 0; k < a.size(); ++k)
    all = all && close(a[k], b[k], 1e-13);
  return all;
}
/// Every outcome as a sequence of one token, weighted by the probability that it is drawn.
policy::batch<double> outcomes(const std::vector<double>& l, const std::vector<double>& old,
                               const std::vector<double>& ref, const std::vector<double>& a) {
  policy::batch<double> b;
  const auto n = static_cast<index>(l.size());
  b.policy = {l.data(), n, 1};
  b.old = {old.data(), n, 1};
  b.reference = {ref.data(), n, 1};
  b.advantages = a;
  return b;
}

} // namespace

TEST_CASE("policy_gradient: expected values and gradients of the KL estimators",
          "[policy_gradient]") {
  const categorical pi({0.3, -1, 2, 0.1}), ref({1, 0.5, -0.7, 0}), old({0.2, 0.4, 1, -0.6});
  const std::size_t n = 4;
  double kl = 0;
  std::vector<double> of_kl(n), of_other(n), none(n), zeros(n), g(n), slopes(n);
  for (std::size_t k = 0; k < n; ++k)
    kl += pi.p[k] * (pi.log_p[k] - ref.log_p[k]);
  for (std::size_t k = 0; k < n; ++k) {
    of_kl[k] = pi.p[k] * (pi.log_p[k] - ref.log_p[k] - kl); // ∇ KL(π‖ref) in the logits
    of_other[k] = pi.p[k] - ref.p[k];                       // ∇ KL(ref‖π)
  }
  const auto expect = [&](kl_estimator k, const categorical& drawn) {
    policy::options o;
    o.reducer = reducer::sum;
    o.kl = k;
    o.kl_weight = 1;
    const perdita::policy_gradient<policy::reinforce, double> loss({}, o);
    const double value = loss(outcomes(pi.log_p, drawn.log_p, ref.log_p, zeros),
                              {.gradient = {slopes.data(), index(n), 1}}, {.row_weights = drawn.p});
    g = pi.in_logits(slopes);
    return value;
  };
  CHECK((close(expect(kl_estimator::k1, pi), kl) && near(g, none)));
  CHECK((expect(kl_estimator::k2, pi) != kl && near(g, of_kl)));
  CHECK((close(expect(kl_estimator::k3, pi), kl) && near(g, of_other)));
  CHECK((close(expect(kl_estimator::k3_plus, pi), kl) && near(g, of_kl)));
  CHECK((close(expect(kl_estimator::k3_corrected, pi), kl) && near(g, of_kl)));
  CHECK((close(expect(kl_estimator::k3_corrected, old), kl) && near(g, of_kl)));
  CHECK((expect(kl_estimator::k3, old) != kl && !near(g, of_kl) && !near(g, of_other)));

  // In the reward, k1 is right: the advantage is its negative.
  std::vector<double> rewards(n);
  policy::sequence_rewards(matrix_view(pi.log_p.data(), index(n), 1),
                           matrix_view(ref.log_p.data(), index(n), 1), zeros, rewards,
                           {.weight = 1});
  (void)perdita::reinforce<double>()(outcomes(pi.log_p, pi.log_p, ref.log_p, rewards),
                                     {.gradient = {slopes.data(), index(n), 1}},
                                     {.row_weights = pi.p});
  CHECK(near(pi.in_logits(slopes), of_kl));
}

TEST_CASE("policy_gradient: towards a target distribution", "[policy_gradient]") {
  const categorical pi({0.3, -1, 2, 0.1}), q({1, 0.5, -0.7, 0});
  const std::vector<double> target{0.2, 0, 0.7, 1.6}; // P, with Z = 2.5
  const double z = 2.5;
  std::vector<double> log_p(4), a(4), slopes(4), wanted(4);
  for (std::size_t k = 0; k < 4; ++k) {
    log_p[k] = std::log(target[k]);
    wanted[k] = pi.p[k] - target[k] / z; // ∇ of the cross-entropy of p and π
  }
  for (const bool baseline : {false, true})
    for (const double log_z : {0.0, std::log(z)}) {
      policy::target_advantages(log_p, q.log_p, pi.log_p, a, {.log_normaliser = log_z});
      (void)perdita::reinforce<double>()(outcomes(pi.log_p, q.log_p, q.log_p, a),
                                         {.gradient = {slopes.data(), 4, 1}}, {.row_weights = q.p});
      auto g = pi.in_logits(slopes);
      for (double& x : g)
        x *= std::exp(log_z) / z;
      CHECK(near(g, wanted));
      if (baseline && log_z != 0) {
        policy::target_advantages(log_p, q.log_p, pi.log_p, a,
                                  {.log_normaliser = log_z, .baseline = true});
        (void)perdita::reinforce<double>()(outcomes(pi.log_p, q.log_p, q.log_p, a),
                                           {.gradient = {slopes.data(), 4, 1}},
                                           {.row_weights = q.p});
        CHECK(near(pi.in_logits(slopes), wanted));
        CHECK(close(a[1], -pi.p[1] / q.p[1]));
      }
    }
  // Far apart: held, not overflowing; in place
  std::vector<double> far{-10, -2000, -inf}, from{-5000, -10, -3}, own{-1, -1, -1};
  policy::target_advantages(far, from, own, far);
  CHECK((close(far[0] / std::exp(80.0), 1) && far[1] == 0 && far[2] == 0));

  // Distances: of samples that are each of the uniform q's outcomes once, all is exact.
  const categorical uniform({0, 0, 0, 0});
  double kl = 0, variation = 0;
  for (std::size_t k = 0; k < 4; ++k) {
    if (target[k] > 0)
      kl += target[k] / z * (std::log(target[k] / z) - pi.log_p[k]);
    variation += std::abs(target[k] / z - pi.p[k]) / 2;
  }
  auto distance = policy::distance_to_target(log_p, uniform.log_p, pi.log_p);
  CHECK(close(distance.log_normaliser, std::log(z)));
  CHECK((close(distance.kl, kl) && close(distance.total_variation, variation)));
  const double other_z = std::log(5.0);
  distance = policy::distance_to_target(log_p, uniform.log_p, pi.log_p, &other_z);
  CHECK(close(distance.kl, (kl + std::log(z)) / 2 - other_z));
  const std::vector<double> some{-1, -inf, -2}, with{-1, -1, -2}, own_some{-1.5, -inf, -2};
  distance = policy::distance_to_target(some, with, own_some); // both rule the second out
  CHECK(close(distance.kl, 0.5 / 2 - std::log(2.0 / 3)));
  const std::vector<double> nothing(4, -inf);
  distance = policy::distance_to_target(nothing, uniform.log_p, pi.log_p);
  CHECK((distance.log_normaliser == -inf && std::isnan(distance.kl)));

  // Moments: half of the samples have the first feature, and 0.8 should; the second stays.
  const std::vector<double> features{1, 1, 1, 0, 0, 1, 0, 0}, moments{0.8, 0.5};
  std::vector<double> lambda{0, 0};
  const auto found = policy::fit_moments(matrix_view(features.data(), 4, 2), moments, lambda,
                                         {.tolerance = 1e-10});
  CHECK((found.gap < 1e-10 && found.steps > 10));
  CHECK((close(lambda[0], std::log(4.0), 1e-8) && lambda[1] == 0));
  lambda = {0, 0};
  CHECK(policy::fit_moments(matrix_view(features.data(), 4, 2), moments, lambda, {.most_steps = 1})
            .steps == 1);
  CHECK(close(lambda[0], 0.5 * 0.3));
  lambda = {0, 0};
  CHECK_THROWS_AS(policy::fit_moments(matrix_view(features.data(), 4, 2),
                                      std::vector<double>{nan, 0.25}, lambda),
                  std::invalid_argument);
  CHECK(lambda == std::vector<double>{0, 0});
  CHECK_THROWS_AS(policy::target_advantages(log_p, from, own, a), std::invalid_argument);
  CHECK_THROWS_AS(policy::distance_to_target(log_p, from, pi.log_p), std::invalid_argument);
  CHECK_THROWS_AS(policy::fit_moments(matrix_view(features.data(), 4, 2), from, lambda),
                  std::invalid_argument);
}

// --- Advantages
// ------------------------------------------------------------------------------------

TEST_CASE("policy_gradient: NaN shows where there is no old policy", "[policy_gradient]") {
  const std::vector<double> log_p{-1, std::numeric_limits<double>::quiet_NaN(), -2, -1};
  const std::vector<double> advantages{1, -1};
  const auto check = [&](const auto& loss) {
    std::vector<double> g(4), values(2);
    CHECK(std::isnan(loss({.policy = matrix_view(log_p.data(), 2, 2), .advantages = advantages},
                          {.gradient = matrix_view(g.data(), 2, 2)}, {.values = values})));
    CHECK((std::isnan(values[0]) && !std::isnan(values[1])));
    CHECK((std::isnan(g[1]) && !std::isnan(g[2]) && !std::isnan(g[3])));
  };
  check(perdita::policy_gradient<policy::clip, double>());
  check(perdita::policy_gradient<policy::sapo, double>());
}

TEST_CASE("policy: advantages of groups", "[policy_gradient]") {
  using Catch::Matchers::ContainsSubstring;
  const std::vector<double> r{1, 0, 0, 3, 0.1, 0.1, 0.1, 0.1};
  std::vector<double> a(8), b(8);
  auto report = policy::group_advantages(r, 4, a);
  const double deviation = std::sqrt(2.0); // (0 + 1 + 1 + 4)/3
  CHECK((report.groups == 2 && report.without_spread == 0.5));
  for (std::size_t k = 0; k < 8; ++k)
    CHECK(close(a[k], k < 4 ? (r[k] - 1) / (deviation + 1e-4) : 0, 1e-15));
  CHECK((a[4] == 0 && a[7] == 0));
  // The same by ids, in any order, and in place
  const std::vector<int> ids{7, 7, -2, 7, -2, -2, 7, -2};
  std::vector<double> mixed{1, 0, 0.1, 0, 0.1, 0.1, 3, 0.1};
  report = policy::group_advantages(mixed, ids, mixed, {.epsilon = 0});
  CHECK((report.groups == 2 && report.without_spread == 0.5));
  CHECK((close(mixed[6], 2 / deviation) && close(mixed[1], -1 / deviation) && mixed[2] == 0));
  (void)policy::group_advantages(r, 4, a, {.scaling = policy::scaling::none});
  CHECK((a[0] == 0 && a[1] == -1 && a[3] == 2));
  (void)policy::group_advantages(r, 4, a, {.scaling = policy::scaling::batch, .epsilon = 0});
  CHECK(close(a[3], 2 / std::sqrt((.45 * .45 + 2 * .55 * .55 + 2.45 * 2.45 + 4 * .45 * .45) / 7)));
  (void)policy::group_advantages(r, 1, a);
  CHECK(a == std::vector<double>(8, 0.0));
  (void)policy::group_advantages(r, 1, a, {.keep_lone = true});
  CHECK(a == r);
  const std::vector<double> spoilt{1, nan, 2, 3};
  std::vector<float> narrow(4);
  (void)policy::group_advantages(spoilt, 2, narrow);
  CHECK((std::isnan(narrow[0]) && std::isnan(narrow[1]) && narrow[3] > 0.7F));
  // The batch's deviation is that of all groups, those of equal rewards too.
  const std::vector<double> flat{1, nan, 2, 2};
  (void)policy::group_advantages(flat, 2, narrow, {.scaling = policy::scaling::batch});
  for (const float x : narrow)
    CHECK(std::isnan(x));

  // Rewards of any size: a power of 2 changes nothing, though squares overflow or vanish.
  (void)policy::group_advantages(r, 4, a, {.epsilon = 0});
  for (const int exponent : {-1060, -600, 600, 1022}) {
    std::vector<double> scaled(r);
    for (double& x : scaled)
      x = std::ldexp(std::round(x), exponent);
    (void)policy::group_advantages(scaled, 4, b, {.epsilon = 0});
    for (std::size_t k = 0; k < 8; ++k)
      CHECK(b[k] == a[k]);
    (void)policy::group_advantages(scaled, 4, b, {.scaling = policy::scaling::none});
    CHECK((b[1] == std::ldexp(-1, exponent) && b[3] == std::ldexp(2, exponent)));
    auto white = scaled;
    policy::whiten(matrix_view<double>(white.data(), 1, 4), {.epsilon = 0});
    for (std::size_t k = 0; k < 4; ++k)
      CHECK(close(white[k], a[k]));
  }
  const std::vector<double> apart{1e200, 3e200, 1e-200, 3e-200};
  (void)policy::group_advantages(apart, 2, narrow, {.epsilon = 0});
  CHECK((narrow[0] == -std::sqrt(0.5F) && narrow[3] == std::sqrt(0.5F)));
  (void)policy::group_advantages(apart, 2, narrow, {.scaling = policy::scaling::batch});
  CHECK((close(narrow[1], 1 / std::sqrt(2.0), 1e-7) && narrow[2] == 0));

  (void)policy::leave_one_out_advantages(r, 4, b);
  CHECK((close(b[0], 0) && close(b[1], -4.0 / 3) && close(b[3], 3 - 1.0 / 3) && b[5] == 0));
  CHECK_THROWS_WITH(policy::leave_one_out_advantages(r, 1, b), ContainsSubstring("groups is 1"));
  CHECK_THROWS_WITH(policy::group_advantages(r, 3, b), ContainsSubstring("groups is 3"));
  CHECK_THROWS_WITH(policy::group_advantages(r, 0, b), ContainsSubstring("groups is 0"));
  CHECK_THROWS_WITH(policy::group_advantages(r, std::vector<int>{1, 2}, b),
                    ContainsSubstring("groups is 2, expected 8"));
  CHECK_THROWS_WITH(policy::group_advantages(r, 4, narrow), ContainsSubstring("advantages is 4"));
  CHECK_THROWS_WITH(policy::group_advantages(r, 4, b, {.epsilon = -1}),
                    ContainsSubstring("epsilon"));
  CHECK_THROWS_WITH(policy::group_advantages(r, 4, b, {.scaling = static_cast<policy::scaling>(3)}),
                    ContainsSubstring("scaling is 3"));
}

TEST_CASE("policy: rewards of tokens, generalised advantages, whitening", "[policy_gradient]") {
  small_batch data;
  std::vector<double> rewards(6), scores{2, -1}, sums(2);
  const auto view = small_batch::view;
  policy::token_rewards(view(data.old), view(data.ref), scores, view(rewards), {.weight = 0.5}, {},
                        data.lengths);
  CHECK(near(rewards, {-.05, .25, 2 - .15, -.2, -1 + .25, 0}));
  policy::sequence_rewards(view(data.old), view(data.ref), scores, sums, {.weight = 0.5}, {},
                           data.lengths);
  CHECK(near(sums, {2 + .05, -1 + .05}));
  policy::token_rewards(view(data.old), view(data.ref), scores, view(rewards),
                        {.weight = 1, .estimator = kl_estimator::k3}, {}, data.lengths);
  CHECK(close(rewards[0], -(std::exp(-.1) - 1 + .1)));

  // GAE as its sum: A_t = Σ_k (γλ)^k δ_{t+k}; the second token of the first sequence is masked.
  std::vector<double> r{1, nan, 2, .5, -1, .25}, v{.3, nan, -.2, 1, 2, 3}, a(6), g(6);
  std::vector<unsigned char> mask{1, 0, 1, 1, 1, 1};
  const policy::token_mask tokens(matrix_view<unsigned char>(mask.data(), 2, 3));
  const double gamma = 0.9, lambda = 0.8, c = gamma * lambda;
  policy::generalised_advantages(view(r), view(v), view(a), view(g), {gamma, lambda}, tokens);
  const double last = 2 + .2, first = 1 + gamma * -.2 - .3 + c * last;
  const double d[] = {.5 + gamma * 2 - 1, -1 + gamma * 3 - 2, .25 - 3};
  CHECK(near(a, {first, 0, last, d[0] + c * d[1] + c * c * d[2], d[1] + c * d[2], d[2]}));
  CHECK(near(g, {first + .3, 0, last - .2, a[3] + 1, a[4] + 2, a[5] + 3}));
  // Through the padding, whose numbers then matter: TRL's
  r[1] = 0, v[1] = 0.5;
  policy::generalised_advantages(view(r), view(v), view(a), view(g),
                                 {gamma, lambda, /*skip_masked=*/false}, tokens);
  const double through = 0 + gamma * -.2 - .5 + c * last;
  CHECK(near(a, {1 + gamma * .5 - .3 + c * through, 0, last, a[3], a[4], a[5]}));
  CHECK((a[1] == 0 && g[1] == 0));

  // In place, but not beside it
  std::vector<double> one_place = r, other_place = v;
  policy::generalised_advantages(view(one_place), view(other_place), view(other_place),
                                 view(one_place), {gamma, lambda, false}, tokens);
  CHECK((one_place == g && other_place == a));
  std::vector<double> eight(8);
  const matrix_view<double> left(eight.data(), 2, 3), right(eight.data() + 2, 2, 3);
  CHECK_THROWS_AS(policy::generalised_advantages(left, view(v), right, view(g)),
                  std::invalid_argument);
  CHECK_THROWS_AS(policy::generalised_advantages(view(r), left, view(a), right),
                  std::invalid_argument);
  CHECK_THROWS_AS(policy::generalised_advantages(view(r), view(v), left, left),
                  std::invalid_argument);
  CHECK_THROWS_AS(policy::token_rewards(left, view(data.ref), scores, right),
                  std::invalid_argument);
  CHECK_THROWS_AS(policy::token_rewards(view(data.old), left, scores, right),
                  std::invalid_argument);
  CHECK_THROWS_AS(policy::token_rewards(view(data.old), view(data.ref),
                                        perdita::vector_view<double>(eight.data() + 3, 2), left),
                  std::invalid_argument);
  CHECK_THROWS_AS(policy::sequence_rewards(left, view(data.ref), scores,
                                           perdita::vector_view<double>(eight.data() + 3, 2)),
                  std::invalid_argument);

  std::vector<double> x{1, nan, 2, 3, 4, 5};
  policy::whiten(view(x), {.epsilon = 0}, tokens);
  const double s = std::sqrt(2.5);
  CHECK(near(x, {-2 / s, 0, -1 / s, 0, 1 / s, 2 / s}));
  x = {1, nan, 2, 3, 4, 5};
  policy::whiten(view(x), {.shift = false, .epsilon = 1.5}, tokens);
  CHECK(near(x, {3 - 1, 0, 3 - .5, 3, 3.5, 4}));
  const std::vector<int> one{1, 0};
  CHECK_THROWS_AS(policy::whiten(view(x), {}, {}, one), std::invalid_argument);
  CHECK_THROWS_AS(policy::whiten(view(x), {.epsilon = -1}), std::invalid_argument);
  CHECK_THROWS_AS(policy::generalised_advantages(view(r), view(v), view(a), view(g), {1.5, 1}),
                  std::invalid_argument);
  CHECK_THROWS_AS(policy::generalised_advantages(view(r), matrix_view<double>(v.data(), 3, 2),
                                                 view(a), view(g)),
                  std::invalid_argument);
  CHECK_THROWS_AS(policy::token_rewards(view(data.old), view(data.ref), r, view(rewards)),
                  std::invalid_argument);
  CHECK_THROWS_AS(
      policy::sequence_rewards(view(data.old), view(data.ref), scores, sums, {.weight = -1}),
      std::invalid_argument);
  CHECK_THROWS_AS(policy::sequence_rewards(view(data.old), view(data.ref), scores, sums,
                                           {.estimator = static_cast<policy::kl_estimator>(5)}),
                  std::invalid_argument);
}

TEMPLATE_TEST_CASE("policy_gradient: terms with other settings", "[policy_gradient]", float,
                   double) {
  using T = TestType;
  battery<T>(
      "policy::sapo", policy::sapo{.gain = 2, .loss = 0.75},
      [](wide, wide x, wide, wide a) {
        const wide tau = a > 0 ? wide(2) : wide(0.75);
        return wide(-4 / tau * a * logistic(tau * (exp(x) - 1)));
      },
      only_tokens);
  battery<T>(
      "policy::vespo",
      policy::vespo{.k = 1.5, .lambda = 2.5, .k_loss = 2.5, .lambda_loss = 1.25, .limit = 3},
      [](wide l, wide, wide x, wide a) {
        const wide k = a >= 0 ? 1.5 : 2.5, lambda = a >= 0 ? 2.5 : 1.25, w = hold(x, -3, 3);
        return wide(-a * l * exp(lambda + k * w - lambda * exp(w)));
      },
      only_tokens, {}, [](wide x) { return wide(3 * exp(smaller(x, 7))); });
}

TEST_CASE("policy_gradient: samplers without an old policy, limits in the metrics",
          "[policy_gradient]") {
  small_batch data;
  auto in = data.batch();
  policy::metrics m;
  // The clipped log-ratios of GMPO are not what OPSM measures: −0.1 of the second sequence.
  (void)perdita::gmpo<double>({.low = 0.05}, {.off_policy_limit = -0.15})(in, {.metrics = &m});
  CHECK(m.dropped == 1);
  (void)perdita::grpo<double>({}, {.log_ratio_limit = 0.2})(in, {.metrics = &m});
  CHECK(close(m.mean_ratio, (std::exp(.1) + 2 * std::exp(.2) + std::exp(-.1) + std::exp(-.2)) / 5));
  // Without an old policy the sampler's tokens weigh what they do under the policy itself.
  const auto loss = perdita::grpo<double>({}, {.correction_cap = 10});
  in.old = {};
  const double plain = loss(in);
  in.sampler = data.view(data.ref);
  const double corrected = loss(in);
  CHECK(corrected != plain);
  in.old = in.policy;
  CHECK(loss(in) == corrected);
}

TEST_CASE("policy: settings of target advantages and of moments", "[policy_gradient]") {
  std::vector<double> log_p{-1, -9}, log_q{-3, -6}, own{-2.5, -5}, a(2);
  policy::target_advantages(log_p, log_q, own, a, {.baseline = true, .exponent_limit = 0.75});
  CHECK(
      (close(a[0], std::exp(0.75) - std::exp(0.5)) && close(a[1], std::exp(-3) - std::exp(0.75))));
  const std::vector<double> features{1, 1, 1, 0, 0, 1, 0, 0}, moments{0.8, 0.5};
  const matrix_view<const double> samples(features.data(), 4, 2);
  std::vector<double> lambda{0, 0};
  policy::fit_moments(samples, moments, lambda, {.step = 0.25, .most_steps = 1});
  CHECK(close(lambda[0], 0.25 * 0.3));
  lambda = {std::log(4.0), 0}; // λ starts with what it holds
  CHECK(policy::fit_moments(samples, moments, lambda, {.tolerance = 1e-10}).steps == 0);
}

} // namespace perdita_tests
