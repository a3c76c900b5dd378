// SPDX-License-Identifier: MIT
#pragma once

// Ways to run tasks that a library must not notice.

#include <cstddef>
#include <functional>

#include <perdita/core/executor.hpp>

namespace perdita_tests {

enum class task_order { forward, reversed, shuffled };

/// Calls work(i) for all i below n.
void run_on_threads(std::size_t n, std::size_t threads, task_order order,
                    const std::function<void(std::size_t)>& work);
void run_on_one(std::size_t n, task_order order, const std::function<void(std::size_t)>& work);

/// Tasks dealt out to threads of their own.
class threads_executor {
public:
  threads_executor(std::size_t threads, task_order order) : threads_(threads), order_(order) {}
  void operator()(std::size_t n, perdita::task work) const {
    run_on_threads(n, threads_, order_, work);
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
  void operator()(std::size_t n, perdita::task work) const { run_on_one(n, order_, work); }

private:
  task_order order_;
};

} // namespace perdita_tests
