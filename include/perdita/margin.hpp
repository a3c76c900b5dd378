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
  binary_labels labels = binary_labels::signed_one; ///< how labels are written
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
    const V y = sign(label);
    return of_prediction(y, phi(y * x));
  }
  template <class V> PERDITA_INLINE V early(const V& x, const V& label) const requires requires {
    phi.early(x);
  }
  { return phi.early(sign(label) * x); }
  template <class V>
  PERDITA_INLINE element_outcome<V> late(const V& x, const V& label, const V& early) const {
    const V y = sign(label);
    return of_prediction(y, phi.late(y * x, early));
  }

private:
  template <class V> PERDITA_INLINE V sign(const V& label) const {
    return fma(label, V(step), V(origin));
  }
  template <class V>
  static PERDITA_INLINE element_outcome<V> of_prediction(const V& y, const margin_outcome<V>& at) {
    return {at.value, y * at.slope, (y * y) * at.curvature};
  }
};

/// e = e^−|m| and what it makes of the logistic function.
template <class V> struct logistic_tails {
  V e, mirror; ///< and −e/(1 + e) = −1/(1 + e^|m|)
  pack_mask<typename V::value_type> positive;

  static PERDITA_INLINE V early(const V& m) { return exp_minus(abs(m)); }
  PERDITA_INLINE logistic_tails(const V& m, const V& early)
      : e(early), mirror(e / (V(-1) - e)), positive(m > V(0)) {}
  /// −1/(1 + e^m)
  PERDITA_INLINE V minus_below() const { return select(positive, mirror, V(-1) - mirror); }
  /// e^m/(1 + e^m)²
  PERDITA_INLINE V product() const { return fnma(mirror, mirror, -mirror); }
};

struct logistic_function {
  template <class V> PERDITA_INLINE margin_outcome<V> operator()(const V& m) const {
    return late(m, early(m));
  }
  template <class V> PERDITA_INLINE V early(const V& m) const {
    return logistic_tails<V>::early(m);
  }
  template <class V> PERDITA_INLINE margin_outcome<V> late(const V& m, const V& early) const {
    const logistic_tails<V> s(m, early);
    return {max(V(0), -m) + log1p_beside(s.e, s.mirror), s.minus_below(), s.product()};
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
    const V miss = max(V(0), V(1) - m), share = min(V(1), miss / V(gamma));
    const auto bent = miss < V(gamma);
    return {share * fnma(V(gamma * T(0.5)), share, miss), -share,
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
    return {select(bent, miss * miss, V(-4) * m), max(V(-4), V(-2) * miss),
            unless_nan(m, select(bent & (miss > V(0)), V(2), V(0)))};
  }
};

/// With σ = 1/(1 + e^2m):  σ²,  −4 σ² (1 − σ),  8 σ² (1 − σ)(2 − 3σ).
struct savage_function {
  template <class V> PERDITA_INLINE margin_outcome<V> operator()(const V& m) const {
    const logistic_tails<V> s(m + m, logistic_tails<V>::early(m + m));
    const V large = V(1) / (s.e + V(1)), small = s.e * large;
    const V below = select(s.positive, small, large), steep = below * (large * small);
    return {below * below, V(-4) * steep, V(8) * steep * fnma(V(3), below, V(2))};
  }
};

template <class T> struct arctangent_constants;
/// (atan(w)/w − 1)/w², in w², on |w| ≤ 1: minimax fits (Remez), 2^-25 and 2^-54 of atan(w).
template <> struct arctangent_constants<float> {
  static constexpr std::array<float, 9> c{-0x1.55553ep-2F, 0x1.9991fep-3F,  -0x1.2421b4p-3F,
                                          0x1.c099f6p-4F,  -0x1.583478p-4F, 0x1.dac98ep-5F,
                                          -0x1.fed0aep-6F, 0x1.65a598p-7F,  -0x1.d62e86p-10F};
};
template <> struct arctangent_constants<double> {
  static constexpr std::array<double, 20> c{
      -0x1.5555555555526p-2, 0x1.999999999554ap-3,  -0x1.249249237e2adp-3,  0x1.c71c717f95d98p-4,
      -0x1.745d11ab04e4dp-4, 0x1.3b136676a234ap-4,  -0x1.110e5020fb216p-4,  0x1.e1bb9b446a4d9p-5,
      -0x1.ae5e44b82a1a8p-5, 0x1.82da4559e3f87p-5,  -0x1.59a2959780ddbp-5,  0x1.2c2ba1a219742p-5,
      -0x1.e9f1c9c9b68dep-6, 0x1.68330cc073cdep-6,  -0x1.c77e23df1a296p-7,  0x1.d7a0fcdd9b4b6p-8,
      -0x1.7a217d28e9acfp-9, 0x1.b3d9b0b1c674fp-11, -0x1.3f1a5d1fc7ca9p-13, 0x1.bbc1ee9fbbf36p-17};
};

/// With a = 2 atan(m) − 1:  a²,  4a/(1 + m²),  (8 − 8 m a)/(1 + m²)²; atan m = π/2 − atan(1/m)
/// brings it to |m| ≤ 1.
struct tangent_function {
  template <class V> PERDITA_INLINE margin_outcome<V> operator()(const V& m) const {
    using T = typename V::value_type;
    const V size = abs(m), one(1);
    const V w = min(one / size, size), w2 = w * w;
    const V rest = detail::polynomial(w2, w2 * w2, arctangent_constants<T>::c);
    const V angle = fma(w * w2, rest, w);
    const V all = select(size > one, V(std::numbers::pi_v<T> / 2) - angle, angle);
    const V a = with_sign_bit(all + all, m, size) - one;

    const V share = one / fma(size, size, one);            // 1/(1 + m²)
    const V lean = with_sign_bit(w / (one + w2), m, size); // m/(1 + m²)
    return {a * a, V(4) * a * share, V(8) * share * fnma(lean, a, share)};
  }
};

struct unhinged_function {
  template <class V> PERDITA_INLINE margin_outcome<V> operator()(const V& m) const {
    return {V(1) - m, unless_nan(m, V(-1)), unless_nan(m, V(0))};
  }
};

/// With L = log(1 + e^−|x|), a = p t + 1 − t, and for x > 0 (else with p t instead of 1 − t, and
/// the slope's sign):  a L + (1 − t) |x|,  1 − t − a/(1 + e^|x|).
struct bce_formula_base : element_formula {
  template <class V>
  PERDITA_INLINE element_outcome<V> from(const V& x, const V& t, const V& weight,
                                         const V& early) const {
    const logistic_tails<V> s(x, early);
    const V hit = weight * t, miss = V(1) - t, all = miss + hit;
    const V wrong = select(s.positive, miss, hit), size = fma(all, s.mirror, wrong);
    return {fma(all, log1p_beside(s.e, s.mirror), weighted(wrong, abs(x))),
            select(s.positive, size, -size), all * s.product()};
  }
};
template <class T> struct bce_formula : bce_formula_base {
  T weight;
  template <class V> PERDITA_INLINE V early(const V& x, const V&) const {
    return logistic_tails<V>::early(x);
  }
  template <class V>
  PERDITA_INLINE element_outcome<V> late(const V& x, const V& t, const V& early) const {
    return from(x, t, V(weight), early);
  }
};
struct bce_formula_of_three : bce_formula_base {
  static constexpr int inputs = 3;
  template <class V> PERDITA_INLINE V early(const V& x, const V&, const V&) const {
    return logistic_tails<V>::early(x);
  }
  template <class V>
  PERDITA_INLINE element_outcome<V> late(const V& x, const V& t, const V& weight,
                                         const V& early) const {
    return from(x, t, weight, early);
  }
};

inline void require_labels(const char* loss, binary_labels labels) {
  require_enumerator(loss, "labels", labels, binary_labels::zero_one, "signed_one or zero_one");
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
    core::positive(name, "gamma", o.gamma);
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
    core::set_input(job, 2, "pos_weight",
                    matrix_view<const T>(pos_weight_.data(), rows, cols, 0, 1));
  }
  options options_;
  std::vector<T> pos_weight_;
};

} // namespace perdita::inline PERDITA_ABI
