"""Load scikit-learn's handwritten digits: 1,797 real 8x8 images, no download (UCI, Alpaydin & Kaynak 1998)."""

import numpy as np

from kalmannorm.data.arrays import Arrays, digest

TEST_IMAGES = 360  # a fifth, stratified; the split is fixed (random_state 0), the same in every run


def load() -> Arrays:
    """Load the digits at their native 8x8, grey repeated over three channels.

    8x8 is too small for the networks here: `arrays.resize` brings them to the size of the budget.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # the values are 0..16
    images = np.repeat(grey[..., None], 3, axis=3)
    labels = bunch.target.astype(np.int64)
    train, test = train_test_split(np.arange(len(labels)), test_size=TEST_IMAGES, random_state=0, stratify=labels)
    four = (images[train], labels[train], images[test], labels[test])
    provenance = {"name": "digits", "fidelity": "scikit-learn's bundled copy", "sha256": digest(*four)}
    return Arrays(*four, classes=10, provenance=provenance)
