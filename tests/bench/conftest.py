import sys
from pathlib import Path

# The benches are programs: they find each other beside themselves.
BENCH = Path(__file__).parents[2] / "bench"
sys.path += [str(BENCH), str(BENCH / "peers")]
