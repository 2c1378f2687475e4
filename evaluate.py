"""A checkpoint on its test set: accuracy, iterations, certificates, and accuracy that is proved.

The network and its data set come from the checkpoint. ``python evaluate.py --help`` shows the
flags.
"""

import sys

from pcdeq.experiments.cli import guarded
from pcdeq.experiments.report import main

if __name__ == "__main__":
    sys.exit(guarded(main))
