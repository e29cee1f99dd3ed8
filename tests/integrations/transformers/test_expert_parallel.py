"""The exchange itself beside one process; whole models, their gradients and training steps are in test_parallel."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import EPImplementationInterface
from transformers.utils import logging

from moert.analysis import record_routings
from moert.integrations.transformers import place_experts_
from moert.integrations.transformers.expert_parallel import MoertEP
from moert.placement import ExpertPlacement, PlacedLayer, Topology, moetuner_placement, round_robin
from moert.testing import OperatorsRan
from parallel import full, load, local, save
from ranks import error_of, ranks

LAYOUT = {"tp_size": 2, "ep_size": 2, "ep_implementation": "moert"}
WITH_FSDP = {"fsdp_size": 2, "ep_size": 2, "ep_implementation": "moert"}


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


def until_one_is_lost(folder: str) -> str:
    """Rank 1 ends in the middle of its exchanges; what the other one is told."""
    logging.disable_progress_bar()
    spread = load("Qwen3Moe", folder, torch.float32, distributed_config=DistributedConfig(**LAYOUT))
    experts, send, count = spread.model.layers[0].mlp.experts, dist.all_to_all_single, iter(range(99))

    def begun(*args, **options):
        if next(count) == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return send(*args, **options)

    if dist.get_rank() == 1:
        dist.all_to_all_single = begun
    with pytest.raises(RuntimeError) as error:
        for _ in range(20):
            x = torch.randn(7, 32, requires_grad=True)
            experts(x, torch.randint(0, 6, (7, 2)), torch.rand(7, 2)).sum().backward()
    return str(error.value)


def test_a_lost_rank_is_named(tmp_path):
    save("Qwen3Moe", tmp_path)
    (told, _) = ranks(2, until_one_is_lost, str(tmp_path), timeout=300, may_end=(1,))
    assert told.startswith("every rank must take part in the exchange, got no word from rank 1: "), told


def a_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def placed(folder: str, layout: dict, files: list[str]) -> None:
    """Rank by rank the experts that a file says; logits, loads and a training step as in one process."""
    logging.disable_progress_bar()
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(1))  # of every rank
    alone = load("Qwen3Moe", folder, torch.float32)
    model = load("Qwen3Moe", folder, torch.float32, distributed_config=DistributedConfig(**layout))
    weights = dict(alone.named_parameters())
    # Now: after a forward FSDP2 has parameters of its own in the place of some.
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (alone, model)]
    for file in files:
        assert place_experts_(model, file) is model
        for layer in ExpertPlacement.load(file).layers:
            experts = model.get_submodule(layer.name)
            mine = [e for e, rank in enumerate(layer.expert_to_rank) if rank == dist.get_rank()]
            for key, parameter in experts.named_parameters():
                assert torch.equal(local(parameter), weights[f"{layer.name}.{key}"][mine])
        recorded = []
        for each in (alone, model):
            with torch.no_grad(), record_routings(each) as recorder:
                logits = each(input_ids=ids, use_cache=False).logits
            recorded.append((logits, recorder.loads()))
        (expected, loads), (got, seen) = recorded
        assert (got - expected).norm() <= 1e-5 * expected.norm()
        assert all(torch.equal(seen[name], loads[name]) for name in loads)
    with pytest.raises(RuntimeError, match="experts must lie in blocks to be saved or loaded"):
        model.state_dict()
    before = {name: p.detach().clone() for name, p in weights.items()}
    for each, optimizer in zip((alone, model), optimizers, strict=True):
        a_step(each, optimizer, ids)
    place_experts_(model)
    assert model.state_dict().keys() == alone.state_dict().keys()
    for name, parameter in model.named_parameters():
        moved = (weights[name] - before[name]).norm()
        assert moved > 0 and (full(parameter) - weights[name]).norm() <= 1e-3 * moved, name


@pytest.mark.parametrize("layout", [LAYOUT, WITH_FSDP], ids=["tensor parallel", "FSDP2"])
def test_a_placement_of_its_own_trace(tmp_path, layout):
    save("Qwen3Moe", tmp_path)
    model = load("Qwen3Moe", tmp_path, torch.float32)
    with torch.no_grad(), record_routings(model) as recorder:
        model(torch.randint(0, 60, (4, 16)))
    trace = recorder.trace()
    files = [str(tmp_path / name) for name in ("tuned.json", "in turn.json")]
    moetuner_placement(trace, Topology(2, 1)).placement.save(files[0])
    round_robin(trace, 2).save(files[1])
    assert ranks(2, placed, str(tmp_path), layout, files, timeout=300) == [None] * 2


def misplaced(folder: str) -> list[str]:
    logging.disable_progress_bar()
    config = DistributedConfig(**LAYOUT)
    model = load("Qwen3Moe", folder, torch.float32, distributed_config=config)
    name = "model.layers.1.mlp.experts"
    copies = PlacedLayer(name, torch.arange(6).numpy() // 3, ((0, 1),))
    told = [
        error_of(place_experts_, model, {name: where}) for where in ([0, 1, 1, 1, 1, 0], [0, 1, 2, 0, 1, 2], copies)
    ]
    told.append(error_of(place_experts_, model, None if dist.get_rank() else {"model.layers.9.mlp.experts": [0] * 6}))
    model(torch.zeros(1, 4, dtype=torch.int64), use_cache=False).logits.sum().backward()
    if dist.get_rank():
        model.zero_grad()
    told.append(error_of(place_experts_, model, {name: [0, 1, 0, 1, 0, 1]}))
    told.append(error_of(place_experts_, load("Qwen3Moe", folder, torch.float32)))
    model.zero_grad()
    experts = model.get_submodule(name)
    experts.register_buffer("codes", torch.zeros(3, 2))  # as of packed experts: not moved, but an expert's
    told.append(error_of(place_experts_, model))
    del experts.codes
    experts.moert_exchange.moving = dist.get_rank() == 1
    told.append(error_of(place_experts_, model))
    return told


def test_errors(tmp_path):
    save("Qwen3Moe", tmp_path)
    first, second = ranks(2, misplaced, str(tmp_path), timeout=300)
    assert first[:3] == second[:3] and first[5] == second[5]
    names = "model.layers.0.mlp.experts, model.layers.1.mlp.experts"
    unknown = f"placement must name experts of the model ({names}), got model.layers.9.mlp.experts"
    assert first == [
        "placement must give every rank 3 experts, got 2, 4 of model.layers.1.mlp.experts",
        "placement must hold ranks in [0, R=2), got 2",
        "placement must be without copies of experts, got 1 of model.layers.1.mlp.experts",
        unknown,
        "gradients of experts must be None while they move, got one of model.layers.0.mlp.experts.gate_up_proj",
        'model must be spread with ep_implementation="moert", got Qwen3MoeForCausalLM',
        "experts must be parameters that transformers has spread, got model.layers.1.mlp.experts.codes",
        "placement must fit on every rank, got an error on rank 1: experts must lie where their map says, got a "
        "place_experts_ that failed halfway",
    ]
    assert second[3:5] == [f"placement must fit on every rank, got an error on rank 0: {text}" for text in first[3:5]]
    assert second[6] == first[6] and first[7].endswith(second[7])
