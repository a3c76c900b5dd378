// SPDX-License-Identifier: MIT
//
// Compiled twice, with different -m flags and a different UNIT.
#include "../by_perdita.hpp"

float UNIT() { return by_perdita(); }
