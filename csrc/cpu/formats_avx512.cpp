#include "cpu/formats_rows.h"

namespace moert::cpu::avx512 {

const FormatKernels format_kernels = {quantize_row, dequantize_row,  pack_row,
                                      unpack_row,   quantize_planes, dequantize_planes};

}  // namespace moert::cpu::avx512
