"""What a user of the library hands over, refused in one sentence where it is of the wrong kind."""

from numbers import Integral

from torch import Tensor, nn


def check_count(name: str, value: object) -> None:
    """Refuses, with a ValueError, what is no whole number from 1 on."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1 on, not {value!r}")


def check_tensor(name: str, value: object) -> None:
    """Refuses, with a TypeError, what is no tensor: arrays and lists."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")


def check_module(model: object) -> None:
    """Refuses, with a TypeError, what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be an nn.Module, not {type(model).__name__}")
