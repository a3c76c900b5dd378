// SPDX-License-Identifier: MIT
#pragma once

#include "storage.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// A matrix of integers L in the place of one of T: `reader`, given L's bytes, their stride and a
/// number of elements, says what they mean. Kernels that use numbers where they lie must not have
/// it.
template <class T, class L>
matrix_data<T> integral_data(const matrix_view<L>& m,
                             void (*reader)(const unsigned char*, index, index, T*) = nullptr) {
  matrix_data<T> data;
  data.data = reinterpret_cast<const unsigned char*>(m.data);
  data.rows = m.rows;
  data.cols = m.cols;
  data.row_stride = m.row_stride;
  data.col_stride = m.col_stride;
  data.plane_rows = m.plane_rows;
  data.plane_stride = m.plane_stride;
  data.width = sizeof(L);
  data.reader = reader;
  return data;
}

} // namespace perdita::inline PERDITA_ABI::core
