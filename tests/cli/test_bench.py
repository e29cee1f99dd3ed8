import pytest
import typer

from moert.cli.bench import bench
from moert.cli.errors import CommandError


class Context:
    args = ["--op", "permute"]


def test_needs_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CommandError, match=r"current directory must be a checkout of moert with bench/run.py, got"):
        bench(Context())


def test_passes_arguments_and_exit_code_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "run.py").write_text("import sys; sys.exit(7 if sys.argv[1:] == ['--op', 'permute'] else 0)")
    with pytest.raises(typer.Exit) as done:
        bench(Context())
    assert done.value.exit_code == 7
