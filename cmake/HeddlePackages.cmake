# Third-party packages. The order matters: Protobuf in module mode (its CONFIG file fails on
# Debian 12), gRPC, absl, RocksDB, spdlog, then LibTorch, which must shadow none of them.

find_package(Threads REQUIRED)
find_package(Protobuf MODULE REQUIRED)
find_package(gRPC CONFIG REQUIRED)
find_package(absl CONFIG REQUIRED)
find_package(RocksDB CONFIG REQUIRED)
find_package(spdlog CONFIG REQUIRED)
find_package(GTest CONFIG REQUIRED)
find_package(rapidcheck CONFIG REQUIRED)
find_package(OpenSSL REQUIRED)
find_package(yaml-cpp CONFIG REQUIRED)
find_package(nlohmann_json CONFIG REQUIRED)
find_package(CLI11 CONFIG REQUIRED)
find_package(PkgConfig REQUIRED)
# The prefix keeps our cache variables apart from those of RocksDB's own Findzstd.
foreach(module libpcre2-8:pcre2 libzstd:zstd libxxhash:xxhash liburing:uring ncursesw:ncurses)
  string(REPLACE ":" ";" pair ${module})
  list(GET pair 0 package)
  list(GET pair 1 name)
  pkg_check_modules(heddle_pc_${name} REQUIRED IMPORTED_TARGET ${package})
  add_library(heddle_${name} ALIAS PkgConfig::heddle_pc_${name})
endforeach()
find_package(simdjson CONFIG REQUIRED)

# OpenMPI's C interface, for a plug-in only; PMIx, for the server that starts it.
pkg_check_modules(heddle_pc_mpi REQUIRED IMPORTED_TARGET ompi-c)
add_library(heddle_mpi_api INTERFACE)
target_link_libraries(heddle_mpi_api INTERFACE PkgConfig::heddle_pc_mpi Threads::Threads)
target_compile_definitions(heddle_mpi_api INTERFACE OMPI_SKIP_MPICXX MPICH_SKIP_MPICXX)
pkg_check_modules(heddle_pc_pmix REQUIRED IMPORTED_TARGET pmix)
add_library(heddle_pmix INTERFACE)
target_link_libraries(heddle_pmix INTERFACE PkgConfig::heddle_pc_pmix Threads::Threads)

# Standalone-style use of Boost.Asio and Beast 1.81: headers only, plus threads.
add_library(heddle_asio INTERFACE)
target_link_libraries(heddle_asio INTERFACE Threads::Threads)
target_compile_definitions(heddle_asio INTERFACE BOOST_ASIO_NO_DEPRECATED
                                                 BOOST_ASIO_DISABLE_BOOST_COROUTINE)

# RocksDB's CONFIG file names a static target on some installations; the shared one is smaller.
if(TARGET RocksDB::rocksdb-shared)
  add_library(heddle_rocksdb INTERFACE)
  target_link_libraries(heddle_rocksdb INTERFACE RocksDB::rocksdb-shared)
else()
  add_library(heddle_rocksdb INTERFACE)
  target_link_libraries(heddle_rocksdb INTERFACE RocksDB::rocksdb)
endif()

if(HEDDLE_WITH_TORCH)
  include(HeddleTorch)
  if(HEDDLE_WITH_CUDA)
    include(HeddleCuda)
  endif()
endif()
