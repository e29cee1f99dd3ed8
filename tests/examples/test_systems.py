"""Every system's experiment runs (one tiny step of each variant), and docs/systems.md is made from the results."""

import json

import pytest
import torch

from experiment.page import PAGE, experiments, page, results
from experiment.run import ROOT, main, said
from moert.testing import OperatorsRan

EXPERIMENTS = experiments()


def rows():
    """docs/operators.md: the operators of each row, and the row."""
    lines = [line for line in (ROOT / "docs" / "operators.md").read_text().splitlines() if line.startswith("| [")]
    return [(line[3 : line.index("]")].split(", "), line) for line in lines]


def operators_of(experiment):
    """Those whose row names the system."""
    return {name for names, row in rows() if experiment.title.split(",")[0] in row for name in names}


def test_the_page_has_every_operator():
    every = {name.removeprefix("moert::") for name in torch._C._dispatch_get_all_op_names() if "moert::" in name}
    listed = [name for names, _ in rows() for name in names]
    assert sorted(listed) == sorted(name for name in every if not name.endswith(("_backward", "_backward_", "_wgrad")))


def test_a_file_is_named_as_its_experiment():
    stems = {path.stem.replace("_", "-") for path in (ROOT / "examples" / "systems").glob("*.py")}
    assert EXPERIMENTS.keys() == stems


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS.keys())
def test_runs(experiment, tmp_path):
    with OperatorsRan() as ran:
        main(experiment, ["--quick", "--out", str(tmp_path)])
    assert {name.removesuffix("_backward").removesuffix("_wgrad") for name in ran.names} <= operators_of(experiment)
    written = json.loads((tmp_path / f"{experiment.name}.json").read_text())
    assert list(written["runs"]) == list(experiment.variants)
    assert (tmp_path / f"{experiment.name}.png").stat().st_size > 1000


def test_page_is_that_of_the_results():
    assert PAGE.read_text() == page(results())


def test_every_result_is_that_of_its_experiment():
    """What it says of itself, and the figures of its variants over at least three seeds."""
    found = {result["name"]: result for result in results()}
    assert found.keys() == EXPERIMENTS.keys()
    for name, experiment in EXPERIMENTS.items():
        result = found[name]
        assert result == result | json.loads(json.dumps(said(experiment)))
        assert len(result["seeds"]) >= 3 and list(result["runs"]) == list(experiment.variants)
