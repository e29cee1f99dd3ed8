"""One stem all the way: every module has its test file, every operator its binding, kernel, promise and bench."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def expected(path: str) -> list[str]:
    """The files that must lie beside this one."""
    folder, stem = str(Path(path).parent), Path(path).stem
    if path.startswith("python/moert/") and path.endswith(".py") and not stem.startswith("__"):
        return [f"tests{folder.removeprefix('python/moert')}/test_{stem}.py"]
    if folder == "csrc/binding" and path.endswith(".cpp") and stem != "module":
        same = ["python/moert/ops/{}.py", "csrc/cpu/{}.cpp", "csrc/moert/{}.h", "bench/python/bench_{}.py"]
        return [name.format(stem) for name in same]
    if folder == "csrc/moert":
        return [f"tests/cpp/test_{stem}.cpp"]
    if folder == "tools" and path.endswith(".py"):
        return [f"tests/tools/test_{stem}.py"]
    if folder == "csrc/cpu" and (isa := stem.find("_avx")) > 0:
        return [f"csrc/cpu/{stem[:isa]}.cpp", f"csrc/cpu/{stem[:isa]}_isa.h"]
    return []


def missing(files: set[str]) -> list[str]:
    return sorted(f"{path} needs {other}" for path in files for other in expected(path) if other not in files)


def main() -> None:
    folders = ("python/moert", "csrc", "tests", "bench", "tools")
    files = {str(f.relative_to(ROOT)) for folder in folders for f in (ROOT / folder).rglob("*") if f.is_file()}
    if found := missing(files):
        sys.exit("\n".join(found))
    print(f"{len(files)} files, each with its mirror")


if __name__ == "__main__":
    main()
