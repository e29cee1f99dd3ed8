// The device that a library's operators are for.  Every binding is compiled for _ops, where it calls moert::cpu, and
// those with CUDA kernels once more for _cuda, where it calls moert::cuda: same checks, same words.
#pragma once

#include "binding/check.h"

#if defined(MOERT_CUDA)

#include <torch/csrc/stable/accelerator.h>

#include "cuda/gpu.h"

// From torch's libtorch_cuda; its header declares it in CUDA builds of torch only.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace moert {

namespace cuda {}
namespace device = cuda;

// Kernels run on the device of x, in the order of its current stream, while this lives.
class Execution {
 public:
  explicit Execution(const Tensor& x) : guard_(x.get_device_index()) {
    cuda::require_device();
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }

  operator void*() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

inline bool is_here(const Tensor& x) { return x.is_cuda(); }

// Whether x is on the GPU of `first`.
inline bool is_beside(const Tensor& x, const Tensor& first) {
  return x.is_cuda() && x.get_device_index() == first.get_device_index();
}

// Memory for kernels to work in, on the device of x.
inline Tensor bytes_beside(const Tensor& x, int64_t bytes) {
  return torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
}

}  // namespace moert

#define MOERT_DISPATCH_KEY CUDA
#define MOERT_DEVICE_NAME "the GPU"

#else

namespace moert {

namespace cpu {}
namespace device = cpu;

// Kernels take the number of threads.
class Execution {
 public:
  explicit Execution(const Tensor&) {}
  operator int64_t() const { return torch::stable::get_num_threads(); }
};

inline bool is_here(const Tensor& x) { return x.is_cpu(); }
inline bool is_beside(const Tensor& x, const Tensor&) { return x.is_cpu(); }

}  // namespace moert

#define MOERT_DISPATCH_KEY CPU
#define MOERT_DEVICE_NAME "the CPU"

#endif

// Of the first tensor of a call; the others are compared with it.
#define MOERT_ELSEWHERE " must be on " MOERT_DEVICE_NAME " like the other arguments, got another device"
#define CHECK_DEVICE(x) MOERT_CHECK(::moert::is_here(x), #x MOERT_ELSEWHERE)
#define CHECK_SAME_DEVICE(x, first) MOERT_CHECK(::moert::is_beside(x, first), #x MOERT_ELSEWHERE)
