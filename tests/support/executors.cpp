// SPDX-License-Identifier: MIT

#include "executors.hpp"

#include <numeric>
#include <thread>
#include <utility>
#include <vector>

namespace perdita_tests {

namespace {

std::vector<std::size_t> order_tasks(std::size_t n, task_order order) {
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

} // namespace

void run_on_threads(std::size_t n, std::size_t threads, task_order order,
                    const std::function<void(std::size_t)>& work) {
  const std::vector<std::size_t> tasks = order_tasks(n, order);
  std::vector<std::thread> pool;
  for (std::size_t t = 0; t < threads; ++t)
    pool.emplace_back([&, t] {
      for (std::size_t i = t; i < n; i += threads)
        work(tasks[i]);
    });
  for (std::thread& thread : pool)
    thread.join();
}

void run_on_one(std::size_t n, task_order order, const std::function<void(std::size_t)>& work) {
  for (const std::size_t i : order_tasks(n, order))
    work(i);
}

} // namespace perdita_tests
