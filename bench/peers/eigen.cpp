// SPDX-License-Identifier: MIT

// Cross-entropy as one writes it with Eigen, row by row:
//
//   build/bench/bench/bench_eigen

#include <cmath>
#include <cstddef>
#include <vector>

// GCC 12 reports its own AVX-512 headers (bug 105593) in every function they are inlined into.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <Eigen/Core>

#include "../support/peer.hpp"
#include "../support/pool.hpp"

namespace {

using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

double rows(Eigen::Map<const matrix> scores, const std::vector<std::int64_t>& labels,
            Eigen::Map<matrix> gradient, Eigen::Index begin, Eigen::Index end) {
  const float share = 1 / static_cast<float>(scores.rows());
  double loss = 0;
  for (Eigen::Index r = begin; r < end; ++r) {
    const Eigen::Index y = labels[static_cast<std::size_t>(r)];
    const auto row = scores.row(r).array();
    const float maximum = row.maxCoeff();
    auto out = gradient.row(r).array();
    out = (row - maximum).exp();
    const float sum = out.sum();
    out *= share / sum;
    out(y) -= share;
    loss += static_cast<double>(std::log(sum) + maximum - row(y));
  }
  return loss;
}

bench::peer make(const bench::problem<float>& p, std::size_t threads) {
  const auto scores = p.scores();
  const auto gradient = p.gradient();
  const auto run = [&p, scores, gradient, threads] {
    std::vector<double> part(threads);
    const auto task = [&](std::size_t i) {
      const auto cut = [&](std::size_t k) {
        return scores.rows * static_cast<Eigen::Index>(k) / static_cast<Eigen::Index>(threads);
      };
      part[i] = rows({scores.data, scores.rows, scores.cols}, p.labels(),
                     {gradient.data, scores.rows, scores.cols}, cut(i), cut(i + 1));
    };
    bench::threads(threads)(threads, task);
    double sum = 0;
    for (const double x : part)
      sum += x;
    return sum / static_cast<double>(scores.rows);
  };
  return {run, [gradient] { return gradient; }};
}

} // namespace

int main(int argc, char** argv) {
  const bench::peer_program eigen{
      "Eigen", bench::processors().size() > 1 ? std::size_t{2} : std::size_t{1},
      [](std::size_t n) { return perdita::executor(bench::threads(n)); }, make};
  return bench::run_peer(argc, argv, eigen);
}
