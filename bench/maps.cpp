// SPDX-License-Identifier: MIT

// Maps of rows of scores onto the simplex, 64 rows of 128 256 scores, against what any of them has
// to do at least.
//
//   build/bench/bench/bench_maps
//
// A benchmark is named maps/MAP/sigma:S/threads:N; S is the standard deviation of the scores, and
// the smaller it is, the more classes have a share. Its counters: us_per_row; x_maximum, time ÷
// time of finding the rows' maxima (reading once); x_copy, time ÷ time of copying the rows past the
// caches (reading and writing once, as a map does); `noise` as in bench_cross_entropy. All take
// turns, on the same threads.

#include <algorithm>
#include <cmath>
#include <string>

#include <benchmark/benchmark.h>

#include <perdita/perdita.hpp>

#include "support/limits.hpp"
#include "support/memory.hpp"
#include "support/most_threads.hpp"
#include "support/pool.hpp"
#include "support/problem.hpp"
#include "support/sampling.hpp"

namespace bench {
namespace {

constexpr shape size{64, 128256};
using rows_in = matrix_view<const float>;
using rows_out = matrix_view<float>;

template <class Map>
void against_limits(benchmark::State& state, float sigma, const pool& run_on, const Map& map) {
  auto* x = reinterpret_cast<float*>(memory().logits());
  auto* p = reinterpret_cast<float*>(memory().gradient());
  const index n = size.rows * size.cols;
  fill(x, n, sigma);
  current_problem() = {}; // its scores are no longer there
  const rows_in in(x, size.rows, size.cols);
  const rows_out out(p, size.rows, size.cols);

  map(in, out, run_on);
  for (index r = 0; r < size.rows; ++r) {
    double sum = 0;
    for (index c = 0; c < size.cols; ++c)
      sum += static_cast<double>(p[r * size.cols + c]);
    if (!(std::abs(sum - 1) < 1e-5)) {
      state.SkipWithError("a row does not add up to 1");
      return;
    }
  }

  const auto wake = [&] { run_on.wake(); };
  contestant maxima(
      [&] {
        const auto row = [&](std::size_t r) {
          auto most = core::find_maximum(x + static_cast<index>(r) * size.cols, size.cols);
          benchmark::DoNotOptimize(most);
        };
        run_on(static_cast<std::size_t>(size.rows), row);
      },
      wake);
  contestant copying(
      [&] {
        on_parts(run_on, static_cast<std::size_t>(n), [&](std::size_t first, std::size_t count) {
          copy<stores::streaming>(x + first, p + first, count);
        });
      },
      wake);
  contestant mapping([&] { map(in, out, run_on); }, wake);
  for (auto _ : state) {
    compete({&maxima, &copying, &mapping});
    state.SetIterationTime(mapping.seconds());
  }
  state.counters["us_per_row"] = mapping.seconds() * 1e6 / static_cast<double>(size.rows);
  state.counters["x_maximum"] = mapping.seconds() / maxima.seconds();
  state.counters["x_copy"] = mapping.seconds() / copying.seconds();
  state.counters["noise"] = std::max({maxima.noise(), copying.noise(), mapping.noise()});
}

template <class Map> void add(const std::string& name, const Map& map) {
  const std::size_t most = most_threads(processors().size());
  for (const int sigma : {1, 3})
    for (std::size_t n = 1; n <= most; ++n)
      benchmark::RegisterBenchmark(
          ("maps/" + name + "/sigma:" + std::to_string(sigma) + "/threads:" + std::to_string(n))
              .c_str(),
          [=](benchmark::State& s) {
            against_limits(s, static_cast<float>(sigma), threads(n), map);
          })
          ->UseManualTime()
          ->Iterations(1)
          ->Unit(benchmark::kMillisecond);
}

void register_all() {
  static perdita::workspace memory;
  add("softmax",
      [](rows_in x, rows_out p, const pool& run_on) { perdita::softmax(x, p, run_on, &memory); });
  add("sparsemax", [](rows_in x, rows_out p, const pool& run_on) {
    perdita::sparsemax(x, p, {.run_on = run_on, .memory = &memory});
  });
  add("entmax15", [](rows_in x, rows_out p, const pool& run_on) {
    perdita::entmax15(x, p, {.run_on = run_on, .memory = &memory});
  });
  for (const double alpha : {1.25, 1.75})
    add("entmax(alpha=" + std::to_string(alpha).substr(0, 4) + ")",
        [=](rows_in x, rows_out p, const pool& run_on) {
          perdita::entmax(x, p, {.alpha = alpha, .run_on = run_on, .memory = &memory});
        });
}

} // namespace
} // namespace bench

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv))
    return 1;
  bench::register_all();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
