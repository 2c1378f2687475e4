"""pcdeq.replay: a recorded solve is the launched one. On a CPU a recording is simulated."""

import copy
import itertools
import warnings
from functools import partial

import pytest
import torch
from blocks import both, every_device, every_precision, every_solver, in_threads, make, run, signal
from torch import Tensor

from pcdeq import layers, replay, solvers
from pcdeq.layers import _f
from pcdeq.replay import Replay, lend, pays
from pcdeq.solvers import SOLVERS


class Simulated(Replay):
    """Computes anew where a graph would, in the same memory: nothing but its operands counts."""

    def _record(self):
        for t in replay._tensors(self._call):
            t.fill_(float("nan"))  # a recording computes nothing
        return self._call()

    def __call__(self):
        for old, new in zip(_flat(self.results), _flat(self._call()), strict=True):
            old.copy_(new)
        return self.results


def _flat(results) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return list(itertools.chain.from_iterable(map(_flat, results)))


@pytest.fixture(autouse=True)
def recordings(request, monkeypatch):
    """None are kept; on a CPU they are simulated, of the tensors that a GPU would take."""
    monkeypatch.setattr(replay, "_kept", {})
    parameters = getattr(request.node, "callspec", None)
    if not (parameters and parameters.params.get("device") == "cuda"):
        monkeypatch.setattr(replay, "Replay", Simulated)
        monkeypatch.setattr(replay, "_surroundings", tuple)
        monkeypatch.setattr(layers, "CONVOLUTION_PLUS", None)  # no kernel is packed there
        at_once = solvers._at_once
        monkeypatch.setattr(
            solvers, "_at_once", lambda f: 4 if isinstance(f, partial) else at_once(f)
        )
        monkeypatch.setattr(
            replay,
            "pays",
            lambda call: all(0 < t.numel() <= replay.LARGEST for t in replay._tensors(call)),
        )
    return replay._kept


def all_recorded() -> bool:
    return bool(replay._kept) and all(isinstance(r, Replay) for r in replay._kept.values())


def affine(b: Tensor, z: Tensor, factor: Tensor) -> Tensor:
    return z @ factor + b


def problem(seed: int, device: str = "cpu", n: int = 6, batch: int = 4) -> partial:
    generator = torch.Generator().manual_seed(seed)
    W = 0.9 * torch.rand(n, n, generator=generator) / n
    x = torch.rand(batch, n, generator=generator)
    return partial(_f, affine, torch.Tensor.tanh_, x.to(device), W.to(device))


def recorded() -> tuple[partial, Replay]:
    """A call, and its recording: the only one that is kept."""
    call = partial(_f, affine, torch.Tensor.tanh_, *problem(0).args[2:], torch.ones(4, 6))
    for _ in range(2):
        with lend(call):
            pass
    (recording,) = replay._kept.values()
    return call, recording


def launched(f: partial):
    """The same map in a form that is not recorded."""
    return lambda z: f(z)


@every_device
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("start", [None, 0.5])
@torch.no_grad()
def test_a_replayed_solve_is_the_launched_one(solver, nonnegative, start, device, recordings):
    """One after another with other operands, starts and rules; a count that is cut short."""
    for seed, (tol, most) in enumerate(
        [(1e-6, 200), (1e-3, 200), (1e-6, 200), (1e-7, 3), (0.9, 9)]
    ):
        f = problem(seed, device)
        z = None if start is None else torch.full((4, 6), start, device=device)
        rule = {"tol": tol, "max_iter": most, "nonnegative": nonnegative}
        ours, theirs = solver(f, z, **rule), solver(launched(f), z, **rule)
        torch.testing.assert_close(ours.z, theirs.z, rtol=0, atol=1e-6)
        assert ours[1:3] == theirs[1:3] and ours.converged == theirs.converged
        assert ours.residual == pytest.approx(theirs.residual, rel=1e-3, abs=1e-7)
        assert z is None or (z == start).all()
    assert len(recordings) == 1 and all_recorded()


@every_device
@torch.no_grad()
def test_what_a_solve_returned_outlives_the_next(device):
    solves = [solvers.picard(problem(s, device), None, tol=1e-6, max_iter=99) for s in (0, 1, 1, 2)]
    assert torch.equal(solves[1].z, solves[2].z)
    torch.testing.assert_close(solves[1].z, problem(1, device)(solves[1].z), rtol=0, atol=1e-5)
    assert not torch.allclose(solves[2].z, solves[3].z) and all_recorded()


@every_device
@torch.no_grad()
def test_not_finite_ends_a_replayed_solve(device):
    for seed in (0, 1):
        f = problem(seed, device)
        f.args[2][1, 1] = torch.nan
        solve = solvers.picard(f, None, tol=1e-6, max_iter=99)
        assert solve.iterations == 1 and not solve.converged
    good = solvers.picard(problem(2, device), None, tol=1e-6, max_iter=99)
    assert good.converged and good.z.isfinite().all()


@both
@every_solver
@every_precision
@every_device
def test_a_block_computes_the_same_by_replays(kind, solver, precision, device, monkeypatch):
    block = make(kind, "tanh", root=0.9, solver=solver, precision=precision).to(device)
    plain = copy.deepcopy(block)
    for seed in range(4):
        torch.manual_seed(seed)
        h = signal(kind).to(device)
        probe = torch.rand(h.shape).to(device)
        z, gradients = run(block, h, probe)
        with monkeypatch.context() as patch:
            patch.setattr(replay, "pays", lambda call: False)
            z_launched, gradients_launched = run(plain, h, probe)
        torch.testing.assert_close(z, z_launched, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradients, gradients_launched, rtol=1e-3, atol=1e-4)
        for name in ("iter_forward", "iter_backward"):
            assert getattr(block.deq, name) == getattr(plain.deq, name)
    assert all_recorded()


def test_a_call_is_recorded_the_second_time_and_lent_to_one_at_a_time():
    f = problem(0)
    call = partial(f.func, *f.args, torch.ones(4, 6))
    with lend(call) as first:
        assert first is None
    with lend(call) as one, lend(call) as other:
        assert one is not None and other is None
        torch.testing.assert_close(one(), call())
    with lend(call) as again:
        assert again is one


def test_recordings_are_told_apart_by_all_that_their_kernels_depend_on(recordings):
    x, W = problem(0).args[2:]
    z = torch.ones(4, 6)
    calls = [
        partial(_f, affine, torch.Tensor.tanh_, x, W, z),
        partial(_f, affine, torch.Tensor.sigmoid_, x, W, z),
        partial(_f, affine, torch.Tensor.tanh_, x.double(), W.double(), z.double()),
        partial(_f, affine, torch.Tensor.tanh_, x[:2], W, z[:2]),
        partial(_f, affine, torch.Tensor.tanh_, x, W.t(), z),
    ]
    for call in calls:
        with lend(call) as recording:
            assert recording is None
    assert len(recordings) == len(calls)
    for call in calls:
        with lend(call) as recording:
            torch.testing.assert_close(recording(), call())
    replay.clear()
    assert not replay._kept


def test_no_more_than_a_few_are_kept(monkeypatch, recordings):
    monkeypatch.setattr(replay, "KEPT", 3)
    for batch in (1, 2, 3, 1, 1, 4, 5):
        solvers.picard(problem(0, batch=batch), None, tol=1e-3, max_iter=9)
    kept = [key[3][0][0] for key in recordings]  # by the batch of z, the third argument
    assert kept == [1, 4, 5]
    assert [isinstance(r, Replay) for r in recordings.values()] == [True, False, False]


def test_large_tensors_are_launched(monkeypatch, recordings):
    monkeypatch.setattr(replay, "LARGEST", 35)  # W has 36 elements
    solvers.picard(problem(0), None, tol=1e-3, max_iter=9)
    assert not recordings


def test_a_solve_that_fails_gives_its_recording_back(recordings):
    call, recording = recorded()
    with pytest.raises(ZeroDivisionError), lend(call):
        raise ZeroDivisionError
    assert list(recordings.values()) == [recording] and isinstance(recording, Replay)


def test_where_recording_fails_solves_go_on_without(recordings, monkeypatch):
    def fail(self):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Simulated, "_record", fail)
    f = problem(0)
    wanted = solvers.picard(launched(f), None, tol=1e-6, max_iter=99)
    for warned in (False, True, False, False):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            solve = solvers.picard(f, None, tol=1e-6, max_iter=99)
        assert ["not be recorded" in str(w.message) for w in seen] == [True] * warned
        assert torch.equal(solve.z, wanted.z)


def test_what_is_lent_is_recorded_by_nobody_else():
    call, recording = recorded()
    with lend(call) as one:
        for _ in range(3):
            with lend(call) as other:
                assert other is None
        assert one is recording
    with lend(call) as again:
        assert again is recording


def test_threads_do_not_disturb_each_other():
    wanted = [solvers.picard(launched(problem(s)), None, tol=1e-6, max_iter=99).z for s in range(8)]
    wrong = []

    def work(seed):
        for _ in range(20):
            z = solvers.picard(problem(seed), None, tol=1e-6, max_iter=99).z
            if not torch.allclose(z, wanted[seed], atol=1e-5):
                wrong.append(seed)

    in_threads(work, [(seed,) for seed in range(8)])
    assert not wrong


def test_nothing_on_a_cpu_pays():
    with torch.no_grad():
        assert not pays(problem(0))
        assert not pays(partial(max, 1, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_what_needs_a_graph_or_has_keywords_does_not_pay():
    f = problem(0, "cuda")
    assert not pays(f)
    with torch.no_grad():
        assert pays(f)
        assert not pays(partial(f, scale=1.0))
        assert not pays(partial(f.func, *f.args, torch.ones(4, 6)))  # on the CPU
