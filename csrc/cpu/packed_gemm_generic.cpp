#include "cpu/packed_tile.h"

namespace moert::cpu::generic {

const PackedGemmKernels packed_gemm_kernels = {quantized_row_bytes, quantize_row,         packed_gemm,
                                               dequantize_rows,     dequantize_bf16_rows, few_rows};

}  // namespace moert::cpu::generic
