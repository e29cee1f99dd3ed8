#include "python/formats.h"

#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "moert/check.h"
#include "moert/formats.h"
#include "python/arrays.h"

namespace py = pybind11;
using moert::Format;
using moert::Packing;

Format format_of(const std::string& name) {
  for (int i = 0; i < moert::kRowFormats; ++i) {
    if (name == moert::cpu::name(Format(i))) return Format(i);
  }
  moert::fail("format must be int8, int4, int4_asymmetric, mxfp4, ternary2 or ternary5, got ", name);
}

namespace {

// Rows of codes say how many columns they hold only to the block, so the caller tells.
Packing packing_of(const std::string& name, const py::array& packed, int64_t columns, int64_t group) {
  const Format format = format_of(name);
  const int64_t bytes = packed.shape(1), block = moert::weights_per_block(format);
  const bool fits = columns >= 0 && columns <= bytes * block && moert::row_bytes(columns, block) == bytes;
  MOERT_CHECK(fits, "columns must be what rows of ", bytes, " bytes hold, got ", columns);
  return {format, packed.shape(0), columns, group};
}

const char* scale_dtype(Format format) { return format == Format::mxfp4 ? "uint8" : "float16"; }

py::tuple quantize(const std::string& name, const py::array& w, int64_t group, int threads) {
  const float* weights = data<float>("w", w, "float32", 2);
  const Packing p{format_of(name), w.shape(0), w.shape(1), group};
  moert::cpu::check_packing(p);
  checked_threads(threads);
  py::array codes = empty("uint8", {p.rows, moert::row_bytes(p)});
  py::array scales = empty(scale_dtype(p.format), {p.rows, moert::groups(p)});
  py::object zeros = py::none();
  uint8_t* zero_bytes = nullptr;
  if (moert::has_zeros(p.format)) {
    py::array array = empty("uint8", {p.rows, moert::groups(p)});
    zero_bytes = static_cast<uint8_t*>(array.mutable_data());
    zeros = array;
  }
  uint8_t* packed = static_cast<uint8_t*>(codes.mutable_data());
  void* scale = scales.mutable_data();
  {
    py::gil_scoped_release release;
    moert::cpu::quantize(p, weights, threads, packed, scale, zero_bytes);
  }
  return py::make_tuple(codes, scales, zeros);
}

py::array dequantize(const std::string& name, const py::array& codes, const py::array& scales,
                     const std::optional<py::array>& zeros, int64_t columns, int64_t group, int threads) {
  const uint8_t* packed = data<uint8_t>("codes", codes, "uint8", 2);
  const Packing p = packing_of(name, codes, columns, group);
  moert::cpu::check_packing(p);
  checked_threads(threads);
  const void* scale = data<void>("scales", scales, scale_dtype(p.format), 2);
  check_shape("scales", scales, {p.rows, moert::groups(p)});
  const uint8_t* zero = nullptr;
  MOERT_CHECK(zeros.has_value() == moert::has_zeros(p.format), "zeros must be ",
              moert::has_zeros(p.format) ? "an array" : "None", " for ", name, ", got ", zeros ? "an array" : "None");
  if (zeros) {
    zero = data<uint8_t>("zeros", *zeros, "uint8", 2);
    check_shape("zeros", *zeros, {p.rows, moert::groups(p)});
  }
  py::array w = empty("float32", {p.rows, p.columns});
  float* out = static_cast<float*>(w.mutable_data());
  {
    py::gil_scoped_release release;
    moert::cpu::dequantize(p, packed, scale, zero, threads, out);
  }
  return w;
}

py::array pack_codes(const std::string& name, const py::array& codes, int threads) {
  const uint8_t* in = data<uint8_t>("codes", codes, "uint8", 2);
  const Packing p{format_of(name), codes.shape(0), codes.shape(1), 0};
  checked_threads(threads);
  py::array packed = empty("uint8", {p.rows, moert::row_bytes(p)});
  uint8_t* out = static_cast<uint8_t*>(packed.mutable_data());
  {
    py::gil_scoped_release release;
    moert::cpu::pack_codes(p, in, threads, out);
  }
  return packed;
}

py::array unpack_codes(const std::string& name, const py::array& packed, int64_t columns, int threads) {
  const uint8_t* in = data<uint8_t>("packed", packed, "uint8", 2);
  const Packing p = packing_of(name, packed, columns, 0);
  checked_threads(threads);
  py::array codes = empty("uint8", {p.rows, p.columns});
  uint8_t* out = static_cast<uint8_t*>(codes.mutable_data());
  {
    py::gil_scoped_release release;
    moert::cpu::unpack_codes(p, in, threads, out);
  }
  return codes;
}

}  // namespace

void define_formats(py::module_& m) {
  using namespace py::literals;
  m.def("quantize", &quantize, "format"_a, "w"_a, "group"_a, "threads"_a = 1,
        "w float32 [rows, columns] -> codes uint8 [rows, row_bytes], scales [rows, groups], zeros or None.");
  m.def("dequantize", &dequantize, "format"_a, "codes"_a, "scales"_a, "zeros"_a, "columns"_a, "group"_a,
        "threads"_a = 1, "What quantize returned -> w float32 [rows, columns].");
  m.def("pack_codes", &pack_codes, "format"_a, "codes"_a, "threads"_a = 1,
        "codes uint8 [rows, columns], one a byte -> uint8 [rows, row_bytes], bit-exact.");
  m.def("unpack_codes", &unpack_codes, "format"_a, "packed"_a, "columns"_a, "threads"_a = 1,
        "What pack_codes returned -> codes uint8 [rows, columns].");
}
