# SPDX-License-Identifier: MIT
#
# Finds what the headers include. Used by our own build and, installed beside perdita-config.cmake,
# on the machine of whoever calls find_package(perdita). Everything found is SYSTEM: other people's
# warnings are not for our users to read.
#
# perdita_scope is GLOBAL in our own build and empty in the package, where the targets belong to the
# directory that asked for them, like those of any package.

function(perdita_locate_xsimd)
  find_path(PERDITA_XSIMD_INCLUDE_DIR xsimd/xsimd.hpp
            HINTS ${xsimd_ROOT} ENV xsimd_ROOT
            PATH_SUFFIXES include
            DOC "Directory that holds xsimd/xsimd.hpp, 8.1 or newer")
  mark_as_advanced(PERDITA_XSIMD_INCLUDE_DIR)
endfunction()

# perdita::xsimd_headers: where xsimd is, or PERDITA_NO_SIMD=1 when it is nowhere.
#
# Not find_package(xsimd): its version file accepts one major version only, and the target of
# Debian 12 (8.1) links xtl, a library that Debian does not bring along. The headers are all we need.
function(perdita_add_xsimd_headers)
  if(TARGET perdita::xsimd_headers)
    return()
  endif()
  add_library(perdita::xsimd_headers INTERFACE IMPORTED ${perdita_scope})

  if(PERDITA_NO_SIMD)
    set(missing "PERDITA_NO_SIMD is set")
  elseif(TARGET xsimd)
    # A parent has its own: two versions in one program would be worse than an untested one.
    set(directories $<TARGET_PROPERTY:xsimd,INTERFACE_INCLUDE_DIRECTORIES>)
  else()
    perdita_locate_xsimd()
    set(directories ${PERDITA_XSIMD_INCLUDE_DIR})
    if(NOT PERDITA_XSIMD_INCLUDE_DIR)
      set(missing "xsimd not found")
    else()
      file(READ ${PERDITA_XSIMD_INCLUDE_DIR}/xsimd/config/xsimd_config.hpp config)
      string(REGEX MATCH "XSIMD_VERSION_MAJOR ([0-9]+)" _ "${config}")
      set(version ${CMAKE_MATCH_1})
      string(REGEX MATCH "XSIMD_VERSION_MINOR ([0-9]+)" _ "${config}")
      string(APPEND version .${CMAKE_MATCH_1})
      if(version VERSION_LESS 8.1)
        set(missing "xsimd ${version} in ${PERDITA_XSIMD_INCLUDE_DIR} is older than 8.1")
      endif()
    endif()
  endif()

  if(DEFINED missing)
    if(NOT perdita_FIND_QUIETLY)
      message(STATUS "perdita: ${missing}; computing without SIMD")
    endif()
    target_compile_definitions(perdita::xsimd_headers INTERFACE PERDITA_NO_SIMD=1)
  else()
    target_include_directories(perdita::xsimd_headers SYSTEM INTERFACE ${directories})
  endif()
endfunction()

# perdita::eigen or perdita::openmp, where the machine has what it takes; otherwise nothing, and the
# caller asks if(TARGET ...).
function(perdita_add_component name)
  if(TARGET perdita::${name})
    return()
  endif()
  if(name STREQUAL "eigen")
    # Without a version: 3.4 refuses the range that 5.0 accepts, and the reverse. So we compare.
    if(NOT TARGET Eigen3::Eigen)
      find_package(Eigen3 QUIET ${perdita_scope})
    endif()
    if(Eigen3_VERSION AND Eigen3_VERSION VERSION_LESS 3.4)
      message(STATUS "perdita: Eigen ${Eigen3_VERSION} is older than 3.4; no perdita::eigen")
      return()
    endif()
    set(third_party Eigen3::Eigen)
  elseif(name STREQUAL "openmp")
    if(NOT TARGET OpenMP::OpenMP_CXX)
      find_package(OpenMP QUIET ${perdita_scope} COMPONENTS CXX)
    endif()
    set(third_party OpenMP::OpenMP_CXX)
  endif()
  if(third_party AND TARGET ${third_party})
    add_library(perdita::${name} INTERFACE IMPORTED ${perdita_scope})
    target_link_libraries(perdita::${name} INTERFACE perdita::perdita ${third_party})
  endif()
endfunction()
