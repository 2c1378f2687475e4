"""What a test sees of a figure."""

import numpy as np


def legend_of(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].texts]


def lines(axis) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_ydata() for line in axis.get_lines()}
