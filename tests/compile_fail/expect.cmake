# SPDX-License-Identifier: MIT
#
# cmake -D SOURCE=file.cpp -P expect.cmake -- COMPILER ARGUMENTS...
# The command must fail, and what it prints must hold the text of the file's first line,
# "// expect: ...": failing for another reason proves nothing.
file(READ ${SOURCE} text)
if(NOT text MATCHES "^// expect: ([^\n]+)")
  message(FATAL_ERROR "${SOURCE}: the first line is not \"// expect: ...\"")
endif()
set(expected "${CMAKE_MATCH_1}")

set(command)
math(EXPR last "${CMAKE_ARGC} - 1")
foreach(i RANGE 6 ${last})
  list(APPEND command "${CMAKE_ARGV${i}}")
endforeach()

set(ENV{LC_ALL} C)
execute_process(COMMAND ${command} RESULT_VARIABLE status OUTPUT_VARIABLE output
                ERROR_VARIABLE output)
if(status EQUAL 0)
  message(FATAL_ERROR "${SOURCE} compiles, and must not")
endif()
string(FIND "${output}" "${expected}" at)
if(at EQUAL -1)
  message(FATAL_ERROR "Expected: ${expected}\nThe compiler said:\n${output}")
endif()
