"""Another commit of moert, built so that it can be timed beside this one."""

import subprocess
import sys
from pathlib import Path

from record import ROOT


def build(revision: str, folder: Path) -> Path:
    """Installs that commit under folder; returns what to put on PYTHONPATH."""
    tree, site = folder / "tree", folder / "site"
    subprocess.check_call(["git", "worktree", "add", "--quiet", "--detach", str(tree), revision], cwd=ROOT)
    try:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
        subprocess.check_call([*pip, "--target", str(site), str(tree)])
    finally:
        subprocess.check_call(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT)
    return site
