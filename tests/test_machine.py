import platform
import subprocess
import sys

import pytest
import torch

from pcdeq.experiments import machine

PAGES = """
import resource, torch
from pcdeq.experiments import machine

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
machine.keep_freed_memory()
print(before, min(faults() for _ in range(5)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is asked for is glibc's")
def test_freed_memory_is_not_fetched_from_the_system_again():
    """Page faults of allocations, each as large as the one that was freed before it.

    A small allocation may come to lie where the large one was, and send the next elsewhere: the
    best of a few rounds counts.
    """
    run = subprocess.run([sys.executable, "-c", PAGES], check=True, capture_output=True, text=True)
    before, after = map(int, run.stdout.split())
    assert before >= 8 * 32  # pages of 2 MiB at most
    assert after <= before / 2


@pytest.mark.parametrize(
    ("net", "asked", "expected"),
    [("linear_pcdeq_1", None, 1), ("multi_conv_pcdeq_1", None, 3), ("linear_pcdeq_2", "3", 3)],
)
def test_a_linear_network_has_one_thread_unless_others_are_asked_for(
    net, asked, expected, monkeypatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with machine.threads_for(net):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bfloat16", [True, False])
def test_emulated_bfloat16_is_warned_of(bfloat16, monkeypatch):
    monkeypatch.setattr(machine, "BFLOAT16", bfloat16)
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    for precision in ("mixed", "bf16"):
        warning = machine.precision_warning(precision, cpu)
        assert warning == "" if bfloat16 else f"--precision {precision} may take longer" in warning
    assert not machine.precision_warning("fp32", cpu) + machine.precision_warning("bf16", gpu)
