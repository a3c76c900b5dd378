// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "core/batch_call.hpp"
#include "core/weighted.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// e^x − 1 − x, with its digits near 0.
inline pack<double> exp_less_tangent(const pack<double>& x) {
  using W = pack<double>;
  constexpr int terms = 20; // for |x| <= 1
  W sum(1);
  for (int k = terms; k > 2; --k)
    sum = fma(sum, x * (1.0 / k), W(1));
  const W far = expm1(x) - x, near = x * x * 0.5 * sum;
  const W far_end = select(x > std::numeric_limits<double>::max(), x, far); // not inf − inf
  return select(abs(x) <= W(1), near, far_end);
}

/// Rows of up to four matrices of one shape: means and log-variances of one Gaussian or of two.
template <class T> struct gaussian_rows {
  matrix_data<T> in[4];
  matrix_data<T, true> out[4];
  int inputs = 0, outputs = 0;
};

} // namespace core

/// Kullback-Leibler divergence of a Gaussian with diagonal covariance from the standard normal, or
/// from another one, as for a variational information bottleneck or autoencoder, of each row
///
///   ℓ = ½ Σ_k (μ² + e^λ − 1 − λ),   ∂ℓ/∂μ = μ,   ∂ℓ/∂λ = ½ (e^λ − 1)
///
///   ℓ = ½ Σ_k (δ² e^{−λ'} + e^ρ − 1 − ρ),   δ = μ − μ',   ρ = λ − λ'
///   ∂ℓ/∂μ = −∂ℓ/∂μ' = δ e^{−λ'},   ∂ℓ/∂λ = ½ (e^ρ − 1),   ∂ℓ/∂λ' = −½ (e^ρ − 1) − ½ δ² e^{−λ'}
///
/// of means μ and log-variances λ = log σ². e^x − 1 − x keeps its digits near 0. In nats.
/// Shapes: all matrices rows × dimensions; the gradients lie apart from everything. Sixteen-bit
/// inputs as elsewhere. Call options as for losses of rows: row_weights, upstream, values, scale,
/// normaliser, accumulate, run_on; no other by-products.
/// Special values: λ = −inf (no variance) against the standard normal: +inf, slope −½; λ = +inf:
/// +inf. NaN stays within its row's value, and its own slopes.
/// Computed in double; threads do not matter. Allocates a number per row, and rows per thread, in
/// each call; call_options::memory is not used. Throws std::invalid_argument.
/// Source: Kingma, Welling 2014; Alemi et al., "Deep variational information bottleneck", ICLR
/// 2017.
///
///   perdita::gaussian_kl<float> loss;
///   float value = loss(means, log_variances, d_means, d_log_variances);
template <class T = float> class gaussian_kl {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "gaussian_kl";

  gaussian_kl() : gaussian_kl(options{}) {}
  explicit(false) gaussian_kl(const options& o) : options_(o) {
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  /// The value, from the standard normal.
  template <class M, class L>
  requires core::scores_like<M, T> && core::scores_like<L, T>
      T operator()(M&& means, L&& log_variances, const call_options<T>& call = {}) const {
    return run(read(means, log_variances), call);
  }
  /// The value and both gradients, from the standard normal.
  template <class M, class L, class G, class H>
  requires core::scores_like<M, T> && core::scores_like<L, T> && core::gradient_like<G, T> &&
      core::gradient_like<H, T>
          T operator()(M&& means, L&& log_variances, G&& d_means, H&& d_log_variances,
                       const call_options<T>& call = {}) const {
    auto rows = read(means, log_variances);
    write(rows, d_means, d_log_variances);
    return run(rows, call);
  }
  /// The value, from another Gaussian.
  template <class M, class L, class N, class K>
  requires core::scores_like<M, T> && core::scores_like<L, T> && core::scores_like<N, T> &&
      core::scores_like<K, T>
          T between(M&& means, L&& log_variances, N&& other_means, K&& other_log_variances,
                    const call_options<T>& call = {})
  const { return run(read(means, log_variances, other_means, other_log_variances), call); }
  /// The value and all four gradients, from another Gaussian.
  template <class M, class L, class N, class K, class DM, class DL, class DN, class DK>
  requires core::scores_like<M, T> && core::scores_like<L, T> && core::scores_like<N, T> &&
      core::scores_like<K, T> && core::gradient_like<DM, T> && core::gradient_like<DL, T> &&
      core::gradient_like<DN, T> && core::gradient_like<DK, T>
          T between(M&& means, L&& log_variances, N&& other_means, K&& other_log_variances,
                    DM&& d_means, DL&& d_log_variances, DN&& d_other_means,
                    DK&& d_other_log_variances, const call_options<T>& call = {})
  const {
    auto rows = read(means, log_variances, other_means, other_log_variances);
    write(rows, d_means, d_log_variances, d_other_means, d_other_log_variances);
    return run(rows, call);
  }

private:
  using rows_type = core::gaussian_rows<T>;
  static constexpr core::batch_checks<T> checks{{name}};
  static constexpr const char* names[4] = {"means", "log-variances", "the other's means",
                                           "the other's log-variances"};

  template <class... M> static rows_type read(M&... inputs) {
    rows_type rows;
    ((rows.in[rows.inputs++] = core::as_matrix(inputs)), ...);
    return rows;
  }
  template <class... G> static void write(rows_type& rows, G&... gradients) {
    ((rows.out[rows.outputs++] = core::as_matrix(gradients)), ...);
  }

  void check(const rows_type& rows, const call_options<T>& call) const {
    const auto& first = rows.in[0];
    const auto shape = [&](const auto& m, const std::string& what) {
      checks.size(("rows of " + what).c_str(), m.rows, first.rows, "as many as of the means");
      checks.size(("columns of " + what).c_str(), m.cols, first.cols, "as many as of the means");
      checks.memory(what.c_str(), m.data, m.rows * m.cols);
    };
    std::vector<core::extent> memory;
    for (int k = 0; k < rows.outputs; ++k) {
      shape(rows.out[k], std::string("the gradient of ") + names[k]);
      memory.push_back(core::bytes_of(rows.out[k]));
    }
    for (int k = 0; k < rows.inputs; ++k) {
      shape(rows.in[k], names[k]);
      memory.push_back(core::bytes_of(rows.in[k]));
    }
    core::require_apart(name, memory, static_cast<std::size_t>(rows.outputs));
    checks.call(call, first.rows, false, "as many as there are rows");
  }

  T run(const rows_type& rows, const call_options<T>& call) const {
    check(rows, call);
    const index n = rows.in[0].rows, cols = rows.in[0].cols;
    const double share = core::share_of(call, options_.reduction, n);
    std::vector<double> values(static_cast<std::size_t>(n));
    const index some = std::max<index>(1, 4096 / std::max<index>(1, cols));
    const index tasks = (n + some - 1) / some;
    const auto workers = std::min(static_cast<std::size_t>(tasks), call.run_on.concurrency());
    core::share_out(tasks, workers, call.run_on, [&](std::size_t) {
      return [&, row = row_of(cols)](index t) mutable {
        for (index r = t * some; r < std::min(n, (t + 1) * some); ++r)
          values[static_cast<std::size_t>(r)] = run_row(rows, r, row, share, call);
      };
    });
    core::exact_sum total;
    for (index r = 0; r < n; ++r) {
      const double value = values[static_cast<std::size_t>(r)];
      total.add(value);
      if (call.values.data)
        call.values[r] = static_cast<T>(value);
    }
    return static_cast<T>(share == 0 ? 0 : total.value() * share);
  }

  struct row_room {
    std::vector<double> x[4];
    std::vector<T> stage;
  };
  static row_room row_of(index cols) {
    row_room room;
    for (auto& x : room.x)
      x.resize(static_cast<std::size_t>(core::whole_packs(cols)));
    room.stage.resize(room.x[0].size());
    return room;
  }

  /// The weighted value of row r; writes its gradients.
  double run_row(const rows_type& rows, index r, row_room& room, double share,
                 const call_options<T>& call) const {
    using W = core::pack<double>;
    const double weight = core::weight_of(call, r);
    const double scale =
        core::times(weight, share * static_cast<double>(call.scale) * core::upstream_of(call, r));
    const index cols = rows.in[0].cols;
    for (int k = 0; k < rows.inputs; ++k) {
      core::read_row(rows.in[k], r, room.stage.data(), room.x[k].data());
      std::fill(room.x[k].begin() + cols, room.x[k].end(), 0.0);
    }
    const bool two = rows.inputs == 4;
    W sum(0);
    for (index j = 0; j < cols; j += core::per_pack) {
      const auto at = [&](int k) { return room.x[k].data() + j; };
      const W off = two ? W::load(at(0)) - W::load(at(2)) : W::load(at(0));
      const W ratio = two ? W::load(at(1)) - W::load(at(3)) : W::load(at(1));
      const W pull = two ? off * core::exp(-W::load(at(3))) : off;
      const W squares = off * pull * 0.5, wider = core::expm1(ratio) * 0.5;
      sum += squares + core::exp_less_tangent(ratio) * 0.5;
      const auto slope = [&](const W& d) { return core::weighted(W(scale), d); };
      slope(pull).store(at(0));
      slope(wider).store(at(1));
      slope(-pull).store(at(2));
      slope(-wider - squares).store(at(3));
    }
    for (int k = 0; k < rows.outputs; ++k)
      core::write_row(rows.out[k], r, room.x[k].data(), call.accumulate, room.stage.data());
    return core::times(weight, core::sum_lanes(sum));
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
