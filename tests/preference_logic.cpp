// SPDX-License-Identifier: MIT

// Losses from truth tables: formula sheet "preference", section 7.

#include <perdita/preference/dpo.hpp>
#include <perdita/preference/logic.hpp>

#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <perdita/testing/gradient_check.hpp>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/dual.hpp"
#include "support/numbers.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

using perdita::mark;
using perdita::truth_table;
namespace tables = perdita::truth_tables;

bool counts(const truth_table& table, std::size_t k, bool numerator) {
  return table.marks[k] == mark::both ||
         table.marks[k] == (numerator ? mark::numerator : mark::denominator);
}

/// ρ of a table from its four weights: log Σ exp of what each mark counts.
struct reference_ratio {
  dual cases[4], up, down;

  reference_ratio(const truth_table& table, const dual& a, const dual& b)
      : cases{a + b, a + log1mexp(b), log1mexp(a) + b, log1mexp(a) + log1mexp(b)},
        up(total(table, true)), down(total(table, false)) {}
  dual ratio() const { return up - down; }

  /// What the slope by an event adds up: the products of weights of a case with it and one without,
  /// in numerator and denominator, that independence does not cancel. The rows without and with
  /// it where the other event is true, and where it is false.
  wide parts(const truth_table& t, std::size_t no, std::size_t yes, std::size_t no_2,
             std::size_t yes_2, const wide& slope) const {
    const auto c = [&](std::size_t i, std::size_t j) {
      return counts(t, i, false) * counts(t, j, true) - counts(t, i, true) * counts(t, j, false);
    };
    const auto product = [&](int times, std::size_t i, std::size_t j) {
      return times == 0 ? wide(0)
                        : size_of(wide(times)) *
                              exp(wide(cases[i].value + cases[j].value - up.value - down.value));
    };
    return slope * (product(c(no, yes), no, yes) + product(c(no_2, yes_2), no_2, yes_2) +
                    product(c(no, yes_2) + c(no_2, yes), no, yes_2));
  }

private:
  dual total(const truth_table& table, bool numerator) const {
    wide top = -infinity(), sum = 0, slope = 0;
    for (std::size_t k = 0; k < 4; ++k)
      top = counts(table, k, numerator) ? larger(top, cases[k].value) : top;
    for (std::size_t k = 0; k < 4; ++k)
      if (counts(table, k, numerator)) {
        const wide image = exp(wide(cases[k].value - top));
        sum += image;
        slope += image * cases[k].slope;
      }
    return dual(top + log(sum), slope / sum);
  }
};

std::vector<truth_table> all_tables() {
  std::vector<truth_table> all;
  for (unsigned k = 0; k < 256; ++k) {
    const truth_table table(static_cast<mark>(k & 3), static_cast<mark>(k / 4 & 3),
                            static_cast<mark>(k / 16 & 3), static_cast<mark>(k / 64));
    if (table.has(mark::numerator) && table.has(mark::denominator))
      all.push_back(table);
  }
  return all;
}

const std::pair<const char*, truth_table> named[] = {
    {"ce", tables::ce},         {"ce_unl", tables::ce_unl}, {"cpo", tables::cpo},
    {"orpo", tables::orpo},     {"un_cpo", tables::un_cpo}, {"c_cpo", tables::c_cpo},
    {"cf_unl", tables::cf_unl}, {"f_unl", tables::f_unl},   {"qf_unl", tables::qf_unl},
    {"s_cpo", tables::s_cpo}};

constexpr double at[] = {-1e-12, -1e-3, -0.3, -0.7, -2, -30, -800, -1e4};

auto close(double x, double tolerance) { return Catch::Matchers::WithinRel(x, tolerance); }

struct result {
  double value, chosen, rejected;
};
result run(const perdita::preference_loss<double>& loss, double a, double b) {
  const std::vector<double> w{a}, l{b}, rw{std::isfinite(a) ? a - 0.5 : -1},
      rl{std::isfinite(b) ? b - 0.25 : -1};
  std::vector<double> dw(1), dl(1);
  const double value =
      loss({.chosen = w, .rejected = l, .chosen_reference = rw, .rejected_reference = rl}, dw, dl);
  return {value, dw[0], dl[0]};
}

} // namespace

TEST_CASE("logic: all 225 ratios against the sums of their cases", "[preference]") {
  const auto all = all_tables();
  CHECK(all.size() == 225);
  constexpr double epsilon = 0x1p-52, in_reference = 0x1p-56; // whose shares cancel at 2^-112
  error_judge of_values, of_slopes;
  for (const truth_table& table : all)
    for (const double a : at)
      for (const double b : at) {
        INFO(static_cast<int>(table.marks[0])
             << static_cast<int>(table.marks[1]) << static_cast<int>(table.marks[2])
             << static_cast<int>(table.marks[3]) << " " << a << " " << b);
        const perdita::core_ratio got = perdita::log_ratio_of(table, a, b);
        const reference_ratio by_a(table, dual(a, 1), dual(b)), by_b(table, dual(a), dual(b, 1));
        const double size = 30 + std::fabs(a) + std::fabs(b);
        CHECK(of_values.within(size_of(wide(got.value - by_a.ratio().value)), 4, epsilon * size));
        const auto judge = [&](double slope, const wide& right, const wide& parts,
                               const wide& most) {
          CHECK(of_slopes.within(size_of(wide(slope - right)), 4,
                                 epsilon * size * (parts + in_reference * most)));
        };
        const wide most_a = -1 / expm1(wide(a)), most_b = -1 / expm1(wide(b));
        judge(got.by_chosen, by_a.ratio().slope, by_a.parts(table, 2, 0, 3, 1, most_a), most_a);
        judge(got.by_rejected, by_b.ratio().slope, by_b.parts(table, 1, 0, 3, 2, most_b), most_b);
      }
  report_accuracy<double>("log_ratio_of", "225 tables", in_epsilons_of_terms, of_values, of_slopes);
}

TEST_CASE("logic: tables of losses with names", "[preference]") {
  const double a = -0.4, b = -1.3, p = std::exp(a), q = std::exp(b);
  const double ratios[] = {p / (1 - p),
                           p * (1 - q) / (q + (1 - q) * (1 - p)),
                           p / q,
                           p * (1 - q) / (q * (1 - p)),
                           (1 - q * (1 - p)) / (q * (1 - p)),
                           p / ((1 - p) * q),
                           (1 - q) / ((1 - p) * q),
                           (1 - q) / q,
                           p * (1 - q) / q,
                           (p * q + 1 - q) / q};
  for (std::size_t k = 0; k < 10; ++k) {
    INFO(named[k].first);
    CHECK_THAT(perdita::log_ratio_of(named[k].second, a, b).value,
               close(std::log(ratios[k]), 1e-14));
  }
  // Structures: implication of the chosen by the rejected, the same where not both or neither are
  // accepted, and with "both" given to either side.
  const std::array<bool, 4> chosen{true, true, false, false}, implied{true, true, false, true};
  CHECK(truth_table::of(chosen) == tables::ce);
  CHECK(truth_table::of(implied) == tables::un_cpo);
  CHECK(truth_table::of(implied, {false, true, true, false}) == tables::orpo);
  CHECK(truth_table::of(implied, {true, true, true, false}, {true, false, false, false}) ==
        tables::cpo);
  CHECK(truth_table::of(chosen, {true, true, true, false}) == tables::c_cpo);
}

TEST_CASE("logic: identities", "[preference]") {
  random_numbers random(9);
  using perdita::logic_preference;
  for (int i = 0; i < 20; ++i) {
    const double a = random.uniform(-3, -0.01), b = random.uniform(-3, -0.01);
    for (const truth_table& table : all_tables()) {
      const auto rho = perdita::log_ratio_of(table, a, b);
      const auto back = perdita::log_ratio_of(table.swapped(), a, b);
      CHECK((rho.value == -back.value && rho.by_chosen == -back.by_chosen &&
             rho.by_rejected == -back.by_rejected));
    }
    // −log of the numerator's share; cross-entropy; one more case in the numerator is a smaller
    // loss
    CHECK_THAT(run(logic_preference<double>({.table = tables::ce}), a, b).value, close(-a, 1e-13));
    CHECK_THAT(run(logic_preference<double>({.table = tables::ce}), a, b).chosen, close(-1, 1e-13));
    CHECK_THAT(run(logic_preference<double>(), a, b).value,
               close(std::log1p(std::exp(b - a)), 1e-13));
    CHECK(run(logic_preference<double>({.table = tables::un_cpo}), a, b).value <
          run(logic_preference<double>({.table = tables::c_cpo}), a, b).value);
    // ORPO, SimPO, DPO and IPO
    const auto same = [&](const perdita::preference_loss<double>& x,
                          const perdita::preference_loss<double>& y) {
      const result one = run(x, a, b), other = run(y, a, b);
      CHECK_THAT(one.value, close(other.value, 1e-12));
      CHECK_THAT(one.chosen, close(other.chosen, 1e-12));
      CHECK_THAT(one.rejected, close(other.rejected, 1e-12));
    };
    same(logic_preference<double>({.table = tables::orpo}),
         perdita::orpo<double>({.lambda = 1, .likelihood = 0}));
    same(logic_preference<double>({.beta = 2, .offset = 0.5}), perdita::simpo<double>());
    const auto by_ratio = perdita::logic_reference::log_ratio;
    const auto by_table = perdita::logic_reference::same_table;
    for (const auto reference : {by_ratio, by_table})
      same(logic_preference<double>({.beta = 0.1, .reference = reference}), perdita::dpo<double>());
    same(logic_preference<double>({.link = perdita::links::square(5), .reference = by_ratio}),
         perdita::dpo<double>({.types = {perdita::dpo_type::ipo_sum}}));
    // The reference of a table: a constant
    const auto offset = perdita::log_ratio_of(tables::orpo, a - 0.5, b - 0.25).value;
    same(logic_preference<double>({.table = tables::orpo, .reference = by_table}),
         logic_preference<double>({.table = tables::orpo, .offset = offset}));
  }
}

TEMPLATE_TEST_CASE("logic: the gradient of averages is the derivative", "[preference]", float,
                   double) {
  using T = TestType;
  random_numbers random(4);
  std::vector<T> w(4), l(4), dw(4), dl(4);
  const std::vector<int> nw{1, 3, 5, 2}, nl{2, 2, 7, 1};
  for (std::size_t i = 0; i < 4; ++i) {
    w[i] = static_cast<T>(random.uniform(-9, -1));
    l[i] = static_cast<T>(random.uniform(-9, -1));
  }
  error_judge of_values, of_slopes;
  for (const auto& entry : named) {
    const truth_table& table = entry.second;
    const perdita::logic_preference<T> loss(
        {.table = table, .link = perdita::links::square(2), .beta = T(0.75)});
    const auto value = [&] {
      return loss({.chosen = w, .rejected = l, .chosen_lengths = nw, .rejected_lengths = nl});
    };
    const T got =
        loss({.chosen = w, .rejected = l, .chosen_lengths = nw, .rejected_lengths = nl}, dw, dl);
    wide expected = 0;
    for (std::size_t i = 0; i < 4; ++i) {
      const wide a = wide(w[i]) / nw[i], b = wide(l[i]) / nl[i];
      const auto of = [&](const wide& da, const wide& db) {
        const dual off =
            wide(0.75) * reference_ratio(table, dual(a, da), dual(b, db)).ratio() - wide(2);
        return off * off * wide(0.25);
      };
      expected += of(0, 0).value;
      const dual by_a = of(1 / wide(nw[i]), 0), by_b = of(0, 1 / wide(nl[i]));
      const double epsilon = std::numeric_limits<T>::epsilon();
      CHECK(of_slopes.within(size_of(wide(dw[i] - by_a.slope)), 1,
                             epsilon * size_of(by_a.slope) + 0x1p-46));
      CHECK(of_slopes.within(size_of(wide(dl[i] - by_b.slope)), 1,
                             epsilon * size_of(by_b.slope) + 0x1p-46));
    }
    CHECK(of_values.within(size_of(wide(got - expected)), 1,
                           std::numeric_limits<T>::epsilon() * expected + 0x1p-46));
    if constexpr (sizeof(T) == 8) {
      INFO(entry.first);
      CHECK(perdita::testing::check_gradient(value, w, dw).ok);
      CHECK(perdita::testing::check_gradient(value, l, dl).ok);
    }
  }
  report_accuracy<T>("logic_preference", "averages", in_allowances, of_values, of_slopes);
}

TEST_CASE("logic: limits and bad input", "[preference]") {
  using perdita::logic_preference;
  constexpr double inf = std::numeric_limits<double>::infinity();
  for (const truth_table& table : all_tables())
    for (const double a : {-0.0, 1e-9, -1e-15, -800.0, -1e6})
      for (const double b : {-0.0, -1e-300, -800.0, -1e6}) {
        const result r = run(logic_preference<double>({.table = table}), a, b);
        CHECK((std::isfinite(r.value) && std::isfinite(r.chosen) && std::isfinite(r.rejected)));
      }
  // The log-odds end, with slope 0
  const result certain = run(logic_preference<double>({.table = tables::f_unl}), -1, 0);
  CHECK_THAT(certain.value, close(-std::log(1e-15), 1e-14));
  CHECK(certain.rejected == 0);
  for (const result& r :
       {run(logic_preference<double>(), std::nan(""), -1),
        run(logic_preference<double>(), -1, std::nan("")),
        run(logic_preference<double>(), -inf, -1), run(logic_preference<double>(), -1, -inf)})
    CHECK((std::isnan(r.value) && std::isnan(r.chosen) && std::isnan(r.rejected)));

  const mark num = mark::numerator, none = mark::none;
  using options = logic_preference<double>::options;
  const options wrong[] = {{.table = {num, num, none, none}},
                           {.table = {none, none, none, mark::denominator}},
                           {.link = nullptr},
                           {.beta = 0},
                           {.beta = std::nan("")},
                           {.offset = inf},
                           {.reference = static_cast<perdita::logic_reference>(3)},
                           {.reduction = static_cast<perdita::reduction>(9)}};
  for (const options& o : wrong)
    CHECK_THROWS_AS(logic_preference<double>(o), std::invalid_argument);
  const std::vector<double> x{-1};
  const logic_preference<double> compared({.reference = perdita::logic_reference::log_ratio});
  CHECK_THROWS_AS(compared({.chosen = x, .rejected = x}), std::invalid_argument);
  const std::vector<int> empty{0};
  CHECK_THROWS_AS(
      logic_preference<double>()(
          {.chosen = x, .rejected = x, .chosen_lengths = empty, .rejected_lengths = empty}),
      std::invalid_argument);
}

TEST_CASE("logic: rewards", "[preference]") {
  const std::vector<double> w{-12}, l{-20}, rw{-12.5}, rl{-19};
  const std::vector<int> nw{5}, nl{8};
  std::vector<double> chosen(1), rejected(1);
  const auto run_of = [&](perdita::logic_reference reference) {
    perdita::logic_preference<double>({.beta = 2, .reference = reference})(
        {.chosen = w,
         .rejected = l,
         .chosen_reference = rw,
         .rejected_reference = rl,
         .chosen_lengths = nw,
         .rejected_lengths = nl},
        {}, {.chosen_rewards = chosen, .rejected_rewards = rejected});
  };
  run_of(perdita::logic_reference::none);
  CHECK_THAT(chosen[0], close(-4.8, 1e-14));
  CHECK(rejected[0] == -5);
  run_of(perdita::logic_reference::same_table);
  CHECK_THAT(chosen[0], close(0.2, 1e-14));
  CHECK(rejected[0] == -0.25);
}

} // namespace perdita_tests
