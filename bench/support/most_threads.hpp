// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>

namespace bench {

/// The number of threads up to which there are benchmarks: two, or PERDITA_BENCH_THREADS.
inline std::size_t most_threads(std::size_t processors) {
  if (const char* wanted = std::getenv("PERDITA_BENCH_THREADS"))
    return std::strtoul(wanted, nullptr, 10);
  return std::min<std::size_t>(processors, 2);
}

} // namespace bench
