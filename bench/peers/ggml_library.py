"""The part of ggml's C interface that one MoE layer takes, through ctypes; llama-cpp-python brings the libraries."""

import ctypes
from importlib.util import find_spec
from pathlib import Path

Pointer, Number, Size, Kind = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t, ctypes.c_int
TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "I32": 26, "BF16": 30, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39}


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", Size), ("mem_buffer", Pointer), ("no_alloc", ctypes.c_bool))


FUNCTIONS = {  # what it returns, its arguments
    "ggml_init": (Pointer, _InitParams),
    "ggml_free": (None, Pointer),
    "ggml_blck_size": (Number, Kind),
    "ggml_new_tensor": (Pointer, Pointer, Kind, ctypes.c_int, ctypes.POINTER(Number)),
    "ggml_nbytes": (Size, Pointer),
    "ggml_get_data": (Pointer, Pointer),
    "ggml_quantize_chunk": (Size, Kind, Pointer, Pointer, Number, Number, Number, Pointer),
    "ggml_mul_mat_id": (Pointer, Pointer, Pointer, Pointer, Pointer),
    "ggml_swiglu_split": (Pointer, Pointer, Pointer, Pointer),
    "ggml_mul": (Pointer, Pointer, Pointer, Pointer),
    "ggml_add": (Pointer, Pointer, Pointer, Pointer),
    "ggml_cont": (Pointer, Pointer, Pointer),
    "ggml_view_2d": (Pointer, Pointer, Pointer, Number, Number, Size, Size),
    "ggml_set_output": (None, Pointer),
    "ggml_new_graph": (Pointer, Pointer),
    "ggml_build_forward_expand": (None, Pointer, Pointer),
    "ggml_gallocr_new": (Pointer, Pointer),
    "ggml_gallocr_alloc_graph": (ctypes.c_bool, Pointer, Pointer),
    "ggml_gallocr_free": (None, Pointer),
    "ggml_backend_cpu_init": (Pointer,),
    "ggml_backend_cpu_set_n_threads": (None, Pointer, ctypes.c_int),
    "ggml_backend_cpu_buffer_type": (Pointer,),
    "ggml_backend_graph_compute": (ctypes.c_int, Pointer, Pointer),
    "ggml_backend_supports_op": (ctypes.c_bool, Pointer, Pointer),
    "ggml_backend_get_device": (Pointer, Pointer),
    "ggml_backend_dev_backend_reg": (Pointer, Pointer),
    "ggml_backend_reg_get_proc_address": (Pointer, Pointer, ctypes.c_char_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": (Pointer, Pointer, Pointer),
    "ggml_backend_buffer_free": (None, Pointer),
    "ggml_backend_tensor_set": (None, Pointer, Pointer, Size, Size),
}


class Library:
    """ggml's functions by their names without `ggml_`, and its CPU."""

    def __init__(self, threads: int):
        folder = Path(find_spec("llama_cpp").origin).parent
        found = [self._open(folder, name) for name in ("libggml-base", "libggml-cpu", "libggml")]
        for name, (returns, *takes) in FUNCTIONS.items():
            function = next(getattr(library, name) for library in found if hasattr(library, name))
            function.restype, function.argtypes = returns, takes
            setattr(self, name.removeprefix("ggml_"), function)
        self.cpu = self.backend_cpu_init()
        self.backend_cpu_set_n_threads(self.cpu, threads)
        self.plain = self.backend_cpu_buffer_type()

    def _open(self, folder: Path, name: str) -> ctypes.CDLL:
        return ctypes.CDLL(str(next(folder.rglob(f"{name}.so"))), mode=ctypes.RTLD_GLOBAL)

    def other_buffer_types(self) -> list[int]:
        """Those in which the CPU lays weights out anew."""
        registry = self.backend_dev_backend_reg(self.backend_get_device(self.cpu))
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(Pointer), Pointer)(address)(self.backend_get_device(self.cpu))
        types = []
        while listed and listed[len(types)]:  # ends with a null pointer
            types.append(listed[len(types)])
        return types

    def multiplies(self, weights: int, x: int, ids: int) -> bool:
        """Whether the CPU has mul_mat_id for weights in the memory in which they are."""
        context = self.init(_InitParams(2**16, None, True))
        taken = self.backend_supports_op(self.cpu, self.mul_mat_id(context, weights, x, ids))
        self.free(context)
        return taken


class Tensors:
    """Tensors by name, {name: (type, sizes with the neighbouring elements first)}, in memory of a buffer type."""

    def __init__(self, ggml: Library, buffer_type: int, shapes: dict):
        self.ggml = ggml
        self.context = ggml.init(_InitParams(2**20, None, True))
        for name, (kind, sizes) in shapes.items():
            numbers = (Number * len(sizes))(*sizes)
            setattr(self, name, ggml.new_tensor(self.context, TYPES[kind], len(sizes), numbers))
        self.buffer = ggml.backend_alloc_ctx_tensors_from_buft(self.context, buffer_type)
        if not self.buffer:
            raise MemoryError(f"ggml must have memory for {shapes}")

    def fill(self, name: str, data: int, size: int) -> None:
        self.ggml.backend_tensor_set(getattr(self, name), data, 0, size)

    def __del__(self):
        self.ggml.backend_buffer_free(self.buffer)
        self.ggml.free(self.context)


class Graph:
    """The nodes that build(context) makes, the last one its output."""

    def __init__(self, ggml: Library, build):
        self.ggml = ggml
        self.context = ggml.init(_InitParams(2**22, None, True))
        self.output = build(self.context)
        ggml.set_output(self.output)
        self.graph = ggml.new_graph(self.context)
        ggml.build_forward_expand(self.graph, self.output)
        self.memory = ggml.gallocr_new(ggml.plain)
        if not ggml.gallocr_alloc_graph(self.memory, self.graph):
            raise MemoryError("ggml must have memory for a graph")

    def run(self) -> int:
        """The address of the output."""
        if status := self.ggml.backend_graph_compute(self.ggml.cpu, self.graph):
            raise RuntimeError(f"ggml must compute its graph, got status {status}")
        return self.ggml.get_data(self.output)

    def __del__(self):
        self.ggml.gallocr_free(self.memory)
        self.ggml.free(self.context)
