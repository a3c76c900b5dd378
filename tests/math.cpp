// SPDX-License-Identifier: MIT

// core/math.hpp against wider arithmetic: every bound in its comments is asserted here.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include <perdita/core/math.hpp>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/wide.hpp"

namespace {

namespace core = perdita::core;
using core::pack;

template <class T> using limits = std::numeric_limits<T>;
template <class T> using wide = std::conditional_t<sizeof(T) == 4, double, perdita_tests::wide>;
template <class T> using unsigned_of = std::make_unsigned_t<core::bits_of<T>>;

template <class T> unsigned_of<T> bits(T x) { return std::bit_cast<unsigned_of<T>>(x); }
template <class T> T real(unsigned_of<T> x) { return std::bit_cast<T>(x); }
template <class T> bool same(T a, T b) {
  return bits(a) == bits(b) || (std::isnan(a) && std::isnan(b));
}

/// log1p_beside() of x alone.
template <class T> pack<T> log1p_by_mirror(const pack<T>& x) {
  return core::log1p_beside(x, x / (-1 - x));
}

/// A function, what it should be, and how far it may be off: ulp + slope |x|.
template <class T> struct function {
  const char* name;
  pack<T> (*value)(const pack<T>&);
  wide<T> (*exact)(const wide<T>&);
  T first, last;                // where it is defined
  double busy_first, busy_last; // where it varies
  double ulp;
  double slope = 0;
};

template <class T> std::vector<function<T>> functions() {
  constexpr bool single = sizeof(T) == 4;
  const auto bound = [](double for_float, double for_double) {
    return single ? for_float : for_double;
  };
  const T infinity = limits<T>::infinity();
  const double low = single ? -87.4 : -708.5;
  const double high = single ? 88.8 : 709.9;
  const double cut = single ? -69 : -690;
  using P = pack<T>;
  using W = wide<T>;
  using perdita_tests::exp, perdita_tests::expm1, perdita_tests::log, perdita_tests::log1p,
      perdita_tests::tanh;
  using std::exp, std::expm1, std::log, std::log1p, std::tanh;
  return {
      {"exp_shifted", [](const P& x) { return core::exp_shifted(x); },
       [](const W& x) -> W { return exp(x); }, T(cut), T(20), cut, 20, bound(1.0, 1.1),
       single ? 0.04 : 0},
      {"exp", [](const P& x) { return core::exp(x); }, [](const W& x) -> W { return exp(x); },
       -infinity, infinity, low, high, bound(1.1, 1.1)},
      {"exp_minus", [](const P& x) { return core::exp_minus(x); },
       [](const W& x) -> W { return exp(W(-x)); }, T(0), infinity, 0, -low, bound(1.1, 1.1)},
      {"one_minus_exp_minus", [](const P& x) { return core::one_minus_exp_minus(x); },
       [](const W& x) -> W { return -W(expm1(W(-x))); }, T(0), infinity, 0, 5, bound(1.3, 1.3)},
      {"expm1", [](const P& x) { return core::expm1(x); }, [](const W& x) -> W { return expm1(x); },
       -infinity, infinity, -5, 5, bound(1.8, 2.4)},
      {"log", [](const P& x) { return core::log(x); }, [](const W& x) -> W { return log(x); }, T(0),
       infinity, 0.25, 4, bound(0.9, 0.9)},
      {"log1p", [](const P& x) { return core::log1p(x); }, [](const W& x) -> W { return log1p(x); },
       T(-1), infinity, -0.9, 3, bound(1.0, 0.9)},
      {"log1p_beside", [](const P& x) { return log1p_by_mirror(x); },
       [](const W& x) -> W { return log1p(x); }, T(0), T(1), 0, 1, bound(1.7, 1.7)},
      {"log1p_of_positive", [](const P& x) { return core::log1p_of_positive(x); },
       [](const W& x) -> W { return log1p(x); }, T(0), infinity, 0, 3, bound(1.3, 0.9)},
      {"softplus", [](const P& x) { return core::softplus(x); },
       [](const W& x) -> W { return x > 0 ? W(x + log1p(W(exp(W(-x))))) : W(log1p(W(exp(x)))); },
       -infinity, infinity, -8, 8, bound(1.6, 1.6)},
      {"sigmoid", [](const P& x) { return core::sigmoid(x); },
       [](const W& x) -> W { return 1 / (1 + W(exp(W(-x)))); }, -infinity, infinity, -8, 8,
       bound(2.5, 2.5)},
      {"tanh", [](const P& x) { return core::tanh(x); }, [](const W& x) -> W { return tanh(x); },
       -infinity, infinity, -3, 3, bound(1.6, 1.6)},
      {"tanh_slope", [](const P& x) { return core::tanh_with_slope(x).slope; },
       [](const W& x) -> W {
         const W e = exp(W(x > 0 ? W(-2 * x) : W(2 * x)));
         return 4 * e / ((1 + e) * (1 + e));
       },
       T(low / 2 + 0.1), T(-low / 2 - 0.1), low / 2 + 0.1, -low / 2 - 0.1, bound(3.5, 3.5)},
  };
}

/// |got - exact| in units in the last place of `exact`. Beyond the largest number only infinity is
/// right, below the normal range zero is.
template <class T> double error(T got, const wide<T>& exact) {
  using std::frexp, std::ldexp, perdita_tests::frexp, perdita_tests::ldexp;
  const double wrong = limits<double>::infinity();
  const wide<T> size = exact < 0 ? -exact : exact, off = wide<T>(got) - exact;
  const wide<T> top =
      ldexp(wide<T>(1) - ldexp(wide<T>(1), -limits<T>::digits - 1), limits<T>::max_exponent);
  if (size >= top)
    return got == (exact > 0 ? limits<T>::infinity() : -limits<T>::infinity()) ? 0 : wrong;
  if (!std::isfinite(got))
    return wrong;
  if (size < wide<T>(limits<T>::min()) && got == 0)
    return 0;
  int exponent = 0;
  frexp(size, &exponent);
  exponent = std::max(exponent, limits<T>::min_exponent);
  return static_cast<double>(ldexp(off < 0 ? -off : off, limits<T>::digits - exponent));
}

/// Runs a function over points in packs and keeps the worst error. An element's result must be the
/// same bits wherever in the pack it stands.
template <class T> class measurement {
public:
  explicit measurement(const function<T>& f) : f_(f) {}

  void add(T x) {
    if (!(x >= f_.first && x <= f_.last))
      return;
    points_[used_++] = x;
    if (used_ == lanes)
      flush();
  }
  void check() {
    while (used_ > 0)
      add(points_[0]);
    perdita_tests::report_accuracy<T>(std::string("core::") + f_.name, "", perdita_tests::in_ulp,
                                      {worst_, -1, worst_ / f_.ulp});
    INFO(f_.name << ": " << count_ << " points, worst " << worst_ << " ulp over slope at " << at_);
    CHECK(count_ > 0);
    CHECK(moved_ == 0);
    CHECK(worst_ <= f_.ulp);
  }
  double worst() const { return worst_; }
  std::size_t count() const { return count_; }

private:
  static constexpr std::size_t lanes = pack<T>::size;

  void flush() {
    T values[lanes];
    f_.value(pack<T>::load(points_)).store(values);
    for (std::size_t i = 0; i < lanes; ++i) {
      const double excess = error(values[i], f_.exact(wide<T>(points_[i]))) -
                            f_.slope * std::fabs(static_cast<double>(points_[i]));
      if (excess > worst_) {
        worst_ = excess;
        at_ = points_[i];
      }
    }
    const std::size_t shift = 1 + count_ / lanes % (lanes - 1);
    T rotated[lanes];
    for (std::size_t i = 0; i < lanes; ++i)
      rotated[i] = points_[(i + shift) % lanes];
    f_.value(pack<T>::load(rotated)).store(rotated);
    for (std::size_t i = 0; i < lanes; ++i)
      moved_ += !same(rotated[i], values[(i + shift) % lanes]);
    count_ += lanes;
    used_ = 0;
  }

  const function<T>& f_;
  T points_[lanes] = {};
  std::size_t used_ = 0, count_ = 0, moved_ = 0;
  double worst_ = -1;
  T at_ = 0;
};

/// The places where an implementation changes its mind.
template <class T> std::vector<T> boundaries() {
  const T ulp = limits<T>::epsilon(), least = limits<T>::denorm_min();
  std::vector<T> result{0,
                        least,
                        limits<T>::min(),
                        limits<T>::max(),
                        limits<T>::infinity(),
                        1,
                        1 + ulp,
                        1 - ulp / 2,
                        ulp,
                        ulp / 2,
                        T(0.25),
                        T(0.5),
                        T(0.55),
                        T(0.75),
                        T(1.5),
                        T(2),
                        T(3),
                        T(20),
                        T(40),
                        T(69),
                        T(690),
                        T(1e-310),
                        T(2.2e-308),
                        T(1e-20),
                        T(3e-4),
                        T(1e19),
                        T(1e30),
                        T(0x1p-30),
                        T(0x1p-60)};
  for (double x : {88.37625,
                   88.37627,
                   88.72283,
                   88.72284,
                   87.33654,
                   87.33655,
                   87.683,
                   87.684,
                   103.97,
                   103.98,
                   709.4361,
                   709.4362,
                   709.782,
                   709.783,
                   708.396,
                   708.397,
                   745.13,
                   745.14,
                   709.782712893384,
                   708.39641853226408,
                   88.722839052068353,
                   87.336544750553})
    result.push_back(T(x));
  const std::size_t positive = result.size();
  for (std::size_t i = 0; i < positive; ++i)
    result.push_back(-result[i]);
  return result;
}

} // namespace

TEMPLATE_TEST_CASE("vector maths: error over all bit patterns", "[core][math]", float, double) {
  using U = unsigned_of<TestType>;
  constexpr U points = U(1) << 16;
  for (const auto& f : functions<TestType>()) {
    measurement<TestType> m(f);
    const U step = static_cast<U>(~U(0) / points - 2) | 1;
    U pattern = 12345;
    for (U i = 0; i < points; ++i, pattern = static_cast<U>(pattern + step))
      m.add(real<TestType>(pattern));
    m.check();
    CHECK(m.count() > points / 8);
  }
}

TEMPLATE_TEST_CASE("vector maths: error where the function varies", "[core][math]", float, double) {
  constexpr int points = 1 << 16;
  for (const auto& f : functions<TestType>()) {
    measurement<TestType> m(f);
    const double width = f.busy_last - f.busy_first;
    double position = 0.5;
    for (int i = 0; i < points; ++i) {
      position += 0.6180339887498949; // the golden ratio spreads evenly
      position -= std::floor(position);
      m.add(static_cast<TestType>(f.busy_first + width * position));
    }
    m.check();
    CHECK(m.count() >= points - 64);
    CHECK(m.worst() > f.ulp / 2); // a looser bound would hide mistakes
  }
}

TEMPLATE_TEST_CASE("vector maths: error at boundaries", "[core][math]", float, double) {
  for (const auto& f : functions<TestType>()) {
    measurement<TestType> m(f);
    for (TestType x : boundaries<TestType>()) {
      TestType up = x, down = x;
      for (int i = 0; i < 300; ++i) {
        m.add(up);
        m.add(down);
        up = std::nextafter(up, limits<TestType>::max());
        down = std::nextafter(down, limits<TestType>::lowest());
      }
    }
    m.check();
  }
}

TEMPLATE_TEST_CASE("vector maths: special values", "[core][math]", float, double) {
  using T = TestType;
  using P = pack<T>;
  const T inf = limits<T>::infinity(), nan = limits<T>::quiet_NaN(),
          least = limits<T>::denorm_min();
  const T ln2 = T(0.69314718055994530942), max = limits<T>::max();
  const T zero = 0, half = T(0.5), one = 1;
  struct row {
    const char* name;
    P (*f)(const P&);
    std::vector<std::pair<T, T>> values;
  };
  const row rows[] = {
      {"exp_shifted",
       [](const P& x) { return core::exp_shifted(x); },
       {{zero, one}, {-zero, one}, {-inf, zero}, {-max, zero}, {T(-1e30), zero}, {T(-691), zero}}},
      {"exp",
       [](const P& x) { return core::exp(x); },
       {{zero, one},
        {-zero, one},
        {-inf, zero},
        {inf, inf},
        {max, inf},
        {-max, zero},
        {least, one},
        {T(-746), zero},
        {T(710), inf}}},
      {"exp_minus",
       [](const P& x) { return core::exp_minus(x); },
       {{zero, one}, {-zero, one}, {inf, zero}, {max, zero}, {least, one}, {T(746), zero}}},
      {"one_minus_exp_minus",
       [](const P& x) { return core::one_minus_exp_minus(x); },
       {{zero, zero}, {-zero, zero}, {inf, one}, {max, one}, {least, least}, {T(746), one}}},
      {"log1p_beside",
       [](const P& x) { return log1p_by_mirror(x); },
       {{zero, zero}, {-zero, -zero}, {one, ln2}, {least, least}, {3 * least, 3 * least}}},
      {"log1p_of_positive",
       [](const P& x) { return core::log1p_of_positive(x); },
       {{zero, zero},
        {-zero, zero},
        {one, ln2},
        {inf, inf},
        {least, least},
        {3 * least, 3 * least}}},
      {"expm1",
       [](const P& x) { return core::expm1(x); },
       {{zero, zero},
        {-zero, -zero},
        {-inf, -one},
        {inf, inf},
        {max, inf},
        {-max, -one},
        {least, least},
        {-least, -least}}},
      {"log",
       [](const P& x) { return core::log(x); },
       {{zero, -inf},
        {-zero, -inf},
        {one, zero},
        {inf, inf},
        {-inf, nan},
        {-one, nan},
        {-least, nan},
        {-max, nan}}},
      {"log1p",
       [](const P& x) { return core::log1p(x); },
       {{zero, zero},
        {-zero, -zero},
        {-one, -inf},
        {inf, inf},
        {-inf, nan},
        {T(-1.5), nan},
        {-max, nan},
        {least, least},
        {-least, -least}}},
      {"softplus",
       [](const P& x) { return core::softplus(x); },
       {{zero, ln2},
        {-zero, ln2},
        {inf, inf},
        {-inf, zero},
        {max, max},
        {-max, zero},
        {T(800), T(800)}}},
      {"sigmoid",
       [](const P& x) { return core::sigmoid(x); },
       {{zero, half}, {-zero, half}, {inf, one}, {-inf, zero}, {max, one}, {-max, zero}}},
      {"tanh",
       [](const P& x) { return core::tanh(x); },
       {{zero, zero},
        {-zero, -zero},
        {inf, one},
        {-inf, -one},
        {max, one},
        {-max, -one},
        {least, least},
        {-least, -least}}},
      {"tanh_slope",
       [](const P& x) { return core::tanh_with_slope(x).slope; },
       {{zero, one}, {-zero, one}, {inf, zero}, {-inf, zero}, {max, zero}, {least, one}}},
  };
  const auto check = [](const row& r, T x, T expected) {
    T values[P::size];
    r.f(P(x)).store(values);
    for (T value : values) {
      INFO(r.name << "(" << x << ") = " << value << ", not " << expected);
      CHECK(same(value, expected));
    }
  };
  constexpr auto payload = unsigned_of<T>(0x12345);
  for (const row& r : rows) {
    for (const auto& [x, expected] : r.values)
      check(r, x, expected);
    for (T n : {nan, -nan, limits<T>::signaling_NaN(), real<T>(bits(nan) + 1),
                real<T>(bits(nan) + payload), real<T>(bits(-nan) + payload),
                real<T>(bits(inf) + payload), real<T>(~unsigned_of<T>(0))})
      check(r, n, nan);
  }
}

TEMPLATE_TEST_CASE("vector maths: symmetry", "[core][math]", float, double) {
  using P = pack<TestType>;
  std::size_t differences = 0;
  for (int i = 0; i < 4096; ++i) {
    TestType plus[P::size], minus[P::size];
    const P x = core::iota<TestType>() * TestType(0.0003) + static_cast<TestType>(i) / 256;
    core::tanh(x).store(plus);
    core::tanh(-x).store(minus);
    for (std::size_t j = 0; j < P::size; ++j)
      differences += !same(plus[j], -minus[j]);
  }
  CHECK(differences == 0);
}

TEMPLATE_TEST_CASE("vector maths: what takes -x for granted changes no bit", "[core][math]", float,
                   double) {
  using P = pack<TestType>;
  // Without FMA, products of a result near the least number are rounded as subnormals.
  const TestType top = core::fused ? 800 : sizeof(TestType) == 4 ? 60 : 650;
  constexpr int points = 1 << 14;
  std::size_t differences = 0;
  for (int i = 1; i < points; ++i) {
    TestType power[P::size], lack[P::size], expected[P::size], expected_lack[P::size];
    const P x =
        core::iota<TestType>() * TestType(0.0003) + static_cast<TestType>(i) * (top / points);
    core::exp_minus(x).store(power);
    core::exp(-x).store(expected);
    core::one_minus_exp_minus(x).store(lack);
    (-core::expm1(-x)).store(expected_lack);
    for (std::size_t j = 0; j < P::size; ++j)
      differences += !same(power[j], expected[j]) + !same(lack[j], expected_lack[j]);
  }
  CHECK(differences == 0);
}

TEST_CASE("vector maths in double: as exact as the type that results are rounded to",
          "[core][math]") {
  using P = pack<double>;
  using W = wide<double>;
  using perdita_tests::exp, perdita_tests::log1p;
  const auto relative = [](double got, const W& exact) {
    return exact == 0 ? std::fabs(got) : std::fabs(static_cast<double>((W(got) - exact) / exact));
  };
  struct errors {
    double exp = 0, log1p = 0, inverse = 0;
  };
  const auto add = [&]<class T>(errors& worst, T, double x) {
    double e[P::size], log[P::size], inverse[P::size];
    core::exp_to<T>(P(x)).store(e);
    worst.exp = std::max(worst.exp, relative(e[0], exp(W(x))));
    const auto both = core::log1p_and_inverse_to<T>(P(e[0]));
    both.log.store(log);
    both.inverse.store(inverse);
    worst.log1p = std::max(worst.log1p, relative(log[0], log1p(W(e[0]))));
    worst.inverse = std::max(worst.inverse, relative(inverse[0], W(1 / (1 + W(e[0])))));
  };
  errors single, twice;
  double position = 0.5;
  for (int i = 0; i < 1 << 15; ++i) {
    position += 0.6180339887498949;
    position -= std::floor(position);
    for (const double x : {690 * (2 * position - 1), 40 * (2 * position - 1), position - 0.5}) {
      add(single, float{}, x);
      add(twice, double{}, x);
    }
  }
  const double for_float = 0x1p-34, for_double = 0x1p-52;
  for (const double e : {single.exp, single.log1p, single.inverse})
    CHECK(e <= for_float);
  CHECK(single.exp > for_float / 2); // a looser bound would hide mistakes
  for (const double e : {twice.exp, twice.log1p, twice.inverse})
    CHECK(e <= for_double);
  for (const double x : {-691.0, -1e300, -limits<double>::infinity()}) {
    double e[P::size];
    core::exp_to<float>(P(x)).store(e);
    CHECK(std::fabs(e[0] / 0x1p-995 - 1) < 1); // what e^-690 is near to
    core::exp_to<double>(P(x < -700 ? x : -709.0)).store(e);
    CHECK(e[0] == 0);
  }
  double v[P::size];
  for (const double x : {0.0, limits<double>::min(), 1e-300}) {
    core::log1p_and_inverse_to<float>(P(x)).log.store(v);
    CHECK(std::fabs(v[0] - x) <= x * 0x1p-34);
  }
  const double nan = limits<double>::quiet_NaN();
  core::exp_to<float>(P(nan)).store(v);
  CHECK(std::isnan(v[0]));
  const auto both = core::log1p_and_inverse_to<float>(P(nan));
  both.log.store(v);
  CHECK(std::isnan(v[0]));
  both.inverse.store(v);
  CHECK(std::isnan(v[0]));
}

TEMPLATE_TEST_CASE("transposed copies write the copy and nothing else", "[core][simd]", float,
                   double) {
  using T = TestType;
  using core::copy_transposed;
  std::size_t wrong = 0;
  for (std::ptrdiff_t rows = 0; rows <= 35; ++rows)
    for (std::ptrdiff_t cols = 0; cols <= 35; ++cols)
      for (const std::ptrdiff_t gap : {0, 3}) {
        const std::ptrdiff_t from_step = cols + gap, to_step = rows + gap;
        // No longer than what may be read, so that a sanitizer sees a step too far.
        const auto size = [](std::ptrdiff_t n, std::ptrdiff_t m, std::ptrdiff_t step) {
          return static_cast<std::size_t>(n * m > 0 ? (n - 1) * step + m : 0);
        };
        std::vector<T> from(size(rows, cols, from_step)), to(size(cols, rows, to_step), T(-1));
        for (std::size_t i = 0; i < from.size(); ++i)
          from[i] = static_cast<T>(i);
        std::vector<T> expected = to;
        for (std::ptrdiff_t i = 0; i < rows; ++i)
          for (std::ptrdiff_t j = 0; j < cols; ++j)
            expected[static_cast<std::size_t>(j * to_step + i)] =
                from[static_cast<std::size_t>(i * from_step + j)];
        copy_transposed(from.data(), from_step, rows, cols, to.data(), to_step);
        wrong += to != expected;
      }
  CHECK(wrong == 0);
}

TEST_CASE("vector maths: error of every float", "[.exhaustive]") {
  for (const auto& f : functions<float>()) {
    measurement<float> m(f);
    for (std::uint64_t pattern = 0; pattern >> 32 == 0; ++pattern)
      m.add(real<float>(static_cast<std::uint32_t>(pattern)));
    m.check();
  }
}
