import pytest
import torch

from moert.routers.chunks import chunks_of, same_document


def by_hand(T, chunk, ends):
    index, chunks = [], 0
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        index += [chunks + (t - start) // chunk for t in range(start, end)]
        chunks += -(-(end - start) // chunk)
    return index, chunks


@pytest.mark.parametrize("ends", (None, [0, 20], [0, 7, 8, 20], [0, 0, 5, 5, 20, 20]), ids=str)
@pytest.mark.parametrize("chunk", (1, 4, 64))
def test_chunks_of(chunk, ends):
    index, most, count = chunks_of(20, chunk, None if ends is None else torch.tensor(ends, dtype=torch.int32), "cpu")
    expected, chunks = by_hand(20, chunk, ends or [0, 20])
    assert index.tolist() == expected and count == chunks and most >= chunks


def test_same_document():
    assert same_document(4, None, "cpu").tolist() == [True] * 3
    assert same_document(5, torch.tensor([0, 2, 2, 5]), "cpu").tolist() == [True, False, True, True]


def test_no_tokens():
    assert chunks_of(0, 8, None, "cpu")[0].shape == (0,)
    assert chunks_of(0, 8, torch.tensor([0, 0]), "cpu")[2] == 0


def test_errors():
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        chunks_of(4, 0, None, "cpu")
