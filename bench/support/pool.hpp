// SPDX-License-Identifier: MIT
#pragma once

/// Threads that exist before the clock starts: each pinned to a processor, awake for a while after
/// its last task. Given to the library as the executor, and to the limits of the machine as well.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#include <perdita/core/executor.hpp>

namespace bench {

/// The processors this process may use, asked before anything is pinned.
inline const std::vector<int>& processors() {
  static const std::vector<int> list = [] {
    std::vector<int> found;
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) == 0)
      for (int i = 0; i < CPU_SETSIZE; ++i)
        if (CPU_ISSET(static_cast<std::size_t>(i), &set))
          found.push_back(i);
#endif
    for (unsigned i = 0; found.size() < std::thread::hardware_concurrency(); ++i)
      found.push_back(static_cast<int>(i));
    return found;
  }();
  return list;
}

inline void pin([[maybe_unused]] std::size_t thread) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<std::size_t>(processors()[thread % processors().size()]), &set);
  sched_setaffinity(0, sizeof set, &set);
#endif
}

class pool {
public:
  /// The calling thread is one of `threads`, and is pinned too.
  explicit pool(std::size_t threads) : workers_(threads - 1) {
    pin(0);
    for (std::size_t i = 0; i < workers_.size(); ++i) {
      workers_[i] = std::make_unique<worker>();
      workers_[i]->thread = std::thread([this, i] { serve(i); });
    }
  }
  pool(const pool&) = delete;
  pool& operator=(const pool&) = delete;
  ~pool() {
    tasks_ = 0;
    work_.reset();
    announce();
    for (auto& w : workers_)
      w->thread.join();
  }

  std::size_t concurrency() const { return workers_.size() + 1; }

  void operator()(std::size_t n, perdita::task work) const {
    if (workers_.empty() || n < 2)
      return perdita::serial(n, work);
    tasks_ = n;
    work_.emplace(work);
    const std::uint64_t number = announce();
    run_share(0);
    for (const auto& w : workers_)
      while (w->done.load(std::memory_order_acquire) != number)
        relax();
  }

  /// Leaves every worker spinning, so that the next call does not pay for waking it.
  void wake() const {
    const auto nothing = [](std::size_t) {};
    (*this)(concurrency(), nothing);
  }

private:
  struct alignas(64) worker {
    std::atomic<std::uint64_t> done{0};
    std::thread thread;
  };

  static void relax() {
#if defined(__SSE2__)
    __builtin_ia32_pause();
#endif
  }
  std::uint64_t announce() const {
    const std::uint64_t number = call_.fetch_add(1, std::memory_order_release) + 1;
    call_.notify_all();
    return number;
  }
  void run_share(std::size_t thread) const {
    for (std::size_t i = thread; i < tasks_; i += concurrency())
      (*work_)(i);
  }
  void serve(std::size_t i) const {
    pin(i + 1);
    for (std::uint64_t number = 1;; ++number) {
      for (int spins = 0; call_.load(std::memory_order_acquire) < number && spins < 50000; ++spins)
        relax();
      while (call_.load(std::memory_order_acquire) < number)
        call_.wait(number - 1);
      if (!work_)
        return;
      run_share(i + 1);
      workers_[i]->done.store(number, std::memory_order_release);
    }
  }

  mutable std::atomic<std::uint64_t> call_{0};
  mutable std::size_t tasks_ = 0;
  mutable std::optional<perdita::task> work_;
  std::vector<std::unique_ptr<worker>> workers_;
};

/// The pools of 1 and 2 threads (or more), made at first use and kept.
inline const pool& threads(std::size_t n) {
  static std::vector<std::unique_ptr<pool>> pools;
  if (pools.size() < n)
    pools.resize(n);
  auto& p = pools[n - 1];
  if (!p)
    p = std::make_unique<pool>(n);
  return *p;
}

} // namespace bench
