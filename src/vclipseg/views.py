"""Other views of the same images, for methods that compare two."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def jitter(images: Tensor, strength: float, generator: torch.Generator | None) -> Tensor:
    """Brightness and contrast of each image (B, C, X, Y, Z) times factors U(1 - s, 1 + s)."""
    factors = 1 + strength * (2 * torch.rand(2, len(images), 1, 1, 1, 1, generator=generator) - 1)
    brightness, contrast = factors.to(images)
    bright = images * brightness
    mean = bright.mean((1, 2, 3, 4), keepdim=True)
    return mean + (bright - mean) * contrast


def blur_slices(images: Tensor, sigmas: Tensor) -> Tensor:
    """Each slice along Z blurred by a Gaussian of sigma voxels, one sigma an image (B,).

    Beyond the border of (B, C, X, Y, Z) it is repeated.
    """
    reach = int((3 * sigmas.max()).ceil())
    offsets = torch.arange(-reach, reach + 1)
    kernels = (-offsets.square() / (2 * sigmas[:, None].square())).softmax(1)  # (B, taps)
    taps = kernels.T.to(images)[..., None, None, None, None]  # (taps, B, 1, 1, 1, 1)
    for axis, pads in ((2, (0, 0, 0, 0, reach, reach)), (3, (0, 0, reach, reach, 0, 0))):
        padded = F.pad(images, pads, mode="replicate")
        images = torch.zeros_like(images)
        for i, tap in enumerate(taps):
            images += tap * padded.narrow(axis, i, images.shape[axis])
    return images


def either(first: Tensor, second: Tensor, generator: torch.Generator | None) -> Tensor:
    """Rows of one or of the other, by the toss of a coin for each."""
    coins = torch.rand(len(first), *[1] * (first.ndim - 1), generator=generator) < 0.5
    return torch.where(coins.to(first.device), second, first)


def jittered_and_blurred(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """ARCO's other view: half of the images in a contrast of +-2 %, half of them blurred slice by slice."""
    jittered = either(images, jitter(images, 0.02, generator), generator)
    sigmas = 0.15 + torch.rand(len(images), generator=generator)
    return either(jittered, blur_slices(jittered, sigmas), generator)
