import struct

import numpy as np

from moert.cli.plots import _smooth, plot_expert_load, plot_loss, plot_quantization

RECORD = {
    "settings": {"batch": 4, "sequence": 256, "experts": 4, "top_k": 2},
    "parameters": 6_600_000,
    "losses": [5.5, 4.0, 3.0],
    "heldout": [[2, 3.6], [3, 3.1]],
    "bigram_loss": 2.4,
    "expert_load": [[0.25, 0.25, 0.5, 0.0], [0.25, 0.25, 0.25, 0.25]],
}


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def is_readable(path):
    """A whole PNG file of a size that a person can read."""
    width, height = png_size(path)
    return 800 <= width <= 3000 and 400 <= height <= 2000


def test_pictures_are_whole_png_files_of_a_readable_size(tmp_path):
    for plot in (plot_loss, plot_expert_load):
        path = tmp_path / f"{plot.__name__}.png"
        plot(RECORD, path)
        assert is_readable(path)


def test_a_single_step_can_be_drawn(tmp_path):
    plot_loss({**RECORD, "losses": [5.5], "heldout": [[1, 5.4]]}, tmp_path / "loss.png")
    assert is_readable(tmp_path / "loss.png")


def test_another_load_is_another_picture(tmp_path):
    plot_expert_load(RECORD, tmp_path / "a.png")
    plot_expert_load({**RECORD, "expert_load": [[1.0, 0.0, 0.0, 0.0], [0.25] * 4]}, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_layers_that_stayed_float_are_left_out(tmp_path):
    layers = [{"output_error": None, "router_agreement": 1.0}, {"output_error": 0.1, "router_agreement": None}]
    report = {
        "layers": layers,
        "options": {"format": "int4"},
        "text": {"tokens": 9},
        "perplexity": {"before": 2.0, "after": 2.5},
    }
    plot_quantization(report, tmp_path / "report.png")
    assert is_readable(tmp_path / "report.png")


def test_a_running_mean_does_not_lag():
    ramp = np.arange(50.0)
    assert np.allclose(_smooth(ramp), ramp) and _smooth(np.array([3.0]))[0] == 3.0
    assert np.allclose(_smooth(np.tile([0.0, 2.0], 25))[20:-20], 1, atol=0.1)
