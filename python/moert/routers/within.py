"""The routers inside a model that knows nothing of contexts and routings, as Hugging Face's."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from moert.routers.base import Router, RouterContext, TakesContext
from moert.types import Routing

Given = RouterContext | Callable[[Tensor], RouterContext]


def routers_in(model: nn.Module) -> dict[str, Router]:
    """Every router of the model, by its name in it, in the order of the modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}


def causal_routers_(model: nn.Module, on: bool = True) -> nn.Module:
    """Every router of the model that looks at other tokens decides by each token alone from here on, as decoding needs.

    Those are DepthRouter and ExpertChoiceRouter, whose causal_ says by what; the others do so anyway.
    """
    for router in routers_in(model).values():
        if hasattr(router, "causal_"):
            router.causal_(on)
    return model


@contextmanager
def given_context(model: nn.Module, context: Given | Mapping[str, Given]) -> Iterator[None]:
    """Inside, the model's routers are called with this context, or with their own from a mapping by name.

    A function of a router's x [T, H] gives the context of that call.  What a caller passes itself counts before it,
    field by field.  Routers in a block that only some tokens pass (another TakesContext: MoDBlock, RecursiveStack) have
    what it says of these: the block is called with the context, in their place.
    """
    if isinstance(context, Mapping):
        known = routers_in(model)
        if unknown := context.keys() - known.keys():
            raise ValueError(f"context must name routers of the model, {', '.join(known)}, got {', '.join(unknown)}")
        given = [(known[name], each) for name, each in context.items()]
    else:
        given = [(taker, context) for taker in _takers(model)]
    with ExitStack() as stack:
        for taker, each in given:
            stack.enter_context(_with(taker, "given", each))
        yield


@contextmanager
def _with(module: TakesContext, name: str, each) -> Iterator[None]:
    setattr(module, name, (*getattr(module, name), each))
    try:
        yield
    finally:
        left = list(getattr(module, name))  # others may have come since, or gone
        del left[next(i for i in reversed(range(len(left))) if left[i] is each)]
        setattr(module, name, tuple(left))


def _takers(model: nn.Module) -> Iterator[TakesContext]:
    """Routers, but those within a module that hands the context on: that module."""
    within: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in within):
            continue
        if isinstance(module, TakesContext):
            if not isinstance(module, Router):
                within.append(f"{name}." if name else "")
            yield module


@contextmanager
def recorded_routings(model: nn.Module) -> Iterator[list[tuple[str, Routing]]]:
    """The list that is yielded gets (name of the router, its routing) at each of the model's routers' calls."""
    calls: list[tuple[str, Routing]] = []
    with heard(routers_in(model), lambda name, x, context, routing: calls.append((name, routing))):
        yield calls


@contextmanager
def heard(
    routers: Mapping[str, Router], note: Callable[[str, Tensor, RouterContext | None, Routing], None]
) -> Iterator[None]:
    """Inside, note(name, x, context, routing) is called after each call of these routers."""
    with ExitStack() as stack:
        for name, router in routers.items():
            stack.enter_context(_with(router, "hears", partial(note, name)))
        yield


@contextmanager
def linked_routers(model: nn.Module) -> Iterator[None]:
    """Inside, each router is given as context.previous the routing of the router before it; the first is given none.

    For what goes from layer to layer (RecurrentRouter, GatingResidualRouter).  Before is before among the modules of
    the model, so every forward begins anew, and a layer that is checkpointed is given the same when it runs again.  A
    router that cannot take what the one before it gives is an error here.
    """
    latest: dict[str, Routing] = {}
    for (_, before), (_, router) in pairwise(routers_in(model).items()):
        router.check_previous(before)

    def after(before: str | None) -> Given:
        return lambda x: RouterContext(previous=latest.get(before))

    contexts = {name: after(before) for before, name in pairwise([None, *routers_in(model)])}
    with given_context(model, contexts), _keeping(model, latest):
        yield


@contextmanager
def continued_routers(model: nn.Module) -> Iterator[None]:
    """Inside, each router is given as context.state what it returned as its state at its last call.

    For decoding one batch, from its prompt on, beside a key-value cache (SimilarityRouter, AttentionAwareRouter).
    """
    latest: dict[str, Routing] = {}

    def own(name: str) -> Given:
        return lambda x: RouterContext(state=latest[name].state if name in latest else None)

    contexts = {name: own(name) for name in routers_in(model)}
    with given_context(model, contexts), _keeping(model, latest):
        yield


def _keeping(model: nn.Module, latest: dict[str, Routing]):
    def note(name, x, context, routing):
        latest[name] = routing

    return heard(routers_in(model), note)
