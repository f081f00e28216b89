# heddle_nccl: NCCL and the CUDA runtime of the wheels that `./dev setup --cuda` unpacks. The host
# code of the plug-in needs no CUDA toolkit; kernels (.cu) need nvcc.

set(nvidia ${HEDDLE_TORCH_DIR}/nvidia)
foreach(file nccl/include/nccl.h nccl/lib/libnccl.so.2 cu13/include/cuda_runtime_api.h
        cu13/lib/libcudart.so.13)
  if(NOT EXISTS ${nvidia}/${file})
    message(FATAL_ERROR "HEDDLE_WITH_CUDA: ${nvidia}/${file} is missing: run ./dev setup --cuda")
  endif()
endforeach()
add_library(heddle_nccl INTERFACE)
target_include_directories(heddle_nccl SYSTEM INTERFACE ${nvidia}/nccl/include ${nvidia}/cu13/include)
target_link_libraries(heddle_nccl INTERFACE ${nvidia}/nccl/lib/libnccl.so.2
                                            ${nvidia}/cu13/lib/libcudart.so.13)
target_link_options(heddle_nccl INTERFACE
  -Wl,-rpath,/opt/heddle/torch/nvidia/nccl/lib:/opt/heddle/torch/nvidia/cu13/lib
  -Wl,-rpath,${nvidia}/nccl/lib:${nvidia}/cu13/lib)
