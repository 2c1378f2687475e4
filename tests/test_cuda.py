"""What holds on a GPU alone; what holds everywhere is tested on each device where it stands."""

import copy
import csv
import json
import math
import re
import time
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from blocks import both, every_precision, every_solver, in_threads, make, run, signal
from processes import ROOT, SCRIPT, free_port
from processes import run as run_script

import pcdeq
from pcdeq import replay, solvers
from pcdeq.experiments import data
from pcdeq.experiments.certifying import robust_accuracy
from pcdeq.experiments.config import RunConfig
from pcdeq.experiments.optimizer import AdamW
from pcdeq.experiments.parallel import Processes
from pcdeq.experiments.trainer import Trainer, generator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def synchronisations(call) -> int:
    """How often a call makes the host wait for the device, as torch counts it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in seen)


AT_ONCE = 4  # evaluations of small tensors between two looks at their residuals


def reads(*solves: solvers.Solve) -> int:
    """How often these solves read residuals."""
    return sum(math.ceil(solve.iterations / AT_ONCE) for solve in solves)


@pytest.fixture(params=["replayed", "launched"])
def replayed(request, monkeypatch):
    """Whether solves are replayed CUDA graphs."""
    replay.clear()
    if request.param == "launched":
        monkeypatch.setattr(replay, "pays", lambda call: False)
    return request.param == "replayed"


def settled(block, h, probe):
    """What ``run`` gives when libraries are loaded and graphs recorded."""
    return [run(block, h, probe) for _ in range(3)][-1]


@both
@every_solver
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_solve_waits_for_its_residuals_alone(kind, solver, precision, replayed):
    block = make(kind, "relu6", root=0.9, solver=solver, precision=precision).cuda()
    h, probe = signal(kind).cuda(), torch.rand(signal(kind).shape).cuda()
    settled(block, h, probe)
    waits = synchronisations(lambda: run(block, h, probe))
    solves = block.deq.forward_solve, block.deq.backward_solve
    assert min(solve.iterations for solve in solves) > AT_ONCE
    assert waits == reads(*solves)


@both
@every_solver
@every_precision
def test_reading_residuals_late_changes_nothing(kind, solver, precision, replayed, monkeypatch):
    block = make(kind, "tanh", root=0.9, solver=solver, precision=precision).cuda()
    h, probe = signal(kind).cuda(), torch.rand(signal(kind).shape).cuda()
    late, _ = settled(block, h, probe)
    figures = block.deq.forward_solve, block.deq.backward_solve
    monkeypatch.setattr(solvers, "_at_once", lambda f: 2)
    at_once, _ = settled(block, h, probe)
    assert torch.equal(late, at_once)
    for one, other in zip(
        figures, (block.deq.forward_solve, block.deq.backward_solve), strict=True
    ):
        assert one.iterations == other.iterations
        assert one.residual == pytest.approx(other.residual, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    "net, activation", [("linear_pcdeq_1", "tanh"), ("multi_conv_pcdeq_2", "sigmoid")]
)
def test_a_step_waits_for_its_residuals_alone(net, activation):
    images, _, _ = data.load("mnist", sample=True, device="cuda")
    network = pcdeq.build_network(net, activation).cuda()
    optimizer = AdamW(network.parameters(), lr=1e-3, weight_decay=1.5e-2)
    shuffle = torch.randperm(len(images), generator=generator("cpu", 1)).cuda()

    def step():
        x, y = images.batch(shuffle[:64])
        network.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        network.clamp()

    for _ in range(3):
        step()
    waits = synchronisations(step)
    solves = [s for b in network.blocks for s in (b.deq.forward_solve, b.deq.backward_solve)]
    assert waits == reads(*solves)


@both
@every_solver
def test_replays_are_what_is_launched_bit_by_bit(kind, solver):
    """And go on so when TF32 is changed, under inference mode, and on another stream."""
    block = make(kind, "sigmoid", root=0.9, n=64, solver=solver).cuda()
    h = signal(kind).repeat_interleave(13, 1)[:, :64].cuda()
    replay.clear()

    def same():
        z = [block(h) for _ in range(3)]
        return torch.equal(z[0], z[1]) and torch.equal(z[0], z[2])

    assert same()
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, convolution.fp32_precision
    try:
        matmul.fp32_precision, convolution.fp32_precision = "tf32", "ieee"
        assert same()
    finally:
        matmul.fp32_precision, convolution.fp32_precision = before
    with torch.inference_mode():
        assert same()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert same()
    recorded = [r for r in replay._kept.values() if isinstance(r, replay.Replay)]
    assert len(recorded) == 4


def test_threads_that_share_a_stream_get_their_own_solutions():
    block = make("linear", "tanh", root=0.9, n=64).cuda()
    inputs = [torch.rand(batch, 64).cuda() for batch in (3, 5, 8, 8)]
    with torch.no_grad():
        wanted = [block(h) for h in inputs]
    wrong = []

    def work(h, z):
        with torch.no_grad():
            for _ in range(50):
                if not torch.allclose(copy.copy(block)(h), z, atol=1e-5):
                    wrong.append(len(h))

    in_threads(work, zip(inputs, wanted, strict=True))
    assert not wrong


def test_an_expanded_gradient_is_solved_for_by_replays():
    block = make("linear", "tanh", root=0.9, n=64).cuda()
    h = torch.rand(8, 64).cuda().requires_grad_()
    gradients = [torch.autograd.grad(block(h).sum(), h)[0] for _ in range(3)]
    assert torch.equal(gradients[0], gradients[2])


def test_replays_hold_no_more_memory_from_step_to_step():
    block = make("linear", "tanh", root=0.9, n=64).cuda()
    h, probe = (torch.rand(32, 64).cuda() for _ in range(2))
    settled(block, h, probe)
    held = memory_at_rest()
    for _ in range(5):
        run(block, h, probe)
    assert memory_at_rest() == held


def memory_at_rest() -> int:
    """Bytes in use; autograd's thread frees a graph a moment after the gradients are there."""
    time.sleep(0.2)
    return torch.cuda.memory_allocated()


def test_a_thread_that_has_computed_nothing_yet_can_record():
    """It has no handle of cuBLAS of its own, and must not make one while it records."""
    block = make("linear", "tanh", root=0.9, n=64).cuda()
    h = torch.rand(16, 64).cuda()
    replay.clear()

    def work():
        with torch.no_grad():
            block(h)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        work()  # asked for, by a thread that keeps its handle
        in_threads(work, [()])
    assert [str(warning.message) for warning in seen] == []
    assert [type(kept) for kept in replay._kept.values()] == [replay.Replay]


@both
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_solve(kind, low):
    block = make(kind, "sigmoid", root=0.9).cuda()
    h, probe = signal(kind).cuda(), torch.rand(signal(kind).shape).cuda()
    plain, plain_gradients = run(block, h, probe)
    with torch.autocast("cuda", low):
        cast, gradients = run(block, h, probe)
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, plain_gradients, rtol=1e-3, atol=1e-4)


def test_augmentation_is_the_same_for_the_same_seed():
    images, _, _ = data.load("cifar", sample=True, augment=True, device="cuda")
    one, other = (images.batch(slice(64), generator("cuda", 0, 1))[0] for _ in range(2))
    assert one.device.type == "cuda" and torch.equal(one, other)


def test_batch_norms_of_several_processes_are_synchronised_under_their_names():
    network = pcdeq.build_network("multi_conv_pcdeq_1", "tanh").cuda()
    names = list(network.state_dict())
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    kinds = [type(layer) for layer in network if "BatchNorm" in type(layer).__name__]
    assert set(kinds) == {torch.nn.SyncBatchNorm} and len(kinds) == 6
    assert list(network.state_dict()) == names
    assert Processes(torch.device("cuda")).wrap(network) is network


def test_a_process_of_two_trains_through_nccl():
    """The other one is missing from the group, and its part from each batch: one GPU takes one."""
    address = f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group("nccl", init_method=address, rank=0, world_size=1)
    try:
        processes = Processes(torch.device("cuda", 0), rank=0, world=2)
        network = pcdeq.build_network("multi_conv_pcdeq_1", "tanh").cuda()
        images, _, _ = data.load("mnist", sample=True, device="cuda")
        config = RunConfig("mnist", "multi_conv_pcdeq_1", "tanh", 1e-3, 2, 1.5e-2, 128, 1)
        trainer = Trainer(network, images, config, processes)
        rows = [trainer.epoch(epoch) for epoch in (1, 2)]
        processes.agree(network)
        assert processes.tell("said") == "said" and processes.sum(1.5, 2) == [1.5, 2]
    finally:
        dist.destroy_process_group()
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    assert all((block.deq.f.W.weight() >= 0).all() for block in network.blocks)


@pytest.mark.parametrize("net", ["linear_pcdeq_1", "multi_conv_pcdeq_2"])
def test_a_run_stops_goes_on_and_is_evaluated_on_either_device(net, tmp_path):
    flags = ["-net", net, "--sample", "--device", "cuda", "-m", "8", "--out", tmp_path]
    for epochs in (1, 2):
        status, _, err = run_script(SCRIPT, *flags, "-epochs", epochs, *["--resume"] * (epochs > 1))
        assert (status, err) == (0, "")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["device_name"] == torch.cuda.get_device_name()
    assert config["tf32"] == {
        "matmul": torch.backends.cuda.matmul.allow_tf32,
        "convolution": torch.backends.cudnn.allow_tf32,
    }
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[-1]["test_acc"]) > 80
    for device in ("cuda", "cpu"):
        flags = [tmp_path / "last.pth", "--sample", "--device", device]
        status, out, err = run_script(ROOT / "evaluate.py", *flags)
        assert (status, err) == (0, "")
        accuracy = float(re.search(r"accuracy ([0-9.]+) %", out)[1])
        assert accuracy == pytest.approx(float(rows[-1]["test_acc"]), abs=0.3)


def test_certificates_hold_on_the_device_too():
    network = pcdeq.build_network("linear_pcdeq_1", "tanh").cuda().eval()
    images, _, _ = data.load("mnist", sample=True, device="cuda")
    x, _ = images.batch(slice(16))
    (ours,) = pcdeq.certify(network, x)
    (row,) = robust_accuracy(network, images.some(16), [0.001], steps=2)
    assert row["certified"] <= row["attacked"] and row["contradictions"] == 0
    (theirs,) = pcdeq.certify(network.cpu(), x.cpu())
    assert ours.holds and ours.lower.device.type == "cuda"
    torch.testing.assert_close(ours.lower.cpu(), theirs.lower, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.upper.cpu(), theirs.upper, rtol=0, atol=1e-6)
