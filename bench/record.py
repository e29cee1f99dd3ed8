"""What a bench keeps: rows and the facts under which they were measured; a full run goes on where it was cut off."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from moert import _C
from moert.cli.machine import machine_facts

ROOT = Path(__file__).resolve().parents[1]
_SCHEDULERS = {0: "other", 1: "fifo", 2: "rr", 3: "batch", 5: "idle", 6: "deadline"}


def bench_facts(**settings) -> dict:
    """Of the machine, the build and the run: rows of unequal facts do not belong into one table."""
    facts = {**machine_facts(("torch",)), "isa": _C.isa(), "caches": _caches(), "memory_gib": _memory_gib()}
    huge = _chosen(Path("/sys/kernel/mm/transparent_hugepage/enabled"))
    return {**facts, "huge_pages": huge, "priority": _priority(), **settings, "commit": commit("HEAD")}


def path_of(mode: str, kind: str, facts: dict) -> Path:
    """Beside the pictures; a full run's by commit, so that it finds its own rows and none of other commits."""
    of = f"-{facts['commit']}" if mode == "full" else ""
    return ROOT / "build" / "bench" / f"{mode}{of}{kind}"


def done_before(path: Path, facts: dict) -> list[dict]:
    """Rows of an earlier run under these facts that was cut off; those of another run are not overwritten."""
    if not path.exists():
        return []
    value = json.loads(path.read_text())
    if unequal := sorted(name for name in facts | value["machine"] if facts.get(name) != value["machine"].get(name)):
        sys.exit(f"{path} must hold rows of this run, got rows of another {', '.join(unequal)}: give --out or move it")
    return value["rows"]


def save(path: Path, value: dict) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def say(path: Path, rows: list, console: Console) -> None:
    console.print(f"{len(rows)} rows in {path}")


def default_path(processor: str) -> Path:
    return ROOT / "bench" / "results" / (re.sub(r"[^a-z0-9]+", "-", processor.lower()).strip("-") + ".json")


def commit(revision: str) -> str | None:
    """The commit's short name; None for HEAD outside a repository."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "--verify", revision], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode and revision != "HEAD":
        sys.exit(f"base must be a commit, got {revision}")
    return done.stdout.strip() or None


def _caches() -> dict[str, str]:
    """Of the first processor: level and kind -> size, as Linux says it."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        found[f"L{level} {kind.lower()}"] = size
    return found


def _memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)


def _chosen(path: Path) -> str | None:
    """The word in brackets."""
    try:
        return re.search(r"\[(\w+)\]", path.read_text()).group(1)
    except OSError:
        return None


def _priority() -> str:
    """Scheduler and niceness: a bench that others may interrupt measures them too."""
    scheduler = _SCHEDULERS.get(os.sched_getscheduler(0), "unknown")
    return f"{scheduler}, nice {os.getpriority(os.PRIO_PROCESS, 0)}"
