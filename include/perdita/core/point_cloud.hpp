// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <vector>

#include "sequences.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// Points in double, by themselves and a pack of them at a time: all pairs of two sets are met a
/// pack at a time, and no matrix of them is held. Infinite coordinates are NaN, so that no pair of
/// such a point passes for one that is far apart.
class point_cloud {
  using W = pack<double>;

public:
  template <class T>
  explicit point_cloud(const matrix_data<T>& m, double unit = 1)
      : n_(m.rows), dims_(m.cols), points_(static_cast<std::size_t>(n_ * dims_ + per_pack)),
        packed_(static_cast<std::size_t>(blocks() * dims_ * per_pack)) {
    std::vector<T> stage(
        static_cast<std::size_t>(whole_packs(dims_) + static_cast<index>(lanes<T>)));
    std::vector<double> row(stage.size());
    for (index i = 0; i < n_; ++i) {
      read_row(m, i, stage.data(), row.data());
      for (index d = 0; d < dims_; ++d) {
        const double x = unit * row[static_cast<std::size_t>(d)], number = x + (x - x);
        points_[static_cast<std::size_t>(i * dims_ + d)] = number;
        packed_[static_cast<std::size_t>((i / per_pack * dims_ + d) * per_pack + i % per_pack)] =
            number;
      }
    }
  }
  index size() const { return n_; }
  index dims() const { return dims_; }
  index blocks() const { return (n_ + per_pack - 1) / per_pack; }
  const double* point(index i) const { return points_.data() + i * dims_; }

  /// Squared distances of p to the points of block b; +inf where there is none, and of `skipped`.
  W squares(const double* p, index b, index skipped) const {
    W sum(0);
    const double* at = packed_.data() + b * dims_ * per_pack;
    for (index d = 0; d < dims_; ++d) {
      const W off = W(p[d]) - W::load(at + d * per_pack);
      sum = fma(off, off, sum);
    }
    const W number = iota<double>() + static_cast<double>(b * per_pack);
    const auto out =
        (number >= W(static_cast<double>(n_))) | (number == W(static_cast<double>(skipped)));
    return select(out, W(std::numeric_limits<double>::infinity()), sum);
  }
  /// Adds weight · (p − point) to each dimension's pack.
  void add_pull(const double* p, index b, const W& weight, W* pull) const {
    const double* at = packed_.data() + b * dims_ * per_pack;
    for (index d = 0; d < dims_; ++d)
      pull[d] = fma(weight, W(p[d]) - W::load(at + d * per_pack), pull[d]);
  }

private:
  index n_, dims_;
  std::vector<double> points_, packed_;
};

/// work(i, packs of zeros, one for each dimension) for all points of x, of which each meets all of
/// y.
template <class Work>
void for_points(const point_cloud& x, const point_cloud& y, const executor& run_on, Work work) {
  using W = pack<double>;
  const index cost = std::max<index>(1, y.size() * (x.dims() + y.dims() + 8));
  const index some = std::max<index>(1, 65536 / cost), tasks = (x.size() + some - 1) / some;
  const auto workers = std::min(static_cast<std::size_t>(tasks), run_on.concurrency());
  share_out(tasks, workers, run_on, [&](std::size_t) {
    return [&, pull = std::vector<W>(static_cast<std::size_t>(x.dims()), W(0))](index t) mutable {
      for (index i = t * some; i < std::min(x.size(), (t + 1) * some); ++i) {
        std::fill(pull.begin(), pull.end(), W(0));
        work(i, pull.data());
      }
    };
  });
}

} // namespace perdita::inline PERDITA_ABI::core
