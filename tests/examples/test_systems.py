"""Every system's experiment runs (one tiny step of each variant), and docs/systems.md is made from the results."""

import importlib.util
import json

import pytest
import torch

from experiment.page import PAGE, page, results
from experiment.run import ROOT, main
from moert.testing import OperatorsRan

SYSTEMS = sorted((ROOT / "examples" / "systems").glob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(f"system_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EXPERIMENT


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
    assert sorted(listed) == sorted(name for name in every if not name.endswith(("_backward", "_wgrad")))


@pytest.mark.parametrize("path", SYSTEMS, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    experiment = load(path)
    assert experiment.name == path.stem.replace("_", "-")
    with OperatorsRan() as ran:
        main(experiment, ["--quick", "--out", str(tmp_path)])
    assert {name.removesuffix("_backward").removesuffix("_wgrad") for name in ran.names} <= operators_of(experiment)
    written = json.loads((tmp_path / f"{experiment.name}.json").read_text())
    assert list(written["runs"]) == list(experiment.variants)
    assert (tmp_path / f"{experiment.name}.png").stat().st_size > 1000


def test_page_is_that_of_the_results():
    assert PAGE.read_text() == page(results())


def test_every_result_has_its_experiment_and_three_seeds():
    names = {path.stem.replace("_", "-") for path in SYSTEMS}
    for result in results():
        assert result["name"] in names and len(result["seeds"]) >= 3
