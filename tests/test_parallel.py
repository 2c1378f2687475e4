"""Several processes are one: the parts, their weights, and real gloo processes."""

import signal
import time

import pytest
import torch
import worker
from hypothesis import given
from hypothesis import strategies as st
from processes import ROOT, free_port, same, start

from pcdeq.experiments import parallel
from pcdeq.experiments.errors import RunError
from pcdeq.experiments.parallel import Processes, join

CPU = torch.device("cpu")


@given(world=st.integers(1, 9), images=st.integers(18, 200))
def test_the_parts_are_a_batch_and_their_weights_make_its_mean(world, images):
    batch = torch.randperm(images)
    ranks = [Processes(CPU, rank, world, rank) for rank in range(world)]
    parts = [rank.part(batch) for rank in ranks]
    sizes = [len(part) for part in parts]
    assert sorted(torch.cat(parts).tolist()) == list(range(images))
    assert max(sizes) - min(sizes) <= 1
    losses = torch.rand(images, dtype=torch.float64)
    mean = sum(
        rank.share(batch) * losses[part].mean() for rank, part in zip(ranks, parts, strict=True)
    )
    assert mean / world == pytest.approx(losses.mean().item(), abs=1e-12)
    assert min(sizes) >= 2  # of 2·world images or more, `smallest_batch`
    assert all(rank.smallest_batch <= images for rank in ranks)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process, and each of two, made of the same training."""
    folder = tmp_path_factory.mktemp("processes")
    address = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [
        start(ROOT / "tests" / "worker.py", folder, RANK=rank, LOCAL_RANK=rank, **address)
        for rank in range(2)
    ]
    for rank in ranks:
        _, err = rank.communicate(timeout=300)
        assert (rank.returncode, err) == (0, "")
    two = [torch.load(folder / f"rank{rank}.pth", weights_only=True) for rank in range(2)]
    worker.main(folder)
    return torch.load(folder / "rank0.pth", weights_only=True), *two


@pytest.mark.parametrize("case", ["linear", "conv"])
def test_two_processes_do_what_one_does(results, case):
    alone, first, second = (result[case] for result in results)
    assert same(first["model"], second["model"])
    assert first["figures"] == second["figures"]
    assert first["figures"] == pytest.approx(alone["figures"], rel=0, abs=1e-9)
    for name, value in alone["model"].items():
        torch.testing.assert_close(first["model"][name], value, rtol=0, atol=1e-9)
    assert alone["figures"][2] < alone["figures"][0]  # it has learned


def test_ordinary_processes_end_with_the_same_nonnegative_weights(results):
    _, first, second = (result["ordinary"] for result in results)
    assert same(first["model"], second["model"])
    assert first["figures"] == second["figures"]
    for name, value in first["model"].items():
        if "deq.f.W" in name:
            assert value.min() >= 0


def test_without_torchrun_there_is_one_process():
    with join("cpu") as processes:
        assert (processes.rank, processes.world, processes.first) == (0, 1, True)
        assert processes.sum(1, 2.5) == [1, 2.5]
        assert processes.max(3) == 3
        assert processes.tell("all") == "all"
        network = torch.nn.Linear(2, 2)
        assert processes.wrap(network) is network


@pytest.mark.parametrize("name, index", [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_gpu_without_a_number_is_the_first(name, index, monkeypatch):
    """``torch.cuda.set_device`` refuses a device that has none."""
    chosen = []
    monkeypatch.setattr(parallel.torch, "zeros", lambda *_, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with join(name) as processes:
        assert processes.device == chosen[0] == torch.device("cuda", index)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_waits_for_the_others_ends_at_a_signal(number, tmp_path):
    """torchrun ends so those whose first process met a usage error."""
    address = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"  # as in front
        "import torch.distributed as dist, pcdeq.experiments.parallel as parallel;"
        "from pcdeq.experiments.signals import Leaving;"
        "wait = dist.init_process_group;"
        "dist.init_process_group = lambda backend: (print('waits', flush=True), wait(backend));"
        "leaving = Leaving(); leaving.__enter__(); parallel.join('cpu').__enter__()"
    )
    process = start("-c", code, RANK=0, LOCAL_RANK=0, **address)
    assert process.stdout.readline() == "waits\n"
    time.sleep(0.5)  # it is in the wait now, or about to be
    process.send_signal(number)
    try:
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -number


def torchrun_sets(monkeypatch, **values):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_which_process_this_is(monkeypatch):
    for values, wanted in (
        ({}, (0, 0, 1)),
        ({"RANK": 1}, (0, 0, 1)),  # a job script's: nobody else is there
        ({"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 1}, (0, 0, 1)),
        (
            {"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4, "MASTER_ADDR": "a", "MASTER_PORT": 1},
            (3, 1, 4),
        ),
    ):
        torchrun_sets(monkeypatch, **values)
        assert parallel.position() == wanted


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc' in the environment, no number"),
        ({"RANK": "x"}, "RANK is 'x'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
        ({"WORLD_SIZE": 2}, "WORLD_SIZE is 2, but RANK is not set: start with torchrun, or unset"),
        ({"WORLD_SIZE": 2, "RANK": 0}, "MASTER_ADDR is not set"),
        (
            {"WORLD_SIZE": 2, "RANK": 2, "MASTER_ADDR": "a", "MASTER_PORT": 1},
            "RANK is 2, but WORLD_SIZE is 2",
        ),
    ],
)
def test_an_environment_that_names_no_process_is_refused(monkeypatch, values, sentence):
    torchrun_sets(monkeypatch, **values)
    with pytest.raises(RunError, match=sentence):
        parallel.position()


def test_what_cannot_be_used_is_said_in_a_sentence(monkeypatch):
    with pytest.raises(RunError, match=r"device meta:3|device cuda:77"), join("cuda:77"):
        pass
    with pytest.raises(RunError, match="too little memory: a smaller -b"), join("cpu"):
        torch.empty(2**60)
    with pytest.raises(ZeroDivisionError), join("cpu"):  # a bug stays a traceback
        _ = 1 / 0
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda backend: None)
    torchrun_sets(monkeypatch, WORLD_SIZE=2, RANK=0, MASTER_ADDR="here", MASTER_PORT=1)
    with (
        pytest.raises(RunError, match=r"process 0 of 2 lost another one, .*\[::1\]\)$"),
        join("cpu"),
    ):
        raise RuntimeError("[pair.cc:525] Connection closed by peer [::1]\nadvice")
    with pytest.raises(RuntimeError, match="shapes"), join("cpu"):
        raise RuntimeError("shapes do not fit")
