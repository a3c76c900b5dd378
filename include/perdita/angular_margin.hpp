// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "core/row_formula.hpp"
#include "core/row_loss.hpp"
#include "core/traits.hpp"
#include "similarity.hpp"

namespace perdita::inline PERDITA_ABI {

/// What becomes of a target whose angle and margin together pass π, where cos(θ + m) would rise.
enum class beyond_pi {
  shifted, ///< c − m sin m for c ≤ −cos m, as in ArcFace's reference code: the value jumps there
  cosine ///< cos(θ + m), whatever it does
};

namespace core {

/// ψ(c) of a target's cosine, ∂ψ/∂c, ∂ψ/∂m of a margin m that depends on the row, and what is added
/// to the row's value.
struct target_cosine {
  double value, slope, by_margin = 0, extra = 0;
};

/// c = cos θ within what angles are taken of: from there to ±1 and beyond, ψ goes on as a straight
/// line, so that its slope stays finite.
struct angle_of_cosine {
  static constexpr double largest = 1 - 1e-7;
  double cosine, sine, rest; // rest: c less the cosine

  explicit angle_of_cosine(double c)
      : cosine(std::clamp(c, -largest, largest)), sine(std::sqrt((1 - cosine) * (1 + cosine))),
        rest(c - cosine) {}
};

struct additive_cosine {
  double margin;
  target_cosine operator()(double c, double) const { return {c - margin, 1}; }
};

struct additive_angle {
  double margin;
  bool easy;
  beyond_pi beyond;
  double cosine = std::cos(margin), sine = std::sin(margin);

  target_cosine operator()(double c, double) const { return at(c); }
  target_cosine at(double c) const {
    if (easy && !(c > 0))
      return {c, 1};
    if (!easy && beyond == beyond_pi::shifted && c <= -cosine)
      return {c - margin * sine, 1, -sine - margin * cosine};
    const angle_of_cosine a(c);
    const double slope = cosine + a.cosine * sine / a.sine;
    const double turn = a.cosine * cosine / a.sine - sine; // ∂slope/∂m
    return {(a.cosine * cosine - a.sine * sine) + slope * a.rest, slope,
            turn * a.rest - (a.cosine * sine + a.sine * cosine)};
  }
};

/// With Chebyshev's polynomials, cos mθ = T_m(c) and sin mθ = sin θ U_{m−1}(c).
struct multiplicative_angle {
  int multiple;

  target_cosine operator()(double c, double) const {
    if (!(std::fabs(c) <= 1)) { // NaN, or a cosine with a rounding error: goes on as a line
      const double edge = c > 0 ? 1 : -1;
      const target_cosine at = (*this)(edge, 0);
      return {at.value + at.slope * (c - edge), at.slope + (c - c)};
    }
    double before = 1, t = c, u = 1, u_before = 0; // T_{j−1}, T_j, U_{j−1}, U_{j−2}
    for (int j = 1; j < multiple; ++j) {
      const double t_next = 2 * c * t - before, u_next = 2 * c * u - u_before;
      before = t, t = t_next, u_before = u, u = u_next;
    }
    int k = 0; // ⌊mθ/π⌋
    while (k < multiple - 1 && c <= std::cos((k + 1) * (pi / multiple)))
      ++k;
    const double sign = k % 2 == 0 ? 1 : -1;
    return {sign * t - 2 * k, sign * multiple * u};
  }

  static constexpr double pi = 3.14159265358979323846;
};

/// The row's own number is its quality k: an angle of −m k, and a cosine of m + m k.
struct adaptive_margin {
  double margin;

  target_cosine operator()(double c, double quality) const {
    constexpr double pi = multiplicative_angle::pi, least = 1e-3;
    const angle_of_cosine a(c);
    const double angle = std::atan2(a.sine, a.cosine) - margin * quality;
    const double kept = std::clamp(angle, least, pi - least);
    const double slope = kept == angle ? std::sin(angle) / a.sine : c - c + (angle - angle);
    return {(std::cos(kept) - margin * (1 + quality)) + slope * a.rest, slope};
  }
};

/// The row's own number is its embedding's norm.
struct magnitude_margin {
  double low, high;               // norms
  double margin_low, margin_high; // at these
  double regulariser;
  bool easy;

  double growth() const { return (margin_high - margin_low) / (high - low); }
  bool within(double norm) const { return norm >= low && norm <= high; }
  target_cosine operator()(double c, double norm) const {
    const double a = std::clamp(norm, low, high); // NaN stays
    const double margin = margin_low + growth() * (a - low);
    target_cosine at = additive_angle{margin, easy, beyond_pi::shifted}.at(c);
    at.extra = regulariser * (a / high / high + 1 / a);
    return at;
  }
  /// ∂/∂a of what is added to the value.
  double extra_slope(double norm) const {
    return regulariser * (1 / high / high - 1 / norm / norm);
  }
};

/// Any of these, called once for each row; it is not copied.
class cosine_map {
public:
  template <class Map>
  explicit cosine_map(const Map& map)
      : object_(&map), call_([](const void* m, double c, double own) {
          return (*static_cast<const Map*>(m))(c, own);
        }) {}
  target_cosine operator()(double c, double own) const { return call_(object_, c, own); }

private:
  const void* object_;
  target_cosine (*call_)(const void*, double, double);
};

/// Softmax of s c_j, in which ψ(c_y) stands for c_y: the target is in no sum, and moves alone.
template <class T> struct cosine_formula : row_formula {
  using statistic = log_sum_exp;
  using W = pack<double>;

  double scale;
  cosine_map map;
  vector_view<const T> numbers; // of the rows, or none
  double rivals;                // log Σ e^z of more rivals, the same for all rows; -inf: none

  double own(index r) const { return numbers.data ? static_cast<double>(numbers[r]) : 0; }
  template <class V> PERDITA_INLINE V score(const V& x) const {
    return x * V(static_cast<typename V::value_type>(scale));
  }
  template <class Row> PERDITA_NOINLINE auto finish(Row row) const {
    W slope, extra;
    move_target(row, slope, extra);
    const W shrink = add_rivals(row);
    const target_odds<T, W> odds(row);
    row_outcome<W> out;
    out.value = odds.surprise + extra;
    out.image_scale = select(row.term[0] == W(0), W(0), W(scale) * odds.per_rival * shrink);
    out.target_gradient = -(W(scale) * odds.miss * slope);
    return out;
  }
  template <class Row> auto report(Row row) const {
    W slope, extra;
    move_target(row, slope, extra);
    add_rivals(row);
    return softmax_report(row);
  }

private:
  /// What images of the row become with the new shift.
  template <class Row> W add_rivals(Row& row) const {
    if (rivals == -std::numeric_limits<double>::infinity())
      return W(1);
    const W top = max(row.shift, W(rivals)), shrink = exp(row.shift - top);
    row.term[0] = fma(row.term[0], shrink, exp(W(rivals) - top));
    row.shift = top;
    return shrink;
  }
  template <class Row> void move_target(Row& row, W& slope, W& extra) const {
    alignas(64) double c[finish_rows], number[finish_rows], slopes[finish_rows],
        extras[finish_rows];
    row.target.store(c);
    row.own.store(number);
    for (index i = 0; i < finish_rows; ++i) {
      const bool masked = c[i] == -std::numeric_limits<double>::infinity();
      const target_cosine at = map(masked ? 0 : c[i] / scale, number[i]);
      c[i] = masked ? c[i] : at.value * scale;
      slopes[i] = masked ? 1 : at.slope;
      extras[i] = at.extra;
    }
    row.target = W::load(c);
    slope = W::load(slopes);
    extra = W::load(extras);
  }
};

/// Opens to the base what a loss of cosines declares.
struct cosine_access {
  template <class Loss> static auto map(const Loss& loss) { return loss.map(); }
  template <class Loss> static auto numbers(const Loss& loss) { return loss.numbers(); }
  /// log Σ e^z of rivals that all rows have beside their classes.
  template <class Loss> static void set_rivals(Loss& loss, double log_sum) {
    loss.rivals_ = log_sum;
  }
};

template <class L> std::int64_t label_of(const vector_view<L>& labels, index r) {
  std::int64_t label;
  read_labels<std::remove_const_t<L>>(labels.data, labels.stride, r, 1, &label);
  return label;
}
/// What the gradient of each row is multiplied by in a call; 0 for those that do not count.
template <class T, class L, class Options>
std::vector<double> gradient_scales(const vector_view<L>& labels, const call_options<T>& call,
                                    const Options& options) {
  std::vector<double> result(static_cast<std::size_t>(labels.size));
  exact_sum weights;
  for (index r = 0; r < labels.size; ++r) {
    if (label_of(labels, r) == options.ignore_index)
      continue;
    const double weight = call.row_weights.data ? static_cast<double>(call.row_weights[r]) : 1.0;
    weights.add(weight);
    result[static_cast<std::size_t>(r)] =
        weight * (call.upstream.data ? static_cast<double>(call.upstream[r]) : 1.0);
  }
  double share = static_cast<double>(call.scale);
  if (options.reduction == reduction::mean) {
    const double all = call.normaliser != 0 ? call.normaliser : weights.value();
    share = all != 0 ? share / all : 0;
  }
  for (double& scale : result)
    scale *= share;
  return result;
}

template <class N> void require_scale(const char* name, N scale) { positive(name, "scale", scale); }

} // namespace core

/// Base of the losses of a row of cosines c_j of an embedding with the vectors of all classes:
///
///   ℓ = −log( e^{s ψ(c_y)} / (e^{s ψ(c_y)} + Σ_{j≠y} e^{s c_j}) )
///   ∂ℓ/∂c_j = s p_j,   ∂ℓ/∂c_y = −s (1 − p_y) ψ'(c_y)
///
/// Derived declares its name, options (with scale, the s), settings(), traits and, open to
/// cosine_access, map(), which makes ψ, and numbers(), a view of a number for each row, if it has
/// such.
///
/// They take given cosines, as cross_entropy takes scores, or embeddings and class vectors on the
/// similarity head, which holds no cosine and goes back through both normalisations:
///
///   perdita::similarity head(perdita::arcface<float>{});      // the head's own scale stays 1
///   float value = head(embeddings, class_vectors, labels, d_embeddings, d_class_vectors);
///
/// Shapes, reductions, errors: as cross_entropy. By-products are those of the scores with the
/// margin; hits, without. Special values: −inf masks a class; a masked label costs +inf. A zero
/// embedding or class vector on the head has cosines 0 and gradient 0. Losses that take an angle
/// follow ψ as far as |c| = 1 − 1e-7, and from there on its tangent, to c = ±1 and what rounding
/// makes of it: ψ' stays finite (some 2200 sin m at the most), and is the derivative of the value.
/// A class without rows is a rival like any other.
/// Accuracy: as cross_entropy of the scores s c in T, the target's moved in double; s c_y is
/// rounded to T, exact where s is a power of two, and ψ' magnifies that.
template <class Derived, class T> class cosine_loss : public row_loss<Derived, T> {
public:
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = true;
  static constexpr const char* own_number = "numbers"; ///< what messages call the rows' numbers

private:
  friend row_loss<Derived, T>;
  friend core::cosine_access;
  const Derived& self() const { return static_cast<const Derived&>(*this); }
  vector_view<const T> numbers() const { return {}; } // unless Derived has some
  void check(const core::row_job<T>& job) const {
    if (const auto n = core::cosine_access::numbers(self()); n.data || n.size > 0) {
      this->check_size(Derived::own_number, n.size, job.scores.rows);
      this->require_memory(Derived::own_number, n.data, n.size);
    }
  }
  template <class F> void visit(const core::row_job<T>&, F f) const {
    const auto map = core::cosine_access::map(self());
    f(core::cosine_formula<T>{{},
                              static_cast<double>(self().settings().scale),
                              core::cosine_map(map),
                              core::cosine_access::numbers(self()),
                              rivals_});
  }

  double rivals_ = -std::numeric_limits<double>::infinity();
};

/// Normalised softmax: cosine_loss with ψ(c) = c, s = 1/temperature.
/// Source: Wang et al., "NormFace", 2017; Zhai, Wu, "Classification is a strong baseline for deep
/// metric learning", 2019 (temperature 0.05).
template <class T = float> class normalised_softmax : public cosine_loss<normalised_softmax<T>, T> {
public:
  struct options {
    T scale = 20; ///< s
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "normalised_softmax";
  static constexpr loss_traits traits{.convex = true,
                                      .smooth = true,
                                      .exact_gradient = true,
                                      .nonnegative = true,
                                      .shift_invariant = true};

  normalised_softmax() : normalised_softmax(options{}) {}
  explicit(false) normalised_softmax(const options& o) : options_(o) {
    core::require_scale(name, o.scale);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::cosine_access;
  core::additive_cosine map() const { return {0}; }
  options options_;
};

/// CosFace (AM-Softmax): cosine_loss with ψ(c) = c − m.
/// Source: Wang et al., "CosFace", CVPR 2018.
template <class T = float> class cosface : public cosine_loss<cosface<T>, T> {
public:
  struct options {
    T scale = 64;       ///< s
    T margin = T(0.35); ///< m, finite
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "cosface";
  static constexpr loss_traits traits{.convex = true,
                                      .smooth = true,
                                      .exact_gradient = true,
                                      .nonnegative = true,
                                      .shift_invariant = true};

  cosface() : cosface(options{}) {}
  explicit(false) cosface(const options& o) : options_(o) {
    core::require_scale(name, o.scale);
    core::finite(name, "margin", o.margin);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::cosine_access;
  core::additive_cosine map() const { return {static_cast<double>(options_.margin)}; }
  options options_;
};

/// ArcFace: cosine_loss with
///
///   ψ(c) = cos(θ + m) = c cos m − √(1 − c²) sin m,   ψ'(c) = sin(θ + m)/sin θ
///
/// for c > −cos m. Below (θ + m > π) `beyond` says what holds; with the default, c − m sin m, the
/// value jumps at c = −cos m, from −1 to −cos m − m sin m. With easy_margin ψ(c) = c for c ≤ 0, a
/// jump of sin m.
/// Source: Deng, Guo, Xue, Zafeiriou, "ArcFace", CVPR 2019, and its code.
template <class T = float> class arcface : public cosine_loss<arcface<T>, T> {
public:
  struct options {
    T scale = 64;             ///< s
    T margin = T(0.5);        ///< m, an angle of 0 to π
    bool easy_margin = false; ///< none for c ≤ 0; then `beyond` does not matter
    beyond_pi beyond = beyond_pi::shifted;
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "arcface";
  static constexpr loss_traits traits{.convex = false,
                                      .smooth = false,
                                      .exact_gradient = true,
                                      .nonnegative = true,
                                      .shift_invariant = false};

  arcface() : arcface(options{}) {}
  explicit(false) arcface(const options& o) : options_(o) {
    core::require_scale(name, o.scale);
    core::require(o.margin >= 0 && static_cast<double>(o.margin) <= core::multiplicative_angle::pi,
                  name, "margin", o.margin, "an angle of 0 to pi");
    core::require_enumerator(name, "beyond", o.beyond, beyond_pi::cosine, "shifted or cosine");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::cosine_access;
  core::additive_angle map() const {
    return {static_cast<double>(options_.margin), options_.easy_margin, options_.beyond};
  }
  options options_;
};

/// SphereFace (A-Softmax) on normalised embeddings, cosine_loss with
///
///   ψ(c) = (−1)^k cos mθ − 2k,  k = ⌊mθ/π⌋ ≤ m − 1,   ψ'(c) = (−1)^k m sin mθ/sin θ ≥ 0
///
/// smooth, and from m² at θ = 0 and θ = π it falls to 0 at every θ = kπ/m between. The paper
/// multiplies the row's scores by ‖x‖ where the fixed s stands here, as in its authors' later code.
/// Source: Liu et al., "SphereFace", CVPR 2017; Liu et al., "SphereFace revived", TPAMI 2022.
template <class T = float> class sphereface : public cosine_loss<sphereface<T>, T> {
public:
  struct options {
    T scale = 30;   ///< s
    int margin = 4; ///< m: 1 to 64
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "sphereface";
  static constexpr loss_traits traits{.convex = false,
                                      .smooth = true,
                                      .exact_gradient = true,
                                      .nonnegative = true,
                                      .shift_invariant = false};

  sphereface() : sphereface(options{}) {}
  explicit(false) sphereface(const options& o) : options_(o) {
    core::require_scale(name, o.scale);
    core::require(o.margin >= 1 && o.margin <= 64, name, "margin", o.margin, "1 to 64");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::cosine_access;
  core::multiplicative_angle map() const { return {options_.margin}; }
  options options_;
};

/// The length of each row of x (of T, or 16-bit storage where T is float); NaN where a row is not
/// finite, 0 where it is shorter than the smallest normal number.
template <class T, class X>
requires core::scores_like<X, T>
void embedding_norms(X&& x, vector_view<T> norms, const executor& run_on = {}) {
  const core::matrix_data<T> m(core::as_matrix(x));
  constexpr const char* name = "embedding_norms";
  if (norms.size != m.rows)
    core::fail(name, "norms", core::to_text(norms.size), core::to_text(m.rows) + " (rows)");
  core::require_memory(name, "x", m.data, m.rows * m.cols);
  core::require_memory(name, "norms", norms.data, m.rows);
  constexpr index some = 64;
  const auto work = [&](std::size_t t) {
    std::vector<T> copy(static_cast<std::size_t>(m.cols));
    const index first = static_cast<index>(t) * some;
    for (index r = first; r < std::min(m.rows, first + some); ++r) {
      m.read(r, 0, m.cols, copy.data());
      const double inverse = core::inverse_norm(copy.data(), m.cols);
      norms[r] = static_cast<T>(inverse == 0 ? 0 : 1 / inverse);
    }
  };
  run_on(static_cast<std::size_t>((m.rows + some - 1) / some), work);
}

/// What AdaFace knows of the norms of embeddings: mean and standard deviation over batches,
///
///   mean ← t mean_batch + (1 − t) mean,  deviation alike (over n − 1),
///   quality k = clip( h (‖x‖ − mean)/(deviation + 1e-3), −1, 1 )
///
/// of norms clipped to [0.001, 100]. No gradient goes through any of this. Norms that are not
/// finite are passed over, so that one bad row does not spoil the state; a batch of one moves the
/// mean alone, an empty one nothing. The state is mean() and deviation(), from which another object
/// goes on.
/// Source: Kim, Jain, Liu, "AdaFace", CVPR 2022, and its code (t = t_alpha weighs the new value).
class norm_statistics {
public:
  struct options {
    double weight = 1;                 ///< t of the new batch: 0 to 1
    double concentration = 0.333;      ///< h, finite
    double mean = 20, deviation = 100; ///< where the averages start: finite, deviation 0 or more
  };
  static constexpr const char* name = "norm_statistics";

  norm_statistics() : norm_statistics(options{}) {}
  explicit(false) norm_statistics(const options& o)
      : options_(o), mean_(o.mean), deviation_(o.deviation) {
    core::require(o.weight >= 0 && o.weight <= 1, name, "weight", o.weight, "0 to 1");
    core::finite(name, "concentration", o.concentration);
    core::finite(name, "mean", o.mean);
    core::not_negative(name, "deviation", o.deviation);
  }
  double mean() const { return mean_; }
  double deviation() const { return deviation_; }

  template <class T> void update(vector_view<const T> norms) {
    core::require_memory(name, "norms", norms.data, norms.size);
    core::exact_sum sum, squares;
    double n = 0;
    const auto each = [&](auto f) {
      for (index r = 0; r < norms.size; ++r)
        if (std::isfinite(norms[r]))
          f(clipped(static_cast<double>(norms[r])));
    };
    each([&](double x) {
      sum.add(x);
      ++n;
    });
    if (n == 0)
      return;
    const double mean = sum.value() / n;
    each([&](double x) { squares.add((x - mean) * (x - mean)); });
    mean_ += options_.weight * (mean - mean_);
    if (n > 1)
      deviation_ += options_.weight * (std::sqrt(squares.value() / (n - 1)) - deviation_);
  }
  /// One quality for each norm; NaN for one that is NaN.
  template <class T> void quality(vector_view<const T> norms, vector_view<T> to) const {
    if (to.size != norms.size)
      core::fail(name, "qualities", core::to_text(to.size),
                 core::to_text(norms.size) + " (as many as there are norms)");
    core::require_memory(name, "norms", norms.data, norms.size);
    core::require_memory(name, "qualities", to.data, to.size);
    for (index r = 0; r < norms.size; ++r) {
      const double off = clipped(static_cast<double>(norms[r])) - mean_;
      const double k = options_.concentration * off / (deviation_ + 1e-3);
      to[r] = static_cast<T>(std::clamp(k, -1.0, 1.0));
    }
  }

private:
  static double clipped(double norm) { return std::clamp(norm, 0.001, 100.0); }

  options options_;
  double mean_, deviation_;
};

/// AdaFace: cosine_loss with a margin that depends on the quality k of the row's image, for which
/// the norm of its embedding stands (norm_statistics, whose gradient is stopped):
///
///   ψ(c) = cos( clip(θ − m k, 0.001, π − 0.001) ) − (m + m k)
///   ψ'(c) = sin(θ − m k)/sin θ within the clip, else 0
///
/// k = 1, a good image: a margin of the cosine; k = −1: of the angle. Without qualities all are 0.
/// The code clips the angles of the rivals, too; here they are left alone.
/// A NaN among the qualities makes its row NaN.
/// Source: Kim, Jain, Liu, "AdaFace: quality adaptive margin for face recognition", CVPR 2022.
///
///   perdita::embedding_norms<float>(x, norms);
///   statistics.update<float>(norms);
///   statistics.quality<float>(norms, qualities);
///   perdita::similarity head(perdita::adaface<float>({.quality = qualities}));
///   float value = head(x, class_vectors, labels, d_x, d_class_vectors);
template <class T = float> class adaface : public cosine_loss<adaface<T>, T> {
public:
  struct options {
    T scale = 64;                      ///< s
    T margin = T(0.4);                 ///< m, an angle of 0 to π/2
    vector_view<const T> quality = {}; ///< k of each row, −1 to 1; has to outlive the loss
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "adaface";
  static constexpr const char* own_number = "quality";
  static constexpr loss_traits traits{.convex = false,
                                      .smooth = false,
                                      .exact_gradient = true,
                                      .nonnegative = true,
                                      .shift_invariant = false};

  adaface() : adaface(options{}) {}
  explicit(false) adaface(const options& o) : options_(o) {
    core::require_scale(name, o.scale);
    core::require(o.margin >= 0 &&
                      static_cast<double>(o.margin) <= core::multiplicative_angle::pi / 2,
                  name, "margin", o.margin, "an angle of 0 to pi/2");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::cosine_access;
  core::adaptive_margin map() const { return {static_cast<double>(options_.margin)}; }
  vector_view<const T> numbers() const { return options_.quality; }
  options options_;
};

template <class T> struct magface_options {
  T scale = 64;                                   ///< s
  T least_norm = 10, most_norm = 110;             ///< l and u, above 0
  T least_margin = T(0.45), most_margin = T(0.8); ///< m(l) and m(u): angles of 0 to π
  T regulariser = 35;                             ///< λ, finite
  bool easy_margin = true;                        ///< no margin for c ≤ 0
  std::int64_t ignore_index = -100;
  perdita::reduction reduction = perdita::reduction::mean;
};

namespace core {

/// MagFace as a loss of rows whose norms are known.
template <class T> class magface_rows : public cosine_loss<magface_rows<T>, T> {
public:
  static constexpr const char* name = "magface";
  static constexpr const char* own_number = "norms";

  magface_rows(const magface_options<T>& o, vector_view<const T> norms)
      : options_(o), norms_(norms) {}
  const magface_options<T>& settings() const { return options_; }
  magnitude_margin map() const {
    const auto wide = [](T x) { return static_cast<double>(x); };
    return {wide(options_.least_norm),  wide(options_.most_norm),   wide(options_.least_margin),
            wide(options_.most_margin), wide(options_.regulariser), options_.easy_margin};
  }
  vector_view<const T> numbers() const { return norms_; }

private:
  magface_options<T> options_;
  vector_view<const T> norms_;
};

} // namespace core

/// MagFace: ArcFace (as cosine_loss) with a margin that grows with the norm of the embedding, and a
/// regulariser that makes norms grow:
///
///   a = clip(‖x‖, l, u),  m(a) = m_l + (m_u − m_l)(a − l)/(u − l)
///   ℓ = −log p_y + λ (a/u² + 1/a),   ψ(c) = cos(θ + m(a)) for c > 0, else c (easy_margin)
///   ∂ℓ/∂‖x‖ = −s (1 − p_y) ∂ψ/∂m m'(a) + λ (1/u² − 1/a²) for l ≤ ‖x‖ ≤ u, else 0
///   ∂ψ/∂m = −sin(θ + m) = −c sin m − √(1 − c²) cos m
///
/// Without easy_margin the shifted form of arcface holds for c ≤ −cos m. The regulariser is part of
/// each row's value: weights and reductions have it too.
///
///   loss(cosines, norms, labels, d_cosines, d_norms)               given cosines, rows × classes
///   loss.embedded(x, class_vectors, labels, d_x, d_class_vectors)  on the similarity head; d_x has
///                                                                  the norm's part
/// Call options and everything else as cosine_loss. A zero vector has gradient 0. d_norms is 0 in
/// rows that do not count. Memory: of N rows, 3 numbers each beside the head's.
/// Source: Meng, Zhao, Huang, Zhou, "MagFace", CVPR 2021, and its code.
template <class T = float> class magface {
public:
  using value_type = T;
  using options = magface_options<T>;
  static constexpr const char* name = "magface";
  static constexpr loss_traits traits{.convex = false,
                                      .smooth = false,
                                      .exact_gradient = true,
                                      .nonnegative = false,
                                      .shift_invariant = false};

  magface() : magface(options{}) {}
  explicit(false) magface(const options& o) : options_(o) {
    core::require_scale(name, o.scale);
    core::positive(name, "least_norm", o.least_norm);
    core::require(o.most_norm > o.least_norm && std::isfinite(o.most_norm), name, "most_norm",
                  o.most_norm, "a finite number above least_norm");
    const auto angle = [](const char* what, T m) {
      core::require(m >= 0 && static_cast<double>(m) <= core::multiplicative_angle::pi, name, what,
                    m, "an angle of 0 to pi");
    };
    angle("least_margin", o.least_margin);
    angle("most_margin", o.most_margin);
    core::finite(name, "regulariser", o.regulariser);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  template <class X, core::labels_like L>
  requires core::scores_like<X, T> T operator()(X&& cosines, vector_view<const T> norms, L&& labels,
                                                const call_options<T>& call = {}) const {
    check("norms", norms.size, core::as_matrix(cosines).rows);
    return core::magface_rows<T>(options_, norms)(cosines, labels, call);
  }
  template <class X, core::labels_like L, class G>
  requires core::scores_like<X, T> && core::gradient_like<G, T>
      T operator()(X&& cosines, vector_view<const T> norms, L&& labels, G&& d_cosines,
                   vector_view<T> d_norms, const call_options<T>& call = {}) const {
    const auto of = core::as_vector(labels);
    const core::matrix_data<T> c(core::as_matrix(cosines));
    check("norms", norms.size, c.rows);
    check("gradient of the norms", d_norms.size, c.rows);
    core::require_memory(name, "gradient of the norms", d_norms.data, c.rows);
    // Before the gradient may overwrite them.
    const auto targets = target_cosines(of, c.rows, c.data ? c.cols : 0, [&](index r, index y) {
      T x;
      c.read(r, y, 1, &x);
      return static_cast<double>(x);
    });
    return with_norms(norms, of, targets, d_norms, call, [&](const auto& loss, const auto& mine) {
      return loss(cosines, labels, d_cosines, mine);
    });
  }

  template <class X, class Y, core::labels_like L>
  requires core::scores_like<X, T> && core::scores_like<Y, T>
      T embedded(X&& x, Y&& class_vectors, L&& labels, const call_options<T>& call = {})
  const {
    std::vector<T> norms(static_cast<std::size_t>(core::as_matrix(x).rows));
    embedding_norms<T>(x, norms, call.run_on);
    const similarity head(core::magface_rows<T>(options_, norms));
    return head(x, class_vectors, labels, call);
  }
  template <class X, class Y, core::labels_like L, class DX, class DY>
  requires core::scores_like<X, T> && core::scores_like<Y, T> && core::gradient_like<DX, T> &&
      core::gradient_like<DY, T>
          T embedded(X&& x, Y&& class_vectors, L&& labels, DX&& d_x, DY&& d_class_vectors,
                     const call_options<T>& call = {})
  const {
    const auto of = core::as_vector(labels);
    const core::matrix_data<T> a(core::as_matrix(x)), w(core::as_matrix(class_vectors));
    std::vector<T> norms(static_cast<std::size_t>(a.rows)), d_norms(norms.size());
    embedding_norms<T>(x, norms, call.run_on);
    std::vector<T> one(static_cast<std::size_t>(a.cols)), other(one.size());
    const auto cosine = [&](index r, index y) {
      a.read(r, 0, a.cols, one.data());
      w.read(y, 0, a.cols, other.data());
      const double of_row = core::inverse_norm(one.data(), a.cols),
                   of_class = core::inverse_norm(other.data(), a.cols);
      return core::wide_dot(one.data(), other.data(), a.cols) * of_row * of_class;
    };
    const bool sound = a.cols == w.cols && w.data;
    const auto targets = target_cosines(of, a.rows, sound ? w.rows : 0, cosine);
    const T value = with_norms(
        norms, of, targets, vector_view<T>(d_norms), call, [&](const auto& loss, const auto& mine) {
          return similarity(loss)(x, class_vectors, labels, d_x, d_class_vectors, mine);
        });
    const core::matrix_data<T, true> g(core::as_matrix(d_x));
    for (index r = 0; r < a.rows; ++r) {
      const T slope = d_norms[static_cast<std::size_t>(r)];
      if (slope == 0)
        continue;
      a.read(r, 0, a.cols, one.data());
      const double along = static_cast<double>(slope) * core::inverse_norm(one.data(), a.cols);
      g.reader(g.at(r, 0), g.col_stride, a.cols, other.data());
      for (std::size_t k = 0; k < one.size(); ++k)
        other[k] =
            static_cast<T>(static_cast<double>(other[k]) + along * static_cast<double>(one[k]));
      g.write(r, 0, a.cols, other.data());
    }
    return value;
  }

private:
  static void check(const char* what, index got, index expected) {
    if (got != expected) [[unlikely]]
      core::fail(name, what, core::to_text(got),
                 core::to_text(expected) + " (as many as there are rows)");
  }

  /// cosine(r, y) of the rows whose label is one of so many classes; what is wrong is found later.
  template <class L, class Cosine>
  static std::vector<double> target_cosines(const vector_view<L>& labels, index rows, index classes,
                                            Cosine cosine) {
    std::vector<double> result(static_cast<std::size_t>(rows));
    for (index r = 0; labels.data && labels.size == rows && r < rows; ++r)
      if (const std::int64_t y = core::label_of(labels, r); y >= 0 && y < classes)
        result[static_cast<std::size_t>(r)] = cosine(r, static_cast<index>(y));
    return result;
  }
  /// What run(loss of rows, call) returns, and the slopes of the norms.
  template <class L, class Run>
  T with_norms(vector_view<const T> norms, const vector_view<L>& labels,
               const std::vector<double>& targets, vector_view<T> d_norms,
               const call_options<T>& call, Run run) const {
    const core::magface_rows<T> loss(options_, norms);
    std::vector<T> own(static_cast<std::size_t>(norms.size));
    call_options<T> mine = call;
    if (!call.target_log_probability.data)
      mine.target_log_probability = own;
    const T value = run(loss, mine);

    const std::vector<double> scales = core::gradient_scales(labels, call, options_);
    const auto map = loss.map();
    for (index r = 0; r < norms.size; ++r) {
      const double norm = static_cast<double>(norms[r]),
                   scale = scales[static_cast<std::size_t>(r)];
      double slope = 0;
      if (scale != 0 && !(norm < map.low || norm > map.high)) {
        const double miss = -std::expm1(static_cast<double>(mine.target_log_probability[r]));
        const double by_margin = map(targets[static_cast<std::size_t>(r)], norm).by_margin;
        slope = map.extra_slope(norm) -
                static_cast<double>(options_.scale) * miss * by_margin * map.growth();
        slope *= scale;
      }
      d_norms[r] =
          static_cast<T>(call.accumulate ? static_cast<double>(d_norms[r]) + slope : slope);
    }
    return value;
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
