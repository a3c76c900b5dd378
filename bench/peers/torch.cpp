// SPDX-License-Identifier: MIT

// Cross-entropy by PyTorch's C++ library, called as its users call it: forward, backward, and a
// gradient that is allocated anew at every step:
//
//   build/bench/bench/bench_torch

#include <cstddef>
#include <memory>
#include <string>

#include <torch/torch.h>
#include <torch/version.h>

#include "../support/openmp_threads.hpp"
#include "../support/peer.hpp"

namespace {

bench::peer make(const bench::problem<float>& p, std::size_t threads) {
  at::set_num_threads(static_cast<int>(threads));
  const auto scores = p.scores();
  const auto logits = torch::from_blob(const_cast<float*>(scores.data), {scores.rows, scores.cols})
                          .set_requires_grad(true);
  const auto labels =
      torch::from_blob(const_cast<std::int64_t*>(p.labels().data()), {scores.rows}, torch::kInt64);
  const auto run = [logits, labels] {
    logits.mutable_grad() = torch::Tensor();
    const auto loss = torch::nn::functional::cross_entropy(logits, labels);
    loss.backward();
    return bench::to_double(loss.item<float>());
  };
  return {run, [&p, logits] {
            return p.view(static_cast<const float*>(logits.grad().data_ptr<float>()));
          }};
}

} // namespace

int main(int argc, char** argv) {
  const std::string name =
      "PyTorch_" + std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR);
  const bench::peer_program torch{name.c_str(), bench::most_openmp_threads(),
                                  bench::use_openmp_threads, make};
  return bench::run_peer(argc, argv, torch);
}
