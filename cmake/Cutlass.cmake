# MOERT_CUTLASS_INCLUDE: the headers of CUTLASS 4.2, in MOERT_CUTLASS_DIR (a checkout, or its include folder), else in the
# package nvidia-cutlass beside the Python of this build.  Nothing is downloaded.
set(MOERT_CUTLASS_DIR "" CACHE PATH "CUTLASS, where it is not the package nvidia-cutlass")

function(moert_find_cutlass)
  if(MOERT_CUTLASS_DIR)
    set(folders ${MOERT_CUTLASS_DIR}/include ${MOERT_CUTLASS_DIR})
  else()
    if(NOT Python_EXECUTABLE)
      find_package(Python QUIET COMPONENTS Interpreter)
    endif()
    execute_process(COMMAND ${Python_EXECUTABLE} -c
                    "import sysconfig; print(sysconfig.get_path('platlib'), sysconfig.get_path('purelib'), sep=';')"
                    OUTPUT_VARIABLE folders OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    list(TRANSFORM folders APPEND /cutlass_library/source/include)
  endif()
  set(MOERT_CUTLASS_INCLUDE "" PARENT_SCOPE)
  foreach(folder ${folders})
    if(EXISTS ${folder}/cute/tensor.hpp)
      set(MOERT_CUTLASS_INCLUDE ${folder} PARENT_SCOPE)
      return()
    endif()
  endforeach()
endfunction()
