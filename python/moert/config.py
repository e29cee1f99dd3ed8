"""Every environment variable that moert's Python reads, read once.

MOERT_ISA is read by the kernels (csrc/cpu/isa.cpp).
"""
