// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <string>
#include <type_traits>
#include <vector>

#include "core/errors.hpp"
#include "core/row_formula.hpp"
#include "core/row_loss.hpp"

namespace perdita::inline PERDITA_ABI {

/// What bad_pairs remembers: all of it, to be saved and put back.
struct bad_pairs_state {
  std::vector<double> history; ///< of each item, Σ over epochs e of (e + 1)/T times its loss
  index epochs = 0;            ///< that have ended
};

/// Weights that play down positives which are too easy (noise has made them alike) or too hard
/// (they are no positives), of items whose losses are known from E epochs of the T of a training:
///
///   m_i = (1/E) Σ_e ((e + 1)/T) ℓ_{i,e};   μ and σ: mean and population deviation of m
///   w_i = e^{−(ℓ_i − μ)²/(2σ²)}/(σ √(2π))  where m_i ≤ μ − noisy σ or m_i ≥ μ + faulty σ
///   w_i = 1  otherwise, where σ = 0, and before the warm-up has ended
///
/// of the item's present loss ℓ_i. The weights are constants: the gradient of w_i ℓ_i is w_i times
/// that of ℓ_i. As in the paper the density is not scaled to 1, and m, in which early epochs count
/// less, is smaller than what the losses are.
///
/// In every epoch each item's losses are recorded once; an item without any counts with 0. Losses
/// are vectors, for items numbered from 0, of one number each or of several views: those of the
/// first views of all, then those of the second, …, of which the mean is taken. With a loss ℓ of
/// anchors (NT-Xent: sup_con and two views) an epoch is, batch by batch,
///
///   ℓ.views(x, 2, {.values = losses});                                    // no gradient yet
///   memory.record(items, losses);
///   memory.weights(items, losses, w);
///   ℓ.views(x, 2, d_x, {.row_weights = w, .normaliser = n});              // n = rows of x
///
/// and memory.end_epoch(). Throws std::invalid_argument, and changes nothing, where items are not
/// those of the memory or losses not finite.
///
/// Source: Lan et al., "Towards enhancing time series contrastive learning: a dynamic bad pair
/// mining approach", ICLR 2024.
template <class T = float> class bad_pairs {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    index epochs = 0;             ///< T > 0, of the training: there is no default
    index warm_up = 1;            ///< epochs after which there are weights, at least 1
    double noisy = 2, faulty = 2; ///< above 0: deviations from the mean
  };
  static constexpr const char* name = "bad_pairs";

  bad_pairs(index items, const options& o) : options_(o) {
    core::require(items >= 0, name, "items", items, "0 or more");
    core::require(o.epochs > 0, name, "epochs", o.epochs, "a number above 0");
    core::require(o.warm_up > 0, name, "warm_up", o.warm_up, "a number above 0");
    core::positive(name, "noisy", o.noisy);
    core::positive(name, "faulty", o.faulty);
    state_.history.resize(static_cast<std::size_t>(items));
  }
  const options& settings() const { return options_; }

  template <core::labels_like I> void record(I&& items, vector_view<const T> losses) {
    const auto at = core::as_vector(items);
    check(at, losses);
    const double share =
        static_cast<double>(state_.epochs + 1) / static_cast<double>(options_.epochs);
    for (index i = 0; i < at.size; ++i)
      state_.history[static_cast<std::size_t>(at[i])] += share * loss_of(i, at.size, losses);
  }
  void end_epoch() {
    ++state_.epochs;
    find_bounds();
  }
  /// One weight per loss: an item's is that of all its views.
  template <core::labels_like I>
  void weights(I&& items, vector_view<const T> losses, vector_view<T> result) const {
    const auto at = core::as_vector(items);
    check(at, losses);
    if (result.size != losses.size)
      core::fail(name, "weights", core::to_text(result.size), core::to_text(losses.size));
    core::require_memory(name, "weights", result.data, result.size);
    for (index i = 0; i < at.size; ++i) {
      const double w = weight(static_cast<index>(at[i]), loss_of(i, at.size, losses));
      for (index v = i; v < losses.size; v += at.size)
        result[v] = static_cast<T>(w);
    }
  }
  bool is_bad(index item) const {
    if (state_.epochs < options_.warm_up || !(deviation_ > 0))
      return false;
    const double m = mean_loss(item);
    return m <= mean_ - options_.noisy * deviation_ || m >= mean_ + options_.faulty * deviation_;
  }
  double mean() const { return mean_; }           ///< μ
  double deviation() const { return deviation_; } ///< σ

  const bad_pairs_state& state() const { return state_; }
  void set_state(bad_pairs_state s) {
    core::require(s.history.size() == state_.history.size(), name, "history", s.history.size(),
                  "one number per item");
    for (std::size_t i = 0; i < s.history.size(); ++i)
      if (!std::isfinite(s.history[i]))
        core::fail_at(name, "history", static_cast<index>(i), core::to_text(s.history[i]),
                      "a finite number");
    core::require(s.epochs >= 0, name, "epochs of the state", s.epochs, "0 or more");
    state_ = std::move(s);
    find_bounds();
  }

private:
  void check(const auto& items, const vector_view<const T>& losses) const {
    core::require_memory(name, "items", items.data, items.size);
    core::require_memory(name, "losses", losses.data, losses.size);
    core::require(items.size > 0 ? losses.size % items.size == 0 : losses.size == 0, name, "losses",
                  losses.size, "a multiple of the number of items");
    core::require(losses.size >= items.size, name, "losses", losses.size,
                  "as many as items, or more");
    for (index i = 0; i < items.size; ++i)
      if (items[i] < 0 || static_cast<std::size_t>(items[i]) >= state_.history.size())
        core::fail_at(name, "items", i, core::to_text(items[i]), "the number of an item");
    for (index i = 0; i < losses.size; ++i)
      if (!std::isfinite(losses[i]))
        core::fail_at(name, "losses", i, core::to_text(losses[i]), "a finite number");
  }
  static double loss_of(index i, index items, const vector_view<const T>& losses) {
    double sum = 0;
    for (index v = i; v < losses.size; v += items)
      sum += static_cast<double>(losses[v]);
    return sum * static_cast<double>(items) / static_cast<double>(losses.size);
  }
  double mean_loss(index item) const {
    return state_.history[static_cast<std::size_t>(item)] / static_cast<double>(state_.epochs);
  }
  double weight(index item, double loss) const {
    if (!is_bad(item))
      return 1;
    constexpr double root = 2.5066282746310005; // √(2π)
    const double off = (loss - mean_) / deviation_;
    return std::exp(-off * off / 2) / (deviation_ * root);
  }
  void find_bounds() {
    mean_ = deviation_ = 0;
    const auto n = static_cast<index>(state_.history.size());
    if (n == 0 || state_.epochs == 0)
      return;
    core::exact_sum sum, squares;
    for (index i = 0; i < n; ++i)
      sum.add(mean_loss(i));
    mean_ = sum.value() / static_cast<double>(n);
    for (index i = 0; i < n; ++i)
      squares.add((mean_loss(i) - mean_) * (mean_loss(i) - mean_));
    deviation_ = std::sqrt(squares.value() / static_cast<double>(n));
    if (deviation_ <= 1e-15 * std::fabs(mean_)) // all are equal, but for the mean's rounding
      deviation_ = 0;
  }

  options options_;
  bad_pairs_state state_;
  double mean_ = 0, deviation_ = 0;
};

} // namespace perdita::inline PERDITA_ABI
