"""Trains a byte-level language model on the standard library's source, its experts spread over the ranks of torchrun.

    torchrun --nproc-per-node 2 --max-restarts 3 examples/train_ep.py OUT [--steps 200]

Goes on from the last checkpoint in OUT, on any number of ranks; a step that was printed as saved is never made again.
"""

import argparse
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moert import GluExperts, MoELayer, TopKRouter
from moert.cli.corpus import load_corpus
from moert.parallel import Pulse, expert_parameters, load_checkpoint, save_checkpoint, shard_experts_

HIDDEN, HEADS, EXPERTS, K, LAYERS, SEQUENCE = 128, 4, 16, 2, 2, 128


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(2))
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.moe = MoELayer(TopKRouter(HIDDEN, EXPERTS, K, renormalize=True), GluExperts(EXPERTS, HIDDEN, 2 * HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.moe(self.norms[1](x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, HIDDEN), nn.Embedding(SEQUENCE, HIDDEN)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 256))

    def forward(self, ids: Tensor) -> Tensor:
        """The mean loss in nats of each byte but the first of each window, ids [B, SEQUENCE]."""
        x = self.bytes(ids) + self.places(torch.arange(ids.shape[1]))
        return F.cross_entropy(self.head(self.blocks(x))[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="windows of all ranks together, as many for each")
    parser.add_argument("--save-every", type=int, default=20)
    options, ranks = parser.parse_args(), int(os.environ["WORLD_SIZE"])
    if options.batch < 1 or options.batch % ranks:
        parser.error(f"--batch must be a multiple of the {ranks} ranks, got {options.batch}")
    init_process_group()
    torch.manual_seed(0)  # the same weights on every rank, before each keeps its part
    with Pulse() as pulse:
        model = shard_experts_(Model(), gradients="mean", pulse=pulse)
        model._ddp_params_and_buffers_to_ignore = list(expert_parameters(model))
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
        train(wrapped, optimizer, load_corpus().train, options)
    dist.destroy_process_group()


def init_process_group() -> None:
    """With keys of this start alone: torchrun's store still has the addresses of the last one, which Gloo would use."""
    store, rank, ranks = next(dist.rendezvous("env://"))
    store = dist.PrefixStore("start " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, text: Tensor, options) -> None:
    done, console = last_step(options.out), Console(quiet=dist.get_rank() != 0)
    if done:
        load_checkpoint(options.out / f"step-{done}", model, optimizer)
    console.print(f"goes on after step {done}" if done else "begins")
    columns = TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[loss]}")
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("", total=options.steps, completed=done, loss="")
        for step in range(done + 1, options.steps + 1):
            optimizer.zero_grad()
            loss = model(windows(text, step, options.batch))
            loss.backward()
            optimizer.step()
            progress.update(task, completed=step, loss=f"loss {loss.item():.3f} nats a byte")
            if step % options.save_every == 0 or step == options.steps:
                save(options.out, step, model, optimizer)
                dist.all_reduce(total := loss.detach().clone())
                console.print(f"saved step {step}, loss {total.item() / dist.get_world_size():.6f}")


def windows(text: Tensor, step: int, batch: int) -> Tensor:
    """This rank's part of the windows of a step, which are the same however many ranks there are."""
    starts = torch.randint(len(text) - SEQUENCE, (batch, 1), generator=torch.Generator().manual_seed(step))
    return text[starts + torch.arange(SEQUENCE)].long().chunk(dist.get_world_size())[dist.get_rank()]


def last_step(out: Path) -> int:
    """Of the checkpoint that is complete; 0 where there is none."""
    latest = out / "latest"
    return int(latest.read_text()) if latest.exists() else 0


def save(out: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The checkpoint first, then the file that names it, then others go."""
    save_checkpoint(out / f"step-{step}", model, optimizer)
    dist.barrier()
    if dist.get_rank() == 0:
        (out / "latest.new").write_text(str(step))
        os.replace(out / "latest.new", out / "latest")
        for other in out.glob("step-*"):
            if other.name != f"step-{step}":
                shutil.rmtree(other)
    dist.barrier()


if __name__ == "__main__":
    main()
