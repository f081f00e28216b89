# Compiler, linker and cache settings that hold for every target.

option(HEDDLE_WITH_TORCH "Build the targets that link LibTorch" ON)
option(HEDDLE_WITH_CUDA "Build the CUDA plug-in" OFF)
set(HEDDLE_SANITIZER "" CACHE STRING "Sanitizers for every target, e.g. address,undefined or thread")

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
# Debug information doubles compile time and the size of the cache; the release preset and
# HEDDLE_CHECK messages are what we debug with, and `-DCMAKE_CXX_FLAGS=-g` adds it when needed.
set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O2")
set(CMAKE_C_FLAGS_RELWITHDEBINFO "-O2")
# HEDDLE_CHECK and assert stay on in release (architecture S26).
set(CMAKE_CXX_FLAGS_RELEASE "-O2")
set(CMAKE_C_FLAGS_RELEASE "-O2")

# Tests are compiled once and run for seconds; what they call is compiled with -O2.
set(HEDDLE_TEST_OPTIONS -Og)

# Options structs are filled by designated initializers (architecture S10), which this warning would
# forbid; -Wrestrict is wrong for std::string concatenation in g++ 12 (GCC bug 105651).
# -pthread for all: some packages ask for it, and precompiled headers want equal flags everywhere.
add_compile_options(-pthread -Wall -Wextra -Werror -Wno-missing-field-initializers)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  add_compile_options(-Wno-restrict)
endif()
if(HEDDLE_SANITIZER)
  add_compile_options(-fsanitize=${HEDDLE_SANITIZER} -fno-sanitize-recover=all
                      -fno-omit-frame-pointer -g1)
  add_link_options(-fsanitize=${HEDDLE_SANITIZER})
endif()

find_program(HEDDLE_MOLD mold)
find_program(HEDDLE_LLD ld.lld)
if(HEDDLE_MOLD)
  add_link_options(-fuse-ld=mold)
elseif(HEDDLE_LLD)
  add_link_options(-fuse-ld=lld)
endif()

# Clones share hits: paths below the repository root are hashed relative to it. Dependencies come
# from the compiler, so a miss does not run the preprocessor on its own first. A header that changed
# while it was being compiled must not be stored under its new contents, so its time is looked at.
find_program(HEDDLE_CCACHE ccache)
if(HEDDLE_CCACHE)
  set(launcher ${CMAKE_COMMAND} -E env CCACHE_BASEDIR=${CMAKE_SOURCE_DIR} CCACHE_NOHASHDIR=1 CCACHE_DEPEND=1
      CCACHE_SLOPPINESS=pch_defines,time_macros
      ${HEDDLE_CCACHE})
  set(CMAKE_C_COMPILER_LAUNCHER ${launcher})
  set(CMAKE_CXX_COMPILER_LAUNCHER ${launcher})
endif()

# A translation unit with torch headers takes up to 1.5 GB and a link of gRPC some hundred MB.
cmake_host_system_information(RESULT cores QUERY NUMBER_OF_LOGICAL_CORES)
cmake_host_system_information(RESULT free_mib QUERY AVAILABLE_PHYSICAL_MEMORY)
math(EXPR torch_jobs "${free_mib} / 2048")
if(torch_jobs GREATER cores)
  set(torch_jobs ${cores})
endif()
if(torch_jobs LESS 1)
  set(torch_jobs 1)
endif()
set_property(GLOBAL PROPERTY JOB_POOLS torch_compile=${torch_jobs} link=${cores})
set(CMAKE_JOB_POOL_LINK link)
