// SPDX-License-Identifier: MIT

// Descriptors of LDR losses that solve for their distribution: formula sheet 4.2 and 4.3.

#include <perdita/aldr_kl.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include <perdita/ldr.hpp>
#include <perdita/ldr_k_kl.hpp>

#include "support/catch.hpp"
#include "support/row_battery.hpp"
#include "support/softmax_reference.hpp"

namespace perdita_tests {
namespace {

/// δ, or where the label is masked what differs from it by a constant.
std::vector<wide> margins(const row_input& row, const wide& c) {
  const auto y = static_cast<std::size_t>(row.label);
  std::vector<wide> delta;
  for (std::size_t k = 0; k < row.scores.size(); ++k)
    delta.push_back(k == y                         ? wide(0)
                    : row.scores[y] == -infinity() ? row.scores[k]
                    : row.scores[k] == -infinity() ? -infinity()
                                                   : wide(row.scores[k] - row.scores[y] + c));
  if (row.scores[y] == -infinity())
    delta[y] = -infinity();
  return delta;
}
wide largest_of(const std::vector<wide>& x) { return *std::max_element(x.begin(), x.end()); }

/// λ = λ₀ (1 − KL/(α log K)) for scores that are `behind` the largest.
template <class W> struct aldr_kl_equation {
  std::vector<W> behind;
  W l0, alpha, size; // size: log K
  W rate = 0;        // how fast its right side grows with λ

  /// From `l` down, with Newton's steps once they are small; off by the square of the last one.
  W solve(W l, int bits) {
    using perdita_tests::exp, perdita_tests::log, std::exp, std::log;
    for (int step = 0; step < 400; ++step) {
      W sum = 0, first = 0, second = 0;
      for (const W& b : behind) {
        const W f = b / l, image = exp(f), term = image * f;
        sum += image;
        first += term;
        second += term * f;
      }
      const W mean = first / sum, next = l0 * (1 - (size - log(sum) + mean) / (alpha * size));
      const W fall = l - next, apart = fall < 0 ? W(-fall) : fall;
      rate = l0 / (alpha * size * l) * (second / sum - mean * mean);
      const W slope = 1 - rate;
      const bool newton = apart < l * slope / 100;
      l = newton ? W(l - fall / slope) : next;
      if (newton && apart < l * slope * slope / W(std::int64_t(1) << bits))
        break;
    }
    return l;
  }
};

template <class T> class aldr_kl_descriptor final : public row_descriptor<T> {
public:
  std::string name() const override { return "aldr_kl"; }
  int settings() const override { return 6; }
  static double lambda(int setting) {
    return std::vector<double>{1, 2, 0.25}[std::size_t(setting % 3)];
  }
  static double alpha(int setting) { return setting < 3 ? 2 : 4; }
  static double margin(int setting) { return setting % 2 == 0 ? 0 : 0.5; }
  std::string describe(int setting) const override {
    return "lambda " + perdita::core::to_text(lambda(setting)) + ", alpha " +
           perdita::core::to_text(alpha(setting)) + ", margin " +
           perdita::core::to_text(margin(setting));
  }
  std::vector<int> few_settings() const override { return {1}; }
  std::unique_ptr<row_subject<T>> make(int setting, index,
                                       perdita::reduction reduction) const override {
    return std::make_unique<row_subject_of<perdita::aldr_kl<T>>>(
        perdita::aldr_kl<T>({.lambda = static_cast<T>(lambda(setting)),
                             .alpha = static_cast<T>(alpha(setting)),
                             .margin = static_cast<T>(margin(setting)),
                             .ignore_index = row_descriptor<T>::ignore_index,
                             .reduction = reduction}));
  }
  perdita::loss_traits traits(int) const override { return perdita::aldr_kl<T>::traits; }

  row_expectation expect(int setting, const row_input& row) const override {
    const auto y = static_cast<std::size_t>(row.label);
    const std::vector<wide> delta = margins(row, margin(setting));
    const wide top = largest_of(delta), l0 = lambda(setting), a = alpha(setting);
    const wide size = log(wide(static_cast<double>(delta.size())));
    row_expectation e = nothing_reported();
    if (top == -infinity() || delta.size() == 1) {
      e.value = {top == -infinity() ? infinity() : wide(0), 0};
      e.gradient.assign(delta.size(), {0, 0});
      e.gradient[y] = {top == -infinity() ? wide(-1) : wide(0), 0};
      return e;
    }
    aldr_kl_equation<wide> equation{{}, l0, a, size};
    for (const wide& d : delta)
      if (d > -infinity())
        equation.behind.push_back(d - top);
    // Most of the way in double.
    const auto rounded = [](const wide& x) { return static_cast<double>(x); };
    aldr_kl_equation<double> about{{}, rounded(l0), rounded(a), rounded(size)};
    for (const wide& b : equation.behind)
      about.behind.push_back(rounded(b));
    const wide l = equation.solve(about.solve(rounded(l0), 30), 48);
    std::vector<wide> z;
    for (const wide& d : delta)
      z.push_back(d / l);
    const softmax_row s(z);
    const wide off = l - l0;
    e.value = {row.scores[y] == -infinity()
                   ? infinity()
                   : wide(l * (s.surprise(y) - size) - a * size / (2 * l0) * off * off),
               4 * l * (s.surprise(y) + size + 1)};
    if (sizeof(T) == 8)
      e.value.allow(2 * (size_of(top) + size_of(row.scores[y])));

    const auto lambda = static_cast<judged>(l);
    // λ* is off by what the entropy is off, which is no more than an epsilon of its size in double.
    const judged of_lambda = static_cast<judged>(8 * l0 / (a * l * (1 - equation.rate))) *
                             (sizeof(T) == 8 ? judged(1) : judged(0x1p-20));
    const std::vector<judged> scaled(z.begin(), z.end());
    std::vector<wide> shares;
    wide rival_top = -infinity();
    judged reach = 0; // of the rivals that count
    for (std::size_t k = 0; k < z.size(); ++k) {
      shares.push_back(k == y ? s.miss(y) : s.p(k));
      if (k != y && delta[k] > rival_top)
        rival_top = delta[k];
      if (z[k] > -infinity())
        reach += static_cast<judged>(k == y ? s.p(y) : shares[k]) * (scaled[s.top] - scaled[k]);
    }
    const bool rivals = rival_top > -infinity();
    const judged nearest = static_cast<judged>(rival_top) / lambda;
    const judged lead = rivals && z[y] > -infinity() ? std::abs(scaled[y] - nearest) : judged(0);
    for (std::size_t k = 0; k < z.size(); ++k) {
      const judged behind =
          rivals && k != y && z[k] > -infinity() ? nearest - scaled[k] : judged(0);
      // Of the rounding of x_k − top, and of 1/λ.
      const judged of_share = 8 + 2 * behind + of_lambda * (1 + reach + behind + lead) +
                              (sizeof(T) == 8 ? 4 * lead : judged(0));
      e.gradient.push_back(
          {k == y ? wide(-shares[k]) : shares[k], static_cast<judged>(shares[k]) * of_share});
    }
    return e;
  }
};

/// q by filling: cap what is above 1/k, share out the rest, and again. Distances are of raw scores:
/// of margins, 113 bits may not hold them.
template <class T>
row_expectation expect_ldr_k_kl(const row_input& row, index most, const wide& l,
                                const wide& margin) {
  const auto y = static_cast<std::size_t>(row.label);
  const std::vector<wide>& x = row.scores;
  const std::size_t n = x.size();
  const wide size = log(wide(static_cast<double>(n)));
  const auto masked = [&](std::size_t c) { return x[c] == -infinity(); };
  const auto apart = [&](std::size_t a, std::size_t b) { // δ_a − δ_b
    const wide raw = x[a] - x[b];
    return (a == y) == (b == y) ? raw : a == y ? wide(raw - margin) : wide(raw + margin);
  };
  row_expectation e = nothing_reported();
  std::vector<std::size_t> order; // the first k by size
  for (std::size_t c = 0; c < n; ++c)
    if (!masked(c))
      order.push_back(c);
  if (order.empty()) {
    e.value = {infinity(), 0};
    e.gradient.assign(n, {0, 0});
    e.gradient[y] = {-1, 0};
    return e;
  }
  const std::size_t last = std::min(static_cast<std::size_t>(most), order.size()) - 1;
  const wide k = static_cast<double>(last + 1);
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(last) + 1,
                    order.end(), [&](std::size_t a, std::size_t b) {
                      const wide d = apart(a, b);
                      return d > 0 || (d == 0 && a < b);
                    });
  // The k-th is never capped. Images e^{(δ − δ_k)/λ} of those behind it, and from there up what is
  // left, Σ e^{(δ − δ_top)/λ}, when m are capped and the next is the top.
  const auto image_of = [&](std::size_t a, std::size_t b) { return exp(wide(apart(a, b) / l)); };
  std::vector<wide> image(n), left(last + 1);
  left[last] = 1;
  for (std::size_t i = last + 1; i < order.size(); ++i)
    left[last] += image[order[i]] = image_of(order[i], order[last]);
  for (std::size_t i = last; i > 0; --i)
    left[i - 1] = 1 + image_of(order[i], order[i - 1]) * left[i];
  const auto share = [&](std::size_t m) { return (k - wide(static_cast<double>(m))) / k; };
  std::size_t m = 0;
  std::vector<bool> capped(n, false);
  for (; share(m) / left[m] > 1 / k * (1 + ldexp(wide(1), -90)); ++m)
    capped[order[m]] = true;
  const std::size_t top = order[m];
  const wide rest = left[m], free = share(m), behind_top = image_of(order[last], top);
  for (std::size_t i = m; i < order.size(); ++i)
    image[order[i]] = i <= last ? image_of(order[i], top) : wide(image[order[i]] * behind_top);

  std::size_t near = n; // the largest rival that is not capped
  wide others = 0;      // Σ of the rivals that are not capped
  for (std::size_t c = 0; c < n; ++c) {
    if (c == y || capped[c] || masked(c))
      continue;
    others += image[c];
    if (near == n || x[c] > x[near])
      near = c;
  }
  const std::vector<judged> about(x.begin(), x.end()); // for allowances
  const auto lambda = static_cast<judged>(l);
  const auto behind = [&](std::size_t c) {
    return near == n || masked(c) ? judged(0) : (about[near] - about[c]) / lambda;
  };
  // How far the label is from them; in float nothing is lost of that.
  const bool both = near < n && !capped[y] && !masked(y);
  const judged odds =
      both && sizeof(T) == 8
          ? (static_cast<judged>(size_of(apart(near, y))) + std::abs(about[near] - about[y])) /
                lambda
          : judged(0);
  const wide p = image[y] / rest, without = others / rest;

  const wide part = 1 - free;
  const auto over = [&](std::size_t c) { return apart(c, masked(y) ? top : y); };
  const auto terms = [&](std::size_t c) { // of δ_c, which are rounded in double
    return wide(size_of(over(c)) +
                (sizeof(T) == 8 && !masked(y) ? size_of(wide(x[c] - x[y])) : wide(0)));
  };
  wide held = 0, reach = terms(top) + (both ? wide(without * terms(near)) : wide(0));
  for (std::size_t i = 0; i < m; ++i) {
    held += over(order[i]) / k;
    reach += terms(order[i]);
  }
  const wide value =
      held + l * part * (log(k) - size) +
      free * (over(top) + l * ((top == y ? log1p(others) : log(rest)) - size - log(free)));
  e.value = {masked(y) ? infinity() : value, 4 * (l * (size + 1) + reach)};
  const wide of_image = free / rest;
  const auto of_label = static_cast<judged>(p);
  for (std::size_t c = 0; c < n; ++c) {
    if (c == y) {
      const wide slope = capped[y] ? wide(1 - 1 / k) : wide(without + part * p);
      e.gradient.push_back({-slope, static_cast<judged>(8 * slope) +
                                        static_cast<judged>(free * p * without) * (8 + 2 * odds)});
      continue;
    }
    const wide q = capped[c] ? wide(1 / k) : wide(of_image * image[c]);
    e.gradient.push_back(
        {q, static_cast<judged>(q) * (capped[c] ? 8 : 8 + 3 * behind(c) + 2 * of_label * odds)});
  }
  return e;
}

template <class T> class ldr_k_kl_descriptor final : public row_descriptor<T> {
public:
  std::string name() const override { return "ldr_k_kl"; }
  int settings() const override { return 6; }
  static index most(int setting) { return std::vector<index>{1, 2, 5}[std::size_t(setting % 3)]; }
  static double lambda(int setting) { return setting < 3 ? 1 : 0.25; }
  static double margin(int setting) { return setting % 2 == 0 ? 0 : 0.5; }
  std::string describe(int setting) const override {
    return "k " + std::to_string(most(setting)) + ", lambda " +
           perdita::core::to_text(lambda(setting)) + ", margin " +
           perdita::core::to_text(margin(setting));
  }
  std::vector<int> few_settings() const override { return {1}; }
  bool legal(int setting, row_kind, index cols) const override { return cols >= most(setting); }
  std::unique_ptr<row_subject<T>> make(int setting, index cols,
                                       perdita::reduction reduction) const override {
    return std::make_unique<row_subject_of<perdita::ldr_k_kl<T>>>(
        perdita::ldr_k_kl<T>({.k = std::min(cols, most(setting)),
                              .lambda = static_cast<T>(lambda(setting)),
                              .margin = static_cast<T>(margin(setting)),
                              .ignore_index = row_descriptor<T>::ignore_index,
                              .reduction = reduction}));
  }
  perdita::loss_traits traits(int) const override { return perdita::ldr_k_kl<T>::traits; }
  bool twice_smooth() const override { return false; }
  bool sparse() const override { return true; }

  row_expectation expect(int setting, const row_input& row) const override {
    return expect_ldr_k_kl<T>(row, most(setting), lambda(setting), margin(setting));
  }
};

/// The label's score, `some` of another and zeros: with alpha 1.1 the equation has two roots far
/// apart, of which the larger one and the one next to it meet and vanish as that score shrinks.
template <class T> struct fold_row {
  static inline const T alpha = static_cast<T>(1.1);
  index classes, some;
  T own, other;

  struct equation {
    judged defect, slope, value, target_slope, reach;
  };
  equation at(judged l) const {
    const judged size = std::log(judged(classes)), a = alpha, d = (judged(other) - own) / l;
    const judged rest = -judged(own) / l, e = judged(some) * std::exp(d),
                 zeros = judged(classes - 1 - some) * std::exp(rest), sum = 1 + e + zeros;
    const judged mean = (e * d + zeros * rest) / sum;
    const judged variance = (e * d * d + zeros * rest * rest) / sum - mean * mean;
    return {l - 1 + (size - std::log(sum) + mean) / (a * size), 1 - variance / (a * size * l),
            l * (std::log(sum) - size) - a * size / 2 * (l - 1) * (l - 1), -(e + zeros) / sum,
            -rest};
  }
  /// As the formula sheet has it: λ ← λ₀ (1 − KL/(α log K)) from λ₀ on.
  equation solved() const {
    judged l = 1;
    for (judged fall = 1; fall > 2e-18L;) {
      fall = at(l).defect;
      l -= fall;
    }
    return at(l);
  }
  /// Whether what falls from λ₀ is caught far above the smallest root.
  bool is_caught() const {
    for (judged from = 0.4L, to = 1, width = to - from; width > 1e-12L; width /= 8) {
      judged best = from, least = at(from).defect;
      for (judged l = from; l <= to; l += width / 32)
        if (const judged defect = at(l).defect; defect < least) {
          best = l;
          least = defect;
        }
      if (least <= 0)
        return true;
      from = best - width / 16;
      to = best + width / 16;
    }
    return false;
  }
  void check() const {
    const equation right = solved();
    check(1, right);
    check(17, right);
  }
  void check(index rows, const equation& right) const {
    std::vector<T> x, g(static_cast<std::size_t>(rows * classes));
    for (index r = 0; r < rows; ++r)
      for (index k = 0; k < classes; ++k)
        x.push_back(k == 0 ? own : k <= some ? other : T(0));
    const std::vector<int> labels(static_cast<std::size_t>(rows), 0);
    const T value = perdita::aldr_kl<T>({.alpha = alpha, .reduction = perdita::reduction::sum})(
        perdita::matrix_view<const T>(x.data(), rows, classes), labels,
        perdita::matrix_view<T>(g.data(), rows, classes));
    const judged epsilon = std::numeric_limits<T>::epsilon();
    INFO(rows << " rows of " << classes << " classes, " << perdita::core::to_text(other));
    CHECK(std::abs(value / judged(rows) - right.value) <= 8 * epsilon * std::abs(right.value));
    // λ* has what digits the slope of the equation leaves.
    for (index r = 0; r < rows; ++r)
      CHECK(std::abs(g[static_cast<std::size_t>(r * classes)] - right.target_slope) <=
            std::abs(right.target_slope) * 8 * epsilon * (1 + right.reach) * (1 + 1 / right.slope));
  }
};

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double n = std::numeric_limits<double>::quiet_NaN();

} // namespace

TEMPLATE_TEST_CASE("aldr_kl: the row battery", "[aldr_kl]", float, double) {
  check_row_loss(aldr_kl_descriptor<TestType>());
}
TEMPLATE_TEST_CASE("ldr_k_kl: the row battery", "[aldr_kl]", float, double) {
  check_row_loss(ldr_k_kl_descriptor<TestType>());
}

TEMPLATE_TEST_CASE("aldr_kl: special rows", "[aldr_kl]", float, double) {
  const std::vector<special_row> rows{
      {"one class", 0, {3}, 0, {}, 0, {0}},
      {"all rivals masked", 0, {-inf, 5, -inf}, 1, {}, -0.75 * std::log(3.0), {0, 0, 0}},
      {"a lead of 1000", 0, {0, 1000, 0}, 1, {}, -0.75 * std::log(3.0), {0, 0, 0}},
      {"all masked", 0, {-inf, -inf, -inf}, 1, {}, inf, {0, -1, 0}},
      {"+inf at the label", 0, {0, inf, 1}, 1, {}, -0.75 * std::log(3.0), {0, 0, 0}},
      {"label masked, rivals equal", 0, {1, -inf, 1}, 1, {}, inf, {0.5, -1, 0.5}},
      {"+inf elsewhere", 0, {0, inf, 1}, 0, {}, n, {n, n, n}},
      {"NaN", 0, {0, 1, n}, 0, {}, n, {n, n, n}},
      {"NaN at the label", 0, {0, 1, n}, 2, {}, n, {n, n, n}},
  };
  check_special(aldr_kl_descriptor<TestType>(), rows, 8);
}

TEMPLATE_TEST_CASE("ldr_k_kl: special rows", "[aldr_kl]", float, double) {
  const std::vector<special_row> rows{
      {"one class", 0, {3}, 0, {}, 0, {0}},
      {"all rivals masked", 0, {-inf, 5, -inf}, 1, {}, -std::log(3.0), {0, 0, 0}},
      {"all masked", 0, {-inf, -inf, -inf}, 1, {}, inf, {0, -1, 0}},
      {"+inf elsewhere", 0, {0, inf, 1}, 0, {}, n, {n, n, n}},
      {"+inf at the label", 0, {0, inf, 1}, 1, {}, n, {n, n, n}},
      {"NaN", 0, {0, 1, n}, 0, {}, n, {n, n, n}},
  };
  check_special(ldr_k_kl_descriptor<TestType>(), rows, 8);
}

/// One row by itself: value and gradient within their slack, and the slopes' sum 0.
template <class T>
void check_ldr_k_kl(const typename perdita::ldr_k_kl<T>::options& options, const std::vector<T>& x,
                    index label) {
  const auto classes = static_cast<index>(x.size());
  std::vector<T> g(x.size());
  const T value = perdita::ldr_k_kl<T>(options)(perdita::matrix_view<const T>(x.data(), 1, classes),
                                                std::vector<index>{label},
                                                perdita::matrix_view<T>(g.data(), 1, classes));
  const row_expectation e = expect_ldr_k_kl<T>({{x.begin(), x.end()}, label, {}}, options.k,
                                               options.lambda, options.margin);
  const judged epsilon = std::numeric_limits<T>::epsilon(), least = std::numeric_limits<T>::min();
  // The images of a short row are added up in double, one by one.
  const judged of_sum = sizeof(T) == 8 && classes <= 31 ? judged(classes) / 2 : judged(0);
  judged worst = 0, sum = 0, slack = 0; // errors as parts of what they may be
  std::size_t at = 0;
  for (std::size_t c = 0; c < x.size(); ++c) {
    const auto right = static_cast<judged>(e.gradient[c].value);
    const judged may = epsilon * (e.gradient[c].slack + of_sum * std::abs(right)) + 4 * least,
                 error = std::abs(judged(g[c]) - right) / may;
    if (!(error <= worst)) {
      worst = error;
      at = c;
    }
    sum += judged(g[c]);
    slack += may;
  }
  const auto right = static_cast<judged>(e.value.value);
  const bool near = value == right || std::abs(judged(value) - right) <=
                                          epsilon * (e.value.slack + std::abs(right)) + least;
  if (worst <= 1 && std::abs(sum) <= slack &&
      near) { // to print a row takes longer than to judge it
    SUCCEED();
    return;
  }
  CAPTURE(classes, options.k, options.lambda, options.margin, label, at, x[at], g[at], x,
          static_cast<double>(e.gradient[at].value), worst, sum, slack, value, right);
  FAIL_CHECK("a slope (worst), the sum of all or the value (near) is wrong");
}

// A gap that takes up the digits of a margin must not take those of what is behind it.
TEMPLATE_TEST_CASE("ldr_k_kl: gaps of many λ", "[aldr_kl]", float, double) {
  using T = TestType;
  std::uint32_t random = 1;
  const auto uniform = [&] { // of −1 … 1
    random = random * 1664525U + 1013904223U;
    return static_cast<double>(random >> 8) / double(1 << 23) - 1;
  };
  const std::vector<double> gaps{0, 0.5, 4, -4, 30, -30, 75, -75, 1e4, -1e4, 1e8, -1e8, 1e30};
  struct scale {
    double lambda, margin;
  };
  // Ties must be exact: where one at the cap has been tied, a rounding decides.
  for (const scale s : {scale{1, 0}, scale{0.25, 0.5}, scale{0x1p-10, -2}, scale{0.75, 300}})
    for (const std::size_t classes : {2U, 3U, 7U, 10U, 31U, 32U, 100U})
      for (const index k : {1, 2, 3, 5})
        for (std::size_t leaders = 0; leaders <= std::min<std::size_t>(classes - 1, 4); ++leaders)
          for (const double gap : gaps)          // of the leaders over the other rivals
            for (const double of_label : gaps) { // of the label over them
              if (k > static_cast<index>(classes) || (leaders == 0 ? gap != 0 : gap < 0) ||
                  (classes > 10 && leaders % 2 != 0))
                continue;
              const auto label = static_cast<std::size_t>(random >> 8) % classes;
              std::vector<T> x(classes);
              std::size_t led = 0;
              const bool ties = (random >> 16) % 4 == 0, masks = (random >> 18) % 4 == 0;
              for (std::size_t c = 0; c < classes; ++c) {
                const double about = ties ? std::round(uniform()) : 3 * uniform();
                const double over = c == label ? of_label : led++ < leaders ? gap : 0;
                x[c] = static_cast<T>(s.lambda * (about + over) + (c == label ? s.margin : 0));
                if (masks && c != label && c % 5 == 3)
                  x[c] = static_cast<T>(-inf);
              }
              check_ldr_k_kl<T>(
                  {.k = k, .lambda = static_cast<T>(s.lambda), .margin = static_cast<T>(s.margin)},
                  x, static_cast<index>(label));
            }
}

TEMPLATE_TEST_CASE("ldr_k_kl: a masked label, and gaps of the size of the largest numbers",
                   "[aldr_kl]", float, double) {
  using T = TestType;
  const T huge = std::numeric_limits<T>::max() / 4, masked = static_cast<T>(-inf);
  for (const std::size_t classes : {3U, 7U, 31U, 40U})
    for (const index k : {1, 2, 3})
      for (const T lambda :
           {T(1), static_cast<T>(1e-10), static_cast<T>(1e-30), static_cast<T>(1e30)})
        for (const T margin : {T(0), T(0.5)}) {
          const typename perdita::ldr_k_kl<T>::options o{
              .k = k, .lambda = lambda, .margin = margin};
          const auto check = [&](T own, T first, T second, T others) {
            std::vector<T> x(classes, others);
            x[0] = own;
            x[1] = first;
            x[2] = second;
            check_ldr_k_kl<T>(o, x, 0);
          };
          check(-huge, 0, 0, 0);
          check(-huge, 0, 0, -lambda);
          check(-huge, huge, huge, huge);
          check(-huge, huge, 0, lambda);
          check(huge, -huge, -huge, -huge);
          check(huge, huge, -huge, -huge);
          check(0, huge, 0, -huge);
          check(0, huge, -lambda, -huge);
          check(0, huge, huge, masked);
          check(masked, huge, 0, -lambda);
          check(masked, huge, huge, -huge);
          check(masked, 3, 2, 1);
          check(masked, masked, 2, masked);
          check(0, masked, -huge, masked);
        }
}

// Formula sheet 4.3: what it is at both ends of k.
TEST_CASE("ldr_k_kl: its limits", "[aldr_kl]") {
  using Catch::Matchers::WithinAbs;
  const std::vector<double> x{0.5, -1.2, 2, 0.1};
  const std::vector<int> label{0};
  const auto value = [&](const auto& loss) {
    return loss(perdita::matrix_view<const double>(x.data(), 1, 4), label);
  };
  for (const double c : {0.0, 0.3}) {
    CHECK_THAT(value(perdita::ldr_k_kl<double>({.k = 1, .lambda = 0.7, .margin = c})),
               WithinAbs(value(perdita::ldr_kl<double>({.lambda = 0.7, .margin = c})), 1e-14));
    CHECK_THAT(value(perdita::ldr_k_kl<double>({.k = 4, .margin = c})),
               WithinAbs(value(perdita::average_margin<double>({.margin = c})), 1e-14));
  }
}

TEST_CASE("aldr_kl: λ* satisfies its equation and is the largest that does", "[aldr_kl]") {
  // From q_k/q_j = e^{(x_k − x_j)/λ}.
  const std::vector<double> x{0.5, -1.2, 2, 0.1};
  std::vector<double> g(4);
  const std::vector<int> label{0};
  const double l0 = 1.5, a = 1.25;
  perdita::aldr_kl<double>({.lambda = l0, .alpha = a})(
      perdita::matrix_view<const double>(x.data(), 1, 4), label,
      perdita::matrix_view<double>(g.data(), 1, 4));
  const double l = (x[2] - x[3]) / std::log(g[2] / g[3]);
  const auto equation = [&](double at) {
    double sum = 0, kl = 0;
    for (const double v : x)
      sum += std::exp(v / at);
    for (const double v : x)
      kl += std::exp(v / at) / sum * std::log(4 * std::exp(v / at) / sum);
    return at - l0 * (1 - kl / (a * std::log(4)));
  };
  CHECK(std::abs(equation(l)) < 1e-12);
  for (int i = 1; i <= 100; ++i)
    CHECK(equation(l + (l0 - l) * i / 100) > 0);
}

TEMPLATE_TEST_CASE("aldr_kl: where two of several solutions meet", "[aldr_kl]", float, double) {
  using T = TestType;
  constexpr bool is_double = std::is_same_v<T, double>;
  const std::vector<fold_row<T>> rows{
      {10, 3, T(2.19844), T(is_double ? 0.913844 : 0.912944)},
      {1000, 52, T(4.88359), T(2.914687)},
  };
  for (const fold_row<T>& row : rows) {
    row.check();
    // The score at which they meet, to the last digit.
    fold_row<T> caught = row, falls = row;
    caught.other = row.other * T(1.02);
    REQUIRE(caught.is_caught());
    REQUIRE_FALSE(falls.is_caught());
    for (int step = 0; step < 60; ++step) {
      fold_row<T> middle = row;
      middle.other = (caught.other + falls.other) / 2;
      (middle.is_caught() ? caught : falls).other = middle.other;
    }
    for (T apart = T(1e-2); apart > T(is_double ? 5e-10 : 5e-7); apart /= T(10))
      for (const T side : {T(-1), T(1)}) {
        fold_row<T> near = row;
        near.other = (side < T(0) ? falls : caught).other * (1 + side * apart);
        near.check();
      }
  }
}

TEST_CASE("aldr_kl, ldr_k_kl: options out of range are refused", "[aldr_kl]") {
  using Catch::Matchers::ContainsSubstring;
  CHECK_THROWS_WITH(perdita::aldr_kl<float>({.lambda = 0}), ContainsSubstring("lambda is 0"));
  CHECK_THROWS_WITH(perdita::aldr_kl<float>({.alpha = 1}), ContainsSubstring("alpha is 1"));
  CHECK_THROWS_WITH(perdita::aldr_kl<float>({.margin = std::nanf("")}),
                    ContainsSubstring("margin is"));
  CHECK_THROWS_WITH(perdita::aldr_kl<float>({.lambda = 1e-39F}),
                    ContainsSubstring("the inverse of lambda (1 - 1/alpha) is finite"));
  CHECK_THROWS_WITH(perdita::aldr_kl<float>({.lambda = 1e-36F, .alpha = 1.000001F}),
                    ContainsSubstring("the inverse of lambda (1 - 1/alpha) is finite"));
  CHECK_THROWS_WITH(perdita::aldr_kl<double>({.lambda = 1e-309}),
                    ContainsSubstring("the inverse of lambda (1 - 1/alpha) is finite"));
  CHECK_NOTHROW(perdita::aldr_kl<float>({.lambda = 1e-37F}));
  CHECK_THROWS_WITH(perdita::ldr_k_kl<float>({.lambda = 1e-39F}),
                    ContainsSubstring("whose inverse is finite"));
  CHECK_THROWS_WITH(perdita::ldr_k_kl<double>({.lambda = 1e-309}),
                    ContainsSubstring("whose inverse is finite"));
  CHECK_THROWS_WITH(perdita::ldr_kl<float>({.lambda = 1e-39F}),
                    ContainsSubstring("whose inverse is finite"));
  CHECK_NOTHROW(perdita::ldr_k_kl<float>({.lambda = 1e-38F}));
  CHECK_NOTHROW(perdita::ldr_kl<double>({.lambda = 1e-300}));
  CHECK_THROWS_WITH(perdita::ldr_k_kl<float>({.k = 0}), ContainsSubstring("k is 0"));
  CHECK_THROWS_WITH(perdita::ldr_k_kl<float>({.lambda = -1}), ContainsSubstring("lambda is -1"));
  const std::vector<float> x{0, 1};
  const std::vector<int> label{0};
  CHECK_THROWS_WITH(
      perdita::ldr_k_kl<float>({.k = 3})(perdita::matrix_view<const float>(x.data(), 1, 2), label),
      ContainsSubstring("k is 3"));
}

} // namespace perdita_tests
