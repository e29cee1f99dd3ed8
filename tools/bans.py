"""What the source must not contain, as regular expressions; `make lint` and pre-commit run it over the tree."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = {".py", ".h", ".cpp", ".cu", ".cuh"}
COMMENT = r"(?://|#)\s*"

# (what to look for, in which suffixes, not under these paths, what it is)
BANS = [
    (
        r"\bprint\(",
        {".py"},
        ("python/moert/cli/", "bench/", "examples/", "tests/", "tools/"),
        "print( outside cli/, bench/ and examples/",
    ),
    (r"\bTODO\b(?!\((?:#\d+|v?\d+\.\d+)\))|\bFIXME\b|\bXXX\b", CODE, (), "TODO without an issue or version, TODO(#12)"),
    (r"^\s*#\s*if 0\b", CODE, (), "#if 0"),
    (r"\t", CODE | {".md", ".toml", ".yaml"}, (), "tab"),
    (r"[ \t]+$", CODE | {".md", ".toml", ".yaml"}, (), "space at the end of a line"),
    (r"\bfor now\b", CODE, (), "'for now'"),
    (COMMENT + r"[-=*#~]{8,}|/\*{4,}", CODE, (), "banner"),
    (r"^\s*//\s*(?:[\w:<>&*]+ )?[\w.:>\[\]-]+\s*(?:\(.*\)|[-+*/]?= .*);\s*$", CODE, (), "commented-out code"),
    (
        r"^\s*#\s*(?:import \w+|from [\w.]+ import .*|return\b.*[\])]|\w+ = .*[\])])$",
        {".py"},
        (),
        "commented-out code",
    ),
    (r"torch/(?:extension|all)\.h", {".h", ".cpp", ".cu"}, (), "torch/extension.h and torch/all.h (slow to compile)"),
    (r"#include <(?:torch|ATen|c10)/", {".h", ".cpp", ".cu", ".cuh"}, ("csrc/binding/",), "torch outside csrc/binding"),
    (r"-march=native|\bpickle\b|trust_remote_code=True", CODE, (), "unsafe or not portable"),
]


def findings(path: str, text: str) -> list[str]:
    """path:line: what, for every line of the text that a ban matches."""
    bans = [(re.compile(ban), what) for ban, suffixes, not_under, what in BANS
            if Path(path).suffix in suffixes and not path.startswith(not_under)]  # fmt: skip
    lines = enumerate(text.splitlines(), 1)
    return [f"{path}:{i}: {what}" for i, line in lines for ban, what in bans if ban.search(line)]


def sources() -> list[Path]:
    folders = ("csrc", "python", "tests", "bench", "examples", "tools", "docs", "cmake")
    files = [f for folder in folders for f in (ROOT / folder).rglob("*") if f.is_file()]
    return sorted(f for f in [*files, *ROOT.glob("*.*")] if f.suffix in CODE | {".md", ".toml", ".yaml"})


def main() -> None:
    here = Path(__file__).resolve()
    files = [f for f in sources() if f.resolve() != here and f.name != "test_bans.py"]
    found = [line for f in files for line in findings(str(f.relative_to(ROOT)), f.read_text())]
    if found:
        sys.exit("\n".join(found))
    print(f"{len(files)} files, no banned pattern")


if __name__ == "__main__":
    main()
