// SPDX-License-Identifier: MIT
#pragma once

/// Binary classification: a score x and a label y = ±1, element by element. A margin loss is a
/// function φ of the margin m = y x:
///
///   ℓ = φ(m),  ∂ℓ/∂x = y φ'(m),  ∂²ℓ/∂x² = y² φ''(m)
///
///   perdita::hinge<float> loss({.labels = perdita::binary_labels::zero_one});
///   float value = loss(scores, labels, gradient);
///
/// and bce_logits is cross-entropy with targets anywhere in [0, 1]. Shapes, reductions, call
/// options, NaN and errors: as element.hpp. Labels, of any real or integral type, are not checked:
/// one other than ±1 scales the margin.

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numbers>
#include <type_traits>
#include <vector>

#include "core/element_kernel.hpp"
#include "core/math.hpp"

namespace perdita::inline PERDITA_ABI {

/// How labels are written: −1 and 1, or 0 and 1.
enum class binary_labels { signed_one, zero_one };

struct margin_options {
  binary_labels labels = binary_labels::signed_one;
  perdita::reduction reduction = perdita::reduction::mean;
};

/// What a margin loss promises of φ.
struct margin_traits {
  bool convex;
  bool smooth;      ///< differentiable everywhere
  bool nonnegative; ///< never below 0
  bool calibrated;  ///< classification-calibrated: its least risk has the sign of the Bayes rule
  double lipschitz; ///< least upper bound of |φ'|; infinite where there is none
};

namespace core {

/// φ(m), φ'(m) and φ''(m).
template <class V> using margin_outcome = element_outcome<V>;

template <class T, class Function> struct margin_formula : element_formula {
  Function phi;
  T step, origin; ///< y = step · label + origin

  template <class V>
  PERDITA_INLINE element_outcome<V> operator()(const V& x, const V& label) const {
    const V y = fma(label, V(step), V(origin));
    const margin_outcome<V> at = phi(y * x);
    return {at.value, y * at.slope, (y * y) * at.curvature};
  }
};

/// Both tails of the logistic function from one exponential, e^−|m|.
template <class V> struct logistic_tails {
  V e, above, below; ///< 1/(1 + e^−m) and 1/(1 + e^m)

  PERDITA_INLINE explicit logistic_tails(const V& m)
      : e(detail::exp_from(-abs(m), V(detail::constants_of<V>::least_exp))) {
    const V large = V(1) / (V(1) + e), small = e * large;
    const auto positive = m > V(0);
    above = select(positive, large, small);
    below = select(positive, small, large);
  }
  /// log(1 + e), as in softplus()
  PERDITA_INLINE V log_sum() const {
    using T = typename V::value_type;
    const auto large = e >= V(T(0.5));
    const V f = select(large, fma(e, V(T(0.5)), V(T(-0.5))), e); // exact
    return detail::log_from(select(large, V(1), V(0)), f, V(0));
  }
};

struct logistic_function {
  template <class V> PERDITA_INLINE margin_outcome<V> operator()(const V& m) const {
    const logistic_tails<V> s(m);
    return {max(V(0), -m) + s.log_sum(), -s.below, s.above * s.below};
  }
};

struct hinge_function {
  template <class V> PERDITA_INLINE margin_outcome<V> operator()(const V& m) const {
    const V miss = V(1) - m;
    return {max(V(0), miss), unless_nan(m, select(miss > V(0), V(-1), V(0))), unless_nan(m, V(0))};
  }
};

struct squared_hinge_function {
  template <class V> PERDITA_INLINE margin_outcome<V> operator()(const V& m) const {
    const V miss = max(V(0), V(1) - m);
    return {miss * miss, V(-2) * miss, unless_nan(m, select(miss > V(0), V(2), V(0)))};
  }
};

template <class T> struct smoothed_hinge_function {
  T gamma;
  template <class V> PERDITA_INLINE margin_outcome<V> operator()(const V& m) const {
    const V miss = max(V(0), V(1) - m), share = miss / V(gamma);
    const auto bent = miss < V(gamma);
    return {select(bent, miss * share * V(T(0.5)), miss - V(gamma * T(0.5))),
            unless_nan(m, select(bent, -share, V(-1))),
            unless_nan(m, select(bent & (miss > V(0)), V(1) / V(gamma), V(0)))};
  }
};

struct exponential_function {
  template <class V> PERDITA_INLINE margin_outcome<V> operator()(const V& m) const {
    const V e = exp(-m);
    return {e, -e, e};
  }
};

struct square_function {
  template <class V> PERDITA_INLINE margin_outcome<V> operator()(const V& m) const {
    const V miss = V(1) - m;
    return {miss * miss, V(-2) * miss, unless_nan(m, V(2))};
  }
};

struct modified_huber_function {
  template <class V> PERDITA_INLINE margin_outcome<V> operator()(const V& m) const {
    const V miss = max(V(0), V(1) - m);
    const auto bent = m >= V(-1);
    return {select(bent, miss * miss, V(-4) * m), unless_nan(m, select(bent, V(-2) * miss, V(-4))),
            unless_nan(m, select(bent & (miss > V(0)), V(2), V(0)))};
  }
};

/// With σ = 1/(1 + e^2m):  σ²,  −4 σ² (1 − σ),  8 σ² (1 − σ)(2 − 3σ).
struct savage_function {
  template <class V> PERDITA_INLINE margin_outcome<V> operator()(const V& m) const {
    const logistic_tails<V> s(m + m);
    const V square = s.below * s.below, steep = square * s.above;
    return {square, V(-4) * steep, V(8) * steep * fnma(V(3), s.below, V(2))};
  }
};

template <class T> struct arctangent_constants;
/// (atan(z)/z − 1)/z², in z², on |z| ≤ tan(π/8): interpolated at Chebyshev's nodes, 2^-28 and 2^-57
/// of atan(z).
template <> struct arctangent_constants<float> {
  static constexpr std::array<float, 5> c{-0x1.555554p-2F, 0x1.999730p-3F, -0x1.242032p-3F,
                                          0x1.b80feap-4F, -0x1.084476p-4F};
};
template <> struct arctangent_constants<double> {
  static constexpr std::array<double, 11> c{
      -0x1.5555555555555p-2, 0x1.999999999934bp-3, -0x1.2492492436180p-3, 0x1.c71c7185386f1p-4,
      -0x1.745d0b27da190p-4, 0x1.3b1262f3a2b5bp-4, -0x1.10fa76aa9b02cp-4, 0x1.dfe637a48099bp-5,
      -0x1.a0993ef875d4ap-5, 0x1.4161b24be475bp-5, -0x1.3a2f1cc1ba3c4p-6};
};

/// With a = 2 atan(m) − 1 and q = m² or, where |m| > 1, 1/m²:
/// a²,  4a/(1 + m²),  (8 − 8 m a)/(1 + m²)².
struct tangent_function {
  template <class V> PERDITA_INLINE margin_outcome<V> operator()(const V& m) const {
    using T = typename V::value_type;
    const V size = abs(m), one(1);
    const auto outside = size > one;
    const V w = select(outside, one / size, size);
    // atan w = π/4 + atan((w − 1)/(w + 1)) brings it to |z| ≤ tan(π/8)
    const auto far = w > V(T(0.41421356237309505));
    const V z = select(far, (w - one) / (w + one), w), z2 = z * z;
    const V rest = detail::polynomial(z2, z2 * z2, arctangent_constants<T>::c);
    const V near = fma(z * z2, rest, z);
    const V angle = select(far, near + V(std::numbers::pi_v<T> / 4), near);
    const V all = select(outside, V(std::numbers::pi_v<T> / 2) - angle, angle);
    const V a = with_sign_of(m, all + all) - one;

    const V q = w * w, v = one / (one + q);                                   // of 1/(1 + m²)
    const V share = select(outside, q * v, v), lean = with_sign_of(m, w * v); // m/(1 + m²)
    return {a * a, V(4) * a * share, V(8) * share * fnma(lean, a, share)};
  }
};

struct unhinged_function {
  template <class V> PERDITA_INLINE margin_outcome<V> operator()(const V& m) const {
    return {V(1) - m, unless_nan(m, V(-1)), unless_nan(m, V(0))};
  }
};

/// With L = log(1 + e^−|x|):  ℓ = p t (L + [−x]₊) + (1 − t)(L + [x]₊), terms of one sign.
struct bce_formula_base : element_formula {
  template <class V>
  PERDITA_INLINE element_outcome<V> from(const V& x, const V& t, const V& weight) const {
    const logistic_tails<V> s(x);
    const V hit = weight * t, miss = V(1) - t, l = s.log_sum(), zero(0);
    return {weighted(hit, max(zero, -x) + l) + weighted(miss, max(zero, x) + l),
            miss * s.above - hit * s.below, (miss + hit) * (s.above * s.below)};
  }
};
template <class T> struct bce_formula : bce_formula_base {
  T weight;
  template <class V> PERDITA_INLINE element_outcome<V> operator()(const V& x, const V& t) const {
    return from(x, t, V(weight));
  }
};
struct bce_formula_of_three : bce_formula_base {
  static constexpr int inputs = 3;
  template <class V>
  PERDITA_INLINE element_outcome<V> operator()(const V& x, const V& t, const V& weight) const {
    return from(x, t, weight);
  }
};

inline void require_labels(const char* loss, binary_labels labels) {
  require(labels == binary_labels::signed_one || labels == binary_labels::zero_one, loss, "labels",
          static_cast<int>(labels), "signed_one or zero_one");
}

} // namespace core

/// Base of the margin losses: Derived declares its name, settings(), among them labels and
/// reduction, and, open to core::element_access, function(), which makes φ.
template <class Derived, class T> class margin_loss : public element_loss<Derived, T> {
private:
  friend core::element_access;
  template <class F> auto visit(F f) const {
    const auto& self = static_cast<const Derived&>(*this);
    const auto phi = core::element_access::function(self);
    const bool zero_one = self.settings().labels == binary_labels::zero_one;
    return f(core::margin_formula<T, std::remove_const_t<decltype(phi)>>{
        {}, phi, T(zero_one ? 2 : 1), T(zero_one ? -1 : 0)});
  }
};

/// Logistic loss: cross-entropy of one score.
///
///   φ = log(1 + e^−m),  φ' = −1/(1 + e^m),  φ'' = 1/((1 + e^m)(1 + e^−m))
///
/// Tails below the normal range are 0. Source: Cox, "The regression analysis of binary sequences",
/// 1958.
template <class T = float> class logistic : public margin_loss<logistic<T>, T> {
public:
  using options = margin_options;
  static constexpr const char* name = "logistic";
  static constexpr margin_traits traits{
      .convex = true, .smooth = true, .nonnegative = true, .calibrated = true, .lipschitz = 1};

  logistic() : logistic(options{}) {}
  explicit(false) logistic(const options& o) : options_(o) {
    core::require_labels(name, o.labels);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::element_access;
  core::logistic_function function() const { return {}; }
  options options_;
};

/// Hinge loss:
///
///   φ = max(0, 1 − m),  φ' = −1 for m < 1, else 0 (at the kink too),  φ'' = 0
///
/// Source: Cortes and Vapnik, "Support-vector networks", 1995.
template <class T = float> class hinge : public margin_loss<hinge<T>, T> {
public:
  using options = margin_options;
  static constexpr const char* name = "hinge";
  static constexpr margin_traits traits{
      .convex = true, .smooth = false, .nonnegative = true, .calibrated = true, .lipschitz = 1};

  hinge() : hinge(options{}) {}
  explicit(false) hinge(const options& o) : options_(o) {
    core::require_labels(name, o.labels);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::element_access;
  core::hinge_function function() const { return {}; }
  options options_;
};

/// Squared hinge loss:
///
///   φ = max(0, 1 − m)²,  φ' = −2 max(0, 1 − m),  φ'' = 2 for m < 1, else 0
template <class T = float> class squared_hinge : public margin_loss<squared_hinge<T>, T> {
public:
  using options = margin_options;
  static constexpr const char* name = "squared_hinge";
  static constexpr margin_traits traits{.convex = true,
                                        .smooth = true,
                                        .nonnegative = true,
                                        .calibrated = true,
                                        .lipschitz = std::numeric_limits<double>::infinity()};

  squared_hinge() : squared_hinge(options{}) {}
  explicit(false) squared_hinge(const options& o) : options_(o) {
    core::require_labels(name, o.labels);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::element_access;
  core::squared_hinge_function function() const { return {}; }
  options options_;
};

/// Smoothed hinge loss; with h = max(0, 1 − m):
///
///   φ = h²/(2γ) for h < γ, else h − γ/2,  φ' = −min(1, h/γ),  φ'' = 1/γ for 0 < h < γ, else 0
///
/// γ = 1: Rennie's; γ → 0: hinge. Source: Rennie and Srebro, "Loss functions for preference
/// levels", 2005; Shalev-Shwartz and Zhang, "Stochastic dual coordinate ascent methods", JMLR 2013.
template <class T = float> class smoothed_hinge : public margin_loss<smoothed_hinge<T>, T> {
public:
  struct options {
    T gamma = 1; ///< γ > 0
    binary_labels labels = binary_labels::signed_one;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "smoothed_hinge";
  static constexpr margin_traits traits{
      .convex = true, .smooth = true, .nonnegative = true, .calibrated = true, .lipschitz = 1};

  smoothed_hinge() : smoothed_hinge(options{}) {}
  explicit(false) smoothed_hinge(const options& o) : options_(o) {
    core::require(o.gamma > 0 && std::isfinite(o.gamma), name, "gamma", o.gamma,
                  "a finite number above 0");
    core::require_labels(name, o.labels);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::element_access;
  core::smoothed_hinge_function<T> function() const { return {options_.gamma}; }
  options options_;
};

/// Exponential loss, that of AdaBoost:
///
///   φ = e^−m,  φ' = −e^−m,  φ'' = e^−m
///
/// Infinite where e^−m overflows, 0 where it is below the normal range. Source: Freund and
/// Schapire, "A decision-theoretic generalization of on-line learning", 1997.
template <class T = float> class exponential : public margin_loss<exponential<T>, T> {
public:
  using options = margin_options;
  static constexpr const char* name = "exponential";
  static constexpr margin_traits traits{.convex = true,
                                        .smooth = true,
                                        .nonnegative = true,
                                        .calibrated = true,
                                        .lipschitz = std::numeric_limits<double>::infinity()};

  exponential() : exponential(options{}) {}
  explicit(false) exponential(const options& o) : options_(o) {
    core::require_labels(name, o.labels);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::element_access;
  core::exponential_function function() const { return {}; }
  options options_;
};

/// Square loss of the margin, (y − x)² where y = ±1:
///
///   φ = (1 − m)²,  φ' = −2 (1 − m),  φ'' = 2
template <class T = float> class square_margin : public margin_loss<square_margin<T>, T> {
public:
  using options = margin_options;
  static constexpr const char* name = "square_margin";
  static constexpr margin_traits traits{.convex = true,
                                        .smooth = true,
                                        .nonnegative = true,
                                        .calibrated = true,
                                        .lipschitz = std::numeric_limits<double>::infinity()};

  square_margin() : square_margin(options{}) {}
  explicit(false) square_margin(const options& o) : options_(o) {
    core::require_labels(name, o.labels);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::element_access;
  core::square_function function() const { return {}; }
  options options_;
};

/// Modified Huber loss; with h = max(0, 1 − m):
///
///   φ = h² for m ≥ −1, else −4m,  φ' = −2h or −4,  φ'' = 2 for −1 ≤ m < 1, else 0
///
/// Source: Zhang, "Solving large scale linear prediction problems using stochastic gradient descent
/// algorithms", ICML 2004.
template <class T = float> class modified_huber : public margin_loss<modified_huber<T>, T> {
public:
  using options = margin_options;
  static constexpr const char* name = "modified_huber";
  static constexpr margin_traits traits{
      .convex = true, .smooth = true, .nonnegative = true, .calibrated = true, .lipschitz = 4};

  modified_huber() : modified_huber(options{}) {}
  explicit(false) modified_huber(const options& o) : options_(o) {
    core::require_labels(name, o.labels);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::element_access;
  core::modified_huber_function function() const { return {}; }
  options options_;
};

/// Savage loss, bounded, for wrong labels; with σ = 1/(1 + e^2m):
///
///   φ = σ²,  φ' = −4 σ² (1 − σ),  φ'' = 8 σ² (1 − σ)(2 − 3σ)
///
/// Tails below the normal range are 0. Source: Masnadi-Shirazi and Vasconcelos, "On the design of
/// loss functions for classification", NIPS 2008.
template <class T = float> class savage : public margin_loss<savage<T>, T> {
public:
  using options = margin_options;
  static constexpr const char* name = "savage";
  static constexpr margin_traits traits{.convex = false,
                                        .smooth = true,
                                        .nonnegative = true,
                                        .calibrated = true,
                                        .lipschitz = 16.0 / 27};

  savage() : savage(options{}) {}
  explicit(false) savage(const options& o) : options_(o) {
    core::require_labels(name, o.labels);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::element_access;
  core::savage_function function() const { return {}; }
  options options_;
};

/// Tangent loss, which is bounded and also punishes margins above tan ½; with a = 2 atan(m) − 1:
///
///   φ = a²,  φ' = 4a/(1 + m²),  φ'' = 8 (1 − m a)/(1 + m²)²
///
/// Near m = tan ½, where a is about 0, only the digits of atan are right. Source: Masnadi-Shirazi,
/// Mahadevan, Vasconcelos, "On the design of robust classifiers for computer vision", CVPR 2010.
template <class T = float> class tangent : public margin_loss<tangent<T>, T> {
public:
  using options = margin_options;
  static constexpr const char* name = "tangent";
  static constexpr margin_traits traits{.convex = false,
                                        .smooth = true,
                                        .nonnegative = true,
                                        .calibrated = true,
                                        .lipschitz = 6.168571308828051};

  tangent() : tangent(options{}) {}
  explicit(false) tangent(const options& o) : options_(o) {
    core::require_labels(name, o.labels);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::element_access;
  core::tangent_function function() const { return {}; }
  options options_;
};

/// Unhinged loss, which is not bounded below: the scores need a bound.
///
///   φ = 1 − m,  φ' = −1,  φ'' = 0
///
/// Source: van Rooyen, Menon, Williamson, "Learning with symmetric label noise: the importance of
/// being unhinged", NIPS 2015.
template <class T = float> class unhinged : public margin_loss<unhinged<T>, T> {
public:
  using options = margin_options;
  static constexpr const char* name = "unhinged";
  static constexpr margin_traits traits{
      .convex = true, .smooth = true, .nonnegative = false, .calibrated = true, .lipschitz = 1};

  unhinged() : unhinged(options{}) {}
  explicit(false) unhinged(const options& o) : options_(o) {
    core::require_labels(name, o.labels);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::element_access;
  core::unhinged_function function() const { return {}; }
  options options_;
};

/// Binary cross-entropy of logits, as PyTorch's binary_cross_entropy_with_logits:
///
///   ℓ = p t log(1 + e^−x) + (1 − t) log(1 + e^x)
///   ∂ℓ/∂x = (1 − t) σ(x) − p t σ(−x),  ∂²ℓ/∂x² = (p t + 1 − t) σ(x) σ(−x),  σ(x) = 1/(1 + e^−x)
///
/// with targets t in [0, 1] and the weight p ≥ 0 of positives: 1, one number for all, or one per
/// column (element of a vector). No term cancels another: p t σ(−x) keeps its digits where
/// PyTorch's (1 + (p − 1) t) σ(x) − p t has none. An infinite x is right (ℓ = 0) or infinitely
/// wrong; PyTorch: NaN. mean divides by the number of elements, whatever their weights are.
/// Throws also where the number of pos_weight is neither 0, 1 nor that of the columns.
template <class T = float> class bce_logits : public element_loss<bce_logits<T>, T> {
public:
  struct options {
    vector_view<const T> pos_weight{}; ///< copied
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "bce_logits";
  static constexpr bool mean_counts_elements = true;

  bce_logits() : bce_logits(options{}) {}
  explicit(false) bce_logits(const options& o) : options_(o) {
    core::require_reduction(name, o.reduction);
    core::require(o.pos_weight.data || o.pos_weight.size == 0, name, "memory of pos_weight", 0,
                  "a pointer that is not null");
    for (index i = 0; i < o.pos_weight.size; ++i) {
      const T weight = o.pos_weight[i];
      if (!(weight >= 0 && std::isfinite(weight)))
        core::fail_at(name, "pos_weight", i, core::to_text(weight), "a finite number, 0 or more");
      pos_weight_.push_back(weight);
    }
    options_.pos_weight = {};
  }
  const options& settings() const { return options_; }
  const std::vector<T>& pos_weight() const { return pos_weight_; }
  element_traits traits() const {
    double most = 1;
    for (const T weight : pos_weight_)
      most = std::max(most, static_cast<double>(weight));
    return {.convex = true, .smooth = true, .nonnegative = true, .lipschitz = most};
  }

private:
  friend core::element_access;
  template <class F> auto visit(F f) const {
    if (pos_weight_.size() > 1)
      return f(core::bce_formula_of_three{});
    return f(core::bce_formula<T>{{}, pos_weight_.empty() ? T(1) : pos_weight_[0]});
  }
  void add_inputs(core::element_job<T>& job) const {
    const auto size = static_cast<index>(pos_weight_.size());
    if (size < 2)
      return;
    const index rows = job.in[0].rows(), cols = job.in[0].cols();
    core::require(size == cols, name, "size of pos_weight", size, "0, 1 or the number of columns");
    this->set_input(job, 2, "pos_weight",
                    matrix_view<const T>(pos_weight_.data(), rows, cols, 0, 1));
  }
  options options_;
  std::vector<T> pos_weight_;
};

} // namespace perdita::inline PERDITA_ABI
