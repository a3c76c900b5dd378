// SPDX-License-Identifier: MIT
#pragma once

/// What the machine can do at best: memory traffic without arithmetic, and arithmetic without
/// memory traffic. A loss is measured against these, in the same buffers and by the same threads.

#include <array>
#include <cstddef>

#include <benchmark/benchmark.h>

#include <perdita/core/executor.hpp>
#include <perdita/core/math.hpp>
#include <perdita/core/simd.hpp>

#include "pool.hpp"

namespace bench {

namespace core = perdita::core;
using lanes = core::pack<float>;
inline constexpr std::size_t width = lanes::size;

/// Calls f(first, count) on each thread of `pool` with its part of n floats, in whole packs.
template <class F> void on_parts(const pool& pool, std::size_t n, const F& f) {
  const std::size_t parts = pool.concurrency();
  const std::size_t part = n / parts / width * width;
  const auto task = [&](std::size_t i) { f(i * part, part); };
  pool(parts, task);
}

/// Reads n floats as `Streams` neighbouring segments at once: one stream is limited by the misses a
/// core can have outstanding in it, not by the memory. (Up to Streams - 1 packs at the end are
/// left.)
template <std::size_t Streams> PERDITA_NOINLINE void read(const float* p, std::size_t n) {
  const std::size_t segment = n / Streams / width * width;
  std::array<core::pack_bits<float>, Streams> sum{};
  for (std::size_t i = 0; i < segment; i += width)
    for (std::size_t s = 0; s < Streams; ++s)
      sum[s] = sum[s] + core::as_bits(lanes::load(p + s * segment + i));
  benchmark::DoNotOptimize(sum);
}

/// What copy() stores with.
enum class stores { plain, streaming };

template <stores Stores> PERDITA_NOINLINE void copy(const float* from, float* to, std::size_t n) {
  for (std::size_t i = 0; i + width <= n; i += width) {
    const lanes x = lanes::load(from + i);
    if constexpr (Stores == stores::streaming)
      x.stream(to + i);
    else
      x.store(to + i);
  }
  if constexpr (Stores == stores::streaming)
    core::stream_fence();
  benchmark::ClobberMemory();
}

/// Multiplies by `factor` where the numbers lie.
PERDITA_NOINLINE inline void scale(float* p, std::size_t n, float factor) {
  for (std::size_t i = 0; i + width <= n; i += width)
    (lanes::load(p + i) * factor).store(p + i);
  benchmark::ClobberMemory();
}

/// The arithmetic without which there is no softmax, from the first-level cache: the library's own
/// exponential, and the sum of its results.
struct exponentials {
  static constexpr std::size_t in_cache = 4096;
  static constexpr std::size_t count = 16 * in_cache; ///< per thread and run

  static PERDITA_NOINLINE void run(const float* x, float shift) {
    for (std::size_t round = 0; round < count / in_cache; ++round) {
      std::array<lanes, 4> sum{lanes(0), lanes(0), lanes(0), lanes(0)};
      for (std::size_t i = 0; i < in_cache; i += 4 * width)
        for (std::size_t k = 0; k < 4; ++k)
          sum[k] += core::exp_shifted(lanes::load(x + i + k * width) - shift);
      benchmark::DoNotOptimize(sum);
    }
  }
};

/// Nothing but multiply-adds that do not wait for each other: in ten registers or more, because
/// with no more than latency times units (eight on most machines) one late result delays the next.
struct multiply_adds {
  static constexpr std::size_t registers = core::registers<float>;
  static constexpr std::size_t chains = registers == 1 ? 10 : registers == 2 ? 6 : 3;
  static constexpr std::size_t rounds = 8192;
  static constexpr std::size_t count = chains * rounds * width; ///< per thread and run

  static PERDITA_NOINLINE void run() {
    lanes a(0.5F), b(0.25F);
    benchmark::DoNotOptimize(a);
    benchmark::DoNotOptimize(b);
    lanes x[chains];
    for (auto& chain : x)
      chain = a;
    // Written out: a loop over the chains may leave them in memory.
    for (std::size_t i = 0; i < rounds; ++i)
      core::detail::unrolled<static_cast<std::ptrdiff_t>(chains)>([&](
          auto k) __attribute__((always_inline)) { x[k] = core::fma(x[k], a, b); });
    benchmark::DoNotOptimize(x);
  }
};

/// The same on every thread, long enough for its start not to count.
struct peak {
  static constexpr int repeats = 1000;
  static double operations(std::size_t threads) {
    return 2.0 * multiply_adds::count * repeats * static_cast<double>(threads);
  }
  static void run(const perdita::executor& run_on) {
    const auto task = [](std::size_t) {
      for (int i = 0; i < repeats; ++i)
        multiply_adds::run();
    };
    run_on(run_on.concurrency(), task);
  }
};

} // namespace bench
