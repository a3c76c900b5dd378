// SPDX-License-Identifier: MIT

// The linear head by PyTorch's C++ library, called as its users call it: a linear layer and
// cross-entropy, forward and backward, with gradients that are allocated anew at every step:
//
//   build/bench/bench/bench_linear_torch
//
// A benchmark is named linear_peer/NAME/ROWSxFEATURESxCLASSES/threads:N; x_roomy and x_tight are
// its time divided by that of the linear head, with the default budget and with one piece of scores
// per thread.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory>
#include <string>

#include <torch/torch.h>
#include <torch/version.h>

#include <benchmark/benchmark.h>

#include <perdita/cross_entropy.hpp>
#include <perdita/linear.hpp>

#include "../support/linear_problem.hpp"
#include "../support/openmp_threads.hpp"
#include "../support/sampling.hpp"

namespace bench {
namespace {

constexpr head_shape shapes[] = {{1024, 1024, 32768}, {4096, 512, 50257}};

class torch_head {
public:
  explicit torch_head(const linear_problem& p)
      : hidden_(tensor(p.hidden).set_requires_grad(true)),
        weights_(tensor(p.weights).set_requires_grad(true)),
        labels_(torch::from_blob(const_cast<std::int32_t*>(p.labels.data()), {p.size.rows},
                                 torch::kInt32)
                    .to(torch::kInt64)) {}
  double run() const {
    hidden_.mutable_grad() = torch::Tensor();
    weights_.mutable_grad() = torch::Tensor();
    const auto scores = torch::nn::functional::linear(hidden_, weights_);
    const auto loss = torch::nn::functional::cross_entropy(scores, labels_);
    loss.backward();
    return static_cast<double>(loss.item<float>());
  }
  /// ‖difference of the gradients‖ ÷ ‖gradient‖, of hidden states and weights, the larger.
  double distance(const linear_problem& p) const {
    const auto of = [](const torch::Tensor& theirs, const matrix& ours) {
      return ((theirs - tensor(ours)).norm() / theirs.norm()).item<double>();
    };
    return std::max(of(hidden_.grad(), p.d_hidden), of(weights_.grad(), p.d_weights));
  }

private:
  static torch::Tensor tensor(const matrix& m) {
    return torch::from_blob(m.data(), {m.rows(), m.cols()});
  }
  torch::Tensor hidden_, weights_, labels_;
};

void against_torch(benchmark::State& state, head_shape size, std::size_t n) {
  const linear_problem p(size, scores::random);
  at::set_num_threads(static_cast<int>(n));
  perdita::call_options<float> call;
  perdita::workspace memory;
  call.run_on = use_openmp_threads(n);
  call.memory = &memory;
  using pieces = perdita::core::linear_shape<float>;
  const auto piece = static_cast<std::size_t>(pieces{size.classes}.slot(256)) * sizeof(float);
  const perdita::linear roomy(perdita::cross_entropy<float>{});
  const perdita::linear tight(perdita::cross_entropy<float>{}, {.budget = n * piece});
  const auto ours = [&](const auto& head) {
    return static_cast<double>(head(p.hidden.read(), p.weights.read(), p.labels, p.d_hidden.view(),
                                    p.d_weights.view(), call));
  };
  const torch_head torch(p);
  const double value = torch.run();
  for (const auto* head : {&roomy, &tight})
    if (!(std::abs(ours(*head) - value) <= 1e-5 * value) || !(torch.distance(p) < 1e-4)) {
      state.SkipWithError("the results are not the same");
      return;
    }
  contestant a([&] { ours(roomy); }), b([&] { ours(tight); }),
      theirs([&] { benchmark::DoNotOptimize(torch.run()); });
  for (auto _ : state) {
    compete({&a, &b, &theirs}, {.least = 2, .seconds = 10 * seconds_per_benchmark(), .warm = true});
    state.SetIterationTime(theirs.seconds());
  }
  state.counters["x_roomy"] = theirs.seconds() / a.seconds();
  state.counters["x_tight"] = theirs.seconds() / b.seconds();
  state.counters["roomy_ms"] = a.seconds() * 1e3;
  state.counters["samples"] = static_cast<double>(a.samples());
  state.counters["noise"] = std::max({a.noise(), b.noise(), theirs.noise()});
}

} // namespace
} // namespace bench

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv))
    return 1;
  const std::string name =
      "PyTorch_" + std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR);
  for (const bench::head_shape size : bench::shapes)
    for (std::size_t n = 1; n <= bench::most_openmp_threads(); ++n)
      benchmark::RegisterBenchmark(
          ("linear_peer/" + name + "/" + size.name() + "/threads:" + std::to_string(n)).c_str(),
          [=](benchmark::State& state) { bench::against_torch(state, size, n); })
          ->UseManualTime()
          ->Iterations(1)
          ->Unit(benchmark::kMillisecond);
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
