"""Trains the demonstration: a byte-level Qwen3-MoE on the standard library's source, every expert run by moert.

Letters: T tokens of a step, L layers, E experts, k choices per token.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moert.integrations.transformers  # noqa: F401  registers the implementation "moert"
from moert.cli.corpus import Corpus, bigram_loss, evenly_spaced


@dataclass(frozen=True)
class DemoSettings:
    """Everything the trained weights depend on; training ends at `steps` or, on a slow machine, after `seconds`."""

    layers: int = 4
    hidden: int = 128
    heads: int = 2
    experts: int = 32
    top_k: int = 2
    intermediate: int = 128
    sequence: int = 256
    batch: int = 4
    steps: int = 600
    learning_rate: float = 4e-3
    warmup: int = 20
    balance: float = 0.01
    seconds: float = 90.0
    seed: int = 0
    implementation: str = "moert"

    def config(self) -> Qwen3MoeConfig:
        return Qwen3MoeConfig(
            vocab_size=256,
            hidden_size=self.hidden,
            moe_intermediate_size=self.intermediate,
            intermediate_size=4 * self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            head_dim=self.hidden // self.heads,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            norm_topk_prob=True,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            router_aux_loss_coef=self.balance,
        )


@dataclass(frozen=True)
class Step:
    """What a step tells whoever watches: its number from 1, loss in nats per byte, and expert load [L, E]."""

    step: int
    loss: float
    tokens_per_second: float
    load: Tensor


@dataclass
class TrainingRecord:
    """The numbers of one training: heldout holds (step, loss after it), expert_load [L, E] sums to 1 in each layer."""

    settings: dict
    parameters: int
    active_parameters: int
    train_bytes: int
    heldout_bytes: int
    heldout_files: int
    bigram_loss: float
    losses: list[float] = field(default_factory=list)
    heldout: list[tuple[int, float]] = field(default_factory=list)
    expert_load: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    device: str = "cpu"

    @property
    def heldout_loss(self) -> float:
        return self.heldout[-1][1]


def train(
    settings: DemoSettings,
    corpus: Corpus,
    on_step: Callable[[Step], None],
    started: float | None = None,
    device: str = "cpu",
) -> tuple[Qwen3MoeForCausalLM, TrainingRecord]:
    """Same settings, text and number of threads: same weights on a CPU, unless time ran out at another step.

    A GPU begins with a CPU's weights and takes its windows of text; torch's own operators may differ from run to run.
    """
    started = time.monotonic() if started is None else started
    torch.manual_seed(settings.seed)
    model = Qwen3MoeForCausalLM._from_config(settings.config(), experts_implementation=settings.implementation)
    model = model.to(device)
    heldout = evenly_spaced(corpus.heldout, settings.sequence, 128)
    record = _new_record(settings, model, corpus, bigram_loss(corpus.train, heldout), device)
    optimizer = make_optimizer(model)
    generator = torch.Generator().manual_seed(settings.seed)
    begun = time.monotonic()
    for step in range(settings.steps):
        # The learning rate falls to zero with whichever of steps and time runs out first.
        progress = max(step / settings.steps, (time.monotonic() - started) / settings.seconds)
        if progress >= 1:
            break
        _set_learning_rate(optimizer, settings.learning_rate * min(1, (step + 1) / settings.warmup) * (1 - progress))
        loss, load = train_step(model, optimizer, random_windows(corpus.train, settings, generator).to(device))
        record.losses.append(loss)
        record.tokens_per_second = (step + 1) * settings.batch * settings.sequence / (time.monotonic() - begun)
        if (step + 1) % max(1, settings.steps // 5) == 0 and step + 1 < settings.steps:
            record.heldout.append((step + 1, evaluate(model, heldout[::4])[0]))
        on_step(Step(step + 1, loss, record.tokens_per_second, load))
    loss, load = evaluate(model, heldout)
    record.heldout.append((len(record.losses), loss))
    record.expert_load = (load / load.sum(1, keepdim=True)).tolist()
    record.seconds = time.monotonic() - started
    return model.eval(), record


@torch.no_grad()
def evaluate(model: Qwen3MoeForCausalLM, windows: Tensor) -> tuple[float, Tensor]:
    """Nats per byte of all but the first byte of each window, and the choices that fell on each expert [L, E]."""
    training = model.training
    model.eval()
    total, load = 0.0, 0
    for ids in windows.to(model.device).split(16):
        output = model(input_ids=ids, output_router_logits=True, use_cache=False)
        total += _next_byte_loss(output.logits, ids).item() * len(ids)
        load = load + expert_load(output.router_logits, model.config)
    model.train(training)
    return total / len(windows), load


def expert_load(router_logits: tuple[Tensor, ...], config: Qwen3MoeConfig) -> Tensor:
    """How often each expert was chosen: router_logits L x [T, E] -> counts [L, E]."""
    chosen = [logits.topk(config.num_experts_per_tok).indices.flatten() for logits in router_logits]
    return torch.stack([torch.bincount(ids, minlength=config.num_experts) for ids in chosen])


def make_optimizer(model) -> torch.optim.Optimizer:
    """Its learning rate is zero until it is set."""
    return torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.05, fused=True)


def train_step(model, optimizer, ids: Tensor) -> tuple[float, Tensor]:
    """ids [windows, sequence] -> nats per byte before the step, and the choices that fell on each expert [L, E]."""
    output = model(input_ids=ids, output_router_logits=True, use_cache=False)
    loss = _next_byte_loss(output.logits, ids)
    (loss + model.config.router_aux_loss_coef * _balance_loss(output.router_logits, model.config)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), expert_load(output.router_logits, model.config)


def _next_byte_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def _balance_loss(router_logits: tuple[Tensor, ...], config: Qwen3MoeConfig) -> Tensor:
    """The load balance loss of each layer by itself, then the mean: 1 where every expert gets its share.

    A mean over layers before the product, as in transformers, lets one layer's idle experts hide behind another's.
    """
    shares = expert_load(router_logits, config) / (len(router_logits[0]) * config.num_experts_per_tok)
    chances = torch.stack([logits.float().softmax(-1).mean(0) for logits in router_logits])
    return config.num_experts * (shares * chances).sum(1).mean()


def random_windows(data: Tensor, settings: DemoSettings, generator: torch.Generator) -> Tensor:
    """ids [batch, sequence] of a step."""
    starts = torch.randint(len(data) - settings.sequence + 1, (settings.batch, 1), generator=generator)
    return data[starts + torch.arange(settings.sequence)].long()


def _set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def _new_record(settings: DemoSettings, model, corpus: Corpus, bigram: float, device: str) -> TrainingRecord:
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    parameters = sum(p.numel() for p in model.parameters())
    return TrainingRecord(
        settings=asdict(settings),
        parameters=parameters,
        active_parameters=parameters - experts + experts * settings.top_k // settings.experts,
        train_bytes=len(corpus.train),
        heldout_bytes=len(corpus.heldout),
        heldout_files=corpus.files[1],
        bigram_loss=bigram,
        device=device,
    )
