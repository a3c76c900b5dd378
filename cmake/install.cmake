# SPDX-License-Identifier: MIT
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

# share, not lib: there is nothing for one architecture in the package.
set(package_dir ${CMAKE_INSTALL_DATADIR}/cmake/perdita)
set(pkgconfig_dir ${CMAKE_INSTALL_DATADIR}/pkgconfig)

install(TARGETS perdita EXPORT perdita-targets FILE_SET HEADERS)
install(EXPORT perdita-targets NAMESPACE perdita:: DESTINATION ${package_dir})

configure_package_config_file(cmake/perdita-config.cmake.in
                              ${PROJECT_BINARY_DIR}/perdita-config.cmake
                              INSTALL_DESTINATION ${package_dir})
# Before 1.0 a new minor version may change the interface.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/perdita-config-version.cmake
                                 COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES ${PROJECT_BINARY_DIR}/perdita-config.cmake
              ${PROJECT_BINARY_DIR}/perdita-config-version.cmake
              ${PROJECT_SOURCE_DIR}/cmake/perdita-dependencies.cmake
        DESTINATION ${package_dir})

# From where the file lies, so that the prefix can move.
file(RELATIVE_PATH perdita_pc_to_prefix /prefix/${pkgconfig_dir} /prefix)
string(REGEX REPLACE "/$" "" perdita_pc_to_prefix ${perdita_pc_to_prefix})
set(perdita_pc_definitions)
if(PERDITA_NO_SIMD)
  set(perdita_pc_definitions " -DPERDITA_NO_SIMD=1")
endif()
configure_file(cmake/perdita.pc.in ${PROJECT_BINARY_DIR}/perdita.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/perdita.pc DESTINATION ${pkgconfig_dir})

install(FILES ${PROJECT_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})
