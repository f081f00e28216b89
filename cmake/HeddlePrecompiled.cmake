# Precompiled headers: the standard library, absl, protobuf and our messages, ATen's tensor and loops,
# gtest. They halve a clean build: most of a file's time is the parsing of these. Whole torch/torch.h
# would cost more than it saves. Of our own headers only the generated messages stand here, because
# nearly everything includes one of them already; any other would rebuild everything at each change.
#
# A file still includes what it uses: -DHEDDLE_PRECOMPILE=OFF (the sanitizer presets) builds without.

option(HEDDLE_PRECOMPILE "Precompile headers" ON)

set(heddle_precompiled_plain
  <algorithm> <array> <atomic> <cmath> <cstdint> <cstring> <functional> <map> <memory> <optional>
  <span> <string> <string_view> <utility> <vector> <absl/status/status.h> <absl/status/statusor.h>)
set(heddle_precompiled_proto
  ${heddle_precompiled_plain} <heddle/v1/checkpoints.pb.h> <heddle/v1/config.pb.h>
  <heddle/v1/control.pb.h> <heddle/v1/jobs.pb.h> <heddle/v1/records.pb.h>
  <heddle/v1/worker_link.pb.h>)
set(heddle_precompiled_torch
  ${heddle_precompiled_plain} <heddle/v1/config.pb.h> <ATen/core/Tensor.h> <ATen/Parallel.h>
  <ATen/ops/empty.h>)

# An object library that holds the headers for targets with the same flags: -fPIC and -O2, or, with
# TEST, those of heddle_test.
function(heddle_precompiled name)
  cmake_parse_arguments(arg "TEST" "" "HEADERS;DEPS" ${ARGN})
  file(CONFIGURE OUTPUT ${CMAKE_BINARY_DIR}/precompiled/${name}.cc CONTENT "// headers only\n")
  add_library(${name} OBJECT EXCLUDE_FROM_ALL ${CMAKE_BINARY_DIR}/precompiled/${name}.cc)
  target_link_libraries(${name} PRIVATE ${arg_DEPS})
  if(arg_TEST)
    list(PREPEND arg_HEADERS <gtest/gtest.h>)
    set_target_properties(${name} PROPERTIES POSITION_INDEPENDENT_CODE OFF)
    target_link_libraries(${name} PRIVATE GTest::gtest)
    target_compile_options(${name} PRIVATE -fPIE ${HEDDLE_TEST_OPTIONS})
  endif()
  target_precompile_headers(${name} PRIVATE ${arg_HEADERS})
endfunction()

if(HEDDLE_PRECOMPILE)
  heddle_precompiled(precompiled HEADERS ${heddle_precompiled_plain} DEPS absl::statusor)
  set(proto DEPS absl::statusor heddle_proto HEADERS ${heddle_precompiled_proto})
  heddle_precompiled(precompiled_proto ${proto})
  heddle_precompiled(precompiled_proto_test TEST ${proto})
  if(HEDDLE_WITH_TORCH)
    set(torch DEPS absl::statusor heddle_proto heddle_torch HEADERS ${heddle_precompiled_torch})
    heddle_precompiled(precompiled_torch ${torch})
    heddle_precompiled(precompiled_torch_test TEST ${torch})
    set_target_properties(precompiled_torch precompiled_torch_test PROPERTIES
      JOB_POOL_COMPILE torch_compile)
  endif()
endif()

# heddle_use_precompiled(TARGET [TEST] dependencies...): lets TARGET use the headers that its
# dependencies name. Executables other than tests (a file or two each) do without, as do kernels,
# which include nothing heavy and have flags of their own.
function(heddle_use_precompiled target)
  cmake_parse_arguments(arg "TEST" "" "" ${ARGN})
  get_target_property(type ${target} TYPE)
  if(NOT HEDDLE_PRECOMPILE OR target MATCHES "^kernels_" OR
     (type STREQUAL "EXECUTABLE" AND NOT arg_TEST))
    return()
  endif()
  set(from precompiled)
  if("heddle_torch" IN_LIST arg_UNPARSED_ARGUMENTS)
    set(from precompiled_torch)
  elseif(arg_TEST OR "${arg_UNPARSED_ARGUMENTS}" MATCHES "heddle_proto")
    set(from precompiled_proto)
  endif()
  if(arg_TEST)
    string(APPEND from _test)
  endif()
  target_precompile_headers(${target} REUSE_FROM ${from})
endfunction()
