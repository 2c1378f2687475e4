"""Trains a pcDEQ network on SVHN: house numbers in colour, 32×32, 73,257 and 26,032.

The four convolutional networks are for it. The training set is the split ``train``, without
``extra``. ``python train_svhn.py --help`` shows the flags.
"""

from pcdeq.experiments.cli import main

if __name__ == "__main__":
    main("svhn")
