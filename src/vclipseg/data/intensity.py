"""Intensities of one channel brought to a common scale."""

from __future__ import annotations

from typing import Literal

import numpy as np

Intensity = Literal["zscore", "window", "window_zscore", "percentile", "rescale", "none"]
WINDOWED: tuple[Intensity, ...] = ("window", "window_zscore")
"""Those that need a window."""

MASKED_ABOVE = 0.25
"""From this share of exact zeros on, the zeros are taken for air or padding, not tissue."""


def normalize(
    channel: np.ndarray,
    intensity: Intensity,
    window: tuple[float, float] | None = None,
    percentiles: tuple[float, float] = (0.5, 99.5),
) -> np.ndarray:
    """Normalize one channel.

    A constant image becomes 0. Voxels that are not finite take the lowest finite value.

    Args:
        channel: float32 `(X, Y, Z)`; not changed.
        intensity: `zscore`: mean 0, standard deviation 1. `percentile`: clipped to two
            percentiles, then z-score. `window`: clipped to a window, then its ends to -1 and 1.
            `window_zscore`: clipped to a window, then mean 0, standard deviation 1 over all voxels.
            `rescale`: lowest to 0, highest to 1. `none`: as it is.
        window: Lowest and highest value of `window` and `window_zscore`.
        percentiles: In percent, of `percentile`.

    The statistics of `zscore` and `percentile` are those of the nonzero voxels if more than a
    quarter of the channel is exactly 0 (skull-stripped, padded), else of all; they are applied
    to all voxels, so that order is kept.
    """
    channel = _finite(channel)
    if intensity == "none":
        return channel
    if intensity in WINDOWED:
        if window is None:
            raise ValueError(f"intensity {intensity!r} needs a window")
        low, high = window
        clipped = np.clip(channel, low, high)
        if intensity == "window_zscore":
            return _standardized(clipped, clipped)
        return (clipped - (low + high) / 2) / ((high - low) / 2)
    if intensity == "rescale":
        low, high = float(channel.min()), float(channel.max())
        return (channel - low) / (high - low) if high > low else np.zeros_like(channel)
    if intensity == "percentile":
        low, high = np.percentile(_tissue(channel), percentiles)
        channel = np.clip(channel, low, high, dtype=np.float32)
    return _standardized(channel, _tissue(channel))


def _standardized(channel: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """Shifted and scaled by the mean and the standard deviation of some of its voxels."""
    mean, deviation = sample.mean(dtype=np.float64), sample.std(dtype=np.float64)
    return ((channel - mean) / max(deviation, 1e-8)).astype(np.float32)


def _finite(channel: np.ndarray) -> np.ndarray:
    finite = np.isfinite(channel)
    if finite.all():
        return channel
    lowest = channel[finite].min() if finite.any() else 0
    return np.where(finite, channel, lowest).astype(channel.dtype)


def _tissue(channel: np.ndarray) -> np.ndarray:
    nonzero = channel != 0
    masked = nonzero.any() and nonzero.mean() < 1 - MASKED_ABOVE
    return channel[nonzero] if masked else channel
