// SPDX-License-Identifier: MIT
#pragma once

/// Others who compute mean cross-entropy of labels and its gradient, in turns with us. Each is a
/// program of its own, because their thread pools would disturb each other.
///
/// A benchmark is named peer/NAME/ROWSxCLASSES/threads:N; x_ours is the peer's time divided by that
/// of perdita::cross_entropy, which writes the gradient to a buffer of its own, as the peers do.

#include <algorithm>
#include <cstddef>
#include <functional>
#include <string>

#include <benchmark/benchmark.h>

#include <perdita/cross_entropy.hpp>

#include "memory.hpp"
#include "problem.hpp"
#include "sampling.hpp"

namespace bench {

struct peer {
  std::function<double()> run; ///< returns the loss
  std::function<matrix_view<const float>()> gradient;
};

struct peer_program {
  const char* name;
  std::size_t most_threads;
  /// Where our own work runs, so that both sides have the same threads.
  std::function<perdita::executor(std::size_t threads)> use_threads;
  std::function<peer(const problem<float>&, std::size_t threads)> make;
};

inline void against_peer(benchmark::State& state, const peer_program& program, shape size,
                         std::size_t n) {
  const problem<float>& p = use_problem<float>(size);
  perdita::workspace workspace;
  perdita::call_options<float> call;
  call.run_on = program.use_threads(n);
  call.memory = &workspace;
  const perdita::cross_entropy<float> loss;
  const peer other = program.make(p, n);

  // Others sum in float and take p - 1 of a p rounded to float: let them.
  if (!p.right(other.run(), 1e-4) || !p.right(other.gradient(), 1e-4, 1e-5)) {
    state.SkipWithError("the peer's result is not that of the reference");
    return;
  }
  float value = loss(p.scores(), p.labels(), p.gradient(), call);
  if (!p.right(static_cast<double>(value)) || !p.right(p.gradient())) {
    state.SkipWithError("our result is not that of the reference");
    return;
  }
  contestant ours([&] { value = loss(p.scores(), p.labels(), p.gradient(), call); });
  contestant theirs([&] { benchmark::DoNotOptimize(other.run()); });
  for (auto _ : state) {
    compete({&ours, &theirs});
    state.SetIterationTime(theirs.seconds());
  }
  state.counters["x_ours"] = theirs.seconds() / ours.seconds();
  state.counters["ours_ms"] = ours.seconds() * 1e3;
  state.counters["noise"] = std::max(ours.noise(), theirs.noise());
  state.counters["samples"] = static_cast<double>(ours.samples());
}

inline int run_peer(int argc, char** argv, const peer_program& program) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv))
    return 1;
  for (const shape size : shapes)
    for (std::size_t n = 1; n <= program.most_threads; ++n) {
      const std::string full =
          std::string("peer/") + program.name + "/" + size.name() + "/threads:" + std::to_string(n);
      benchmark::RegisterBenchmark(
          full.c_str(),
          [=, &program](benchmark::State& state) { against_peer(state, program, size, n); })
          ->UseManualTime()
          ->Iterations(1)
          ->Unit(benchmark::kMillisecond);
    }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

} // namespace bench
