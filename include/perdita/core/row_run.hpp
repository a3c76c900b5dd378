// SPDX-License-Identifier: MIT
#pragma once

#include <atomic>
#include <memory>

#include "column_kernel.hpp"
#include "executor.hpp"
#include "paired_kernel.hpp"
#include "row_kernel.hpp"
#include "workspace.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// Blocks of rows over the executor's workers; Σ of the weighted values of all rows, which does not
/// depend on how the rows are shared out.
template <class Kernel, class Formula, class T>
double run_blocks(const Formula& formula, const row_job<T>& job, const executor& run_on,
                  workspace* memory) {
  const auto up = [](index a, index b) { return (a + b - 1) / b; };
  const auto up64 = [](std::size_t bytes) { return (bytes + 63) / 64 * 64; };
  const index rows = job.scores.rows, per_sum = Kernel::rows_per_sum(job),
              per_task = Kernel::rows_per_task(job, run_on.concurrency());
  const index tasks = up(rows, per_task), count = up(rows, per_sum);
  const auto workers = std::min(static_cast<std::size_t>(tasks), run_on.concurrency());
  const std::size_t scratch = up64(Kernel::scratch_bytes(formula, job));
  const std::size_t totals = up64(static_cast<std::size_t>(count) * sizeof(value_sum));
  workspace own;
  std::byte* bytes = (memory ? *memory : own).request(totals + workers * scratch);
  value_sum* sums = reinterpret_cast<value_sum*>(bytes);
  std::uninitialized_default_construct_n(sums, count);
  std::atomic<index> next{0};
  const auto work = [&](std::size_t worker) {
    Kernel kernel(formula, job, bytes + totals + worker * scratch);
    for (index t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      kernel.run(t * per_task, std::min(rows, (t + 1) * per_task), sums + t * per_task / per_sum);
    kernel.drain();
  };
  run_on(workers, work);
  exact_sum sum;
  for (index i = 0; i < count; ++i)
    sums[i].add_to(sum);
  return sum.value();
}

/// Whether a gradient of this many bytes will not fit the caches, and need not pass through them.
constexpr bool exceeds_caches(index bytes) { return bytes > (index{4} << 20); }

/// Gradient (if one is wanted), by-products and Σ of the weighted values of all rows. Only the
/// traversal of long rows is compiled for values alone: it gains by that.
template <bool Gradient, class Formula, class T>
double run_rows(const Formula& formula, row_job<T>& job, const executor& run_on,
                workspace* memory) {
  if constexpr (!Gradient)
    job.gradient = {};
  const index bytes = job.scores.rows * job.scores.cols * static_cast<index>(sizeof(T));
  job.streaming = Gradient && !job.in_place() && !job.accumulate && exceeds_caches(bytes);
  if constexpr (paired_formula<Formula>)
    return run_blocks<paired_kernel<Formula, T>>(formula, job, run_on, memory);
  else if constexpr (resident_formula<Formula>)
    return run_blocks<resident_kernel<Formula, T>>(formula, job, run_on, memory);
  else if (prefers_columns(job))
    return run_blocks<column_kernel<Formula, T>>(formula, job, run_on, memory);
  else
    return run_blocks<row_pass<Formula, T, Gradient>>(formula, job, run_on, memory);
}

} // namespace perdita::inline PERDITA_ABI::core
