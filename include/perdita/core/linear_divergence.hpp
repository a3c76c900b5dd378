// SPDX-License-Identifier: MIT
#pragma once

/// Two linear heads over the same classes, row by row: the divergences of their distributions, from
/// pieces of both kinds of scores that are made side by side and never all held; and the gradient
/// of those, of the entropy and of the label's log-probability, by the first head's scores.

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "executor.hpp"
#include "linear_block.hpp"
#include "linear_scores.hpp"
#include "row_loss.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// Log-sum-exp with two more sums: Σ e^{z-s}, Σ e^{z-s} b, Σ e^{z-s} (z-s). What has no image does
/// not count, whatever b is.
struct log_sum_exp_and_two_means : log_sum_exp {
  static constexpr int terms = 3;

  template <class V>
  static PERDITA_INLINE V absorb(V* sum, const V& z, const V& shift, const V& b) {
    const V d = z - shift, zero(0);
    const V image = exp_shifted(d);
    const auto nothing = image == zero;
    sum[0] += image;
    sum[1] = fma(image, select(nothing, zero, b), sum[1]);
    sum[2] = fma(image, select(nothing, zero, d), sum[2]);
    return image;
  }
  template <class W> static void rebase(W* t, const W& delta) {
    const W shrink = exp(delta);
    t[2] = fma(t[0], delta, t[2]) * shrink;
    t[0] = t[0] * shrink;
    t[1] = t[1] * shrink;
  }
};

template <class T> struct divergence_formula : row_formula {
  using statistic = log_sum_exp_and_two_means;
  static constexpr bool has_side = true;
  T inverse_temperature;
  template <class V> PERDITA_INLINE V score(const V& x) const { return x * V(inverse_temperature); }
};

/// What a row's gradient needs to know of the second head, with scores r beside the first one's z
/// and its p, all over the temperature.
struct divergence_record {
  double log_sum_exp = 0, surprise = 0; ///< log Σ e^r, and −log q of the label
  double of_target = 0;                 ///< z − r of the label
  double of_rivals = 0;                 ///< mean of z − r over the other classes, by p
};

/// What is wanted of every row; null for what is not.
template <class T> struct divergence_results {
  vector_view<T> reverse_kl, forward_kl, reference_log_probability;
  row_record* records = nullptr;         ///< of the first head
  divergence_record* compared = nullptr; ///< of the second
};

/// One worker's passes over blocks of rows.
template <class T> class divergence_pass {
  using V = pack<T>;
  using W = pack<double>;
  using formula = divergence_formula<T>;
  using statistic = typename formula::statistic;
  using tile = linear_tile<formula, T>;
  using shape = linear_shape<T>;
  static constexpr index width = shape::width, parts = wide_lanes<T>::parts;
  static constexpr index panels = shape::panels / 2; // two pieces in the place of one

public:
  static constexpr index most_rows = panels * width;

  divergence_pass(const linear_operands<T>& policy, const linear_operands<T>& reference,
                  T inverse_temperature, const divergence_results<T>& results, carver& memory)
      : heads_{policy, reference}, results_(results), shape_{policy.weights.rows} {
    formula_.inverse_temperature = inverse_temperature;
    const auto size = [](index n) { return static_cast<std::size_t>(n); };
    for (T*& piece : pieces_)
      piece = memory.take<T>(size(shape_.slot(most_rows)));
    difference_ = memory.take<T>(size(shape_.panel()));
    packed_ = memory.take<T>(size(most_rows * shape::depth));
    copy_ = memory.take<T>(size(std::max(width, shape::strip) * shape::depth));
    for (auto*& sums : sums_)
      sums = memory.take<panel_sums<statistic, T>>(size(panels));
    for (T*& raw : raw_target_)
      raw = memory.take<T>(size(most_rows));
  }

  /// At most most_rows rows, with their labels, of which there are whole packs (-1: none).
  void run(const index* rows, const std::int64_t* labels, index count) {
    const index used = (count + width - 1) / width;
    for (int h = 0; h < 2; ++h) {
      std::fill_n(raw_target_[h], used * width, T(0));
      for (index p = 0; p < used; ++p)
        sums_[h][p].clear();
    }
    for (index first = 0; first < shape_.classes; first += shape_.piece()) {
      const index n = std::min(shape_.piece(), shape_.classes - first);
      for (int h = 0; h < 2; ++h)
        make_scores(heads_[h], rows, count, first, n, packed_, copy_, pieces_[h], shape_.panel());
      for (index p = 0; p < used; ++p)
        absorb(p, first, n, tile::place(labels + p * width, first, n));
    }
    for (index p = 0; p < used; ++p)
      finish(p, rows + p * width, std::min(width, count - p * width));
  }

private:
  const T* bias(int h, index first) const {
    return heads_[h].bias ? heads_[h].bias + first : nullptr;
  }
  void absorb(index p, index first, index n, const V& label) const {
    const T* z[2] = {pieces_[0] + p * shape_.panel(), pieces_[1] + p * shape_.panel()};
    const auto score = [&](int h, index j) {
      const V x = V::load(z[h] + j * width);
      return formula_.score(heads_[h].bias ? x + V(heads_[h].bias[first + j]) : x);
    };
    for (index j = 0; j < n; ++j)
      (score(0, j) - score(1, j)).store(difference_ + j * width);
    piece_side<T> side;
    side.side = {nullptr, nullptr, nullptr, T(1), T(0)};
    side.soft = difference_;
    for (int h = 0; h < 2; ++h)
      tile::absorb(formula_, z[h], bias(h, first), n, side, label, sums_[h][p],
                   raw_target_[h] + p * width);
  }

  /// KL(p ‖ q) = E_p (z − r) − log Σ e^z + log Σ e^r, and the other way round.
  void finish(index p, const index* rows, index count) const {
    W raw[2][parts], target[2][parts], shift[2][parts];
    for (int h = 0; h < 2; ++h) {
      const V x = V::load(raw_target_[h] + p * width);
      widen(x, raw[h]);
      widen(formula_.score(x), target[h]);
      widen(sums_[h][p].shift, shift[h]);
    }
    alignas(64) T rivals[lanes<T>];
    sums_[0][p].rivals.store(rivals);
    for (index part = 0; part < parts && part * finish_rows < count; ++part) {
      row_summary<statistic> s[2];
      W lse[2], mean[2], rivals_mean[2], surprise[2];
      const W apart = target[0][part] - target[1][part], zero(0);
      for (int h = 0; h < 2; ++h) {
        s[h].shift = shift[h][part];
        for (int k = 0; k < statistic::terms; ++k)
          s[h].term[k] = sums_[h][p].term[k].folded(static_cast<int>(part));
        s[h].target = target[h][part];
        const target_odds<T, W> o(s[h]);
        lse[h] = o.log_sum_exp();
        surprise[h] = o.surprise;
        rivals_mean[h] = per_rival(s[h].term[1], s[h]);
        mean[h] = weighted(o.hit, apart) + weighted(o.miss, rivals_mean[h]);
      }
      const W off = lse[0] - lse[1];
      const W reverse = mean[0] - off, forward = off - mean[1];
      const index at = part * finish_rows, n = std::min(finish_rows, count - at);
      put(results_.reverse_kl, rows + at, n, select(reverse < zero, zero, reverse));
      put(results_.forward_kl, rows + at, n, select(forward < zero, zero, forward));
      put(results_.reference_log_probability, rows + at, n, zero - surprise[1]);
      put_records(rows + at, n, s[0], raw[0][part], rivals + at);
      put_compared(rows + at, n, {lse[1], surprise[1], apart, rivals_mean[0]});
    }
  }
  static void put(const vector_view<T>& to, const index* rows, index n, const W& x) {
    alignas(64) double v[finish_rows];
    x.store(v);
    for (index i = 0; to.data && i < n; ++i)
      to[rows[i]] = static_cast<T>(v[i]);
  }
  /// As log_sum_exp_and_moments has them, without side numbers.
  void put_records(const index* rows, index n, const row_summary<statistic>& s, const W& raw,
                   const T* rivals) const {
    alignas(64) double shift[finish_rows], image[finish_rows], mean[finish_rows],
        target[finish_rows];
    s.shift.store(shift);
    s.term[0].store(image);
    s.term[2].store(mean);
    raw.store(target);
    for (index i = 0; i < n; ++i)
      results_.records[rows[i]] = {
          shift[i], {image[i], 0, 0, mean[i]}, static_cast<double>(rivals[i]), target[i], 1};
  }

  void put_compared(const index* rows, index n, const std::array<W, 4>& x) const {
    alignas(64) double v[4][finish_rows];
    for (std::size_t k = 0; k < 4; ++k)
      x[k].store(v[k]);
    for (index i = 0; i < n; ++i)
      results_.compared[rows[i]] = {v[0][i], v[1][i], v[2][i], v[3][i]};
  }

  linear_operands<T> heads_[2];
  divergence_results<T> results_;
  shape shape_;
  formula formula_{};
  T* pieces_[2] = {};
  T *difference_ = nullptr, *packed_ = nullptr, *copy_ = nullptr;
  panel_sums<statistic, T>* sums_[2] = {};
  T* raw_target_[2] = {};
};

/// Of all rows with a label from 0 on; the others are left alone.
template <class T>
void find_divergences(const linear_operands<T>& policy, const linear_operands<T>& reference,
                      T inverse_temperature, const std::vector<std::int64_t>& labels,
                      const divergence_results<T>& results, const executor& run_on,
                      workspace* memory) {
  constexpr auto width = static_cast<index>(lanes<T>);
  std::vector<index> rows;
  std::vector<std::int64_t> targets;
  for (std::size_t r = 0; r < labels.size(); ++r)
    if (labels[r] >= 0) {
      rows.push_back(static_cast<index>(r));
      targets.push_back(labels[r]);
    }
  const auto count = static_cast<index>(rows.size());
  targets.resize(targets.size() + lanes<T>, -1); // whole packs
  // A function of the shape alone: few rows are shared out too.
  const index each =
      std::clamp((count / 8 + width - 1) / width * width, width, divergence_pass<T>::most_rows);
  const index blocks = (count + each - 1) / each;
  const auto workers = std::min(static_cast<std::size_t>(blocks), run_on.concurrency());
  const auto make = [&](carver& c) {
    return divergence_pass<T>(policy, reference, inverse_temperature, results, c);
  };
  carver size;
  make(size);
  workspace own;
  std::byte* const bytes = (memory ? *memory : own).request(workers * size.used());
  share_out(run_on, static_cast<index>(workers), blocks, [&](std::size_t worker, index block) {
    carver mine(bytes + worker * size.used());
    const index first = block * each;
    make(mine).run(rows.data() + first, targets.data() + first, std::min(each, count - first));
  });
}

/// ∂L/∂ of what a row has: log p of its label, KL(p ‖ q), KL(q ‖ p), and H(p).
struct token_slopes {
  double log_probability = 0, reverse_kl = 0, forward_kl = 0, entropy = 0;
  bool any() const {
    return log_probability != 0 || reverse_kl != 0 || forward_kl != 0 || entropy != 0;
  }
};

/// The gradient that a row's token_slopes c, a, b, e make by the scores z, beside which lie those
/// of another head, r. With d = z − r and means over p,
///
///   p_j (a (d_j − mean d) − e (z_j − mean z) − c) + b (p_j − q_j) + c [j is the label]
///
/// over the temperature. p_j − q_j is −p_j expm1(log q_j/p_j) where that is near 0, so that nothing
/// cancels where the heads are nearly the same.
template <class T> struct token_gradient_formula : row_formula {
  using statistic = log_sum_exp_and_moments;
  static constexpr bool proportional = false;
  static constexpr bool linear = false;
  static constexpr bool has_side = true;
  static constexpr int coefficients = 8;

  std::span<const token_slopes> slopes;        ///< of every row
  std::span<const divergence_record> compared; ///< likewise, where there is another head
  linear_operands<T> other;
  double inverse_temperature;

  double own(index r) const { return static_cast<double>(r); }
  side_cursor<T> side(index) const { return {nullptr, nullptr, nullptr, T(1), T(0)}; }
  template <class V> PERDITA_INLINE V score(const V& x) const {
    return x * V(static_cast<T>(inverse_temperature));
  }

  template <class V> PERDITA_INLINE V slope(const V& z, const V& p, const V& r, const V* k) const {
    const V zero(0), &c = k[0], &a = k[1], &b = k[2], &e = k[3];
    const V d = z - r, ratio = d - k[6]; // log p_j/q_j
    // An infinite difference must not meet a slope of 0, nor a probability of 0.
    const V of_kl = select(a == zero, zero, a * (d - k[4]));
    const V of_entropy = select(e == zero, zero, e * (z - k[5]));
    const V own = select(p == zero, zero, p * (of_kl - of_entropy - c));
    const V apart =
        select(abs(ratio) <= V(T(0.5)), -(p * expm1(-ratio)), p - exp_shifted(r - k[7]));
    return own + select(b == zero, zero, b * apart);
  }

  template <class W> struct outcome {
    static constexpr int coefficients = token_gradient_formula::coefficients;
    W value, image_scale, coefficient[coefficients], target_gradient;
  };
  template <class Row> PERDITA_NOINLINE auto finish(const Row& row) const {
    using W = decltype(row.target);
    const W zero(0), one(1);
    const target_odds<T, W> o(row);
    const numbers<W> n = of_rows<W>(row.own);
    const W both = o.hit * o.miss; // a target's z less the mean is (1 − p) times its z less others'
    const W rivals = row.shift + per_rival(row.term[3], row);
    const W mean = weighted(o.hit, row.target) + weighted(o.miss, rivals);
    const W difference = weighted(o.hit, n.of_target) + weighted(o.miss, n.of_rivals);
    const W ratio = n.surprise - o.surprise; // log p/q of the target
    const W hit_apart = select(abs(ratio) <= one, zero - o.hit * expm1(zero - ratio),
                               o.hit - exp(zero - n.surprise));
    outcome<W> out;
    out.value = zero;
    out.image_scale = select(row.term[0] == zero, zero, o.per_rival);
    out.target_gradient = n.c * o.miss + weighted(n.a, weighted(both, n.of_target - n.of_rivals)) -
                          weighted(n.e, weighted(both, row.target - rivals)) +
                          weighted(n.b, hit_apart);
    const W all[] = {n.c, n.a, n.b, n.e, difference, mean, o.log_sum_exp() - n.lse, n.lse};
    for (int k = 0; k < coefficients; ++k)
      out.coefficient[k] = all[k];
    return out;
  }

private:
  template <class W> struct numbers { W c, a, b, e, lse, surprise, of_target, of_rivals; };

  template <class W> numbers<W> of_rows(const W& row) const {
    alignas(64) double at[finish_rows], x[8][finish_rows] = {};
    row.store(at);
    for (index i = 0; i < finish_rows; ++i) {
      const auto r = static_cast<std::size_t>(at[i]);
      const token_slopes& s = slopes[r];
      const divergence_record q = compared.empty() ? divergence_record{} : compared[r];
      const double all[] = {s.log_probability * inverse_temperature,
                            s.reverse_kl * inverse_temperature,
                            s.forward_kl * inverse_temperature,
                            s.entropy * inverse_temperature,
                            q.log_sum_exp,
                            q.surprise,
                            q.of_target,
                            q.of_rivals};
      for (int k = 0; k < 8; ++k)
        x[k][i] = all[k];
    }
    return {W::load(x[0]), W::load(x[1]), W::load(x[2]), W::load(x[3]),
            W::load(x[4]), W::load(x[5]), W::load(x[6]), W::load(x[7])};
  }
};

/// That gradient as what a linear head takes a loss for. Its value is 0.
template <class T> struct token_gradient : row_loss<token_gradient<T>, T> {
  struct options {
    std::int64_t ignore_index;
    perdita::reduction reduction = perdita::reduction::sum;
  };
  static constexpr const char* name = "token_gradient";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = false;

  token_gradient_formula<T> formula;
  options how;

  token_gradient(const token_gradient_formula<T>& f, std::int64_t ignore_index)
      : formula(f), how{ignore_index} {}
  const options& settings() const { return how; }
  template <class F> void visit(const row_job<T>&, F f) const { f(formula); }
};

} // namespace perdita::inline PERDITA_ABI::core
