"""What every system's experiment shares.  A file examples/systems/<name>.py declares EXPERIMENT and ends with

    if __name__ == "__main__":
        main(EXPERIMENT)

A variant is a function (seed, progress) -> {figure: value}; it loops over progress.steps(count), which draws the bar
and is a single step under --quick, and takes small data where progress.quick.  language.py trains byte models,
digits.py has images.
"""

from experiment.declare import Claim, Experiment
from experiment.run import Progress, main
from experiment.share import medians, once

__all__ = ["Claim", "Experiment", "Progress", "main", "medians", "once"]
