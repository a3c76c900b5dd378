// SPDX-License-Identifier: MIT
#pragma once

#include <atomic>

#include "column_kernel.hpp"
#include "executor.hpp"
#include "resident_kernel.hpp"
#include "row_kernel.hpp"
#include "workspace.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// Rows per task: enough to be worth a task, few enough to share out; a function of the shape and
/// the layout, never of the number of threads.
inline index block_rows(index rows, index cols, index tile) {
  const auto up = [](index a, index b) { return (a + b - 1) / b; };
  const index worth = up(65536, cols), shared = std::clamp<index>(rows / 16, 1, 8);
  if (tile > 1) // lanes are rows: whole tiles, or halves of them where there are few
    return up(std::max(worth, up(rows, 4096)), rows > tile ? tile : up(tile, 2)) *
           (rows > tile ? tile : up(tile, 2));
  const index n = std::max({worth, shared, up(rows, 4096)});
  return n > finish_rows ? up(n, finish_rows) * finish_rows : n;
}

/// Blocks of rows over the executor's tasks; Σ of the weighted values of all rows.
template <class Kernel, class Formula, class T>
double run_blocks(const Formula& formula, const row_job<T>& job, const executor& run_on,
                  workspace* memory) {
  const auto up64 = [](std::size_t bytes) { return (bytes + 63) / 64 * 64; };
  const index rows = job.scores.rows,
              block = block_rows(rows, job.scores.cols, Kernel::rows_at_once);
  const index blocks = (rows + block - 1) / block;
  const auto workers = std::min(static_cast<std::size_t>(blocks), run_on.concurrency());
  const std::size_t scratch = up64(Kernel::scratch_bytes(formula, job));
  const std::size_t totals = up64(static_cast<std::size_t>(blocks) * sizeof(exact_sum));
  workspace own;
  std::byte* bytes = (memory ? *memory : own).request(totals + workers * scratch);
  exact_sum* sums = reinterpret_cast<exact_sum*>(bytes);
  std::atomic<index> next{0};
  const auto work = [&](std::size_t worker) {
    Kernel kernel(formula, job, bytes + totals + worker * scratch);
    for (index b; (b = next.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
      exact_sum* sum = new (&sums[b]) exact_sum;
      kernel.run(b * block, std::min(rows, (b + 1) * block), *sum);
    }
  };
  run_on(workers, work);
  exact_sum sum;
  for (index b = 0; b < blocks; ++b)
    sum.add(sums[b]);
  return sum.value();
}

/// Gradient (if the job has one, which is known where the call is compiled), by-products and Σ of
/// the weighted values of all rows.
template <bool Gradient, class Formula, class T>
double run_rows(const Formula& formula, row_job<T>& job, const executor& run_on,
                workspace* memory) {
  const index bytes = job.scores.rows * job.scores.cols * static_cast<index>(sizeof(T));
  // A gradient that will not fit the caches need not pass through them.
  job.streaming = Gradient && !job.in_place() && !job.accumulate && bytes > (index{4} << 20);
  if constexpr (resident_formula<Formula>)
    return run_blocks<resident_kernel<Formula, T, Gradient>>(formula, job, run_on, memory);
  else if (prefers_columns(job))
    return run_blocks<column_kernel<Formula, T, Gradient>>(formula, job, run_on, memory);
  else
    return run_blocks<row_kernel<Formula, T, Gradient>>(formula, job, run_on, memory);
}

} // namespace perdita::inline PERDITA_ABI::core
