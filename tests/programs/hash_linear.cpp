// SPDX-License-Identifier: MIT

// Hashes of what the linear and the similarity head return.

#include <cstdint>
#include <vector>

#include <perdita/cross_entropy.hpp>
#include <perdita/linear.hpp>
#include <perdita/similarity.hpp>
#include <perdita/z_loss.hpp>

#include "support/hash.hpp"

namespace {

using std::int64_t;
using std::size_t;
using std::uint64_t;

using perdita_tests::fnv1a;

template <class T> std::vector<T> numbers(int64_t n, uint64_t seed, double unit) {
  perdita_tests::exact_numbers next(seed);
  std::vector<T> x;
  for (int64_t i = 0; i < n; ++i)
    x.push_back(static_cast<T>(next(unit)));
  return x;
}

template <class Loss> uint64_t hash(const Loss& loss, bool sparse) {
  using T = typename Loss::value_type;
  struct shape {
    int64_t rows, features, classes;
    size_t budget;
  };
  fnv1a h;
  for (const shape& s : {shape{1, 1, 1, 0},
                         {19, 17, 3, 0},
                         {140, 35, 150, 0},
                         {37, 300, 520, 0},
                         {37, 5, 520, size_t{200} << 10},
                         {7, 9, 4100, 0}}) {
    const std::vector<T> x = numbers<T>(s.rows * s.features, 1, 2),
                         w = numbers<T>(s.classes * s.features, 2, 1),
                         b = numbers<T>(s.classes, 3, 1);
    std::vector<T> dx(x.size()), dw(w.size()), db(b.size()), values(static_cast<size_t>(s.rows));
    std::vector<int64_t> labels;
    std::vector<std::int32_t> soft;
    std::vector<T> q;
    for (int64_t r = 0; r < s.rows; ++r) {
      labels.push_back(r % 7 == 6 ? -100 : r * 5 % s.classes);
      for (const int64_t k : {3, 8}) {
        soft.push_back(static_cast<std::int32_t>(r * k % s.classes));
        q.push_back(k == 3 ? T(0.625) : T(0.375));
      }
    }
    const perdita::matrix_view<const T> hidden(x.data(), s.rows, s.features),
        matrix(w.data(), s.classes, s.features);
    const perdita::matrix_view<T> d_hidden(dx.data(), s.rows, s.features),
        d_matrix(dw.data(), s.classes, s.features);
    const perdita::affine weights(matrix, b);
    const perdita::affine d_weights(d_matrix, db);
    const perdita::linear head(loss, {.budget = s.budget});
    const perdita::call_options<T> call{.values = values};
    if constexpr (Loss::takes_soft_targets) {
      if (sparse)
        h.add(head(hidden, weights, perdita::sparse_targets<T>{soft, q, {}}, d_hidden, d_weights,
                   call));
    }
    if (!sparse)
      h.add(head(hidden, weights, labels, d_hidden, d_weights, call));
    for (const auto* v : {&dx, &dw, &db, &values})
      h.add(*v);
  }
  return h.value();
}

perdita_tests::hash_table table;

template <class Loss>
void print(const char* name, uint64_t expected, const Loss& loss, bool sparse = false) {
  table.row<typename Loss::value_type>(name, expected, hash(loss, sparse));
}
/// The similarity head, on the same products: both directions, and a matrix with itself.
void print_similarity() {
  const perdita::similarity head(perdita::z_loss<float>(), {.scale = 3, .both = true});
  fnv1a h;
  for (const int64_t rows : {2, 19, 140}) {
    const int64_t features = rows / 2 + 16;
    const auto x = numbers<float>(rows * features, 4, 2), y = numbers<float>(rows * features, 5, 1);
    std::vector<float> dx(x.size()), dy(x.size()), dz(x.size());
    std::vector<int64_t> partners;
    for (int64_t r = 0; r < rows; ++r)
      partners.push_back((r + 1) % rows);
    const auto view = [&](auto& v) { return perdita::matrix_view(v.data(), rows, features); };
    h.add(head(view(x), view(y), view(dx), view(dy)));
    h.add(head.within(view(x), partners, view(dz)));
    for (const auto* v : {&dx, &dy, &dz})
      h.add(*v);
  }
  table.row<float>("similarity", 0x411e70fbe82b1b56, h.value());
}

} // namespace

int main() {
  print("plain", 0x35bc472c6661dd72, perdita::cross_entropy<float>());
  print("smoothed", 0x1a1a4a7cd2b1c70f, perdita::cross_entropy<float>({.label_smoothing = 0.1F}));
  print("sparse", 0x25afa10ca81c69c3, perdita::cross_entropy<float>({.temperature = 2}), true);
  print("z", 0x1108e1fa84516b1e, perdita::z_loss<float>());
  print("z", 0x39a712aa8b4cc4ca, perdita::z_loss<double>()); // cross-entropy takes long to compile
  print_similarity();
  return table.end();
}
