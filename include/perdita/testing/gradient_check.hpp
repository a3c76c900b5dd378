// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

/// \file
/// Is this gradient the derivative of that function? For Perdita's losses and for any callable of
/// yours; nothing but the standard library is needed.
///
/// The answer has three colours, not two: an entry is right, wrong, or *unresolved*, because at a
/// kink, or under too much rounding noise, differences of values prove nothing. A report says how
/// many entries it could not resolve; a check that resolved none is not ok.

namespace perdita::testing {

/// How hard to look. The defaults suit a smooth function of arguments of ordinary size.
struct gradient_check_options {
  /// Largest accepted |analytic − numeric| / scale. 0 is chosen from the types: 1e-8 if all is
  /// double; 2^-18 ≈ 4e-6 for a gradient stored in float, two epsilons for a narrower one; at least
  /// 2^-11 ≈ 5e-4 for a value returned in float, whose differences cannot show more.
  double tolerance = 0;
  /// An entry's scale is max(|numeric|, floor · the largest numeric entry): what is small beside
  /// the other entries need not be right to more digits than they are.
  double floor = 0.1;
  /// How many uncertainties of the numeric derivative are granted on top of the tolerance.
  double safety = 2;
  /// First and largest step, halved from there. 0 is 0.74 · max(1, |x_i|) for an entry, 0.74 along
  /// a direction (no round number, so that a period of the function is not met by accident).
  double step = 0;
  /// Absolute rounding noise of the value (one standard deviation). 0 is measured.
  double noise = 0;
  /// For check_direction: how many directions, and which.
  std::size_t directions = 8;
  std::uint64_t seed = 0;
};

/// What a check found. Converts to whether the gradient passed; `message()` is one line for a log.
struct gradient_report {
  bool ok = true;             ///< nothing wrong, and something resolved (or nothing to check)
  std::size_t entries = 0;    ///< how many derivatives were compared
  std::size_t wrong = 0;      ///< entries beyond tolerance and uncertainty, or not finite
  std::size_t unresolved = 0; ///< entries whose uncertainty exceeds the tolerance: proves nothing
  std::size_t first_unresolved = 0; ///< the first such entry, if there is one

  // The worst entry: a wrong one before a resolved one before an unresolved one.
  std::size_t worst_index = 0;
  double worst_error = 0; ///< |analytic − numeric| / scale; infinity if either is not finite
  double analytic = 0;
  double numeric = 0;
  double uncertainty = 0; ///< of numeric, absolute

  double tolerance = 0;        ///< the tolerance used, relative to the scale
  double value = 0;            ///< the function at x
  std::size_t evaluations = 0; ///< how often the function was called
  bool directional = false;    ///< entries are directions (check_direction)

  [[nodiscard]] explicit operator bool() const noexcept { return ok; }
  [[nodiscard]] std::string message() const;
};

namespace detail {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

[[nodiscard]] inline std::string text(double number, int digits = 12) {
  std::array<char, 40> buffer{};
  std::snprintf(buffer.data(), buffer.size(), "%.*g", digits, number);
  return buffer.data();
}

[[noreturn]] inline void refuse(const std::string& name, const std::string& got,
                                const std::string& expected) {
#if defined(__cpp_exceptions)
  throw std::invalid_argument("gradient check: " + name + " is " + got + ", expected " + expected);
#else
  std::fprintf(stderr, "gradient check: %s is %s, expected %s\n", name.c_str(), got.c_str(),
               expected.c_str());
  std::abort();
#endif
}

inline void require(bool holds, const char* name, double got, const char* expected) {
  if (!holds)
    refuse(name, text(got), expected);
}

inline void validate(const gradient_check_options& options, std::size_t arguments,
                     std::size_t gradient) {
  if (gradient != arguments)
    refuse("gradient.size()", std::to_string(gradient), "x.size() = " + std::to_string(arguments));
  const std::pair<const char*, double> numbers[] = {{"options.tolerance", options.tolerance},
                                                    {"options.floor", options.floor},
                                                    {"options.safety", options.safety},
                                                    {"options.step", options.step},
                                                    {"options.noise", options.noise}};
  for (const auto& [name, x] : numbers)
    require(x >= 0 && std::isfinite(x), name, x, "a finite number >= 0");
}

/// Machine epsilon of a binary number type, as seen from double. From its digits, since Eigen 3.4
/// gives an epsilon for half that is not.
template <class T> [[nodiscard]] constexpr double epsilon() {
  double result = std::numeric_limits<double>::epsilon();
  if constexpr (std::numeric_limits<T>::is_specialized && !std::numeric_limits<T>::is_integer)
    for (int d = std::numeric_limits<T>::digits; d < std::numeric_limits<double>::digits; ++d)
      result *= 2;
  return result;
}

/// What storing a number in T, after a computation in float if T is no wider, may cost: 32 ulp of
/// float, or the rounding of narrower storage. In double it does not count.
template <class T> [[nodiscard]] constexpr double storage_tolerance() {
  return epsilon<T>() < 1e-10 ? 0 : std::max(0x1p-18, 2 * epsilon<T>());
}

/// `Result` is what the function returns: its differences lose about half of 24 or 53 bits.
template <class Result, class... Stored> [[nodiscard]] constexpr double default_tolerance() {
  return std::max({1e-8, 4096 * epsilon<Result>(), storage_tolerance<Stored>()...});
}

/// A callable may take the point, or look at it where it lies.
template <class Value, class T>
[[nodiscard]] decltype(auto) evaluate(Value& value, std::span<T> x) {
  if constexpr (std::is_invocable_v<Value&, std::span<const T>>) {
    return value(std::span<const T>(x));
  } else if constexpr (std::is_invocable_v<Value&, std::span<T>>) {
    return value(x);
  } else {
    static_assert(std::is_invocable_v<Value&>,
                  "value must be callable with a std::span<const T> of x, or with no argument");
    return value();
  }
}

/// Puts x back, bit for bit, however the scope is left.
template <class T> class restored {
public:
  explicit restored(std::span<T> x) : x_(x), saved_(x.begin(), x.end()) {}
  restored(const restored&) = delete;
  restored& operator=(const restored&) = delete;
  ~restored() { restore(); }

  void restore() { std::copy(saved_.begin(), saved_.end(), x_.begin()); }
  [[nodiscard]] double operator[](std::size_t i) const { return static_cast<double>(saved_[i]); }

private:
  std::span<T> x_;
  std::vector<T> saved_;
};

/// The function under test, at whatever x holds now.
template <class Value, class T> class probe {
public:
  using result =
      std::remove_cvref_t<decltype(evaluate(std::declval<Value&>(), std::declval<std::span<T>>()))>;

  probe(Value& value, std::span<T> x, double noise)
      : value_(value), x_(x), at_x_((*this)()), noise_(noise > 0 ? noise : measured_noise()) {}

  double operator()() {
    ++evaluations_;
    return static_cast<double>(evaluate(value_, x_));
  }
  [[nodiscard]] double at_x() const { return at_x_; }
  [[nodiscard]] std::size_t evaluations() const { return evaluations_; }

  /// What rounding may do to a value: two standard deviations, at least half an ulp. That of at_x()
  /// is left out, for it is common to the slopes of both sides and cancels between them.
  [[nodiscard]] double noise(double value) const {
    const double largest = std::max(std::abs(value), std::abs(at_x_));
    return std::max(2 * noise_, 0.5 * epsilon<result>() * largest);
  }

private:
  /// Fourth differences of nine neighbouring values annihilate a smooth function and multiply the
  /// variance of independent noise by Σ binomial(4, k)² = 70 (Hamming 1962; Moré and Wild 2011).
  /// Every entry moves towards zero (zero itself upwards), which is exact in any binary format and
  /// starts from, but does not cross, a kink at x. A value that takes no notice (it may round its
  /// arguments) is shown larger moves.
  [[nodiscard]] double measured_noise() {
    constexpr int digits = std::numeric_limits<T>::digits;
    constexpr bool wide = digits >= 24;
    constexpr double unit = wide ? 5 : 1;       // not a power of 2, so as to leave coarser grids
    int depth = wide ? digits - 5 : digits - 1; // 16 ulp, or one where ulp are few
    restored<T> home(x_);
    std::array<double, 9> f{at_x_};
    do {
      for (std::size_t k = 1; k < f.size(); ++k) {
        move(home, unit * static_cast<double>(k), depth);
        f[k] = (*this)();
      }
      depth -= 8;
    } while (depth >= 10 && std::all_of(f.begin(), f.end(), [&](double v) { return v == f[0]; }));
    double squares = 0;
    for (std::size_t k = 0; k + 4 < f.size(); ++k) {
      const double d = f[k] - 4 * f[k + 1] + 6 * f[k + 2] - 4 * f[k + 3] + f[k + 4];
      squares += d * d;
    }
    const double noise = std::sqrt(squares / (5 * 70));
    return std::isfinite(noise) ? noise : 0;
  }

  void move(const restored<T>& home, double times, int depth) {
    for (std::size_t i = 0; i < x_.size(); ++i) {
      if (!std::isfinite(home[i]))
        continue;
      const int exponent = home[i] == 0 ? 0 : std::ilogb(home[i]);
      const double step = times * std::ldexp(1.0, exponent - depth);
      x_[i] = static_cast<T>(home[i] > 0 ? home[i] - step : home[i] + step);
    }
  }

  Value& value_;
  std::span<T> x_;
  std::size_t evaluations_ = 0;
  double at_x_;
  double noise_;
};

struct derivative {
  double value = 0;
  double uncertainty = infinity;
};

/// Limit of slopes s(t) = (f(x + t) − f(x)) / t at t = 0, from pairs of slopes on both sides: the
/// values there of the polynomials through the last 4, 6 … 12 slopes (Neville). For steps ±h, ±h/2
/// … these are Richardson's extrapolations of central differences, of order 4 … 12; but the steps
/// need not be equal, so that rounded arguments cost nothing.
///
/// A limit is compared with four neighbours: one pair of slopes fewer, old or new (Ridders), and
/// one slope fewer, old or new. The latter lean to one side, so that a kink at x shows, which
/// central differences alone never see. Agreement by accident is common among so many polynomials:
/// only what two steps in a row confirm is believed.
class slope_limit {
public:
  struct slope {
    double step, value, noise;
  };
  void add(const slope& ahead, const slope& behind) {
    const row older = newest_;
    const row old = extend(older, ahead);
    newest_ = extend(old, behind);
    derivative current;
    for (std::size_t j = 3; j < newest_.size; j += 2) {
      const double limit = newest_.limits[j];
      const double spread = std::max(
          std::max(std::abs(limit - newest_.limits[j - 2]), std::abs(limit - older.limits[j - 2])),
          std::max(std::abs(limit - newest_.limits[j - 1]), std::abs(limit - old.limits[j - 1])));
      const double uncertainty = spread + newest_.noises[j];
      if (uncertainty < current.uncertainty)
        current = {limit + 0.0, uncertainty};
    }
    const auto [calm, wild] = std::minmax(
        previous_, current, [](auto& a, auto& b) { return a.uncertainty < b.uncertainty; });
    if (wild.uncertainty < best_.uncertainty)
      best_ = {calm.value, wild.uncertainty};
    previous_ = current;
  }
  [[nodiscard]] const derivative& best() const { return best_; }

private:
  static constexpr std::size_t order = 12;
  struct row {
    std::array<double, order> steps{};  // newest first
    std::array<double, order> limits{}; // [j]: through the newest j + 1 slopes
    std::array<double, order> noises{};
    std::size_t size = 0;
  };

  [[nodiscard]] static row extend(const row& before, const slope& next) {
    row after;
    after.size = std::min(before.size + 1, order);
    after.limits[0] = next.value;
    after.noises[0] = next.noise;
    for (std::size_t j = 1; j < after.size; ++j) {
      const double far = before.steps[j - 1], width = next.step - far;
      after.limits[j] = (next.step * before.limits[j - 1] - far * after.limits[j - 1]) / width;
      after.noises[j] =
          (std::abs(next.step) * before.noises[j - 1] + std::abs(far) * after.noises[j - 1]) /
          std::abs(width);
    }
    std::copy(before.steps.begin(), before.steps.end() - 1, after.steps.begin() + 1);
    after.steps[0] = next.step;
    return after;
  }

  row newest_;
  derivative previous_;
  derivative best_;
};

/// Derivative along the line that `place` walks: place(h) moves x to the point nearest to h and
/// says how far it really is, and what to take off the value there. Steps are halved until rounding
/// noise alone exceeds the best uncertainty so far, or the storage has no point in between.
template <class Place, class Probe>
[[nodiscard]] derivative differentiate(Place&& place, Probe& f, double h) {
  constexpr int halvings = 30; // down to 1e-9 of the first step
  std::array<slope_limit::slope, 2> pair{{{infinity, 0, 0}, {-infinity, 0, 0}}};
  slope_limit limit;
  bool undefined = false;
  for (int k = 0; k < halvings; ++k, h *= 0.5) {
    bool inside = true, room = true;
    for (slope_limit::slope& s : pair) {
      const auto [step, excess] = place(std::copysign(h, s.step));
      if (!std::isfinite(step)) {
        inside = false;
        continue;
      }
      room = room && step != 0 && std::abs(step) < std::abs(s.step);
      if (!room)
        break;
      const double value = f() - excess;
      s = {step, (value - f.at_x()) / step, f.noise(value) / std::abs(step)};
      if (!std::isfinite(s.value)) {
        inside = false;
        undefined = true;
      }
    }
    if (!room)
      break;
    if (!inside)
      continue;
    limit.add(pair[0], pair[1]);
    if (std::min(pair[0].noise, pair[1].noise) > limit.best().uncertainty)
      break;
  }
  if (undefined && limit.best().uncertainty == infinity)
    return {not_a_number, infinity};
  return limit.best();
}

/// Compares, entry by entry, and remembers the worst.
template <class Analytic>
[[nodiscard]] gradient_report judge(std::span<const Analytic> analytic,
                                    std::span<const derivative> numeric, double tolerance,
                                    const gradient_check_options& options) {
  gradient_report report;
  report.entries = analytic.size();
  report.tolerance = tolerance;
  double largest = 0; // that can be told from zero
  for (const derivative& d : numeric)
    if (std::abs(d.value) > options.safety * d.uncertainty)
      largest = std::max(largest, std::abs(d.value));
  const double least_scale = largest > 0 ? options.floor * largest : 1;

  double worst = -infinity;
  for (std::size_t i = 0; i < analytic.size(); ++i) {
    const double claimed = static_cast<double>(analytic[i]);
    const auto [value, uncertainty] = numeric[i];
    const bool finite = std::isfinite(claimed) && std::isfinite(value);
    const double scale = finite ? std::max(std::abs(value), least_scale) : 1;
    const double error = finite ? std::abs(claimed - value) : infinity;
    const double allowed = tolerance * scale + options.safety * uncertainty;
    const bool wrong = !finite || error > allowed;
    const bool unresolved = finite && !(uncertainty <= tolerance * scale);
    if (wrong)
      ++report.wrong;
    if (unresolved && report.unresolved++ == 0)
      report.first_unresolved = i;

    const double excess = error == 0 ? 0 : finite ? error / allowed : infinity;
    const double rank = unresolved && !wrong ? excess - 2 : excess; // excess <= 1 if not wrong
    if (rank > worst) {
      worst = rank;
      report.worst_index = i;
      report.worst_error = error == 0 ? 0 : error / scale;
      report.analytic = claimed;
      report.numeric = value;
      report.uncertainty = uncertainty;
    }
  }
  report.ok = report.wrong == 0 && (report.entries == 0 || report.unresolved < report.entries);
  return report;
}

/// A fixed fair coin for each (seed, direction, entry): the mixer of SplitMix64 (Steele, Lea and
/// Flood 2014).
[[nodiscard]] inline double coin(std::uint64_t seed, std::uint64_t direction, std::uint64_t entry) {
  const auto mix = [](std::uint64_t z) {
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  };
  return (mix(mix(mix(seed) + direction) + entry) >> 63) != 0 ? 1.0 : -1.0;
}

template <class Value, class T, class G>
[[nodiscard]] gradient_report check_entries(Value& value, std::span<T> x,
                                            std::span<const G> gradient,
                                            const gradient_check_options& options) {
  validate(options, x.size(), gradient.size());
  restored<T> home(x);
  probe<Value, T> f(value, x, options.noise);

  std::vector<derivative> numeric(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (!std::isfinite(f.at_x()))
      numeric[i] = {not_a_number, infinity};
    if (!std::isfinite(f.at_x()) || !std::isfinite(home[i]))
      continue;
    const T original = x[i];
    const auto place = [&](double h) {
      x[i] = static_cast<T>(home[i] + h);
      return std::array<double, 2>{static_cast<double>(x[i]) - home[i], 0.0};
    };
    const double first = options.step > 0 ? options.step : 0.74 * std::max(1.0, std::abs(home[i]));
    numeric[i] = differentiate(place, f, first);
    x[i] = original;
  }
  using result = typename probe<Value, T>::result;
  const double tolerance =
      options.tolerance > 0 ? options.tolerance : default_tolerance<result, G>();
  gradient_report report = judge<G>(gradient, numeric, tolerance, options);
  report.value = f.at_x();
  report.evaluations = f.evaluations();
  return report;
}

/// The report on a gradient that has an entry no direction needs to be walked for.
template <class G>
[[nodiscard]] gradient_report not_finite(std::span<const G> gradient, std::size_t index) {
  gradient_report report;
  report.ok = false;
  report.entries = gradient.size();
  report.wrong = 1;
  report.worst_index = index;
  report.worst_error = infinity;
  report.analytic = static_cast<double>(gradient[index]);
  report.numeric = not_a_number;
  report.uncertainty = infinity;
  return report;
}

template <class Value, class T, class G>
[[nodiscard]] gradient_report check_directions(Value& value, std::span<T> x,
                                               std::span<const G> gradient,
                                               const gradient_check_options& options) {
  validate(options, x.size(), gradient.size());
  require(options.directions > 0, "options.directions", 0, "at least 1");
  for (std::size_t i = 0; i < gradient.size(); ++i)
    if (!std::isfinite(static_cast<double>(gradient[i])))
      return not_finite(gradient, i);
  restored<T> home(x);
  probe<Value, T> f(value, x, options.noise);

  const std::size_t directions = x.empty() ? 0 : options.directions;
  std::vector<derivative> numeric(directions);
  std::vector<double> analytic(directions);
  const double first = options.step > 0 ? options.step : 0.74;
  const auto strays = [&](std::size_t i, double h) { // by more than half of the way
    return !(std::abs(static_cast<double>(static_cast<T>(home[i] + h)) - home[i] - h) <=
             0.5 * std::abs(h));
  };
  for (std::size_t d = 0; d < directions; ++d) {
    for (std::size_t i = 0; i < x.size(); ++i)
      if (std::isfinite(home[i]))
        analytic[d] += coin(options.seed, d, i) * static_cast<double>(gradient[i]);
    if (!std::isfinite(f.at_x())) {
      numeric[d] = {not_a_number, infinity};
      continue;
    }
    // A rounding lands each entry beside x_i ± h: to first order, gradient · (taken − wanted).
    // There is no room for steps of which that is most: the gradient would be compared with itself.
    const auto place = [&](double h) {
      double excess = 0;
      bool room = true;
      for (std::size_t i = 0; i < x.size(); ++i) {
        if (!std::isfinite(home[i]))
          continue;
        const double wanted = coin(options.seed, d, i) * h;
        x[i] = static_cast<T>(home[i] + wanted);
        const double taken = static_cast<double>(x[i]) - home[i];
        excess += static_cast<double>(gradient[i]) * (taken - wanted);
        room = room && (!strays(i, wanted) || strays(i, first));
      }
      return std::array<double, 2>{!std::isfinite(excess) ? infinity : room ? h : 0, excess};
    };
    numeric[d] = differentiate(place, f, first);
    home.restore();
  }
  using result = typename probe<Value, T>::result;
  const double tolerance =
      options.tolerance > 0 ? options.tolerance : default_tolerance<result, T, G>();
  gradient_report report = judge<double>(analytic, numeric, tolerance, options);
  report.value = f.at_x();
  report.evaluations = f.evaluations();
  report.directional = true;
  return report;
}

} // namespace detail

inline std::string gradient_report::message() const {
  if (entries == 0)
    return "gradient ok: it has no entries";
  const char* const unit = directional ? "direction" : "entry";
  const char* const units = entries == 1 ? unit : directional ? "directions" : "entries";
  std::array<char, 128> verdict{}, rest{};
  std::array<char, 384> found{};
  if (wrong > 0)
    std::snprintf(verdict.data(), verdict.size(), "gradient wrong in %zu of %zu %s", wrong, entries,
                  units);
  else
    std::snprintf(verdict.data(), verdict.size(), "gradient %s: %zu %s", ok ? "ok" : "not checked",
                  entries, units);
  if (!std::isfinite(value))
    std::snprintf(found.data(), found.size(), ": the value at x is %.12g", value);
  else
    std::snprintf(found.data(), found.size(),
                  ", %s %s %zu: analytic %.12g, numeric %.12g +- %.2g, relative error %.3g "
                  "(tolerance %.3g)",
                  wrong > 0 ? "worst at" : "closest to the limit at", unit, worst_index, analytic,
                  numeric, uncertainty, worst_error, tolerance);
  if (std::isfinite(value) && unresolved > 0)
    std::snprintf(rest.data(), rest.size(),
                  "; unresolved (a kink, or too much noise): %zu, the first at %s %zu", unresolved,
                  unit, first_unresolved);
  return std::string(verdict.data()) + found.data() + rest.data();
}

/// Checks every entry of a gradient against differences of values.
///
/// Formula: for each entry, the slopes s(t) = (value(x + t e_i) − value(x)) / t at t = ±h, ±h/2, …
/// extrapolated to t = 0 by polynomials of order 4 to 12; the limit with the least uncertainty is
/// kept. Uncertainty: its largest difference to its four neighbours in the tableau + the rounding
/// noise of the values, carried through the tableau; confirmed by the step before or after. An
/// entry is
/// - wrong if |analytic − numeric| > tolerance · scale + safety · uncertainty,
/// - unresolved if uncertainty > tolerance · scale (and wrong too, if it is that far off),
///
/// with scale = max(|numeric|, floor · the largest |numeric|), or 1 if none can be told from zero.
/// The verdict stays when value and gradient are multiplied by one constant. An error of 3
/// tolerances, 3e-8 relative by default, is found in every resolved entry.
///
/// `value` is called with a std::span<const T> of x, or with a std::span<T>, or with nothing (it
/// then looks at x where it lies). It returns a number, whose type tells the least noise to expect.
///
/// `x` is a writable contiguous range of double, float or a narrower type that converts to and from
/// double. It is perturbed in place and is afterwards, also after a throw, what it was, bit for
/// bit. Steps are measured between the rounded arguments, so that float storage costs no accuracy;
/// a value that rounds its arguments itself (computes in float, say) should be given x as it uses
/// it.
///
/// `gradient` is a contiguous range of as many numbers, apart from x.
///
/// Special cases: an analytic or numeric derivative that is not finite is wrong, both infinite
/// alike too; so is every entry if the value at x is not finite. Steps that leave the function's
/// domain are passed over, but an x on its edge has no two-sided derivative and is wrong. An entry
/// of x that is not finite (a masked class) cannot be moved and is unresolved. At a kink every
/// gradient between the one-sided slopes is unresolved, not wrong. No entries: ok. Not meaningful
/// under -ffast-math.
///
/// Cost: 9 evaluations to measure the noise (41 if the value hardly moves) and, for each entry,
/// some 15 to 30 for a smooth value, at most 60. Memory: two copies of x and two doubles for each
/// entry.
///
/// Throws std::invalid_argument (aborts where exceptions are off) if the sizes differ or an option
/// is negative or not finite; what `value` throws passes through.
///
/// Source: C. J. F. Ridders, Accurate computation of F'(x) and F'(x) F''(x), Advances in
/// Engineering Software 4 (1982) 75–76; the noise: J. J. Moré and S. M. Wild, Estimating
/// computational noise, SIAM J. Sci. Comput. 33 (2011) 1292–1314.
///
///     std::vector<double> x{1, 2}, gradient{2, 4};
///     auto squares = [](std::span<const double> v) { return v[0] * v[0] + v[1] * v[1]; };
///     auto report = perdita::testing::check_gradient(squares, x, gradient);  // report.ok
template <class Value, class X, class Gradient>
[[nodiscard]] gradient_report check_gradient(Value&& value, X&& x, const Gradient& gradient,
                                             const gradient_check_options& options = {}) {
  const std::span arguments(x);
  const std::span analytic(gradient);
  using T = typename decltype(arguments)::element_type;
  using G = typename decltype(analytic)::value_type;
  static_assert(!std::is_const_v<T>, "x must be writable: it is perturbed, and restored");
  return detail::check_entries(value, std::span<T>(arguments), std::span<const G>(analytic),
                               options);
}

/// Checks a gradient of any size with a few evaluations: along `options.directions` fixed
/// pseudo-random directions v of ±1, the derivative of t ↦ value(x + t v) against Σ gradient_i v_i.
///
/// Everything else is as for check_gradient, with directions in the place of entries. An error e in
/// one entry shows in every direction whose scale is below |e| / (3 · tolerance); scales are about
/// the Euclidean norm of the gradient. Errors of opposite sign in two entries hide from all
/// directions with probability 2^-directions.
///
/// An entry of the gradient that is not finite is reported by its own index, and `value` is not
/// called. Entries of x that are not finite, or too large for the first step to move them, do not
/// count. A tolerance of 0 is chosen from the storage of x as well: the rounding of many arguments
/// at once is corrected to first order only.
///
/// Cost: 9 to 41 evaluations and, for each direction, some 15 to 30, at most 60. Memory: two copies
/// of x.
///
/// Throws std::invalid_argument also if `options.directions` is 0.
///
///     std::vector<double> x(1'000'000, 0.5), gradient(x.size(), 1.0);
///     auto squares = [&] { double sum = 0; for (double v : x) sum += v * v; return sum; };
///     auto report = perdita::testing::check_direction(squares, x, gradient);  // report.ok
template <class Value, class X, class Gradient>
[[nodiscard]] gradient_report check_direction(Value&& value, X&& x, const Gradient& gradient,
                                              const gradient_check_options& options = {}) {
  const std::span arguments(x);
  const std::span analytic(gradient);
  using T = typename decltype(arguments)::element_type;
  using G = typename decltype(analytic)::value_type;
  static_assert(!std::is_const_v<T>, "x must be writable: it is perturbed, and restored");
  return detail::check_directions(value, std::span<T>(arguments), std::span<const G>(analytic),
                                  options);
}

} // namespace perdita::testing
