"""The paper's tables with one command: what is missing is run, what was measured is rendered."""

import sys
from pathlib import Path

from pcdeq.experiments.cli import guarded
from pcdeq.experiments.reproduce import main

if __name__ == "__main__":
    sys.exit(guarded(lambda: main(Path(__file__).resolve().parent)))
