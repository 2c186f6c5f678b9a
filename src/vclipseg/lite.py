"""Run an exported model: one .onnx file in, masks out; no torch.

    python -m vclipseg.lite model.onnx scan.nii.gz -o mask.nii.gz
    python -m vclipseg.lite model.onnx scan_0000.nii.gz scan_0001.nii.gz -o mask.nii.gz
    python -m vclipseg.lite model.onnx --info

Needs numpy, nibabel and onnxruntime, and of this package only what needs no more than that; OpenVINO, where
it is installed too, takes about half as long. All that
`vclipseg predict` does to a scan is done here too, in the same order and by the same formulas.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vclipseg.data.formats import NIFTI_SUFFIXES, image_suffix, strip_suffix
from vclipseg.data.intensity import normalize
from vclipseg.data.trace import Shape, Trace, turn_and_crop
from vclipseg.data.volume import Volume, note_on_values, read_image, with_values, write
from vclipseg.engines import ENGINES, open_network
from vclipseg.errors import DataError, OutOfMemory, UsageError, VclipsegError, refusal
from vclipseg.windows import fitted, free_memory, slabs, whole_bytes

VERSION = 1
"""Of what an exported file says of itself; `vclipseg.export` writes it."""
KEYS = (
    "version", "name", "class_names", "label_values", "channel_names", "plan", "predict", "window",
    "filters", "multiple", "text", "licence", "provenance",
)  # fmt: skip
"""The entries of `metadata_props`, each "vclipseg." and one of these, a text of JSON."""
SMOOTH_ABOVE = 2.0  # as in data/resample.py


class Model:
    """An exported model: `Volume` in, `Volume` out.

    Attributes:
        info: What the file says of itself, by `KEYS`.

    Raises:
        UsageError: there is no such file, or the engine (`vclipseg.engines`) is not installed.
        DataError: it is no model that `vclipseg export` wrote.
    """

    def __init__(self, path: str | Path, threads: int = 0, engine: str = "auto") -> None:
        found, self.network = open_network(Path(path), threads, engine)
        if found.get("vclipseg.version") != json.dumps(VERSION):
            raise DataError(
                f"{path}: not a model of this version of vclipseg; write it with `vclipseg export`"
            )
        self.info: dict[str, Any] = {key: json.loads(found[f"vclipseg.{key}"]) for key in KEYS}

    def predict(self, volume: Volume) -> Volume:
        """Label values (X, Y, Z) of an image (C, X, Y, Z), on the image's own grid."""
        probs, trace = self._prepared_probs(volume)
        inside = running_argmax(linear(p, trace.cropped_shape) for p in probs)
        return Volume(with_values(trace.undo(inside), self.info["label_values"]), volume.affine)

    def probabilities(self, volume: Volume) -> Volume:
        """Class probabilities (K, X, Y, Z) float32 on the image's own grid."""
        probs, trace = self._prepared_probs(volume)
        whole = np.empty((len(probs), *trace.shape), np.float32)
        for index, p in enumerate(probs):
            inside = linear(p, trace.cropped_shape)
            whole[index] = trace.undo(inside, outside=float(index == 0))
        return Volume(whole, volume.affine)

    def _prepared_probs(self, volume: Volume) -> tuple[np.ndarray, Trace]:
        names = self.info["channel_names"]
        if volume.array.ndim != 4 or len(volume.array) != len(names):
            raise UsageError(
                f"this model reads images of {len(names)} channel(s) ({', '.join(names)}), one file "
                f"a channel or all in one file; got an image of shape {volume.array.shape}"
            )
        image, trace = prepare(volume, self.info["plan"])
        return self.prepared(image), trace

    def prepared(self, image: np.ndarray) -> np.ndarray:
        """Probabilities (K, x, y, z) of a prepared image (C, x, y, z)."""
        shape, mode = image.shape[1:], self.info["predict"]["mode"]
        fits = whole_bytes(shape, self.info["filters"]) < 0.5 * free_memory()
        if mode == "whole" or (mode == "auto" and fits):
            return self.run(image)
        predict = self.info["predict"]
        window, stride = fitted(shape, self.info["window"], predict["stride"])
        return np.concatenate(
            list(slabs(image, self._run_batch, window, stride, predict["blend"], 1)), axis=1
        )

    def _run_batch(self, images: np.ndarray) -> np.ndarray:
        return np.stack([self.run(image) for image in images])

    def run(self, image: np.ndarray) -> np.ndarray:
        """The network: (C, x, y, z) of any size -> (K, x, y, z); borders are repeated as needed."""
        missing = [-n % self.info["multiple"] for n in image.shape[1:]]
        pads = [(0, 0), *((m // 2, m - m // 2) for m in missing)]
        padded = np.pad(image, pads, mode="edge")
        try:
            probs = self.network(padded[None])
        except Exception as error:
            if isinstance(error, MemoryError) or "alloc" in str(error).lower():
                raise OutOfMemory(
                    f"not enough memory for {image.shape[1:]} voxels at once; export the model with "
                    "a smaller predict.window"
                ) from error
            raise
        cut = [slice(m // 2, m // 2 + n) for m, n in zip(missing, image.shape[1:], strict=True)]
        return probs[0][:, cut[0], cut[1], cut[2]]


# Preparing, as in data/preprocess.py and data/resample.py


def prepare(volume: Volume, plan: dict[str, Any]) -> tuple[np.ndarray, Trace]:
    """Turn, crop, normalize and resample: float32 (C, x, y, z), and how to undo it."""
    array, trace = turn_and_crop(volume, plan["orientation"], plan["crop"], plan["spacing"])
    window = tuple(plan["window"]) if plan["window"] else None
    percentiles = tuple(plan["percentiles"])
    channels = [
        resample(
            normalize(channel, intensity, window, percentiles).astype(np.float32, copy=False),
            trace.prepared_shape,
        )
        for channel, intensity in zip(array, plan["intensity"], strict=True)
    ]
    return np.stack(channels), trace


def resample(channel: np.ndarray, shape: Shape) -> np.ndarray:
    """One channel (X, Y, Z) linearly to `shape`, smoothed along axes that shrink a lot."""
    if channel.shape == shape:
        return channel
    for axis, (old, new) in enumerate(zip(channel.shape, shape, strict=True)):
        if old / new > SMOOTH_ABOVE:
            channel = smooth(channel, (old / new - 1) / 2, axis)
    return linear(channel, shape)


def linear(array: np.ndarray, shape: Shape) -> np.ndarray:
    """(X, Y, Z) linearly to `shape` as float32, the corners of the volume staying in place."""
    for axis, new in enumerate(shape):
        old = array.shape[axis]
        if old == new:
            continue
        scale = float(np.float32(old) / np.float32(new))
        place = (scale * (np.arange(new) + 0.5) - 0.5).astype(np.float32)  # rounded as torch rounds
        place = place.clip(0, old - 1)
        low = place.astype(np.intp)
        high = np.minimum(low + 1, old - 1)
        share = (place - low.astype(np.float32)).reshape([-1 if a == axis else 1 for a in range(3)])
        array = array.take(low, axis) * (1 - share) + array.take(high, axis) * share
    return array.astype(np.float32, copy=False)


def smooth(array: np.ndarray, sigma: float, axis: int) -> np.ndarray:
    """Gaussian of `sigma` voxels along an axis, cut at 4 sigma, the border repeated."""
    radius = int(4 * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    pads = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
    padded = np.moveaxis(np.pad(array, pads, mode="edge"), axis, 0)
    total = np.zeros((array.shape[axis], *padded.shape[1:]))
    for offset, weight in enumerate(weights):
        total += weight * padded[offset : offset + len(total)]
    return np.moveaxis(total, 0, axis).astype(array.dtype)


def running_argmax(values: Iterable[np.ndarray]) -> np.ndarray:
    """Which of some arrays (X, Y, Z) is largest in each voxel, holding two at a time; uint8."""
    values = iter(values)
    best = next(values).copy()
    mask = np.zeros(best.shape, np.uint8)
    for index, value in enumerate(values, start=1):
        larger = value > best
        best[larger] = value[larger]
        mask[larger] = index
    return mask


# The command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives its exit code."""
    try:
        _run(parser().parse_args(arguments))
    except VclipsegError as error:
        return _fail(error)
    except OSError as error:
        if told := refusal(error):
            return _fail(told)
        raise
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    return 0


def _fail(error: VclipsegError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="python -m vclipseg.lite", description="Masks of scans, from one exported model file."
    )
    options.add_argument("model", type=Path, help="file that `vclipseg export` wrote")
    options.add_argument(
        "scan", type=Path, nargs="*", help="NIfTI file of one scan; of several channels, in order"
    )
    options.add_argument(
        "-o", "--output", type=Path, help="mask to write; NAME_seg.nii.gz beside the scan"
    )
    options.add_argument(
        "--probabilities", action="store_true", help="also write class probabilities (4D)"
    )
    options.add_argument("--overwrite", action="store_true", help="replace files that exist")
    options.add_argument("--threads", type=int, default=0, help="CPU threads; 0: as many as cores")
    options.add_argument(
        "--engine", choices=ENGINES, default="auto", help="auto: OpenVINO where it is installed"
    )
    options.add_argument(
        "--info", action="store_true", help="what the model says of itself, as JSON"
    )
    return options


def _run(options: argparse.Namespace) -> None:
    if options.info:
        print(json.dumps(Model(options.model, options.threads, "onnxruntime").info, indent=2))
        return
    mask_path, probs_path = _targets(options)
    model = Model(options.model, options.threads, options.engine)
    image = read_image(options.scan)
    if note := note_on_values(image, options.scan[0]):
        print(f"{options.scan[0].name}: {note}", file=sys.stderr)
    if options.probabilities:
        probs = model.probabilities(image)
        write(probs, probs_path, like=options.scan[0])
        print(probs_path)
        mask = Volume(with_values(probs.array.argmax(0), model.info["label_values"]), image.affine)
    else:
        mask = model.predict(image)
    write(mask, mask_path, like=options.scan[0])
    print(mask_path)


def _targets(options: argparse.Namespace) -> tuple[Path, Path]:
    """Where mask and probabilities go, before anything is computed."""
    if not options.scan:
        raise UsageError("no scan given; or ask for --info")
    first = options.scan[0]
    mask = options.output or first.parent / f"{strip_suffix(first)}_seg.nii.gz"
    for path in (*options.scan, mask):
        if image_suffix(path) not in NIFTI_SUFFIXES:
            raise UsageError(f"{path}: only NIfTI (.nii, .nii.gz) is read and written here")
    probs = mask.with_name(f"{strip_suffix(mask)}_probs.nii.gz")
    scans = {scan.resolve() for scan in options.scan}
    for path in (mask, probs) if options.probabilities else (mask,):
        if path.resolve() in scans:
            raise UsageError(f"{path}: is the scan itself; give another place with -o")
        if path.exists() and not options.overwrite:
            raise UsageError(f"{path}: exists already; give --overwrite, or another place with -o")
    return mask, probs


if __name__ == "__main__":
    sys.exit(main())
