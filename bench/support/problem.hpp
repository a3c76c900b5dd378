// SPDX-License-Identifier: MIT
#pragma once

/// The inputs that everything is measured on, and what the right answers are: a plain two-pass
/// softmax in double, written for clarity. Nothing is timed whose result was not checked.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

#include <perdita/core/storage.hpp>
#include <perdita/core/views.hpp>

#include "memory.hpp"

namespace bench {

using perdita::bfloat16;
using perdita::index;
using perdita::matrix_view;

struct shape {
  index rows, cols;
  std::string name() const { return std::to_string(rows) + "x" + std::to_string(cols); }
};

/// Image classes, vocabularies of three sizes, digits, and yes or no.
inline constexpr shape shapes[] = {{8192, 1000}, {1024, 32000}, {256, 128256},
                                   {64, 256000}, {65536, 10},   {262144, 2}};

enum class layout { row_major, column_major };
inline const char* name(layout l) { return l == layout::row_major ? "row" : "column"; }

template <class S> constexpr const char* storage_name() {
  return std::is_same_v<S, float> ? "float" : "bfloat16";
}

inline double to_double(float x) { return static_cast<double>(x); }
inline double to_double(bfloat16 x) {
  return static_cast<double>(std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16));
}

/// Normal variates. Period 2^20 + 7, prime to every row length, so that no two rows start alike.
inline const std::vector<float>& normal_variates() {
  static const std::vector<float> values = [] {
    std::vector<float> v((std::size_t{1} << 20) + 7);
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::generate(v.begin(), v.end(), [&] { return normal(random); });
    return v;
  }();
  return values;
}

/// Fills n scores of standard deviation sigma.
template <class S> void fill(S* scores, index n, float sigma) {
  const auto& values = normal_variates();
  std::size_t next = 0;
  for (index i = 0; i < n; ++i) {
    const float x = values[next] * sigma;
    next = next + 1 == values.size() ? 0 : next + 1;
    if constexpr (std::is_same_v<S, float>)
      scores[i] = x;
    else
      scores[i].bits = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(x) >> 16);
  }
}

/// Scores in a buffer of memory(), labels, and what mean cross-entropy makes of them.
template <class S> class problem {
public:
  problem(shape size, layout order, float sigma = 2, std::byte* where = memory().logits())
      : size_(size), order_(order), scores_(reinterpret_cast<S*>(where)) {
    fill(scores_, size.rows * size.cols, sigma);
    std::mt19937_64 random(2);
    labels_.resize(static_cast<std::size_t>(size.rows));
    for (auto& label : labels_)
      label = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(size.cols));
    solve();
  }

  bool is(shape size, layout order) const {
    return size.rows == size_.rows && size.cols == size_.cols && order == order_;
  }
  const std::vector<std::int64_t>& labels() const { return labels_; }
  index elements() const { return size_.rows * size_.cols; }
  double bytes() const { return static_cast<double>(elements()) * sizeof(S); }
  /// The number of floats that take as much memory.
  std::size_t floats() const { return static_cast<std::size_t>(bytes()) / sizeof(float); }

  matrix_view<const S> scores() const { return view<const S>(scores_); }
  template <class U> matrix_view<U> view(U* data) const {
    return order_ == layout::row_major
               ? matrix_view<U>(data, size_.rows, size_.cols)
               : matrix_view<U>(data, size_.rows, size_.cols, 1, size_.rows);
  }
  matrix_view<S> gradient() const { return view(reinterpret_cast<S*>(memory().gradient())); }
  matrix_view<S> in_place() const { return view(reinterpret_cast<S*>(memory().in_place())); }

  bool right(double loss, double tolerance = 1e-6) const {
    return std::abs(loss - loss_) <= tolerance * loss_;
  }

  /// Looks at the label's entry and two others of every row.
  bool right(const matrix_view<const S>& gradient,
             double tolerance = std::is_same_v<S, float> ? 1e-5 : 4e-3,
             double tolerance_of_p = 1e-12) const {
    const double share = 1 / static_cast<double>(size_.rows);
    for (index r = 0; r < size_.rows; ++r) {
      const index y = labels_[static_cast<std::size_t>(r)];
      for (const index c : {y, r % size_.cols, size_.cols - 1 - r % size_.cols}) {
        const double p =
            std::exp(to_double(scores()(r, c)) - log_sum_exp_[static_cast<std::size_t>(r)]);
        const double expected = (p - (c == y)) * share;
        if (!(std::abs(to_double(gradient(r, c)) - expected) <=
              tolerance * std::abs(expected) + tolerance_of_p * share))
          return false;
      }
    }
    return true;
  }

private:
  void solve() {
    log_sum_exp_.resize(static_cast<std::size_t>(size_.rows));
    const matrix_view<const S> x = scores();
    const index block = 32; // rows that share cache lines where the matrix is column-major
    for (index begin = 0; begin < size_.rows; begin += block) {
      const index end = std::min(size_.rows, begin + block);
      double maximum[block], sum[block] = {};
      std::fill_n(maximum, block, -HUGE_VAL);
      for (index c = 0; c < size_.cols; ++c)
        for (index r = begin; r < end; ++r)
          maximum[r - begin] = std::max(maximum[r - begin], to_double(x(r, c)));
      for (index c = 0; c < size_.cols; ++c)
        for (index r = begin; r < end; ++r)
          sum[r - begin] += std::exp(to_double(x(r, c)) - maximum[r - begin]);
      for (index r = begin; r < end; ++r)
        log_sum_exp_[static_cast<std::size_t>(r)] = maximum[r - begin] + std::log(sum[r - begin]);
    }
    double sum = 0;
    for (index r = 0; r < size_.rows; ++r)
      sum += log_sum_exp_[static_cast<std::size_t>(r)] -
             to_double(x(r, labels_[static_cast<std::size_t>(r)]));
    loss_ = sum / static_cast<double>(size_.rows);
  }

  shape size_;
  layout order_;
  S* scores_;
  std::vector<std::int64_t> labels_;
  std::vector<double> log_sum_exp_;
  double loss_ = 0;
};

/// The problem that memory().logits() holds.
inline auto& current_problem() {
  static std::variant<std::monostate, problem<float>, problem<bfloat16>> current;
  return current;
}

/// Makes it the one asked for, if it is not that already.
template <class S> const problem<S>& use_problem(shape size, layout order = layout::row_major) {
  const auto* p = std::get_if<problem<S>>(&current_problem());
  return p && p->is(size, order) ? *p : current_problem().template emplace<problem<S>>(size, order);
}

} // namespace bench
