// SPDX-License-Identifier: MIT
#pragma once

#define PERDITA_VERSION_MAJOR 0
#define PERDITA_VERSION_MINOR 1
#define PERDITA_VERSION_PATCH 0
