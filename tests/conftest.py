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

    def keep(figure, file, **options):
        if figure not in figures:
            figures.append(figure)
        save(figure, file, dpi=40, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


@pytest.fixture
def digits(monkeypatch):
    """640 digits to train on, cropped and flipped, so that every generator counts; 250 to test."""
    from pcdeq.experiments import data

    load, sizes = data.load, {"train": 640}

    def few(*arguments, **flags):
        full_train, full_test, classes = load(*arguments, **flags)
        train_set = few_of(full_train, 5, sizes["train"], augment=True)
        return train_set, few_of(full_test, 4, 250, augment=False), classes

    def few_of(images, every, size, augment):
        pick = slice(0, every * size, every)
        return data.ImageSet(images.images[pick], images.labels[pick], (0.0,), (1.0,), augment)

    monkeypatch.setattr(data, "load", few)
    return sizes


@pytest.fixture
def no_flush(monkeypatch):
    """No test waits for a flush."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def finished(tmp_path, no_flush):
    """A folder with a run of two epochs, the first one better."""
    from small_runs import HERE, checkpoint_of, config_of

    from pcdeq.experiments.runs import Run

    config = config_of(tmp_path / "run", epochs=3, sample=False)
    run = Run(config)
    run.begin(HERE)
    run.save(checkpoint_of(config, [90.0]))
    run.save(checkpoint_of(config, [90.0, 80.0]))
    return config
