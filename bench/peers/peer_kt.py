"""kt-kernel, KTransformers' experts on a CPU: classes named after AMX, which also have code for CPUs without it."""

import kt_kernel
import torch
from kt_kernel import kt_kernel_ext as kt
from problem import Problem, kept
from torch_inputs import routings

CLASSES = {"bfloat16": "AMXBF16_MOE", "int8": "AMXInt8_MOE", "int4": "AMXInt4_MOE", "mxfp4": "AMXInt4_MOE"}
LONGEST = 4096  # tokens of a call


def providers(problem: Problem, threads: int) -> dict:
    if problem.training:
        raise ValueError("training must be off: there is no backward through these classes")
    if problem.format[0] not in CLASSES:
        raise ValueError(f"dtype must be one of {', '.join(CLASSES)}, got {problem.dtype}")
    pool, experts = _experts(problem, threads)
    x = torch.from_numpy(problem.x()).bfloat16()
    y, tokens = torch.empty_like(x), torch.tensor([problem.T], dtype=torch.int32)
    choices = routings(problem)

    def call(turn):
        ids, shares = choices[turn]
        pointers = (tensor.data_ptr() for tensor in (ids, shares, x, y))
        pool.submit(experts.forward_task(tokens.data_ptr(), problem.k, *pointers, False))
        pool.sync()
        return y.float().numpy()

    return {f"kt-kernel {CLASSES[problem.format[0]]} ({kt_kernel.__cpu_variant__})": call}


@kept
def _experts(problem: Problem, threads: int) -> tuple:
    workers = kt.WorkerPoolConfig()
    workers.subpool_count, workers.subpool_numa_map, workers.subpool_thread_count = 1, [0], [threads]
    pool = kt.CPUInfer(workers)
    config = kt.moe.MOEConfig(problem.E, problem.k, problem.H, problem.I, 0)
    config.pool, config.max_len = pool.backend_, LONGEST
    w1, w2 = (torch.from_numpy(w).bfloat16() for w in problem.weights())
    gate, up = (part.contiguous() for part in w1.chunk(2, dim=1))
    for name, w in (("gate", gate), ("up", up), ("down", w2)):
        if problem.dtype == "bfloat16":  # a pointer for each expert
            setattr(config, f"{name}_projs", [[matrix.data_ptr() for matrix in w]])
        else:
            setattr(config, f"{name}_proj", w.data_ptr())
    experts = getattr(kt.moe, CLASSES[problem.format[0]])(config)
    order = torch.arange(problem.E)
    pool.submit(experts.load_weights_task(order.data_ptr()))
    pool.sync()
    return pool, experts
