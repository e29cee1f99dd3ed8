"""A C++ program outside the project: find_package(moert), link, run a grouped GEMM, no torch anywhere."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build/cpp"  # that of `make test-cpp`, so that nothing is compiled twice


def run(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    if not BUILD.exists():
        run("cmake", "-S", ".", "-B", BUILD, "-G", "Ninja", "-DMOERT_TORCH=OFF", "-DMOERT_TESTS=ON")
    run("cmake", "--build", BUILD)
    prefix = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", BUILD, "--prefix", prefix)
    return prefix


def test_external_program(prefix, tmp_path):
    run("cmake", "-S", "tests/cpp/external", "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", tmp_path)
    # Three tokens, two experts: token 1 goes to expert 0, tokens 0 and 2 to expert 1.
    assert run(tmp_path / "program").split() == ["1", "0", "2", ":", "4", "6", "10", "20", "30", "60"]
    assert "torch" not in run("ldd", tmp_path / "program")


def test_installed_headers_do_not_name_torch(prefix):
    headers = list(prefix.rglob("*.h"))
    assert {header.name for header in headers} >= {"grouped_gemm.h", "permute.h", "fused_experts.h"}
    assert not any(
        "torch" in line for header in headers for line in header.read_text().splitlines() if "#include" in line
    )
