"""What parts of routers cost that no operator of their own computes, beside the call that they belong to.

docs/systems/*.md quotes these figures: an operator is worth its code where a part is a share of its call that shows.
"""

import argparse
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from moert import GluExperts, MoELayer, RouterContext, permute, permute_plan, topk_gating, unpermute
from moert.experts import BlockExperts
from moert.layers import FeedForward, PackedBlock, RecursiveStack
from moert.routers import DeepSeekRouter, PrototypeRouter, ReLUNormRouter, expert_load
from moert.types import Routing
from timing import interleaved


def counts():
    """DeepSeekMoE: the experts' loads, from the ids that the gating operator returns."""
    for T in (512, 4096):
        x = torch.randn(T, 512)
        layer = MoELayer(DeepSeekRouter(512, 64, 6), GluExperts(64, 512, 352), FeedForward(512, 704))
        routing = layer.router(x)

        def step(layer=layer, x=x):
            layer(x).sum().backward()

        parts = {
            "counting": lambda routing=routing: expert_load(routing),
            "topk_gating": lambda routing=routing: topk_gating(routing.logits, 6),
            "the layer, forward and backward": step,
        }
        yield f"counts of experts, T {T}, 64 experts, 6 chosen", parts


def relu_norm():
    """BlockFFN: ReLU, RMSNorm and ids in torch; ids of a whole row, where compacted ones would be fewer."""
    router, experts = ReLUNormRouter(1280, 40), BlockExperts(1280, 40, 128)
    with torch.no_grad():
        router.weight.mul_(3)
        for T in (1, 512):
            x = torch.randn(T, 1280)
            router.logit_bias = torch.nn.Parameter(torch.full((40,), -1.45))  # about four of five experts are off
            routing = router(x)
            on = routing.ids < 40
            k = int(on.sum(1).max())
            order = (~on).sort(dim=1, stable=True).indices[:, :k]
            few = Routing(routing.ids.gather(1, order), routing.weights.gather(1, order), 40)
            logits = routing.logits

            def rule(logits=logits):
                on = logits.relu()
                torch.nn.functional.rms_norm(on, (40,), router.gain, router.eps)
                torch.where(on > 0, torch.arange(40, dtype=torch.int32), 40)

            parts = {
                "ReLU, RMSNorm, ids": rule,
                "fused_experts, ids [T, 40]": lambda x=x, r=routing: experts._token(x, r),
                f"fused_experts, ids [T, {k}]": lambda x=x, r=few: experts._token(x, r),
                "union_experts": lambda x=x, r=routing: experts._union(x, r),
            }
            parts = {name: _without_gradient(part) for name, part in parts.items()}
            yield f"BlockFFN, T {T}, {on.float().mean():.0%} of 40 blocks of 128 in use, H 1280", parts


def logit_bias():
    """Rewiring: a bias that is added to the logits before the gating operator reads them."""
    for T in (1, 512):
        x, router, bias = torch.randn(T, 2048), DeepSeekRouter(2048, 64, 8), torch.randn(64)
        logits = router(x).logits.detach()
        experts = GluExperts(64, 2048, 1024)
        routing = Routing(*reversed(topk_gating(logits, 8)), 64)
        parts = {
            "logits + bias": lambda logits=logits: logits + bias,
            "topk_gating": lambda logits=logits: topk_gating(logits, 8),
            "the logits": lambda x=x: router.unbiased_logits(x),
            "the experts": lambda x=x, r=routing: experts(x, r),
        }
        yield f"a bias of logits, T {T}, 64 experts, H 2048", {n: _without_gradient(p) for n, p in parts.items()}


def depths():
    """Mixture-of-Recursions, a depth per token: a plan, a gather and a scatter for each depth."""
    for H in (64, 512):
        x, rows = torch.randn(8, 64, H), torch.randn(512, H)
        stack = RecursiveStack([PackedBlock(H, 4, FeedForward(H, 4 * H), i) for i in range(2)], 3, H, mode="token")
        sequence, depth = torch.arange(8).repeat_interleave(64), stack.routers[0](rows).ids[:, 0]

        def moving(rows=rows, sequence=sequence, depth=depth):
            for r in range(3):
                plan = permute_plan(torch.where(depth >= r, sequence, 8)[:, None], 8)
                unpermute(permute(rows, plan), plan, residual=rows)

        parts = {"plans, gathers and scatters": moving, "the stack": lambda stack=stack, x=x: stack(x)}
        yield f"three depths, 512 tokens, H {H}", {name: _without_gradient(part) for name, part in parts.items()}


def segments():
    """ProMoE: sums of each prototype's tokens, by adding rows in place and by a plan's sorted rows."""
    for T, H in ((1024, 64), (16_384, 768)):
        x, router = torch.randn(T, H), PrototypeRouter(H, 12)
        context = RouterContext(conditional=torch.ones(T, dtype=torch.bool))
        ids = router(x, context).ids

        def by_plan(x=x, ids=ids):
            plan = permute_plan(ids, 13)
            return torch.segment_reduce(permute(x, plan), "sum", offsets=plan.offsets.long(), unsafe=True)

        parts = {
            "index_add": lambda x=x, ids=ids: x.new_zeros(13, x.shape[1]).index_add(0, ids[:, 0], x),
            "plan, permute, segment_reduce": by_plan,
            "the router with its loss": lambda x=x, r=router, c=context: r(x, c),
        }
        yield f"sums by prototype, T {T}, H {H}", {name: _without_gradient(part) for name, part in parts.items()}


def _without_gradient(part):
    def run():
        with torch.no_grad():
            part()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each part")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--warm", action="store_true", help="caches that hold what the call before left there")
    parser.add_argument("--smoke", action="store_true", help="one call of each part")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    how = {"seconds": 0.0, "rounds": 1} if options.smoke else {"seconds": options.seconds}
    for cases in (counts, relu_norm, logit_bias, depths, segments):
        for title, parts in cases():
            table = Table("part", "microseconds", title=f"{title}, {torch.get_num_threads()} threads")
            for name, times in interleaved(parts, **how, cold=not options.warm).items():
                table.add_row(name, f"{1e6 * median(times):.0f}")
            Console().print(table)


if __name__ == "__main__":
    main()
