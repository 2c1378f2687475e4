"""Real processes for the tests: the training scripts as users start them, alone or by torchrun.

What the tests compare is read from the folders that the processes leave.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SCRIPT = [str(ROOT / "train_mnist.py"), "-net", "linear_pcdeq_1", "--sample", "--device", "cpu"]


def start(*command: object, **variables: object) -> subprocess.Popen:
    """Starts Python on a command line, with one thread, this package, and these variables."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    more = {name: str(value) for name, value in variables.items()}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more},
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


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint."""
    return torch.load(path, weights_only=True)["model"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
