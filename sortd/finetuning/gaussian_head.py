"""The Gaussian rule as a linear layer: the head that fine-tuning starts from, in closed form.

The rule is that of docs/decisions.md, section "best", without its scaling of placed rows to unit length, which is not
linear: classes share one covariance, shrunk to the isotropic one, and class means are drawn to the common mean.
"""

import numpy as np

from sortd.arrays import Array, IntArray
from sortd.classify.gaussian import MEAN_SHRINKAGE, PSEUDO_ROWS


def gaussian_head(features: Array, classes: IntArray, weights: Array, *, count: int) -> tuple[Array, Array]:
    """Return the weight (C, d) and the bias (C,) of a linear layer that gives log likelihoods but for a constant.

    Args:
        features: float64 (N, d).
        classes: int64 (N,); a class without any image has the common mean.
        weights: (N,): how much each image counts against others of its class; 1 is a whole one.
        count: C.
    """
    held = np.bincount(classes, weights=weights, minlength=count)
    present = held > 0
    means = np.zeros((count, features.shape[1]))
    np.add.at(means, classes, weights[:, None] * features)
    means[present] /= held[present, None]
    center = means[present].mean(axis=0)
    means[~present] = center
    shares = weights / held[classes] / present.sum()
    variance = shares @ np.square(features - center)
    typical = max(float(variance.mean()), 1e-12)
    steady = (len(features) * variance + PSEUDO_ROWS * typical) / (len(features) + PSEUDO_ROWS)
    scale = 1.0 / np.sqrt(steady)
    residuals = (features - means[classes]) * scale
    freedom, width = float(weights.sum() - present.sum()), features.shape[1]
    within = (residuals * weights[:, None]).T @ residuals / max(freedom, 1.0)
    share = width / (width + max(freedom, 0.0))
    shrunk = (1.0 - share) * within
    shrunk[np.diag_indices(width)] += share * max(float(np.trace(within)) / width, 1e-6)
    drawn = (means - center) * scale * (held / (held + MEAN_SHRINKAGE))[:, None]
    weight = np.linalg.solve(shrunk, drawn.T).T
    bias = -0.5 * np.einsum("cd,cd->c", weight, drawn)
    weight = weight * scale
    return weight, bias - weight @ center
