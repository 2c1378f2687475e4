"""Certificates over a test set: each block's figures in a table, and accuracy under attack.

Batches are taken in file order. What a certificate says of a sample does not depend on the others
of its batch; only the observed iterations do, since a solve stops by a norm over its batch.
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pcdeq.attack import attack
from pcdeq.certificates import Certificate, certify
from pcdeq.experiments.data import ImageSet
from pcdeq.networks import Network
from pcdeq.rates import RATE_STEPS
from pcdeq.robustness import robust

ATTACK_STEPS = 40
SHOWN = 3  # reasons, where a block's certificate does not hold


def warn_of_negative_weights(model: Network) -> None:
    """A printed line for each block whose W is not nonnegative."""
    for name, block in model.named_children():
        if block in model.blocks and (negative := int((block.deq.f.W.weight() < 0).sum())):
            weights = "weight" + "s" * (negative > 1)
            print(f"warning: {name} has {negative:,} negative {weights}: no theorem holds for it")


def certify_set(
    model: Network,
    images: ImageSet,
    *,
    batch_size: int | None = None,
    after_batch: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Certificates of every block for a whole test set, summed up block by block.

    Args:
        model: the network; its mode is restored.
        images: the test set, on the model's device.
        batch_size: images a batch; by default 500 vectors or 100 images reach the blocks at once.
        after_batch: called after each batch; what it raises ends the pass.

    Returns:
        For each block a dict of plain values, ready for JSON (``None`` where infinite): ``block``,
        ``images``, ``holds`` (for all), ``reasons`` (those for which it does not hold, with the
        number of batches), ``smallest_weight``, ``smallest_injected``; of ``Certificate``'s figures
        per sample ``rate_median`` (lower and upper bound), ``rate_worst`` (largest upper bound),
        ``rate_steps``, ``width``, ``error`` and ``predicted`` (largest); ``observed`` (largest).
    """
    size = batch_size or _batch_size(model)
    parts: list[list[dict]] = [[] for _ in model.blocks]
    for first in range(0, len(images), size):
        x, _ = images.batch(slice(first, first + size))
        for part, certificate in zip(parts, certify(model, x), strict=True):
            part.append(_figures(certificate))  # not the enclosures themselves
        after_batch()
    return [_summary(part) for part in parts]


def _batch_size(model: Network) -> int:
    return 500 if model.name.startswith("linear") else 100


def _figures(c: Certificate) -> dict[str, Any]:
    names = ("name", "smallest_weight", "smallest_injected", "observed", "holds", "reason")
    tensors = ("width", "error", "rate_lower", "rate_upper", "predicted")
    return {name: getattr(c, name) for name in names} | {
        name: getattr(c, name).tolist() for name in tensors
    }


def _summary(part: list[dict]) -> dict[str, Any]:
    def all_of(name: str) -> list[float]:
        return [value for figures in part for value in figures[name]]

    def of(statistic: Callable[[list[float]], float], values: list[float]) -> float:
        return math.nan if any(map(math.isnan, values)) else statistic(values)

    reasons = Counter(figures["reason"] for figures in part if not figures["holds"])
    summary = {
        "block": part[0]["name"],
        "images": len(all_of("width")),
        "holds": not reasons,
        "reasons": dict(reasons),
        "smallest_weight": of(min, [figures["smallest_weight"] for figures in part]),
        "smallest_injected": of(min, [figures["smallest_injected"] for figures in part]),
        "rate_median": [of(statistics.median, all_of(f"rate_{end}")) for end in ("lower", "upper")],
        "rate_worst": of(max, all_of("rate_upper")),
        "rate_steps": RATE_STEPS,
        "width": of(max, all_of("width")),
        "error": of(max, all_of("error")),
        "predicted": of(max, all_of("predicted")),
        "observed": max(figures["observed"] for figures in part),
    }
    return {name: _plain(value) for name, value in summary.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_certificates(summaries: Sequence[dict[str, Any]]) -> str:
    """The table for the screen, of what ``certify_set`` returns."""
    first = summaries[0]
    lines = [
        f"certificates of {first['images']:,} images, rounding included "
        f"(rates bounded by {first['rate_steps']} power steps)",
        "  block     holds    median rate   worst     width     error  predicted  observed",
    ]
    for s in summaries:
        low, high = s["rate_median"]
        median = "–" if high is None else f"{_number(low, '.3f')}–{high:.3f}"
        lines.append(
            f"  {s['block']:<8}  {'yes' if s['holds'] else 'NO':<5}  {median:>13}  "
            f"{_number(s['rate_worst'], '.3f'):>6}  {_number(s['width'], '.1e'):>8}  "
            f"{_number(s['error'], '.1e'):>8}  {_number(s['predicted'], '.0f'):>9}  "
            f"{s['observed']:>8}"
        )
    for s in summaries:
        for reason, batches in list(s["reasons"].items())[:SHOWN]:
            lines.append(f"  {s['block']}, {batches} batch{'es' * (batches > 1)}: {reason}")
        if len(s["reasons"]) > SHOWN:
            lines.append(f"  {s['block']}: and {len(s['reasons']) - SHOWN} other reasons")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def boxes(images: ImageSet, indices: slice, radius: float) -> tuple[Tensor, Tensor]:
    """All images within ``radius`` of each of these, as the network sees them.

    Args:
        images: the set.
        indices: which of them.
        radius: in units of pixels in [0, 1], in the sup norm; the boxes are clipped to [0, 1]
            before the data set's normalisation.

    Returns:
        Lower and upper corners, float64 (B, C, H, W).
    """
    pixels = images.images[indices].cpu().double() / 255
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (images.mean, images.std)
    )
    lower, upper = (((pixels + r).clamp(0, 1) - mean) / std for r in (-radius, radius))
    return lower, upper


def robust_accuracy(
    model: Network,
    images: ImageSet,
    radii: Sequence[float],
    *,
    batch_size: int | None = None,
    steps: int = ATTACK_STEPS,
    after_batch: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Accuracy that is proved, and accuracy under attack, for boxes around the images.

    The true accuracy on the boxes lies between the two: at least ``certified`` (for the true fixed
    points), at most ``attacked`` (for the network as run).

    Args:
        model: the network.
        images: the test set, on the model's device.
        radii: of the boxes, in units of pixels in [0, 1].
        batch_size: as for ``certify_set``.
        steps: of the attack.
        after_batch: called after each batch for each radius.

    Returns:
        For each radius a dict of plain values: ``radius``, ``images``, ``certified`` and
        ``attacked`` (percent of all images), ``contradictions`` (images both proved and broken: 0,
        but for margins below the float32 network's distance from its fixed points).
    """
    size = batch_size or _batch_size(model)
    counts = {radius: Counter() for radius in radii}
    for first in range(0, len(images), size):
        batch = slice(first, first + size)
        x, labels = images.batch(batch)
        for radius, count in counts.items():
            lower, upper = boxes(images, batch, radius)
            proved = robust(model, lower, upper, labels).to(x.device)  # boxes are on the CPU
            corners = (corner.to(x.device, x.dtype) for corner in (lower, upper))
            broken = ~(attack(model, x, *corners, labels, steps=steps).margin > 0)
            count["certified"] += int(proved.sum())
            count["attacked"] += int((~broken).sum())
            count["contradictions"] += int((proved & broken).sum())
            after_batch()
    return [
        {
            "radius": radius,
            "images": len(images),
            "certified": 100 * count["certified"] / len(images),
            "attacked": 100 * count["attacked"] / len(images),
            "contradictions": count["contradictions"],
        }
        for radius, count in counts.items()
    ]


def format_robustness(rows: Sequence[dict[str, Any]]) -> str:
    """The table for the screen, of what ``robust_accuracy`` returns."""
    lines = [
        f"accuracy of {rows[0]['images']:,} images under all changes within a radius "
        "(sup norm, pixels in [0, 1])",
        "  radius  certified  attacked",
    ]
    lines += [
        f"  {row['radius']:<6.4g}  {row['certified']:>7.2f} %  {row['attacked']:>6.2f} %"
        for row in rows
    ]
    if broken := sum(row["contradictions"] for row in rows):
        lines.append(
            f"warning: {broken} proved and broken all the same: the network as run is too far from "
            "its fixed points (a smaller --tol helps), or this is a bug"
        )
    return "\n".join(lines)
