"""What torchrun starts on each rank: a checkpoint that transformers spreads over the ranks, used, trained, saved.

torchrun --nproc-per-node 2 tests/integrations/transformers/under_torchrun.py CHECKPOINT OUT
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import moert.integrations.transformers  # noqa: F401  registers "moert"
from moert.testing import OperatorsRan

LAYOUTS = {
    "moert's exchange": {"tp_size": 2, "ep_size": 2, "ep_implementation": "moert"},
    "transformers' exchange": {"tp_size": 2, "ep_size": 2},
    "FSDP2 and moert's exchange": {"fsdp_size": 2, "ep_size": 2, "ep_implementation": "moert"},
}
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))


def use(model: nn.Module) -> dict[str, Tensor]:
    """Greedy tokens, logits, and the loss of a training step; the model is trained by that step."""
    # First: after a forward FSDP2 has parameters of its own in the place of some.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = model.generate(IDS[:1, :4], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    out = model(input_ids=IDS, labels=IDS, use_cache=False)
    out.loss.backward()
    optimizer.step()
    with torch.no_grad():
        after = model(input_ids=IDS, use_cache=False).logits
    found = {"tokens": tokens, "logits": out.logits, "loss": out.loss[None], "logits after a step": after}
    return {name: whole(x) for name, x in found.items()}


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().contiguous()


def main(checkpoint: str, out: Path) -> None:
    for name, layout in LAYOUTS.items():
        # This starts the group too.
        model = AutoModelForCausalLM.from_pretrained(checkpoint, distributed_config=DistributedConfig(**layout))
        model.set_experts_implementation("moert")
        with OperatorsRan() as ran:
            found = use(model)
        assert "fused_experts" in ran.names
        assert ("dispatch_plan" in ran.names) == ("ep_implementation" in layout)
        save_file(found, out / f"{name}, rank {dist.get_rank()}.safetensors")
        model.save_pretrained(out / name)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
