"""Exchanges in the graphs of torch.compile: none is left out, and they stay in the order of the program.

Every rank compiles for itself.  Inductor orders what is independent by the memory that it takes, and no pass keeps what
nobody reads, such as results on a rank without tokens: ranks would wait for each other in different exchanges.  What is
not held here: in graphs without gradients Inductor moves operators towards their readers before it lowers them.
"""

from collections.abc import Callable
from functools import cache

from torch._ops import OpOverload
from torch.fx.node import has_side_effect


def register_exchange(op: OpOverload) -> Callable[[], None]:
    """Keeps op in every graph; what is returned must be called before Inductor lowers it, and takes care of its order.

    Not at import: Inductor takes seconds to load.  Effects (torch.library) do not go with data-dependent sizes in torch
    2.13, and Inductor's own rule for collectives knows those of torch alone.
    """
    has_side_effect(op)

    @cache
    def order() -> None:
        from torch._inductor import ir, lowering
        from torch._inductor.virtualized import V

        lower = lowering.fallback_handler(op)

        def lower_in_order(*args, **kwargs):
            graph = V.graph
            begin = len(graph.operations)
            result = lower(*args, **kwargs)
            (kernel,) = (each for each in graph.operations[begin:] if isinstance(each, ir.FallbackKernel))
            before = getattr(graph, "moert_exchange", None)
            if before is not None:
                graph.additional_buffer_deps[kernel.get_operation_name()].add(before)
            graph.moert_exchange = kernel.get_name()
            return result

        lowering.lowerings[op] = lower_in_order

    return order
