// SPDX-License-Identifier: MIT

// One line of hashes of what the linear head returns, to be the same on every instruction set with
// FMA, on plain scalars, and from every compiler. Inputs come from integers alone.

#include <bit>
#include <cstdint>
#include <cstdio>
#include <vector>

#include <perdita/cross_entropy.hpp>
#include <perdita/linear.hpp>
#include <perdita/similarity.hpp>
#include <perdita/z_loss.hpp>

namespace {

using std::int64_t;
using std::size_t;
using std::uint64_t;

class fnv1a {
public:
  template <class T> void add(const std::vector<T>& numbers) {
    for (const T x : numbers)
      add(x);
  }
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

/// Numbers between -unit and unit, of 24 bits.
template <class T> std::vector<T> numbers(int64_t n, uint64_t state, double unit) {
  std::vector<T> x;
  for (int64_t i = 0; i < n; ++i) {
    state = state * 6364136223846793005U + 1442695040888963407U;
    x.push_back(static_cast<T>(
        unit * static_cast<double>(static_cast<int64_t>(state >> 40) - (1 << 23)) * 0x1p-23));
  }
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

template <class Loss> void print(const char* name, const Loss& loss, bool sparse = false) {
  std::printf(" %s%zu=%016llx", name, 8 * sizeof(typename Loss::value_type),
              static_cast<unsigned long long>(hash(loss, sparse)));
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
  std::printf(" similarity=%016llx", static_cast<unsigned long long>(h.value()));
}

} // namespace

int main() {
  std::printf("linear");
  print("plain", perdita::cross_entropy<float>());
  print("smoothed", perdita::cross_entropy<float>({.label_smoothing = 0.1F}));
  print("sparse", perdita::cross_entropy<float>({.temperature = 2}), true);
  print("z", perdita::z_loss<float>());
  print("z", perdita::z_loss<double>()); // cross-entropy takes long to compile
  print_similarity();
  std::printf("\n");
}
