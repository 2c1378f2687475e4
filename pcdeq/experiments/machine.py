"""Where a run ran: what must stand beside every number so that someone else can place it."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import pcdeq


def environment(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Versions, device, processor, threads and commit, as plain values.

    Args:
        device: where the networks compute.
        processes: how many processes share the run.
    """
    cuda = device.type == "cuda"
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": version("torchvision"),  # not imported: that takes a second
            "pcdeq": pcdeq.__version__,
        },
        "device_name": torch.cuda.get_device_name(device) if cuda else processor(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "tf32": {
            "matmul": cuda and torch.backends.cuda.matmul.allow_tf32,
            "convolution": cuda and torch.backends.cudnn.allow_tf32,
        },
        "git_commit": commit(),
        "command": shlex.join(["python", *sys.argv]),
    }


def processor() -> str:
    """The processor's name, as its maker spells it where the system tells."""
    try:
        if sys.platform == "linux":
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        if sys.platform == "darwin":
            return _output("sysctl", "-n", "machdep.cpu.brand_string")
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the clone that this package stands in, "+" behind it if files were changed."""
    top = Path(pcdeq.__file__).resolve().parents[1]
    try:
        if Path(_output("git", "-C", str(top), "rev-parse", "--show-toplevel")).resolve() != top:
            return None  # someone else's repository, with this package installed inside
        changed = _output("git", "-C", str(top), "status", "--porcelain", "-uno")
        return _output("git", "-C", str(top), "rev-parse", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.SubprocessError):
        return None


def _output(*command: str) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=10
    ).stdout.strip()
