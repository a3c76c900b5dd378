// SPDX-License-Identifier: MIT
//
// Compiled twice, with different -m flags and a different UNIT.
#include "../two_by_three.hpp"

float UNIT() { return by_perdita(); }
