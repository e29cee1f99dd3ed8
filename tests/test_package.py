"""The package as built: what its libraries ask for, how light it is, and that a build refuses in one line."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPS, C = find_spec("moert._ops").origin, find_spec("moert._C").origin
IN_TESTS = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
in_source_tree = pytest.mark.skipif(
    not (ROOT / "CMakeLists.txt").exists(), reason="tests the build, needs the source tree"
)


def tool(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout


def python(code, environment=IN_TESTS):
    return tool(sys.executable, "-c", code, env=environment)


# Light


def test_import_adds_at_most_a_tenth_of_a_second():
    """More only where the processor is busy or slow, which torch's own import shows (0.047 of it on an idle one)."""
    clock = "a = time.process_time(); import torch; b = time.process_time(); import moert; c = time.process_time()"
    kept = {name: value for name, value in IN_TESTS.items() if name != "PYTHONDONTWRITEBYTECODE"}  # as pip leaves it
    # Up to seven, as programs beside it can disturb three in a row.
    times = (map(float, python(f"import time; {clock}; print(b - a, c - b)", kept).split()) for _ in range(7))
    assert any(moert <= max(0.1, 0.055 * torch) for torch, moert in times)


def test_import_loads_no_optional_package():
    code = "import sys, moert; print(*(m for m in ('transformers', 'typer', 'rich', 'matplotlib') if m in sys.modules))"
    assert python(code) == "\n"


def test_without_torch_the_last_line_names_the_fix():
    code = "import sys; sys.modules['torch'] = None; import moert"
    done = subprocess.run([sys.executable, "-c", code], env=IN_TESTS, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: moert needs torch, got none: pip install 'torch>=2.11'"


def test_a_torch_that_lacks_a_package_says_which(tmp_path):
    (tmp_path / "torch.py").write_text("import no_such_package")
    environment = {**IN_TESTS, "PYTHONPATH": f"{tmp_path}{os.pathsep}{IN_TESTS['PYTHONPATH']}"}
    done = subprocess.run([sys.executable, "-c", "import moert"], env=environment, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'no_such_package'"


# Libraries


def test_libraries_need_no_search_path():
    for library in (OPS, C):
        assert not re.search(r"RPATH|RUNPATH", tool("readelf", "-d", library)), library


def test_ops_needs_one_torch_library_and_no_python():
    needed = re.findall(r"NEEDED.*\[(.*)\]", tool("readelf", "-d", OPS))
    assert [name for name in needed if re.search("torch|c10|python", name)] == ["libtorch.so"]
    assert sum("omp" in name for name in needed) <= 1


def test_ops_asks_only_for_what_torch_2_11_has():
    undefined = [line.split()[-1] for line in tool("nm", "-D", "--undefined-only", OPS).splitlines()]
    known = set((Path(__file__).parent / "torch_2_11_symbols.txt").read_text().split())
    asked = {name for name in undefined if re.match(r"(aoti_)?torch_|_ZN.?.?(5torch|2at|3c10)", name)}
    assert asked and asked <= known, asked - known


# A build that cannot be refuses in one line.


def pybind11():
    return "-Dpybind11_DIR=" + tool(sys.executable, "-m", "pybind11", "--cmakedir").strip()


def configure(tmp_path, *options, **environment):
    """CMake's words for a build that must fail: those of moert, and how often it says them."""
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), pybind11()]
    run = subprocess.run([*command, *options], env={**os.environ, **environment}, capture_output=True, text=True)
    assert run.returncode != 0
    said = re.findall(r"^ +(moert: .*)$", run.stderr, re.M)
    assert len(said) == 1, run.stderr
    assert run.stderr.count("CMake Error") == 1, run.stderr
    return said[0]


def bare_python(tmp_path, **distributions):
    """A Python without packages, but for the (empty) ones that are given with their versions."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    site = Path(tool(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for name, version in distributions.items():
        (site / name).mkdir()
        (site / name / "__init__.py").touch()
        (site / f"{name}-{version}.dist-info").mkdir()
        (site / f"{name}-{version}.dist-info/METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    return f"-DPython_EXECUTABLE={python}"


@in_source_tree
def test_no_compiler(tmp_path):
    said = configure(tmp_path, CXX="nonexistent++")
    assert said == "moert: a C++ compiler must be on the PATH or named by CXX, got 'nonexistent++': apt install g++"


@in_source_tree
def test_no_headers(tmp_path):
    said = configure(tmp_path, f"-DPython_EXECUTABLE={sys.executable}", f"-DPython_INCLUDE_DIR={tmp_path}")
    assert said == f"moert: Python.h of {sys.executable} must be installed, got none: apt install python3-dev"


@in_source_tree
def test_no_torch(tmp_path):
    said = configure(tmp_path, bare_python(tmp_path))
    assert re.fullmatch(r"moert: torch must be installed for \S+, got none: pip install 'torch>=2.11' first .*", said)


@in_source_tree
def test_old_torch(tmp_path):
    said = configure(tmp_path, bare_python(tmp_path, torch="2.10.1"))
    assert said == "moert: torch must be >= 2.11, got 2.10.1: pip install -U 'torch>=2.11'"


@in_source_tree
def test_no_pybind11(tmp_path):
    said = configure(tmp_path, f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_DISABLE_FIND_PACKAGE_pybind11=ON")
    assert said == f"moert: pybind11 must be installed for {sys.executable}, got none: pip install 'pybind11>=3'"


@in_source_tree
def test_other_systems(tmp_path):
    said = configure(tmp_path, "-DCMAKE_SYSTEM_NAME=Darwin")
    assert said.startswith("moert: builds on Linux (x86-64 and aarch64), got Darwin: ")


@in_source_tree
def test_old_cuda_compiler(tmp_path):
    """An error for who asks for CUDA, a line for who does not."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.4, V12.4.131\n")
    nvcc.chmod(0o755)
    old = f"nvcc >= 12.8, got 12.4 ({nvcc})"
    said = configure(tmp_path, "-DMOERT_TORCH=OFF", "-DMOERT_CUDA=ON", CUDACXX=str(nvcc))
    assert said == f"moert: there must be {old} for MOERT_CUDA=ON"
    command = ["cmake", "-S", ROOT, "-B", tmp_path / "auto", "-DMOERT_TORCH=OFF"]
    run = subprocess.run(command, env={**os.environ, "CUDACXX": str(nvcc)}, capture_output=True, text=True, check=True)
    assert f"moert: without CUDA, for want of {old}\n" in run.stdout


CHOOSE = """
set(MOERT_CUDA AUTO)
include(cmake/Requirements.cmake)
include(cmake/Cuda.cmake)
moert_choose_cuda()
message(STATUS "chose ${MOERT_BUILD_CUDA}")
"""


@in_source_tree
@pytest.mark.parametrize("lacks", ("nvcc", "CUTLASS", None))
def test_auto_builds_cuda_wherever_its_compiler_and_cutlass_are(lacks, tmp_path):
    """With or without torch and a GPU: the script knows neither."""
    (tmp_path / "include/cute").mkdir(parents=True)
    if lacks != "CUTLASS":
        (tmp_path / "include/cute/tensor.hpp").touch()
    if lacks != "nvcc":
        (tmp_path / "nvcc").write_text("#!/bin/sh\necho Cuda compilation tools, release 12.8, V12.8.61\n")
        (tmp_path / "nvcc").chmod(0o755)
    (tmp_path / "choose.cmake").write_text(CHOOSE)
    options = f"-DMOERT_CUTLASS_DIR={tmp_path}", "-DCMAKE_IGNORE_PATH=/bin;/usr/local/cuda/bin"
    command = [shutil.which("cmake"), *options, "-P", tmp_path / "choose.cmake"]
    said = tool(*command, cwd=ROOT, env={"PATH": str(tmp_path)}).replace("-- ", "").splitlines()
    if lacks:
        assert len(said) == 2 and said[0].startswith(f"moert: without CUDA, for want of {lacks}")
    assert said[-1] == ("chose OFF" if lacks else "chose ON")


ASKED = """
from pathlib import Path
from scikit_build_core.build import get_requires_for_build_wheel
from scikit_build_core.settings.skbuild_read_settings import SettingsReader
print(SettingsReader.from_file(Path("pyproject.toml"), {}).settings.cmake.define["MOERT_CUDA"])
print(*get_requires_for_build_wheel())
"""


@in_source_tree
@pytest.mark.parametrize("asked", ("AUTO", "ON", "OFF", None))
def test_pip_takes_the_choice_of_cuda_from_the_environment(asked):
    """CUTLASS is a requirement of a build that wants it alone."""
    environment = {name: value for name, value in os.environ.items() if name != "MOERT_CUDA"}
    environment |= {"MOERT_CUDA": asked} if asked else {}
    chosen, *requirements = tool(sys.executable, "-c", ASKED, cwd=ROOT, env=environment).split()
    assert chosen == (asked or "AUTO")
    assert ("nvidia-cutlass==4.2.0.0" in requirements) == (asked == "ON")


@in_source_tree
def test_this_machine_configures(tmp_path):
    assert Path(sysconfig.get_path("include"), "Python.h").exists()
    command = ["cmake", "-S", ROOT, "-B", tmp_path, pybind11()]
    run = subprocess.run([*command, f"-DPython_EXECUTABLE={sys.executable}"], capture_output=True, text=True)
    assert run.returncode == 0 and "CMake Warning" not in run.stderr, run.stderr


def test_names_that_are_imported_later():
    import moert.quant

    assert all(hasattr(moert, name) for name in (*moert.__all__, "layers", "runtime")) and "MoELayer" in dir(moert)
    assert all(hasattr(moert.quant, name) for name in moert.quant.__all__)
    for module in (moert, moert.quant):
        with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'nothing'"):
            module.nothing  # noqa: B018
