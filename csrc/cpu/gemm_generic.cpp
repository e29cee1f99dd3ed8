#include "cpu/gemm_tile.h"

namespace moert::cpu::generic {

const GemmKernels gemm_kernels = {gemm,        store_tile, widen,      activate_tile, activate_backward_tile,
                                  combine_row, dot,        kPanelBytes};

}  // namespace moert::cpu::generic
