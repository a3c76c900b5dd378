// SPDX-License-Identifier: MIT
#pragma once
#include "row_kernel.hpp"
namespace perdita::inline PERDITA_ABI::core {
template <class T> bool prefers_columns(const row_job<T>&) { return false; }
template <class Formula, class T, bool Gradient>
struct column_kernel {
  column_kernel(const Formula&, const row_job<T>&, std::byte*) {}
  static std::size_t scratch_bytes(const Formula&, const row_job<T>&) { return 0; }
  void run(index, index, exact_sum&) {}
};
}
