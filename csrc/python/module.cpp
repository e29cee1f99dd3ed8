// moert._C: what is not a tensor operator.
#include <pybind11/pybind11.h>

#include "moert/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts and CPU features of moert.";
  m.def("isa", [] { return moert::name(moert::isa()); }, "The instruction set in use.");
  m.def("best_isa", [] { return moert::name(moert::best_isa()); }, "The best instruction set of this CPU.");
}
