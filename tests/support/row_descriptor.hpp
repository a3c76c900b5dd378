// SPDX-License-Identifier: MIT
#pragma once

// What a test of a row loss has to say about it. The generic battery (row_battery.hpp) needs
// nothing else: reference, options, legal inputs, and how large the errors may be.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <perdita/core/row_loss.hpp>
#include <perdita/core/traits.hpp>

#include "wide.hpp"

namespace perdita_tests {

using perdita::index;

/// A row of scores and its target, exactly as the loss sees them.
struct row_input {
  std::vector<wide> scores;
  index label = -1;
  std::vector<wide> soft; ///< empty: there is a label
};

/// A number and how far from it an answer may be, in epsilons of the compute type.
struct expected_number {
  wide value = 0;
  judged slack = 0;
  bool reported = true;

  expected_number() = default;
  template <class Slack>
  expected_number(const wide& v, const Slack& s, bool is_reported = true)
      : value(v), slack(static_cast<judged>(s)), reported(is_reported) {}
  /// More slack.
  template <class Slack> void allow(const Slack& more) { slack += static_cast<judged>(more); }
};

/// What the row must give, before weights and reductions.
struct row_expectation {
  expected_number value;
  std::vector<expected_number> gradient;
  expected_number log_sum_exp, target_log_probability, entropy, penalty;
  bool hit = false, hit_reported = true;
};

/// An expectation of a loss that has no by-products but the values.
inline row_expectation nothing_reported() {
  row_expectation e;
  e.log_sum_exp.reported = e.target_log_probability.reported = false;
  e.entropy.reported = e.penalty.reported = e.hit_reported = false;
  return e;
}

/// How the elements are kept in memory.
enum class kept { compute, bfloat16, half };

/// Where element (r, c) is: see perdita::matrix_view.
struct geometry {
  index rows = 0, cols = 0, row_stride = 0, col_stride = 1, plane_rows = 0, plane_stride = 0;
  index offset(index r, index c) const {
    const index plane = plane_rows > 0 ? r / plane_rows : 0;
    const index within = plane_rows > 0 ? r % plane_rows : r;
    return plane * plane_stride + within * row_stride + c * col_stride;
  }
};

/// One call, free of types.
template <class T> struct invocation {
  kept storage = kept::compute; ///< of scores, soft targets and gradient
  const void* scores = nullptr;
  geometry scores_at;
  const std::int64_t* labels = nullptr;
  index label_count = 0;
  const void* soft = nullptr; ///< null: labels
  geometry soft_at;
  void* gradient = nullptr; ///< null: value only
  geometry gradient_at;
  perdita::call_options<T> options;
};

/// A loss with all its options set.
template <class T> class row_subject {
public:
  virtual ~row_subject() = default;
  virtual T operator()(const invocation<T>& call) const = 0;
  /// Whether there are by-products beside the values.
  virtual bool has_softmax() const = 0;
};

/// Without `Labels`, only what soft targets need is compiled.
template <class Loss, bool Labels = true>
class row_subject_of final : public row_subject<typename Loss::value_type> {
public:
  using T = typename Loss::value_type;
  explicit row_subject_of(Loss loss) : loss_(std::move(loss)) {}

  T operator()(const invocation<T>& call) const override {
    if constexpr (sizeof(T) == 4) {
      if (call.storage == kept::bfloat16)
        return run<perdita::bfloat16>(call);
      if (call.storage == kept::half)
        return run<perdita::half>(call);
    }
    return run<T>(call);
  }

  bool has_softmax() const override { return Loss::has_softmax; }

private:
  template <class S> static perdita::matrix_view<S> view(S* data, const geometry& at) {
    perdita::matrix_view<S> m(data, at.rows, at.cols, at.row_stride, at.col_stride);
    m.plane_rows = at.plane_rows;
    m.plane_stride = at.plane_stride;
    return m;
  }
  template <class S> T run(const invocation<T>& call) const {
    const auto scores = view(static_cast<const S*>(call.scores), call.scores_at);
    const auto with = [&](const auto& target) -> T {
      if (!call.gradient)
        return loss_(scores, target, call.options);
      return loss_(scores, target, view(static_cast<S*>(call.gradient), call.gradient_at),
                   call.options);
    };
    if constexpr (Loss::takes_soft_targets) {
      if (call.soft || !Labels) // no rows: no targets either
        return with(
            view(static_cast<const S*>(call.soft), call.soft ? call.soft_at : call.scores_at));
    }
    if constexpr (Labels)
      return with(perdita::vector_view<const std::int64_t>(call.labels, call.label_count));
  }

  Loss loss_;
};

/// The ways to fill a row with scores; see fill_scores().
enum class row_kind {
  normal,
  normal_wide,
  spread_500,
  huge,
  tiny,
  ties,
  equal,
  all_minus_200,
  all_minus_1000,
  offset_1e4,
  ascending,
  descending,
  gap_0,
  gap_5,
  gap_20,
  gap_60,
  gap_5_at_100,
  gap_20_at_100,
  gap_60_at_100,
  gap_20_at_1e4,
  behind_20,
  masked,
  count
};

/// One loss in one compute type.
template <class T> class row_descriptor {
public:
  virtual ~row_descriptor() = default;
  virtual std::string name() const = 0;

  /// Every option by itself and every pair of options; 0 is the plain loss.
  virtual int settings() const = 0;
  virtual std::string describe(int setting) const = 0;
  /// Settings for what is too slow to do with all of them: each code path once.
  virtual std::vector<int> few_settings() const = 0;
  virtual bool soft(int) const { return false; }

  static constexpr std::int64_t ignore_index = -7;
  virtual std::unique_ptr<row_subject<T>> make(int setting, index cols,
                                               perdita::reduction reduction) const = 0;

  virtual row_expectation expect(int setting, const row_input& row) const = 0;
  /// What a label counts in the denominator of the mean.
  virtual wide label_weight(int, index /*label*/, index /*cols*/) const { return 1; }
  /// Kinds of rows that have a meaning, and a bound, under this setting.
  virtual bool legal(int, row_kind, index /*cols*/) const { return true; }
  /// What the loss says of itself.
  virtual perdita::loss_traits traits(int setting) const = 0;
  /// Twice differentiable: else differences may meet a kink of the gradient, and prove less there.
  virtual bool twice_smooth() const { return true; }
  /// Most slopes are zero, and so nothing follows from seeing many zeros.
  virtual bool sparse() const { return false; }
};

} // namespace perdita_tests
