// SPDX-License-Identifier: MIT
#pragma once

// Ways to run tasks that a library must not notice.

#include <cstddef>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include <perdita/core/executor.hpp>

namespace perdita_tests {

enum class task_order { forward, reversed, shuffled };

inline std::vector<std::size_t> order_tasks(std::size_t n, task_order order) {
  std::vector<std::size_t> tasks(n);
  std::iota(tasks.begin(), tasks.end(), std::size_t{0});
  for (std::size_t i = n; i > 1; --i) {
    if (order == task_order::reversed && i > n - n / 2)
      std::swap(tasks[i - 1], tasks[n - i]);
    if (order == task_order::shuffled)
      std::swap(tasks[i - 1], tasks[i * 7919 % i == 0 ? (i * 31 + 17) % i : i / 2]);
  }
  return tasks;
}

/// Tasks dealt out to threads of their own.
class threads_executor {
public:
  threads_executor(std::size_t threads, task_order order) : threads_(threads), order_(order) {}
  void operator()(std::size_t n, perdita::task work) const {
    const std::vector<std::size_t> tasks = order_tasks(n, order_);
    std::vector<std::thread> pool;
    for (std::size_t t = 0; t < threads_; ++t)
      pool.emplace_back([&, t] {
        for (std::size_t i = t; i < n; i += threads_)
          work(tasks[i]);
      });
    for (std::thread& thread : pool)
      thread.join();
  }
  std::size_t concurrency() const { return threads_; }

private:
  std::size_t threads_;
  task_order order_;
};

/// One thread that does not say so, in any order.
class one_thread_executor {
public:
  explicit one_thread_executor(task_order order) : order_(order) {}
  void operator()(std::size_t n, perdita::task work) const {
    for (const std::size_t i : order_tasks(n, order_))
      work(i);
  }

private:
  task_order order_;
};

} // namespace perdita_tests
