// SPDX-License-Identifier: MIT

// One line of hashes of what the row losses return, to be the same on every instruction set with
// FMA, on plain scalars, and from every compiler. Inputs come from integers alone.

#include <bit>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <vector>

#include <perdita/perdita.hpp>

namespace {

using std::int64_t;
using std::size_t;
using std::uint64_t;

class fnv1a {
public:
  template <class T> void add(T x) {
    const auto wide = static_cast<double>(x);
    const uint64_t bits = wide != wide ? 1 : std::bit_cast<uint64_t>(wide); // one NaN is enough
    for (int byte = 0; byte < 8; ++byte)
      hash_ = (hash_ ^ (bits >> (8 * byte) & 0xff)) * 0x100000001b3U;
  }
  uint64_t value() const { return hash_; }

private:
  uint64_t hash_ = 0xcbf29ce484222325U;
};

/// Scores between -16 and 16, exact in every storage type that is used.
template <class T> std::vector<T> scores(int64_t rows, int64_t cols) {
  std::vector<T> x;
  uint64_t state = 1;
  for (int64_t i = 0; i < rows * cols; ++i) {
    state = state * 6364136223846793005U + 1442695040888963407U;
    x.push_back(static_cast<T>(static_cast<double>(static_cast<int64_t>(state >> 40) - (1 << 23)) *
                               0x1p-19));
    if (i % 97 == 13)
      x.back() = -std::numeric_limits<T>::infinity();
    if (i / cols == 5) // a confident row
      x.back() -= static_cast<T>(i % cols == 2 ? -60 : 20);
  }
  return x;
}

template <class Loss, class T> uint64_t hash(const Loss& loss, bool soft) {
  fnv1a h;
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
      for (const T g : *v)
        h.add(g);
  }
  return h.value();
}

template <class Loss> void print(const char* name, const Loss& loss, bool soft = false) {
  using T = typename Loss::value_type;
  std::printf(" %s%zu=%016llx", name, 8 * sizeof(T),
              static_cast<unsigned long long>(hash<Loss, T>(loss, soft)));
}

void print_all() {
  using cross_entropy = perdita::cross_entropy<float>;
  print("plain", cross_entropy());
  print("sum", cross_entropy({.reduction = perdita::reduction::sum}));
  print("smoothed", cross_entropy({.label_smoothing = 0.1F}));
  print("cold", cross_entropy({.temperature = 0.75F}));
  print("capped", cross_entropy({.softcap = 5}));
  print("penalty", cross_entropy({.log_z_penalty = 0.01F}));
  print("focal", cross_entropy({.focal_gamma = 2}));
  print("soft",
        cross_entropy({.label_smoothing = 0.125F, .temperature = 2, .log_z_penalty = 0.01F}), true);
  print("ldr", perdita::ldr_kl<float>({.lambda = 0.7F, .margin = 0.5F}));
  print("z", perdita::z_loss<float>({.a = 0.5F, .b = 2}));
  print("sparsemax", perdita::sparsemax_loss<float>());
  // In double, where cross-entropy takes long to compile.
  print("comp_sum", perdita::comp_sum<double>({.tau = 1}));
  print("z", perdita::z_loss<double>({.a = 0.5, .b = 2}));
  print("sparsemax", perdita::sparsemax_loss<double>());
}

} // namespace

int main() {
  std::printf("losses");
  print_all();
  std::printf("\n");
}
