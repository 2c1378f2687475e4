"""What all tests share: every test starts from one seed, and waiting threads leave the cores."""

import os

# On a busy machine OpenMP's threads, which spin while they wait, make small networks ten times as
# slow. Read when torch is loaded, and inherited by the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
