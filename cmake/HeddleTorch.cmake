# heddle_torch: LibTorch of the PyPI wheel, unpacked by `./dev setup`.
#
# Headers: a folder of symlinks to only ATen, c10, caffe2 and torch. The wheel's own include folder
# also holds protobuf 3.13 and fmt 12, which would shadow Debian's and break every .pb.cc.

set(HEDDLE_TORCH_VERSION 2.11.0)
if(DEFINED ENV{HEDDLE_DEPS})
  set(deps_default $ENV{HEDDLE_DEPS})
else()
  set(deps_default $ENV{HOME}/.cache/heddle)
endif()
set(HEDDLE_DEPS ${deps_default} CACHE PATH "Folder with the dependencies that ./dev setup unpacks")
set(HEDDLE_TORCH_DIR ${HEDDLE_DEPS}/libtorch-${HEDDLE_TORCH_VERSION})
if(NOT EXISTS ${HEDDLE_TORCH_DIR}/stamp)
  message(FATAL_ERROR "LibTorch ${HEDDLE_TORCH_VERSION} is not in ${HEDDLE_TORCH_DIR}: "
                      "run ./dev setup")
endif()

add_library(heddle_torch INTERFACE)
target_include_directories(heddle_torch SYSTEM INTERFACE
  ${HEDDLE_TORCH_DIR}/links ${HEDDLE_TORCH_DIR}/links/torch/csrc/api/include)
target_compile_definitions(heddle_torch INTERFACE _GLIBCXX_USE_CXX11_ABI=1)
# at::parallel_for is a template: in a file that is compiled without OpenMP it is a plain loop, and
# says nothing. The threads are those of LibTorch's own copy of the runtime, linked below: a process
# with two copies would have two pools of threads.
target_compile_options(heddle_torch INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-fopenmp>)
# --no-as-needed: LibTorch's back ends register themselves when their library is loaded.
target_link_libraries(heddle_torch INTERFACE
  -Wl,--push-state,--no-as-needed
  ${HEDDLE_TORCH_DIR}/torch/lib/libtorch_cpu.so ${HEDDLE_TORCH_DIR}/torch/lib/libc10.so
  ${HEDDLE_TORCH_DIR}/torch/lib/libgomp.so.1
  -Wl,--pop-state Threads::Threads)
# In the container images and packages LibTorch lies in /opt/heddle/torch.
target_link_options(heddle_torch INTERFACE -Wl,-rpath,/opt/heddle/torch/torch/lib
  -Wl,-rpath,${HEDDLE_TORCH_DIR}/torch/lib -Wl,-rpath-link,${HEDDLE_TORCH_DIR}/torch/lib)

# The c10d Gloo header includes gloo's own headers, which the wheel does not carry. They come from
# libgloo-dev; the library itself must never be linked (its symbols clash with LibTorch's copy).
find_path(HEDDLE_GLOO_INCLUDE gloo/types.h REQUIRED)
