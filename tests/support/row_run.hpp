// SPDX-License-Identifier: MIT
#pragma once

// A batch, the many ways in which a loss can be asked about it, and what came back: besides the
// answers, whether anything was touched that is nobody's business.

#include <Eigen/Core>

#include <algorithm>
#include <array>
#include <bit>
#include <cfenv>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "memory_block.hpp"
#include "row_descriptor.hpp"

namespace perdita_tests {

// ---- bits

template <class T> auto bits(T x) {
  if constexpr (sizeof(T) == 8)
    return std::bit_cast<std::uint64_t>(x);
  else if constexpr (sizeof(T) == 4)
    return std::bit_cast<std::uint32_t>(x);
  else
    return x;
}
/// The same bits, except that one NaN is as good as another.
template <class T> bool same(T a, T b) { return bits(a) == bits(b) || (a != a && b != b); }
template <class T> bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](T x, T y) { return same(x, y); });
}

inline std::size_t width(kept storage, std::size_t compute) {
  return storage == kept::compute ? compute : 2;
}
template <class T> T rounded(kept storage, T x) {
  if constexpr (sizeof(T) == 4) {
    if (storage == kept::bfloat16)
      return static_cast<float>(Eigen::bfloat16(x));
    if (storage == kept::half)
      return static_cast<float>(Eigen::half(x));
  }
  return x;
}
template <class T> void put(kept storage, unsigned char* p, T x) {
  if constexpr (sizeof(T) == 4) {
    if (storage != kept::compute) {
      const std::uint16_t h = storage == kept::half
                                  ? Eigen::numext::bit_cast<std::uint16_t>(Eigen::half(x))
                                  : Eigen::numext::bit_cast<std::uint16_t>(Eigen::bfloat16(x));
      std::memcpy(p, &h, 2);
      return;
    }
  }
  std::memcpy(p, &x, sizeof x);
}
template <class T> T get(kept storage, const unsigned char* p) {
  if constexpr (sizeof(T) == 4) {
    if (storage != kept::compute) {
      std::uint16_t h;
      std::memcpy(&h, p, 2);
      return storage == kept::half
                 ? static_cast<float>(Eigen::numext::bit_cast<Eigen::half>(h))
                 : static_cast<float>(Eigen::numext::bit_cast<Eigen::bfloat16>(h));
    }
  }
  T x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// ---- what is asked

template <class T> struct problem {
  index rows = 0, cols = 0;
  kept storage = kept::compute;
  std::vector<T> scores; // row by row, like soft and before
  std::vector<std::int64_t> labels;
  std::vector<T> soft;
  std::vector<T> row_weights, upstream; // empty: none
  std::vector<T> before;                // not empty: what the gradient is added to
  T scale = 1;
  double normaliser = 0;

  row_input row(index r) const {
    const auto first = static_cast<std::size_t>(r * cols), n = static_cast<std::size_t>(cols);
    row_input in;
    for (std::size_t j = 0; j < n; ++j)
      in.scores.push_back(scores[first + j]);
    if (soft.empty())
      in.label = static_cast<index>(labels[static_cast<std::size_t>(r)]);
    else
      for (std::size_t j = 0; j < n; ++j)
        in.soft.push_back(soft[first + j]);
    return in;
  }
  bool ignored(index r) const {
    const auto i = static_cast<std::size_t>(r);
    return (soft.empty() && labels[i] == row_descriptor<T>::ignore_index) ||
           (!row_weights.empty() && row_weights[i] == 0);
  }
  problem rows_only(index first, index count) const {
    problem p = *this;
    const auto part = [&](auto& v, index each) {
      if (v.empty())
        return;
      const auto begin = v.begin() + first * each;
      v = std::remove_reference_t<decltype(v)>(begin, begin + count * each);
    };
    p.rows = count;
    part(p.scores, cols), part(p.soft, cols), part(p.before, cols);
    part(p.labels, 1), part(p.row_weights, 1), part(p.upstream, 1);
    return p;
  }
};

enum class layout {
  packed,
  padded,
  inner_2,
  inner_7,
  rows_reversed,
  cols_reversed,
  column_major,
  column_padded,
  column_inner_3,
  column_reversed,
  channels_first,
  count
};
inline const char* name_of(layout l) {
  constexpr const char* names[] = {"packed",
                                   "padded",
                                   "inner stride 2",
                                   "inner stride 7",
                                   "rows reversed",
                                   "columns reversed",
                                   "column-major",
                                   "column-major padded",
                                   "column-major stride 3",
                                   "column-major reversed",
                                   "channels first"};
  return names[static_cast<int>(l)];
}

/// Strides, and how many elements lie before element (0, 0) and in all.
struct placement {
  geometry at;
  index first = 0, span = 0;
};
inline placement place(layout l, index rows, index cols) {
  placement p;
  p.at = {rows, cols, cols, 1, rows, 0};
  geometry& g = p.at;
  switch (l) {
  case layout::padded:
    g.row_stride = cols + 5;
    break;
  case layout::inner_2:
    g.row_stride = 2 * cols + 3, g.col_stride = 2;
    break;
  case layout::inner_7:
    g.row_stride = 7 * cols, g.col_stride = 7;
    break;
  case layout::rows_reversed:
    g.row_stride = -cols;
    break;
  case layout::cols_reversed:
    g.col_stride = -1;
    break;
  case layout::column_major:
    g.row_stride = 1, g.col_stride = rows;
    break;
  case layout::column_padded:
    g.row_stride = 1, g.col_stride = rows + 3;
    break;
  case layout::column_inner_3:
    g.row_stride = 3, g.col_stride = 3 * rows + 1;
    break;
  case layout::column_reversed:
    g.row_stride = -1, g.col_stride = -rows;
    break;
  case layout::channels_first: {
    index images = 1;
    for (index k = 2; k < rows && images == 1; ++k)
      if (rows % k == 0)
        images = k;
    g.row_stride = 1, g.col_stride = rows / images, g.plane_rows = rows / images;
    g.plane_stride = cols * g.plane_rows;
    break;
  }
  default:
    break;
  }
  index low = 0, high = 0;
  const index planes = g.plane_rows > 0 ? rows / g.plane_rows : 1;
  for (const index reach : {(g.plane_rows - 1) * g.row_stride, (cols - 1) * g.col_stride,
                            (planes - 1) * g.plane_stride})
    (reach < 0 ? low : high) += rows * cols > 0 ? reach : 0;
  p.first = -low;
  p.span = rows * cols > 0 ? high - low + 1 : 0;
  return p;
}

/// How it is asked: nothing of this may change a bit of the answer.
struct arrangement {
  layout scores = layout::packed, gradient = layout::packed;
  bool wants_gradient = true, in_place = false;
  bool over_target = false; // the gradient overwrites the soft targets
  // Values, log-sum-exp, log-probability, entropy, penalty, hits. Not the entropy, unless it is
  // what the test is about: the sums that it takes hide the faster path without them.
  unsigned by_products = 0x37;
  std::size_t offset = 0; // elements past an aligned address
  edge against = edge::none;
  index step = 1; // of everything that has one element per row
  perdita::executor run_on{perdita::serial};
  perdita::workspace* memory = nullptr;
};

template <class T> struct outcome {
  T total = 0;
  std::vector<T> gradient;
  std::array<std::vector<T>, 5> by_products; // in the order of arrangement::by_products
  std::vector<unsigned char> hits;
  std::string trespass; // what else was touched
};
inline constexpr std::array<const char*, 6> by_product_names{
    "values", "log_sum_exp", "target_log_probability", "entropy", "penalty", "hits"};

inline std::uint32_t environment() {
#if defined(__SSE__)
  return _mm_getcsr() & ~0x3FU; // without the flags that say what has happened
#else
  return static_cast<std::uint32_t>(std::fegetround());
#endif
}

/// Elements in memory of their own, nothing beside them but NaN.
template <class T> class placed_matrix {
public:
  placed_matrix(layout l, index rows, index cols, kept storage, const arrangement& a)
      : place_(place(l, rows, cols)), storage_(storage), width_(width(storage, sizeof(T))),
        block_(static_cast<std::size_t>(place_.span) * width_, a.offset * width_, a.against) {}
  const geometry& at() const { return place_.at; }
  unsigned char* element(index r, index c) const {
    return block_.data() + static_cast<std::size_t>(place_.first + place_.at.offset(r, c)) * width_;
  }
  void* origin() const { return block_.data() + static_cast<std::size_t>(place_.first) * width_; }
  void write(const std::vector<T>& x) {
    for (index r = 0; r < place_.at.rows; ++r)
      for (index c = 0; c < place_.at.cols; ++c)
        put(storage_, element(r, c), x[static_cast<std::size_t>(r * place_.at.cols + c)]);
  }
  std::vector<T> read() const {
    std::vector<T> x;
    for (index r = 0; r < place_.at.rows; ++r)
      for (index c = 0; c < place_.at.cols; ++c)
        x.push_back(get<T>(storage_, element(r, c)));
    return x;
  }
  void remember() { copy_ = block_.copy(); }
  bool changed() const { return !(block_ == copy_); }
  /// Whether anything but the elements has changed.
  bool changed_elsewhere() {
    std::vector<unsigned char> now = block_.copy();
    for (index r = 0; r < place_.at.rows; ++r)
      for (index c = 0; c < place_.at.cols; ++c) {
        const auto i = static_cast<std::ptrdiff_t>(
            block_.position() + static_cast<std::size_t>(element(r, c) - block_.data()));
        std::copy_n(copy_.begin() + i, width_, now.begin() + i);
      }
    return now != copy_;
  }

private:
  placement place_;
  kept storage_;
  std::size_t width_;
  memory_block block_;
  std::vector<unsigned char> copy_;
};

/// One element per row, `step` apart (backwards if it is negative).
template <class N> class placed_vector {
public:
  placed_vector(index size, const arrangement& a)
      : size_(size), step_(a.step),
        block_(size > 0 ? static_cast<std::size_t>((size - 1) * std::abs(step_) + 1) * sizeof(N)
                        : 0,
               a.offset % 8 * sizeof(N), a.against) {
    copy_ = block_.copy();
  }
  N* origin() const {
    return reinterpret_cast<N*>(block_.data()) + (step_ < 0 && size_ > 0 ? (1 - size_) * step_ : 0);
  }
  perdita::vector_view<N> view() const { return {origin(), size_, step_}; }
  void write(const std::vector<N>& x) {
    for (index i = 0; i < size_; ++i)
      origin()[i * step_] = x[static_cast<std::size_t>(i)];
    copy_ = block_.copy();
  }
  std::vector<N> read() const {
    std::vector<N> x;
    for (index i = 0; i < size_; ++i)
      x.push_back(origin()[i * step_]);
    return x;
  }
  bool changed() const { return !(block_ == copy_); }
  bool changed_elsewhere() const {
    const std::vector<unsigned char> bytes = block_.copy();
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      const auto at = static_cast<index>(i) - static_cast<index>(block_.position());
      const bool element = at >= 0 && at < static_cast<index>(block_.size()) &&
                           at / static_cast<index>(sizeof(N)) % std::abs(step_) == 0;
      if (!element && bytes[i] != memory_block::untouched)
        return true;
    }
    return false;
  }

private:
  index size_, step_;
  memory_block block_;
  std::vector<unsigned char> copy_;
};

template <class T>
outcome<T> run(const row_subject<T>& loss, const problem<T>& p, const arrangement& a) {
  const bool small = p.rows * p.cols <= 20000;
  const unsigned wanted = loss.has_softmax() ? a.by_products : a.by_products & 1;
  placed_matrix<T> scores(a.scores, p.rows, p.cols, p.storage, a);
  scores.write(p.scores);
  std::optional<placed_matrix<T>> soft, gradient;
  if (!p.soft.empty() || (p.labels.empty() && p.rows > 0)) {
    soft.emplace(a.scores, p.rows, p.cols, p.storage, a);
    soft->write(p.soft);
    soft->remember();
  }
  placed_matrix<T>* target = a.in_place ? &scores : a.over_target && soft ? &*soft : nullptr;
  if (a.wants_gradient && !target) {
    target = &gradient.emplace(a.gradient, p.rows, p.cols, p.storage, a);
    if (!p.before.empty())
      target->write(p.before);
  }
  if (small) {
    scores.remember();
    if (gradient)
      gradient->remember();
  }

  // The label's own type has its own test; here only where the labels are. int64 at any step is
  // made from a packed copy, since the invocation knows no stride for them.
  arrangement packed = a;
  packed.step = 1;
  placed_vector<std::int64_t> labels(static_cast<index>(p.labels.size()), packed);
  labels.write(p.labels);
  placed_vector<T> weights(static_cast<index>(p.row_weights.size()), a);
  weights.write(p.row_weights);
  placed_vector<T> upstream(static_cast<index>(p.upstream.size()), a);
  upstream.write(p.upstream);
  std::vector<placed_vector<T>*> reports;
  placed_vector<T> r0(p.rows, a), r1(p.rows, a), r2(p.rows, a), r3(p.rows, a), r4(p.rows, a);
  reports = {&r0, &r1, &r2, &r3, &r4};
  placed_vector<unsigned char> hits(p.rows, a);

  invocation<T> call;
  call.storage = p.storage;
  call.scores = scores.origin();
  call.scores_at = scores.at();
  if (soft) {
    call.soft = soft->origin();
    call.soft_at = soft->at();
  } else {
    call.labels = labels.origin();
    call.label_count = static_cast<index>(p.labels.size());
  }
  if (a.wants_gradient) {
    call.gradient = target->origin();
    call.gradient_at = target->at();
  }
  perdita::call_options<T>& o = call.options;
  if (!p.row_weights.empty())
    o.row_weights = weights.view();
  if (!p.upstream.empty())
    o.upstream = upstream.view();
  o.scale = p.scale;
  o.normaliser = p.normaliser;
  o.accumulate = !p.before.empty() && a.wants_gradient;
  perdita::vector_view<T>* views[] = {&o.values, &o.log_sum_exp, &o.target_log_probability,
                                      &o.entropy, &o.penalty};
  for (unsigned k = 0; k < 5; ++k)
    if (wanted >> k & 1)
      *views[k] = reports[k]->view();
  if (wanted >> 5 & 1)
    o.hits = hits.view();
  o.run_on = a.run_on;
  o.memory = a.memory;

  const std::uint32_t environment_before = environment();
  outcome<T> result;
  result.total = loss(call);
  if (environment() != environment_before)
    result.trespass += " the floating-point environment;";

  if (target)
    result.gradient = target->read();
  for (unsigned k = 0; k < 5; ++k) {
    if (wanted >> k & 1)
      result.by_products[k] = reports[k]->read();
    else if (reports[k]->changed())
      result.trespass += std::string(" ") + by_product_names[k] + " without being asked;";
    if (reports[k]->changed_elsewhere())
      result.trespass += std::string(" memory beside ") + by_product_names[k] + ";";
  }
  if (wanted >> 5 & 1)
    result.hits = hits.read();
  if (hits.changed_elsewhere())
    result.trespass += " memory beside hits;";
  if (small) {
    if (a.in_place ? scores.changed_elsewhere() : scores.changed())
      result.trespass += a.in_place ? " memory beside the scores;" : " the scores;";
    if (gradient && gradient->changed_elsewhere())
      result.trespass += " memory beside the gradient;";
    if (soft && (target == &*soft ? soft->changed_elsewhere() : soft->changed()))
      result.trespass += " the soft targets;";
    if (labels.changed() || weights.changed() || upstream.changed())
      result.trespass += " labels, row weights or upstream;";
  }
  return result;
}

} // namespace perdita_tests
