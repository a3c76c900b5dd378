// SPDX-License-Identifier: MIT
#include "two_by_three.hpp"

int main() { return is_right("perdita", by_perdita()) ? 0 : 1; }
