// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "angular_margin.hpp"
#include "proxy.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// The cosines r of all pairs of rows with different labels, each pair once; made again for each
/// pass, and always the same. Rows that do not count are in no pair.
class negative_pairs {
  using W = panelled::W;
  static constexpr index width = panelled::width, some = embedding_rows_per_task;

  static constexpr double no_score = -std::numeric_limits<double>::infinity();

public:
  /// Of those within [low, high].
  struct filter {
    double low = -std::numeric_limits<double>::infinity();
    double high = std::numeric_limits<double>::infinity();
  };

  /// `classes`: one of each row, 0 or more; below 0: the row is in no pair.
  template <class T>
  negative_pairs(const matrix_view<const T>& x, std::vector<double> classes, const executor& run_on)
      : x_(x, run_on, [&](index r) { return classes[static_cast<std::size_t>(r)] >= 0; }),
        across_(transpose(x_.rows, run_on)), classes_(std::move(classes)), run_on_(run_on) {
    classes_.resize(static_cast<std::size_t>(across_.count() * width), -1);
  }

private:
  static auto within(const W& r, const filter& kept) {
    return (r >= W(kept.low)) & (r <= W(kept.high));
  }
  /// Whether row i and those of panel p are of different classes.
  auto differ(index i, index p) const {
    const W own(classes_[static_cast<std::size_t>(i)]),
        others = W::load(classes_.data() + p * width);
    return (!(own == others)) & (own >= W(0)) & (others >= W(0));
  }

public:
  /// Quartiles q₁ and q₃, elements ⌊M/4⌋ and ⌊3M/4⌋ of the M sorted, and what is no further from
  /// them than so many times their distance.
  filter find_filter(double whiskers) const {
    constexpr std::size_t size = std::size_t{1} << digit;
    const index workers = std::min(blocks(), static_cast<index>(run_on_.concurrency()));
    std::vector<std::uint64_t> bins(2 * size * static_cast<std::size_t>(workers));
    std::uint64_t prefix[2] = {0, 0}, rank[2] = {0, 0};
    for (int shift = 64 - digit; shift >= 0; shift -= digit) {
      const bool first = shift + digit == 64;
      std::fill(bins.begin(), bins.end(), 0);
      share_out(run_on_, workers, blocks(), [&](std::size_t worker, index block) {
        std::uint64_t* const mine = bins.data() + 2 * size * worker;
        walk(block, [&](const W& r, const auto& counts) {
          alignas(64) double cosine[lanes<double>], counted[lanes<double>];
          r.store(cosine);
          select(counts, W(1), W(0)).store(counted);
          for (index i = 0; i < width; ++i) {
            const std::uint64_t key = key_of(cosine[i]);
            for (std::size_t q = 0; q < 2 && counted[i] != 0; ++q)
              if (first || key >> (shift + digit) == prefix[q])
                ++mine[q * size + ((key >> shift) & (size - 1))];
          }
        });
      });
      for (std::size_t b = 2 * size; b < bins.size(); ++b)
        bins[b % (2 * size)] += bins[b];
      if (first) {
        std::uint64_t all = 0;
        for (std::size_t b = 0; b < size; ++b)
          all += bins[b];
        if (all == 0)
          return {};
        rank[0] = all / 4;
        rank[1] = 3 * all / 4;
      }
      for (std::size_t q = 0; q < 2; ++q) {
        std::size_t b = 0;
        for (; rank[q] >= bins[q * size + b]; ++b)
          rank[q] -= bins[q * size + b];
        prefix[q] = (prefix[q] << digit) | b;
      }
    }
    const double low = value_of(prefix[0]), high = value_of(prefix[1]);
    const double reach = whiskers * (high - low);
    return {low - reach, high + reach};
  }

  /// log Σ e^{s r}; -inf where there is none.
  double log_sum_exp(double scale, const filter& kept) const {
    const W nothing(no_score);
    std::vector<double> tops(static_cast<std::size_t>(blocks())), sums(tops.size());
    each_block([&](index block) {
      W highest = nothing, wrong(0), sum(0);
      walk(block, [&](const W& r, const auto& counts) {
        highest = max(select(counts & within(r, kept), r, nothing), highest);
        wrong += select(counts, r - r, W(0));
      });
      const double top = max_lanes(highest);
      walk(block, [&](const W& r, const auto& counts) {
        sum += select(counts & within(r, kept), exp((r - W(top)) * W(scale)), W(0));
      });
      tops[static_cast<std::size_t>(block)] = top;
      sums[static_cast<std::size_t>(block)] = sum_lanes(sum + wrong);
    });
    const double top = *std::max_element(tops.begin(), tops.end());
    exact_sum sum;
    for (std::size_t b = 0; b < sums.size(); ++b)
      sum.add(sums[b] == 0 ? 0 : sums[b] * std::exp(scale * (tops[b] - top)));
    return sum.value() == 0 ? no_score : scale * top + std::log(sum.value());
  }

  /// Slopes of the rows, those of a cosine being factor e^{s r − log Σ e^{s r}}.
  panelled slopes(double factor, double scale, double log_sum, const filter& kept) const {
    panelled result(x_.rows.rows(), x_.rows.cols());
    for_row_blocks(result.rows(), run_on_, [&](index first, index last) {
      alignas(64) double tile[some * width];
      for (index p = 0; p < across_.count(); ++p) {
        make(p, first, last, tile);
        for (index r = first; r < last; ++r) {
          double* const at = tile + (r - first) * width;
          const W cosine = W::load(at);
          const auto counts = differ(r, p) & within(cosine, kept);
          select(counts, exp(cosine * W(scale) - W(log_sum)) * W(factor), W(0)).store(at);
        }
        multiply<double>({tile, width, 1, width}, {x_.rows.at(p * width, 0), x_.rows.apart()},
                         {result.at(first, 0), width, result.apart()}, last - first, result.cols(),
                         std::min(width, across_.cols() - p * width), true);
      }
      x_.go_back(result, first, last);
    });
    return result;
  }

private:
  static constexpr int digit = 16;

  /// Keys in the order of the numbers.
  static std::uint64_t key_of(double r) {
    const auto bits = std::bit_cast<std::uint64_t>(r);
    return bits >> 63 ? ~bits : bits | std::uint64_t{1} << 63;
  }
  static double value_of(std::uint64_t key) {
    return std::bit_cast<double>(key >> 63 ? key & ~(std::uint64_t{1} << 63) : ~key);
  }
  void make(index p, index first, index last, double* tile) const {
    multiply<double>({x_.rows.at(first, 0), width, 1, x_.rows.apart()},
                     {across_.at(0, p), across_.apart()}, {tile, width, 0}, last - first, width,
                     across_.rows(), false);
  }
  index blocks() const { return (x_.rows.rows() + some - 1) / some; }
  template <class F> void each_block(F f) const {
    for_row_blocks(x_.rows.rows(), run_on_, [&](index first, index) { f(first / some); });
  }
  /// f(cosines, which of them count) of the pairs of a block of rows with themselves and later
  /// ones.
  template <class F> void walk(index block, F f) const {
    alignas(64) double tile[some * width];
    const index first = block * some, last = std::min(x_.rows.rows(), first + some);
    for (index p = first / width; p < across_.count(); ++p) {
      make(p, first, last, tile);
      const W numbers = iota<double>() + static_cast<double>(p * width);
      for (index r = first; r < last; ++r)
        f(W::load(tile + (r - first) * width),
          differ(r, p) & (numbers > W(static_cast<double>(r))));
    }
  }

  unit_rows x_;
  panelled across_; // features × rows
  std::vector<double> classes_;
  const executor& run_on_;
};

} // namespace core

struct unpg_options {
  double whiskers = 1.5; ///< w ≥ 0; infinite: all pairs
};

/// UNPG: any cosine_loss of embeddings and class vectors, whose every row also has as rivals the
/// cosines r of all pairs of embeddings in the batch with different labels, each pair once:
///
///   ℓ_i = −log( e^{s ψ(c_iy)} / (e^{s ψ(c_iy)} + Σ_{j≠y} e^{s c_ij} + Σ_r e^{s r}) )
///   ∂/∂r = s Σ_i w_i P_ir, P_ir the probability of r in row i, which goes to both of its
///   embeddings
///
/// of the r within [q₁ − w (q₃ − q₁), q₃ + w (q₃ − q₁)], their quartiles being elements ⌊M/4⌋ and
/// ⌊3M/4⌋ of the M sorted, without interpolation; which r are kept has no gradient. w infinite
/// keeps all. Without a pair (one row, one class in the batch) it is the loss alone. Shapes,
/// reductions, call options, errors: as the loss on the similarity head; embeddings and their
/// gradient of T. Rows that are ignored or have weight 0 are in no pair. Special values: a zero
/// embedding has cosines 0, and gradient 0. A row that is not finite makes all rows that it is
/// paired with, and so all values, NaN. Pairs are compared in double, in tiles: memory is the
/// embeddings four times in double, and never a matrix of pairs; their cosines are made four times
/// for the quartiles and three for the rest. No bit depends on the number of threads. Source: Jung
/// et al., "Unified negative pair generation toward well-discriminative feature space for face
/// recognition", BMVC 2022, and its code.
///
///   perdita::unpg loss(perdita::arcface<float>{});
///   float value = loss(x, class_vectors, labels, d_x, d_class_vectors);
template <class Loss> class unpg {
public:
  using value_type = typename Loss::value_type;
  using T = value_type;
  using options = unpg_options;
  static constexpr const char* name = "unpg";

  explicit unpg(Loss loss) : unpg(std::move(loss), options{}) {}
  unpg(Loss loss, const options& o) : loss_(std::move(loss)), options_(o) {
    core::require(o.whiskers >= 0, name, "whiskers", o.whiskers, "0 or more");
  }
  const options& settings() const { return options_; }
  const Loss& loss() const { return loss_; }

  template <class Y, core::labels_like L>
  requires core::scores_like<Y, T> T operator()(matrix_view<const T> x, Y&& class_vectors,
                                                L&& labels,
                                                const call_options<T>& call = {}) const {
    const auto of = core::as_vector(labels);
    if (!sound(x, of, call))
      return similarity(loss_)(x, class_vectors, labels, call); // which says what is wrong
    const auto pairs = make_pairs(x, of, call);
    return similarity(with_pairs(pairs, filter_of(pairs)).loss)(x, class_vectors, labels, call);
  }
  template <class Y, core::labels_like L, class DY>
  requires core::scores_like<Y, T> && core::gradient_like<DY, T>
      T operator()(matrix_view<const T> x, Y&& class_vectors, L&& labels, matrix_view<T> d_x,
                   DY&& d_class_vectors, const call_options<T>& call = {}) const {
    const auto of = core::as_vector(labels);
    if (!sound(x, of, call))
      return similarity(loss_)(x, class_vectors, labels, d_x, d_class_vectors, call);
    const auto pairs = make_pairs(x, of, call);
    const auto kept = filter_of(pairs);
    const auto [loss, log_sum] = with_pairs(pairs, kept);
    std::vector<T> own(static_cast<std::size_t>(x.rows));
    call_options<T> mine = call;
    if (!call.log_sum_exp.data)
      mine.log_sum_exp = own;
    const T value = similarity(loss)(x, class_vectors, labels, d_x, d_class_vectors, mine);

    const auto scales = core::gradient_scales(of, call, loss_.settings());
    core::exact_sum shares; // of the pairs in all rows
    for (index r = 0; r < x.rows; ++r)
      if (const double scale = scales[static_cast<std::size_t>(r)]; scale != 0)
        shares.add(scale * std::exp(log_sum - static_cast<double>(mine.log_sum_exp[r])));
    if (std::isinf(log_sum))
      return value;
    const double s = static_cast<double>(loss_.settings().scale);
    const core::panelled slopes = pairs.slopes(s * shares.value(), s, log_sum, kept);
    core::store_slopes<T>(d_x, {.accumulate = true, .run_on = call.run_on},
                          [&](index r, index j) { return slopes(r, j); });
    return value;
  }

private:
  struct extended {
    Loss loss;
    double log_sum;
  };

  template <class L>
  static bool sound(const matrix_view<const T>& x, const vector_view<L>& labels,
                    const call_options<T>& call) {
    const auto& w = call.row_weights;
    return labels.size == x.rows && labels.data && x.data && x.rows > 0 &&
           (!w.data || w.size == x.rows);
  }
  template <class L>
  core::negative_pairs make_pairs(const matrix_view<const T>& x, const vector_view<L>& labels,
                                  const call_options<T>& call) const {
    std::vector<double> classes(static_cast<std::size_t>(x.rows), -1);
    for (index r = 0; r < x.rows; ++r)
      if (const std::int64_t label = core::label_of(labels, r);
          label != loss_.settings().ignore_index &&
          !(call.row_weights.data && call.row_weights[r] == 0))
        classes[static_cast<std::size_t>(r)] = static_cast<double>(label);
    return {x, std::move(classes), call.run_on};
  }
  core::negative_pairs::filter filter_of(const core::negative_pairs& pairs) const {
    if (std::isinf(options_.whiskers))
      return {};
    return pairs.find_filter(options_.whiskers);
  }
  extended with_pairs(const core::negative_pairs& pairs,
                      const core::negative_pairs::filter& kept) const {
    extended result{loss_, 0};
    result.log_sum = pairs.log_sum_exp(static_cast<double>(loss_.settings().scale), kept);
    core::cosine_access::set_rivals(result.loss, result.log_sum);
    return result;
  }

  Loss loss_;
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
