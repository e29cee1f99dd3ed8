// Packed weights as NumPy arrays.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "moert/formats.h"

moert::Format format_of(const std::string& name);

void define_formats(pybind11::module_& m);
void define_fp8(pybind11::module_& m);
void define_bit_nested(pybind11::module_& m);
void define_sub1(pybind11::module_& m);
