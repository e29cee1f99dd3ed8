"""No weak or inline symbol may leave an instruction set's translation unit: the linker keeps one copy for everyone, and
it may be the AVX-512 one.  Looks at every *_avx*.o and *_amx*.o under the folders that are given.
"""

import subprocess
import sys
from pathlib import Path


def weak_symbols(path: Path) -> list[str]:
    lines = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    # W, V: weak; u: unique across the process (a static of an inline function).
    return [name for kind, name in (line[17:].split(maxsplit=1) for line in lines.splitlines()) if kind in "WwVvu"]


def main(folders: list[str]) -> None:
    objects = [path for folder in folders for path in sorted(Path(folder).rglob("*_a[vm]x*.o"))]
    if not objects:
        sys.exit(f"objects must be *_avx*.o or *_amx*.o under {', '.join(folders)}, got none")
    found = [f"{path.name}: weak symbol {name}" for path in objects for name in weak_symbols(path)]
    if found:
        sys.exit("\n".join([*found, "make it static, or move it out of these files"]))
    print(f"{len(objects)} objects of one instruction set, no weak symbol")


if __name__ == "__main__":
    main(sys.argv[1:] or ["build"])
