# SPDX-License-Identifier: MIT
include(CMakeFindDependencyMacro)
find_dependency(perdita OPTIONAL_COMPONENTS eigen)
include("${CMAKE_CURRENT_LIST_DIR}/middle-targets.cmake")
