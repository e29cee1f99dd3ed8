import pytest
import torch

from moert.quant import Int4, Int4Asymmetric, Int8, Mxfp4, SubOneBit, Ternary2, Ternary5
from moert.quant.grid import Grid, SubOneGrid, grids_of

FORMATS = [Int8(), Int8(64), Int4(), Int4Asymmetric(128), Mxfp4(), Ternary2(), Ternary5(32)]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_column_by_column_as_packed_at_once(fmt):
    w = torch.randn(3, 20, 161)
    w[0, 0] = 0
    w[1, 2, :64] *= 1e-7
    grid, packed = Grid(fmt, w), fmt.pack(w)
    columns = [grid.round(w[:, :, i], torch.full((3,), i)) for i in range(161)]
    codes, values = (torch.stack(parts, 2) for parts in zip(*columns, strict=True))
    mine = grid.pack(codes)
    assert torch.equal(mine.codes, packed.codes) and torch.equal(mine.scales, packed.scales)
    assert torch.equal(values, fmt.unpack(packed))


def test_ties_of_mxfp4_go_to_the_even_code():
    w = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -5]).view(1, 1, 11)
    grid = Grid(Mxfp4(), w)
    got = [grid.round(w[:, :, i], torch.tensor([i]))[0].item() for i in range(11)]
    assert got == [7, 0, 2, 2, 4, 4, 6, 6, 8, 10, 14]


def test_columns_of_each_matrix():
    w = torch.randn(2, 4, 64)
    grid, packed = Grid(Int4(), w), Int4().unpack(Int4().pack(w))
    values = grid.round(torch.stack([w[0, :, 3], w[1, :, 40]]), torch.tensor([3, 40]))[1]
    assert torch.equal(values, torch.stack([packed[0, :, 3], packed[1, :, 40]]))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_far_values_take_the_nearest_end(fmt):
    w = torch.randn(1, 6, 32)
    grid = Grid(fmt, w)
    for sign in (-1, 1):
        codes, values = grid.round(torch.full((1, 6), sign * 1e4), torch.zeros(1, dtype=torch.long))
        near = grid.round(torch.full((1, 6), sign * 50.0), torch.zeros(1, dtype=torch.long))
        assert torch.equal(codes, near[0]) and torch.equal(values, near[1]) and values.abs().max() < 10


def test_sub_one_bit_as_packed_at_once():
    w = torch.randn(2, 20, 161)
    w[0, 0], w[0, 1], w[0, 2] = 0, w[0, 1].abs(), -w[0, 2].abs()
    grid, packed = SubOneGrid(w), SubOneBit().pack(w)
    columns = [grid.round(w[:, :, i], torch.full((2,), i)) for i in range(161)]
    codes, values = (torch.stack(parts, 2) for parts in zip(*columns, strict=True))
    mine = grid.pack(codes)
    assert torch.equal(mine.codes, packed.codes) and torch.equal(mine.minmax, packed.minmax)
    assert torch.equal(values, SubOneBit().unpack(packed))
    # A row of one sign never takes the other.
    assert (grid.round(torch.full((2, 20), -9.0), torch.zeros(2))[1][0, 1] == 0).all()


def test_wider_grids_and_rows_of_several():
    w = torch.randn(2, 5, 64)
    grids = grids_of(Ternary2(32), w)
    assert [len(grids_of(fmt, w)) for fmt in (Int8(), Mxfp4(), SubOneBit(), Ternary5())] == [1, 1, 1, 3]
    scale = grids[0].packed_scales.float()
    assert torch.equal(grids[2].packed_scales.float(), 2 * scale)
    choice = torch.tensor([[0, 1, 2, 1, 0], [2, 2, 0, 0, 1]])
    mixed = grids[0].rows_of(grids, choice)
    for g in range(2):
        for r in range(5):
            assert torch.equal(mixed.packed_scales[g, r], grids[choice[g, r]].packed_scales[g, r])
    assert Grid(Int8(), torch.full((1, 1, 32), 6e6)).wider(2).packed_scales.item() == 65504
