// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "core/anchor_kernel.hpp"
#include "core/anchor_sums.hpp"
#include "core/embeddings.hpp"
#include "core/weighted.hpp"

namespace perdita::inline PERDITA_ABI {

struct gated_contrast_options {
  double temperature = 0.1; ///< τ > 0, with a finite inverse
  /// Where given, ∂value/∂τ goes there if gradients are asked for.
  double* d_temperature = nullptr;
};
/// Anchors, their gates, and the keys that they are compared with; or the gradients.
template <class T> struct gated_batch { matrix_view<T> anchors, gates, keys; };
/// Classes: of each anchor, that which its gate asks for, and of each key.
template <class L> struct gated_classes { vector_view<const L> anchors, wanted, keys; };

namespace core {

/// Each positive by itself against all negatives; an anchor's value is the sum over its positives.
struct gated_formula : anchor_formula {
  double rate; ///< 1/τ

  explicit gated_formula(double temperature) : rate(1 / temperature) {}

  template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>& row) const {
    using V = pack<T>;
    if (count_of(row, belonging{}) == 0)
      return {0, false};
    const chosen_images<T> negative(row, rivalling{}, rate);
    const V all(static_cast<T>(negative.log())), by(static_cast<T>(rate));
    lane_sums<T, 2> sums; // of losses, and of what is missing to a probability of 1
    for_chosen(
        row, belonging{}, [&](const V& x, const auto& mask, index) __attribute__((always_inline)) {
          const V u = all - by * x;
          sums.some[0] += select(mask, softplus(u), V(0));
          sums.some[1] += select(mask, sigmoid(u), V(0));
          sums.count_pack();
        });
    anchor_outcome out;
    out.value = sums.total(0);
    if constexpr (Gradient) {
      const V of_negative = negative.factor(rate * sums.total(1));
      lane_sums<T, 1> along;
      for (index j = 0; j < row.size; j += static_cast<index>(lanes<T>)) {
        const V x = V::load(row.scores + j), relation = V::load(row.relation + j);
        const V slope = select(relation > V(0), -by * sigmoid(all - by * x),
                               select(relation < V(0), negative.images(x) * of_negative, V(0)));
        along.some[0] += select(slope == V(0), V(0), slope * x);
        along.count_pack();
        slope.store(row.scores + j);
      }
      out.extra[0] = -rate * along.total(0);
    }
    return out;
  }
};

} // namespace core

/// Contrast under gates: an anchor z_i of class y¹_i looks at the keys k_j through a gate g_i (of a
/// network that saw both classes), with which those of class y²_i are to be nearest,
///
///   S_ij = ⟨ẑ_i ∘ g_i ∘ g_i, k̂_j⟩/τ,  N_i = Σ_{j: y_j ≠ y¹_i, y²_i} e^{S_ij}
///   L = (1/|P|) Σ_{(i,j) ∈ P} [log(e^{S_ij} + N_i) − S_ij],  P = {(i, j): y_j = y²_i}
///   ∂L/∂S_ij = −N_i/(e^{S_ij} + N_i)/|P| of P,
///   ∂L/∂S_ij = e^{S_ij} Σ_{l: (i,l) ∈ P} 1/(e^{S_il} + N_i)/|P| of the negatives, 0 of others
///
/// and from there to anchors and keys (through their normalisation), gates and τ. The mean is over
/// pairs, so that an anchor with many positives weighs more.
///
/// Shapes: anchors and gates rows × features, keys keys × features, and the gradients as they are,
/// of T, any strides, memory apart; classes of any integral type, one number each.
/// Special values: an anchor without positives or without negatives has no loss; nothing at all:
/// 0. A zero vector's cosines are 0, and it has no gradient. Gates may be any numbers. A NaN or an
/// infinity makes the value NaN where it counts.
/// No matrix of comparisons is held; memory: the anchor traversal's and copies of all inputs. No
/// bit depends on the number of threads. Throws std::invalid_argument.
/// Source: Hydra/SimLAP (classes y² that are identical to y¹, distinct from it, or arbitrary; gates
/// after the normalisation), whose code takes the mean and not the maximum out of exponents, and
/// overflows.
///
///   perdita::gated_contrast<float> loss;
///   float value = loss({z, g, k}, {y1, y2, y}, {d_z, d_g, d_k});
template <class T = float> class gated_contrast {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  using options = gated_contrast_options;
  static constexpr const char* name = "gated_contrast";

  gated_contrast() : gated_contrast(options{}) {}
  explicit(false) gated_contrast(const options& o) : options_(o) {
    core::invertible<double>(name, "temperature", o.temperature);
  }
  const options& settings() const { return options_; }

  template <class L = int>
  T operator()(const gated_batch<const T>& x, const gated_classes<L>& classes,
               const embedding_options<T>& call = {}) const {
    return run(x, classes, nullptr, call);
  }
  /// The value, and all gradients.
  template <class L = int>
  T operator()(const gated_batch<const T>& x, const gated_classes<L>& classes,
               const gated_batch<T>& gradients, const embedding_options<T>& call = {}) const {
    return run(x, classes, &gradients, call);
  }

private:
  static constexpr core::embedding_checks<T> checks{name};

  /// Rows of length 1, and what made them so.
  struct unit {
    index n, d;
    std::vector<T> x, factor;

    explicit unit(const matrix_view<const T>& from)
        : n(from.rows), d(from.cols), x(static_cast<std::size_t>(n * d)),
          factor(static_cast<std::size_t>(n)) {
      for (index i = 0; i < n; ++i) {
        T* const row = x.data() + i * d;
        for (index k = 0; k < d; ++k)
          row[k] = from(i, k);
        const double by = core::inverse_norm(row, d);
        factor[static_cast<std::size_t>(i)] = static_cast<T>(by);
        for (index k = 0; k < d; ++k)
          row[k] = static_cast<T>(static_cast<double>(row[k]) * by);
      }
    }
    double at(index i, index k) const {
      return static_cast<double>(x[static_cast<std::size_t>(i * d + k)]);
    }
    /// From the gradient g(i, k) of the unit vectors; a row that nothing depends on may be
    /// anything.
    template <class G>
    void store(const matrix_view<T>& to, G g, const embedding_options<T>& call) const {
      std::vector<double> along(static_cast<std::size_t>(n));
      std::vector<bool> idle(along.size(), true);
      for (index i = 0; i < n; ++i)
        for (index k = 0; k < d; ++k) {
          const auto r = static_cast<std::size_t>(i);
          idle[r] = idle[r] && g(i, k) == 0;
          along[r] += g(i, k) * at(i, k);
        }
      core::store_slopes(to, call, [&](index i, index k) {
        const auto r = static_cast<std::size_t>(i);
        return idle[r] ? 0 : static_cast<double>(factor[r]) * (g(i, k) - along[r] * at(i, k));
      });
    }
  };

  template <class L>
  T run(const gated_batch<const T>& x, const gated_classes<L>& classes,
        const gated_batch<T>* gradients, const embedding_options<T>& call) const {
    check(x, classes, gradients);
    const unit anchors(x.anchors), keys(x.keys);
    std::vector<T> seen(anchors.x);
    for (index i = 0; i < anchors.n; ++i)
      for (index k = 0; k < anchors.d; ++k) {
        const auto g = static_cast<double>(x.gates(i, k));
        seen[static_cast<std::size_t>(i * anchors.d + k)] =
            static_cast<T>(anchors.at(i, k) * g * g);
      }

    std::unordered_map<std::int64_t, index> numbers;
    std::vector<index> keys_of; // how many keys each class has
    const auto number = [&](const vector_view<const L>& from) {
      std::vector<T> result;
      for (index i = 0; i < from.size; ++i) {
        const auto found = numbers.try_emplace(static_cast<std::int64_t>(from[i]),
                                               static_cast<index>(numbers.size()));
        result.push_back(static_cast<T>(found.first->second));
      }
      return result;
    };
    const std::vector<T> own = number(classes.anchors), wanted = number(classes.wanted),
                         offered = number(classes.keys);
    keys_of.resize(numbers.size());
    for (const T c : offered)
      ++keys_of[static_cast<std::size_t>(c)];
    double positives = 0;
    for (const T c : wanted)
      positives += static_cast<double>(keys_of[static_cast<std::size_t>(c)]);
    const auto leave_out_own = [&](index i, T* relation, index n) {
      for (index j = 0; j < n; ++j)
        if (relation[j] < 0 &&
            offered[static_cast<std::size_t>(j)] == own[static_cast<std::size_t>(i)])
          relation[j] = 0;
    };

    std::vector<T> d_seen(gradients ? seen.size() : 0), d_keys(gradients ? keys.x.size() : 0);
    core::anchor_job<T> job;
    job.x = core::matrix_data<T>(matrix_view<const T>(seen.data(), anchors.n, anchors.d));
    job.y = core::matrix_data<T>(matrix_view<const T>(keys.x.data(), keys.n, keys.d));
    job.normalise = false;
    job.label_x = wanted.data();
    job.label_y = offered.data();
    job.filter = relation_filter<T>(leave_out_own);
    job.normaliser = positives > 0 ? positives : 1;
    job.extra[0] = options_.d_temperature;
    const core::gated_formula formula(options_.temperature);
    const core::anchor_function<T> function(formula);
    if (!gradients)
      return static_cast<T>(core::run_anchors(function, job, false, call.run_on, nullptr));
    job.d_x = core::matrix_data<T, true>(matrix_view<T>(d_seen.data(), anchors.n, anchors.d));
    job.d_y = core::matrix_data<T, true>(matrix_view<T>(d_keys.data(), keys.n, keys.d));
    const double value = core::run_anchors(function, job, true, call.run_on, nullptr);
    if (options_.d_temperature)
      *options_.d_temperature *= static_cast<double>(call.scale);

    const auto pull = [&](index i, index k) {
      return static_cast<double>(d_seen[static_cast<std::size_t>(i * anchors.d + k)]);
    };
    const auto gate = [&](index i, index k) { return static_cast<double>(x.gates(i, k)); };
    anchors.store(
        gradients->anchors,
        [&](index i, index k) { return core::times(pull(i, k), gate(i, k) * gate(i, k)); }, call);
    core::store_slopes(gradients->gates, call, [&](index i, index k) {
      return core::times(pull(i, k), 2 * gate(i, k) * anchors.at(i, k));
    });
    keys.store(
        gradients->keys,
        [&](index j, index k) {
          return static_cast<double>(d_keys[static_cast<std::size_t>(j * keys.d + k)]);
        },
        call);
    return static_cast<T>(value);
  }

  template <class L>
  static void check(const gated_batch<const T>& x, const gated_classes<L>& classes,
                    const gated_batch<T>* gradients) {
    std::vector<core::extent> pieces;
    const auto matrix = [&]<class E>(const std::string& what, const matrix_view<E>& m, index rows) {
      checks.size("rows of " + what, m.rows, rows);
      checks.size("columns of " + what, m.cols, x.anchors.cols);
      checks.memory(what, m.data, m.rows * m.cols);
      pieces.push_back(core::bytes_of(core::matrix_data<T, !std::is_const_v<E>>(m)));
    };
    if (gradients) {
      matrix("the gradient of anchors", gradients->anchors, x.anchors.rows);
      matrix("the gradient of gates", gradients->gates, x.anchors.rows);
      matrix("the gradient of keys", gradients->keys, x.keys.rows);
    }
    const std::size_t written = pieces.size();
    matrix("anchors", x.anchors, x.anchors.rows);
    matrix("gates", x.gates, x.anchors.rows);
    matrix("keys", x.keys, x.keys.rows);
    core::require_apart(name, pieces, written);
    const auto labels = [](const char* what, const auto& l, index rows) {
      checks.size(what, l.size, rows);
      checks.memory(what, l.data, rows);
    };
    labels("classes of anchors", classes.anchors, x.anchors.rows);
    labels("wanted classes", classes.wanted, x.anchors.rows);
    labels("classes of keys", classes.keys, x.keys.rows);
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
