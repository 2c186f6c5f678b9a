"""Which way round a label lies on its CT: by its header, by the tissue, or refused."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from abdomen import abdomen
from dicom_made import AXIAL, oblique

from vclipseg.data.flips import ALL_FLIPS, fit_label, weigh
from vclipseg.data.orientation import turn, turn_affine
from vclipseg.data.volume import Volume
from vclipseg.errors import DataError

STRAIGHT = (0, 1, 2)
LOST = np.eye(4)
"""What a file gets whose header nobody filled in."""


@pytest.fixture(scope="module")
def scan():
    return abdomen()


def stored(mask, affine, axes=STRAIGHT, flips=(False, False, False), header=None):
    """A label file's voxels, with a header that tells the truth unless another is given."""
    array = turn(mask, axes, flips).astype(np.uint8)
    return Volume(array, turn_affine(affine, mask.shape, axes, flips) if header is None else header)


@pytest.mark.parametrize("affine", [AXIAL, oblique()], ids=["axial", "oblique"])
@pytest.mark.parametrize("flips", ALL_FLIPS)
@pytest.mark.parametrize("axes", [STRAIGHT, (2, 0, 1), (1, 0, 2)], ids=str)
def test_a_header_that_tells_the_truth_is_followed(scan, affine, axes, flips):
    hu, mask = scan
    found, fit = fit_label(stored(mask, affine, axes, flips), Volume(hu[None], affine))
    np.testing.assert_array_equal(found, mask)
    assert fit.by == "header"
    assert fit.header_off_mm == pytest.approx(0, abs=1e-6)
    names = [n for n, flip in zip("xyz", np.array(flips)[np.argsort(axes)], strict=True) if flip]
    assert fit.flipped == "".join(names)
    assert fit.axes == tuple(np.argsort(axes))


@pytest.mark.parametrize("flips", ALL_FLIPS)
@pytest.mark.parametrize("header", ["image's", "lost"])
def test_a_header_that_lies_is_seen_through(scan, flips, header):
    """The label is mirrored, but its header is the image's; or says nothing at all."""
    hu, mask = scan
    said = oblique() if header == "image's" else LOST
    found, fit = fit_label(
        stored(mask, oblique(), flips=flips, header=said), Volume(hu[None], oblique())
    )
    np.testing.assert_array_equal(found, mask)
    truthful = header == "image's" and not any(flips)
    assert fit.by == ("header" if truthful else "tissue")
    assert fit.flipped == "".join(n for n, flip in zip("xyz", flips, strict=True) if flip)
    assert fit.contrast > fit.next_contrast + 0.1
    assert fit.share > 0.95


def test_soft_tissue_alone_would_not_tell(scan):
    """A mirrored label lies in other organs; only its border gives it away."""
    hu, mask = scan
    evidence = dict(zip(ALL_FLIPS, weigh(mask, hu), strict=True))
    assert evidence[True, False, False].share > 0.95
    assert evidence[True, False, False].contrast < 0.2
    assert evidence[False, False, False].contrast > 0.3


def test_a_symmetric_scan_decides_nothing():
    _, mask = abdomen()
    hu = np.where(mask | mask[::-1], 90.0, -100.0).astype(np.float32)
    label = stored(mask, AXIAL, header=LOST)
    with pytest.raises(
        DataError, match=r"fits the image 2 ways round .*correct the label's header"
    ):
        fit_label(label, Volume(hu[None], AXIAL))
    found, fit = fit_label(stored(mask, AXIAL), Volume(hu[None], AXIAL))  # but the header does
    np.testing.assert_array_equal(found, mask)
    assert fit.by == "header"


def test_a_label_of_another_scan_is_refused(scan):
    hu, mask = scan
    with pytest.raises(DataError, match=r"no way round .* 0% of it at best.*in HU\?"):
        fit_label(stored(mask, AXIAL), Volume(np.full_like(hu, -1000)[None], AXIAL))
    with pytest.raises(DataError, match="label has 40 x 36 x 11 voxels, the image 40 x 36 x 12"):
        fit_label(stored(mask[:, :, 1:], AXIAL), Volume(hu[None], AXIAL))


def test_a_label_marks_one_organ(scan):
    hu, mask = scan
    label = stored(mask, AXIAL)
    with pytest.raises(DataError, match="is empty"):
        fit_label(Volume(np.zeros_like(label.array), AXIAL), Volume(hu[None], AXIAL))
    label.array[0, 0, 0] = 7
    with pytest.raises(DataError, match="classes 1, 7"):
        fit_label(label, Volume(hu[None], AXIAL))


def test_all_flips_are_weighed_in_their_order():
    assert list(product((False, True), repeat=3)) == list(ALL_FLIPS)
    rng = np.random.default_rng(0)
    hu = rng.normal(0, 200, (12, 10, 8))
    mask = np.zeros(hu.shape, dtype=bool)
    mask[2:6, 1:4, 3:7] = True
    for flips, found in zip(ALL_FLIPS, weigh(mask, hu), strict=True):
        inside = hu[turn(mask, STRAIGHT, flips)]
        assert found.share == pytest.approx(((inside >= -50) & (inside <= 200)).mean())
