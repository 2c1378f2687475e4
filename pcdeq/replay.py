"""A call as a CUDA graph: a GPU is told once what to do, not kernel by kernel.

On small tensors a GPU computes faster than the processor launches: an iteration of a linear block
takes an H100 15 µs, and its launches 120. A recorded graph works in fixed places: ``Replay`` owns
them, and ``lend`` keeps a few recordings for whoever comes again with tensors of the same kind.
Their memory outlives the models; ``clear`` gives it back. ``LARGEST = 0`` turns all of it off.
"""

import threading
import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

KEPT = 16  # recordings; the oldest one goes first
LARGEST = 2**21  # elements of a tensor: beyond, kernels take longer than their launches


def pays(call: partial) -> bool:
    """Whether a call is to be recorded: it needs no graph, is not traced, and has what it takes.

    That is positional arguments alone, and the tensors among them are small and on the current CUDA
    device.
    """
    tensors = _tensors(call)
    if not (tensors and tensors[0].is_cuda) or call.keywords:
        return False
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    here = torch.cuda.current_device()
    return all(t.is_cuda and t.device.index == here and 0 < t.numel() <= LARGEST for t in tensors)


class Replay:
    """A call as a CUDA graph.

    Args:
        call: of a function that depends on its arguments alone. It may write to the tensors among
            them, and must not read from the device. Their values do not matter yet.

    Attributes:
        results: what the function returned; overwritten by each replay.
    """

    def __init__(self, call: partial):
        args = [torch.empty_like(a) if isinstance(a, Tensor) else a for a in call.args]
        self._call = partial(call.func, *args)
        self.results: Any = self._record()

    def _record(self) -> Any:
        self._graph = torch.cuda.CUDAGraph()
        # Others may well use the device meanwhile, as NCCL's watchdog does; and cuBLAS takes memory
        # of its own for each stream, here from the graph's.
        where = {"stream": torch.cuda.Stream(), "capture_error_mode": "thread_local"}
        back = torch.cuda.stream(torch.cuda.current_stream())  # where torch leaves, if this fails
        self._call()  # a thread makes its handles of libraries now: it could not while it records
        with _ONE_AT_A_TIME, back, torch.cuda.graph(self._graph, **where):
            return self._call()

    def load(self, call: partial) -> None:
        """Copies the values of the tensors of a call of the same kind to the graph's own."""
        torch._foreach_copy_(_tensors(self._call), _tensors(call))  # one launch, if they are alike

    def __call__(self) -> Any:
        """Computes ``results`` from the graph's own tensors as they stand."""
        self._graph.replay()
        return self.results


_ONE_AT_A_TIME = threading.Lock()  # torch records one graph at a time
_ASKED, _LENT, _FAILED = "asked for once", "lent", "failed"
_kept: dict[Hashable, Replay | str] = {}
_of_kept = threading.Lock()


@contextmanager
def lend(call: partial) -> Iterator[Replay | None]:
    """A loaded ``Replay`` of the call, nobody else's meanwhile; or ``None``, to do without.

    ``None`` the first time, as what comes once is not worth a recording; while someone else has it;
    and where recording failed, with a warning.

    Args:
        call: as for ``Replay``; ``pays`` holds, and arguments other than tensors are hashable.
    """
    key = (call.func, *map(_kind, call.args), *_surroundings())
    with _of_kept:
        kept = _kept.pop(key, None)
        _kept[key] = kept if kept == _FAILED else _LENT  # last in the order
    if kept in (_LENT, _FAILED):
        yield None
        return
    try:
        if kept == _ASKED:
            kept = _recorded(call)
        replay = kept if isinstance(kept, Replay) else None
        if replay:
            replay.load(call)
        yield replay
    finally:
        with _of_kept:
            _kept.pop(key, None)
            _kept[key] = kept or _ASKED
            while len(_kept) > KEPT:
                _kept.pop(next(iter(_kept)))


def clear() -> None:
    """Gives up all recordings that are not lent, and their memory to torch's cache."""
    with _of_kept:
        _kept.clear()


def _recorded(call: partial) -> Replay | str:
    try:
        return Replay(call)
    except RuntimeError as error:  # no memory is one, too
        said = f"a CUDA graph could not be recorded, so solves take longer: {error}"
        warnings.warn(said, stacklevel=2)
        return _FAILED


def _tensors(call: partial) -> list[Tensor]:
    return [a for a in call.args if isinstance(a, Tensor)]


def _kind(a: Tensor | Hashable) -> Hashable:
    return (a.shape, a.stride(), a.dtype, a.device) if isinstance(a, Tensor) else a


def _surroundings() -> tuple[Hashable, ...]:
    """What decides which kernels torch takes, and in which order they run."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return (
        torch.cuda.current_stream().cuda_stream,
        matmul.fp32_precision,
        matmul.allow_bf16_reduced_precision_reduction,
        cudnn.conv.fp32_precision,
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        torch.backends.cuda.preferred_blas_library(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
    )
