# What a build needs and may not find: one line each that names the fix, instead of CMake's own pages.
# (A leading space keeps CMake from wrapping the line.)
function(moert_refuse)
  string(CONCAT text ${ARGN})
  message(FATAL_ERROR "\n moert: ${text}\n")
endfunction()

function(moert_require_compiler)
  if(NOT CMAKE_SYSTEM_NAME STREQUAL "Linux")
    moert_refuse("builds on Linux (x86-64 and aarch64), got ${CMAKE_SYSTEM_NAME}: use a Linux machine, WSL2 or a container")
  endif()
  include(CheckLanguage)
  check_language(CXX)
  if(NOT CMAKE_CXX_COMPILER)
    moert_refuse("a C++ compiler must be on the PATH or named by CXX, got '$ENV{CXX}': apt install g++")
  endif()
endfunction()

function(moert_require_cxx20)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 11
     OR CMAKE_CXX_COMPILER_ID MATCHES "Clang" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 14)
    moert_refuse("the C++ compiler must be g++ >= 11 or clang++ >= 14, got ${CMAKE_CXX_COMPILER_ID} "
                 "${CMAKE_CXX_COMPILER_VERSION}: apt install g++-12 and set CXX=g++-12")
  endif()
endfunction()

# Python_EXECUTABLE, its headers and pybind11.
macro(moert_require_python)
  find_package(Python QUIET COMPONENTS Interpreter)
  if(NOT Python_Interpreter_FOUND OR Python_VERSION VERSION_LESS 3.10)
    moert_refuse("Python must be >= 3.10, got '${Python_EXECUTABLE}' ${Python_VERSION}: apt install python3")
  endif()
  if(NOT Python_INCLUDE_DIR)
    execute_process(COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('include'))"
                    OUTPUT_VARIABLE Python_INCLUDE_DIR OUTPUT_STRIP_TRAILING_WHITESPACE)
  endif()
  if(NOT EXISTS "${Python_INCLUDE_DIR}/Python.h")
    moert_refuse("Python.h of ${Python_EXECUTABLE} must be installed, got none: apt install python3-dev")
  endif()
  find_package(Python QUIET REQUIRED COMPONENTS Interpreter Development.Module)
  find_package(pybind11 CONFIG QUIET)
  if(NOT pybind11_FOUND)
    moert_refuse("pybind11 must be installed for ${Python_EXECUTABLE}, got none: pip install 'pybind11>=3'")
  endif()
endmacro()

# TORCH_DIR: the folder of the torch that is installed; -I, so that pip's isolated build environment does not hide it.
function(moert_require_torch)
  set(find "import importlib.metadata as m, importlib.util as u; \
print(u.find_spec('torch').submodule_search_locations[0], m.version('torch'), sep=';')")
  execute_process(COMMAND ${Python_EXECUTABLE} -I -c "${find}" OUTPUT_VARIABLE torch OUTPUT_STRIP_TRAILING_WHITESPACE
                  RESULT_VARIABLE failed ERROR_QUIET)
  if(failed)
    moert_refuse("torch must be installed for ${Python_EXECUTABLE}, got none: pip install 'torch>=2.11' first "
                 "(uv also needs --no-build-isolation)")
  endif()
  list(GET torch 0 dir)
  list(GET torch 1 version)
  if(version VERSION_LESS 2.11)
    moert_refuse("torch must be >= 2.11, got ${version}: pip install -U 'torch>=2.11'")
  endif()
  set(TORCH_DIR ${dir} PARENT_SCOPE)
endfunction()

macro(moert_require_benchmark)
  find_package(benchmark CONFIG QUIET)
  if(NOT benchmark_FOUND)
    moert_refuse("Google Benchmark must be installed for MOERT_BENCH=ON, got none: apt install libbenchmark-dev")
  endif()
endmacro()
