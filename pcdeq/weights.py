"""Reading trained weights, this project's and the authors': verified, or refused with a reason.

A checkpoint of this project is a dict: what the network is (``network, activation, dataset,
augment, classes``, and ``class_names`` where there are any) and its state dict (``model``). The
authors' checkpoints are bare state dicts with the same keys. Nothing in a file is executed
(``weights_only=True``), and its checksums are verified first: ``torch.load`` does not, and loads
flipped bits as silently wrong weights.
"""

import os
import stat
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from pcdeq.networks import Network, build_network, check_network

IDENTITY = {"network": str, "activation": str, "dataset": str, "augment": bool, "classes": int}


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or is not one for this network; the message names the file."""


def describe(model: Network) -> dict:
    """What the network is, as plain values: the entries that a checkpoint has beside ``model``."""
    names = {"class_names": list(model.class_names)} if model.class_names else {}
    return {
        "network": model.name,
        "activation": model.activation,
        "dataset": model.dataset,
        "augment": model.augment,
        "classes": model.classes,
        **names,
    }


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Reads a checkpoint onto the CPU after verifying the checksum of each part of the file.

    Args:
        path: a file as ``torch.save`` writes it.

    Returns:
        The dict: this project's checkpoint, or the authors' state dict.

    Raises:
        CheckpointError: no such file, damaged, holding anything but tensors and plain values, or
            not a checkpoint.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode  # which, unlike is_file, says why it cannot
        if stat.S_ISDIR(mode):
            raise CheckpointError(f"{path} is a folder: name best.pth or last.pth in it")
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{path} is no ordinary file")
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"{path} is damaged: the checksum of {damaged} does not match")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: there is no such file or folder") from None
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path} is no checkpoint as torch saves them since 1.6, or is damaged"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged or foreign archive can fail anywhere in the readers
        raise CheckpointError(
            f"{path} is no checkpoint of tensors and plain values (a state dict, not a pickled "
            "module), or is damaged"
        ) from error
    model = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(model, dict) or not all(map(_is_entry, model.items())):
        if isinstance(model, dict) and isinstance(model.get("state_dict"), dict):
            raise CheckpointError(f"{path} holds more than its state_dict: save that alone")
        raise CheckpointError(f"{path} is no checkpoint: it holds no state dict of tensors")
    if model and all(key.startswith("module.") for key in model):
        raise CheckpointError(
            f"{path} was saved from a parallel wrapper, with names like {min(model)}: save the "
            "state dict of its .module"
        )
    return content


def load_weights(model: Network, path: str | os.PathLike) -> None:
    """Loads this project's ``best.pth``/``last.pth`` or the authors' checkpoint into a network.

    The authors' files say neither variant nor activation nor data set, so they are refused only
    where keys or shapes differ: whether they belong to ``model`` otherwise is the caller's word.

    Args:
        model: a network from ``build_network``; changed only if the checkpoint fits.
        path: the file.

    Raises:
        CheckpointError: unreadable (see ``read_checkpoint``), or of another network, activation,
            data set or number of classes, the message names both; or not finite.
        TypeError: the model is none of the six networks.
    """
    if not isinstance(model, Network):
        raise TypeError(
            f"load_weights is for networks from build_network, not for {type(model).__name__}: "
            "a model of one's own has its load_state_dict"
        )
    content = read_checkpoint(path)
    if "model" in content:
        mine, theirs = _identity(describe(model), path), _identity(content, path)
        if mine != theirs:
            raise CheckpointError(f"{path} holds {_sentence(theirs)}, not {_sentence(mine)}")
    load_state(model, content, path)


def load_network(
    path: str | os.PathLike,
    network: str | None = None,
    activation: str | None = None,
    dataset: str | None = None,
    augment: bool | None = None,
    **solver_options,
) -> Network:
    """Builds the network that a checkpoint holds, and loads it.

    Args:
        path: the file.
        network: name of the network; needed for the authors' files, which do not say it.
        activation: likewise.
        dataset: likewise.
        augment: likewise; taken from the file, or false, where not given.
        solver_options: as for ``build_network``.

    Returns:
        The network on the CPU, in evaluation mode.

    Raises:
        CheckpointError: unreadable, contradicting the arguments, or needing them.
        ValueError: there is no such value of an option.
        TypeError: there is no such option.
    """
    content = read_checkpoint(path)
    state = content.get("model", content)
    classifier = state.get("classifier.weight")
    if classifier is None or classifier.ndim != 2:
        raise CheckpointError(
            f"{path} holds no network of this collection: it has no classifier (into a network of "
            "your own, load_state_dict loads it)"
        )
    asked = dict(zip(IDENTITY, (network, activation, dataset, augment), strict=False))
    if "model" in content:
        identity = _identity(content, path)
        for key, value in asked.items():
            if value is not None and value != identity[key]:
                other = f"its {key} is not {value}"
                if key == "augment":
                    other = f"it was trained with{'out' * value} augmentation"
                raise CheckpointError(f"{path} holds {_sentence(identity)}: {other}")
        if identity["classes"] != len(classifier):
            raise CheckpointError(
                f"{path} holds {_sentence(identity)}, but a classifier of {len(classifier)}"
            )
    else:
        missing = [key for key in ("network", "activation", "dataset") if asked[key] is None]
        if missing:
            raise CheckpointError(
                f"{path} is a plain state dict, which does not say its {', '.join(missing)}: "
                "name what is missing (on a command line: -net, -activ, --dataset)"
            )
        identity = {**asked, "augment": bool(augment), "classes": len(classifier)}
    identity = [identity[key] for key in IDENTITY]
    try:
        check_network(*identity)
    except ValueError as error:
        raise CheckpointError(f"{path} holds no network of this collection: {error}") from error
    model = build_network(*identity, **solver_options)
    load_state(model, content, path)
    return model.eval()


def _is_entry(entry: tuple) -> bool:
    """Whether it can be one of a state dict: a name and a plain tensor of real or whole numbers."""
    key, value = entry
    return (
        isinstance(key, str)
        and isinstance(value, Tensor)
        and (value.layout, value.device.type) == (torch.strided, "cpu")
        and (value.is_floating_point() or value.dtype == torch.int64)  # none quantised or complex
    )


def _identity(content: dict, path: str | os.PathLike) -> dict:
    """What the network of one of this project's checkpoints is."""
    identity = {key: content.get(key) for key in IDENTITY}
    if any(type(identity[key]) is not kind for key, kind in IDENTITY.items()):
        raise CheckpointError(
            f"{path} does not say which network it holds: save its 'model' alone, as a plain state "
            "dict, and name the network"
        )
    names = content.get("class_names", [])
    whole = type(names) is list and all(type(name) is str for name in names)
    if not whole or len(names) not in (0, identity["classes"]):
        raise CheckpointError(f"{path} does not name its {identity['classes']} classes")
    return identity


def load_state(model: Network, content: dict, path: str | os.PathLike) -> None:
    """Puts what was read from a file into a network of its kind: weights and names of classes.

    Args:
        model: the network; unchanged where the weights are refused.
        content: what ``read_checkpoint`` gives.
        path: of the file, for messages.

    Raises:
        CheckpointError: names or shapes are another network's, or values are whole or not finite.
    """
    state = content.get("model", content)
    mine = model.state_dict()
    missing, foreign = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
    shapes = [key for key in mine.keys() & state.keys() if mine[key].shape != state[key].shape]
    faults = {"lacks": missing, "has an unknown": foreign, "has another shape of": shapes}
    for what, keys in faults.items():
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise CheckpointError(
                f"{path} is for another network than {_sentence(describe(model))}: "
                f"it {what} {min(keys)}{more}"
            )
    real = (key for key, value in mine.items() if value.is_floating_point())
    if whole := [key for key in real if not state[key].is_floating_point()]:
        raise CheckpointError(f"{path} is of no use: its {min(whole)} holds whole numbers")
    loaded = {key: value.to(mine[key].dtype) for key, value in state.items()}
    if broken := [key for key, value in loaded.items() if not value.isfinite().all()]:
        dtype = str(mine[min(broken)].dtype).removeprefix("torch.")
        raise CheckpointError(f"{path} is of no use: its {min(broken)} is not finite in {dtype}")
    model.load_state_dict(loaded)
    names = content.get("class_names", model.class_names)  # older checkpoints have none
    model.class_names = tuple(names) if "model" in content else ()


def _sentence(identity: dict) -> str:
    aug = " with augmentation" if identity["augment"] else ""
    return (
        f"{identity['network']} with {identity['activation']} for {identity['dataset']}{aug}, "
        f"{identity['classes']} classes"
    )
