// SPDX-License-Identifier: MIT

// The battery of row_battery.hpp, once for each compute type: used by losses/*.cpp, also by their
// [threads] tests.

#include "support/row_battery.hpp"

#include <Eigen/Core>

#include <algorithm>
#include <array>
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include <perdita/testing/gradient_check.hpp>

#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/memory_block.hpp"
#include "support/numbers.hpp"

namespace perdita_tests {
namespace {

using perdita::reduction;

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

std::size_t width(kept storage, std::size_t compute) {
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
const char* name_of(layout l) {
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
placement place(layout l, index rows, index cols) {
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
constexpr std::array<const char*, 6> by_product_names{
    "values", "log_sum_exp", "target_log_probability", "entropy", "penalty", "hits"};

std::uint32_t environment() {
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
  bool changed_elsewhere() {
    std::vector<N> now = read();
    const std::vector<unsigned char> after = block_.copy();
    write(std::vector<N>(static_cast<std::size_t>(size_), N{})); // leaves copy_ as all written
    std::vector<unsigned char> expected = copy_;
    for (index i = 0; i < size_; ++i)
      origin()[i * step_] = now[static_cast<std::size_t>(i)];
    expected = block_.copy();
    bool beside = expected != after;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const auto at = static_cast<index>(i) - static_cast<index>(block_.position());
      const index element = at >= 0 ? at / static_cast<index>(sizeof(N)) : -1;
      const bool ours =
          at >= 0 && at < static_cast<index>(block_.size()) && element % std::abs(step_) == 0;
      beside = beside || (!ours && after[i] != memory_block::untouched);
    }
    return beside;
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

// ---- how answers are judged

/// Counts comparisons and keeps the worst one.
class tally {
public:
  explicit tally(std::string title) : title_(std::move(title)) {}

  template <class T, class Where>
  void compare(const wide& expected, const wide& allowed, T got, const char* what, Where where) {
    ++compared_;
    bool ok = true;
    if (is_nan(expected)) {
      ok = got != got;
    } else if (!is_finite(expected)) {
      ok = got == (expected > 0 ? std::numeric_limits<T>::infinity()
                                : -std::numeric_limits<T>::infinity());
    } else if (!std::isfinite(got)) {
      // Overflow is rounding where it is as near as any number of the type.
      ok = size_of(expected) + allowed >= wide(std::numeric_limits<T>::max()) && got == got &&
           (got > 0) == (expected > 0);
    } else {
      const wide error = size_of(wide(got) - expected);
      ok = error <= allowed;
      if (error > 0) {
        const double ratio = static_cast<double>(wide(error / allowed));
        if (!(ratio <= worst_)) {
          worst_ = ratio;
          worst_at_ = std::string(what) + " " + where();
        }
      }
    }
    if (!ok && wrong_++ < shown())
      complaints_ += "\n  " + std::string(what) + " " + where() + ": " +
                     perdita::core::to_text(got) + ", expected " + text(expected) + " +- " +
                     text(allowed);
  }
  void require(bool ok, const std::string& what) {
    ++compared_;
    if (!ok && wrong_++ < shown())
      complaints_ += "\n  " + what;
  }
  template <class T>
  void identical(const outcome<T>& expected, const outcome<T>& got, const std::string& what,
                 bool totals = true) {
    const auto& e = expected;
    if (totals)
      require(same(e.total, got.total), what + ": value " + perdita::core::to_text(got.total) +
                                            ", expected " + perdita::core::to_text(e.total));
    if (!got.gradient.empty())
      require(same(e.gradient, got.gradient),
              what + ": gradient" + first(e.gradient, got.gradient));
    for (std::size_t k = 0; k < 5; ++k)
      if (!got.by_products[k].empty() && !e.by_products[k].empty())
        require(same(e.by_products[k], got.by_products[k]),
                what + ": " + by_product_names[k] + first(e.by_products[k], got.by_products[k]));
    if (!got.hits.empty())
      require(e.hits == got.hits, what + ": hits");
    require(got.trespass.empty(), what + " touched" + got.trespass);
  }
  /// Among ordinary rows most answers are not zero; where they are, the test tests nothing.
  void ordinary(const wide& expected) {
    ++ordinary_;
    if (expected == 0)
      ++zeros_;
  }
  enum measure { of_value, of_slope, of_largest_slope };
  void add_ulp(measure what, double ulp) { ulp_[what] = std::max(ulp_[what], ulp); }

  void check() const {
    if (std::getenv("PERDITA_TEST_REPORT"))
      std::printf(
          "%-70s %9zu compared, worst %5.2f of the allowance (%s); "
          "ordinary rows: value %.2f ulp, slopes %.2f ulp, %.2f epsilon of the row's largest\n",
          title_.c_str(), compared_, worst_, worst_at_.c_str(), ulp_[of_value], ulp_[of_slope],
          ulp_[of_largest_slope]);
    INFO(title_ << ": " << wrong_ << " of " << compared_ << " comparisons failed" << complaints_);
    CHECK(wrong_ == 0);
    CHECK(compared_ > 0);
    CHECK(10 * zeros_ <= 3 * ordinary_);
  }

private:
  static std::size_t shown() { return std::getenv("PERDITA_TEST_REPORT") ? 100 : 5; }
  template <class T>
  static std::string first(const std::vector<T>& expected, const std::vector<T>& got) {
    if (expected.size() != got.size())
      return ": " + std::to_string(got.size()) + " numbers, not " + std::to_string(expected.size());
    for (std::size_t i = 0; i < got.size(); ++i)
      if (!same(expected[i], got[i])) {
        char line[128];
        std::snprintf(line, sizeof line, "[%zu] is %a, expected %a", i, static_cast<double>(got[i]),
                      static_cast<double>(expected[i]));
        return line;
      }
    return "";
  }

  std::string title_, complaints_, worst_at_;
  std::size_t compared_ = 0, wrong_ = 0, ordinary_ = 0, zeros_ = 0;
  double worst_ = 0, ulp_[3] = {0, 0, 0};
};

template <class T> double ulps(const wide& expected, T got) {
  if (!is_finite(expected) || expected == 0 || !std::isfinite(got))
    return 0;
  int exponent = 0;
  frexp(expected, &exponent);
  exponent = std::max(exponent, std::numeric_limits<T>::min_exponent);
  return static_cast<double>(
      wide(ldexp(wide(size_of(wide(got) - expected)), std::numeric_limits<T>::digits - exponent)));
}

/// A slope below this share of the largest one of its row may be exactly zero.
template <class T> wide negligible_share() { return ldexp(wide(1), sizeof(T) == 4 ? -99 : -990); }

template <class T>
void judge(const row_descriptor<T>& d, int setting, reduction how, const problem<T>& p,
           const std::vector<row_expectation>& rows, const outcome<T>& got,
           const std::vector<bool>& ordinary, tally& t) {
  const wide epsilon = std::numeric_limits<T>::epsilon();
  const wide smallest = std::numeric_limits<T>::min();
  wide weights = 0;
  const auto weight_of = [&](index r) {
    return p.row_weights.empty() ? wide(1) : wide(p.row_weights[static_cast<std::size_t>(r)]);
  };
  for (index r = 0; r < p.rows; ++r)
    if (!p.ignored(r))
      weights +=
          weight_of(r) *
          (d.soft(setting)
               ? wide(1)
               : d.label_weight(setting, static_cast<index>(p.labels[static_cast<std::size_t>(r)]),
                                p.cols));
  wide share = 1;
  if (how == reduction::mean)
    share = p.normaliser != 0 ? wide(1 / wide(p.normaliser))
            : weights != 0    ? wide(1 / weights)
                              : wide(0);

  wide total = 0, slack = 0;
  for (index r = 0; r < p.rows; ++r) {
    const auto i = static_cast<std::size_t>(r);
    const row_expectation& e = rows[i];
    const bool counts = !p.ignored(r);
    const wide weight = weight_of(r);
    const auto here = [&] {
      return "of row " + std::to_string(r) + " of " + std::to_string(p.rows) + " x " +
             std::to_string(p.cols);
    };
    if (counts && share != 0) {
      total += e.value.value * weight * share;
      slack += (e.value.slack + size_of(e.value.value)) * weight * share;
    }
    const auto by_product = [&](std::size_t k, const expected_number& x, const wide& factor) {
      if (got.by_products[k].empty() || !x.reported)
        return;
      t.compare(counts ? wide(x.value * factor) : wide(0),
                counts ? wide((x.slack + size_of(x.value)) * factor * epsilon + smallest) : wide(0),
                got.by_products[k][i], by_product_names[k], here);
    };
    by_product(0, e.value, weight);
    by_product(1, e.log_sum_exp, 1);
    by_product(2, e.target_log_probability, 1);
    by_product(3, e.entropy, 1);
    by_product(4, e.penalty, 1);
    if (!got.hits.empty() && e.hit_reported)
      t.require(got.hits[i] == (counts && e.hit ? 1 : 0), "hit of row " + std::to_string(r));
    if (ordinary[i] && counts)
      t.add_ulp(tally::of_value, got.by_products[0].empty()
                                     ? 0
                                     : ulps(wide(e.value.value * weight), got.by_products[0][i]));

    wide factor = counts ? wide(weight * share * wide(p.scale)) : wide(0);
    if (!p.upstream.empty())
      factor *= wide(p.upstream[i]);
    wide most = 0;
    for (const expected_number& g : e.gradient)
      if (is_finite(g.value))
        most = larger(most, size_of(g.value));
    const wide floor = most * negligible_share<T>();
    if (got.gradient.empty())
      continue;
    for (index c = 0; c < p.cols; ++c) {
      const expected_number& g = e.gradient[static_cast<std::size_t>(c)];
      const wide expected = counts ? wide(g.value * factor) : wide(0);
      const wide size = size_of(factor);
      const wide allowed =
          counts ? wide(((g.slack + size_of(g.value) * 2) * epsilon + floor) * size + smallest)
                 : wide(0);
      const T answer = got.gradient[static_cast<std::size_t>(r * p.cols + c)];
      t.compare(expected, allowed, answer, "gradient",
                [&] { return here() + ", column " + std::to_string(c); });
      if (ordinary[i] && counts && share != 0) {
        if (!d.sparse())
          t.ordinary(expected);
        t.add_ulp(tally::of_slope, size_of(g.value) > most / 1000 ? ulps(expected, answer) : 0);
        if (most * size > 0)
          t.add_ulp(tally::of_largest_slope,
                    static_cast<double>(
                        wide(size_of(wide(answer) - expected) / (most * size * epsilon))));
      }
    }
  }
  if (how != reduction::none)
    t.compare(total, wide((slack + size_of(total)) * epsilon + smallest), got.total, "total",
              [&] { return "over " + std::to_string(p.rows) + " x " + std::to_string(p.cols); });
}

// ---- problems

template <class T>
problem<T> make_problem(const row_descriptor<T>& d, int setting, index cols,
                        const std::vector<row_kind>& kinds, kept storage, random_numbers& random) {
  problem<T> p;
  p.rows = static_cast<index>(kinds.size());
  p.cols = cols;
  p.storage = storage;
  for (const row_kind kind : kinds) {
    const auto label = static_cast<index>(random.below(static_cast<std::uint64_t>(cols)));
    for (const double x : make_scores(kind, cols, label, random))
      p.scores.push_back(rounded(storage, static_cast<T>(x)));
    if (d.soft(setting))
      for (const double q : make_distribution(kind, cols, label, random))
        p.soft.push_back(rounded(storage, static_cast<T>(q)));
    else
      p.labels.push_back(label);
  }
  return p;
}

template <class T>
std::vector<row_kind> legal_kinds(const row_descriptor<T>& d, int setting, index cols) {
  std::vector<row_kind> kinds;
  for (int k = 0; k < static_cast<int>(row_kind::count); ++k)
    if (d.legal(setting, static_cast<row_kind>(k), cols))
      kinds.push_back(static_cast<row_kind>(k));
  return kinds;
}
template <class T>
std::vector<row_kind> ordinary_kinds(const row_descriptor<T>& d, int setting, index cols,
                                     index rows) {
  std::vector<row_kind> wanted, kinds;
  for (const row_kind kind : {row_kind::normal, row_kind::normal_wide, row_kind::gap_5})
    if (d.legal(setting, kind, cols))
      wanted.push_back(kind);
  for (index r = 0; r < rows && !wanted.empty(); ++r)
    kinds.push_back(wanted[static_cast<std::size_t>(r) % wanted.size()]);
  return kinds;
}
bool is_ordinary(row_kind kind) {
  return kind == row_kind::normal || kind == row_kind::normal_wide || kind == row_kind::gap_5;
}

template <class T>
std::vector<row_expectation> expect_rows(const row_descriptor<T>& d, int setting,
                                         const problem<T>& p) {
  std::vector<row_expectation> rows;
  for (index r = 0; r < p.rows; ++r)
    rows.push_back(d.expect(setting, p.row(r)));
  return rows;
}

/// Row weights, some of them 0; upstream slopes of both signs.
template <class T> void add_weights(problem<T>& p, random_numbers& random) {
  for (index r = 0; r < p.rows; ++r) {
    p.row_weights.push_back(r % 5 == 3 ? T(0) : static_cast<T>(random.uniform(0.25, 4)));
    p.upstream.push_back(static_cast<T>(random.uniform(-2, 2)));
  }
}
template <class T> void ignore_some(problem<T>& p) {
  if (p.soft.empty())
    for (std::size_t r = 1; r < p.labels.size(); r += 4)
      p.labels[r] = row_descriptor<T>::ignore_index;
}

template <class T> std::string title(const row_descriptor<T>& d, int setting) {
  return d.name() + (sizeof(T) == 4 ? "<float> " : "<double> ") + d.describe(setting);
}

template <class T>
constexpr std::array<reduction, 3> reductions{reduction::none, reduction::mean, reduction::sum};

} // namespace

template <class T> void check_accuracy(const row_descriptor<T>& d) {
  for (int setting = 0; setting < d.settings(); ++setting) {
    tally t(title(d, setting));
    random_numbers random(static_cast<std::uint64_t>(setting) + 1);
    for (const index cols : {1, 2, 3, 17, 100}) {
      const std::vector<row_kind> kinds = legal_kinds(d, setting, cols);
      if (kinds.empty())
        continue;
      problem<T> p = make_problem(d, setting, cols, kinds, kept::compute, random);
      const std::vector<row_expectation> rows = expect_rows(d, setting, p);
      std::vector<bool> ordinary;
      for (const row_kind kind : kinds)
        ordinary.push_back(is_ordinary(kind) && cols > 1);
      for (const reduction how : reductions<T>) {
        const auto loss = d.make(setting, cols, how);
        judge(d, setting, how, p, rows, run(*loss, p, {}), ordinary, t);
        arrangement everything;
        everything.by_products = 0x3F;
        judge(d, setting, how, p, rows, run(*loss, p, everything), ordinary, t);
      }
      problem<T> q = p;
      add_weights(q, random);
      q.scale = static_cast<T>(-0.375);
      for (const reduction how : reductions<T>) {
        const auto loss = d.make(setting, cols, how);
        judge(d, setting, how, q, rows, run(*loss, q, {}), ordinary, t);
      }
      ignore_some(q);
      q.upstream.clear();
      for (const double normaliser : {0.0, 12.5}) {
        q.normaliser = normaliser;
        const auto loss = d.make(setting, cols, reduction::mean);
        judge(d, setting, reduction::mean, q, rows, run(*loss, q, {}), ordinary, t);
      }
      q.row_weights.clear();
      q.normaliser = 0;
      const auto loss = d.make(setting, cols, reduction::mean);
      judge(d, setting, reduction::mean, q, rows, run(*loss, q, {}), ordinary, t);
    }
    t.check();
  }
}

template <class T> void check_shapes(const row_descriptor<T>& d) {
  for (const int setting : d.few_settings()) {
    tally t(title(d, setting) + ", shapes");
    random_numbers random(77);
    for (const index cols : {1,   2,   3,   7,   8,    15,   16,   17,   31,   33,
                             100, 511, 512, 513, 1000, 1024, 1025, 2049, 5000, 65537}) {
      const index distinct = cols < 100 ? 17 : cols < 10000 ? 3 : 1;
      const std::vector<row_kind> kinds = ordinary_kinds(d, setting, cols, distinct);
      if (kinds.empty())
        continue;
      const problem<T> pool = make_problem(d, setting, cols, kinds, kept::compute, random);
      const std::vector<row_expectation> expected = expect_rows(d, setting, pool);
      for (const index rows : {1, 2, 3, 8, 9, 17}) {
        if (cols > 10000 && rows > 1)
          continue;
        // Fewer distinct rows than rows: in turn, so that each is met in several places.
        problem<T> p = pool.rows_only(0, 0);
        p.rows = rows;
        std::vector<row_expectation> here;
        for (index r = 0; r < rows; ++r) {
          const problem<T> one = pool.rows_only(r % distinct, 1);
          p.scores.insert(p.scores.end(), one.scores.begin(), one.scores.end());
          p.soft.insert(p.soft.end(), one.soft.begin(), one.soft.end());
          p.labels.insert(p.labels.end(), one.labels.begin(), one.labels.end());
          here.push_back(expected[static_cast<std::size_t>(r % distinct)]);
        }
        const std::vector<bool> ordinary(static_cast<std::size_t>(rows), cols > 1);
        const auto loss = d.make(setting, cols, reduction::mean);
        const outcome<T> row_major = run(*loss, p, {});
        judge(d, setting, reduction::mean, p, here, row_major, ordinary, t);
        if (rows == 3) {
          arrangement everything;
          everything.by_products = 0x3F;
          judge(d, setting, reduction::mean, p, here, run(*loss, p, everything), ordinary, t);
        }
        arrangement columns;
        columns.scores = columns.gradient = layout::column_major;
        t.identical(row_major, run(*loss, p, columns),
                    "column-major " + std::to_string(rows) + " x " + std::to_string(cols));
        columns.in_place = true;
        t.identical(row_major, run(*loss, p, columns),
                    "column-major in place " + std::to_string(rows) + " x " + std::to_string(cols));
        arrangement in_place;
        in_place.in_place = true;
        t.identical(row_major, run(*loss, p, in_place),
                    "in place " + std::to_string(rows) + " x " + std::to_string(cols));
      }
    }
    t.check();
  }
}

template <class T> void check_nan(const row_descriptor<T>& d) {
  for (const int setting : d.few_settings()) {
    tally t(title(d, setting) + ", NaN");
    random_numbers random(5);
    for (const index cols : {1, 2, 3, 16, 17, 100, 513, 1025}) {
      const index rows = 9, bad = 4;
      const std::vector<row_kind> kinds = ordinary_kinds(d, setting, cols, rows);
      if (kinds.empty())
        continue;
      const problem<T> good = make_problem(d, setting, cols, kinds, kept::compute, random);
      const auto loss = d.make(setting, cols, reduction::sum);
      arrangement a;
      const outcome<T> clean = run(*loss, good, a);
      std::vector<index> places{0, cols / 2, cols - 1, cols / 16 * 16};
      if (good.soft.empty())
        places.push_back(static_cast<index>(good.labels[bad]));
      for (const index place : places) {
        if (place >= cols)
          continue;
        problem<T> p = good;
        p.scores[static_cast<std::size_t>(bad * cols + place)] =
            std::numeric_limits<T>::quiet_NaN();
        for (const layout l : {layout::packed, layout::column_major}) {
          a.scores = a.gradient = l;
          const outcome<T> got = run(*loss, p, a);
          const std::string where = std::string(name_of(l)) + ", " + std::to_string(cols) +
                                    " columns, NaN in " + std::to_string(place);
          t.require(got.total != got.total, where + ": the sum hides it");
          t.require(got.trespass.empty(), where + " touched" + got.trespass);
          t.require(got.hits.empty() || d.soft(setting) || got.hits[bad] == 0, where + ": a hit");
          for (index r = 0; r < rows; ++r) {
            const auto i = static_cast<std::size_t>(r);
            const T value = got.by_products[0][i];
            t.require(r == bad ? value != value : same(value, clean.by_products[0][i]),
                      where + ": value of row " + std::to_string(r));
            bool right = true;
            for (index c = 0; c < cols; ++c) {
              const auto k = static_cast<std::size_t>(r * cols + c);
              const T g = got.gradient[k];
              right = right && (r == bad ? g != g : same(g, clean.gradient[k]));
            }
            t.require(right, where + ": gradient of row " + std::to_string(r));
          }
          // A row that does not count does not count for this either.
          problem<T> without = p;
          without.row_weights.assign(static_cast<std::size_t>(rows), T(1));
          without.row_weights[bad] = 0;
          const outcome<T> removed = run(*loss, without, a);
          t.require(removed.total == removed.total, where + ": a row of weight 0 counts");
          bool zero = true;
          for (index c = 0; c < cols; ++c)
            zero = zero && same(removed.gradient[static_cast<std::size_t>(bad * cols + c)], T(0));
          t.require(zero, where + ": gradient of a row of weight 0");
        }
      }
    }
    t.check();
  }
}

template <class T>
void check_special(const row_descriptor<T>& d, const std::vector<special_row>& rows, double slack) {
  tally t(d.name() + (sizeof(T) == 4 ? "<float>" : "<double>") + ", special rows");
  const wide epsilon = std::numeric_limits<T>::epsilon();
  for (const special_row& s : rows) {
    const auto cols = static_cast<index>(s.scores.size());
    const auto loss = d.make(s.setting, cols, reduction::sum);
    for (const index before : {0, 3}) {
      random_numbers random(3);
      const auto kinds = ordinary_kinds(d, s.setting, cols, before > 0 ? 9 : 1);
      if (static_cast<index>(kinds.size()) <= before)
        continue;
      problem<T> p = make_problem(d, s.setting, cols, kinds, kept::compute, random);
      for (std::size_t c = 0; c < s.scores.size(); ++c) {
        const std::size_t at = static_cast<std::size_t>(before * cols) + c;
        p.scores[at] = static_cast<T>(s.scores[c]);
        if (!s.soft.empty())
          p.soft[at] = static_cast<T>(s.soft[c]);
      }
      if (s.soft.empty())
        p.labels[static_cast<std::size_t>(before)] = s.label;
      for (const layout l : {layout::packed, layout::column_major})
        for (const bool in_place : {false, true}) {
          arrangement a;
          a.scores = a.gradient = l;
          a.in_place = in_place;
          const outcome<T> got = run(*loss, p, a);
          const std::string where = std::string("(") + s.what + ", " + name_of(l) +
                                    (in_place ? ", in place" : "") + ", setting " +
                                    d.describe(s.setting) + ")";
          const auto near = [&](double expected, T answer, const char* what, index c) {
            t.compare(wide(expected), wide(slack * epsilon * larger(size_of(wide(expected)), 1)),
                      answer, what, [&] { return std::to_string(c) + " " + where; });
            if (expected == 0)
              t.require(answer == 0,
                        std::string(what) + " " + std::to_string(c) + " is not exactly 0 " + where);
          };
          near(s.value, got.by_products[0][static_cast<std::size_t>(before)], "value", 0);
          if (before == 0)
            near(s.value, got.total, "total", 0);
          for (index c = 0; c < cols; ++c)
            near(s.gradient[static_cast<std::size_t>(c)],
                 got.gradient[static_cast<std::size_t>(before * cols + c)], "gradient", c);
          for (index r = 0; r < p.rows; ++r)
            if (r != before)
              for (index c = 0; c < cols; ++c)
                t.require(std::isfinite(got.gradient[static_cast<std::size_t>(r * cols + c)]),
                          "the gradient of another row " + where);
        }
    }
  }
  t.check();
}

template <class T> void check_same_bits(const row_descriptor<T>& d) {
  for (int setting = 0; setting < d.settings(); ++setting) {
    const auto few = d.few_settings();
    const bool thorough = std::find(few.begin(), few.end(), setting) != few.end();
    tally t(title(d, setting) + ", bits");
    random_numbers random(9);
    for (const kept storage : {kept::compute, kept::bfloat16, kept::half}) {
      if (storage != kept::compute && (sizeof(T) == 8 || !thorough))
        continue;
      for (const index cols : {1, 2, 7, 16, 33, 515, 1100}) {
        if (!thorough && cols != 33)
          continue;
        if (storage != kept::compute && cols < 33)
          continue;
        // One row of every kind, so that every path is taken beside every other.
        std::vector<row_kind> kinds;
        for (const row_kind kind : legal_kinds(d, setting, cols))
          if (storage != kept::half || kind != row_kind::huge)
            kinds.push_back(kind);
        if (cols > 1000)
          kinds.resize(std::min<std::size_t>(kinds.size(), 6));
        if (kinds.empty())
          continue;
        problem<T> p = make_problem(d, setting, cols, kinds, storage, random);
        add_weights(p, random);
        ignore_some(p);
        const auto loss = d.make(setting, cols, reduction::sum);
        const outcome<T> base = run(*loss, p, {});
        const std::string size = std::to_string(p.rows) + " x " + std::to_string(cols) +
                                 (storage == kept::compute ? ""
                                  : storage == kept::half  ? " half"
                                                           : " bfloat16");
        t.require(base.trespass.empty(), size + ": touched" + base.trespass);

        for (int l = 0; l < static_cast<int>(layout::count); ++l)
          for (const bool in_place : {false, true}) {
            arrangement a;
            a.scores = a.gradient = static_cast<layout>(l);
            a.in_place = in_place;
            a.step = l % 3 == 0 ? 1 : l % 3 == 1 ? 2 : -1;
            t.identical(base, run(*loss, p, a),
                        size + ", " + name_of(a.scores) + (in_place ? ", in place" : ""));
            a.against = l % 2 == 0 ? edge::back : edge::front;
            t.identical(base, run(*loss, p, a),
                        size + ", at the edge of a page, " + name_of(a.scores));
            a.against = l % 2 == 0 ? edge::front : edge::back;
            t.identical(base, run(*loss, p, a),
                        size + ", at the edge of a page, " + name_of(a.scores));
            a.wants_gradient = a.in_place = false;
            t.identical(base, run(*loss, p, a), size + ", value only, " + name_of(a.scores));
          }
        for (const auto& [from, to] : {std::pair(layout::packed, layout::column_major),
                                       std::pair(layout::column_major, layout::packed),
                                       std::pair(layout::padded, layout::inner_2),
                                       std::pair(layout::channels_first, layout::packed)}) {
          arrangement a;
          a.scores = from;
          a.gradient = to;
          t.identical(base, run(*loss, p, a), size + ", " + name_of(from) + " to " + name_of(to));
        }
        for (std::size_t offset = 1; offset < 16; ++offset) {
          arrangement a;
          a.offset = offset;
          a.in_place = offset % 2 == 0;
          t.identical(base, run(*loss, p, a), size + ", offset " + std::to_string(offset));
        }
        for (const unsigned wanted : {0U, 1U, 2U, 4U, 8U, 16U, 32U, 7U, 0x3FU})
          for (const bool wants_gradient : {false, true}) {
            arrangement a;
            a.by_products = wanted;
            a.wants_gradient = wants_gradient;
            t.identical(base, run(*loss, p, a),
                        size + ", by-products " + std::to_string(wanted) +
                            (wants_gradient ? "" : ", value only"));
          }
        if (d.soft(setting))
          for (int l = 0; l < static_cast<int>(layout::count); ++l) {
            arrangement a;
            a.scores = static_cast<layout>(l);
            a.over_target = true;
            t.identical(base, run(*loss, p, a),
                        size + ", over the soft targets, " + name_of(a.scores));
          }
        for (const layout l :
             {layout::packed, layout::column_major, layout::inner_2}) { // accumulate
          problem<T> q = p;
          for (std::size_t i = 0; i < p.scores.size(); ++i)
            q.before.push_back(rounded(storage, static_cast<T>(random.uniform(-3, 3))));
          outcome<T> sum = base;
          if (storage ==
              kept::compute) { // 16-bit: the sum is rounded once, which base does not show
            for (std::size_t i = 0; i < sum.gradient.size(); ++i)
              if (!p.ignored(static_cast<index>(i) / cols))
                sum.gradient[i] = q.before[i] + base.gradient[i];
              else
                sum.gradient[i] = q.before[i];
          } else {
            problem<T> wider = q;
            wider.storage = kept::compute;
            sum = run(*loss, wider, {});
            for (T& g : sum.gradient)
              g = rounded(storage, g);
          }
          arrangement a;
          a.scores = a.gradient = l;
          t.identical(sum, run(*loss, q, a), size + ", accumulate, " + name_of(l));
        }
        for (const layout l : {layout::packed, layout::column_major}) // place in the batch
          for (index r = 0; r < p.rows; r += 1 + p.rows / 7) {
            arrangement a;
            a.scores = a.gradient = l;
            const outcome<T> alone = run(*loss, p.rows_only(r, 1), a);
            outcome<T> part = base;
            const auto i = static_cast<std::ptrdiff_t>(r);
            part.gradient.assign(base.gradient.begin() + i * cols,
                                 base.gradient.begin() + (i + 1) * cols);
            for (std::size_t k = 0; k < 5; ++k)
              if (!base.by_products[k].empty())
                part.by_products[k] = {base.by_products[k][static_cast<std::size_t>(i)]};
            if (!base.hits.empty())
              part.hits = {base.hits[static_cast<std::size_t>(i)]};
            t.identical(part, alone,
                        size + ", " + name_of(l) + ", row " + std::to_string(r) + " alone", false);
          }
      }
    }
    t.check();
  }
}

template <class T> void check_storage(const row_descriptor<T>& d) {
  if (sizeof(T) == 8)
    return;
  for (const int setting : d.few_settings()) {
    tally t(title(d, setting) + ", storage");
    random_numbers random(21);
    for (const kept storage : {kept::bfloat16, kept::half})
      for (const index cols : {1, 3, 16, 100, 513, 1030}) {
        std::vector<row_kind> kinds;
        for (const row_kind kind : legal_kinds(d, setting, cols))
          if (kind != row_kind::huge || storage != kept::half)
            kinds.push_back(kind);
        if (kinds.empty())
          continue;
        if (cols > 200)
          kinds.resize(std::min<std::size_t>(kinds.size(), 9));
        problem<T> p = make_problem(d, setting, cols, kinds, storage, random);
        problem<T> wider = p;
        wider.storage = kept::compute;
        for (const reduction how : reductions<T>) {
          const auto loss = d.make(setting, cols, how);
          outcome<T> expected = run(*loss, wider, {});
          for (T& g : expected.gradient)
            g = rounded(storage, g);
          for (const layout l : {layout::packed, layout::column_major, layout::inner_2})
            for (const bool in_place : {false, true}) {
              arrangement a;
              a.scores = a.gradient = l;
              a.in_place = in_place;
              t.identical(expected, run(*loss, p, a),
                          (storage == kept::half ? "half, " : "bfloat16, ") + std::to_string(cols) +
                              " columns, " + name_of(l) + (in_place ? ", in place" : ""));
            }
        }
      }
    t.check();
  }
}

template <class T> void check_differences(const row_descriptor<T>& d) {
  if (sizeof(T) == 4)
    return;
  for (int setting = 0; setting < d.settings(); ++setting) {
    random_numbers random(33);
    for (const reduction how : {reduction::mean, reduction::sum}) {
      const index cols = 5;
      const auto kinds = ordinary_kinds(d, setting, cols, 3);
      if (kinds.empty())
        continue;
      problem<T> p = make_problem(d, setting, cols, kinds, kept::compute, random);
      for (index r = 0; r < p.rows; ++r)
        p.row_weights.push_back(static_cast<T>(random.uniform(0.5, 2)));
      const auto loss = d.make(setting, cols, how);
      arrangement value_only;
      value_only.wants_gradient = false;
      value_only.by_products = 0;
      const std::vector<T> gradient = run(*loss, p, {}).gradient;
      const auto value = [&] { return static_cast<double>(run(*loss, p, value_only).total); };
      const auto report = perdita::testing::check_gradient(value, p.scores, gradient);
      INFO(title(d, setting) << ": " << report.message());
      CHECK(report.ok);
      if (d.twice_smooth())
        CHECK(report.unresolved == 0);
    }
  }
}

template <class T> void check_reference(const row_descriptor<T>& d) {
  // Differences of fourth order in 113 bits: truncation about 1e-24, noise about 1e-27 per score.
  const wide step = ldexp(wide(1), -20), tolerance = ldexp(wide(1), -64);
  for (int setting = 0; setting < d.settings(); ++setting) {
    tally t(title(d, setting) + ", reference");
    random_numbers random(55);
    for (const index cols : {2, 5}) {
      const auto kinds = ordinary_kinds(d, setting, cols, 4);
      if (kinds.empty())
        continue;
      const problem<T> p = make_problem(d, setting, cols, kinds, kept::compute, random);
      for (index r = 0; r < p.rows; ++r) {
        const row_input row = p.row(r);
        const row_expectation e = d.expect(setting, row);
        for (std::size_t c = 0; c < row.scores.size(); ++c) {
          const auto at = [&](int k) -> wide {
            row_input moved = row;
            moved.scores[c] += step * k;
            return d.expect(setting, moved).value.value;
          };
          const wide slope = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step);
          const wide error = size_of(slope - e.gradient[c].value);
          t.require(error <= tolerance, "row " + std::to_string(r) + ", column " +
                                            std::to_string(c) + ": " + text(e.gradient[c].value) +
                                            ", by differences " + text(slope));
          if (!d.sparse())
            t.ordinary(e.gradient[c].value);
        }
      }
    }
    t.check();
  }
}

template <class T> void check_mathematics(const row_descriptor<T>& d) {
  const T epsilon = std::numeric_limits<T>::epsilon();
  for (int setting = 0; setting < d.settings(); ++setting) {
    tally t(title(d, setting) + ", mathematics");
    random_numbers random(66);
    const perdita::loss_traits traits = d.traits(setting);
    t.require(traits.exact_gradient, "the traits disown the gradient, and the differences do not");
    for (const index cols : {2, 6}) {
      const auto kinds = ordinary_kinds(d, setting, cols, 24);
      if (kinds.empty())
        continue;
      const auto loss = d.make(setting, cols, reduction::none);
      const auto values = [&](const problem<T>& p) { return run(*loss, p, {}).by_products[0]; };
      const problem<T> p = make_problem(d, setting, cols, kinds, kept::compute, random);
      const std::vector<T> value = values(p);
      if (traits.nonnegative)
        for (const T v : value)
          t.require(v >= 0, "a value of " + perdita::core::to_text(v) + " below 0");
      if (traits.shift_invariant && sizeof(T) == 8) { // float has no room for the shift
        problem<T> q = p;
        for (T& x : q.scores)
          x += T(1e4);
        const std::vector<T> moved = values(q);
        for (std::size_t r = 0; r < value.size(); ++r)
          t.compare(wide(value[r]), wide(1e5 * epsilon * (1 + std::abs(value[r]))), moved[r],
                    "shifted value", [&] { return std::to_string(r); });
      }
      if (traits.convex) { // on the segments between neighbouring rows that have the same target
        problem<T> a = p, middle = p;
        for (std::size_t i = 0; i < p.scores.size(); ++i) {
          a.scores[i] = p.scores[(i + static_cast<std::size_t>(cols)) % p.scores.size()];
          middle.scores[i] = (p.scores[i] + a.scores[i]) / 2;
        }
        const std::vector<T> other = values(a), between = values(middle);
        for (std::size_t r = 0; r < value.size(); ++r)
          t.require(between[r] <= (value[r] + other[r]) / 2 +
                                      16 * epsilon * (1 + std::abs(value[r]) + std::abs(other[r])),
                    "not convex between row " + std::to_string(r) + " and the next");
      }
    }
    t.check();
  }
}

template <class T> void check_edges(const row_descriptor<T>& d) {
  for (const int setting : d.few_settings()) {
    tally t(title(d, setting) + ", edges");
    random_numbers random(88);
    const index cols = 5;
    const auto kinds = ordinary_kinds(d, setting, cols, 10);
    if (kinds.empty())
      continue;
    const problem<T> p = make_problem(d, setting, cols, kinds, kept::compute, random);
    for (const reduction how : reductions<T>) {
      const auto loss = d.make(setting, cols, how);
      for (const layout l : {layout::packed, layout::column_major}) {
        arrangement a;
        a.scores = a.gradient = l;
        const outcome<T> empty = run(*loss, p.rows_only(0, 0), a);
        t.require(same(empty.total, T(0)), "the value of an empty batch");
        t.require(empty.trespass.empty(), "an empty batch touched" + empty.trespass);

        problem<T> none = p;
        std::string why = "ignored";
        for (const bool by_weight : {false, true}) {
          if (by_weight) {
            none = p;
            none.row_weights.assign(static_cast<std::size_t>(p.rows), T(0));
          } else if (d.soft(setting)) {
            continue;
          } else {
            none.labels.assign(static_cast<std::size_t>(p.rows), row_descriptor<T>::ignore_index);
          }
          const outcome<T> got = run(*loss, none, a);
          t.require(same(got.total, T(0)), "the value where no row counts");
          for (const T g : got.gradient)
            t.require(same(g, T(0)), "the gradient where no row counts");
          for (const auto& v : got.by_products)
            for (const T x : v)
              t.require(same(x, T(0)), "a by-product where no row counts");
          for (const unsigned char h : got.hits)
            t.require(h == 0, "a hit where no row counts");
          problem<T> more = none;
          more.before.assign(p.scores.size(), T(1.5));
          for (const T g : run(*loss, more, a).gradient)
            t.require(same(g, T(1.5)), "the accumulated gradient where no row counts");
        }

        // A weight of zero, and being ignored, are removal.
        problem<T> kept_rows = p.rows_only(0, 0), weighted = p, ignored = p;
        weighted.row_weights.assign(static_cast<std::size_t>(p.rows), T(1));
        for (index r = 0; r < p.rows; ++r) {
          if (r % 3 == 1) {
            weighted.row_weights[static_cast<std::size_t>(r)] = 0;
            if (!d.soft(setting))
              ignored.labels[static_cast<std::size_t>(r)] = row_descriptor<T>::ignore_index;
            continue;
          }
          const problem<T> one = p.rows_only(r, 1);
          ++kept_rows.rows;
          kept_rows.scores.insert(kept_rows.scores.end(), one.scores.begin(), one.scores.end());
          kept_rows.soft.insert(kept_rows.soft.end(), one.soft.begin(), one.soft.end());
          kept_rows.labels.insert(kept_rows.labels.end(), one.labels.begin(), one.labels.end());
        }
        const outcome<T> removed = run(*loss, kept_rows, a);
        const auto close = [&](const outcome<T>& got, const std::string& what) {
          t.compare(wide(removed.total),
                    wide(2 * std::numeric_limits<T>::epsilon() * std::abs(removed.total)),
                    got.total, "total", [&] { return what; });
          std::size_t i = 0;
          for (index r = 0; r < p.rows; ++r)
            for (index c = 0; c < cols; ++c) {
              const T g = got.gradient[static_cast<std::size_t>(r * cols + c)];
              if (r % 3 == 1)
                t.require(same(g, T(0)), what + ": the gradient of a removed row");
              else
                t.require(same(g, removed.gradient[i++]), what + ": the gradient of another row");
            }
        };
        close(run(*loss, weighted, a), "of weight 0");
        if (!d.soft(setting))
          close(run(*loss, ignored, a), "ignored");
      }
    }
    t.check();
  }
}

namespace {

template <class T> struct misuse {
  const char* what;
  void (*spoil)(invocation<T>&, void* elsewhere);
  std::vector<const char*> says;
};

} // namespace

template <class T> void check_errors(const row_descriptor<T>& d) {
  using call_type = invocation<T>;
  static std::int64_t wrong_labels[4];
  static T some[16];
  const auto relabel = [](call_type& c, std::int64_t label) {
    std::copy_n(c.labels, 4, wrong_labels);
    wrong_labels[2] = label;
    c.labels = wrong_labels;
  };
  static const auto relabel_with = relabel;
  const std::vector<misuse<T>> all{
      {"gradient rows",
       [](call_type& c, void*) { c.gradient_at.rows = c.gradient_at.plane_rows = 3; },
       {"gradient rows", "3", "4"}},
      {"gradient columns",
       [](call_type& c, void*) { c.gradient_at.cols = 6; },
       {"gradient columns", "6", "5"}},
      {"too few labels", [](call_type& c, void*) { c.label_count = 3; }, {"labels", "3", "4"}},
      {"too many labels", [](call_type& c, void*) { c.label_count = 5; }, {"labels", "5", "4"}},
      {"label -1", [](call_type& c, void*) { relabel_with(c, -1); }, {"labels[2]", "-1", "0 to 4"}},
      {"label = classes",
       [](call_type& c, void*) { relabel_with(c, 5); },
       {"labels[2]", "5", "0 to 4", "-7"}},
      {"label INT_MIN",
       [](call_type& c, void*) { relabel_with(c, INT32_MIN); },
       {"labels[2]", "-2147483648"}},
      {"label INT64_MIN",
       [](call_type& c, void*) { relabel_with(c, INT64_MIN); },
       {"labels[2]", "-9223372036854775808"}},
      {"label INT64_MAX",
       [](call_type& c, void*) { relabel_with(c, INT64_MAX); },
       {"labels[2]", "9223372036854775807"}},
      {"row weights",
       [](call_type& c, void*) {
         c.options.row_weights = {some, 3};
       },
       {"row_weights", "3", "4"}},
      {"upstream",
       [](call_type& c, void*) {
         c.options.upstream = {some, 5};
       },
       {"upstream", "5", "4"}},
      {"values",
       [](call_type& c, void*) {
         c.options.values = {some, 5};
       },
       {"values", "5", "4"}},
      {"log-sum-exp",
       [](call_type& c, void*) {
         c.options.log_sum_exp = {some, 3};
       },
       {"log_sum_exp", "3", "4"}},
      {"log-probability",
       [](call_type& c, void*) {
         c.options.target_log_probability = {some, 1};
       },
       {"target_log_probability", "1", "4"}},
      {"entropy",
       [](call_type& c, void*) {
         c.options.entropy = {some, 2};
       },
       {"entropy", "2", "4"}},
      {"penalty",
       [](call_type& c, void*) {
         c.options.penalty = {some, 2};
       },
       {"penalty", "2", "4"}},
      {"hits",
       [](call_type& c, void* p) {
         c.options.hits = {static_cast<unsigned char*>(p), 7};
       },
       {"hits", "7", "4"}},
      {"log-sum-exp of a loss without softmax",
       [](call_type& c, void*) {
         c.options.log_sum_exp = {some, 4};
       },
       {"by-product", "softmax"}},
      {"normaliser -1",
       [](call_type& c, void*) { c.options.normaliser = -1; },
       {"normaliser", "-1"}},
      {"normaliser NaN",
       [](call_type& c, void*) { c.options.normaliser = std::nan(""); },
       {"normaliser", "nan"}},
      {"normaliser inf",
       [](call_type& c, void*) { c.options.normaliser = HUGE_VAL; },
       {"normaliser", "inf"}},
      {"overlapping gradient",
       [](call_type& c, void*) {
         c.gradient = const_cast<T*>(static_cast<const T*>(c.scores) + 1);
       },
       {"gradient", "scores", "overlap"}},
      {"in place with other strides",
       [](call_type& c, void*) {
         c.gradient = const_cast<void*>(c.scores);
         c.gradient_at.row_stride = 1, c.gradient_at.col_stride = 4;
       },
       {"gradient", "scores", "overlap"}},
      {"accumulate in place",
       [](call_type& c, void*) {
         c.gradient = const_cast<void*>(c.scores);
         c.options.accumulate = true;
       },
       {"accumulate", "true"}},
      {"no columns",
       [](call_type& c, void*) { c.scores_at.cols = c.gradient_at.cols = c.soft_at.cols = 0; },
       {"0"}},
      {"soft rows",
       [](call_type& c, void*) { c.soft_at.rows = c.soft_at.plane_rows = 3; },
       {"target rows", "3", "4"}},
      {"soft columns",
       [](call_type& c, void*) { c.soft_at.cols = 4; },
       {"target columns", "4", "5"}},
      {"gradient over the target",
       [](call_type& c, void*) { c.gradient = const_cast<T*>(static_cast<const T*>(c.soft) + 1); },
       {"gradient", "target"}},
  };
  for (const int setting : d.few_settings()) {
    tally t(title(d, setting) + ", errors");
    const bool soft = d.soft(setting);
    for (const misuse<T>& m : all) {
      const std::string what = m.what;
      const bool about_soft = what.find("soft") != what.npos || what.find("target") != what.npos;
      if (soft ? what.find("label") != what.npos : about_soft)
        continue;
      if (what.find("without softmax") != what.npos &&
          d.make(setting, 5, reduction::mean)->has_softmax())
        continue;
      for (const bool column_major : {false, true}) {
        std::vector<T> scores(32, T(0.5)), targets(32, T(0.2)), gradient(32, T(-77)),
            values(4, T(-77)), other(8, T(-77));
        const std::vector<std::int64_t> labels{0, 4, 1, 3};
        call_type c;
        c.scores = scores.data();
        c.scores_at = {4, 5, 5, 1, 4, 0};
        if (column_major)
          c.scores_at = {4, 5, 1, 4, 4, 0};
        c.gradient_at = c.soft_at = c.scores_at;
        c.labels = labels.data();
        c.label_count = 4;
        if (soft)
          c.soft = targets.data();
        c.gradient = gradient.data();
        c.options.values = values;
        if (column_major && what == "in place with other strides")
          continue;
        m.spoil(c, other.data());
        std::string message;
        try {
          (void)(*d.make(setting, 5, reduction::mean))(c);
          message = "(nothing was thrown)";
        } catch (const std::invalid_argument& e) {
          message = e.what();
        } catch (const std::exception& e) {
          message = std::string("(not an invalid_argument) ") + e.what();
        }
        t.require(message.find("perdita::" + d.name() + ": ") == 0,
                  what + ": \"" + message + "\" does not begin with the loss");
        for (const char* part : m.says)
          t.require(message.find(part) != message.npos,
                    what + ": \"" + message + "\" does not say \"" + part + "\"");
        t.require(message.find("expected") != message.npos,
                  what + ": \"" + message + "\" does not say what is expected");
        const auto untouched = [](const std::vector<T>& v, T x) {
          return std::all_of(v.begin(), v.end(), [x](T y) { return y == x; });
        };
        t.require(untouched(scores, T(0.5)) && untouched(targets, T(0.2)) &&
                      untouched(gradient, T(-77)) && untouched(values, T(-77)) &&
                      untouched(other, T(-77)),
                  what + ": something was written");
      }
    }
    t.check();
  }
}

template <class T> void check_threads(const row_descriptor<T>& d) {
  for (const int setting : d.few_settings()) {
    tally t(title(d, setting) + ", threads");
    random_numbers random(101);
    for (const auto& [rows, cols] :
         {std::pair<index, index>(1500, 130), std::pair<index, index>(70, 3000),
          std::pair<index, index>(9000, 3)}) {
      const auto few = ordinary_kinds(d, setting, cols, 40);
      if (few.empty())
        continue;
      const problem<T> pool = make_problem(d, setting, cols, few, kept::compute, random);
      problem<T> p = pool.rows_only(0, 0);
      p.rows = rows;
      for (index r = 0; r < rows; ++r) {
        const auto from = static_cast<index>(random.below(40));
        p.scores.insert(p.scores.end(), pool.scores.begin() + from * cols,
                        pool.scores.begin() + (from + 1) * cols);
        if (!pool.soft.empty())
          p.soft.insert(p.soft.end(), pool.soft.begin() + from * cols,
                        pool.soft.begin() + (from + 1) * cols);
        else
          p.labels.push_back(pool.labels[static_cast<std::size_t>(from)]);
      }
      add_weights(p, random);
      const auto loss = d.make(setting, cols, reduction::mean);
      for (const layout l : {layout::packed, layout::column_major}) {
        arrangement a;
        a.scores = a.gradient = l;
        const outcome<T> base = run(*loss, p, a);
        const std::string size =
            std::to_string(rows) + " x " + std::to_string(cols) + ", " + name_of(l);
        a.run_on = {};
        t.identical(base, run(*loss, p, a), size + ", the default");
        perdita::workspace memory;
        a.memory = &memory;
        for (const std::size_t threads : {1U, 2U, 3U, 7U, 16U})
          for (const task_order order :
               {task_order::forward, task_order::reversed, task_order::shuffled}) {
            const threads_executor many(threads, order);
            a.run_on = many;
            a.in_place = order == task_order::shuffled;
            t.identical(base, run(*loss, p, a), size + ", " + std::to_string(threads) + " threads");
          }
        // One thread after the other, more tasks than it says: nothing may depend on who runs what.
        for (const task_order order : {task_order::reversed, task_order::shuffled}) {
          const one_thread_executor one(order);
          a.run_on = one;
          t.identical(base, run(*loss, p, a), size + ", one thread out of order");
        }
      }
      // One loss, used by several threads at once.
      const outcome<T> base = run(*loss, p, {});
      std::vector<outcome<T>> results(4);
      const threads_executor many(4, task_order::forward);
      const auto call = [&](std::size_t i) { results[i] = run(*loss, p, {}); };
      many(4, call);
      for (const outcome<T>& r : results)
        t.identical(base, r, "four calls at once");
    }
    t.check();
  }
}

template <class T> void check_row_loss(const row_descriptor<T>& d) {
  SECTION("the reference's gradient is its derivative") { check_reference(d); }
  SECTION("values and gradients of every setting") { check_accuracy(d); }
  SECTION("shapes") { check_shapes(d); }
  SECTION("NaN") { check_nan(d); }
  SECTION("the same bits however it is asked") { check_same_bits(d); }
  SECTION("sixteen-bit storage") { check_storage(d); }
  SECTION("differences of values") { check_differences(d); }
  SECTION("what the traits say") { check_mathematics(d); }
  SECTION("rows that do not count") { check_edges(d); }
  SECTION("errors") { check_errors(d); }
}

template void check_row_loss(const row_descriptor<float>&);
template void check_row_loss(const row_descriptor<double>&);
template void check_threads(const row_descriptor<float>&);
template void check_threads(const row_descriptor<double>&);
template void check_special(const row_descriptor<float>&, const std::vector<special_row>&, double);
template void check_special(const row_descriptor<double>&, const std::vector<special_row>&, double);

} // namespace perdita_tests

TEST_CASE("row battery: the generators make what they say", "[battery]") {
  using namespace perdita_tests;
  random_numbers random(1);
  double sum = 0, squares = 0;
  const int n = 20000;
  for (const double x : make_scores(row_kind::normal, n, 0, random)) {
    sum += x / n;
    squares += x * x / n;
  }
  CHECK(std::abs(sum) < 0.1);
  CHECK(squares > 8);
  CHECK(squares < 10);
  for (int k = 0; k < static_cast<int>(row_kind::count); ++k) {
    const auto x = make_scores(static_cast<row_kind>(k), 100, 37, random);
    const auto [low, high] = std::minmax_element(x.begin(), x.end());
    const bool flat =
        k >= static_cast<int>(row_kind::equal) && k <= static_cast<int>(row_kind::all_minus_1000);
    INFO("kind " << k);
    CHECK((*low == *high) == flat);
    CHECK(std::isfinite(x[37]));
  }
  std::vector<int> seen(5);
  for (int i = 0; i < 1000; ++i)
    ++seen[random.below(5)];
  for (const int s : seen)
    CHECK(s > 150);
  double mass = 0;
  for (const double q : make_distribution(row_kind::normal, 100, 3, random))
    mass += q;
  CHECK(std::abs(mass - 1) < 1e-9);
}
