"""Trains a pcDEQ network on CIFAR-10: ten kinds of things in colour, 32×32, 50,000 and 10,000.

The four convolutional networks are for it, and with ``--aug`` (random crops and flips) wider
multi-conv ones. ``python train_cifar.py --help`` shows the flags.
"""

from pcdeq.experiments.cli import main

if __name__ == "__main__":
    main("cifar", augmentation=True)
