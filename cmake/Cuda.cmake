# MOERT_CUDA=AUTO, ON or OFF: whether the CUDA half is built.  AUTO is ON where there is a compiler for it and the torch
# that is installed sees a GPU, or, in a build without torch, a compiler alone.  Sets MOERT_BUILD_CUDA.
set(MOERT_NVCC_MINIMUM 12.8)
include(cmake/Cutlass.cmake)

# MOERT_NVCC: what CUDACXX names, on the PATH, in CUDA_HOME, or from the packages of PyPI beside the Python of this build.
function(moert_find_nvcc)
  set(hints "")
  if(DEFINED Python_EXECUTABLE)
    execute_process(COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('platlib'))"
                    OUTPUT_VARIABLE platlib OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    set(hints "${platlib}/nvidia/cu13/bin")
  endif()
  find_program(MOERT_NVCC NAMES $ENV{CUDACXX} nvcc HINTS $ENV{CUDA_HOME}/bin PATHS ${hints} /usr/local/cuda/bin)
endfunction()

# Whether the installed torch sees a GPU; -I as in moert_require_torch.
function(moert_torch_sees_gpu out)
  execute_process(COMMAND ${Python_EXECUTABLE} -I -c "import torch; print(int(torch.cuda.is_available()))"
                  OUTPUT_VARIABLE sees OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  set(${out} "${sees}" PARENT_SCOPE)
endfunction()

macro(moert_choose_cuda)
  set(MOERT_BUILD_CUDA OFF)
  if(NOT MOERT_CUDA MATCHES "^(AUTO|ON|OFF)$")
    moert_refuse("MOERT_CUDA must be AUTO, ON or OFF, got ${MOERT_CUDA}")
  endif()
  if(NOT MOERT_CUDA STREQUAL "OFF")
    moert_find_nvcc()
    if(MOERT_NVCC)
      set(MOERT_BUILD_CUDA ON)
      if(MOERT_CUDA STREQUAL "AUTO" AND MOERT_TORCH)
        moert_torch_sees_gpu(MOERT_BUILD_CUDA)
      endif()
    elseif(MOERT_CUDA STREQUAL "ON")
      moert_refuse("nvcc must be on the PATH, in CUDACXX, in CUDA_HOME or installed by pip for MOERT_CUDA=ON, got none: "
                   "make cuda-toolchain, or pip install 'cuda-toolkit[nvcc,cccl]==13.0.*'")
    endif()
  endif()
  if(MOERT_BUILD_CUDA)
    moert_find_cutlass()
    if(NOT MOERT_CUTLASS_INCLUDE AND MOERT_CUDA STREQUAL "ON")
      moert_refuse("CUTLASS must be in MOERT_CUTLASS_DIR or installed by pip for MOERT_CUDA=ON, got none: "
                   "pip install --no-deps nvidia-cutlass==4.2.0.0")
    elseif(NOT MOERT_CUTLASS_INCLUDE)
      message(STATUS "moert: without CUDA, for want of CUTLASS: pip install --no-deps nvidia-cutlass==4.2.0.0")
      set(MOERT_BUILD_CUDA OFF)
    endif()
  endif()
endmacro()

# The language CUDA, for sm_80 (which 8.6 and 8.9 run too), sm_90a, and PTX from which newer GPUs make their own code.
macro(moert_enable_cuda)
  set(CMAKE_CUDA_COMPILER ${MOERT_NVCC})
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80 90a-real)
  endif()
  set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
  # nvcc looks for its libraries in lib64; PyPI's packages have lib.
  get_filename_component(nvcc "${MOERT_NVCC}" REALPATH)
  get_filename_component(toolkit "${nvcc}/../../lib" ABSOLUTE)
  if(NOT DEFINED CMAKE_CUDA_FLAGS AND EXISTS "${toolkit}/libcudart_static.a")
    set(CMAKE_CUDA_FLAGS "-L${toolkit}" CACHE STRING "Options of nvcc")
  endif()
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS ${MOERT_NVCC_MINIMUM})
    moert_refuse("nvcc must be >= ${MOERT_NVCC_MINIMUM}, got ${CMAKE_CUDA_COMPILER_VERSION} (${MOERT_NVCC})")
  endif()
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
endmacro()
