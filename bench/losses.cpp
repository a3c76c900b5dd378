// SPDX-License-Identifier: MIT

// Every loss of a row of scores against cross-entropy at the same shape.
//
//   build/bench/bench/bench_losses                                    all, and a table of them
//   build/bench/bench/bench_losses --benchmark_filter='1024x32000'
//
// A benchmark is named losses/LOSS/ROWSxCLASSES/MODE/threads:N; MODE is "value" or "gradient"
// (value and gradient, into a buffer of its own). Its counter x_cross_entropy is time ÷ time of
// cross-entropy, which takes turns with it; `noise` is as in bench_cross_entropy. The table at the
// end has these ratios.

#include <algorithm>
#include <cmath>
#include <compare>
#include <cstddef>
#include <cstdio>
#include <map>
#include <set>
#include <string>

#include <benchmark/benchmark.h>

#include <perdita/perdita.hpp>

#include "support/memory.hpp"
#include "support/most_threads.hpp"
#include "support/pool.hpp"
#include "support/problem.hpp"
#include "support/sampling.hpp"

namespace bench {
namespace {

enum class mode { value, gradient };
constexpr const char* mode_name(mode m) { return m == mode::value ? "value" : "gradient"; }

constexpr shape compared[] = {{1024, 32000}, {8192, 1000}, {65536, 10}};

/// Of the table; in the order of compared.
struct column {
  index rows, cols;
  mode of;
  std::size_t threads;
  auto operator<=>(const column&) const = default;
};

/// Ratios by loss and column, of what was run.
std::map<std::string, std::map<column, double>>& table() {
  static std::map<std::string, std::map<column, double>> ratios;
  return ratios;
}

template <class Loss> class evaluation {
public:
  evaluation(const problem<float>& p, const Loss& loss, mode m, const pool& pool)
      : problem_(p), loss_(loss), mode_(m) {
    call_.run_on = pool;
    call_.memory = &workspace_;
  }
  void run() {
    const auto& p = problem_;
    value_ = mode_ == mode::value ? loss_(p.scores(), p.labels(), call_)
                                  : loss_(p.scores(), p.labels(), p.gradient(), call_);
  }
  /// The slopes of a loss that no shift of a row changes add up to nothing.
  bool plausible(shape size) const {
    if (!std::isfinite(value_))
      return false;
    const auto g = problem_.gradient();
    const bool adds_up = shift_invariant(loss_) && mode_ == mode::gradient;
    for (index r = 0; r < size.rows && adds_up; r += size.rows / 16) {
      double sum = 0, all = 0;
      for (index c = 0; c < size.cols; ++c) {
        sum += static_cast<double>(g(r, c));
        all += std::abs(static_cast<double>(g(r, c)));
      }
      if (!(std::abs(sum) <= 1e-4 * all))
        return false;
    }
    return true;
  }

private:
  static bool shift_invariant(const Loss& loss) {
    if constexpr (requires { loss.traits(); })
      return loss.traits().shift_invariant;
    else
      return Loss::traits.shift_invariant;
  }

  const problem<float>& problem_;
  Loss loss_;
  mode mode_;
  perdita::workspace workspace_;
  perdita::call_options<float> call_;
  float value_ = 0;
};

template <class Loss>
void against_cross_entropy(benchmark::State& state, const std::string& name, const Loss& loss,
                           shape size, mode m, std::size_t n) {
  const problem<float>& p = use_problem<float>(size);
  const pool& pool = threads(n);
  evaluation<Loss> subject(p, loss, m, pool);
  evaluation<perdita::cross_entropy<float>> plain(p, {}, m, pool);
  subject.run();
  if (!subject.plausible(size)) {
    state.SkipWithError("the value is not finite, or a gradient does not add up to nothing");
    return;
  }
  contestant one([&] { plain.run(); }, [&] { pool.wake(); });
  contestant other([&] { subject.run(); }, [&] { pool.wake(); });
  for (auto _ : state) {
    compete({&one, &other});
    state.SetIterationTime(other.seconds());
  }
  const double ratio = other.seconds() / one.seconds();
  state.counters["x_cross_entropy"] = ratio;
  state.counters["noise"] = std::max(one.noise(), other.noise());
  table()[name][{size.rows, size.cols, m, n}] = ratio;
}

template <class Loss> void add(const std::string& name, const Loss& loss, std::size_t most) {
  for (const shape size : compared)
    for (const mode m : {mode::value, mode::gradient})
      for (std::size_t n = 1; n <= most; ++n)
        benchmark::RegisterBenchmark(
            ("losses/" + name + "/" + size.name() + "/" + mode_name(m) +
             "/threads:" + std::to_string(n))
                .c_str(),
            [=](benchmark::State& s) { against_cross_entropy(s, name, loss, size, m, n); })
            ->UseManualTime()
            ->Iterations(1)
            ->Unit(benchmark::kMillisecond);
}

void register_all(std::size_t most) {
  using perdita::comp_sum;
  add("cross_entropy(smoothing)", perdita::cross_entropy<float>({.label_smoothing = 0.1F}), most);
  add("cross_entropy(focal)", perdita::cross_entropy<float>({.focal_gamma = 2}), most);
  add("cross_entropy(temperature)", perdita::cross_entropy<float>({.temperature = 0.5F}), most);
  add("cross_entropy(softcap)", perdita::cross_entropy<float>({.softcap = 30}), most);
  add("ldr_kl", perdita::ldr_kl<float>({.lambda = 0.7F, .margin = 0.3F}), most);
  add("z_loss", perdita::z_loss<float>(), most);
  add("comp_sum(tau=1.7)", comp_sum<float>({.tau = 1.7F}), most);
  add("comp_sum(tau=0.5)", comp_sum<float>({.tau = 0.5F}), most);
  add("poly1", perdita::poly1<float>(), most);
  add("poly1(focal)", perdita::poly1<float>({.gamma = 2}), most);
  add("dco(N=16)", perdita::dco<float>({.attempts = 16}), most);
  add("truncated_gce", perdita::truncated_gce<float>({.threshold = 1e-6F}), most);
  add("symmetric_cross_entropy", perdita::symmetric_cross_entropy<float>(), most);
  add("asymmetric_gce", perdita::asymmetric_gce<float>(), most);
  add("asymmetric_unhinged", perdita::asymmetric_unhinged<float>(), most);
  add("jensen_shannon", perdita::jensen_shannon<float>(), most);
  add("active_passive(AGCE)", perdita::active_passive(perdita::asymmetric_gce<float>()), most);
  add("brier", perdita::brier<float>(), most);
  add("crammer_singer", perdita::crammer_singer<float>(), most);
  add("average_margin", perdita::average_margin<float>(), most);
  add("taylor_softmax", perdita::taylor_softmax<float>(), most);
  add("spherical_softmax", perdita::spherical_softmax<float>(), most);
  add("stablemax", perdita::stablemax<float>(), most);
  add("sparsemax_loss", perdita::sparsemax_loss<float>(), most);
  add("entmax15_loss", perdita::entmax15_loss<float>(), most);
  add("entmax_loss(alpha=1.25)", perdita::entmax_loss<float>({.alpha = 1.25}), most);
  add("weston_watkins", perdita::weston_watkins<float>(), most);
  add("top_k_hinge(k=5)", perdita::top_k_hinge<float>({.k = 5}), most);
  add("ldr_k_kl(k=5)", perdita::ldr_k_kl<float>({.k = 5}), most);
  add("aldr_kl", perdita::aldr_kl<float>(), most);
  add("robust_log_loss", perdita::robust_log_loss<float>(), most);
}

void print_table() {
  std::set<column> columns;
  for (const auto& [name, ratios] : table())
    for (const auto& [at, ratio] : ratios)
      columns.insert(at);
  std::printf("\ntime / time of cross_entropy\n%-26s", "");
  for (const column& c : columns)
    std::printf(" %9s %c%zu", shape{c.rows, c.cols}.name().c_str(), mode_name(c.of)[0], c.threads);
  std::printf("\n");
  for (const auto& [name, ratios] : table()) {
    std::printf("%-26s", name.c_str());
    for (const column& c : columns)
      if (const auto found = ratios.find(c); found != ratios.end())
        std::printf(" %12.2f", found->second);
      else
        std::printf(" %12s", "");
    std::printf("\n");
  }
}

} // namespace
} // namespace bench

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv))
    return 1;
  const std::size_t most = bench::most_threads(bench::processors().size());
  bench::register_all(most);
  benchmark::RunSpecifiedBenchmarks();
  bench::print_table();
  benchmark::Shutdown();
}
