// NumPy arrays at the boundary of moert._C.
#pragma once

#include <pybind11/numpy.h>

#include <algorithm>
#include <string>
#include <vector>

#include "moert/check.h"

namespace py = pybind11;

using Shape = std::vector<py::ssize_t>;

// The array's memory is read where it lies: nothing is converted, and what would have to be is refused.
template <typename T>
const T* data(const char* name, const py::array& array, const char* dtype, int dims) {
  MOERT_CHECK(py::dtype(dtype).equal(array.dtype()), name, " must be ", dtype, ", got ",
              std::string(py::str(array.dtype())));
  MOERT_CHECK(array.ndim() == dims, name, " must have ", dims, " dimensions, got ", array.ndim());
  constexpr int kWanted = int(py::array::c_style) | int(py::detail::npy_api::NPY_ARRAY_ALIGNED_);
  MOERT_CHECK((array.flags() & kWanted) == kWanted, name, " must be C-contiguous and aligned, got other strides");
  return static_cast<const T*>(array.data());
}

static inline std::string text(const py::ssize_t* shape, size_t dims) {
  std::string out = "[";
  for (size_t i = 0; i < dims; ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

static inline void check_shape(const char* name, const py::array& array, const Shape& shape) {
  const bool same = size_t(array.ndim()) == shape.size() && std::equal(shape.begin(), shape.end(), array.shape());
  MOERT_CHECK(same, name, " must be ", text(shape.data(), shape.size()), ", got ",
              text(array.shape(), size_t(array.ndim())));
}

static inline int checked_threads(int threads) {
  MOERT_CHECK(threads >= 1 && threads <= 1024, "threads must be 1 to 1024, got ", threads);
  return threads;
}

static inline py::array empty(const char* dtype, const Shape& shape) { return py::array(py::dtype(dtype), shape); }
