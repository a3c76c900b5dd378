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
//   x_tight         time ÷ that of the linear head that holds a piece of scores per thread, which
//                   makes 4 products too: to be at most 1.1
//   x_roomy         time ÷ that of the linear head that computes no score twice (64 MiB)
//   x_divergence    of the scores with both divergences from a reference of the same shape, time ÷
//                   that of the scores alone: 2 products for 1
//   x_slopes        the same with both divergences, and their slopes and the entropy's in the
//                   gradients, time ÷ that of the first linear head: 6 products for 4, about 1.5
//   bytes_per_thread   of the workspace, ÷ threads: to be about 1 MB
//   bytes_per_token    what is kept of a row between the passes, without by-products
//   extra_bytes        growth of the peak of the resident memory during the first call: to be at
//                      most threads · bytes_per_thread + rows · bytes_per_token, and what the
//                      system needs to start threads
//   slopes_…           the same with slopes; while going back they take 48 bytes a row more
//   samples, noise  how many turns; median ÷ lower quartile of ours

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

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

/// Gives free memory back to the system, so that what is taken next makes the peak grow.
void give_back_memory() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

void report(benchmark::State& state, head_shape size, std::size_t n) {
  const linear_problem p(size, scores::random);
  const perdita::executor run_on = use_openmp_threads(n);
  const auto layout = perdita::sequence_layout::padded(sequences, size.rows / sequences);
  const perdita::sequence_head<float> head({.shift = false});
  const auto rows = static_cast<std::size_t>(size.rows);
  std::vector<double> s(sequences), d(sequences, -1 / static_cast<double>(size.rows));
  const auto scores = [&](const perdita::sequence_call<float>& call) {
    return head.scores(p.hidden.read(), p.weights.read(), p.labels, layout, s, call);
  };
  perdita::workspace memory, memory_of_slopes;
  perdita::sequence_call<float> call;
  call.run_on = run_on;
  call.memory = &memory;
  const auto ours = [&] { scores(call).backward(d, p.d_hidden.view(), p.d_weights.view()); };
  give_back_memory();
  const double extra = growth_of_peak(ours);

  matrix other(size.rows, size.features); // the reference's hidden states: not far from ours
  for (index i = 0; i < other.size(); ++i)
    other.data()[i] = 0.9F * p.hidden.data()[i];
  std::vector<float> log_sum_exp(rows), reverse(rows), forward(rows), entropy(rows);
  const std::vector<float> slopes(rows, 1 / static_cast<float>(size.rows));
  auto with_reference = call;
  with_reference.memory = &memory_of_slopes;
  with_reference.reference = perdita::reference_model<float>(other.read(), p.weights.read());
  with_reference.reverse_kl = reverse;
  with_reference.forward_kl = forward;
  with_reference.entropy = entropy;
  const perdita::sequence_gradient<float> all_slopes{
      .d_forward_kl = slopes, .d_reverse_kl = slopes, .d_entropy = slopes};
  const auto with_slopes = [&](const perdita::sequence_call<float>& c) {
    scores(c).backward(d, p.d_hidden.view(), p.d_weights.view(), all_slopes);
  };
  give_back_memory();
  const double extra_of_slopes = growth_of_peak([&] { with_slopes(with_reference); });

  // From itself a model has no distance: what remains is the linear head's gradient.
  auto with_itself = call;
  with_itself.memory = &memory_of_slopes;
  with_itself.log_sum_exp = log_sum_exp;
  with_itself.reference = perdita::reference_model<float>(p.hidden.read(), p.weights.read());
  scores(with_itself)
      .backward(d, p.d_hidden.view(), p.d_weights.view(),
                {.d_forward_kl = slopes, .d_reverse_kl = slopes});
  const bool slopes_right = p.right(log_sum_exp) && p.gradients_right(log_sum_exp);
  ours();
  if (!slopes_right || !p.gradients_right(log_sum_exp)) {
    state.SkipWithError("a gradient is not that of the reference");
    return;
  }
  perdita::workspace memory_of_tight, memory_of_roomy;
  const auto linear_with = [&](const perdita::linear_options& o, perdita::workspace& scratch) {
    return [&p, &scratch, run_on, o] {
      perdita::call_options<float> c;
      c.run_on = run_on;
      c.memory = &scratch;
      const perdita::linear with(perdita::cross_entropy<float>{}, o);
      benchmark::DoNotOptimize(with(p.hidden.read(), p.weights.read(), p.labels, p.d_hidden.view(),
                                    p.d_weights.view(), c));
    };
  };
  contestant all[] = {contestant(ours),
                      contestant(linear_with(tight(size, n), memory_of_tight)),
                      contestant(linear_with({}, memory_of_roomy)),
                      contestant([&] { scores(call); }),
                      contestant([&] { scores(with_reference); }),
                      contestant([&] { with_slopes(with_reference); })};
  for (auto _ : state) {
    compete({&all[0], &all[1], &all[2], &all[3], &all[4], &all[5]},
            {.least = 2, .seconds = 6 * seconds_per_benchmark()});
    state.SetIterationTime(all[0].seconds());
  }
  const auto of = [](std::size_t bytes) { return static_cast<double>(bytes); };
  const double token = of(sizeof(perdita::linear_record) + sizeof(std::int64_t) + sizeof(double));
  const auto threads = of(n);
  state.counters["x_tight"] = all[0].seconds() / all[1].seconds();
  state.counters["x_roomy"] = all[0].seconds() / all[2].seconds();
  state.counters["x_divergence"] = all[4].seconds() / all[3].seconds();
  state.counters["x_slopes"] = all[5].seconds() / all[1].seconds();
  state.counters["bytes_per_thread"] = of(memory.size()) / threads;
  state.counters["bytes_per_token"] = token;
  state.counters["extra_bytes"] = extra;
  state.counters["slopes_bytes_per_thread"] = of(memory_of_slopes.size()) / threads;
  state.counters["slopes_bytes_per_token"] = token + of(sizeof(perdita::core::divergence_record));
  state.counters["slopes_extra_bytes"] = extra_of_slopes;
  state.counters["samples"] = of(all[0].samples());
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
