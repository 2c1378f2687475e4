"""Times training steps: this project's options, a textbook layer, torchdeq, and the bare kernels.

    python benchmarks/benchmark.py                 every row (ten to thirty minutes)
    python benchmarks/benchmark.py --rows '*linear*' --rounds 20
    python benchmarks/benchmark.py --device cuda

Everything that is compared runs in one process on the same weights and the same batch, in turns of
two to ten steps: as in training, caches and memory hold what the last step left. Each figure is a
median over the rounds, and what to read is the ratios. Weights come from a few steps of AdamW(1e-3,
weight decay 1.5e-2) on the shipped digits. The timed steps have learning rate 0, so that all of
them see the same weights. torchdeq is optional (``pip install torchdeq``).
"""

import argparse
import fnmatch
import functools
import statistics
import sys
import time
from collections.abc import Callable

import torch
from apart import LINUX, alone, peak_memory
from contestants import (
    BATCH,
    OPTIONS,
    ROWS,
    TEXTBOOK,
    TORCHDEQ,
    Row,
    contestant,
    installed_torchdeq,
    train_step,
    trained,
)
from textbook import TextbookBlock
from torch import Tensor, nn

from pcdeq import Network, project
from pcdeq.experiments import data, flags, machine
from pcdeq.experiments.cli import guarded

BARE = "bare kernels"
STEPS, ROUNDS = 10, 5  # on a GPU: in a row, and of those


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
        sigma = block.activation.function_
        parts[f"{name} product"] = (torch.no_grad()(functools.partial(W.apply, z, weight)), count)
        parts[f"{name} σ"] = (
            torch.no_grad()(functools.partial(sigma, z.clone())),
            deq.iter_forward,
        )
        setattr(model, name, Evaluated(block, z))
    rest = nn.Sequential(*model.children())
    rest.clamp = functools.partial(project, rest)
    parts["rest"] = (functools.partial(train_step, rest, optimizer, x, y), 1)
    return parts


def seconds(call: Callable[[], object], steps: int, device: torch.device) -> float:
    """Mean seconds of a few calls in a row, a GPU's work included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        call()
    wait()
    return (time.perf_counter() - start) / steps


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
    rounds = rounds or (ROUNDS if x.is_cuda else row.rounds)
    for turn in range(rounds + 2):
        for name, (call, _) in (calls | bare).items():
            spent = seconds(call, STEPS if x.is_cuda else row.steps, x.device)
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
        "backward": [b.iter_backward for b in blocks if b.iter_backward],  # torchdeq counts none
    }


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


def memory_table(seed: int, device: str) -> str:
    """Peak memory of a step; on the CPU each row and contestant in a process of its own."""

    def peak(name: str, index: int) -> float:
        if device != "cpu":  # a GPU counts what is allocated
            return peak_memory(name, ROWS[index], seed, device)["MiB"]
        return alone(name=name, row=index, seed=seed)["MiB"]

    names = [TEXTBOOK, *OPTIONS, *installed_torchdeq()]
    lines = ["**Peak memory of a step**, MiB above the network, its data and its libraries", ""]
    lines += [line(["", *(row.name for row in ROWS)]), "|" + " --- |" * (len(ROWS) + 1)]
    lines += [line([name, *(f"{peak(name, i):.0f}" for i in range(len(ROWS)))]) for name in names]
    return "\n".join(lines)


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rows", default="*", help="pattern of names, epoch and memory among them")
    parser.add_argument("--rounds", type=flags.count, help="rounds (default: 5 to 30, by the row)")
    parser.add_argument(
        "--seed", type=flags.seed, default=0, help="of weights and digits (default: 0)"
    )
    parser.add_argument(
        "--device", type=processor, default="cpu", help="cpu or cuda (default: cpu)"
    )
    args = parser.parse_args()
    names = [*(row.name for row in ROWS), "epoch", "memory"]
    if not fnmatch.filter(names, args.rows):
        parser.error(f"no row matches {args.rows!r}: {', '.join(names)}")
    print(
        f"{place(torch.device(args.device))}, torch {torch.__version__}, batch {BATCH}, "
        "medians of interleaved rounds\n"
        "it: the step of the row; B: the bare kernels; iterations block by block\n"
    )
    if not installed_torchdeq():
        print("without torchdeq, which is not installed (pip install torchdeq)\n")
    for row in ROWS:
        if not fnmatch.fnmatch(row.name, args.rows):
            continue
        images, _, _ = data.load(row.dataset, sample=True, device=args.device)
        report = measure(row, images, args.seed, args.rounds)
        print(table(row, report), end="\n\n", flush=True)
    if fnmatch.fnmatch("epoch", args.rows):
        turns = [
            [alone(name=name, seed=turn, device=args.device) for name in (TEXTBOOK, "")]
            for turn in range(5)
        ]
        print(epoch_table(turns), end="\n\n", flush=True)
    if fnmatch.fnmatch("memory", args.rows) and (LINUX or args.device != "cpu"):
        print(memory_table(args.seed, args.device))


def processor(name: str) -> str:
    """``flags.device``, of those that are timed."""
    if name not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{name!r} is not one of cpu, cuda")
    return flags.device(name)


def epoch_table(turns: list[list[dict]]) -> str:
    """Medians of an epoch of the textbook and of this project, as a Markdown table."""
    lines = ["**An epoch of MNIST linear with its data**, 60,000 digits", ""]
    lines += ["| | s | ratio | peak MiB |", "| --- | --- | --- | --- |"]
    theirs = statistics.median(turn[0]["seconds"] for turn in turns)
    for i, name in enumerate(("textbook, torchvision, DataLoader(4 workers)", "picard, fp32")):
        spent = statistics.median(turn[i]["seconds"] for turn in turns)
        peak = statistics.median(turn[i]["MiB"] for turn in turns)
        lines.append(f"| {name} | {spent:.1f} | {theirs / spent:.1f} | {peak:.0f} |")
    return "\n".join(lines)


def place(device: torch.device) -> str:
    """The machine, with what of its processor decides how much bfloat16 gains."""
    where = machine.environment(device)
    if device.type == "cuda":
        tf32 = [name for name, used in where["tf32"].items() if used]
        return f"{where['device_name']}, TF32 in {' and '.join(tf32) or 'nothing'}"
    instructions = torch.backends.cpu.get_cpu_capability()
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    amx = "unknown AMX" if probe is None else ("AMX" if probe() else "no AMX")
    threads = machine.workers(1, where["threads"])
    return f"{where['processor']}, {instructions}, {amx}, {threads}"


if __name__ == "__main__":
    sys.exit(guarded(main))
