"""Twelve cases measured on the authors' published networks, field by field.

``golden.json`` holds the numbers: networks built in float32 after ``torch.manual_seed(seed)``,
cast to float64 (in float32 the biases in front of batch norms have gradients of pure rounding
noise, which AdamW turns into full steps) and trained for four steps of AdamW with projection, on
batches drawn by NumPy. Every case carries its tolerances.

Four cases also have the logits of a checkpoint that the authors' scripts saved after four steps
in float32. ``checkpoint_noise`` holds the entries of that checkpoint that are rounding noise;
the others come out of the same four steps here.
"""

import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from blocks import every_device

import pcdeq
from pcdeq.networks import DATASETS

CASES = json.loads(Path(__file__).with_name("golden.json").read_text())
NAMES = [
    f"{c['dataset']}-{c['net']}-{c['activation']}" + ("-aug" if c["augment"] else "") for c in CASES
]
every_case = pytest.mark.parametrize("case", CASES, ids=NAMES)
WITH_CHECKPOINT = [i for i, c in enumerate(CASES) if "checkpoint_logits" in c]


def build(case: dict) -> pcdeq.Network:
    torch.manual_seed(case["seed"])
    return pcdeq.build_network(
        case["net"], case["activation"], case["dataset"], augment=case["augment"]
    )


def batch(case: dict, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, C, H, W) in float32 and labels of one step."""
    random = np.random.RandomState(case["data_seed"] + step)
    shape = (case["n"], *DATASETS[case["dataset"]])
    x = torch.from_numpy(random.random_sample(shape).astype(np.float32))
    if case["dataset"] != "mnist":
        x = (x - 0.47) / 0.24
    return x, torch.from_numpy(random.randint(0, 10, case["n"]))


def train(case: dict, dtype: torch.dtype, device: str = "cpu") -> SimpleNamespace:
    """The four steps, and what was seen on the way."""
    model = build(case).to(device, dtype)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=case["lr"], weight_decay=case["weight_decay"]
    )
    seen = SimpleNamespace(model=model, losses=[], forward=[], backward=[], gradients={})
    for step in range(case["steps"]):
        x, y = batch(case, step)
        loss = F.cross_entropy(model(x.to(device, dtype)), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            seen.gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        model.clamp()
        seen.losses.append(loss.item())
        seen.forward.append([b.deq.iter_forward for b in model.blocks])
        seen.backward.append([b.deq.iter_backward for b in model.blocks])
    seen.logits = logits(model, batch(case, 1000)[0].to(device, dtype)).cpu()
    return seen


@functools.cache
def trained(index: int, device: str) -> SimpleNamespace:
    """A case trained in float64, once for all tests."""
    return train(CASES[index], torch.float64, device)


@torch.no_grad()
def logits(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model.eval()(x)


def relative(value: torch.Tensor, reference: list) -> float:
    reference = torch.tensor(reference, dtype=torch.float64)
    return ((value.double() - reference).norm() / reference.norm()).item()


@every_case
def test_initial_parameters(case):
    model = build(case)
    assert sum(p.numel() for p in model.parameters()) == case["parameters"]
    state = model.state_dict()
    assert state.keys() == case["init_sums"].keys()
    for key, (total, absolute) in case["init_sums"].items():
        t = state[key].double()
        assert t.sum().item() == pytest.approx(total, rel=0, abs=2e-11 * absolute + 1e-11), key
        assert t.abs().sum().item() == pytest.approx(absolute, rel=2e-11), key


@every_case
def test_first_loss_in_float32(case):
    x, y = batch(case, 0)
    with torch.no_grad():
        loss = F.cross_entropy(build(case)(x), y).item()
    assert loss == pytest.approx(case["first_loss_float32"], rel=0, abs=1e-5)


@every_case
@every_device
def test_losses(case, device):
    losses = trained(CASES.index(case), device).losses
    tolerance = case["tolerance"]
    assert losses[0] == pytest.approx(case["losses"][0], rel=0, abs=tolerance["first_loss"])
    assert losses == pytest.approx(case["losses"], rel=0, abs=tolerance["losses"])


@every_case
@every_device
def test_first_gradients(case, device):
    gradients = trained(CASES.index(case), device).gradients
    assert gradients.keys() == case["first_grad_norm_and_sum"].keys()
    for name, (norm, total) in case["first_grad_norm_and_sum"].items():
        gradient = gradients[name]
        if norm < 1e-9:
            assert gradient.norm() < 1e-9, name
            continue
        tolerance = case["tolerance"]["first_grad_norm"] * norm
        assert gradient.norm().item() == pytest.approx(norm, rel=0, abs=tolerance), name
        tolerance *= math.sqrt(gradient.numel())  # of a sum, by Cauchy and Schwarz
        assert gradient.sum().item() == pytest.approx(total, rel=0, abs=tolerance), name


@every_case
@every_device
def test_iterations(case, device):
    seen = trained(CASES.index(case), device)
    assert np.abs(np.subtract(seen.forward, case["forward_iters"])).max() <= 1
    assert np.abs(np.subtract(seen.backward, case["backward_iters"])).max() <= 1


@every_case
@every_device
def test_evaluation_logits(case, device):
    seen = trained(CASES.index(case), device)
    assert relative(seen.logits, case["eval_logits"]) < case["tolerance"]["eval_logits"]


@pytest.mark.parametrize("index", WITH_CHECKPOINT, ids=[NAMES[i] for i in WITH_CHECKPOINT])
def test_checkpoint_logits(index, tmp_path):
    case = CASES[index]
    state = train(case, torch.float32).model.state_dict()
    for key, values in case["checkpoint_noise"].items():
        state[key] = torch.tensor(values)
    torch.save(state, tmp_path / "authors.pth")  # a plain state dict, as their scripts save it
    model = pcdeq.load_network(
        tmp_path / "authors.pth", case["net"], case["activation"], case["dataset"]
    )
    assert relative(model(batch(case, 1000)[0]), case["checkpoint_logits"]) < 1e-3
