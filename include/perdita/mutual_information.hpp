// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/batch_call.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// A critic's scores: of joint samples, and of product samples in pieces that a worker takes whole.
/// Of a square matrix, those are its diagonal, and its rows without it.
template <class T> struct critic_scores {
  matrix_data<T> joint, product;
  matrix_data<T, true> d_joint, d_product; ///< d_joint only where the scores are two vectors
  bool square = false;

  static constexpr index longest = 1024; ///< of a piece of a vector

  index joints() const { return joint.rows; }
  double products() const {
    const auto n = static_cast<double>(product.cols);
    return square ? n * (n - 1) : n;
  }
  index pieces() const { return square ? product.rows : (product.cols + longest - 1) / longest; }
  index width() const { return square ? product.cols : std::min(product.cols, longest); }
  /// Where the joint score lies in a piece.
  index own(index piece) const { return square ? piece : -1; }

  template <bool Mutable>
  matrix_data<T, Mutable> part(const matrix_data<T, Mutable>& of, index piece) const {
    const index first = square ? 0 : piece * longest;
    matrix_data<T, Mutable> m = of;
    m.data = of.at(square ? piece : 0, first);
    m.rows = m.plane_rows = 1;
    m.cols = square ? of.cols : std::min(longest, of.cols - first);
    return m;
  }
};

/// Room of one worker for a piece.
template <class T> struct critic_room {
  std::vector<double> x, slopes;
  std::vector<T> stage;
  explicit critic_room(index width)
      : x(static_cast<std::size_t>(whole_packs(width))), slopes(x.size()), stage(x.size()) {}
};

/// work(piece, scores in double, their number, room) for each piece.
template <class T, class Work>
void for_pieces(const critic_scores<T>& s, const executor& run_on, Work work) {
  const index n = s.pieces();
  const auto workers = std::min(static_cast<std::size_t>(n), run_on.concurrency());
  share_out(n, workers, run_on, [&](std::size_t) {
    return [&, room = critic_room<T>(s.width())](index piece) mutable {
      const auto m = s.part(s.product, piece);
      read_row(m, 0, room.stage.data(), room.x.data());
      work(piece, room.x.data(), m.cols, room);
    };
  });
}
/// Writes the slopes in a room.
template <class T>
void write_piece(const critic_scores<T>& s, index piece, critic_room<T>& room,
                 const call_options<T>& call) {
  const auto to = s.part(s.d_product, piece);
  const auto scale = static_cast<double>(call.scale);
  for (index j = 0; j < to.cols; ++j)
    room.slopes[static_cast<std::size_t>(j)] *= scale;
  write_row(to, 0, room.slopes.data(), call.accumulate, room.stage.data());
}

/// f(x) of all joint scores, their mean.
template <class T, class F> double mean_over_joint(const critic_scores<T>& s, F f) {
  exact_sum sum;
  for (index i = 0; i < s.joints(); ++i)
    sum.add(f(number_at(s.joint, i, 0)));
  return sum.value() / static_cast<double>(s.joints());
}

/// Product scores for what they are.
struct unchanged_scores {
  void operator()(index, double*, index) const {}
};
/// Clipped to [-limit, limit].
struct clipped_scores {
  double limit;
  void operator()(index, double* x, index n) const {
    for (index j = 0; j < n; ++j)
      x[j] = x[j] > limit ? limit : x[j] < -limit ? -limit : x[j];
  }
};
/// Less a baseline.
template <class T> struct scores_above {
  matrix_data<T> baselines; ///< one for each piece, or none: 1
  void operator()(index piece, double* x, index n) const {
    const double baseline = baselines ? number_at(baselines, piece, 0) : 1;
    for (index j = 0; j < n; ++j)
      x[j] -= baseline;
  }
};

/// Σ e^x of each piece's product scores, after what `prepare` does to them.
template <class T, class Prepare>
std::vector<scaled_sum> sum_images(const critic_scores<T>& s, const executor& run_on,
                                   Prepare prepare) {
  std::vector<scaled_sum> sums(static_cast<std::size_t>(s.pieces()));
  for_pieces(s, run_on, [&](index piece, double* x, index n, auto&) {
    prepare(piece, x, n);
    if (s.own(piece) >= 0)
      x[s.own(piece)] = no_score;
    sums[static_cast<std::size_t>(piece)] = sum_of_images(x, whole_packs(n));
  });
  return sums;
}
inline scaled_sum total_of(const std::vector<scaled_sum>& parts) {
  return total_of(parts.data(), static_cast<index>(parts.size()));
}

/// Slopes −1/n of joint scores and factor · e^(x − top) of product scores.
template <class T, class Prepare>
void write_images(const critic_scores<T>& s, double top, double factor, const call_options<T>& call,
                  Prepare prepare) {
  using W = pack<double>;
  const double of_joint = -1 / static_cast<double>(s.joints());
  for_pieces(s, call.run_on, [&](index piece, double* x, index n, critic_room<T>& room) {
    prepare(piece, x, n);
    for (index j = 0; j < n; j += per_pack)
      (exp(W::load(x + j) - top) * factor).store(room.slopes.data() + j);
    if (s.own(piece) >= 0)
      room.slopes[static_cast<std::size_t>(s.own(piece))] = of_joint;
    write_piece(s, piece, room, call);
  });
  for (index i = 0; i < s.d_joint.rows; ++i)
    put_number(s.d_joint, i, 0, of_joint * static_cast<double>(call.scale), call.accumulate);
}
/// The same of log Σ e^x, whose slopes are its softmax.
template <class T>
void write_softmax(const critic_scores<T>& s, const scaled_sum& total,
                   const call_options<T>& call) {
  const bool none = total.sum == 0;
  write_images(s, none ? 0 : total.top, none ? 0 : 1 / total.sum, call, unchanged_scores{});
}

inline double softplus_of(double x) { return first_lane(softplus(pack<double>(x))); }
inline double sigmoid_of(double x) { return first_lane(sigmoid(pack<double>(x))); }

/// mean softplus(x) over the product samples.
template <class T> double mean_softplus(const critic_scores<T>& s, const executor& run_on) {
  using W = pack<double>;
  std::vector<double> sums(static_cast<std::size_t>(s.pieces()));
  for_pieces(s, run_on, [&](index piece, double* x, index n, auto&) {
    if (s.own(piece) >= 0)
      x[s.own(piece)] = no_score;
    W sum(0);
    for (index j = 0; j < n; j += per_pack)
      sum += softplus(W::load(x + j));
    sums[static_cast<std::size_t>(piece)] = sum_lanes(sum);
  });
  exact_sum total;
  for (const double sum : sums)
    total.add(sum);
  return total.value() / s.products();
}
/// Slopes of the Jensen-Shannon estimate.
template <class T> void write_sigmoids(const critic_scores<T>& s, const call_options<T>& call) {
  using W = pack<double>;
  const double of_joint = -1 / static_cast<double>(s.joints()), factor = 1 / s.products();
  for_pieces(s, call.run_on, [&](index piece, double* x, index n, critic_room<T>& room) {
    for (index j = 0; j < n; j += per_pack)
      (sigmoid(W::load(x + j)) * factor).store(room.slopes.data() + j);
    if (const index own = s.own(piece); own >= 0)
      room.slopes[static_cast<std::size_t>(own)] = of_joint * sigmoid_of(-x[own]);
    write_piece(s, piece, room, call);
  });
  for (index i = 0; i < s.d_joint.rows; ++i)
    put_number(s.d_joint, i, 0,
               of_joint * sigmoid_of(-number_at(s.joint, i, 0)) * static_cast<double>(call.scale),
               call.accumulate);
}

template <class T> double negative_mean(const critic_scores<T>& s) {
  return -mean_over_joint(s, [](double x) { return x; });
}
/// The log of the mean image less the mean of the joint scores. Both less the largest score first:
/// what is added to all of them takes no digits.
template <class T, class Images>
double log_mean_over_joint(const critic_scores<T>& s, const Images& total) {
  const bool ordinary = total.sum > 0 && std::isfinite(total.top);
  const double top = ordinary ? total.top : 0;
  const double log_sum = ordinary ? std::log(total.sum) : total.log();
  return (log_sum - std::log(s.products())) -
         mean_over_joint(s, [top](double x) { return x - top; });
}

/// A matrix that is no vector: what is both is taken for the vector.
template <class M, class T>
concept square_scores = scores_like<M, T> && !vector_like<M>;
template <class V, class T>
concept sampled_scores =
    vector_like<V> && storable_as<std::remove_const_t<typename element_of<V>::type>, T>;

/// Reads and checks the scores of losses that take them as a matrix or as two vectors.
template <class T> struct critic_input {
  batch_checks<T> checks;

  template <class S> critic_scores<T> square(const matrix_view<S>& m, index least = 2) const {
    checks.size("columns of the scores", m.cols, m.rows, "as many as rows");
    require(m.rows >= least, checks.name, "rows of the scores", m.rows,
            least == 2 ? "at least 2" : "at least 1");
    require(m.plane_rows == m.rows, checks.name, "rows in a plane", m.plane_rows,
            "all rows in one plane");
    checks.memory("scores", m.data, m.rows);
    critic_scores<T> s;
    s.square = true;
    s.joint = matrix_view<S>(m.data, m.rows, 1, m.row_stride + m.col_stride, 1);
    s.product = m;
    return s;
  }
  template <class S, class G>
  critic_scores<T> square(const matrix_view<S>& m, const matrix_view<G>& g, bool accumulate,
                          index least = 2) const {
    critic_scores<T> s = square(m, least);
    checks.gradient(s.product, matrix_data<T, true>(g), accumulate);
    s.d_product = g;
    return s;
  }
  template <class J, class P>
  critic_scores<T> samples(const vector_view<J>& joint, const vector_view<P>& product) const {
    require(joint.size >= 1, checks.name, "joint scores", joint.size, "at least 1");
    require(product.size >= 1, checks.name, "product scores", product.size, "at least 1");
    checks.memory("joint scores", joint.data, joint.size);
    checks.memory("product scores", product.data, product.size);
    critic_scores<T> s;
    s.joint = as_column(joint);
    s.product = row_of(product);
    return s;
  }
  template <class J, class P, class G, class H>
  critic_scores<T> samples(const vector_view<J>& joint, const vector_view<P>& product,
                           const vector_view<G>& d_joint, const vector_view<H>& d_product) const {
    critic_scores<T> s = samples(joint, product);
    s.d_joint = as_column(d_joint);
    s.d_product = row_of(d_product);
    checks.size("gradient of the joint scores", d_joint.size, joint.size, "one for each score");
    checks.size("gradient of the product scores", d_product.size, product.size,
                "one for each score");
    checks.memory("gradient of the joint scores", d_joint.data, d_joint.size);
    checks.memory("gradient of the product scores", d_product.data, d_product.size);
    checks.apart({bytes_of(s.d_joint), bytes_of(s.d_product)},
                 {bytes_of(s.joint), bytes_of(s.product)});
    return s;
  }

private:
  template <class S> static matrix_view<S> row_of(const vector_view<S>& v) {
    return {v.data, 1, v.size, 0, v.stride};
  }
};

/// The calls of a loss whose value and gradient need nothing but the scores:
/// double Loss::evaluate(scores, has_gradient, call).
template <class Loss, class T> class critic_loss {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;

  /// The value, of a square matrix of scores.
  template <square_scores<T> S> T operator()(S&& scores, const call_options<T>& call = {}) const {
    return run(input().square(as_matrix(scores)), false, call);
  }
  /// The value and its gradient, which may overwrite the scores.
  template <square_scores<T> S, class G>
  requires gradient_like<G, T> T operator()(S&& scores, G&& gradient,
                                            const call_options<T>& call = {}) const {
    return run(input().square(as_matrix(scores), as_matrix(gradient), call.accumulate), true, call);
  }
  /// The value, of the scores of joint samples and of product samples.
  template <sampled_scores<T> J, sampled_scores<T> P>
  T operator()(J&& joint, P&& product, const call_options<T>& call = {}) const {
    return run(input().samples(as_vector(joint), as_vector(product)), false, call);
  }
  /// The value and both gradients, apart from the scores and from each other.
  template <sampled_scores<T> J, sampled_scores<T> P, sampled_scores<T> G, sampled_scores<T> H>
  T operator()(J&& joint, P&& product, G&& d_joint, H&& d_product,
               const call_options<T>& call = {}) const {
    return run(input().samples(as_vector(joint), as_vector(product), as_vector(d_joint),
                               as_vector(d_product)),
               true, call);
  }

private:
  static critic_input<T> input() { return {{{Loss::name}}}; }
  T run(const critic_scores<T>& s, bool has_gradient, const call_options<T>& call) const {
    input().checks.only_whole(call);
    return static_cast<T>(static_cast<const Loss&>(*this).evaluate(s, has_gradient, call));
  }
};

/// What interpolated_bound computes of a row of n scores: the sum over the product samples of what
/// they add to the value, and the slopes, all times K (K − 1).
class interpolated_row {
public:
  interpolated_row(double log_share, double log_rest, index n)
      : log_share_(log_share), log_rest_(log_rest), n_(n), weight_(static_cast<std::size_t>(n)) {}

  /// Overwrites x by the slopes.
  double operator()(double* x, index own, double baseline, double* of_baseline, bool slopes) {
    const index top = std::max_element(x, x + n_) - x;
    baseline -= x[top]; // what is added to all cancels before anything is lost
    for (index j = 0; j < n_; ++j)
      if (j != top)
        x[j] = std::max(x[j] - x[top], std::numeric_limits<double>::lowest());
    x[top] = 0;
    double others = no_score; // the largest but for the top
    for (index j = 0; j < n_; ++j)
      if (j != top)
        others = std::max(others, x[j]);
    double all = 0, rest = 0;
    for (index j = 0; j < n_; ++j) {
      all += std::exp(x[j]);
      rest += j == top ? 0 : std::exp(x[j] - others);
    }
    const auto log_without = [&](index j) {
      return j == top ? others + std::log(rest) : std::log(all - std::exp(x[j]));
    };
    const double log_count = std::log(static_cast<double>(n_ - 1));
    // b, and the share of the scores in it
    const auto mix = [&](index j, double& share) {
      const double nce = log_share_ + (log_without(j) - log_count), fixed = log_rest_ + baseline;
      share = log_share_ == no_score ? 0 : log_rest_ == no_score ? 1 : sigmoid_of(nce - fixed);
      return nce > fixed ? nce + softplus_of(fixed - nce) : fixed + softplus_of(nce - fixed);
    };
    double own_share = 0, value = 0, shares = 0, sum = 0;
    const double own_b = mix(own, own_share);
    for (index j = 0; j < n_; ++j)
      if (j != own) {
        double share = 0;
        value += mix(j, share) - x[own];
        shares += share;
        sum += std::exp(x[j] - own_b);
        weight_[static_cast<std::size_t>(j)] = share;
      }
    if (!slopes)
      return value + sum;
    *of_baseline = static_cast<double>(n_ - 1) - shares - sum * (1 - own_share);
    // Σ_{j ≠ own, k} share_j e^{x_k}/Σ_{l ≠ j} e^{x_l}, of which the top's part is kept by itself
    double common = 0;
    for (index j = 0; j < n_; ++j)
      if (j != own && j != top)
        common += weight_[static_cast<std::size_t>(j)] / (all - std::exp(x[j]));
    const double log_top = log_without(top), log_own = log_without(own);
    for (index k = 0; k < n_; ++k) {
      const double score = x[k], image = std::exp(score);
      double own_part = 0;
      if (k != own && k != top)
        own_part = weight_[static_cast<std::size_t>(k)] / (all - image);
      double slope = image * (common - own_part);
      if (top != own && k != top)
        slope += weight_[static_cast<std::size_t>(top)] * std::exp(score - log_top);
      x[k] = k == own
                 ? slope - static_cast<double>(n_ - 1)
                 : slope + std::exp(score - own_b) - sum * own_share * std::exp(score - log_own);
    }
    return value + sum;
  }

private:
  double log_share_, log_rest_;
  index n_;
  std::vector<double> weight_;
};

} // namespace core

/// Minus the Donsker-Varadhan bound of mutual information, of a critic's scores of joint samples
/// s_i and of product samples t_j:
///
///   ℓ = log mean e^t − mean s,   ∂ℓ/∂s_i = −1/n,   ∂ℓ/∂t_j = softmax(t)_j
///
/// The exact gradient of the value of this batch, which is a biased estimate of the gradient over
/// all samples: see mine. A number added to all scores changes nothing. In nats.
/// Shapes: a square matrix S with K ≥ 2 rows, of which the diagonal is s and the other K (K − 1)
/// scores are t, and a gradient of that shape, which may be the scores themselves; or two vectors
/// of any lengths ≥ 1 and two gradients apart from them. Sixteen-bit scores as elsewhere.
/// Special values: a product score of −inf adds nothing, and has gradient 0. +inf among them, or
/// −inf among the joint ones: the value is +inf. NaN makes the value NaN, and the gradient wherever
/// it depends on that score.
/// Call options: scale (of the gradient), accumulate, run_on; all others belong to losses of rows
/// and are refused. Computed in double; threads do not matter. Throws std::invalid_argument.
/// Source: Donsker, Varadhan 1983; Belghazi et al., "Mutual information neural estimation",
/// ICML 2018.
///
///   perdita::donsker_varadhan<float> loss;
///   float value = loss(scores, d_scores); // minus the estimate
///   value = loss(of_joint, of_product, d_joint, d_product);
template <class T = float>
class donsker_varadhan : public core::critic_loss<donsker_varadhan<T>, T> {
public:
  static constexpr const char* name = "donsker_varadhan";

private:
  friend core::critic_loss<donsker_varadhan<T>, T>;
  double evaluate(const core::critic_scores<T>& s, bool has_gradient,
                  const call_options<T>& call) const {
    const auto total = core::total_of(core::sum_images(s, call.run_on, core::unchanged_scores{}));
    const double value = core::log_mean_over_joint(s, total);
    if (has_gradient)
      core::write_softmax(s, total, call);
    return value;
  }
};

/// The state of mine: the log of a moving average of mean e^t.
struct mine_average {
  double log = 0;
  bool started = false; ///< the first batch sets it
};

/// Minus the Donsker-Varadhan bound, with MINE's corrected gradient: the mean in the denominator is
/// a moving average over batches,
///
///   ℓ = log mean e^t − mean s,   ∂ℓ/∂s_i = −1/n,   ∂ℓ/∂t_j ≈ e^{t_j}/(m (A + floor))
///   A ← rate · mean e^t + (1 − rate) A   before it is used; the first batch's mean to begin with
///
/// so this gradient is not the derivative of the value, on purpose. A is the caller's and kept as
/// its logarithm; a call with a gradient updates it, one without leaves it. A batch whose mean is
/// NaN or infinite leaves it as it was. A number added to all scores of all batches changes
/// nothing if floor = 0. Everything else: as donsker_varadhan.
/// Source: Belghazi et al., ICML 2018; the floor as in code that is widely used.
///
///   perdita::mine_average average; // as long as the critic is trained
///   float value = perdita::mine<float>()(scores, average, d_scores);
template <class T = float> class mine {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    double rate = 0.01;  ///< weight of the new batch, in (0, 1]
    double floor = 1e-6; ///< added to the average; at least 0
  };
  static constexpr const char* name = "mine";

  mine() : mine(options{}) {}
  explicit(false) mine(const options& o) : options_(o) {
    core::require(o.rate > 0 && o.rate <= 1, name, "rate", o.rate, "a number in (0, 1]");
    core::require(o.floor >= 0 && std::isfinite(o.floor), name, "floor", o.floor,
                  "a finite number of at least 0");
  }
  const options& settings() const { return options_; }

  /// The value, that of donsker_varadhan.
  template <core::square_scores<T> S>
  T operator()(S&& scores, const call_options<T>& call = {}) const {
    return donsker_varadhan<T>()(scores, call);
  }
  template <core::sampled_scores<T> J, core::sampled_scores<T> P>
  T operator()(J&& joint, P&& product, const call_options<T>& call = {}) const {
    return donsker_varadhan<T>()(joint, product, call);
  }
  /// Updates the average; the value, and the corrected gradient.
  template <core::square_scores<T> S, class G>
  requires core::gradient_like<G, T> T operator()(S&& scores, mine_average& average, G&& gradient,
                                                  const call_options<T>& call = {}) const {
    return run(input.square(core::as_matrix(scores), core::as_matrix(gradient), call.accumulate),
               average, call);
  }
  template <core::sampled_scores<T> J, core::sampled_scores<T> P, core::sampled_scores<T> G,
            core::sampled_scores<T> H>
  T operator()(J&& joint, P&& product, mine_average& average, G&& d_joint, H&& d_product,
               const call_options<T>& call = {}) const {
    return run(input.samples(core::as_vector(joint), core::as_vector(product),
                             core::as_vector(d_joint), core::as_vector(d_product)),
               average, call);
  }

private:
  static constexpr core::critic_input<T> input{{{name}}};

  T run(const core::critic_scores<T>& s, mine_average& average, const call_options<T>& call) const {
    input.checks.only_whole(call);
    const auto total = core::total_of(core::sum_images(s, call.run_on, core::unchanged_scores{}));
    const double log_mean = total.log() - std::log(s.products());
    const double value = core::log_mean_over_joint(s, total);
    if (log_mean < std::numeric_limits<double>::infinity()) {
      average.log = average.started ? log_add(std::log(options_.rate) + log_mean,
                                              std::log1p(-options_.rate) + average.log)
                                    : log_mean;
      average.started = true;
    }
    const double log_floor = options_.floor > 0 ? std::log(options_.floor) : core::no_score;
    const double below = average.started ? log_add(average.log, log_floor) : log_floor;
    const bool none = below == core::no_score; // all scores are -inf, and so are no sample
    core::write_images(s, none ? 0 : below, 1 / s.products(), call, core::unchanged_scores{});
    return static_cast<T>(value);
  }
  static double log_add(double a, double b) {
    const double high = std::max(a, b), low = std::min(a, b);
    return low == core::no_score ? high : high + std::log1p(std::exp(low - high));
  }

  options options_;
};

/// Minus the bound of Nguyen, Wainwright and Jordan (f-GAN's of the Kullback-Leibler divergence):
///
///   ℓ = mean e^{t − 1} − mean s,   ∂ℓ/∂s_i = −1/n,   ∂ℓ/∂t_j = e^{t_j − 1}/m
///
/// Nothing couples the samples, so its gradient is not biased; its variance grows as e^MI. Beyond
/// the range of T value and gradient are +inf. Everything else: as donsker_varadhan.
/// Source: Nguyen, Wainwright, Jordan 2010; Nowozin, Cseke, Tomioka 2016.
template <class T = float> class nwj : public core::critic_loss<nwj<T>, T> {
public:
  static constexpr const char* name = "nwj";

private:
  friend core::critic_loss<nwj<T>, T>;
  double evaluate(const core::critic_scores<T>& s, bool has_gradient,
                  const call_options<T>& call) const {
    const core::scores_above<T> above{};
    const auto total = core::total_of(core::sum_images(s, call.run_on, above));
    const double mean = total.sum == 0 ? 0 : total.sum / s.products() * std::exp(total.top);
    const double value = mean + core::negative_mean(s);
    if (has_gradient)
      core::write_images(s, 0, 1 / s.products(), call, above);
    return value;
  }
};

namespace core {

/// A bound with a baseline for each row of a square matrix of scores: how it is called. Derived has
/// evaluate(scores, baselines, gradient of the baselines, call).
template <class Derived, class T> class baseline_bound {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;

  template <square_scores<T> S, sampled_scores<T> A>
  T operator()(S&& scores, A&& baselines, const call_options<T>& call = {}) const {
    return run(input_of().square(as_matrix(scores)), as_vector(baselines), {}, call);
  }
  template <square_scores<T> S, sampled_scores<T> A, class G, sampled_scores<T> H>
  requires gradient_like<G, T> T operator()(S&& scores, A&& baselines, G&& d_scores,
                                            H&& d_baselines,
                                            const call_options<T>& call = {}) const {
    const auto input = input_of();
    const auto s = input.square(as_matrix(scores), as_matrix(d_scores), call.accumulate);
    const auto a = as_vector(baselines);
    const auto g = as_vector(d_baselines);
    input.checks.size("gradient of the baselines", g.size, s.joints(), "one for each row");
    input.checks.memory("gradient of the baselines", g.data, g.size);
    const matrix_data<T, true> to(as_column(g));
    const extent of_a = bytes_of(a);
    input.checks.apart({bytes_of(to)}, {of_a, bytes_of(s.product), bytes_of(s.d_product)});
    input.checks.apart({bytes_of(s.d_product)}, {of_a});
    return run(s, a, to, call);
  }

private:
  static constexpr critic_input<T> input_of() { return {{{Derived::name}}}; }
  template <class A>
  T run(const critic_scores<T>& s, const vector_view<A>& baselines,
        const matrix_data<T, true>& d_baselines, const call_options<T>& call) const {
    const auto input = input_of();
    input.checks.only_whole(call);
    input.checks.size("baselines", baselines.size, s.joints(), "one for each row");
    input.checks.memory("baselines", baselines.data, baselines.size);
    return static_cast<const Derived&>(*this).evaluate(s, matrix_data<T>(as_column(baselines)),
                                                       d_baselines, call);
  }
};

} // namespace core

/// Minus the bound of Barber and Agakov in the form of Poole et al., with a baseline a_i (the log
/// of the critic's estimate of a partition function) for each row of a square matrix:
///
///   ℓ = mean_{i ≠ j} e^{S_ij − a_i} − 1 − mean_i (S_ii − a_i)
///   ∂ℓ/∂S_ii = −1/K,   ∂ℓ/∂S_ij = e^{S_ij − a_i}/(K (K − 1)),   ∂ℓ/∂a_i = 1/K − Σ_{j ≠ i} of that
///
/// a = 1: nwj. The best constant a, log mean e^{S_ij}: donsker_varadhan. The gradient of the
/// baselines lies apart from all else. Everything else: as donsker_varadhan's matrix.
/// Source: Barber, Agakov 2003; Poole et al., "On variational bounds of mutual information",
/// ICML 2019.
///
///   float value = perdita::tuba<float>()(scores, baselines, d_scores, d_baselines);
template <class T = float> class tuba : public core::baseline_bound<tuba<T>, T> {
public:
  static constexpr const char* name = "tuba";

private:
  friend core::baseline_bound<tuba<T>, T>;
  T evaluate(const core::critic_scores<T>& s, const core::matrix_data<T>& baselines,
             const core::matrix_data<T, true>& d_baselines, const call_options<T>& call) const {
    const core::scores_above<T> above{baselines};
    const auto sums = core::sum_images(s, call.run_on, above);
    const auto k = static_cast<double>(s.joints());
    core::exact_sum joint, product;
    for (index i = 0; i < s.joints(); ++i) {
      const auto& sum = sums[static_cast<std::size_t>(i)];
      const double images = sum.sum == 0 ? 0 : sum.sum * std::exp(sum.top);
      joint.add(core::number_at(s.joint, i, 0) - core::number_at(above.baselines, i, 0));
      product.add(sum.sum != sum.sum ? sum.sum : images);
      if (d_baselines)
        core::put_number(d_baselines, i, 0,
                         static_cast<double>(call.scale) * (1 / k - images / s.products()),
                         call.accumulate);
    }
    const double value = (product.value() / s.products() - 1) - joint.value() / k;
    if (s.d_product)
      core::write_images(s, 0, 1 / s.products(), call, above);
    return static_cast<T>(value);
  }
};

/// Minus the bound between tuba (α = 0) and a bound of InfoNCE's kind (α = 1), of lower variance
/// than the one and not capped by log K as the other:
///
///   ℓ = mean_{i ≠ j} (e^{S_ij − b_ii} − S_ii + b_ij) − 1
///   b_ij = log(α mean_{k ≠ j} e^{S_ik} + (1 − α) e^{a_i})
///
/// with the gradients of scores and baselines, in closed form. Scores and baselines that are not
/// finite make their row NaN, and the value. Cost: three exponentials and two logarithms a score.
/// Everything else: as tuba.
/// Source: Poole et al., ICML 2019.
template <class T = float>
class interpolated_bound : public core::baseline_bound<interpolated_bound<T>, T> {
public:
  struct options {
    double alpha = 0.5; ///< α in [0, 1]: of the other scores of the row in the baseline
  };
  static constexpr const char* name = "interpolated_bound";

  interpolated_bound() : interpolated_bound(options{}) {}
  explicit(false) interpolated_bound(const options& o) : options_(o) {
    core::require(o.alpha >= 0 && o.alpha <= 1, name, "alpha", o.alpha, "a number in [0, 1]");
  }
  const options& settings() const { return options_; }

private:
  friend core::baseline_bound<interpolated_bound<T>, T>;
  T evaluate(const core::critic_scores<T>& s, const core::matrix_data<T>& baselines,
             const core::matrix_data<T, true>& d_baselines, const call_options<T>& call) const {
    const double log_share = options_.alpha == 0 ? core::no_score : std::log(options_.alpha);
    const double log_rest = options_.alpha == 1 ? core::no_score : std::log1p(-options_.alpha);
    const double share = 1 / s.products();
    std::vector<double> values(static_cast<std::size_t>(s.joints()));
    core::for_pieces(s, call.run_on, [&](index i, double* x, index n, core::critic_room<T>& room) {
      core::interpolated_row row(log_share, log_rest, n);
      const double baseline = core::number_at(baselines, i, 0);
      double of_baseline = 0;
      bool finite = std::isfinite(baseline);
      for (index j = 0; j < n; ++j)
        finite = finite && std::isfinite(x[j]);
      if (!finite)
        std::fill_n(x, n,
                    of_baseline = values[static_cast<std::size_t>(i)] =
                        std::numeric_limits<double>::quiet_NaN());
      else
        values[static_cast<std::size_t>(i)] =
            row(x, i, baseline, &of_baseline, static_cast<bool>(s.d_product));
      if (!s.d_product)
        return;
      for (index j = 0; j < n; ++j)
        room.slopes[static_cast<std::size_t>(j)] = share * x[j];
      core::write_piece(s, i, room, call);
      core::put_number(d_baselines, i, 0, share * of_baseline * static_cast<double>(call.scale),
                       call.accumulate);
    });
    core::exact_sum total;
    for (const double value : values)
      total.add(value);
    return static_cast<T>(share * total.value() - 1);
  }

  options options_;
};

/// Minus the Jensen-Shannon estimate of dependence (Deep InfoMax, f-GAN), binary cross-entropy
/// between joint and product samples:
///
///   ℓ = mean softplus(−s) + mean softplus(t)
///   ∂ℓ/∂s_i = −σ(−s_i)/n,   ∂ℓ/∂t_j = σ(t_j)/m
///
/// No bound of mutual information, and not in its nats: at the optimum the Jensen-Shannon
/// divergence of joint and product is (log 4 − ℓ)/2. To train by this gradient and report NWJ's
/// value, ask nwj for its value without a gradient. A joint score of −inf or a product score of
/// +inf makes the value +inf, and no gradient but ∓1/n. Everything else: as donsker_varadhan.
/// Source: Nowozin, Cseke, Tomioka 2016; Hjelm et al., ICLR 2019.
template <class T = float>
class jensen_shannon_information : public core::critic_loss<jensen_shannon_information<T>, T> {
public:
  static constexpr const char* name = "jensen_shannon_information";

private:
  friend core::critic_loss<jensen_shannon_information<T>, T>;
  double evaluate(const core::critic_scores<T>& s, bool has_gradient,
                  const call_options<T>& call) const {
    const double joint = core::mean_over_joint(s, [](double x) { return core::softplus_of(-x); });
    const double value = joint + core::mean_softplus(s, call.run_on);
    if (has_gradient)
      core::write_sigmoids(s, call);
    return value;
  }
};

/// SMILE: minus the Donsker-Varadhan value of clipped scores, with the gradient of
/// jensen_shannon_information:
///
///   ℓ = log mean e^{clip(t, −limit, limit)} − mean s,   gradient: see there, of scores unclipped
///
/// so the gradient is not the derivative of the value, on purpose: the critic is trained by the one
/// and read by the other. The clip, of product scores alone, bounds the variance by a bias.
/// limit = +inf: the value of donsker_varadhan. (perdita::smile is another loss, of sequences.)
/// Everything else: as donsker_varadhan; with a finite limit a product score of ±inf is ±limit.
/// Source: Song, Ermon, "Understanding the limitations of variational mutual information
/// estimators", ICLR 2020, and its code.
template <class T = float> class smile_bound : public core::critic_loss<smile_bound<T>, T> {
public:
  struct options {
    double limit = 5; ///< of product scores; above 0, +inf for none
  };
  static constexpr const char* name = "smile_bound";

  smile_bound() : smile_bound(options{}) {}
  explicit(false) smile_bound(const options& o) : options_(o) {
    core::require(o.limit > 0, name, "limit", o.limit, "a number above 0");
  }
  const options& settings() const { return options_; }

private:
  friend core::critic_loss<smile_bound<T>, T>;
  double evaluate(const core::critic_scores<T>& s, bool has_gradient,
                  const call_options<T>& call) const {
    const auto total =
        core::total_of(core::sum_images(s, call.run_on, core::clipped_scores{options_.limit}));
    const double value = core::log_mean_over_joint(s, total);
    if (has_gradient)
      core::write_sigmoids(s, call);
    return value;
  }
  options options_;
};

/// Minus the InfoNCE bound of mutual information, of a square matrix of scores:
///
///   ℓ = mean_i (log Σ_j e^{S_ij} − S_ii) − log K ≥ −log K
///   ∂ℓ/∂S_ij = (softmax(S_i)_j − [i = j])/K
///
/// Cross-entropy with label i in row i, less log K; the joint sample is in the denominator. One
/// pass. K ≥ 1. Special values of a row as in cross_entropy: −inf masks a product score, NaN or
/// +inf make the row NaN, and the value. Everything else: as donsker_varadhan's matrix.
/// Source: van den Oord, Li, Vinyals 2018; Poole et al., ICML 2019.
template <class T = float> class info_nce_bound {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  static constexpr const char* name = "info_nce_bound";

  template <core::square_scores<T> S>
  T operator()(S&& scores, const call_options<T>& call = {}) const {
    return run(input.square(core::as_matrix(scores), 1), call);
  }
  template <core::square_scores<T> S, class G>
  requires core::gradient_like<G, T> T operator()(S&& scores, G&& gradient,
                                                  const call_options<T>& call = {}) const {
    return run(input.square(core::as_matrix(scores), core::as_matrix(gradient), call.accumulate, 1),
               call);
  }

private:
  static constexpr core::critic_input<T> input{{{name}}};

  T run(const core::critic_scores<T>& s, const call_options<T>& call) const {
    input.checks.only_whole(call);
    const auto k = static_cast<double>(s.joints());
    std::vector<double> values(static_cast<std::size_t>(s.joints()));
    core::for_pieces(s, call.run_on, [&](index i, double* x, index n, core::critic_room<T>& room) {
      double value = std::numeric_limits<double>::quiet_NaN();
      bool usable = true;
      for (index j = 0; j < n; ++j)
        usable = usable && x[j] < -core::no_score;
      if (usable)
        value = core::cross_entropy_among(x, core::whole_packs(n), i, room.slopes.data());
      else
        std::fill(room.slopes.begin(), room.slopes.end(), value);
      values[static_cast<std::size_t>(i)] = value;
      if (!s.d_product)
        return;
      for (double& slope : room.slopes)
        slope /= k;
      core::write_piece(s, i, room, call);
    });
    core::exact_sum total;
    for (const double value : values)
      total.add(value);
    return static_cast<T>(total.value() / k - std::log(k));
  }
};

} // namespace perdita::inline PERDITA_ABI
