"""What a machine needs before `make` can set the rest up: one line that names what is missing and how to get it.

Also runs in the old Python that it may have to refuse.
"""

import os
import shutil
import sys
import sysconfig


def missing():
    if sys.version_info < (3, 10):
        return "Python >= 3.10, got %d.%d: install one and say `make PYTHON=python3.12`" % sys.version_info[:2]
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        return "the headers of Python, got no Python.h: apt install python3-dev"
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        return "the modules venv and ensurepip, got no %s: apt install python3-venv" % error.name
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not shutil.which(compiler):
        return "a C++ compiler, got no %s: apt install g++" % compiler
    return None


if __name__ == "__main__":
    needs = missing()
    if needs:
        sys.exit("moert needs " + needs)
