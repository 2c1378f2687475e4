"""A call as a CUDA graph: a GPU is told once what to do, not kernel by kernel.

On small tensors a GPU computes faster than the processor launches: an iteration of a linear block
takes an H100 15 µs, and its launches 120. A recorded graph works in fixed places: ``Replay`` owns
them, and ``lend`` keeps a few recordings for whoever comes again with tensors of the same kind.
"""

import functools
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

KEPT = 32  # recordings; the oldest one goes first
LARGEST = 2**21  # elements of a tensor: beyond, kernels take longer than their launches


def pays(call: partial) -> bool:
    """Whether the tensors among the arguments are small, and on the current CUDA device."""
    tensors = _tensors(call)
    if not (tensors and tensors[0].is_cuda) or torch.compiler.is_compiling():
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
        here = torch.cuda.current_stream()
        stream, pool = _place(here.cuda_stream, torch.cuda.current_device())
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            self._call()  # so that what cuBLAS takes for itself on a stream is not of this graph
        self._graph = torch.cuda.CUDAGraph()
        # By thread, as others may well use the device meanwhile: NCCL's watchdog does.
        mode = {"stream": stream, "pool": pool, "capture_error_mode": "thread_local"}
        with _ONE_AT_A_TIME, torch.cuda.graph(self._graph, **mode):
            return self._call()

    def load(self, call: partial) -> None:
        """Copies the values of the tensors of a call of the same kind to the graph's own."""
        torch._foreach_copy_(_tensors(self._call), _tensors(call))  # one launch for all

    def __call__(self) -> Any:
        """Computes ``results`` from the graph's own tensors as they stand."""
        self._graph.replay()
        return self.results


@functools.cache
def _place(stream_id: int, device: int) -> tuple[torch.cuda.Stream, tuple[int, int]]:
    """Where graphs for a stream are recorded, and the memory that their temporaries share.

    They run one after another there; those of another stream may run at the same time.
    """
    return torch.cuda.Stream(device), torch.cuda.graph_pool_handle()


_ONE_AT_A_TIME = threading.Lock()  # torch records one graph at a time
_kept: dict[Hashable, Replay | None] = {}  # None: asked for once


@contextmanager
def lend(call: partial) -> Iterator[Replay | None]:
    """A loaded ``Replay`` of the call, nobody else's meanwhile; ``None`` the first time.

    Then the caller must do without, and libraries load and choose their kernels.

    Args:
        call: as for ``Replay``; ``pays`` holds, and arguments other than tensors are hashable.
    """
    key = (call.func, *map(_kind, call.args), *_surroundings())
    seen, replay = key in _kept, _kept.pop(key, None)
    if seen and replay is None:
        replay = Replay(call)
    try:
        if replay:
            replay.load(call)
        yield replay
    finally:
        _kept[key] = replay or _kept.pop(key, None)  # last in the order
        while len(_kept) > KEPT:
            _kept.pop(next(iter(_kept)))


def clear() -> None:
    """Gives up all recordings, and their memory."""
    _kept.clear()


def _tensors(call: partial) -> list[Tensor]:
    return [a for a in call.args if isinstance(a, Tensor)]


def _kind(a: Tensor | Hashable) -> Hashable:
    return (a.shape, a.stride(), a.dtype, a.device) if isinstance(a, Tensor) else a


def _surroundings() -> tuple[Hashable, ...]:
    """What decides which kernels torch takes, and in which order they run."""
    return (
        torch.cuda.current_stream().cuda_stream,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
    )
