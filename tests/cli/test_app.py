import subprocess
import sys
from importlib.metadata import version

import typer
from typer.testing import CliRunner

import moert.cli.app as app_module
from moert.cli.errors import CommandError


def moert(*arguments):
    return subprocess.run([sys.executable, "-m", "moert", *arguments], capture_output=True, text=True)


def test_help_lists_the_commands():
    done = moert("--help")
    assert done.returncode == 0
    for command in ("run", "quantize", "place", "info", "bench"):
        assert f" {command} " in done.stdout


def test_version():
    assert moert("--version").stdout == f"moert {version('moert')}\n"


def test_bad_input_is_one_line_and_exit_code_two(tmp_path):
    done = moert("run", "--model", str(tmp_path / "nothing"), "--prompt", "a")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"moert run: model must be a local directory, got {tmp_path / 'nothing'}\n"


def _invoke(error):
    def command():
        raise error

    app = typer.Typer()
    app.command()(app_module._one_line(command))
    return CliRunner().invoke(app)


def test_interrupt_is_a_line():
    done = _invoke(KeyboardInterrupt())
    assert done.exit_code == 130 and done.stderr == "moert command: interrupted\n"
    assert _invoke(KeyboardInterrupt("go on")).stderr == "moert command: interrupted; go on\n"
    assert _invoke(CommandError("x must be y, got z")).stderr == "moert command: x must be y, got z\n"


def test_a_fault_of_ours_is_not_hidden():
    assert isinstance(_invoke(ZeroDivisionError()).exception, ZeroDivisionError)
