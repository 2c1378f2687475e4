"""What all tests share: one seed, one number of threads, and threads that wait leave the cores."""

import os

# On a busy machine OpenMP's threads, which spin while they wait, make small networks ten times as
# slow. Read when torch is loaded, and inherited by the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

# The threads decide the last bits of a sum: what runs here and in processes can be compared.
os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that a test saves, each once, in order."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def keep(figure, path):
        if figure not in figures:
            figures.append(figure)
        save(figure, path, dpi=40)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures
