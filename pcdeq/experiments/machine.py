"""The machine a run is on: what must stand beside its numbers to place them; memory, threads."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import pcdeq
from pcdeq.processor import BFLOAT16


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
            "matmul": cuda and torch.backends.cuda.matmul.fp32_precision == "tf32",
            "convolution": cuda and torch.backends.cudnn.conv.fp32_precision == "tf32",
        },
        "git_commit": commit(),
        "command": shlex.join(["python", *sys.argv]),
    }


def keep_freed_memory() -> None:
    """Makes glibc keep what is freed for the next allocation; other C libraries are left alone.

    A step on the CPU allocates and frees tensors of many MiB. By its defaults glibc returns each to
    the system, which then hands it out again page by page, zeroed: a tenth of a step of the single
    conv network. Kept, memory stays at its peak, which was 3 to 5 % higher there.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)  # older ones' most
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h; in bytes


@contextlib.contextmanager
def threads_for(net: str) -> Iterator[None]:
    """One thread for a linear network, unless ``OMP_NUM_THREADS`` is set; else as torch has it.

    Its products are too small to share. On two cores a second thread made steps up to 4 % faster
    in some minutes, and a third slower in others.
    """
    before = torch.get_num_threads()
    if is_serial(net) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_serial(net: str) -> bool:
    """Whether a network of that name is given one thread."""
    return net.startswith("linear")


def precision_warning(precision: str, device: torch.device) -> str:
    """A line to print where bfloat16 is asked for and oneDNN has no kernels for it; else empty.

    On a Zen 3, which emulates it, a step took 1.8 times (linear, bf16) to 6.1 times (MNIST's multi
    conv, mixed) as long as in float32.
    """
    if precision == "fp32" or device.type != "cpu" or BFLOAT16:
        return ""
    return (
        "warning: torch has no fast bfloat16 for this processor: "
        f"--precision {precision} may take longer than fp32"
    )


def workers(processes: int, threads: int) -> str:
    """How many of both, in words."""
    text = f"{threads} thread" + "s" * (threads > 1)
    return f"{processes} processes of {text}" if processes > 1 else text


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
