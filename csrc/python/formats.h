// Packed weights as NumPy arrays.
#pragma once

#include <pybind11/pybind11.h>

void define_formats(pybind11::module_& m);
