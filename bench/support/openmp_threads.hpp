// SPDX-License-Identifier: MIT
#pragma once

/// For peers that bring OpenMP's threads along: we use the same ones, and leave them where the
/// system puts them.

#include <cstddef>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <perdita/core/executor.hpp>

#include "most_threads.hpp"

namespace bench {

#if defined(_OPENMP)
inline std::size_t most_openmp_threads() {
  return most_threads(static_cast<std::size_t>(omp_get_num_procs()));
}
inline perdita::executor use_openmp_threads(std::size_t n) {
  omp_set_num_threads(static_cast<int>(n));
  return perdita::openmp;
}
#else
inline std::size_t most_openmp_threads() { return 1; }
inline perdita::executor use_openmp_threads(std::size_t) { return perdita::serial; }
#endif

} // namespace bench
