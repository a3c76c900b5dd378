// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "core/embeddings.hpp"
#include "core/row_formula.hpp"
#include "core/row_loss.hpp"
#include "core/similarity_kernel.hpp"
#include "core/traits.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// With u = log Σ_{k≠y} e^{s c_k} − s c_y:  ℓ = u, or softplus(u) where the target is among the
/// proxies that it is compared with.
struct proxy_nca_formula : row_formula {
  using statistic = log_sum_exp;

  double scale;
  bool all;

  template <class V> PERDITA_INLINE V score(const V& x) const {
    return x * V(static_cast<typename V::value_type>(scale));
  }
  template <class Row> PERDITA_NOINLINE auto finish(const Row& row) const {
    using W = std::remove_cvref_t<decltype(row.target)>;
    const auto alone = row.term[0] == W(0);
    const W u = log_odds_against(row);
    const W inf(std::numeric_limits<double>::infinity());
    const W one = select(u == inf, W(1), W(1) + (u - u)); // NaN shows
    row_outcome<W> out;
    out.value = select(alone, select(row.target == -inf, inf, row.target - row.target),
                       all ? softplus(u) : u);
    const W slope = W(scale) * select(alone, W(0), all ? sigmoid(u) : one);
    out.image_scale = per_rival(slope, row);
    out.target_gradient = -slope;
    return out;
  }
  template <class Row> auto report(const Row& row) const { return softmax_report(row); }
};

} // namespace core

/// Proxy-NCA as a loss of a row of cosines c_k of an embedding with the proxies of all classes, for
/// squared distances of unit vectors, ‖x̂ − p̂‖² = 2 − 2c:
///
///   ℓ = −log( e^{−κ d_y} / Σ_{k≠y} e^{−κ d_k} ) = log Σ_{k≠y} e^{2κ c_k} − 2κ c_y
///   ∂ℓ/∂c_k = 2κ p_k, softmax without y;  ∂ℓ/∂c_y = −2κ
///
/// which can be below 0; with all_proxies (Proxy-NCA++) the sum has y too, and ℓ is the
/// cross-entropy of 2κ c. On given cosines, or on the similarity head with its gradients:
///
///   perdita::similarity head(perdita::proxy_nca<float>({.scale = 3}));
///   float value = head(embeddings, proxies, labels, d_embeddings, d_proxies);
///
/// Shapes, reductions, errors, by-products (of softmax(2κ c)): as cross_entropy. Special values:
/// one class alone: 0, gradient 0. A zero vector counts as one with cosines 0, and has gradient 0.
/// A class without rows is a rival like any other. −inf masks a class; a masked label costs +inf.
/// Source: Movshovitz-Attias et al., "No fuss distance metric learning using proxies", ICCV 2017;
/// Teh, DeVries, Taylor, "ProxyNCA++", ECCV 2020.
template <class T = float> class proxy_nca : public row_loss<proxy_nca<T>, T> {
public:
  struct options {
    T scale = 1;                      ///< κ, of squared distances
    bool all_proxies = false;         ///< the label's own is in the denominator
    std::int64_t ignore_index = -100; ///< label of a row that does not count
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "proxy_nca";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = true;
  constexpr loss_traits traits() const {
    return {.convex = true,
            .smooth = true,
            .exact_gradient = true,
            .nonnegative = options_.all_proxies,
            .shift_invariant = true};
  }

  proxy_nca() : proxy_nca(options{}) {}
  explicit(false) proxy_nca(const options& o) : options_(o) {
    core::positive(name, "scale", o.scale);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend row_loss<proxy_nca<T>, T>;
  template <class F> void visit(const core::row_job<T>&, F f) const {
    f(core::proxy_nca_formula{{}, 2 * static_cast<double>(options_.scale), options_.all_proxies});
  }
  options options_;
};

namespace core {

/// Unit vectors in double, and 1/length of each; 0 where there is no direction, and in rows that do
/// not count.
struct unit_rows {
  panelled rows;
  std::vector<double> inverse;

  template <class T>
  unit_rows(const matrix_view<const T>& from, const executor& run_on)
      : unit_rows(from, run_on, [](index) { return true; }) {}
  template <class T, class Counts>
  unit_rows(const matrix_view<const T>& from, const executor& run_on, Counts counts)
      : rows(from.rows, from.cols), inverse(static_cast<std::size_t>(from.rows)) {
    for_row_blocks(from.rows, run_on, [&](index first, index last) {
      std::vector<T> copy(static_cast<std::size_t>(from.cols));
      for (index r = first; r < last; ++r) {
        if (!counts(r))
          continue;
        for (index j = 0; j < from.cols; ++j)
          copy[static_cast<std::size_t>(j)] = from(r, j);
        const double by = inverse_norm(copy.data(), from.cols);
        inverse[static_cast<std::size_t>(r)] = by;
        for (index j = 0; j < from.cols; ++j)
          rows(r, j) = by * static_cast<double>(copy[static_cast<std::size_t>(j)]);
      }
    });
  }
  bool finite() const {
    return std::all_of(inverse.begin(), inverse.end(), [](double x) { return x == x; });
  }
  /// From slopes of the unit vectors to those of the vectors, of rows [first, last).
  void go_back(panelled& slopes, index first, index last) const {
    for (index r = first; r < last; ++r) {
      double along = 0;
      for (index j = 0; j < rows.cols(); ++j)
        along += slopes(r, j) * rows(r, j);
      for (index j = 0; j < rows.cols(); ++j)
        slopes(r, j) = inverse[static_cast<std::size_t>(r)] * (slopes(r, j) - along * rows(r, j));
    }
  }
};

/// Proxy-anchor: packs have eight proxies in their lanes; tiles have them and some of the samples.
class proxy_anchor_pass {
  using W = panelled::W;
  static constexpr index width = panelled::width, some = embedding_rows_per_task;

public:
  proxy_anchor_pass(const unit_rows& x, const unit_rows& proxies,
                    const std::vector<std::int64_t>& labels, std::int64_t ignored, double alpha,
                    double margin, const executor& run_on)
      : x_(x), proxies_(proxies), across_(transpose(proxies.rows, run_on)), labels_(labels),
        ignored_(ignored), alpha_(alpha), margin_(margin), run_on_(run_on),
        ends_(static_cast<std::size_t>(across_.count())) {}

  double value() {
    for_panels(across_, run_on_,
               [this](index p) { ends_[static_cast<std::size_t>(p)] = sum_up(p); });
    double with_positives = 0;
    exact_sum attraction, repulsion;
    for (index c = 0; c < across_.cols(); ++c) {
      const end& e = ends_[static_cast<std::size_t>(c / width)];
      attraction.add(lane(e.attraction, c % width));
      repulsion.add(lane(e.repulsion, c % width));
      with_positives += lane(e.positives, c % width) > 0 ? 1 : 0;
    }
    attract_ = with_positives > 0 ? 1 / with_positives : 0;
    repel_ = 1 / static_cast<double>(across_.cols());
    return attract_ * attraction.value() + repel_ * repulsion.value();
  }

  /// Slopes of the samples, after value().
  panelled of_samples() const {
    panelled result(x_.rows.rows(), x_.rows.cols());
    for_row_blocks(result.rows(), run_on_, [&](index first, index last) {
      alignas(64) double tile[some * width];
      for (index p = 0; p < across_.count(); ++p) {
        make_slopes(p, first, last, tile);
        multiply<double>({tile, width, 1, width},
                         {proxies_.rows.at(p * width, 0), proxies_.rows.apart()},
                         {result.at(first, 0), width, result.apart()}, last - first, result.cols(),
                         std::min(width, across_.cols() - p * width), true);
      }
      x_.go_back(result, first, last);
    });
    return result;
  }
  panelled of_proxies() const {
    const index features = across_.rows();
    panelled turned(features, across_.cols());
    for_panels(turned, run_on_, [&](index p) {
      alignas(64) double tile[some * width];
      for_tiles([&](index first, index last) {
        make_slopes(p, first, last, tile);
        for (index q = 0; q < x_.rows.count(); ++q)
          multiply<double>({x_.rows.at(first, q), 1, width, width * width}, {tile, 0},
                           {turned.at(q * width, p), width, turned.apart()},
                           std::min(width, features - q * width), width, last - first, true);
      });
    });
    panelled result = transpose(turned, run_on_);
    proxies_.go_back(result, 0, result.rows());
    return result;
  }

private:
  /// log(1 + Σ e^z) of both kinds of samples, and how many are positive.
  struct end {
    W attraction, repulsion, positives;
  };
  /// Σ e^{z − top} of what has come so far.
  struct streamed {
    W top = W(std::numeric_limits<double>::lowest()), sum = W(0);

    W log_1_plus() const {
      return select(sum == W(0), W(0), softplus(top + log(max(sum, W(0x1p-1000)))));
    }
  };

  static double lane(const W& x, index i) {
    alignas(64) double v[lanes<double>];
    x.store(v);
    return v[i];
  }
  template <class F> void for_tiles(F f) const {
    for (index first = 0; first < x_.rows.rows(); first += some)
      f(first, std::min(x_.rows.rows(), first + some));
  }
  /// Cosines of samples with the proxies of panel p.
  void make(index p, index first, index last, double* tile) const {
    multiply<double>({x_.rows.at(first, 0), width, 1, x_.rows.apart()},
                     {across_.at(0, p), across_.apart()}, {tile, width, 0}, last - first, width,
                     across_.rows(), false);
  }
  /// f(row, z of positives, z of negatives), -inf where a sample is none.
  template <class F> void each(index p, index first, index last, const double* tile, F f) const {
    const W nothing(-std::numeric_limits<double>::infinity());
    const W numbers = iota<double>() + static_cast<double>(p * width);
    for (index r = first; r < last; ++r) {
      const std::int64_t label = labels_[static_cast<std::size_t>(r)];
      if (label == ignored_) {
        f(r, nothing, nothing);
        continue;
      }
      const W cosine = W::load(tile + (r - first) * width);
      const auto positive = numbers == W(static_cast<double>(label));
      f(r, select(positive, (W(margin_) - cosine) * W(alpha_), nothing),
        select(positive, nothing, (W(margin_) + cosine) * W(alpha_)));
    }
  }
  end sum_up(index p) const {
    streamed sums[2];
    end result{W(0), W(0), W(0)};
    alignas(64) double tile[some * width];
    for_tiles([&](index first, index last) {
      make(p, first, last, tile);
      W top[2] = {sums[0].top, sums[1].top};
      each(p, first, last, tile, [&](index, const W& z, const W& other) {
        top[0] = max(z, top[0]);
        top[1] = max(other, top[1]);
      });
      for (int k = 0; k < 2; ++k) {
        sums[k].sum = sums[k].sum * exp(sums[k].top - top[k]);
        sums[k].top = top[k];
      }
      each(p, first, last, tile, [&](index, const W& z, const W& other) {
        sums[0].sum += exp(z - top[0]);
        sums[1].sum += exp(other - top[1]);
        result.positives += select(z > W(-std::numeric_limits<double>::infinity()), W(1), W(0));
      });
    });
    result.attraction = sums[0].log_1_plus();
    result.repulsion = sums[1].log_1_plus();
    return result;
  }
  /// ∂value/∂cosine: e^z/(1 + Σ e^z), with a sign.
  void make_slopes(index p, index first, index last, double* tile) const {
    make(p, first, last, tile);
    const end& e = ends_[static_cast<std::size_t>(p)];
    each(p, first, last, tile, [&](index r, const W& z, const W& other) {
      const W pull = exp(z - e.attraction) * W(alpha_ * attract_);
      const W push = exp(other - e.repulsion) * W(alpha_ * repel_);
      (push - pull).store(tile + (r - first) * width);
    });
  }

  const unit_rows &x_, &proxies_;
  panelled across_; // features × proxies
  const std::vector<std::int64_t>& labels_;
  std::int64_t ignored_;
  double alpha_, margin_, attract_ = 0, repel_ = 0;
  const executor& run_on_;
  std::vector<end> ends_;
};

} // namespace core

/// Proxy-anchor: each class has a proxy that its samples are pulled to, and all others pushed from;
/// the hardest of a batch most. With cosines c_ip of samples x_i and proxies,
///
///   L = (1/|P⁺|) Σ_{p ∈ P⁺} log(1 + Σ_{i of p} e^{−α (c_ip − δ)})
///     + (1/|P|) Σ_p log(1 + Σ_{i not of p} e^{α (c_ip + δ)})
///   ∂L/∂c_ip = −(α/|P⁺|) e^{−α (c_ip − δ)}/(1 + Σ …), or (α/|P|) e^{α (c_ip + δ)}/(1 + Σ …)
///
/// P being all proxies and P⁺ those with samples in the batch.
/// Shapes: samples × features and proxies × features of T, labels of any integral type, one for
/// each sample: the number of its proxy, or ignore_index; gradients of their matrices' shape,
/// memory apart. Special values: a class without samples only pushes. No samples: 0. One class
/// alone: nothing is pushed. A zero vector has cosines 0 and gradient 0. What is not finite makes
/// the value and both gradients NaN. Everything is in double; sums over a proxy's samples stream,
/// so no α overflows. Memory: samples and proxies in double, with gradients three times that, and
/// per thread a tile; never samples × proxies. Cosines are made three times. No bit depends on the
/// number of threads. Throws std::invalid_argument. Source: Kim, Kim, Cho, Kwak, "Proxy anchor loss
/// for deep metric learning", CVPR 2020.
///
///   perdita::proxy_anchor<float> loss;
///   float value = loss(embeddings, proxies, labels, d_embeddings, d_proxies);
template <class T = float> class proxy_anchor {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    double alpha = 32;                ///< α, above 0
    double margin = 0.1;              ///< δ, finite
    std::int64_t ignore_index = -100; ///< label of a sample that does not count
  };
  static constexpr const char* name = "proxy_anchor";

  proxy_anchor() : proxy_anchor(options{}) {}
  explicit(false) proxy_anchor(const options& o) : options_(o) {
    core::positive(name, "alpha", o.alpha);
    checks.finite("margin", o.margin);
  }
  const options& settings() const { return options_; }

  template <core::labels_like L>
  T operator()(matrix_view<const T> x, matrix_view<const T> proxies, L&& labels,
               const embedding_options<T>& call = {}) const {
    return run(x, proxies, core::as_vector(labels), nullptr, call);
  }
  /// The value, and the gradients with respect to samples and proxies.
  template <core::labels_like L>
  T operator()(matrix_view<const T> x, matrix_view<const T> proxies, L&& labels,
               matrix_view<T> x_gradient, matrix_view<T> proxies_gradient,
               const embedding_options<T>& call = {}) const {
    const std::array<matrix_view<T>, 2> gradients{x_gradient, proxies_gradient};
    return run(x, proxies, core::as_vector(labels), &gradients, call);
  }

private:
  static constexpr core::embedding_checks<T> checks{name};

  template <class L>
  T run(const matrix_view<const T>& x, const matrix_view<const T>& proxies,
        const vector_view<L>& labels, const std::array<matrix_view<T>, 2>* gradients,
        const embedding_options<T>& call) const {
    const std::vector<std::int64_t> of = check(x, proxies, labels, gradients);
    const auto store = [&](std::size_t k, auto slope) {
      core::store_slopes((*gradients)[k], call, slope);
    };
    if (proxies.rows == 0) {
      if (gradients)
        store(0, [](index, index) { return 0.0; });
      return 0;
    }
    const core::unit_rows units(proxies, call.run_on), samples(x, call.run_on, [&](index r) {
      return of[static_cast<std::size_t>(r)] != options_.ignore_index;
    });
    if (!samples.finite() || !units.finite())
      return core::give_up(gradients, call);
    core::proxy_anchor_pass pass(samples, units, of, options_.ignore_index, options_.alpha,
                                 options_.margin, call.run_on);
    const double value = pass.value();
    if (gradients) {
      const core::panelled of_samples = pass.of_samples(), of_proxies = pass.of_proxies();
      store(0, [&](index r, index j) { return of_samples(r, j); });
      store(1, [&](index r, index j) { return of_proxies(r, j); });
    }
    return static_cast<T>(value);
  }

  template <class L>
  std::vector<std::int64_t> check(const matrix_view<const T>& x,
                                  const matrix_view<const T>& proxies, const vector_view<L>& labels,
                                  const std::array<matrix_view<T>, 2>* gradients) const {
    checks.memory("embeddings", x.data, x.rows * x.cols);
    checks.memory("proxies", proxies.data, proxies.rows * proxies.cols);
    checks.size("columns of the proxies", proxies.cols, x.cols);
    checks.size("labels", labels.size, x.rows);
    checks.memory("labels", labels.data, labels.size);
    if (gradients) {
      const auto shape = [](const char* what, const matrix_view<T>& g,
                            const matrix_view<const T>& like) {
        checks.size(std::string("rows of the gradient of the ") + what, g.rows, like.rows);
        checks.size(std::string("columns of the gradient of the ") + what, g.cols, like.cols);
        checks.memory(std::string("gradient of the ") + what, g.data, g.rows * g.cols);
      };
      const auto& [of_x, of_proxies] = *gradients;
      shape("embeddings", of_x, x);
      shape("proxies", of_proxies, proxies);
      const core::extent memory[] = {core::bytes_of(core::matrix_data<T, true>(of_x)),
                                     core::bytes_of(core::matrix_data<T, true>(of_proxies)),
                                     core::bytes_of(core::matrix_data<T>(x)),
                                     core::bytes_of(core::matrix_data<T>(proxies))};
      core::require_apart(name, memory, 2);
    }
    std::vector<std::int64_t> result(static_cast<std::size_t>(x.rows));
    core::read_labels<std::remove_const_t<L>>(labels.data, labels.stride, 0, x.rows, result.data());
    for (index r = 0; r < x.rows; ++r)
      if (const auto label = result[static_cast<std::size_t>(r)];
          label != options_.ignore_index && (label < 0 || label >= proxies.rows))
        core::fail_at(name, "labels", r, core::to_text(label),
                      "0 to " + core::to_text(proxies.rows - 1) + ", or ignore_index " +
                          core::to_text(options_.ignore_index));
    return result;
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
