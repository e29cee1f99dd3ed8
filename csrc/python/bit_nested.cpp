#include "moert/bit_nested.h"

#include "python/arrays.h"
#include "python/formats.h"

using moert::BitNestedPacking;
using moert::f16;

namespace {

py::tuple bit_nested_quantize(const py::array& w, int64_t group, int64_t planes, int threads) {
  const float* weights = data<float>("w", w, "float32", 3);
  const BitNestedPacking p{w.shape(0), w.shape(1), w.shape(2), group, planes};
  moert::cpu::check_packing(p);
  checked_threads(threads);
  py::array codes = empty("uint8", {p.matrices, planes, p.rows, moert::row_bytes(p)});
  py::array scales = empty("float16", {p.matrices, p.rows, moert::groups(p)});
  auto* code = static_cast<uint8_t*>(codes.mutable_data());
  auto* scale = static_cast<f16*>(scales.mutable_data());
  {
    py::gil_scoped_release release;
    moert::cpu::bit_nested_quantize(p, weights, threads, code, scale);
  }
  return py::make_tuple(codes, scales);
}

py::array bit_nested_dequantize(const py::array& codes, const py::array& scales, int64_t columns, int64_t group,
                                int threads) {
  const uint8_t* code = data<uint8_t>("codes", codes, "uint8", 4);
  BitNestedPacking p{codes.shape(0), codes.shape(2), 0, group, codes.shape(1)};
  moert::cpu::check_packing(p);
  checked_threads(threads);
  const int64_t bytes = codes.shape(3);
  MOERT_CHECK(columns >= 0 && columns <= 8 * bytes && (columns + 127) / 128 * 16 == bytes,
              "columns must be what rows of ", bytes, " bytes hold, got ", columns);
  p.columns = columns;
  const f16* scale = data<f16>("scales", scales, "float16", 3);
  check_shape("scales", scales, {p.matrices, p.rows, moert::groups(p)});
  py::array w = empty("float32", {p.matrices, p.rows, columns});
  auto* out = static_cast<float*>(w.mutable_data());
  {
    py::gil_scoped_release release;
    moert::cpu::bit_nested_dequantize(p, code, scale, threads, out);
  }
  return w;
}

}  // namespace

void define_bit_nested(py::module_& m) {
  using namespace py::literals;
  m.def("bit_nested_quantize", &bit_nested_quantize, "w"_a, "group"_a, "planes"_a, "threads"_a = 1,
        "w float32 [matrices, rows, columns] -> codes uint8 [matrices, planes, rows, row_bytes], scales float16 "
        "[matrices, rows, groups].");
  m.def("bit_nested_dequantize", &bit_nested_dequantize, "codes"_a, "scales"_a, "columns"_a, "group"_a, "threads"_a = 1,
        "What bit_nested_quantize returned -> w float32 [matrices, rows, columns].");
}
