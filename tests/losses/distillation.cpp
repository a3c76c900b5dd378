// SPDX-License-Identifier: MIT

// The descriptors of distillation and logit_matching, and squared_log_ratio: formula sheet 13. The
// battery's soft targets are the teacher's scores; what makes students that are near their teachers
// comes after it.

#include <perdita/distillation.hpp>

#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include <perdita/testing/gradient_check.hpp>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/numbers.hpp"
#include "support/row_battery.hpp"
#include "support/softmax_reference.hpp"

namespace perdita_tests {
namespace {

using perdita::divergence;
constexpr divergence kinds[] = {divergence::forward_kl, divergence::reverse_kl,
                                divergence::jensen_shannon, divergence::total_variation};
constexpr const char* kind_names[] = {"forward KL", "reverse KL", "Jensen-Shannon",
                                      "total variation"};

template <class T> class distillation_descriptor final : public row_descriptor<T> {
public:
  std::string name() const override { return "distillation"; }
  int settings() const override { return 8; }
  static divergence kind(int setting) { return kinds[setting % 4]; }
  static double temperature(int setting) { return setting < 4 ? 1 : 0.125; }
  static double beta(int) { return 0.25; }
  std::string describe(int setting) const override {
    return std::string(kind_names[setting % 4]) + ", temperature " +
           perdita::core::to_text(temperature(setting));
  }
  // All of them are computed in double, in one traversal.
  std::vector<int> few_settings() const override { return {sizeof(T) == 4 ? 4 : 6}; }
  bool soft(int) const override { return true; }
  std::unique_ptr<row_subject<T>> make(int setting, index,
                                       perdita::reduction reduction) const override {
    return std::make_unique<row_subject_of<perdita::distillation<T>, false>>(
        perdita::distillation<T>({.divergence = kind(setting),
                                  .temperature = static_cast<T>(temperature(setting)),
                                  .beta = static_cast<T>(beta(setting)),
                                  .reduction = reduction}));
  }
  perdita::loss_traits traits(int setting) const override {
    return perdita::distillation<T>({.divergence = kind(setting)}).traits();
  }
  bool twice_smooth() const override { return false; }
  bool sparse() const override { return true; } // total variation, shares that underflow

  row_expectation expect(int setting, const row_input& row) const override {
    const wide t = temperature(setting), b = beta(setting);
    std::vector<wide> x, y;
    for (std::size_t k = 0; k < row.scores.size(); ++k) {
      x.push_back(row.scores[k] / t);
      y.push_back(row.soft[k] / t);
    }
    row_expectation e = nothing_reported();
    const softmax_row p(x), q(y);
    if (p.all_masked || q.all_masked) {
      e.value = {not_a_number(), 0};
      e.gradient.assign(x.size(), {not_a_number(), 0});
      return e;
    }
    // r: what p is multiplied by in the slope; scale: its factor
    std::vector<wide> r;
    wide value = 0, size = 0, scale = t;
    for (std::size_t k = 0; k < x.size(); ++k) {
      const wide pk = p.p(k), qk = q.p(k), m = b * qk + (1 - b) * pk;
      const wide log_p = x[k] - p.log_sum_exp, log_q = y[k] - q.log_sum_exp;
      const auto entropy = [](const wide& share, const wide& ratio) {
        return weighted(share, ratio);
      };
      wide term = 0;
      switch (kind(setting)) {
      case divergence::forward_kl:
        term = entropy(qk, log_q - log_p);
        r.push_back(0);
        break;
      case divergence::reverse_kl:
        term = entropy(pk, log_p - log_q);
        r.push_back(log_p - log_q);
        break;
      case divergence::jensen_shannon:
        r.push_back(pk > 0 ? wide(log(wide(pk / m))) : wide(0));
        term = b * entropy(qk, wide(log(wide(qk / m)))) + (1 - b) * entropy(pk, r[k]);
        scale = (1 - b) * t;
        break;
      case divergence::total_variation:
        term = size_of(wide(pk - qk)) / 2;
        r.push_back(pk > qk ? 1 : pk < qk ? -1 : 0);
        scale = t / 2;
        break;
      }
      value += term;
      size += size_of(term);
    }
    wide mean = 0, reach = 0;
    for (std::size_t k = 0; k < x.size(); ++k) {
      mean += weighted(p.p(k), r[k]);
      reach += weighted(p.p(k), size_of(r[k]));
    }
    // Scores are exact in double: only their quotients by T, shares and logarithms are rounded.
    wide spread = 0;
    for (std::size_t k = 0; k < x.size(); ++k)
      if (x[k] > -infinity())
        spread = larger(spread,
                        larger(size_of(wide(x[k] - p.z[p.top])), size_of(wide(y[k] - q.z[q.top]))));
    const wide fine = sizeof(T) == 8 ? wide(8 * (1 + spread)) : wide(1);
    const wide tops =
        sizeof(T) == 8 ? wide(size_of(p.log_sum_exp) + size_of(q.log_sum_exp)) : wide(0);
    e.value = {t * t * value,
               t * t * ((fine + tops) * (size + (is_finite(value) ? wide(1) : wide(0))))};
    for (std::size_t k = 0; k < x.size(); ++k) {
      const wide pk = p.p(k), qk = q.p(k);
      const bool forward = kind(setting) == divergence::forward_kl;
      const wide slope =
          forward ? wide(t * (pk - qk)) : wide(scale * weighted(pk, wide(r[k] - mean)));
      const wide of = forward ? wide(pk + qk) : wide(weighted(pk, wide(size_of(r[k]) + reach + 1)));
      e.gradient.push_back({slope, size_of(slope) + scale * of * (fine + tops)});
    }
    return e;
  }
};

using perdita::logit_distance;
constexpr logit_distance distances[] = {logit_distance::log_cosh, logit_distance::binary_kl,
                                        logit_distance::squared_error,
                                        logit_distance::centred_squared_error};
constexpr const char* distance_names[] = {"log cosh", "binary KL", "squared error",
                                          "centred squared error"};

/// σ(a), σ(−a) and softplus(±a) from one exponential.
struct outcome_pair {
  wide yes, no, least; ///< least: softplus(−|a|)
  explicit outcome_pair(const wide& a) {
    const wide image = exp(wide(-size_of(a)));
    yes = (a > 0 ? wide(1) : image) / (1 + image);
    no = (a > 0 ? image : wide(1)) / (1 + image);
    least = log1p(image);
  }
  wide surprise(const wide& a) const { return larger(0, a) + least; }
};

template <class T> class matching_descriptor final : public row_descriptor<T> {
public:
  std::string name() const override { return "logit_matching"; }
  int settings() const override { return 8; }
  static logit_distance kind(int setting) { return distances[setting % 4]; }
  static bool second(int setting) { return setting >= 4; }
  static double temperature(int setting) { return second(setting) ? 0.25 : 2; }
  std::string describe(int setting) const override {
    return std::string(distance_names[setting % 4]) + (second(setting) ? ", per class" : "");
  }
  std::vector<int> few_settings() const override { return {sizeof(T) == 4 ? 0 : 3}; }
  bool soft(int) const override { return true; }
  static perdita::logit_matching<T> loss(int setting, perdita::reduction reduction) {
    return {{.distance = kind(setting),
             .temperature = static_cast<T>(temperature(setting)),
             .keep_size = !second(setting),
             .per_class = second(setting),
             .reduction = reduction}};
  }
  std::unique_ptr<row_subject<T>> make(int setting, index,
                                       perdita::reduction reduction) const override {
    return std::make_unique<row_subject_of<perdita::logit_matching<T>, false>>(
        loss(setting, reduction));
  }
  perdita::loss_traits traits(int setting) const override {
    return loss(setting, perdita::reduction::sum).traits();
  }
  bool sparse() const override { return true; } // probabilities that underflow
  bool legal(int setting, row_kind kind, index) const override {
    return kind != row_kind::huge || setting % 4 < 2; // squares overflow in float
  }

  row_expectation expect(int setting, const row_input& row) const override {
    const wide t = temperature(setting), factor = second(setting) ? wide(1) : wide(t * t);
    row_expectation e = nothing_reported();
    const wide inf = infinity(), log2 = log(wide(2));
    std::vector<wide> d;
    std::vector<bool> gone;
    wide sum = 0, reach = 0, counted = 0;
    for (std::size_t k = 0; k < row.scores.size(); ++k) {
      const wide x = row.scores[k], y = row.soft[k];
      gone.push_back(x == -inf && y == -inf);
      d.push_back(x == y ? wide(0) : wide(x - y));
      sum += d[k];
      reach = larger(reach, size_of(d[k]));
      counted += gone[k] ? 0 : 1;
    }
    const wide classes = !second(setting) ? wide(1) : larger(counted, wide(1));
    const bool is_double = sizeof(T) == 8;
    for (std::size_t k = 0; k < d.size(); ++k) {
      const wide a = row.scores[k] / t, b = row.soft[k] / t;
      wide term = 0, slope = 0, error = 8, offset = 0;
      switch (kind(setting)) {
      case logit_distance::log_cosh: {
        // cosh u = 1 + f²/(2(1 + f)) = e^u (1 + (1 + f)²)/2 with f = e^−u − 1
        const wide u = size_of(wide(d[k] / (2 * t))), f = expm1(wide(-u)), image = 1 + f;
        term =
            u > 1 ? wide(u + log1p(wide(image * image)) - log2) : log1p(wide(f * f / (2 * image)));
        slope = (d[k] < 0 ? 1 : -1) * f * (2 + f) / (1 + image * image) / 2;
        break;
      }
      case logit_distance::binary_kl: {
        const outcome_pair student(a), teacher(b);
        const wide q = teacher.yes, not_q = teacher.no, u = d[k] / t;
        const wide yes = student.surprise(-a) - teacher.surprise(-b),
                   no = student.surprise(a) - teacher.surprise(b);
        const bool near = size_of(u) < wide(1e-12);
        term = near ? wide(q * not_q * u * u / 2 * (1 + (not_q - q) * u / 3))
                    : wide(weighted(q, yes) + weighted(not_q, no));
        slope = size_of(u) < 1 ? wide(q * student.no * expm1(u))
                : b > 0        ? wide(not_q - student.no)
                               : wide(student.yes - q);
        if (is_double && d[k] != 0 && is_finite(d[k]))
          error += size_of(a) + size_of(b);
        break;
      }
      default: {
        const bool centred = kind(setting) == logit_distance::centred_squared_error;
        const wide off = gone[k] ? wide(0) : wide(d[k] - (centred ? wide(sum / counted) : wide(0)));
        term = off * off / (2 * t * t);
        slope = off / t;
        if (centred && is_double)
          offset = 8 * reach / t;
      }
      }
      e.value.value += factor / classes * term;
      e.value.allow(factor / classes * (error * term + offset * (size_of(slope) + offset * 1e-16)));
      const wide g = factor / (t * classes) * slope;
      e.gradient.push_back({g, error * size_of(g) + factor / (t * classes) * offset});
    }
    if (is_nan(e.value.value))
      for (auto& g : e.gradient)
        g.value = not_a_number();
    return e;
  }
};

} // namespace

TEMPLATE_TEST_CASE("distillation: the row battery", "[distillation]", float, double) {
  check_row_loss(distillation_descriptor<TestType>());
}

// All digits of a difference of 1e-3 to 1e-7, in double, against 113 bits.
TEST_CASE("distillation: a student near its teacher", "[distillation]") {
  random_numbers random(5);
  for (const double apart : {1e-3, 1e-5, 1e-7})
    for (int kind = 0; kind < 3; ++kind) {
      std::vector<double> x, t, g(40);
      for (int k = 0; k < 40; ++k) {
        t.push_back(3 * random.normal());
        x.push_back(t.back() + apart * random.normal());
      }
      const double value = perdita::distillation<double>(
          {.divergence = kinds[kind], .temperature = 2, .beta = 0.25})(
          perdita::matrix_view<const double>(x.data(), 1, 40),
          perdita::matrix_view<const double>(t.data(), 1, 40),
          perdita::matrix_view<double>(g.data(), 1, 40));
      std::vector<wide> zx, zt;
      for (int k = 0; k < 40; ++k) {
        zx.push_back(wide(x[std::size_t(k)]) / 2);
        zt.push_back(wide(t[std::size_t(k)]) / 2);
      }
      const softmax_row p(zx), q(zt);
      wide expected = 0, mean = 0;
      std::vector<wide> r;
      for (std::size_t k = 0; k < 40; ++k) {
        const wide m = q.p(k) / 4 + 3 * p.p(k) / 4;
        const wide l = (zx[k] - p.log_sum_exp) - (zt[k] - q.log_sum_exp),
                   to_m = log(wide(p.p(k) / m));
        expected += kind == 0   ? wide(-q.p(k) * l)
                    : kind == 1 ? wide(p.p(k) * l)
                                : wide(q.p(k) * log(wide(q.p(k) / m)) / 4 + 3 * p.p(k) * to_m / 4);
        r.push_back(kind == 1 ? l : to_m);
        mean += p.p(k) * r.back();
      }
      INFO(kind_names[kind] << ", " << apart);
      CHECK(std::abs(static_cast<double>((wide(value) - 4 * expected) / (4 * expected))) < 1e-13);
      double worst = 0;
      for (std::size_t k = 0; k < 40; ++k) {
        const wide slope = kind == 0   ? wide(2 * (p.p(k) - q.p(k)))
                           : kind == 1 ? wide(2 * p.p(k) * (r[k] - mean))
                                       : wide(1.5 * p.p(k) * (r[k] - mean));
        const wide size = p.p(k) * apart;
        worst = worse(worst, static_cast<double>(size_of(wide(wide(g[k]) - slope)) / size));
      }
      CHECK(worst < 1e-13);
    }
}

// All digits, in double, as either weight tends to 0.
// Relative to each number, not to p + q: where both are confident, what the leader loses is the
// little mass of the others, and one such class must not cost the others their digits.
TEMPLATE_TEST_CASE("distillation: confident students and teachers", "[distillation]", float,
                   double) {
  using T = TestType;
  const std::vector<std::vector<T>> rows[] = {
      {{0, -20}, {0, -22}},
      {{0, -30}, {0, -32}},
      {{0, -40}, {0, -41}},
      {{3, 43}, {-2, 40}},
      {{0, 0, -30}, {0, 0, -32}},
      {{0, T(0.125), -30, -50}, {0, 0, -32, -45}},
      {{0, -1, T(1e-12), -50}, {0, -1, 0, -51}},
      {{8, -1, 1, -50, 7}, {T(8.000001), -1, 1, -51, 7}},
      {{5, -700, -40, 4, -900}, {5, -40, -700, 4, -2000}},
      {{0, -1, 0, -1, 0, -1, 0, -1, 0, -36}, {0, -1, 0, -1, 0, -1, 0, -1, 0, -34}},
  };
  const distillation_descriptor<T> descriptor;
  error_judge values, slopes;
  for (const auto& row : rows)
    for (int setting = 0; setting < 8; ++setting) {
      INFO(descriptor.describe(setting) << ", " << row[0][1] << " against " << row[1][1]);
      const auto n = static_cast<perdita::index>(row[0].size());
      std::vector<T> g(row[0].size());
      const T value = perdita::distillation<T>(
          {.divergence = descriptor.kind(setting),
           .temperature = static_cast<T>(descriptor.temperature(setting)),
           .beta = T(0.25)})(perdita::matrix_view<const T>(row[0].data(), 1, n),
                             perdita::matrix_view<const T>(row[1].data(), 1, n),
                             perdita::matrix_view<T>(g.data(), 1, n));
      row_input input;
      input.scores.assign(row[0].begin(), row[0].end());
      input.soft.assign(row[1].begin(), row[1].end());
      const auto wanted = descriptor.expect(setting, input);
      const wide relative = std::numeric_limits<T>::epsilon() + 0x1p-46,
                 least = std::numeric_limits<T>::min() + 0x1p-106; // of the reference, too
      CHECK(values.within(size_of(wide(value - wanted.value.value)), 1,
                          relative * size_of(wanted.value.value) + least));
      for (std::size_t k = 0; k < g.size(); ++k)
        CHECK(slopes.within(size_of(wide(g[k] - wanted.gradient[k].value)), 1,
                            relative * size_of(wanted.gradient[k].value) + least));
    }
}

TEST_CASE("distillation: Jensen-Shannon with weights near 0 and 1", "[distillation]") {
  random_numbers random(6);
  for (const double beta : {1e-12, 1e-8, 1e-4, 0.5, 1 - 0x1p-14, 1 - 0x1p-30})
    for (const double apart : {0.1, 1.0, 6.0}) {
      constexpr std::size_t n = 40;
      std::vector<double> x, t, g(n);
      for (std::size_t k = 0; k < n; ++k) {
        t.push_back(3 * random.normal());
        x.push_back(t.back() + apart * random.normal());
      }
      const double value =
          perdita::distillation<double>({.divergence = divergence::jensen_shannon, .beta = beta})(
              perdita::matrix_view<const double>(x.data(), 1, n),
              perdita::matrix_view<const double>(t.data(), 1, n),
              perdita::matrix_view<double>(g.data(), 1, n));
      const softmax_row p({x.begin(), x.end()}), q({t.begin(), t.end()});
      const wide teacher = beta, student = 1 - teacher;
      wide expected = 0, mean = 0, reach = 0;
      std::vector<wide> r;
      for (std::size_t k = 0; k < n; ++k) {
        const wide l = (wide(x[k]) - p.log_sum_exp) - (wide(t[k]) - q.log_sum_exp);
        r.push_back(-log1p(wide(teacher * expm1(wide(-l)))));
        expected += teacher * q.p(k) * -log1p(wide(student * expm1(l))) + student * p.p(k) * r[k];
        mean += p.p(k) * r[k];
        reach += p.p(k) * size_of(r[k]);
      }
      INFO("beta " << beta << ", " << apart);
      CHECK(std::abs(static_cast<double>((wide(value) - expected) / expected)) < 1e-14);
      double worst = 0;
      for (std::size_t k = 0; k < n; ++k) {
        const wide size = student * p.p(k) * (size_of(r[k]) + reach);
        const wide off = wide(g[k]) - student * p.p(k) * (r[k] - mean);
        worst = worse(worst, static_cast<double>(size_of(off) / size));
      }
      CHECK(worst < 1e-14);
    }
}

TEMPLATE_TEST_CASE("distillation: a student far above or below its teacher", "[distillation]",
                   float, double) {
  using T = TestType;
  using perdita::index;
  const auto run = [](divergence kind, const std::vector<T>& student, const std::vector<T>& teacher,
                      std::vector<T>& g) {
    const auto n = static_cast<index>(student.size());
    return perdita::distillation<T>({.divergence = kind})(
        perdita::matrix_view<const T>(student.data(), 1, n),
        perdita::matrix_view<const T>(teacher.data(), 1, n),
        perdita::matrix_view<T>(g.data(), 1, n));
  };
  for (const divergence kind : kinds) {
    for (const std::size_t n : {7U, 65U}) { // equal scores are equal probabilities
      std::vector<T> g(n, 9);
      for (const T offset : {T(1e8), T(1e15), T(-1e30)}) {
        CHECK(run(kind, std::vector<T>(n, offset), std::vector<T>(n, T(3.3)), g) == 0);
        CHECK(g == std::vector<T>(n, T(0)));
        CHECK(run(kind, std::vector<T>(n, T(3.3)), std::vector<T>(n, offset), g) == 0);
        CHECK(g == std::vector<T>(n, T(0)));
      }
    }
    const T offset = 1 << 20; // to which all of these can be added
    const std::vector<T> student{0, 1, 2, 5, 7}, teacher{T(0.25), 1, 2, 5, 7};
    auto raised = student;
    for (T& x : raised)
      x += offset;
    std::vector<T> g(5), again(5);
    CHECK(run(kind, raised, teacher, again) == run(kind, student, teacher, g));
    CHECK(again == g);
  }
}

TEMPLATE_TEST_CASE("distillation: special rows", "[distillation]", float, double) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double n = std::numeric_limits<double>::quiet_NaN();
  const std::vector<special_row> rows{
      {"the same", 0, {3, 1, 2}, -1, {3, 1, 2}, 0, {0, 0, 0}},
      {"one class", 2, {4}, -1, {3}, 0, {0}},
      {"masked for both", 0, {5, -inf, 5}, -1, {1, -inf, 1}, 0, {0, 0, 0}},
      {"masked for the student", 0, {5, -inf, -inf}, -1, {1, 1, -inf}, inf, {0.5, -0.5, 0}},
      {"masked for the teacher",
       0,
       {5, 5, -inf},
       -1,
       {1, -inf, -inf},
       std::log(2.0),
       {-0.5, 0.5, 0}},
      {"disjoint", 3, {5, -inf}, -1, {-inf, 1}, 1, {0, 0}},
      {"disjoint",
       2,
       {5, -inf},
       -1,
       {-inf, 1},
       -(0.25 * std::log(0.25) + 0.75 * std::log(0.75)),
       {0, 0}},
      {"all masked", 0, {-inf, -inf}, -1, {0, 0}, n, {n, n}},
      {"NaN", 1, {0, n}, -1, {0, 0}, n, {n, n}},
      {"NaN of the teacher", 1, {0, 0}, -1, {0, n}, n, {n, n}},
      {"+inf", 2, {0, inf}, -1, {0, 0}, n, {n, n}},
  };
  check_special(distillation_descriptor<TestType>(), rows, 8);
}

// T² = ∞ made the value NaN, and T² = 0 the slopes 0.
TEST_CASE("distillation, logit_matching: a temperature without a square", "[distillation]") {
  using Catch::Matchers::ContainsSubstring;
  std::vector<double> x{0, 1}, t{1, 0}, g(2, 5);
  const auto call = [&](auto loss) {
    return loss(perdita::matrix_view<const double>(x.data(), 1, 2),
                perdita::matrix_view<const double>(t.data(), 1, 2),
                perdita::matrix_view<double>(g.data(), 1, 2));
  };
  for (const double at : {1e160, 1e-170, 1e-155}) {
    INFO("temperature " << at);
    CHECK_THROWS_WITH(call(perdita::distillation<double>({.temperature = at})),
                      ContainsSubstring("perdita::distillation: temperature is 1e") &&
                          ContainsSubstring("square"));
    CHECK_THROWS_WITH(call(perdita::logit_matching<double>({.temperature = at})),
                      ContainsSubstring("perdita::logit_matching: temperature is 1e") &&
                          ContainsSubstring("square"));
    CHECK(g == std::vector<double>(2, 5));
    CHECK_NOTHROW(perdita::distillation<double>({.temperature = at, .keep_size = false}));
    CHECK_NOTHROW(perdita::logit_matching<double>({.temperature = at, .keep_size = false}));
  }
  CHECK_THROWS_WITH(perdita::distillation<double>({.temperature = 1e-310, .keep_size = false}),
                    ContainsSubstring("whose inverse is finite"));
  CHECK_THROWS_WITH(perdita::logit_matching<double>({.temperature = 1e-310, .keep_size = false}),
                    ContainsSubstring("whose inverse is finite"));
  // T (p − q) = T (tanh(1/(2T)), …)
  call(perdita::distillation<double>({.temperature = 1e150}));
  CHECK(std::abs(g[1] - 0.5) <= 1e-15);
  call(perdita::distillation<double>({.temperature = 1e-150}));
  CHECK(std::abs(g[1] / 1e-150 - 1) <= 1e-15);
}

TEST_CASE("distillation: what is refused", "[distillation]") {
  using Catch::Matchers::ContainsSubstring;
  using loss = perdita::distillation<float>;
  CHECK_THROWS_WITH(loss({.temperature = 0}), ContainsSubstring("temperature is 0"));
  CHECK_THROWS_WITH(loss({.beta = 1}), ContainsSubstring("beta is 1"));
  CHECK_THROWS_WITH(loss({.divergence = static_cast<divergence>(9)}),
                    ContainsSubstring("divergence is 9"));
  const std::vector<float> x{0, 1};
  const std::vector<int> label{0};
  CHECK_THROWS_WITH(loss()(perdita::matrix_view<const float>(x.data(), 1, 2), label),
                    ContainsSubstring("target is labels"));
}

TEMPLATE_TEST_CASE("logit_matching: the row battery", "[distillation]", float, double) {
  check_row_loss(matching_descriptor<TestType>());
}

TEMPLATE_TEST_CASE("logit_matching: special rows", "[distillation]", float, double) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double n = std::numeric_limits<double>::quiet_NaN();
  const double log2 = std::log(2.0);
  const std::vector<special_row> rows{
      {"the same", 0, {3, inf, -inf}, -1, {3, inf, -inf}, 0, {0, 0, 0}},
      {"the same", 1, {3, inf, -inf}, -1, {3, inf, -inf}, 0, {0, 0, 0}},
      {"masked for the student", 0, {0, -inf}, -1, {0, 5}, inf, {0, -1}},
      {"masked for the teacher", 0, {0, 5}, -1, {0, -inf}, inf, {0, 1}},
      {"masked for the student", 1, {-inf}, -1, {0}, inf, {-1}},
      {"masked for the teacher", 1, {0}, -1, {-inf}, 4 * log2, {1}},
      {"sure teacher", 1, {0}, -1, {inf}, 4 * log2, {-1}},
      {"squares", 2, {1, -2}, -1, {0, 2}, 8.5, {1, -4}},
      {"masked", 2, {1, -inf}, -1, {0, 2}, inf, {1, -inf}},
      {"centred", 3, {1, -inf, 3}, -1, {0, -inf, 4}, 1, {1, 0, -1}},
      {"centred, per class", 7, {1, -inf, 3}, -1, {0, -inf, 4}, 8, {8, 0, -8}},
      {"all masked for both", 7, {-inf, -inf}, -1, {-inf, -inf}, 0, {0, 0}},
      {"centred, masked", 3, {1, -inf}, -1, {0, 2}, n, {n, n}},
      {"NaN of the teacher", 0, {0, 1}, -1, {0, n}, n, {n, n}},
  };
  check_special(matching_descriptor<TestType>(), rows, 8);
}

TEST_CASE("logit_matching: golden values, and a limit of distillation", "[distillation]") {
  using Catch::Matchers::WithinAbs;
  const std::vector<double> x{.5, -1.2, 2, .1}, t{1, .3, -.7, .2};
  std::vector<double> g(4), h(4);
  const perdita::matrix_view<const double> student(x.data(), 1, 4), teacher(t.data(), 1, 4);
  const perdita::matrix_view<double> to(g.data(), 1, 4), other(h.data(), 1, 4);
  const auto golden = [&](double value, double expected, const std::vector<double>& slopes) {
    CHECK_THAT(value, WithinAbs(expected, 1e-10));
    for (std::size_t k = 0; k < 4; ++k)
      CHECK_THAT(g[k], WithinAbs(slopes[k], 1e-9));
  };
  using loss = perdita::logit_matching<double>;
  golden(loss()(student, teacher, to), 1.15675969252,
         {-0.124353002, -0.358357398, 0.588259256, -0.024994793});
  golden(loss({.distance = logit_distance::binary_kl})(student, teacher, to), 1.19682306462,
         {-0.120565661, -0.366172303, 0.635352315, -0.024963582});
  const double limit = loss({.distance = logit_distance::centred_squared_error, .per_class = true})(
      student, teacher, to);
  const double warm = perdita::distillation<double>({.temperature = 1e6})(student, teacher, other);
  CHECK_THAT(warm, WithinAbs(limit, 1e-5));
  for (std::size_t k = 0; k < 4; ++k)
    CHECK_THAT(h[k], WithinAbs(g[k], 1e-5));
}

TEST_CASE("logit_matching: what is refused", "[distillation]") {
  using Catch::Matchers::ContainsSubstring;
  using loss = perdita::logit_matching<float>;
  CHECK_THROWS_WITH(loss({.temperature = -1}), ContainsSubstring("temperature is -1"));
  CHECK_THROWS_WITH(loss({.distance = static_cast<logit_distance>(4)}),
                    ContainsSubstring("distance is 4"));
  const std::vector<float> x{0, 1};
  const std::vector<int> label{0};
  CHECK_THROWS_WITH(loss()(perdita::matrix_view<const float>(x.data(), 1, 2), label),
                    ContainsSubstring("target is labels"));
}

TEMPLATE_TEST_CASE("squared_log_ratio: value and gradient", "[distillation]", float, double) {
  using T = TestType;
  random_numbers random(11);
  const wide epsilon = std::numeric_limits<T>::epsilon();
  error_judge of_values, of_slopes;
  for (const std::size_t cols : {2U, 8U, 37U})
    for (const double width : {0.01, 2.0, 40.0}) {
      constexpr std::size_t rows = 5;
      std::vector<T> x, t, log_q, g(rows * cols, 7), h(g), values(rows), all(rows);
      std::vector<int> labels;
      for (std::size_t i = 0; i < rows * cols; ++i) {
        t.push_back(static_cast<T>(2 * random.normal()));
        x.push_back(static_cast<T>(static_cast<double>(t[i]) + width * random.normal()));
      }
      for (std::size_t r = 0; r < rows; ++r) {
        labels.push_back(static_cast<int>(r == 3 ? 0 : random.below(cols)));
        log_q.push_back(static_cast<T>(-random.uniform(0, 5)));
      }
      const auto n = static_cast<index>(cols);
      const perdita::matrix_view<const T> scores(x.data(), rows, n), teacher(t.data(), rows, n);
      const perdita::squared_log_ratio<T> loss({.reduction = perdita::reduction::none});
      perdita::call_options<T> call, full;
      call.values = values;
      full.values = all;
      const T sampled =
          loss(scores, labels, log_q, perdita::matrix_view<T>(g.data(), rows, n), call);
      CHECK(loss(scores, labels, log_q) == sampled);
      loss(scores, teacher, perdita::matrix_view<T>(h.data(), rows, n), full);
      const auto check = [](error_judge& judge, const wide& got, const wide& expected,
                            const wide& size) {
        judge.within(size_of(wide(got - expected)), 8, size + std::numeric_limits<T>::min());
      };
      for (std::size_t r = 0; r < rows; ++r) {
        const softmax_row p({x.begin() + index(r) * n, x.begin() + index(r + 1) * n});
        const softmax_row q({t.begin() + index(r) * n, t.begin() + index(r + 1) * n});
        const auto y = static_cast<std::size_t>(labels[r]);
        const wide ratio = -p.surprise(y) - log_q[r];
        const wide unsure = p.surprise(y) + size_of(wide(log_q[r]));
        check(of_values, values[r], wide(ratio * ratio / 2),
              epsilon * (ratio * ratio + unsure * size_of(ratio)));
        wide squares = 0, sum = 0, sizes = 0;
        for (std::size_t k = 0; k < cols; ++k) {
          const wide l = q.surprise(k) - p.surprise(k);
          squares += l * l / 2;
          sum += l;
          sizes += size_of(l) + p.surprise(k) * wide(1e-3);
        }
        check(of_values, all[r], squares, epsilon * (squares + sizes * sizes / n));
        for (std::size_t k = 0; k < cols; ++k) {
          const std::size_t at = r * cols + k;
          const wide share = k == y ? p.miss(k) : wide(-p.p(k));
          check(of_slopes, g[at], wide(ratio * share),
                epsilon * size_of(share) * (unsure + size_of(ratio)) * (2 + width));
          check(of_slopes, h[at], wide(q.surprise(k) - p.surprise(k) - p.p(k) * sum),
                epsilon * (sizes + size_of(p.z[k])));
        }
      }
    }
  report_accuracy<T>("squared_log_ratio", "", in_epsilons_of_terms, of_values, of_slopes);
  INFO(of_values.worst() << " and " << of_slopes.worst());
  CHECK(of_values.all_within());
  CHECK(of_slopes.all_within());
}

TEST_CASE("squared_log_ratio: golden value, derivatives, a student near its teacher",
          "[distillation]") {
  using Catch::Matchers::WithinAbs;
  std::vector<double> x{.5, -1.2, 2, .1}, t{1, .3, -.7, .2}, g(4);
  const std::vector<double> log_q{-1};
  const std::vector<int> label{0};
  const perdita::matrix_view<const double> scores(x.data(), 1, 4), teacher(t.data(), 1, 4);
  const perdita::matrix_view<double> to(g.data(), 1, 4);
  const perdita::squared_log_ratio<double> loss;
  CHECK_THAT(loss(scores, label, log_q, to), WithinAbs(0.357892936342, 1e-11));
  const std::vector<double> slopes{-0.712484492, 0.0243986274, 0.598560063, 0.0895258021};
  for (std::size_t k = 0; k < 4; ++k)
    CHECK_THAT(g[k], WithinAbs(slopes[k], 1e-9));
  const auto sampled =
      perdita::testing::check_gradient([&] { return loss(scores, label, log_q); }, x, g);
  CHECK(sampled.ok);
  loss(scores, teacher, to);
  const auto full = perdita::testing::check_gradient([&] { return loss(scores, teacher); }, x, g);
  CHECK(full.ok);
  // Quotients of 1 + 1e-9: the squares keep their digits.
  for (std::size_t k = 0; k < 4; ++k)
    x[k] = t[k] + (k == 1 ? 0x1p-30 : 0);
  const double p = std::exp(.3) / (std::exp(1.0) + std::exp(.3) + std::exp(-.7) + std::exp(.2));
  const double expected = 0x1p-61 * ((1 - p) * (1 - p) + 3 * p * p);
  CHECK_THAT(loss(scores, teacher) / expected, WithinAbs(1, 1e-8));
}

// Labels drawn from q: the expected gradient is 0 at p = q for squared_log_ratio, and at p ~ q² for
// cross-entropy weighted by q_y.
TEST_CASE("squared_log_ratio: what it converges to", "[distillation]") {
  const std::vector<double> q{.5, .3, .15, .05};
  const auto expected_gradient = [&](const std::vector<double>& p, bool weighted_entropy) {
    std::vector<double> x, sum(4), g(4);
    for (const double share : p)
      x.push_back(std::log(share));
    for (std::size_t y = 0; y < 4; ++y) {
      const std::vector<int> label{static_cast<int>(y)};
      const std::vector<double> log_q{std::log(q[y])};
      perdita::squared_log_ratio<double>()(perdita::matrix_view<const double>(x.data(), 1, 4),
                                           label, log_q,
                                           perdita::matrix_view<double>(g.data(), 1, 4));
      for (std::size_t k = 0; k < 4; ++k)
        sum[k] += q[y] * (weighted_entropy ? q[y] * (p[k] - (k == y ? 1 : 0)) : g[k]);
    }
    double size = 0;
    for (const double s : sum)
      size += std::abs(s);
    return size;
  };
  std::vector<double> squared;
  for (const double share : q)
    squared.push_back(share * share / (.25 + .09 + .0225 + .0025));
  CHECK(expected_gradient(q, false) < 1e-14);
  CHECK(expected_gradient(squared, false) > 0.1);
  CHECK(expected_gradient(squared, true) < 1e-14);
  CHECK(expected_gradient(q, true) > 0.1);
}

TEST_CASE("squared_log_ratio: special rows, threads, and what is refused", "[distillation]") {
  using Catch::Matchers::ContainsSubstring;
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double n = std::numeric_limits<double>::quiet_NaN();
  const auto run = [](std::vector<double> x, int y, double log_q, std::vector<double>& g) {
    g.assign(x.size(), 7);
    const std::vector<int> labels{y};
    const std::vector<double> given{log_q};
    const auto cols = static_cast<index>(x.size());
    return perdita::squared_log_ratio<double>()(
        perdita::matrix_view<const double>(x.data(), 1, cols), labels, given,
        perdita::matrix_view<double>(g.data(), 1, cols));
  };
  std::vector<double> g;
  CHECK((run({4}, 0, 0, g) == 0 && g[0] == 0));
  CHECK((run({4, -inf}, 1, -inf, g) == 0 && g == std::vector<double>{0, 0}));
  CHECK((run({4, -inf}, 1, -2, g) == inf && g == std::vector<double>{inf, -inf}));
  CHECK((run({0, 0}, 1, -inf, g) == inf && g == std::vector<double>{-inf, inf}));
  CHECK((run({900, 0}, 0, -1, g) == 0.5 && g == std::vector<double>{0, 0}));
  CHECK((run({0, 900}, 0, -1, g) == 0.5 * 899 * 899 && g == std::vector<double>{-899, 899}));
  CHECK(run({0, 0}, -100, n, g) == 0);
  CHECK(g == std::vector<double>{0, 0});
  for (const double bad : {inf, n}) {
    CHECK(std::isnan(run({0, bad}, 0, -1, g)));
    CHECK((std::isnan(g[0]) && std::isnan(g[1])));
  }
  CHECK(std::isnan(run({0, 1}, 0, n, g)));
  CHECK(std::isnan(run({-inf, -inf}, 0, -1, g)));

  using loss = perdita::squared_log_ratio<float>;
  random_numbers random(12);
  std::vector<float> x(3000), log_q(300), first(3000), second(3000);
  std::vector<std::int64_t> labels(300);
  for (float& score : x)
    score = static_cast<float>(random.normal());
  for (std::size_t r = 0; r < 300; ++r)
    labels[r] = static_cast<std::int64_t>(r % 10), log_q[r] = -static_cast<float>(r) / 100;
  perdita::call_options<float> call;
  call.run_on = perdita::serial;
  const perdita::matrix_view<const float> scores(x.data(), 300, 10);
  const float value =
      loss()(scores, labels, log_q, perdita::matrix_view<float>(first.data(), 300, 10), call);
  const threads_executor threads(3, task_order::shuffled);
  call.run_on = threads;
  CHECK(loss()(scores, labels, log_q, perdita::matrix_view<float>(second.data(), 300, 10), call) ==
        value);
  CHECK(first == second);

  const std::vector<float> short_one(299);
  CHECK_THROWS_WITH(loss()(scores, labels, short_one),
                    ContainsSubstring("log_probabilities is 299"));
  CHECK_THROWS_WITH(loss()(scores, perdita::matrix_view<const float>(x.data(), 300, 9)),
                    ContainsSubstring("columns of teacher is 9"));
  labels[7] = 10;
  CHECK_THROWS_WITH(loss()(scores, labels, log_q), ContainsSubstring("labels[7] is 10"));
}

} // namespace perdita_tests
