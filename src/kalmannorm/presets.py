"""Define the variants of Kalman Normalization: of the paper, the released code, the talk and v1. Imports no torch."""

from typing import Any

KALMAN = ("bkn", "gkn")
SYNONYMS = {"kn": "bkn"}  # names in the papers, also in conf/norm
# Normalizers whose statistics are shared by a group of images, so that `stat_batch` has an effect.
BATCH_STATISTICS = ("bn", "brn", "sn", "bkn", "syncbn", "ibn", "ssn", "zca", "itern", "pn")
# Normalizers whose groups may span devices.
SPAN_DEVICES = ("syncbn", "pn")
# Normalizers whose statistics are, in a run, always those of the whole gradient batch.
WHOLE_BATCH = ("pn",)
# Normalizers without a beta that could replace a convolution's bias: convert gives every convolution one.
NEED_BIAS = ("wn", "none")

# The released code fixes the gain, at two statistics batches only.
_RELEASED_GAINS = {2: 0.1, 128: 0.95}

_LEARNED = {"gain": 0.5, "learn_gain": True, "noise": True, "guard": None}
_OWN_TRANSITION = {**_LEARNED, "transition": "learned", "mixture": True}
_ALL_GROUPS = {"moving_groups": "mean", "first_unbiased": False}

# `predictor` and `transition` (absent: the convolution's weight) are read by convert; `batch` holds the options that
# exist only where groups of images share statistics (BKN); `estimator` goes to every Kalman normalizer.
PRESETS: dict[str, dict[str, Any]] = {
    # Paper Eq. 7, with the covariance as 3.2 defines it, Cov(x - mu): of a mixture, which v1's appendix, the talk and
    # the released code write out. Gain and R learned. No source gives the gain's start: 0.5 is ours.
    "paper": {"predictor": "closed", "estimator": {**_LEARNED, "mixture": True}, "batch": _ALL_GROUPS},
    # Eq. 7 to the letter, without the mixture's term: the variance does not know how wrong the predicted mean was, and
    # post-activation ResNets stay at chance unless the rate is warmed up (docs/method.md).
    "eq7": {"predictor": "closed", "estimator": {**_LEARNED, "mixture": False}, "batch": _ALL_GROUPS},
    # Ours: predict from what the normalizers put out, N(beta, gamma^2), not from beliefs about what went in; the prior
    # counts as much as a fixed number of measured values; the first belief is that of the images (paper 3.3).
    "robust": {
        "predictor": "closed",
        "estimator": {
            **_LEARNED,
            "gain": None,
            "prior_values": 2048.0,
            "mixture": True,
            "belief": "output",
            "input_belief": "data",
        },
        "batch": _ALL_GROUPS,
    },
    # The authors' CIFAR script: sampled prior, fixed gain, mixture term, fall-back to the measurement, moving averages
    # of the first group only, a fused first layer whose variance is unbiased.
    "released": {
        "predictor": "sampling",
        "estimator": {"learn_gain": False, "noise": False, "mixture": True, "guard": 100.0},
        "batch": {"moving_groups": "first", "first_unbiased": True},
    },
    # The talk's and v1's equations: a transition matrix of each layer's own, learned; the mixture term; in v1 one R for
    # all layers. Both are an interpretation: the sources give neither the matrix's size (no size fits v1's parameter
    # count) nor its start, and their equations have no ReLU.
    "talk": {"predictor": "closed", "estimator": _OWN_TRANSITION, "batch": _ALL_GROUPS},
    "v1": {"predictor": "closed", "estimator": {**_OWN_TRANSITION, "noise": "shared"}, "batch": _ALL_GROUPS},
}


def preset_options(preset: str, norm: str, stat_batch: int | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of normalizer `norm` ("bkn" or "gkn") in a preset, under those given. ValueError: an unknown
    preset; the released code's gain for a statistics batch that it does not have."""
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; valid: {', '.join(PRESETS)}")
    chosen = PRESETS[preset]
    options = {**chosen["estimator"], **(chosen["batch"] if norm == "bkn" else {}), **given}
    # One of the two says what the gain is; the one that was given replaces the preset's.
    if given.get("gain") is not None:
        options["prior_values"] = given.get("prior_values")
    elif given.get("prior_values") is not None:
        options["gain"] = None
    if preset == "released" and "gain" not in given:
        if stat_batch not in _RELEASED_GAINS:
            raise ValueError(
                f"the released code fixes the gain at statistics batch 2 (0.1) and 128 (0.95) only, not {stat_batch}: "
                "pass gain="
            )
        options["gain"] = _RELEASED_GAINS[stat_batch]
    return options
