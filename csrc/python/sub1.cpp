#include "moert/sub1.h"

#include <cstring>

#include "python/arrays.h"
#include "python/formats.h"

namespace {

py::array sub1_table() {
  const auto& entries = moert::cpu::sub1_dictionary().entries;
  py::array out = empty("uint32", {moert::kSub1Size, 2});
  std::memcpy(out.mutable_data(), entries.data(), entries.size() * sizeof(entries[0]));
  return out;
}

py::tuple sub1_encode(const py::array& digits, int threads) {
  const uint8_t* in = data<uint8_t>("digits", digits, "uint8", 2);
  checked_threads(threads);
  moert::cpu::Sub1Rows rows;
  {
    py::gil_scoped_release release;
    rows = moert::cpu::sub1_encode(in, digits.shape(0), digits.shape(1), threads);
  }
  py::array codes = empty("uint16", {py::ssize_t(rows.codes.size())});
  py::array row_ptr = empty("int32", {py::ssize_t(rows.row_ptr.size())});
  std::copy(rows.codes.begin(), rows.codes.end(), static_cast<uint16_t*>(codes.mutable_data()));
  std::copy(rows.row_ptr.begin(), rows.row_ptr.end(), static_cast<int32_t*>(row_ptr.mutable_data()));
  return py::make_tuple(codes, row_ptr);
}

py::array sub1_decode(const py::array& codes, const py::array& row_ptr, int64_t columns, int threads) {
  const uint16_t* code = data<uint16_t>("codes", codes, "uint16", 1);
  const int32_t* first = data<int32_t>("row_ptr", row_ptr, "int32", 1);
  const int64_t rows = row_ptr.shape(0) - 1;
  MOERT_CHECK(rows >= 0, "row_ptr must have rows + 1 elements, got 0");
  // What the codewords cannot hold is not allocated.
  const int64_t most = 2 * moert::kSub1Longest * codes.shape(0) / std::max<int64_t>(rows, 1);
  MOERT_CHECK(columns >= 0 && (rows == 0 || columns <= most), "columns must be 0 to ", most, " in ", codes.shape(0),
              " codewords, got ", columns);
  checked_threads(threads);
  py::array digits = empty("uint8", {rows, columns});
  auto* out = static_cast<uint8_t*>(digits.mutable_data());
  {
    py::gil_scoped_release release;
    moert::cpu::sub1_decode(code, codes.shape(0), first, rows, columns, threads, out);
  }
  return digits;
}

}  // namespace

void define_sub1(py::module_& m) {
  using namespace py::literals;
  m.def("sub1_table", &sub1_table, "The dictionary, uint32 [65536, 2] (csrc/moert/sub1.h).");
  m.def("sub1_encode", &sub1_encode, "digits"_a, "threads"_a = 1,
        "digits uint8 [rows, columns] of 0, 1, 2 -> codes uint16 [codewords], row_ptr int32 [rows + 1].");
  m.def("sub1_decode", &sub1_decode, "codes"_a, "row_ptr"_a, "columns"_a, "threads"_a = 1,
        "What sub1_encode returned -> digits uint8 [rows, columns].");
}
