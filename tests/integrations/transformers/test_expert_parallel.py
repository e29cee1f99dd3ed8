"""The exchange itself beside one process; whole models, their gradients and training steps are in test_parallel."""

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import EPImplementationInterface
from transformers.utils import logging

from moert.integrations.transformers.expert_parallel import MoertEP
from moert.testing import OperatorsRan
from parallel import load, save
from ranks import ranks

LAYOUT = {"tp_size": 2, "ep_size": 2, "ep_implementation": "moert"}


def test_it_is_registered():
    assert EPImplementationInterface()["moert"] is MoertEP


def generates(folder: str) -> None:
    """Greedy tokens, a token a step: then one of the two ranks has none of its own.  With any experts' kernels."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    prompt = torch.randint(0, 60, (1, 5))
    alone = load("Qwen3Moe", folder, torch.float32).generate(prompt, max_new_tokens=6, min_new_tokens=6)
    for experts in ("moert", "grouped_mm", "batched_mm"):
        model = load("Qwen3Moe", folder, torch.float32, distributed_config=DistributedConfig(**LAYOUT))
        model.set_experts_implementation(experts)
        with OperatorsRan() as ran:
            got = model.generate(prompt, max_new_tokens=6, min_new_tokens=6)
        assert torch.equal(got, alone), experts
        layers = model.config.num_hidden_layers
        # Each packs twice: for the other rank, and for itself.
        assert ran.names.count("dispatch_pack_") == 2 * 6 * layers, experts
        assert ("fused_experts" in ran.names) == (experts == "moert")


def test_generate(tmp_path):
    save("Qwen3Moe", tmp_path)
    assert ranks(2, generates, str(tmp_path), timeout=300) == [None] * 2


def one_module(folder: str) -> None:
    """An experts module by itself: all tokens to one rank, weights in a narrower dtype, gradients of everything."""
    logging.disable_progress_bar()
    alone = load("Qwen3Moe", folder, torch.float32).model.layers[0].mlp.experts
    spread = load("Qwen3Moe", folder, torch.float32, distributed_config=DistributedConfig(**LAYOUT))
    spread = spread.model.layers[0].mlp.experts
    torch.manual_seed(1)
    x, dy = torch.randn(7, 32), torch.randn(7, 32)
    half = alone.gate_up_proj.shape[0] // 2
    for ids in (torch.randint(0, half, (7, 2)), torch.randint(half, 2 * half, (7, 2)), torch.randint(0, 6, (7, 2))):
        results = []
        for module in (alone, spread):
            leaf, weights = x.clone().requires_grad_(), torch.rand(7, 2, generator=torch.Generator().manual_seed(3))
            weights.requires_grad_()
            y = module(leaf, ids, weights)
            results.append((y, *torch.autograd.grad(y, (leaf, weights), dy)))
        for got, expected in zip(results[1], results[0], strict=True):
            assert (got - expected).norm() <= 1e-5 * expected.norm()
    with torch.no_grad():
        narrow = spread(x, ids, torch.rand(7, 2).bfloat16())
    assert narrow.dtype == x.dtype and narrow.isfinite().all()
    dist.barrier()


def test_forward_and_backward(tmp_path):
    save("Qwen3Moe", tmp_path)
    assert ranks(2, one_module, str(tmp_path), timeout=300) == [None] * 2
