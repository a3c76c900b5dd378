// SPDX-License-Identifier: MIT

#include "support/kernels.hpp"

namespace perdita::inline PERDITA_ABI::core {
PERDITA_TEST_SIMILARITY_KERNELS(template, float)
PERDITA_TEST_SIMILARITY_KERNELS(template, double)
} // namespace perdita::inline PERDITA_ABI::core
