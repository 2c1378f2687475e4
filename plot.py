"""Runs and checkpoints as figures, PNG and PDF, at the width of a column of a paper."""

import argparse
import sys
from pathlib import Path

from pcdeq.certificates import history
from pcdeq.experiments import figures
from pcdeq.experiments.certifying import robust_accuracy
from pcdeq.experiments.cli import guarded
from pcdeq.experiments.data import load
from pcdeq.weights import load_network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="run folders: accuracy, loss, iterations; checkpoints: convergence")
    parser.add_argument("-o", "--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--eps", nargs="+", type=float, default=[], metavar="RADIUS",
                        help="of a checkpoint also the certified accuracy at these radii")
    parser.add_argument("--data-root", default="data", metavar="DIR", help="(default: data)")
    parser.add_argument("--sample", action="store_true", help="the shipped digits instead")
    args = parser.parse_args()
    folders = [run for run in args.runs if run.is_dir()]
    made = figures.run_figures(folders, args.out) if folders else []
    for path in (run for run in args.runs if run not in folders):
        model = load_network(path)
        images = load(model.dataset, root=args.data_root, sample=args.sample)[1]
        name = path.stem if path.parent.name == "weights" else f"{path.parent.name}_{path.stem}"
        histories = history(model, images.batch(slice(100))[0])
        made.append(figures.convergence_figure(histories, args.out / f"{name}_convergence"))
        if args.eps:
            rows = robust_accuracy(model, images, args.eps)
            made.append(figures.robustness_figure(rows, args.out / f"{name}_robustness"))
    print(*made, sep="\n")


if __name__ == "__main__":
    sys.exit(guarded(main))
