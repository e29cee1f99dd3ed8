// The GPU that the CUDA kernels run on.
#pragma once

#include <string>

namespace moert::cuda {

// Throws unless the current device has compute capability 8.0 or more; asks each device once.
void require_device();

// The same for a device that is said to have this one.
void require_capability(int major, int minor, int device);

// Whether the environment asks for something that is off by default: `name` is 1, else 0, empty or not there.
bool is_on(const char* name);

// Whether the current device has compute capability 9.x, and so the kernels for sm_90a.
bool is_sm90();

// Multiprocessors of the current device.
int num_sms();

}  // namespace moert::cuda
