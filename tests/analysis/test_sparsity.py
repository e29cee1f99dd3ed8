import torch

from moert.analysis import chunk_level_sparsity, token_level_sparsity

HAND = torch.tensor([[1.0, 0, 0], [0.5, 0, 0], [0, 2, 0], [0, 0, 0]])  # 3 experts


def test_by_hand():
    assert token_level_sparsity(HAND).item() == 0.75
    assert chunk_level_sparsity(HAND, 1).item() == 0.75
    assert abs(chunk_level_sparsity(HAND, 2) - 2 / 3) < 1e-6  # {0}, {1}
    assert abs(chunk_level_sparsity(HAND, 4) - 1 / 3) < 1e-6  # {0, 1}
    # Documents of 1 and 3 tokens in chunks of 2: {0}, {0, 1}, {}.
    assert abs(chunk_level_sparsity(HAND, 2, torch.tensor([0, 1, 4])) - 6 / 9) < 1e-6


def test_larger_chunks_are_never_sparser():
    weights = torch.randn(64, 16).relu() * (torch.rand(64, 16) < 0.3)
    values = [chunk_level_sparsity(weights, c).item() for c in (1, 2, 4, 8, 16, 32, 64)]
    assert values[0] == token_level_sparsity(weights).item()
    assert all(a >= b for a, b in zip(values[:-1], values[1:], strict=True)) and values[0] > values[-1]
