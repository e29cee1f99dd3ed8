"""Trains the model of `moert run` on the standard library's source, its experts spread over the ranks of torchrun.

    torchrun --nproc-per-node 2 --max-restarts 3 examples/train_ep.py OUT [--steps 200]

Goes on from the last checkpoint in OUT, on any number of ranks; a step that was printed as saved is never made again.
When all are made OUT/model is a Hugging Face checkpoint: `moert run --model OUT/model --prompt "def read("`.
"""

import argparse
import os
import shutil
from logging import getLogger
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import Qwen3MoeForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from moert.cli.checkpoint import byte_tokenizer
from moert.cli.corpus import load_corpus
from moert.cli.demo_train import DemoSettings
from moert.parallel import load_checkpoint, save_checkpoint

DEMO = DemoSettings()


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
    logging.disable_progress_bar()
    model = spread(options.out / "untrained", ranks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)  # foreach wants one mesh
    train(model, optimizer, load_corpus().train, options)
    write(options.out / "model", model)
    dist.destroy_process_group()


def init_process_group() -> None:
    """With keys of this start alone: torchrun's store still has the addresses of the last one, which Gloo would use."""
    store, rank, ranks = next(dist.rendezvous("env://"))
    store = dist.PrefixStore("start " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)


def spread(untrained: Path, ranks: int) -> Qwen3MoeForCausalLM:
    """Each rank has its block of every layer's experts, and of everything else what FSDP2 leaves it."""
    if dist.get_rank() == 0 and not untrained.exists():
        torch.manual_seed(DEMO.seed)
        Qwen3MoeForCausalLM(DEMO.config()).save_pretrained(untrained.with_suffix(".new"))
        untrained.with_suffix(".new").rename(untrained)
    dist.barrier()
    layout = DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation="moert") if ranks > 1 else None
    return Qwen3MoeForCausalLM.from_pretrained(untrained, distributed_config=layout, experts_implementation="moert")


def train(model: Qwen3MoeForCausalLM, optimizer: torch.optim.Optimizer, text: Tensor, options) -> None:
    done, console = last_step(options.out), Console(quiet=dist.get_rank() != 0)
    if done:
        load_checkpoint(options.out / f"step-{done}", model, optimizer)
    console.print(f"goes on after step {done}" if done else "begins")
    columns = TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[loss]}")
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("", total=options.steps, completed=done, loss="")
        for step in range(done + 1, options.steps + 1):
            optimizer.zero_grad()
            ids = windows(text, step, options.batch)
            output = model(input_ids=ids, labels=ids, use_cache=False, output_router_logits=True)
            output.loss.backward()
            optimizer.step()
            loss = (output.loss - DEMO.balance * output.aux_loss).detach()  # of the text alone
            progress.update(task, completed=step, loss=f"loss {loss.item():.3f} nats a byte")
            if step % options.save_every == 0 or step == options.steps:
                save(options.out, step, model, optimizer)
                dist.all_reduce(loss)
                console.print(f"saved step {step}, loss {loss.item() / dist.get_world_size():.6f}")


def windows(text: Tensor, step: int, batch: int) -> Tensor:
    """This rank's part of the windows of a step, which are the same however many ranks there are."""
    starts = torch.randint(len(text) - DEMO.sequence, (batch, 1), generator=torch.Generator().manual_seed(step))
    return text[starts + torch.arange(DEMO.sequence)].long().chunk(dist.get_world_size())[dist.get_rank()]


def last_step(out: Path) -> int:
    """Of the checkpoint that is complete; 0 where there is none."""
    latest = out / "latest"
    return int(latest.read_text()) if latest.exists() else 0


def save(out: Path, step: int, model: Qwen3MoeForCausalLM, optimizer: torch.optim.Optimizer) -> None:
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


def write(folder: Path, model: Qwen3MoeForCausalLM) -> None:
    """In a folder beside, which takes the name when all is in it."""
    # Two gathers one after the other, of FSDP2 and of experts, are no cause for a warning on every rank here.
    getLogger("torch.distributed.tensor._redistribute").setLevel("ERROR")
    model.save_pretrained(folder.with_suffix(".new"))
    dist.barrier()
    if dist.get_rank() == 0:
        byte_tokenizer().save_pretrained(folder.with_suffix(".new"))
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".new").rename(folder)


if __name__ == "__main__":
    main()
