#include "moert/fp8.h"

#include "python/arrays.h"
#include "python/formats.h"

using moert::Fp8Packing;

namespace {

py::tuple fp8_quantize(const py::array& w, int threads) {
  const float* weights = data<float>("w", w, "float32", 3);
  const Fp8Packing p{w.shape(0), w.shape(1), w.shape(2)};
  checked_threads(threads);
  py::array codes = empty("uint8", {p.matrices, p.rows, moert::fp8_row_bytes(p.columns)});
  py::array scales = empty("float32", {p.matrices, moert::fp8_blocks(p.rows), moert::fp8_blocks(p.columns)});
  auto* code = static_cast<uint8_t*>(codes.mutable_data());
  auto* scale = static_cast<float*>(scales.mutable_data());
  {
    py::gil_scoped_release release;
    moert::cpu::fp8_quantize(p, weights, threads, code, scale);
  }
  return py::make_tuple(codes, scales);
}

py::array fp8_dequantize(const py::array& codes, const py::array& scales, int64_t columns, int threads) {
  const uint8_t* code = data<uint8_t>("codes", codes, "uint8", 3);
  const int64_t bytes = codes.shape(2);
  MOERT_CHECK(columns >= 0 && columns <= bytes && moert::fp8_row_bytes(columns) == bytes,
              "columns must be what rows of ", bytes, " bytes hold, got ", columns);
  const Fp8Packing p{codes.shape(0), codes.shape(1), columns};
  checked_threads(threads);
  const float* scale = data<float>("scales", scales, "float32", 3);
  check_shape("scales", scales, {p.matrices, moert::fp8_blocks(p.rows), moert::fp8_blocks(columns)});
  py::array w = empty("float32", {p.matrices, p.rows, columns});
  auto* out = static_cast<float*>(w.mutable_data());
  {
    py::gil_scoped_release release;
    moert::cpu::fp8_dequantize(p, code, scale, threads, out);
  }
  return w;
}

}  // namespace

void define_fp8(py::module_& m) {
  using namespace py::literals;
  m.def("fp8_quantize", &fp8_quantize, "w"_a, "threads"_a = 1,
        "w float32 [matrices, rows, columns] -> codes uint8 [matrices, rows, row_bytes], scales float32 by block.");
  m.def("fp8_dequantize", &fp8_dequantize, "codes"_a, "scales"_a, "columns"_a, "threads"_a = 1,
        "What fp8_quantize returned -> w float32 [matrices, rows, columns].");
}
