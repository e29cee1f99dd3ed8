import numpy as np

from moert.quant import reference


def test_float16_up():
    x = np.array([0, 1, 1 + 2**-11, 1e-9, 65504, 65505, 0.1], np.float32)
    half = reference.float16_up(x)
    assert half.tolist() == [0, 1, 1 + 2**-10, 2**-24, 65504, np.inf, half[6]]
    assert (half.astype(np.float32) >= x).all() and np.float16(0.1) <= half[6] <= 0.1001


def test_nearest_takes_the_even_one_of_two():
    w = np.array([[0.5, 1.5, -2.5, 1.2]], np.float32)
    assert reference.nearest(w, np.array([1], np.float16)).tolist() == [[0, 2, -2, 1]]
    assert reference.nearest(w, np.array([0], np.float16)).tolist() == [[0, 0, 0, 0]]


def test_groups_and_their_way_back():
    w = np.arange(10, dtype=np.float32).reshape(2, 5)
    assert [g.shape for g in reference.groups(w, 2)] == [(2, 2), (2, 2), (2, 1)]
    assert [g.shape for g in reference.groups(w, None)] == [(2, 5)]
    scales = np.array([[1, 2, 3], [4, 5, 6]])
    assert reference.per_column(scales, 5, 2).tolist() == [[1, 1, 2, 2, 3], [4, 4, 5, 5, 6]]
    assert reference.per_column(scales[:, :1], 2, None).tolist() == [[1, 1], [4, 4]]


def test_rows_of_blocks_pads_with_zeros():
    blocks = reference.rows_of_blocks(np.full((2, 33), 3, np.uint8), 2)
    assert blocks.shape == (2, 32, 2) and blocks.sum() == 2 * 33 * 3 and blocks[0, 16].tolist() == [3, 0]


def test_squared_error_and_largest():
    w = np.array([[3, -4, 0]], np.float32)
    assert reference.squared_error(w, np.zeros((1, 3))).tolist() == [25] and reference.largest(w).tolist() == [4]
    assert reference.largest(np.zeros((2, 0), np.float32)).tolist() == [0, 0]


def test_round_groups_without_columns():
    codes, scales, _ = reference.round_groups(np.zeros((3, 0), np.float32), 32, None)
    assert codes.shape == scales.shape == (3, 0)
