"""Runs and checkpoints as figures: curves, convergence, accuracy that is proved.

``python plot.py --help`` shows the flags. Needs matplotlib.
"""

import sys

from pcdeq.experiments.cli import guarded
from pcdeq.experiments.gallery import main

if __name__ == "__main__":
    sys.exit(guarded(main))
