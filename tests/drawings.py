"""What a test sees of a figure."""

import numpy as np


def lines(axis) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_ydata() for line in axis.get_lines()}
