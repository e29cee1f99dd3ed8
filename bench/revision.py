"""Another commit of moert, built so that it can be timed beside this one."""

import os
import subprocess
import sys
from pathlib import Path

from record import ROOT

# Python reads it after the .pth files: the finder of an editable install would answer before PYTHONPATH is looked at.
WITHOUT_FINDERS = """import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__name__.startswith("ScikitBuild")]
"""


def build(revision: str, folder: Path) -> Path:
    """Installs that commit under folder; returns what to put on PYTHONPATH."""
    tree, site = folder / "tree", folder / "site"
    subprocess.check_call(["git", "worktree", "add", "--quiet", "--detach", str(tree), revision], cwd=ROOT)
    try:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
        subprocess.check_call([*pip, "--target", str(site), str(tree)])
    finally:
        subprocess.check_call(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT)
    put_in_front(site)
    return site


def put_in_front(site: Path) -> None:
    """With site on PYTHONPATH, moert is that of site."""
    (site / "sitecustomize.py").write_text(WITHOUT_FINDERS)
    command = [sys.executable, "-c", "import moert; print(moert.__file__)"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    found = subprocess.check_output(command, env=environment, cwd=site.parent, text=True).strip()  # not from its folder
    if not Path(found).is_relative_to(site):
        sys.exit(f"moert must be found in {site}, got {found}")
