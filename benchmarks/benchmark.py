"""Times training steps: this project's options, a textbook layer, torchdeq, and the bare kernels.

    python benchmarks/benchmark.py                 every row, as in the README (about ten minutes)
    python benchmarks/benchmark.py --rows '*linear*' --rounds 20

Everything that is compared runs in one process on the same weights and the same batch, in turns;
each figure is a median over the rounds, and what to read is the ratios. Weights come from a few
steps of AdamW(1e-3, weight decay 1.5e-2) on the shipped digits. The timed steps have learning rate
0, so that all of them see the same weights. torchdeq is optional (``pip install torchdeq``).
"""

import argparse
import fnmatch
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from textbook import TextbookBlock, TorchdeqBlock, textbook

from pcdeq import SOLVERS, Network, build_network
from pcdeq.experiments import data, machine
from pcdeq.implicit import PRECISIONS


@dataclass(frozen=True)
class Row:
    dataset: str
    network: str
    activation: str
    training_steps: int
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.dataset} {self.network} {self.activation}"


ROWS = (
    Row("mnist", "linear_pcdeq_1", "tanh", 150, 300),
    Row("mnist", "single_conv_pcdeq_1", "tanh", 4, 7),
    Row("mnist", "multi_conv_pcdeq_1", "relu6", 60, 20),
    Row("cifar", "multi_conv_pcdeq_1", "relu6", 25, 15),
)
BATCH = 64
TEXTBOOK, BARE = "textbook", "bare kernels"
OPTIONS = {
    f"{solver}, {precision}": {"solver": solver, "precision": precision}
    for precision in PRECISIONS
    for solver in SOLVERS
}
TORCHDEQ = {f"torchdeq {solver}": solver for solver in ("fixed_point_iter", "anderson")}


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """Projected AdamW, the same for all that are compared."""
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    model.clamp()


def trained(row: Row, images: data.ImageSet, seed: int) -> Network:
    """The network of a row after its few training steps."""
    torch.manual_seed(seed)
    network = build_network(row.network, row.activation, row.dataset)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1.5e-2, fused=True)
    shuffle = torch.randperm(len(images))
    for step in range(row.training_steps):
        start = step * BATCH % (len(images) - BATCH)
        train_step(network, optimizer, *images.batch(shuffle[start : start + BATCH]))
    return network


def contestant(name: str, row: Row, network: Network) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with the weights of ``network``, and its optimizer with learning rate 0."""
    if name in OPTIONS:
        model = build_network(row.network, row.activation, row.dataset, **OPTIONS[name])
        model.load_state_dict(network.state_dict())
        return model, torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    if name == TEXTBOOK:
        model = textbook(network)
    else:
        model = textbook(network, functools.partial(TorchdeqBlock, solver=TORCHDEQ[name]))
    return model, torch.optim.AdamW(model.parameters(), lr=0.0)


class Evaluated(nn.Module):
    """A block with its solve replaced by its recorded evaluation at a given z."""

    def __init__(self, block: nn.Module, z: Tensor):
        super().__init__()
        self.block, self.z = block, z

    def forward(self, h: Tensor) -> Tensor:
        x = self.block.inject(h)
        return self.block.deq.f(self.z.view_as(x), x)


def bare_kernels(row: Row, network: Network, x: Tensor, y: Tensor) -> dict[str, tuple]:
    """The parts of B: name → (call, how often it counts). What no implementation gets round.

    For each block, (forward + backward iterations) × its bare convolution or matrix product, plus
    forward iterations × its bare σ; and the rest of the step, each solve replaced by its recorded
    evaluation at a given z. All in float32, in the memory layout of this project.
    """
    model, optimizer = contestant("picard, fp32", row, network)
    inputs = []
    handles = [
        b.deq.register_forward_hook(lambda *io: inputs.append(io[2].detach())) for b in model.blocks
    ]
    train_step(model, optimizer, x, y)
    for handle in handles:
        handle.remove()
    parts = {}
    for index, (name, block) in enumerate(
        (name, layer) for name, layer in model.named_children() if layer in model.blocks
    ):
        z, W, deq = inputs[index], block.deq.f.W, block.deq
        weight = W.weight().detach()
        count = deq.iter_forward + deq.iter_backward
        sigma = block.activation.function
        parts[f"{name} product"] = (torch.no_grad()(functools.partial(W.apply, z, weight)), count)
        parts[f"{name} σ"] = (torch.no_grad()(functools.partial(sigma, z)), deq.iter_forward)
        setattr(model, name, Evaluated(block, z))
    rest = nn.Sequential(*model.children())
    rest.clamp = model.clamp
    parts["rest"] = (functools.partial(train_step, rest, optimizer, x, y), 1)
    return parts


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(row: Row, images: data.ImageSet, seed: int, rounds: int | None) -> dict[str, dict]:
    """Median seconds of a step, iterations and float32 evaluations of each contestant of a row."""
    network = trained(row, images, seed)
    x, y = images.batch(slice(0, BATCH))
    # The textbook and torchdeq get the layout that a data loader gives.
    plain = x.contiguous(memory_format=torch.contiguous_format)
    models, calls = {}, {}
    for name in (TEXTBOOK, *OPTIONS, *installed_torchdeq()):
        model, optimizer = contestant(name, row, network)
        models[name] = model
        batch = x if name in OPTIONS else plain
        calls[name] = (functools.partial(train_step, model, optimizer, batch, y), 1)
    bare = bare_kernels(row, network, x, y)
    times: dict[str, list[float]] = {name: [] for name in (*calls, *bare)}
    rounds = rounds or row.rounds
    for turn in range(rounds + 2):
        for name, (call, _) in (calls | bare).items():
            spent = seconds(call)
            if turn >= 2:  # the first two warm up
                times[name].append(spent)
    report = {}
    for name, model in models.items():
        report[name] = {"seconds": statistics.median(times[name]), **iterations(model)}
    B = sum(count * statistics.median(times[name]) for name, (_, count) in bare.items())
    return report | {BARE: {"seconds": B}}


def iterations(model: nn.Module) -> dict[str, list]:
    """Iterations by block; for this project's blocks with the float32 evaluations among them."""
    blocks = [m for m in model.modules() if isinstance(m, TextbookBlock) or hasattr(m, "deq")]
    if isinstance(model, Network):
        solves = [(b.deq.forward_solve, b.deq.backward_solve) for b in blocks]
        return {
            "forward": [f.iterations for f, _ in solves],
            "backward": [b.iterations for _, b in solves],
            "full": [f.full + b.full for f, b in solves],
        }
    return {
        "forward": [b.iter_forward for b in blocks],
        "backward": [b.iter_backward for b in blocks],
    }


def installed_torchdeq() -> tuple[str, ...]:
    try:
        import torchdeq  # noqa: F401
    except ImportError:
        return ()
    return tuple(TORCHDEQ)


# Peak memory and the whole epoch with its data: each in a process of its own.


def peak_memory(name: str, row: Row, seed: int) -> dict[str, float]:
    """MiB by which three steps raise the peak resident memory of this process."""
    images, _, _ = data.load(row.dataset, root="data", sample=True)
    network = trained(replace(row, training_steps=0), images, seed)
    x, y = images.batch(slice(0, BATCH))
    if name not in OPTIONS:
        x = x.contiguous(memory_format=torch.contiguous_format)
    model, optimizer = contestant(name, row, network)
    reset_peak()
    before = resident("VmRSS")
    for _ in range(3):
        train_step(model, optimizer, x, y)
    return {"MiB": resident("VmHWM") - before}


def reset_peak() -> None:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts anew


def resident(field: str) -> float:
    """``VmRSS``, resident memory, or ``VmHWM``, its peak, in MiB."""
    line = next(ln for ln in Path("/proc/self/status").read_text().splitlines() if field in ln)
    return int(line.split()[1]) / 2**10


def epoch(name: str, seed: int) -> dict[str, float]:
    """Seconds of one epoch of MNIST linear over 60,000 digits, and its peak memory in MiB.

    The digits are the shipped ones, fifteen times over: what is timed does not depend on them.
    The textbook reads them as torchvision's MNIST does, image by image through PIL and ToTensor,
    with a DataLoader of four workers; this project from its one tensor.
    """
    images, _, _ = data.load("mnist", root="data", sample=True)
    images = replace(
        images, images=images.images.repeat(15, 1, 1, 1), labels=images.labels.repeat(15)
    )
    torch.manual_seed(seed)
    network = build_network("linear_pcdeq_1", "tanh")
    reset_peak()
    start = time.perf_counter()
    if name == TEXTBOOK:
        model = textbook(network)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=1.5e-2)
        digits = AsTorchvision(images)
        for x, y in DataLoader(digits, BATCH, shuffle=True, num_workers=4):
            train_step(model, optimizer, x, y)
    else:
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=5e-4, weight_decay=1.5e-2, fused=True
        )
        for batch in torch.randperm(len(images)).split(BATCH):
            train_step(network, optimizer, *images.batch(batch))
    return {"seconds": time.perf_counter() - start, "MiB": resident("VmHWM")}


class AsTorchvision(Dataset):
    """Digits as ``torchvision.datasets.MNIST`` with ToTensor gives them, one at a time."""

    def __init__(self, images: data.ImageSet):
        self.images, self.to_tensor = images, transforms.ToTensor()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images.images[index, 0].numpy(), mode="L")
        return self.to_tensor(image), int(self.images.labels[index])


def alone(**arguments) -> dict:
    """Runs ``peak_memory`` or ``epoch`` in a process of its own and returns its figures."""
    command = [sys.executable, __file__, "--alone", json.dumps(arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


# The report


def table(row: Row, report: dict[str, dict]) -> str:
    """One row's contestants as a Markdown table."""
    base, B = report[TEXTBOOK]["seconds"], report[BARE]["seconds"]
    torchdeq = {name: report[name]["seconds"] for name in TORCHDEQ if name in report}
    heads = ["", "ms", "textbook / it", "it / B", *(f"{name} / it" for name in torchdeq)]
    heads += ["iterations forward", "backward", "of them float32"]
    lines = [f"**{row.name}**, {row.training_steps} training steps", "", line(heads)]
    lines += ["|" + " --- |" * len(heads)]
    for name, figures in report.items():
        spent = figures["seconds"]
        cells = [name, f"{1e3 * spent:.1f}", f"{base / spent:.2f}", f"{spent / B:.2f}"]
        cells += [f"{seconds / spent:.2f}" for seconds in torchdeq.values()]
        cells += [
            ", ".join(map(str, figures.get(key, []))) for key in ("forward", "backward", "full")
        ]
        lines.append(line(cells))
    return "\n".join(lines)


def memory_table(seed: int) -> str:
    """Peak memory of a step, each row and contestant in a process of its own."""
    names = [TEXTBOOK, *OPTIONS, *installed_torchdeq()]
    lines = ["**Peak memory of a step**, MiB above the network, its data and its libraries", ""]
    lines += [line(["", *(row.name for row in ROWS)]), "|" + " --- |" * (len(ROWS) + 1)]
    for name in names:
        peaks = (alone(name=name, row=index, seed=seed)["MiB"] for index in range(len(ROWS)))
        lines.append(line([name, *(f"{peak:.0f}" for peak in peaks)]))
    return "\n".join(lines)


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="*", help="pattern of names, epoch and memory among them")
    parser.add_argument("--rounds", type=int, help="rounds (default: 7 to 300, by the row)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    keep_freed_memory()
    if args.alone:
        task = json.loads(args.alone)
        what = peak_memory if "row" in task else epoch
        if "row" in task:
            task["row"] = ROWS[task["row"]]
        print(json.dumps(what(**task)))
        return
    where = machine.environment(torch.device("cpu"))
    print(
        f"{where['processor']}, {amx()}, {where['threads']} threads, "
        f"torch {where['versions']['torch']}, batch {BATCH}, medians of interleaved rounds\n"
    )
    for row in ROWS:
        if not fnmatch.fnmatch(row.name, args.rows):
            continue
        images, _, _ = data.load(row.dataset, root="data", sample=True)
        report = measure(row, images, args.seed, args.rounds)
        print(table(row, report), end="\n\n", flush=True)
    if fnmatch.fnmatch("epoch", args.rows):
        turns = [(alone(name=TEXTBOOK, seed=s), alone(name="", seed=s)) for s in range(5)]
        print(epoch_table(turns), end="\n\n", flush=True)
    if fnmatch.fnmatch("memory", args.rows) and sys.platform == "linux":
        print(memory_table(args.seed))


def epoch_table(turns: list[tuple[dict, dict]]) -> str:
    """Medians of an epoch of the textbook and of this project, as a Markdown table."""
    lines = ["**An epoch of MNIST linear with its data**, 60,000 digits", ""]
    lines += ["| | s | ratio | peak MiB |", "| --- | --- | --- | --- |"]
    theirs = statistics.median(turn[0]["seconds"] for turn in turns)
    for i, name in enumerate(("textbook, torchvision, DataLoader(4 workers)", "picard, fp32")):
        spent = statistics.median(turn[i]["seconds"] for turn in turns)
        peak = statistics.median(turn[i]["MiB"] for turn in turns)
        lines.append(f"| {name} | {spent:.1f} | {theirs / spent:.1f} | {peak:.0f} |")
    return "\n".join(lines)


def keep_freed_memory() -> None:
    """Starts this script again with a glibc that keeps freed memory for the next allocation.

    Else what one contestant frees goes back to the system, and the next one in turn pays for
    getting it again, page by page: ten contestants in one process would disturb one another.
    """
    keep = {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**32)}
    if sys.platform == "linux" and not keep.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | keep)


def amx() -> str:
    """What of the processor decides how much bfloat16 gains."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return "unknown AMX" if probe is None else ("AMX" if probe() else "no AMX")


if __name__ == "__main__":
    main()
