// SPDX-License-Identifier: MIT
#include "by_perdita.hpp"

int main() { return is_right("perdita", by_perdita()) ? 0 : 1; }
