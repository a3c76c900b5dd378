// SPDX-License-Identifier: MIT

// Hashes of what row losses return.

#include <cstdint>
#include <limits>
#include <vector>

#include <perdita/perdita.hpp>

#include "support/hash.hpp"

namespace {

using std::int64_t;
using std::size_t;
using std::uint64_t;

/// Scores between -16 and 16, exact in every storage type that is used.
template <class T> std::vector<T> scores(int64_t rows, int64_t cols) {
  std::vector<T> x;
  perdita_tests::exact_numbers numbers(1);
  for (int64_t i = 0; i < rows * cols; ++i) {
    x.push_back(static_cast<T>(numbers(16)));
    if (i % 97 == 13)
      x.back() = -std::numeric_limits<T>::infinity();
    if (i / cols == 5) // a confident row
      x.back() -= static_cast<T>(i % cols == 2 ? -60 : 20);
  }
  return x;
}

template <class Loss, class T> uint64_t hash(const Loss& loss, bool soft) {
  perdita_tests::fnv1a h;
  for (const int64_t cols : {1, 2, 3, 10, 17, 100, 513, 2050}) {
    const int64_t rows = cols > 1000 ? 7 : 19;
    std::vector<T> x = scores<T>(rows, cols), gradient(x.size()), across(x.size()),
                   values(static_cast<size_t>(rows));
    std::vector<T> lse = values, entropy = values, target(x.size());
    std::vector<int64_t> labels;
    for (int64_t r = 0; r < rows; ++r) {
      labels.push_back(r % 7 == 6 ? -100 : r * 5 % cols);
      x[static_cast<size_t>(r * cols + r * 5 % cols)] = static_cast<T>(r % 4);
      for (int64_t c = 0; c < cols; ++c)
        target[static_cast<size_t>(r * cols + c)] = static_cast<T>(c == r * 5 % cols ? 0.75
                                                                   : c % 4 == 1      ? 0.125
                                                                                     : 0);
    }
    for (T& q : target)
      q = q == 0 ? T(0) : q;
    perdita::call_options<T> call{.values = values};
    if constexpr (Loss::has_softmax)
      call.log_sum_exp = lse, call.entropy = entropy;
    const perdita::matrix_view<const T> in(x.data(), rows, cols);
    const perdita::matrix_view<T> out(gradient.data(), rows, cols);
    if constexpr (Loss::takes_soft_targets) {
      if (soft)
        h.add(loss(in, perdita::matrix_view<const T>(target.data(), rows, cols), out, call));
    }
    if (!soft) {
      h.add(loss(in, labels, out, call));
      const perdita::matrix_view<const T> columns_in(x.data(), cols, rows, 1,
                                                     cols); // classes along rows
      std::vector<int64_t> some;
      for (int64_t c = 0; c < cols; ++c)
        some.push_back(c % rows);
      h.add(loss(columns_in, some, perdita::matrix_view<T>(across.data(), cols, rows, 1, cols)));
    }
    for (const auto* v : {&gradient, &across, &values, &lse, &entropy})
      h.add(*v);
  }
  return h.value();
}

perdita_tests::hash_table table;

template <class Loss>
void print(const char* name, uint64_t expected, const Loss& loss, bool soft = false) {
  using T = typename Loss::value_type;
  table.row<T>(name, expected, hash<Loss, T>(loss, soft));
}

void print_all() {
  using cross_entropy = perdita::cross_entropy<float>;
  print("plain", 0xd01ceb53562be939, cross_entropy());
  print("sum", 0xc5d1d3b851038176, cross_entropy({.reduction = perdita::reduction::sum}));
  print("smoothed", 0x04bb02658c336acf, cross_entropy({.label_smoothing = 0.1F}));
  print("cold", 0xf25c4c849516b8bf, cross_entropy({.temperature = 0.75F}));
  print("capped", 0xeecd58b19c0aa38c, cross_entropy({.softcap = 5}));
  print("penalty", 0x3aef5a1a5c0a9677, cross_entropy({.log_z_penalty = 0.01F}));
  print("focal", 0xf954043d7c16acde, cross_entropy({.focal_gamma = 2}));
  print("soft", 0xb5c7bc7c1fd5bd05,
        cross_entropy({.label_smoothing = 0.125F, .temperature = 2, .log_z_penalty = 0.01F}), true);
  print("ldr", 0x6415981558823c88, perdita::ldr_kl<float>({.lambda = 0.7F, .margin = 0.5F}));
  print("z", 0xf25177c0b4df0238, perdita::z_loss<float>({.a = 0.5F, .b = 2}));
  print("sparsemax", 0xa386c6664b87e1ca, perdita::sparsemax_loss<float>());
  print("plain", 0xb8eb32ccea8ad67d, perdita::cross_entropy<double>());
  print("soft", 0x3d632e5c1cbdff9e,
        perdita::cross_entropy<double>({.label_smoothing = 0.125, .temperature = 2}), true);
  print("comp_sum", 0xdf5e4d5bf77853c0, perdita::comp_sum<double>({.tau = 1}));
  print("z", 0x2bb762eb46b5b6c8, perdita::z_loss<double>({.a = 0.5, .b = 2}));
  print("sparsemax", 0x2eba43e7c605a067, perdita::sparsemax_loss<double>());
}

} // namespace

int main() {
  print_all();
  return table.end();
}
