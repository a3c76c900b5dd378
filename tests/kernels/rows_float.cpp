// SPDX-License-Identifier: MIT

#include "support/kernels.hpp"

namespace perdita::inline PERDITA_ABI::core {
PERDITA_TEST_ROW_KERNELS(template, float)
} // namespace perdita::inline PERDITA_ABI::core
