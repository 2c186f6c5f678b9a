"""Score labels that registration carries over from the labeled scans, on the development list: no network.

    python benchmarks/propagate.py recipes/la-1.25mm-4/robust.toml --data FOLDER --every 3

Each labeled scan is registered to each unlabeled one by mutual information, at half the resolution: affine,
then cubic B-splines with a knot every 20 mm. Its label is carried over, and the class with the largest mean
over the labeled scans decides: what an unlabeled scan could be taught without any training. A row goes to
results/development.csv; its lowest case is of those that were looked at.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from develop import append, dice_of

from vclipseg.config import load_experiment
from vclipseg.console import Console
from vclipseg.data.datasets import Dataset
from vclipseg.data.formats import itk_image
from vclipseg.data.volume import Volume
from vclipseg.environment import commit, cpu_name
from vclipseg.evaluation import evaluate
from vclipseg.experiment import open_split
from vclipseg.scores import case_means

KNOTS = 20.0  # mm
SEED = 1  # of the voxels by which scans are compared


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--every", type=int, default=1, help="look at every nth case only")
    parser.add_argument("--record", type=Path, default=Path("results/development.csv"))
    arguments = parser.parse_args()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    began = time.perf_counter()
    dataset, split = open_split(load_experiment(arguments.recipe, []), arguments.data)
    atlases = Atlases(dataset, split.labeled)
    cases = split.unlabeled[:: arguments.every]
    with Console().bar("register", len(cases)) as advance:
        rows = evaluate(
            atlases.predict,
            dataset,
            cases,
            on_progress=lambda done, total, case_id: advance(done, case_id, total),
        )
    row = {
        "recipe": arguments.recipe.as_posix(),
        "overrides": f"labels=registered every={arguments.every}",
        "seed": SEED,
        "seconds": time.perf_counter() - began,
        "device": f"{cpu_name()}, 1 thread(s)",
        "commit": commit() or "",
        **dice_of(list(case_means(rows, "dice").values())),
    }
    append(arguments.record, row)
    print(row)


class Atlases:
    """Labeled scans that are laid onto others."""

    def __init__(self, dataset: Dataset, case_ids: tuple[str, ...]) -> None:
        cases = [dataset.case(case_id) for case_id in case_ids]
        self.scans = [coarse(dataset.image(case)) for case in cases]
        self.labels = [dataset.labels(case) for case in cases]
        self.classes = len(dataset.class_names)

    def predict(self, volume: Volume) -> Volume:
        """Class indices (X, Y, Z) of an image (C, X, Y, Z), of which the first channel counts."""
        fixed, votes = coarse(volume), np.zeros((self.classes, *volume.array.shape[1:]))
        for scan, labels in zip(self.scans, self.labels, strict=True):
            transform = register(fixed, scan)
            for k in range(self.classes):
                votes[k] += carried(labels, k, transform, volume)
        return Volume(votes.argmax(0).astype(np.uint8), volume.affine)


def register(fixed: sitk.Image, moving: sitk.Image) -> sitk.Transform:
    """Points of the fixed scan to those of the moving one."""
    affine = sitk.CenteredTransformInitializer(
        fixed,
        moving,
        sitk.AffineTransform(3),
        sitk.CenteredTransformInitializerFilter.GEOMETRY,
    )
    first = registration((4, 2))
    first.SetOptimizerAsGradientDescent(1.0, 100, 1e-5, 5)
    first.SetOptimizerScalesFromPhysicalShift()
    first.SetInitialTransform(affine, inPlace=True)
    first.Execute(fixed, moving)
    sides = np.multiply(fixed.GetSize(), fixed.GetSpacing())
    mesh = [max(1, round(side / KNOTS)) for side in sides]
    splines = sitk.BSplineTransformInitializer(fixed, mesh, 3)
    second = registration((2, 1))
    second.SetMovingInitialTransform(affine)
    second.SetOptimizerAsLBFGS2(solutionAccuracy=1e-3, numberOfIterations=40)
    second.SetInitialTransform(splines, inPlace=True)
    second.Execute(fixed, moving)
    return sitk.CompositeTransform([affine, splines])


def registration(shrink: tuple[int, int]) -> sitk.ImageRegistrationMethod:
    """By mutual information of a quarter of the voxels, first coarse, then less so."""
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(0.25, SEED)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetShrinkFactorsPerLevel(shrink)
    method.SetSmoothingSigmasPerLevel([n / 2 for n in shrink])
    return method


def carried(labels: Volume, k: int, transform: sitk.Transform, onto: Volume) -> np.ndarray:
    """How much of class k lies at each voxel (X, Y, Z) of `onto`; beyond the labels is background."""
    share = itk_image((labels.array == k).astype(np.float32), labels.affine)
    grid = itk_image(onto.array[0], onto.affine)
    beyond = 1.0 if k == 0 else 0.0
    return sitk.GetArrayFromImage(sitk.Resample(share, grid, transform, sitk.sitkLinear, beyond)).T


def coarse(volume: Volume) -> sitk.Image:
    """The first channel at half the resolution, without what is brightest and darkest."""
    low, high = np.percentile(volume.array[0], (0.5, 99.5))
    scan = itk_image(volume.array[0].clip(low, high), volume.affine)
    return sitk.Shrink(scan, [2, 2, 2])


if __name__ == "__main__":
    main()
