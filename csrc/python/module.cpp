// moert._C: what is not a tensor operator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <map>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "cpu/pages.h"
#include "cpu/peak.h"
#include "moert/fused_experts_quantized.h"
#include "moert/isa.h"
#include "python/formats.h"

namespace py = pybind11;

namespace {

py::dict build() {
  py::dict facts;
  facts["version"] = MOERT_VERSION;
  facts["compiler"] = MOERT_COMPILER;
  facts["build_type"] = MOERT_BUILD_TYPE;
  facts["sanitize"] = MOERT_SANITIZE;
#ifdef MOERT_STD_THREAD
  facts["threads"] = "std::thread";
#else
  facts["threads"] = "OpenMP";
#endif
  std::vector<std::string> archs;
  std::istringstream words(MOERT_CUDA_ARCHS);
  for (std::string arch; words >> arch;) archs.push_back(arch);
  facts["cuda_archs"] = archs;
  // stem -> the instruction sets that it is compiled for, besides the portable kernels that everything has
  std::map<std::string, std::vector<std::string>> kernels;
  std::istringstream stems(MOERT_ISA_STEMS);
  for (std::string word; stems >> word;) {
    const size_t isa = std::min(word.find("_avx"), word.find("_amx"));
    kernels[word.substr(0, isa)].push_back(word.substr(isa + 1));
  }
  facts["kernels"] = kernels;
  return facts;
}

py::dict cpu_features() {
  py::dict has;
#if defined(__x86_64__)
#define MOERT_FEATURE(name) has[name] = bool(__builtin_cpu_supports(name))
  MOERT_FEATURE("avx2");
  MOERT_FEATURE("fma");
  MOERT_FEATURE("f16c");
  MOERT_FEATURE("avx512f");
  MOERT_FEATURE("avx512bw");
  MOERT_FEATURE("avx512dq");
  MOERT_FEATURE("avx512vl");
  MOERT_FEATURE("avx512vnni");
  MOERT_FEATURE("avx512bf16");
#undef MOERT_FEATURE
  for (const char* amx : {"amx_bf16", "amx_int8"})
    has[amx] = moert::best_isa() >= moert::Isa::amx;  // and the system grants its registers
#endif
  return has;
}

py::dict threads() {
  py::dict facts;
  facts["cpus"] = std::thread::hardware_concurrency();
#ifdef _OPENMP
  facts["openmp"] = omp_get_max_threads();
#endif
  return facts;
}

// Those without rows of groups too.
moert::Format any_format_of(const std::string& format) {
  for (int i = moert::kRowFormats; i < moert::kFormats; ++i)
    if (format == moert::cpu::name(moert::Format(i))) return moert::Format(i);
  return format_of(format);
}

const char* default_precision(const std::string& format, int64_t group, int64_t planes) {
  return moert::name(moert::default_precision(any_format_of(format), group, planes));
}

std::vector<std::string> precisions(const std::string& format) {
  std::vector<std::string> names = {"auto"};
  for (const moert::Precision p : moert::kPrecisions)
    if (moert::takes(any_format_of(format), p)) names.emplace_back(moert::name(p));
  return names;
}

int64_t bf16_rows(const std::string& precision, bool ternary) {
  for (const moert::Precision p : moert::kPrecisions)
    if (precision == moert::name(p)) return moert::cpu::bf16_rows(p, ternary);
  throw py::value_error("precision must be a name of one, got " + precision);
}

py::tuple panel(const std::string& dtype) {
  const std::map<std::string, moert::DType> known = {{"float32", moert::DType::f32},
                                                     {"bfloat16", moert::DType::bf16},
                                                     {"float16", moert::DType::f16},
                                                     {"float64", moert::DType::f64}};
  const auto found = known.find(dtype);
  if (found == known.end()) throw py::value_error("dtype must be float32, bfloat16, float16 or float64, got " + dtype);
  const moert::cpu::Panel panel = moert::cpu::panel_of(found->second);
  return py::make_tuple(panel.columns, panel.depth);
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (int i = 0; i <= int(moert::best_isa()); ++i) names.emplace_back(moert::name(moert::Isa(i)));
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts, CPU features, threads and packed weights of moert.";
  m.def("build", &build, "How this library was built.");
  m.def("cpu_features", &cpu_features, "The CPU features that moert's kernels ask for -> whether this CPU has them.");
  m.def("threads", &threads, "The CPUs of this machine and the threads of the OpenMP runtime.");
  m.def("isas", &isas, "The instruction sets that can run here, lowest first: what MOERT_ISA may name.");
  m.def("isa", [] { return moert::name(moert::isa()); }, "The instruction set in use.");
  m.def("best_isa", [] { return moert::name(moert::best_isa()); }, "The best instruction set of this CPU.");
  m.def("panel", &panel, "Columns and depth of the panels in which weights of a dtype are multiplied as they lie.");
  m.def("default_precision", &default_precision, py::arg("format"), py::arg("group"), py::arg("planes") = 0,
        "The precision of activations that \"auto\" is over a format and group; planes: of bit_nested.");
  m.def("precisions", &precisions, py::arg("format"), "The precisions of activations that a format takes on a CPU.");
  m.def(
      "bf16_rows", &bf16_rows, py::arg("precision"), py::arg("ternary"),
      "Rows an expert on average from which \"auto\" is \"bfloat16\" instead of this default; 0: never.  ternary: both "
      "matrices are.");
  m.def(
      "advise_huge_pages",
      [](uintptr_t address, size_t bytes) { moert::cpu::advise_huge_pages(reinterpret_cast<void*>(address), bytes); },
      "Large pages for fresh memory, where the system has them; to be asked for before the first write.");
  const auto peak = [](int64_t (*multiply)(int64_t, int64_t)) {
    return [multiply](int64_t operations, int64_t threads) {
      if (operations < 0 || threads < 1 || threads > 1024)
        throw py::value_error("operations must be at least 0 and threads in [1, 1024]");
      const py::gil_scoped_release others;
      return multiply(operations, threads);
    };
  };
  m.def("multiply_floats", peak(&moert::cpu::multiply_floats), py::arg("operations"), py::arg("threads"),
        "Multiplies and adds float32 in registers, so often or a little more: the FMA peak, for benches.");
  m.def("multiply_bytes", peak(&moert::cpu::multiply_bytes), py::arg("operations"), py::arg("threads"),
        "The same with int8, as VNNI multiplies it where the CPU has it.");
  define_formats(m);
  define_fp8(m);
  define_bit_nested(m);
  define_sub1(m);
}
