#include "cpu/permute_rows.h"

namespace moert::cpu::avx2 {

const PermuteKernels permute_kernels = {stream_row, sum_rows, row_gradient};

}  // namespace moert::cpu::avx2
