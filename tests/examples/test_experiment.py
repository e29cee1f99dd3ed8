import json
import os

import pytest
import torch

from experiment import Claim, Experiment, main
from experiment.declare import interval
from experiment.page import page


def toy(**changes):
    def variant(offset):
        def run(seed, progress):
            total = sum(1 for _ in progress.steps(5))
            return {"loss": offset + 0.1 * seed + total, "extra": 1.0} if offset else {"loss": 0.1 * seed + total}

        return run

    said = {
        "name": "toy",
        "title": "Toy",
        "paper": "arXiv:0000.00000",
        "classes": ("MoELayer",),
        "figures": {"loss": "nats", "extra": "per cent"},
        "claims": (
            Claim("lower loss than the baseline", "loss", "lower", "toy", "baseline"),
            Claim("loss above 5.05", "loss", "higher", "toy", 5.05),
            Claim("half the loss of the baseline", "loss", "lower", "toy", "baseline", 0.5),
        ),
        "equal": "equal parameters",
        "variants": {"baseline": variant(1.0), "toy": variant(0.0)},
    }
    return Experiment(**(said | changes))


def test_figures_of_every_seed_and_verdicts(tmp_path, capsys):
    result = main(toy(), ["--out", str(tmp_path)])
    assert json.loads((tmp_path / "toy.json").read_text()) == result
    assert result["runs"]["toy"][:2] == [{"loss": 5.0}, {"loss": 5.1}]
    assert result["runs"]["baseline"][2] == pytest.approx({"loss": 6.2, "extra": 1.0})
    assert result["seeds"] == [0, 1, 2] and result["machine"]["torch"] and result["commit"] and result["date"]
    text = " ".join(capsys.readouterr().out.split())
    assert "lower loss than the baseline: shown: loss of toy 5.10 ± 0.10, asked ≤ baseline 6.10 ± 0.10 (nats)" in text
    assert (
        "loss above 5.05: in the mean only, by -0.2 to 0.3 (95 %): loss of toy 5.10 ± 0.10, asked ≥ 5.05 (nats)" in text
    )
    assert "half the loss of the baseline: not shown:" in text and "asked ≤ 0.5 x baseline 6.10 ± 0.10" in text
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")


def test_the_number_of_processes_changes_nothing(tmp_path):
    def variant(seed, progress):
        return {"loss": torch.randn(()) + sum(progress.steps(3))}

    experiment = toy(variants={"baseline": variant, "toy": variant}, seeds=4)
    one, two = (main(experiment, ["--out", str(tmp_path), "--processes", n]) for n in "13")
    assert one["runs"] == two["runs"] and one["seeds"] == [0, 1, 2, 3]
    assert len({run["loss"] for run in one["runs"]["toy"]}) == 4 and one["runs"]["toy"] == one["runs"]["baseline"]


def where(seed, progress):
    return {"loss": os.getpid(), "extra": torch.get_num_threads()}


def test_where_a_variant_runs(tmp_path):
    """What is timed runs in this process; the others in one of their own, or in one per seed, of one thread."""
    variants = {"baseline": where, "toy": where, "time": where}

    def run(**changes):
        result = main(toy(variants=variants, timed=("time",), **changes), ["--out", str(tmp_path), "--processes", "2"])
        pids = {name: [run["loss"] for run in runs] for name, runs in result["runs"].items()}
        assert set(pids["time"]) == {os.getpid()} and os.getpid() not in pids["baseline"] + pids["toy"]
        assert all(run["extra"] == 1 for run in result["runs"]["toy"])
        return pids

    apart, together = run(), run(together=True)
    assert len(set(apart["baseline"] + apart["toy"])) == 6
    assert together["baseline"] == together["toy"] and len(set(together["toy"])) == 3


def test_a_process_that_fails_ends_the_run(tmp_path, capfd):
    def fails(seed, progress):
        raise ArithmeticError("no figure today")

    # Which of the two is seen first is a matter of luck.
    with pytest.raises(RuntimeError, match=r"\[\('(baseline|toy)', 0\)\] ended with exit code 1, see above"):
        main(toy(variants={"baseline": fails, "toy": fails}), ["--out", str(tmp_path), "--processes", "2"])
    assert "no figure today" in capfd.readouterr().err


def test_the_command_that_gives_the_figures(tmp_path):
    def command(*arguments, **changes):
        return main(toy(name="to-y", **changes), ["--out", str(tmp_path), *arguments])["command"]

    assert command("--processes", "1") == command("--seeds", "5", seeds=5) == "python examples/systems/to_y.py"
    more = "python examples/systems/to_y.py --seeds 2 --first-seed 7"
    assert command("--seeds", "2", "--first-seed", "7") == more


def test_quick_is_one_step_of_one_seed(tmp_path):
    assert main(toy(), ["--quick", "--out", str(tmp_path)])["runs"]["toy"] == [{"loss": 1.0}]


def test_some_variants_alone_write_nothing(tmp_path):
    assert list(main(toy(), ["--variant", "toy", "--out", str(tmp_path)])["runs"]) == ["toy"]
    assert not list(tmp_path.iterdir())


def test_page_has_a_row_per_claim(tmp_path):
    text = page([main(toy(notes="tried twice as long."), ["--out", str(tmp_path)])])
    rows = [line for line in text.splitlines() if line.startswith("| Toy |")]
    assert len(rows) == 3 and "[arXiv:0000.00000](https://arxiv.org/abs/0000.00000) | `MoELayer` |" in rows[0]
    assert "shown: loss of toy 5.1" in rows[0] and "; `python examples/systems/toy.py`, 3 seeds, " in rows[0]
    assert "- **Toy**: tried twice as long." in text and " s of a core; equal parameters |" in rows[0]


def test_interval_of_a_mean():
    low, high = interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.30 / 3**0.5, 2 + 4.30 / 3**0.5))
    many = interval([0.0, 2.0] * 50)
    assert many == pytest.approx((1 - 2.11 * 1.00504 / 10, 1 + 2.11 * 1.00504 / 10), rel=1e-4)


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="better must be lower or higher, got more"):
        Claim("", "loss", "more", "toy", 1.0)
    with pytest.raises(ValueError, match="figure must be one of loss, extra, got speed"):
        toy(claims=(Claim("", "speed", "lower", "toy", 1.0),))
    with pytest.raises(ValueError, match=r"timed must be among baseline, toy, got \{'other'\}"):
        toy(timed=("other",))
    with pytest.raises(ValueError, match="variant must be one of baseline, toy, got other"):
        toy(claims=(Claim("", "loss", "lower", "toy", "other"),))
    with pytest.raises(ValueError, match=r"figures must be among loss, extra, got \{'speed'\}"):
        main(toy(variants={"baseline": lambda *_: {"speed": 1}, "toy": None}), ["--quick", "--out", str(tmp_path)])
