"""Views of patches: random changes of intensity, drawn for each patch by itself.

Images are (N, C, X, Y, Z); the channels of a patch change together. All draws come from `generator`, one
of the CPU, or from torch's own where it is None, and each function draws the same amount every time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Generator = torch.Generator | None


def sometimes(changed: Tensor, images: Tensor, share: float, generator: Generator) -> Tensor:
    """Each patch of `changed` with probability `share`, else that of `images`."""
    return torch.where(uniform(images, 0, 1, generator) < share, changed, images)


def brightness_contrast(images: Tensor, generator: Generator, strength: float = 0.5) -> Tensor:
    """Between a channel's extremes at 0 and 1, v <- a v, then v <- v + b mean(v), kept in there.

    a = U(1 - strength, 1 + strength), b = U(-strength, strength).
    """
    low = images.amin((2, 3, 4), keepdim=True)
    extent = (images.amax((2, 3, 4), keepdim=True) - low).clamp(min=1e-6)
    contrast = uniform(images, 1 - strength, 1 + strength, generator)
    brightness = uniform(images, -strength, strength, generator)
    values = contrast * (images - low) / extent
    values = values + brightness * values.mean((2, 3, 4), keepdim=True)
    return low + extent * values.clamp(0, 1)


def noise(images: Tensor, generator: Generator, sigmas: tuple[float, float] = (0.1, 1.0)) -> Tensor:
    """Add Gaussian noise of a standard deviation U(*sigmas), in units of the image, cut at 2 of it."""
    sigma = uniform(images, *sigmas, generator)
    drawn = sent(torch.randn(images.shape, generator=generator), images)
    return images + sigma * drawn.clamp(-2, 2)


def bias_field(
    images: Tensor, generator: Generator, strength: float = 0.5, order: int = 3
) -> Tensor:
    """Multiply by exp(polynomial) of total degree `order`, coefficients U(-strength, strength).

    Coordinates go from -1 to 1 along each axis.
    """
    powers = torch.arange(order + 1)
    degrees = powers[:, None, None] + powers[:, None] + powers
    drawn = torch.rand((len(images), *degrees.shape), generator=generator)
    coefficients = strength * (2 * drawn - 1) * (degrees <= order)
    axes = [torch.linspace(-1, 1, size)[:, None] ** powers for size in images.shape[2:]]
    field = contract(
        "nijk,xi,yj,zk->nxyz", *(sent(factor, images) for factor in (coefficients, *axes))
    )
    return images * field[:, None].exp()


def gamma(images: Tensor, generator: Generator, strength: float = 0.5) -> Tensor:
    """Values v become sign(v) |v|^g with g = exp(U(-strength, strength))."""
    exponent = uniform(images, -strength, strength, generator).exp()
    return images.sign() * images.abs() ** exponent


def gaussian_blur(
    images: Tensor, generator: Generator, sigmas: tuple[float, float] = (0.1, 2.0)
) -> Tensor:
    """Blur each axis with a Gaussian of U(*sigmas) voxels; at the border, over the voxels there are."""
    for axis, equation in enumerate(("nxi,nciyz->ncxyz", "nyi,ncxiz->ncxyz", "nzi,ncxyi->ncxyz")):
        sigma = uniform(images, *sigmas, generator)[:, 0, 0]  # (N, 1, 1)
        voxel = torch.arange(images.shape[2 + axis], device=images.device)
        distance = (voxel[:, None] - voxel).square() / (2 * sigma.square())
        kernel = (-distance).softmax(2)  # (N, voxels, voxels): each row sums to 1
        images = contract(equation, kernel, images)
    return images


def uniform(images: Tensor, low: float, high: float, generator: Generator) -> Tensor:
    """A number from U(low, high) for each patch, (N, 1, 1, 1, 1)."""
    drawn = torch.rand((len(images), 1, 1, 1, 1), generator=generator)
    return sent(low + (high - low) * drawn, images)


def sent(drawn: Tensor, images: Tensor) -> Tensor:
    """What was drawn, where the images are and of their kind; a GPU is not waited for."""
    return drawn.to(images, non_blocking=True)


def contract(equation: str, *factors: Tensor) -> Tensor:
    """`torch.einsum` in full precision, whatever the loop has set for the networks."""
    with torch.autocast(factors[0].device.type, enabled=False):
        return torch.einsum(equation, *factors)


def jitter(images: Tensor, strength: float, generator: Generator) -> Tensor:
    """Brightness and contrast of each image (B, C, X, Y, Z) times factors U(1 - s, 1 + s)."""
    factors = 1 + strength * (2 * torch.rand(2, len(images), 1, 1, 1, 1, generator=generator) - 1)
    brightness, contrast = sent(factors, images)
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
    taps = sent(kernels.T, images)[..., None, None, None, None]  # (taps, B, 1, 1, 1, 1)
    for axis, pads in ((2, (0, 0, 0, 0, reach, reach)), (3, (0, 0, reach, reach, 0, 0))):
        padded = F.pad(images, pads, mode="replicate")
        images = torch.zeros_like(images)
        for i, tap in enumerate(taps):
            images += tap * padded.narrow(axis, i, images.shape[axis])
    return images


def either(first: Tensor, second: Tensor, generator: Generator) -> Tensor:
    """Rows of one or of the other, by the toss of a coin for each."""
    coins = torch.rand(len(first), *[1] * (first.ndim - 1), generator=generator) < 0.5
    return torch.where(coins.to(first.device, non_blocking=True), second, first)


def jittered_and_blurred(images: Tensor, generator: Generator) -> Tensor:
    """ARCO's other view: half of the images in a contrast of +-2 %, half of them blurred slice by slice."""
    jittered = either(images, jitter(images, 0.02, generator), generator)
    sigmas = 0.15 + torch.rand(len(images), generator=generator)
    return either(jittered, blur_slices(jittered, sigmas), generator)
