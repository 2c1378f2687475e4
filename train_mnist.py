"""Trains a pcDEQ network on MNIST: grey digits, 28×28, 60,000 to train and 10,000 to test.

All six networks are for MNIST; the linear ones for MNIST alone. Pixels are in [0, 1] and not
normalised. ``python train_mnist.py --help`` shows the flags.
"""

from pcdeq.experiments.cli import main

if __name__ == "__main__":
    main("mnist")
