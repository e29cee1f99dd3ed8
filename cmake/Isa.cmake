# moert_isa_sources(isa source...): kernels of moert_cpu that are compiled for one instruction set.  They exist on x86-64
# only; the code that chooses among them is portable and asks for __x86_64__.
set(MOERT_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(MOERT_FLAGS_avx512 ${MOERT_FLAGS_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512)
set(MOERT_FLAGS_avx512_vnni ${MOERT_FLAGS_avx512} -mavx512vnni)
set(MOERT_FLAGS_avx512_bf16 ${MOERT_FLAGS_avx512_vnni} -mavx512bf16)
set(MOERT_FLAGS_amx ${MOERT_FLAGS_avx512_bf16} -mamx-tile -mamx-bf16 -mamx-int8)

function(moert_isa_sources isa)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    target_sources(moert_cpu PRIVATE ${ARGN})
    set_property(SOURCE ${ARGN} APPEND PROPERTY COMPILE_OPTIONS ${MOERT_FLAGS_${isa}})
    set_property(GLOBAL APPEND PROPERTY MOERT_ISA_SOURCES ${ARGN})
  endif()
endfunction()

# "gemm_avx2 gemm_avx512 permute_avx2": the stems of all of them, for moert._C.
function(moert_isa_stems out)
  get_property(sources GLOBAL PROPERTY MOERT_ISA_SOURCES)
  set(stems "")
  foreach(source ${sources})
    cmake_path(GET source STEM stem)
    string(APPEND stems "${stem} ")
  endforeach()
  set(${out} "${stems}" PARENT_SCOPE)
endfunction()
