import platform
import subprocess
import sys

import pytest

PAGES = """
import resource, torch
from pcdeq.experiments import machine

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
machine.keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is asked for is glibc's")
def test_freed_memory_is_not_fetched_from_the_system_again():
    """Page faults of an allocation as large as one that was freed before it."""
    run = subprocess.run([sys.executable, "-c", PAGES], check=True, capture_output=True, text=True)
    before, after = map(int, run.stdout.split())
    assert before > 16  # huge pages are 2 MiB at least, so this counts 32
    assert after < before / 4
