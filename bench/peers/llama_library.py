"""The part of llama.cpp's C interface that generation takes, through ctypes; llama-cpp-python brings the library."""

import ctypes
import functools
from importlib.util import find_spec
from pathlib import Path

import numpy as np

Pointer, Bool, Integer, Unsigned, Real = ctypes.c_void_p, ctypes.c_bool, ctypes.c_int32, ctypes.c_uint32, ctypes.c_float
Size = ctypes.c_size_t


def _fields(*groups: tuple) -> list[tuple]:
    """(type, "names in order") … as ctypes has them."""
    return [(name, kind) for kind, names in groups for name in names.split()]


class _ModelParams(ctypes.Structure):
    _fields_ = _fields(
        (Pointer, "devices tensor_buft_overrides"),
        (Integer, "n_gpu_layers split_mode load_mode lazy_mode main_gpu"),
        (Pointer, "tensor_split progress_callback progress_callback_user_data kv_overrides"),
        (Bool, "vocab_only check_tensors use_extra_bufts no_host no_alloc load_mtp"),
    )


class _ContextParams(ctypes.Structure):
    _fields_ = _fields(
        (Unsigned, "n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs_max n_outputs_max_per_seq"),
        (Integer, "n_threads n_threads_batch"),
        (Integer, "ctx_type rope_scaling_type pooling_type attention_type flash_attn_type"),
        (Real, "rope_freq_base rope_freq_scale yarn_ext_factor yarn_attn_factor yarn_beta_fast yarn_beta_slow"),
        (Unsigned, "yarn_orig_ctx"),
        (Real, "defrag_thold"),
        (Pointer, "cb_eval cb_eval_user_data"),
        (Integer, "type_k type_v"),
        (Pointer, "abort_callback abort_callback_data"),
        (Bool, "embeddings offload_kqv no_perf op_offload swa_full kv_unified"),
        (Pointer, "samplers"),
        (Size, "n_samplers"),
        (Pointer, "ctx_other"),
    )


class _Batch(ctypes.Structure):
    _fields_ = _fields((Integer, "n_tokens"), (Pointer, "token embd pos n_seq_id seq_id logits"))


FUNCTIONS = {  # what it returns, its arguments
    "backend_init": (None,),
    "model_default_params": (_ModelParams,),
    "context_default_params": (_ContextParams,),
    "model_load_from_file": (Pointer, ctypes.c_char_p, _ModelParams),
    "model_get_vocab": (Pointer, Pointer),
    "vocab_n_tokens": (Integer, Pointer),
    "model_size": (ctypes.c_uint64, Pointer),
    "init_from_model": (Pointer, Pointer, _ContextParams),
    "get_memory": (Pointer, Pointer),
    "memory_clear": (None, Pointer, Bool),
    "batch_get_one": (_Batch, Pointer, Integer),
    "decode": (Integer, Pointer, _Batch),
    "get_logits_ith": (ctypes.POINTER(Real), Pointer, Integer),
}


class Llama:
    """A model that libllama has loaded, with the options that llama.cpp has by default, and one sequence."""

    def __init__(self, path: str, threads: int, context: int):
        self.library = library()
        self.library.backend_init()
        self.model = self.library.model_load_from_file(path.encode(), self.library.model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp must load {Path(path).name}")
        self.vocabulary = self.library.vocab_n_tokens(self.library.model_get_vocab(self.model))
        params = self.library.context_default_params()
        if params.n_ubatch != 512 or params.type_k != params.type_v:  # another version: its fields lie elsewhere
            raise RuntimeError(f"n_ubatch must be 512 in llama.cpp's defaults, got {params.n_ubatch}")
        params.n_ctx, params.n_threads, params.n_threads_batch = context, threads, threads
        self.context = self.library.init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp must have memory for {context} tokens of {Path(path).name}")

    @property
    def weight_bytes(self) -> int:
        return self.library.model_size(self.model)

    def forget(self) -> None:
        """The tokens so far."""
        self.library.memory_clear(self.library.get_memory(self.context), True)

    def follow(self, ids: list[int]) -> np.ndarray:
        """Takes ids after those before; the logits [vocabulary] after the last one, which the next call overwrites."""
        tokens = (Integer * len(ids))(*ids)
        if status := self.library.decode(self.context, self.library.batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama.cpp must decode {len(ids)} tokens, got status {status}")
        return np.ctypeslib.as_array(self.library.get_logits_ith(self.context, -1), (self.vocabulary,))


@functools.cache
def library():
    """llama.cpp's functions by their names without `llama_`."""
    folder = Path(find_spec("llama_cpp").origin).parent / "lib"
    # Each needs those before it and does not say where they are.
    *_, loaded = [
        ctypes.CDLL(str(folder / f"{name}.so"), mode=ctypes.RTLD_GLOBAL)
        for name in ("libggml-base", "libggml-cpu", "libggml", "libllama")
    ]
    for name, (returns, *takes) in FUNCTIONS.items():
        function = getattr(loaded, f"llama_{name}")
        function.restype, function.argtypes = returns, takes
        setattr(loaded, name, function)
    return loaded
