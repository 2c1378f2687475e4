"""Flags that several programs share, and what turns their texts into values."""

import argparse
import contextlib
import difflib
import math
import os
import re
from collections.abc import Callable
from fractions import Fraction
from typing import NoReturn

import torch

from pcdeq.activations import ACTIVATIONS
from pcdeq.experiments.config import RunConfig
from pcdeq.implicit import PRECISIONS
from pcdeq.networks import DATASETS, NETWORKS, check_network
from pcdeq.solvers import SOLVERS


def program(name: str, usage: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser that prints as all programs here do; it has no flag yet, not even ``--help``."""
    return _Parser(
        prog=name,
        usage=f"{name} {usage}",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=_Help,
        allow_abbrev=False,
        add_help=False,
    )


# fmt: off
def add_help(group: argparse._ActionsContainer) -> None:
    """``--help``, among the flags of a group."""
    group.add_argument("-h", "--help", action="help", help="show this and exit")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Where the images come from: the genuine set, the sample, or folders."""
    data = parser.add_argument_group("data")
    data.add_argument("--data-root", metavar="DIR", type=folder, default="data",
                      help="where the set is, or is downloaded to (default: data)")
    source = data.add_mutually_exclusive_group().add_argument
    source("--sample", action="store_true",
           help="instead of the set: 5,000 MNIST digits, no download")
    source("--image-folder", metavar="DIR", type=folder,
           help="instead: DIR/train/<class>/*, DIR/test/<class>/*")


def add_network(parser: argparse.ArgumentParser) -> None:
    """Which network a checkpoint holds, for those that do not say it."""
    which = parser.add_argument_group("network (for a plain state dict, which does not say it)")
    which = which.add_argument
    which("-net", "--network", dest="net", metavar="NET", choices=NETWORKS,
          help=", ".join(NETWORKS))
    which("-activ", "--activation", dest="activation", metavar="NAME", choices=ACTIVATIONS,
          help=", ".join(ACTIVATIONS))
    which("--dataset", metavar="NAME", choices=DATASETS, help=", ".join(DATASETS))
    which("--aug", dest="augment", action="store_const", const=True,
          help="the wider network for augmented CIFAR-10")


def add_solver(parser: argparse.ArgumentParser) -> None:
    """The options of ``build_network``."""
    solver = parser.add_argument_group("solver").add_argument
    solver("--solver", metavar="NAME", choices=SOLVERS, default=RunConfig.solver,
           help=f"{', '.join(SOLVERS)} (default: %(default)s)")
    solver("--precision", metavar="NAME", choices=PRECISIONS, default=RunConfig.precision,
           help=f"of the solves: {', '.join(PRECISIONS)} (default: %(default)s)")
    solver("--tol", metavar="X", type=fraction, default=RunConfig.tol,
           help="relative step that ends a solve (default: %(default)s)")
    solver("--max-iter", metavar="N", type=count, default=RunConfig.max_iter,
           help="iterations that end it anyway (default: %(default)s)")
# fmt: on


def check_identity(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    """Ends with a usage error where the flags of ``add_network`` name none of the networks."""
    if flags.net and flags.activation and flags.dataset:
        try:
            check_network(flags.net, flags.activation, flags.dataset, bool(flags.augment))
        except ValueError as error:
            parser.error(str(error))


def identity(flags: argparse.Namespace) -> tuple[str | None, str | None, str | None, bool | None]:
    """What the flags of ``add_network`` say, as arguments of ``load_network``."""
    return flags.net, flags.activation, flags.dataset, flags.augment


def data_source(flags: argparse.Namespace) -> dict[str, object]:
    """What the flags of ``add_data`` say, as arguments of ``data.test_set``."""
    return {"root": flags.data_root, "sample": flags.sample, "image_folder": flags.image_folder}


class _Parser(argparse.ArgumentParser):
    """Takes no abbreviation for a flag: a slip must not start hours of training."""

    def _get_option_tuples(self, option_string: str) -> list[tuple]:
        # allow_abbrev=False leaves those of one dash; what stays are values as in -b64.
        return [found for found in super()._get_option_tuples(option_string) if found[-1]]

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            first = next((word for word in message.split() if word.startswith("-")), "")
            meant = difflib.get_close_matches(first, self._option_string_actions, 1, 0.7)
            message += f" (is {meant[0]} meant?)" if meant else ""
            message += "; --help lists all"
        super().error(message)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Every flag and what it does on one line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=29)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        value = f" {action.metavar}" if action.metavar else ""
        value += " ..." * (action.nargs == "+")
        return ", ".join(action.option_strings) + value  # `-b, --batch-size N`, N once


def _number(
    kind: Callable[[str], float], accepts: Callable[[float], bool], wanted: str
) -> Callable[[str], float]:
    def convert(text: str) -> float:
        with contextlib.suppress(ValueError, ZeroDivisionError, OverflowError):
            if accepts(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")

    return convert


count = _number(int, lambda n: 0 < n < 2**31, "a whole number from 1 to 2147483647")
several = _number(
    int,
    lambda n: 1 < n < 2**31,
    "a whole number from 2 (batch normalisation needs two images) to 2147483647",
)
from_zero = _number(int, lambda n: 0 <= n < 2**31, "a whole number from 0 to 2147483647")
seed = _number(int, lambda n: 0 <= n < 2**32, "a whole number from 0 to 4294967295")
rate = _number(float, lambda x: 0 <= x < math.inf, "a finite number from 0 on")
fraction = _number(float, lambda x: 0 < x < 1, "a number between 0 and 1")
radius = _number(
    lambda text: float(Fraction(text)),
    lambda x: 0 < x < 1,
    "a radius between 0 and 1 (pixels are in [0, 1]: write 8/255, not 8)",
)


def folder(name: str) -> str:
    """A folder's name: an unset variable of the shell does not mean this one, ``~`` is home."""
    if not name.strip():
        raise argparse.ArgumentTypeError("the name is empty")
    name = os.path.expanduser(name)  # the shell leaves --out=~/run as it is
    if os.path.isfile(name):
        raise argparse.ArgumentTypeError(f"{name} is a file, not a folder")
    return name


def device(name: str) -> str:
    """A device that is there."""
    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]{1,3})?", name):
        raise argparse.ArgumentTypeError(f"{name!r} is not one of cpu, cuda, cuda:N, mps")
    index = int(name.partition(":")[2] or 0)
    if (name == "mps" and not torch.backends.mps.is_available()) or (
        name.startswith("cuda") and index >= torch.cuda.device_count()
    ):
        raise argparse.ArgumentTypeError(f"{name} is not available on this machine")
    return name
