// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <atomic>
#include <concepts>
#include <cstddef>
#include <type_traits>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "../config.hpp"

namespace perdita::inline PERDITA_ABI {

/// A numbered piece of work: task(i) may run on any thread, once for each i. Does not own.
class task {
public:
  template <class F>
  requires(!std::same_as<std::remove_cvref_t<F>, task>) task(F& f)
      : object_(&f),
        call_([](const void* object, std::size_t i) { (*static_cast<const F*>(object))(i); }) {}
  void operator()(std::size_t i) const { call_(object_, i); }

private:
  const void* object_;
  void (*call_)(const void*, std::size_t);
};

/// Runs every task on the calling thread.
struct serial_executor {
  void operator()(std::size_t n, task work) const {
    for (std::size_t i = 0; i < n; ++i)
      work(i);
  }
  std::size_t concurrency() const { return 1; }
};
inline constexpr serial_executor serial{};

#if defined(_OPENMP)
/// Runs the tasks on OpenMP's threads; the default where the program is compiled with OpenMP.
struct openmp_executor {
  void operator()(std::size_t n, task work) const {
    if (n < 2)
      return serial(n, work);
#pragma omp parallel for schedule(dynamic, 1)
    for (std::ptrdiff_t i = 0; i < static_cast<std::ptrdiff_t>(n); ++i)
      work(static_cast<std::size_t>(i));
  }
  std::size_t concurrency() const { return static_cast<std::size_t>(omp_get_max_threads()); }
};
inline constexpr openmp_executor openmp{};
#endif

/// Where work runs: perdita::serial, perdita::openmp, or any callable run(n, task) of the user's
/// that calls task(0) … task(n - 1), each once, in any order, and returns when all are done.
/// A member concurrency(), where there is one, says how many may run at once (else 32 are assumed);
/// it bounds the scratch memory. Results never depend on any of this. Does not own the callable.
class executor {
public:
  executor()
#if defined(_OPENMP)
      : executor(openmp){}
#else
      : executor(serial) {
  }
#endif
        template <class Run>
  requires(!std::same_as<std::remove_cvref_t<Run>, executor> &&
           std::invocable<const Run&, std::size_t, task>) executor(const Run& run)
      : object_(&run), call_([](const void* object, std::size_t n, task work) {
          (*static_cast<const Run*>(object))(n, work);
        }) {
    if constexpr (requires { run.concurrency(); })
      concurrency_ = static_cast<std::size_t>(run.concurrency());
  }
  void operator()(std::size_t n, task work) const { call_(object_, n, work); }
  std::size_t concurrency() const { return concurrency_ > 0 ? concurrency_ : 1; }

private:
  const void* object_;
  void (*call_)(const void*, std::size_t, task);
  std::size_t concurrency_ = 32;
};

namespace core {
/// f(k, i) for each i < n: each of `workers` workers k takes one i after the other.
template <class F>
void share_out(const executor& run_on, std::ptrdiff_t workers, std::ptrdiff_t n, const F& f) {
  std::atomic<std::ptrdiff_t> next{0};
  const auto work = [&](std::size_t k) {
    for (std::ptrdiff_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;)
      f(k, i);
  };
  run_on(static_cast<std::size_t>(std::min(workers, n)), work);
}
} // namespace core

} // namespace perdita::inline PERDITA_ABI
