# MOERT_CUTLASS_INCLUDE: the headers of CUTLASS 4.2, in MOERT_CUTLASS_DIR (a checkout, or its include folder), else in the
# package nvidia-cutlass of this build's Python.  Nothing is downloaded.
set(MOERT_CUTLASS_DIR "" CACHE PATH "CUTLASS, where it is not the package nvidia-cutlass")

function(moert_find_cutlass)
  if(MOERT_CUTLASS_DIR)
    set(folders ${MOERT_CUTLASS_DIR}/include ${MOERT_CUTLASS_DIR})
  else()
    if(NOT Python_EXECUTABLE)
      find_package(Python QUIET COMPONENTS Interpreter)
    endif()
    # Not by sysconfig: pip puts what a build requires on the path of that build alone.
    execute_process(COMMAND ${Python_EXECUTABLE} -c
                    "from importlib.util import find_spec; print(*find_spec('cutlass_library').submodule_search_locations)"
                    OUTPUT_VARIABLE folders OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    list(TRANSFORM folders APPEND /source/include)
  endif()
  set(MOERT_CUTLASS_INCLUDE "" PARENT_SCOPE)
  foreach(folder ${folders})
    if(EXISTS ${folder}/cute/tensor.hpp)
      set(MOERT_CUTLASS_INCLUDE ${folder} PARENT_SCOPE)
      return()
    endif()
  endforeach()
endfunction()
