// SPDX-License-Identifier: MIT

// Products of small blocks: each element one chain of fma over the terms, wherever operands and
// results lie, and nothing else touched.

#include <perdita/core/product.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/memory_block.hpp"
#include "support/numbers.hpp"
#include "support/row_run.hpp"

namespace perdita_tests {
namespace {

using perdita::core::lanes;

/// Numbers at the very end, or the very beginning, of memory that may be touched.
template <class T> class guarded {
public:
  guarded(index n, edge at) : size_(n), block_(static_cast<std::size_t>(n) * sizeof(T), 0, at) {}
  T* data() const { return reinterpret_cast<T*>(block_.data()); }
  void fill(random_numbers& random) {
    for (index i = 0; i < size_; ++i)
      data()[i] = static_cast<T>(random.normal());
  }

private:
  index size_;
  memory_block block_;
};

/// How the broadcast operand lies: as rows, as rows that go through panels, or as columns of them.
enum class broadcast { rows, panelled_rows, panelled_columns };
/// And the result.
enum class written { rows, panels, places };

struct shape {
  index rows, cols, depth;
};

template <class T> struct trial {
  static constexpr auto width = static_cast<index>(lanes<T>);
  static index up(index n) { return (n + width - 1) / width; }

  trial(const shape& s, broadcast from, written to, edge at, random_numbers& random)
      : s_(s), to_(to), stride_(s.cols + (to == written::rows ? 5 : 0)), at_(at) {
    switch (from) {
    case broadcast::rows:
      a_ = {nullptr, s.depth + 3, 1, width};
      break;
    case broadcast::panelled_rows: // element (i, k) in panel k / W, row i of it, lane k
      a_ = {nullptr, width, 1, (s.rows + 1) * width};
      break;
    case broadcast::panelled_columns: // element (i, k) in lane i of row k
      a_ = {nullptr, 1, width, width * width};
      break;
    }
    index last = 0;
    for (index i = 0; i < s.rows; ++i)
      for (index k = 0; k < s.depth; ++k)
        last = std::max(last, place_of(i, k) + 1);
    a_memory_ = std::make_unique<guarded<T>>(last, at);
    a_memory_->fill(random);
    a_.data = a_memory_->data();

    // Columns that are not asked for are there, and are anything.
    const index panel = (s.depth + 1) * width;
    b_memory_ = std::make_unique<guarded<T>>(up(s.cols) * panel, edge::none);
    b_memory_->fill(random);
    for (index j = s.cols; j < up(s.cols) * width; ++j)
      for (index k = 0; k < s.depth; ++k)
        b_memory_->data()[j / width * panel + k * width + j % width] =
            std::numeric_limits<T>::quiet_NaN();
    b_ = {b_memory_->data(), panel};
  }

  index place_of(index i, index k) const {
    return i * a_.row + k / width * a_.section + k % width * a_.step;
  }
  T a(index i, index k) const { return a_.data[place_of(i, k)]; }
  T b(index k, index j) const { return b_.data[j / width * b_.panel + k * width + j % width]; }
  index result_at(index i, index j) const {
    switch (to_) {
    case written::rows:
      return i * stride_ + j;
    case written::panels:
      return j / width * (s_.rows + 1) * width + i * width + j % width;
    case written::places: // rows in another order, from column 3 on
      return (s_.rows - 1 - i) * (s_.cols + 3) + 3 + j;
    }
    return 0;
  }

  /// What is wrong with the product, if anything is.
  std::string check(bool accumulate, random_numbers& random) const {
    index size = 0;
    for (index i = 0; i < s_.rows; ++i)
      for (index j = 0; j < s_.cols; ++j)
        size = std::max(size, result_at(i, j) + 1);
    memory_block memory(static_cast<std::size_t>(size) * sizeof(T), 0, at_);
    T* const c = reinterpret_cast<T*>(memory.data());
    std::vector<T> before;
    for (index i = 0; i < s_.rows; ++i)
      for (index j = 0; j < s_.cols; ++j) {
        before.push_back(static_cast<T>(random.normal()));
        if (accumulate)
          c[result_at(i, j)] = before.back();
      }
    const std::vector<unsigned char> untouched = memory.copy();
    std::vector<T*> places;
    perdita::core::product_result<T> result{c, stride_, width};
    if (to_ == written::panels)
      result = {c, width, (s_.rows + 1) * width};
    if (to_ == written::places) {
      for (index i = 0; i < s_.rows; ++i)
        places.push_back(c + (s_.rows - 1 - i) * (s_.cols + 3));
      result = {nullptr, 0, width, places.data(), 3};
    }
    perdita::core::multiply<T>(a_, b_, result, s_.rows, s_.cols, s_.depth, accumulate);

    std::vector<unsigned char> expected = untouched;
    for (index i = 0; i < s_.rows; ++i)
      for (index j = 0; j < s_.cols; ++j) {
        const index at = result_at(i, j);
        const T got = c[at], old = before[static_cast<std::size_t>(i * s_.cols + j)];
        T sum = 0;
        double size_of_terms = accumulate ? std::abs(static_cast<double>(old)) : 0;
        for (index k = 0; k < s_.depth; ++k) {
          sum = std::fma(a(i, k), b(k, j), sum);
          size_of_terms += std::abs(static_cast<double>(a(i, k)) * static_cast<double>(b(k, j)));
        }
        const T right = accumulate ? old + sum : sum;
        const double allowed = size_of_terms * static_cast<double>(s_.depth + 1) *
                               static_cast<double>(std::numeric_limits<T>::epsilon());
        const bool ok =
            perdita::core::fused
                ? bits(got) == bits(right)
                : std::abs(static_cast<double>(got) - static_cast<double>(right)) <= allowed;
        if (!ok)
          return "element " + std::to_string(i) + ", " + std::to_string(j) + " is " +
                 std::to_string(got) + ", not " + std::to_string(right);
        std::memcpy(expected.data() + memory.position() + static_cast<std::size_t>(at) * sizeof(T),
                    &got, sizeof(T));
      }
    return memory.copy() == expected ? "" : "wrote beside the result";
  }

private:
  shape s_;
  written to_;
  index stride_;
  edge at_;
  perdita::core::broadcast_operand<T> a_;
  perdita::core::panelled_operand<T> b_;
  std::unique_ptr<guarded<T>> a_memory_, b_memory_;
};

template <class T> void try_all(const std::vector<shape>& shapes, edge at, std::uint64_t seed) {
  random_numbers random(seed);
  std::size_t tried = 0, wrong = 0;
  std::string first;
  for (const shape& s : shapes)
    for (const broadcast from :
         {broadcast::rows, broadcast::panelled_rows, broadcast::panelled_columns}) {
      if (from == broadcast::panelled_columns && s.rows > trial<T>::width)
        continue; // a panel has no more lanes
      for (const written to : {written::rows, written::panels, written::places}) {
        const trial<T> t(s, from, to, at, random);
        for (const bool accumulate : {false, true}) {
          ++tried;
          const std::string complaint = t.check(accumulate, random);
          if (!complaint.empty() && wrong++ == 0)
            first = std::to_string(s.rows) + " x " + std::to_string(s.cols) + " x " +
                    std::to_string(s.depth) + ", operand " + std::to_string(int(from)) +
                    ", result " + std::to_string(int(to)) + (accumulate ? ", added: " : ": ") +
                    complaint;
        }
      }
    }
  INFO(wrong << " of " << tried << " products wrong; first: " << first);
  CHECK(wrong == 0);
  CHECK(tried > 0);
}

} // namespace

TEMPLATE_TEST_CASE(
    "product: every element is one chain of fma, whatever rows, columns and terms are "
    "left over",
    "[product]", float, double) {
  constexpr auto w = static_cast<index>(lanes<TestType>);
  std::vector<shape> shapes;
  // Rows of every remainder of every step, up to two steps of the widest (12).
  for (index rows = 1; rows <= 26; ++rows)
    for (const index cols : {index(1), w, w + 3, 3 * w - 1})
      shapes.push_back({rows, cols, w + 3});
  for (index cols = 1; cols <= 4 * w + 1; ++cols)
    shapes.push_back({7, cols, 5});
  for (index depth = 0; depth <= 3 * w + 1; ++depth)
    shapes.push_back({5, w + 2, depth});
  shapes.push_back({48, 16 * w, 256});
  shapes.push_back({13, 2 * w + 1, 255});
  try_all<TestType>(shapes, edge::none, 1);
}

TEMPLATE_TEST_CASE("product: nothing outside the operands is read, nothing outside the result "
                   "written",
                   "[product]", float, double) {
  constexpr auto w = static_cast<index>(lanes<TestType>);
  const std::vector<shape> shapes{{1, 1, 1},          {3, w - 1, 2},          {7, w + 1, w},
                                  {12, 2 * w, w + 1}, {14, 2 * w + 5, 2 * w}, {2, 3 * w - 1, 3}};
  try_all<TestType>(shapes, edge::back, 2);
  try_all<TestType>(shapes, edge::front, 3);
}

TEMPLATE_TEST_CASE("product: NaN and infinities stay in the elements they belong to", "[product]",
                   float, double) {
  using T = TestType;
  constexpr auto w = static_cast<index>(lanes<T>);
  constexpr T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  constexpr index rows = 5, depth = 3;
  const memory_block operand(static_cast<std::size_t>(depth * w) * sizeof(T), 0, edge::none);
  T* const b = reinterpret_cast<T*>(operand.data());
  std::fill_n(b, depth * w, T(1));
  std::vector<T> a(rows * depth, T(1)), c(static_cast<std::size_t>(rows * w), T(7));
  a[1 * depth + 2] = nan;
  a[2 * depth + 0] = inf;
  a[3 * depth + 0] = inf, a[3 * depth + 1] = -inf;
  b[1 * w + 2] = 0; // column 2 of term 1
  perdita::core::multiply<T>({a.data(), depth, 1, w}, {b, depth * w}, {c.data(), w, w}, rows, w,
                             depth, false);
  for (index j = 0; j < w; ++j) {
    const auto at = [&](index i) { return c[static_cast<std::size_t>(i * w + j)]; };
    CHECK(at(0) == (j == 2 ? T(2) : T(3)));
    CHECK(std::isnan(at(1)));
    CHECK(at(2) == inf);
    CHECK(std::isnan(at(3))); // inf - inf, or inf + -inf * 0
    CHECK(at(4) == (j == 2 ? T(2) : T(3)));
  }
}

} // namespace perdita_tests
