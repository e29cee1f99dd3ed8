"""A placement on real ranks: same outputs as any other, and the rows that travel are those of the replay."""

import numpy as np
import torch
import torch.distributed as dist

from analysis.traces import random_trace
from moert import GluExperts
from moert.analysis import RoutingTrace
from moert.ops import dispatch
from moert.parallel import ExpertParallel
from moert.placement import ExpertPlacement, Topology, contiguous, moetuner_placement, replay
from moert.types import Routing
from ranks import ranks

T, H, E, R = 64, 16, 8, 4
TRACE = random_trace(layers=2, T=T, E=E, calls=(T,))


def everything():
    """Experts, rows and the first layer's routing, the same on every rank."""
    torch.manual_seed(0)
    experts, x = GluExperts(E, H, 8), torch.randn(T, H)
    ids = torch.from_numpy(TRACE.layers[0].ids)
    return experts, x, Routing(ids, torch.rand(ids.shape), E)


def of_rank(paths: list[str]) -> list[tuple[list[int], list[list[float]]]]:
    """For the placement of each file: rows sent to each rank, and y of this rank's tokens."""
    rank, (experts, x, routing), results = dist.get_rank(), everything(), []
    mine = slice(rank * T // R, (rank + 1) * T // R)
    for path in paths:
        placement = ExpertPlacement.load(path).by_module()["layers.0"]
        layer = ExpertParallel(experts, placement=placement, local_size=R // 2)
        own = Routing(routing.ids[mine], routing.weights[mine], E)
        with torch.no_grad():
            sent = dispatch(x[mine], layer.copies.routed(own), layer.map).splits.sent
            results.append((list(sent), layer(x[mine], own).tolist()))
    return results


def test_outputs_are_the_same_and_rows_as_predicted(tmp_path):
    topology, (experts, x, routing) = Topology(R, 2), everything()
    with torch.no_grad():
        expected = experts(x, routing)
    tuned, copied = (moetuner_placement(TRACE, topology, extra=n).placement for n in (0, 2))
    assert copied.layers[0].replicas
    placements = contiguous(TRACE, R), tuned, copied
    first = [ExpertPlacement(R, placement.layers[:1]) for placement in placements]
    paths = [str(tmp_path / f"{i}.json") for i in range(len(first))]
    for placement, path in zip(first, paths, strict=True):
        placement.save(path)
    sent = []
    for placement, of_ranks in zip(first, zip(*ranks(R, of_rank, paths), strict=True), strict=True):
        y = torch.tensor([row for _, rows in of_ranks for row in rows])
        assert torch.allclose(y, expected, rtol=1e-6, atol=1e-6)
        sent.append(np.array([counts for counts, _ in of_ranks]))
        assert np.array_equal(sent[-1], replay(RoutingTrace(TRACE.layers[:1]), placement, topology).rows)
    assert not any(np.array_equal(sent[i], sent[j]) for i, j in ((0, 1), (1, 2)))
