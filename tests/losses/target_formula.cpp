// SPDX-License-Identifier: MIT

// What support/target_descriptor.hpp declares. Also linked into the [threads] tests.

#include <perdita/core/target_loss.hpp>

namespace perdita::inline PERDITA_ABI::core {

template double run_rows<false>(const target_formula<float>&, row_job<float>&, const executor&,
                                workspace*);
template double run_rows<true>(const target_formula<float>&, row_job<float>&, const executor&,
                               workspace*);
template double run_rows<false>(const target_formula<double>&, row_job<double>&, const executor&,
                                workspace*);
template double run_rows<true>(const target_formula<double>&, row_job<double>&, const executor&,
                               workspace*);

} // namespace perdita::inline PERDITA_ABI::core
