// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <type_traits>

#include "core/sequences.hpp"
#include "core/weighted.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// Bag b has the predictions [begin(b), begin(b + 1)).
struct bag_bounds {
  index per_bag = 0; ///< where there are no starts
  integer_rows starts;

  index begin(index b) const {
    return starts.data ? static_cast<index>(starts.at(0, b)) : b * per_bag;
  }
};

template <class V, class T>
concept numbers_like =
    vector_like<V> && std::same_as<std::remove_const_t<typename element_of<V>::type>, T>;

} // namespace core

/// Squared error where only the mean response of each bag of instances is known.
///
///   ℓ_a = (1 − ρ) (mean_i f_i − y_a)² + ρ mean_i (f_i − y_a)²   over the instances i of bag a
///   ∂ℓ_a/∂f_i = (2/k_a) ((1 − ρ) (mean f − y_a) + ρ (f_i − y_a))   in a bag of k_a
///
/// ρ = 0: the bag-level loss; ρ = 1: the instance-level one, which is that plus the variance of f
/// within the bag; between them, interpolated. No factor ½.
/// Shapes: one prediction per instance, bags one after another; one response per bag. The bags are
/// equal groups of predictions, or given by `starts`: 0, where the second begins, …, and the number
/// of predictions; no bag is empty. Predictions, responses and gradient are of T, starts of any
/// integral type. The gradient may be the predictions themselves, or lies apart from all of these.
/// Call options as for losses of rows, a bag being a row: row_weights, upstream and values have one
/// number per bag, and `mean` divides by the number of bags (or the sum of their weights; 0 where
/// there are none). No other by-products. Infinity or NaN stays within its bag.
/// Sums are in double, with their rounding errors kept. Threads do not matter.
/// Throws std::invalid_argument.
/// Source: Javanmard, Chen, Mirrokni, Badanidiyuru, Fu, "Learning from aggregate responses:
/// instance level versus bag level loss functions", ICLR 2024.
///
///   perdita::bag_squared<float> loss({.rho = 0.5f});
///   float value = loss(predictions, responses, d_predictions);
template <class T = float> class bag_squared {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    T rho = 0; ///< ρ in [0, 1]: of the instance-level loss
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "bag_squared";

  bag_squared() : bag_squared(options{}) {}
  explicit(false) bag_squared(const options& o) : options_(o) {
    core::require(o.rho >= 0 && o.rho <= 1, name, "rho", o.rho, "a number in [0, 1]");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  /// The value, of equal bags.
  template <core::numbers_like<T> F, core::numbers_like<T> Y>
  T operator()(F&& predictions, Y&& responses, const call_options<T>& call = {}) const {
    return run(core::as_vector(predictions), core::as_vector(responses), {}, {}, false, call);
  }
  /// The value, of bags that begin at `starts`.
  template <core::numbers_like<T> F, core::numbers_like<T> Y, core::labels_like S>
  T operator()(F&& predictions, Y&& responses, S&& starts, const call_options<T>& call = {}) const {
    return run(core::as_vector(predictions), core::as_vector(responses), given(starts), {}, false,
               call);
  }
  /// The value and its gradient.
  template <core::numbers_like<T> F, core::numbers_like<T> Y, core::numbers_like<T> G>
  T operator()(F&& predictions, Y&& responses, G&& gradient,
               const call_options<T>& call = {}) const {
    return run(core::as_vector(predictions), core::as_vector(responses), {},
               core::as_vector(gradient), true, call);
  }
  template <core::numbers_like<T> F, core::numbers_like<T> Y, core::labels_like S,
            core::numbers_like<T> G>
  T operator()(F&& predictions, Y&& responses, S&& starts, G&& gradient,
               const call_options<T>& call = {}) const {
    return run(core::as_vector(predictions), core::as_vector(responses), given(starts),
               core::as_vector(gradient), true, call);
  }

private:
  struct start_list {
    core::integer_rows entries;
    core::extent memory{0, 0};
    bool given = false;
  };
  template <class S> static start_list given(S& starts) {
    const auto v = core::as_vector(starts);
    return {core::integer_rows(v), core::bytes_of(v), true};
  }
  static constexpr core::sequence_checks<T> checks{name};

  core::bag_bounds find_bags(index instances, index bags, const start_list& list) const {
    if (!list.given) {
      if (bags == 0 ? instances != 0 : instances % bags != 0 || instances == 0)
        core::fail(name, "predictions", core::to_text(instances),
                   "as many for each of the " + core::to_text(bags) + " bags, at least 1");
      return {bags == 0 ? 0 : instances / bags, {}};
    }
    const auto& starts = list.entries;
    checks.size("starts", starts.cols, bags + 1, "one per bag, and the end");
    checks.memory("starts", starts.data, starts.cols);
    for (index b = 0; b <= bags; ++b) {
      const std::int64_t at = starts.at(0, b);
      const std::int64_t low = b == 0 ? 0 : starts.at(0, b - 1) + 1;
      const std::int64_t high = b == 0 ? 0 : b == bags ? instances : instances - 1;
      if (at < low || at > high || (b == bags && at != instances))
        core::fail_at(name, "starts", b, core::to_text(at),
                      "numbers from 0 to the number of predictions, ascending");
    }
    return {0, starts};
  }

  T run(vector_view<const T> f, vector_view<const T> y, const start_list& list, vector_view<T> g,
        bool has_gradient, const call_options<T>& call) const {
    const index bags = y.size;
    checks.memory("predictions", f.data, f.size);
    checks.memory("responses", y.data, bags);
    checks.call(call, bags, false, "as many as there are bags");
    const core::bag_bounds bounds = find_bags(f.size, bags, list);
    if (has_gradient) {
      const auto column = [](auto v) {
        return matrix_view<std::remove_pointer_t<decltype(v.data)>>(v.data, v.size, 1, v.stride, 1);
      };
      const core::matrix_data<T, true> to(column(g));
      checks.gradient(core::matrix_data<T>(column(f)), to, call.accumulate);
      const core::extent memory[] = {core::bytes_of(to), core::bytes_of(y), list.memory};
      core::require_apart(name, memory, 1);
    }
    const double share = core::share_of(call, options_.reduction, bags);
    const double scale = static_cast<double>(call.scale) * share;

    constexpr index per_task = 64;
    const index tasks = (bags + per_task - 1) / per_task;
    const auto workers = std::min(static_cast<std::size_t>(tasks), call.run_on.concurrency());
    workspace own;
    auto* const values =
        reinterpret_cast<double*>((call.memory ? *call.memory : own)
                                      .request(static_cast<std::size_t>(bags) * sizeof(double)));
    core::share_out(tasks, workers, call.run_on, [&](std::size_t) {
      return [&](index t) {
        for (index b = t * per_task; b < std::min(bags, (t + 1) * per_task); ++b) {
          values[b] = run_bag(f, y[b], bounds.begin(b), bounds.begin(b + 1), g,
                              scale * core::upstream_of(call, b), core::weight_of(call, b),
                              has_gradient, call.accumulate);
          if (call.values.data)
            call.values[b] = static_cast<T>(values[b]);
        }
      };
    });
    core::exact_sum total;
    for (index b = 0; b < bags; ++b)
      total.add(values[b]);
    return static_cast<T>(share == 0 ? 0 : total.value() * share);
  }

  /// The weighted value of a bag; writes its gradient.
  double run_bag(vector_view<const T> f, T response, index first, index last, vector_view<T> g,
                 double scale, double weight, bool has_gradient, bool accumulate) const {
    const double y = static_cast<double>(response), rho = static_cast<double>(options_.rho);
    const double k = static_cast<double>(last - first);
    core::exact_sum sum, squares;
    for (index i = first; i < last && weight != 0; ++i) {
      const double off = static_cast<double>(f[i]) - y;
      sum.add(off);
      squares.add(off * off);
    }
    const double mean = sum.value() / k, factor = core::times(weight, 2 / k * scale);
    for (index i = first; i < last && has_gradient; ++i) {
      const double off = static_cast<double>(f[i]) - y;
      const double slope = core::times(factor, mix(rho, mean, off));
      g[i] = static_cast<T>(accumulate ? static_cast<double>(g[i]) + slope : slope);
    }
    return core::times(weight, mix(rho, mean * mean, squares.value() / k));
  }
  /// Infinity has no part in what has no weight.
  static double mix(double rho, double bag, double instance) {
    return rho == 0 ? bag : rho == 1 ? instance : (1 - rho) * bag + rho * instance;
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
