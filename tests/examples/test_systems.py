"""Every system's experiment runs (one tiny step of each variant), and docs/systems.md is made from the results."""

import importlib.util
import json

import pytest

from experiment.page import PAGE, page, results
from experiment.run import ROOT, main

SYSTEMS = sorted((ROOT / "examples" / "systems").glob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(f"system_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EXPERIMENT


@pytest.mark.parametrize("path", SYSTEMS, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    experiment = load(path)
    assert experiment.name == path.stem.replace("_", "-")
    main(experiment, ["--quick", "--out", str(tmp_path)])
    written = json.loads((tmp_path / f"{experiment.name}.json").read_text())
    assert list(written["runs"]) == list(experiment.variants)
    assert (tmp_path / f"{experiment.name}.png").stat().st_size > 1000


def test_page_is_that_of_the_results():
    assert PAGE.read_text() == page(results())


def test_every_result_has_its_experiment_and_three_seeds():
    names = {path.stem.replace("_", "-") for path in SYSTEMS}
    for result in results():
        assert result["name"] in names and len(result["seeds"]) >= 3
