// SPDX-License-Identifier: MIT

// The linear head gives the same bits however it is asked: by any number of threads, from anywhere
// in memory, with old or new scratch memory, alone or among other rows.

#include <perdita/linear.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/linear_run.hpp"
#include "support/numbers.hpp"

namespace perdita_tests {
namespace {

template <class T> struct named_head {
  std::string name;
  linear_subject_pointer<T> head;
};
/// Every kernel: plain, with side numbers, and with moments.
template <class T> std::vector<named_head<T>> heads() {
  std::vector<named_head<T>> all;
  all.push_back({"plain", make_linear(perdita::cross_entropy<T>())});
  all.push_back({"smoothed", make_linear(perdita::cross_entropy<T>({.label_smoothing = T(0.1)}))});
  all.push_back({"z_loss", make_linear(perdita::z_loss<T>())});
  return all;
}

/// Three blocks of rows for double, two for float; nine pieces; and what is left over everywhere.
template <class T> linear_problem<T> some_problem(std::uint64_t seed) {
  random_numbers random(seed);
  linear_problem<T> p = make_linear_problem<T>(261, 37, 530, seed);
  ignore_some(p);
  add_weights(p, random);
  return p;
}

} // namespace

TEMPLATE_TEST_CASE("linear: the same bits for any number of threads, in any order, roomy or tight",
                   "[linear][threads]", float, double) {
  using T = TestType;
  random_numbers random(2);
  // The other has more pieces than fit a block of 64 rows, so that tight may mean several.
  const bool many = GENERATE(false, true);
  linear_problem<T> p = many ? make_linear_problem<T>(35, 11, 6200, 2) : some_problem<T>(1);
  if (many)
    add_before(p, random);
  for (const named_head<T>& tried : heads<T>()) {
    const std::string& name = tried.name;
    const linear_subject_pointer<T>& head = tried.head;
    const linear_answer<T> roomy = run(*head, p);
    CHECK(roomy.trespass.empty());
    for (const index pieces : {0, 1, 5}) { // that the budget pays for; 0: as many as there are
      linear_way way;
      way.budget = least_budget<T>(p.rows, p.classes) * static_cast<std::size_t>(pieces);
      linear_answer<T> first = run(*head, p, way);
      const auto check = [&](const std::string& what) {
        INFO(name << ", budget of " << pieces << " pieces, " << what);
        CHECK(difference(first, run(*head, p, way)) == "");
      };
      for (const std::size_t threads : {1U, 2U, 3U, 7U, 16U}) {
        const threads_executor pool(threads,
                                    threads % 2 == 1 ? task_order::shuffled : task_order::forward);
        way.run_on = pool;
        check(std::to_string(threads) + " threads");
      }
      for (const task_order order : {task_order::reversed, task_order::shuffled}) {
        const one_thread_executor one(order);
        way.run_on = one;
        check("tasks one after another");
      }
      const threads_executor pool(3, task_order::reversed);
      way.run_on = pool;
      way.wants_gradient = false;
      check("value only");
      // That pays for all pieces of fewer rows at a time: the sums over rows are others.
      if (pieces == 5 && !many)
        first.d_weights.clear(), first.d_bias.clear();
      INFO(name << ", budget of " << pieces << " pieces, against all of them");
      CHECK(difference(roomy, first) == "");
    }
  }
}

TEMPLATE_TEST_CASE("linear: the same bits from any place and with any strides", "[linear]", float,
                   double) {
  using T = TestType;
  const linear_problem<T> p = some_problem<T>(3);
  for (const named_head<T>& tried : heads<T>()) {
    const std::string& name = tried.name;
    const linear_subject_pointer<T>& head = tried.head;
    const linear_answer<T> first = run(*head, p);
    REQUIRE(first.trespass.empty());
    const auto check = [&](const linear_way& way, const std::string& what) {
      INFO(name << ", " << what);
      CHECK(difference(first, run(*head, p, way)) == "");
    };
    for (const std::size_t offset : {1U, 3U, 7U}) {
      linear_way way;
      way.offset = offset;
      check(way, std::to_string(offset) + " past an aligned address");
    }
    for (const edge at : {edge::front, edge::back}) {
      linear_way way;
      way.against = at;
      check(way, at == edge::front ? "behind a page" : "before a page");
    }
    for (const index step : {2, -1, -3}) {
      linear_way way;
      way.step = step;
      check(way, "vectors with a step of " + std::to_string(step));
    }
    for (int l = 1; l < static_cast<int>(layout::count); ++l) {
      const auto other = static_cast<layout>(l);
      linear_way all;
      all.hidden = all.weights = all.d_hidden = all.d_weights = other;
      all.against = l % 2 == 0 ? edge::back : edge::front;
      check(all, std::string("all ") + name_of(other));
      if (other == layout::padded || other == layout::column_major ||
          other == layout::channels_first) {
        layout linear_way::*const each[] = {&linear_way::hidden, &linear_way::weights,
                                            &linear_way::d_hidden, &linear_way::d_weights};
        for (std::size_t k = 0; k < 4; ++k) {
          linear_way way;
          way.*each[k] = other;
          way.budget = k % 2 == 1 ? least_budget<T>(p.rows, p.classes) : 0;
          check(way, std::string(name_of(other)) + ", matrix " + std::to_string(k) + " alone");
        }
      }
    }
  }
}

TEMPLATE_TEST_CASE("linear: the same bits with old, new or no scratch memory, and in every part",
                   "[linear]", float, double) {
  using T = TestType;
  for (const named_head<T>& tried : heads<T>()) {
    const std::string& name = tried.name;
    const linear_subject_pointer<T>& head = tried.head;
    perdita::workspace memory;
    const linear_problem<T> large = some_problem<T>(5);
    const linear_problem<T> small = make_linear_problem<T>(5, 300, 70, 6);
    const linear_answer<T> large_first = run(*head, large), small_first = run(*head, small);
    for (int round = 0; round < 3; ++round)
      for (const bool tight : {false, true}) {
        INFO(name << ", round " << round << (tight ? ", tight" : ""));
        linear_way way;
        way.memory = &memory;
        way.budget = tight ? least_budget<T>(large.rows, large.classes) : 0;
        CHECK(difference(large_first, run(*head, large, way)) == "");
        way.budget = tight ? least_budget<T>(small.rows, small.classes) : 0;
        CHECK(difference(small_first, run(*head, small, way)) == "");
        // Scratch memory full of NaN
        const std::size_t size = memory.size();
        std::fill_n(memory.request(size), size, std::byte{0xFF});
      }
    linear_way way;
    way.by_products = 0;
    CHECK(difference(large_first, run(*head, large, way)) == "");
    way.by_products = 1;
    CHECK(difference(large_first, run(*head, large, way)) == "");
    way.wants_d_bias = false;
    CHECK(difference(large_first, run(*head, large, way)) == "");
    way.wants_gradient = false;
    CHECK(difference(large_first, run(*head, large, way)) == "");
    way.budget = least_budget<T>(large.rows, large.classes);
    CHECK(difference(large_first, run(*head, large, way)) == "");
  }
}

TEMPLATE_TEST_CASE("linear: a row's result does not depend on the other rows", "[linear]", float,
                   double) {
  using T = TestType;
  using perdita::reduction;
  const linear_subject_pointer<T> heads[] = {
      make_linear(perdita::cross_entropy<T>({.reduction = reduction::none})),
      make_linear(perdita::cross_entropy<T>(
          {.label_smoothing = T(0.1), .reduction = reduction::none, .softcap = T(20)})),
      make_linear(perdita::z_loss<T>({.reduction = reduction::none}))};
  linear_problem<T> p = make_linear_problem<T>(270, 29, 700, 7, 8);
  for (const auto& head : heads) {
    const linear_answer<T> all = run(*head, p);
    // Some rows alone, and all rows in another place and beside others.
    for (const index r : {0, 15, 16, 100, 256, 269}) {
      linear_problem<T> one = p;
      one.rows = 1;
      const auto from = [&](const std::vector<T>& v) {
        return std::vector<T>(v.begin() + r * p.features, v.begin() + (r + 1) * p.features);
      };
      one.hidden = from(p.hidden);
      one.labels = {p.labels[static_cast<std::size_t>(r)]};
      const linear_answer<T> alone = run(*head, one);
      INFO("row " << r);
      CHECK(same(alone.d_hidden, from(all.d_hidden)));
      for (std::size_t k = 0; k < 5; ++k)
        if (!alone.by_products[k].empty())
          CHECK(same(alone.by_products[k][0], all.by_products[k][static_cast<std::size_t>(r)]));
    }
    linear_problem<T> rotated = p; // row r becomes row r + 77, and every third is ignored
    for (index r = 0; r < p.rows; ++r) {
      const index to = (r + 77) % p.rows;
      rotated.labels[static_cast<std::size_t>(to)] =
          r % 3 == 0 ? p.ignore_index : p.labels[static_cast<std::size_t>(r)];
      std::copy_n(p.hidden.begin() + r * p.features, p.features,
                  rotated.hidden.begin() + to * p.features);
    }
    const linear_answer<T> moved = run(*head, rotated);
    std::size_t wrong = 0;
    for (index r = 0; r < p.rows; ++r) {
      const index to = (r + 77) % p.rows;
      for (index d = 0; d < p.features; ++d) {
        const T expected =
            r % 3 == 0 ? T(0) : all.d_hidden[static_cast<std::size_t>(r * p.features + d)];
        wrong += !same(expected, moved.d_hidden[static_cast<std::size_t>(to * p.features + d)]);
      }
      const T value = r % 3 == 0 ? T(0) : all.by_products[0][static_cast<std::size_t>(r)];
      wrong += !same(value, moved.by_products[0][static_cast<std::size_t>(to)]);
    }
    CHECK(wrong == 0);
  }
}

} // namespace perdita_tests
