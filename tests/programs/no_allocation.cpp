// SPDX-License-Identifier: MIT

// With a workspace that has been used once, a call takes nothing from the heap; without one, one
// block. A program of its own, because it replaces the program's operator new.

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

#include <perdita/linear.hpp>
#include <perdita/perdita.hpp>

#include "support/kernels.hpp"

namespace {

std::atomic<int> allocations{0};

void* allocate(std::size_t size, std::size_t alignment) {
  ++allocations;
  void* p = std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
  if (!p)
    throw std::bad_alloc();
  return p;
}

} // namespace

void* operator new(std::size_t size) { return allocate(size, 16); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<std::size_t>(alignment));
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

namespace {

int failures = 0;

template <class T, class Loss> void check(const char* name, const Loss& loss) {
  for (const auto& [rows, cols] :
       {std::pair<std::int64_t, std::int64_t>(5, 7), {300, 10}, {40, 3000}}) {
    const auto size = static_cast<std::size_t>(rows * cols);
    std::vector<T> x(size, T(0.25)), gradient(size), values(static_cast<std::size_t>(rows));
    std::vector<int> labels(static_cast<std::size_t>(rows), 1);
    for (const bool column_major : {false, true})
      for (const bool in_place : {false, true})
        for (const bool wants_gradient : {false, true})
          for (const bool with_workspace : {false, true}) {
            const auto rs = column_major ? 1 : cols, cs = column_major ? rows : 1;
            const perdita::matrix_view<const T> in(x.data(), rows, cols, rs, cs);
            const perdita::matrix_view<T> out(in_place ? x.data() : gradient.data(), rows, cols, rs,
                                              cs);
            perdita::workspace memory;
            perdita::call_options<T> call{.values = values, .run_on = perdita::serial};
            if (with_workspace)
              call.memory = &memory;
            int seen = 0;
            for (int round = 0; round < 3; ++round) {
              const int before = allocations;
              if (wants_gradient)
                (void)loss(in, labels, out, call);
              else
                (void)loss(in, labels, call);
              seen = allocations - before;
            }
            const int allowed = with_workspace ? 0 : 1;
            if (seen > allowed) {
              std::printf("%s, %lld x %lld, %s%s%s%s: %d allocations, not %d\n", name,
                          static_cast<long long>(rows), static_cast<long long>(cols),
                          column_major ? "column-major" : "row-major", in_place ? ", in place" : "",
                          wants_gradient ? "" : ", value only",
                          with_workspace ? ", own workspace" : "", seen, allowed);
              ++failures;
            }
          }
  }
}

/// The linear head, with much memory and with little, for rows that are used in place or staged.
template <class T, class Loss> void check_linear(const char* name, const Loss& loss) {
  struct shape {
    std::int64_t rows, features, classes;
    std::size_t tight; // budget
  };
  for (const auto& [rows, features, classes, tight] :
       {shape{5, 7, 11, 0}, {300, 20, 700, 256 * 513 * sizeof(T)}}) {
    const auto n = static_cast<std::size_t>(rows), d = static_cast<std::size_t>(features),
               c = static_cast<std::size_t>(classes);
    std::vector<T> x(n * d, T(0.25)), w(c * d, T(0.125)), b(c, T(1)), dx(n * d), dw(c * d), db(c),
        values(n);
    std::vector<int> labels(n, 1);
    for (const std::size_t budget : {std::size_t{0}, tight})
      for (const bool column_major : {false, true})
        for (const bool wants_gradient : {false, true})
          for (const bool with_workspace : {false, true}) {
            const auto view = [=](auto* p, std::int64_t rows_, std::int64_t cols_) {
              return perdita::matrix_view(p, rows_, cols_, column_major ? 1 : cols_,
                                          column_major ? rows_ : 1);
            };
            const auto x_view = view(std::as_const(x).data(), rows, features),
                       w_view = view(std::as_const(w).data(), classes, features);
            const auto dx_view = view(dx.data(), rows, features),
                       dw_view = view(dw.data(), classes, features);
            const perdita::affine in(w_view, b);
            const perdita::affine out(dw_view, db);
            const perdita::linear head(loss, {.budget = budget});
            perdita::workspace memory;
            perdita::call_options<T> call{.values = values, .run_on = perdita::serial};
            if (with_workspace)
              call.memory = &memory;
            int seen = 0;
            for (int round = 0; round < 3; ++round) {
              const int before = allocations;
              if (wants_gradient)
                (void)head(x_view, in, labels, dx_view, out, call);
              else
                (void)head(x_view, in, labels, call);
              seen = allocations - before;
            }
            const int allowed = with_workspace ? 0 : 1;
            if (seen > allowed) {
              std::printf("linear, %s, %zu x %zu x %zu, %s%s%s: %d allocations, not %d\n", name, n,
                          d, c, column_major ? "column-major" : "row-major",
                          wants_gradient ? "" : ", value only",
                          with_workspace ? ", own workspace" : "", seen, allowed);
              ++failures;
            }
          }
  }
}

template <class T> void check_all() {
  check<T>("cross_entropy", perdita::cross_entropy<T>());
  check<T>("cross_entropy, smoothed", perdita::cross_entropy<T>({.label_smoothing = T(0.1)}));
  check<T>("ldr_kl", perdita::ldr_kl<T>());
  check<T>("z_loss", perdita::z_loss<T>());
  check<T>("sparsemax_loss", perdita::sparsemax_loss<T>());
  check_linear<T>("cross_entropy", perdita::cross_entropy<T>());
  check_linear<T>("cross_entropy, smoothed",
                  perdita::cross_entropy<T>({.label_smoothing = T(0.1)}));
}

} // namespace

int main() {
  check_all<float>();
  check_all<double>();
  if (allocations == 0) {
    std::printf("operator new was not replaced\n");
    ++failures;
  }
  std::printf("%d failures\n", failures);
  return failures > 0;
}
