# heddle_library, heddle_binary, heddle_test, heddle_link_check, and the check that every source
# file in the tree belongs to a target (architecture L1, L2).

# Notes the sources of a target, so that heddle_check_sources() finds files nobody lists.
function(heddle_record_sources target)
  foreach(source IN LISTS ARGN)
    cmake_path(ABSOLUTE_PATH source BASE_DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR} NORMALIZE)
    set_property(GLOBAL APPEND PROPERTY HEDDLE_SOURCES ${source})
  endforeach()
endfunction()

# True in RESULT if one of the dependencies is heddle_torch or, directly or not, uses it.
function(heddle_uses_torch result)
  get_property(torch_users GLOBAL PROPERTY HEDDLE_TORCH_USERS)
  set(${result} FALSE PARENT_SCOPE)
  foreach(dep IN LISTS ARGN)
    if(dep STREQUAL "heddle_torch" OR dep IN_LIST torch_users)
      set(${result} TRUE PARENT_SCOPE)
    endif()
  endforeach()
endfunction()

# heddle_common(TARGET [TEST] dependencies...)
function(heddle_common target)
  cmake_parse_arguments(arg "TEST" "" "" ${ARGN})
  target_include_directories(${target} PRIVATE ${CMAKE_SOURCE_DIR})
  heddle_uses_torch(torch ${arg_UNPARSED_ARGUMENTS})
  if(torch)
    set_target_properties(${target} PROPERTIES JOB_POOL_COMPILE torch_compile)
  endif()
  heddle_use_precompiled(${target} ${ARGN})
endfunction()

# heddle_library(NAME SOURCES a.cc ... [DEPS ...] [NO_LINK_CHECK])
# NAME = folder path with `_`. Without SOURCES it is header-only. Dependencies are private: a user
# that includes their headers declares them itself. What a target may *include* is proven by
# tests/layering, what it may *call* by heddle_link_check, which this adds.
function(heddle_library name)
  cmake_parse_arguments(arg "NO_LINK_CHECK" "" "SOURCES;DEPS" ${ARGN})
  if(arg_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "heddle_library(${name}): unknown ${arg_UNPARSED_ARGUMENTS}")
  endif()
  heddle_record_sources(${name} ${arg_SOURCES})
  heddle_uses_torch(torch ${arg_DEPS})
  if(torch)
    set_property(GLOBAL APPEND PROPERTY HEDDLE_TORCH_USERS ${name})
    if(NOT HEDDLE_WITH_TORCH)
      return()
    endif()
  endif()
  if(NOT arg_SOURCES)
    add_library(${name} INTERFACE)
    target_link_libraries(${name} INTERFACE ${arg_DEPS})
    return()
  endif()
  add_library(${name} STATIC ${arg_SOURCES})
  target_link_libraries(${name} PRIVATE ${arg_DEPS})
  heddle_common(${name} ${arg_DEPS})
  set_property(GLOBAL APPEND PROPERTY HEDDLE_LIBRARIES ${name})
  if(NOT arg_NO_LINK_CHECK)
    heddle_link_check(${name})
  endif()
endfunction()

# heddle_binary(NAME SOURCES main.cc ... [DEPS ...]): an executable in build/bin/.
function(heddle_binary name)
  cmake_parse_arguments(arg "" "" "SOURCES;DEPS" ${ARGN})
  heddle_record_sources(${name} ${arg_SOURCES})
  heddle_uses_torch(torch ${arg_DEPS})
  if(torch AND NOT HEDDLE_WITH_TORCH)
    return()
  endif()
  add_executable(${name} ${arg_SOURCES})
  target_link_libraries(${name} PRIVATE ${arg_DEPS})
  heddle_common(${name} ${arg_DEPS})
endfunction()

# heddle_plugin(NAME SOURCES x.cc ... [DEPS ...]): libNAME.so in build/bin/, opened by dlopen where
# what it links is installed.
function(heddle_plugin name)
  cmake_parse_arguments(arg "" "" "SOURCES;DEPS" ${ARGN})
  heddle_record_sources(${name} ${arg_SOURCES})
  add_library(${name} MODULE ${arg_SOURCES})
  target_link_libraries(${name} PRIVATE ${arg_DEPS})
  heddle_common(${name} ${arg_DEPS})
  set_target_properties(${name} PROPERTIES
    CXX_VISIBILITY_PRESET hidden
    LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
endfunction()

# heddle_test(NAME x_test SOURCES a_test.cc ... [DEPS ...] [LABELS ...] [TIMEOUT s] [ARGS ...]
#             [ENVIRONMENT A=1 ...] [NEEDS binaries...] [COST s])
# One gtest executable in build/tests/ and one CTest entry of the same name. Skipped cases appear with
# their reasons in the summary of `./dev test`. NEEDS names binaries of build/bin that the test
# starts: they are built with it, HEDDLE_BIN tells it where they are, and without them it is left out.
# COST, about the seconds it takes, makes a long one start early, so that none is left alone at the end.
function(heddle_test)
  cmake_parse_arguments(arg "" "NAME;TIMEOUT;COST" "SOURCES;DEPS;LABELS;ARGS;ENVIRONMENT;NEEDS"
                        ${ARGN})
  if(NOT arg_NAME OR arg_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "heddle_test(${arg_NAME}): unknown '${arg_UNPARSED_ARGUMENTS}'")
  endif()
  heddle_record_sources(${arg_NAME} ${arg_SOURCES})
  heddle_uses_torch(torch ${arg_DEPS})
  if(torch AND NOT HEDDLE_WITH_TORCH)
    return()
  endif()
  foreach(binary IN LISTS arg_NEEDS)
    if(NOT TARGET ${binary})
      message(STATUS "test ${arg_NAME} left out: ${binary} is not built here")
      return()
    endif()
  endforeach()
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 300)
  endif()
  add_executable(${arg_NAME} ${arg_SOURCES})
  target_link_libraries(${arg_NAME} PRIVATE ${arg_DEPS} GTest::gtest_main)
  target_compile_options(${arg_NAME} PRIVATE ${HEDDLE_TEST_OPTIONS})
  heddle_common(${arg_NAME} TEST ${arg_DEPS})
  set_target_properties(${arg_NAME} PROPERTIES
    RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  if(arg_NEEDS)
    add_dependencies(${arg_NAME} ${arg_NEEDS})
  endif()
  add_test(NAME ${arg_NAME} COMMAND ${arg_NAME} ${arg_ARGS}
           WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(${arg_NAME} PROPERTIES
    TIMEOUT ${arg_TIMEOUT}
    LABELS "${arg_LABELS}"
    ENVIRONMENT "HEDDLE_BIN=${CMAKE_BINARY_DIR}/bin;HEDDLE_SOURCE_DIR=${CMAKE_SOURCE_DIR};${arg_ENVIRONMENT}")
  if(arg_COST)
    set_tests_properties(${arg_NAME} PROPERTIES COST ${arg_COST})
  endif()
endfunction()

# heddle_script_test(NAME x_test SCRIPT x_test.py [ARGS ...] [NEEDS binaries...] [LABELS ...]
#                    [TIMEOUT s] [COST s] [RUN_SERIAL] [LOCK name])
# A Python or Bash script of the current folder as one CTest entry. Exit status 77 means skipped; the
# script then prints a line `SKIPPED: reason`. HEDDLE_BIN is the folder of the binaries. Of the tests
# with the same LOCK one runs at a time.
function(heddle_script_test)
  cmake_parse_arguments(arg "RUN_SERIAL" "NAME;SCRIPT;TIMEOUT;COST;LOCK" "ARGS;NEEDS;LABELS" ${ARGN})
  if(NOT arg_NAME OR NOT arg_SCRIPT OR arg_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "heddle_script_test(${arg_NAME}): unknown '${arg_UNPARSED_ARGUMENTS}'")
  endif()
  foreach(binary IN LISTS arg_NEEDS)
    if(NOT TARGET ${binary})
      message(STATUS "test ${arg_NAME} left out: ${binary} is not built here")
      return()
    endif()
  endforeach()
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 300)
  endif()
  set(interpreter bash)
  if(arg_SCRIPT MATCHES "\\.py$")
    set(interpreter python3)
  endif()
  add_test(NAME ${arg_NAME}
           COMMAND ${interpreter} ${CMAKE_CURRENT_SOURCE_DIR}/${arg_SCRIPT} ${arg_ARGS}
           WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(${arg_NAME} PROPERTIES
    TIMEOUT ${arg_TIMEOUT}
    LABELS "${arg_LABELS}"
    RUN_SERIAL ${arg_RUN_SERIAL}
    SKIP_RETURN_CODE 77
    ENVIRONMENT "HEDDLE_BIN=${CMAKE_BINARY_DIR}/bin;PYTHONDONTWRITEBYTECODE=1")
  if(arg_COST)
    set_tests_properties(${arg_NAME} PROPERTIES COST ${arg_COST})
  endif()
  if(arg_LOCK)
    set_tests_properties(${arg_NAME} PROPERTIES RESOURCE_LOCK ${arg_LOCK})
  endif()
endfunction()

# heddle_link_check(LIBRARY): links an empty main with the whole of LIBRARY and only its declared
# dependencies. A call into a layer it does not declare is an undefined reference.
function(heddle_link_check library)
  if(NOT TARGET link_check_main)
    file(CONFIGURE OUTPUT ${CMAKE_BINARY_DIR}/link_check_main.cc
         CONTENT "int main() { return 0; }\n")
    add_library(link_check_main OBJECT ${CMAKE_BINARY_DIR}/link_check_main.cc)
  endif()
  add_executable(link_check_${library} $<TARGET_OBJECTS:link_check_main>)
  target_link_libraries(link_check_${library} PRIVATE $<LINK_LIBRARY:WHOLE_ARCHIVE,${library}>)
  set_target_properties(link_check_${library} PROPERTIES
    LINKER_LANGUAGE CXX
    RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/link_checks)
endfunction()

# Fails the configuration for a .cc or .cu file that no target lists.
function(heddle_check_sources)
  file(GLOB_RECURSE present LIST_DIRECTORIES false CONFIGURE_DEPENDS
    ${CMAKE_SOURCE_DIR}/base/*.cc ${CMAKE_SOURCE_DIR}/data/*.cc ${CMAKE_SOURCE_DIR}/kernels/*.cc
    ${CMAKE_SOURCE_DIR}/kernels/*.cu ${CMAKE_SOURCE_DIR}/checkpoint/*.cc
    ${CMAKE_SOURCE_DIR}/model/*.cc ${CMAKE_SOURCE_DIR}/model/*.cu
    ${CMAKE_SOURCE_DIR}/coordinator/*.cc ${CMAKE_SOURCE_DIR}/worker/*.cc
    ${CMAKE_SOURCE_DIR}/worker/*.cu ${CMAKE_SOURCE_DIR}/cli/*.cc ${CMAKE_SOURCE_DIR}/bench/*.cc
    ${CMAKE_SOURCE_DIR}/tests/*.cc ${CMAKE_SOURCE_DIR}/tests/*.cu)
  get_property(listed GLOBAL PROPERTY HEDDLE_SOURCES)
  list(REMOVE_ITEM present ${listed} "")
  list(FILTER present EXCLUDE REGEX "/tests/layering/planted/")
  if(present)
    list(JOIN present "\n  " text)
    message(FATAL_ERROR "not listed in any target:\n  ${text}")
  endif()
endfunction()
