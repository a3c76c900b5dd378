// SPDX-License-Identifier: MIT

// The sequence head from hidden states against the linear head on the same rows.
//
//   build/bench/bench/bench_sequence
//   PERDITA_BENCH_LARGE=1 ...    with 8192x1024x50257: 2 × 8 sequences of 512 tokens
//
// sequence/ROWSxFEATURESxCLASSES/threads:N: scores of 16 sequences, and the gradients of hidden
// states and weights from the slopes of these scores. In turns with the linear head's value and
// gradients; the counters are
//
//   x_tight         time ÷ that of the linear head that holds a piece of scores per thread
//   x_roomy         time ÷ that of the linear head that computes no score twice (64 MiB)
//   x_divergence    of the scores with both divergences from a reference of the same shape, time ÷
//                   that of the scores alone
//   scratch_bytes   of the workspace
//   extra_bytes     growth of the peak of the resident memory during the first call
//   samples, noise  how many turns; median ÷ lower quartile of ours

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include <benchmark/benchmark.h>

#include <perdita/sequence.hpp>

#include "support/linear_problem.hpp"
#include "support/openmp_threads.hpp"
#include "support/resident.hpp"
#include "support/sampling.hpp"

namespace bench {
namespace {

constexpr index sequences = 16;

/// One piece of scores for each thread.
perdita::linear_options tight(head_shape size, std::size_t threads) {
  using pieces = perdita::core::linear_shape<float>;
  const index rows = std::min(pieces::columns, size.rows);
  const auto piece = static_cast<std::size_t>(pieces{size.classes}.slot(rows)) * sizeof(float);
  return {.budget = threads * piece};
}

void report(benchmark::State& state, head_shape size, std::size_t n) {
  const linear_problem p(size, scores::random);
  const perdita::executor run_on = use_openmp_threads(n);
  perdita::workspace memory;
  const auto layout = perdita::sequence_layout::padded(sequences, size.rows / sequences);
  const perdita::sequence_head<float> head({.shift = false});
  const auto rows = static_cast<std::size_t>(size.rows);
  std::vector<double> s(sequences), d(sequences, -1 / static_cast<double>(size.rows));
  perdita::sequence_call<float> call;
  call.run_on = run_on;
  call.memory = &memory;
  const auto ours = [&] {
    const auto pass = head.scores(p.hidden.read(), p.weights.read(), p.labels, layout, s, call);
    pass.backward(d, p.d_hidden.view(), p.d_weights.view());
  };
  const double extra = growth_of_peak(ours);

  std::vector<float> log_sum_exp(rows), reverse(rows), forward(rows);
  call.log_sum_exp = log_sum_exp;
  head.scores(p.hidden.read(), p.weights.read(), p.labels, layout, s, call);
  call.log_sum_exp = {};
  if (!p.right(log_sum_exp) || !p.gradients_right(log_sum_exp)) {
    state.SkipWithError("a gradient is not that of the reference");
    return;
  }
  const auto linear_with = [&](const perdita::linear_options& o) {
    return [&p, run_on, o] {
      perdita::call_options<float> c;
      c.run_on = run_on;
      const perdita::linear with(perdita::cross_entropy<float>{}, o);
      benchmark::DoNotOptimize(with(p.hidden.read(), p.weights.read(), p.labels, p.d_hidden.view(),
                                    p.d_weights.view(), c));
    };
  };
  const auto scores_only = [&] {
    head.scores(p.hidden.read(), p.weights.read(), p.labels, layout, s, call);
  };
  auto with_reference = call;
  with_reference.reference = perdita::reference_model<float>(p.d_hidden.read(), p.weights.read());
  with_reference.reverse_kl = reverse;
  with_reference.forward_kl = forward;
  const auto divergences = [&] {
    head.scores(p.hidden.read(), p.weights.read(), p.labels, layout, s, with_reference);
  };
  contestant all[] = {contestant(ours), contestant(linear_with(tight(size, n))),
                      contestant(linear_with({})), contestant(scores_only),
                      contestant(divergences)};
  for (auto _ : state) {
    compete({&all[0], &all[1], &all[2], &all[3], &all[4]},
            {.least = 2, .seconds = 5 * seconds_per_benchmark()});
    state.SetIterationTime(all[0].seconds());
  }
  state.counters["x_tight"] = all[0].seconds() / all[1].seconds();
  state.counters["x_roomy"] = all[0].seconds() / all[2].seconds();
  state.counters["x_divergence"] = all[4].seconds() / all[3].seconds();
  state.counters["scratch_bytes"] = static_cast<double>(memory.size());
  state.counters["extra_bytes"] = extra;
  state.counters["samples"] = static_cast<double>(all[0].samples());
  state.counters["noise"] = all[0].noise();
}

} // namespace
} // namespace bench

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv))
    return 1;
  std::vector<bench::head_shape> shapes{{1024, 256, 32768}};
  if (std::getenv("PERDITA_BENCH_LARGE"))
    shapes.push_back({8192, 1024, 50257});
  for (std::size_t n = 1; n <= bench::most_openmp_threads(); ++n)
    for (const bench::head_shape& size : shapes)
      benchmark::RegisterBenchmark(
          ("sequence/" + size.name() + "/threads:" + std::to_string(n)).c_str(),
          [=](benchmark::State& s) { bench::report(s, size, n); })
          ->UseManualTime()
          ->Iterations(1)
          ->Unit(benchmark::kMillisecond);
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
