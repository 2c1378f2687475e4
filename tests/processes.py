"""Real processes for the tests: the training scripts as users start them, alone or by torchrun.

What the tests compare is read from the folders that the processes leave.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "train_mnist.py"
FLAGS = ["-net", "linear_pcdeq_1", "--sample", "--device", "cpu", "-m", "8"]


def start(*command: object, **variables: object) -> subprocess.Popen:
    """Starts Python on a command line, with these variables."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    more = {name: str(value) for name, value in variables.items()}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path} | more,
    )


def run(*command: object) -> tuple[int, str, str]:
    """Runs Python on a command line to its end: status, stdout, stderr."""
    process = start(*command)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def torchrun(processes: int, *command: object) -> list[object]:
    """The command line that runs one in several processes of this machine."""
    return [
        *["-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={processes}"],
        *["--master-addr=127.0.0.1", f"--master-port={free_port()}", *command],
    ]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def children(process: subprocess.Popen) -> list[int]:
    """The numbers of the processes that one has started."""
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(number) for number in listed.stdout.split()]


def until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Waits until something is so, or the process ends."""
    while not condition() and process.poll() is None:
        time.sleep(0.01)


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint."""
    return torch.load(path, weights_only=True)["model"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
