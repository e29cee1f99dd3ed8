"""Traces for the tests of this folder and of placement."""

import numpy as np

from moert.analysis import LayerTrace, RoutingTrace


def layer(ids, num_experts, calls=None, name="a"):
    ids = np.asarray(ids, dtype=np.int16)
    return LayerTrace(name, num_experts, ids, np.array([len(ids)] if calls is None else calls, dtype=np.int64))


def random_trace(layers=3, T=60, k=2, E=8, calls=(10, 0, 50), seed=0):
    """Distinct choices, some experts more popular than others, one choice in ten dropped."""
    rng = np.random.default_rng(seed)

    def ids():
        popular = rng.random(E) * 1.5
        chosen = np.argsort(rng.gumbel(size=(T, E)) + popular, axis=1)[:, :k]
        return np.where(rng.random((T, k)) < 0.1, -1, chosen)

    return RoutingTrace(tuple(layer(ids(), E, calls, f"layers.{i}") for i in range(layers)))
