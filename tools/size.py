"""Sizes of files and functions; fails over the limit, warns over the aim.

Python: file 300 aimed, 500 limit; function 25, 60.  C++: file 400, 800; function 40, 80.
In the files of one instruction set, whose functions are a kernel's loop nest, a function may have 150 lines.
"""

import argparse
import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh")
FOLDERS = ("python", "csrc", "bench", "examples", "tools", "tests")
LIMITS = {".py": {"file": (300, 500), "function": (25, 60)}, ".cpp": {"file": (400, 800), "function": (40, 80)}}
KERNEL_LIMIT = 150
KERNEL_FILE = re.compile(r"_a[vm]x\w*\.cpp$|_isa\.h$|_tile\.h$|simd\.h$|\.cuh$")


class Size(NamedTuple):
    where: str
    what: str  # "file" or "function"
    lines: int
    aim: int
    limit: int


def python_functions(text: str) -> list[tuple[str, int, int]]:
    """(name, first line, number of lines) of every function, decorators left out."""
    found = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [(n.name, n.lineno, n.end_lineno - n.lineno + 1) for n in found]


_SCOPE = re.compile(r"\b(?:namespace|class|struct|union|enum|extern)\b[^()]*$")
_CALLABLE = re.compile(r"([\w:~]+|operator\S+)\s*(?:<[^<>]*>)?\([^{}]*\)[^{}()=]*(?:->[^{}=]*)?(?::.*)?$", re.S)


def _blank(match: re.Match) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def cpp_functions(text: str) -> list[tuple[str, int, int]]:
    """(name, first line, number of lines) of every outermost function body: braces after a parameter list."""
    text = re.sub(r"^\s*#(?:[^\n]*\\\n)*[^\n]*", _blank, text, flags=re.M)
    text = re.sub(r'//[^\n]*|/\*[\s\S]*?\*/|"(?:\\.|[^"\\\n])*"|(?<!\w)\'(?:\\.|[^\'\\\n])+\'', _blank, text)
    functions, depth, inside, head = [], 0, None, 0
    for i, c in enumerate(text):
        if c == "{":
            signature = text[head:i].strip()
            if inside is None:
                name = None if _SCOPE.search(signature) else _CALLABLE.search(signature)
                if name:
                    start = text.count("\n", 0, i - len(text[head:i].lstrip())) + 1
                    inside = (name[1], start, depth)
            depth += 1
            head = i + 1
        elif c == "}":
            depth -= 1
            if inside is not None and depth == inside[2]:
                functions.append((inside[0], inside[1], text.count("\n", 0, i) + 2 - inside[1]))
                inside = None
            head = i + 1
        elif c == ";" and inside is None:
            head = i + 1
    return functions


def sizes(path: Path, text: str) -> list[Size]:
    python = path.suffix == ".py"
    limits = LIMITS[".py" if python else ".cpp"]
    out = [Size(str(path), "file", text.count("\n"), *limits["file"])]
    aim, limit = limits["function"]
    if KERNEL_FILE.search(path.name):
        limit = KERNEL_LIMIT
    for name, line, lines in python_functions(text) if python else cpp_functions(text):
        out.append(Size(f"{path}:{line} {name}", "function", lines, aim, limit))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="print every file and function, largest first")
    options = parser.parse_args()
    files = [f for folder in FOLDERS for f in sorted((ROOT / folder).rglob("*")) if f.suffix in SUFFIXES]
    found = [size for f in files for size in sizes(f.relative_to(ROOT), f.read_text())]
    for size in sorted(found, key=lambda s: -s.lines):
        if options.all or size.lines > size.limit:
            print(f"{size.lines:5} {size.what:8} {size.where}" + (f"  over {size.limit}" * (size.lines > size.limit)))
    over = sum(size.lines > size.limit for size in found)
    near = sum(size.aim < size.lines <= size.limit for size in found)
    print(f"{len(files)} files, {len(found) - len(files)} functions: {over} over the limit, {near} over the aim")
    sys.exit(bool(over))


if __name__ == "__main__":
    main()
