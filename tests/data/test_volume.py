from __future__ import annotations

from itertools import permutations, product
from pathlib import Path
from tempfile import TemporaryDirectory

import h5py
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from made import SHAPE, affines, save_image, shapes

from vclipseg.data.formats import stored_files
from vclipseg.data.volume import (
    WRITE_SUFFIXES,
    Volume,
    image_suffix,
    read_header,
    read_image,
    read_labels,
    reorient,
    strip_suffix,
    turn,
    turn_back,
    write,
)
from vclipseg.errors import DataError, UsageError

ORIENTATIONS = [
    "".join(letters) for order in permutations(("RL", "AP", "SI")) for letters in product(*order)
]


def marked(shape, affine) -> tuple[Volume, np.ndarray]:
    """An image with one bright voxel, and where that voxel is in the world."""
    index = [n // 3 for n in shape]
    array = np.zeros((1, *shape), dtype=np.float32)
    array[(0, *index)] = 7
    return Volume(array, affine), (affine @ [*index, 1])[:3]


def mark_of(volume: Volume) -> np.ndarray:
    index = np.argwhere(volume.array[0] == 7)
    assert len(index) == 1
    return (volume.affine @ [*index[0], 1])[:3]


@pytest.mark.parametrize(
    ("path", "suffix", "stem"),
    [
        ("a/b.nii.gz", ".nii.gz", "b"),
        ("a/b.1.nii", ".nii", "b.1"),
        ("b.NRRD", ".NRRD".lower(), "b"),
        ("b.mhd", ".mhd", "b"),
        ("a/b.txt", "", "b.txt"),
    ],
)
def test_suffix_and_stem(path, suffix, stem):
    assert image_suffix(path) == suffix
    assert strip_suffix(path) == stem


@pytest.mark.parametrize("suffix", WRITE_SUFFIXES)
@settings(max_examples=12, deadline=None)
@given(shape=shapes, affine=affines())
def test_a_voxel_keeps_its_place_in_the_world_through_a_file(suffix, shape, affine):
    volume, place = marked(shape, affine)
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        write(volume, path)
        back, header = read_image(path), read_header(path)
        assert [p.name for p in Path(folder).iterdir()] == [path.name]
    assert back.shape == header.shape == shape
    np.testing.assert_allclose(mark_of(back), place, atol=1e-3)
    np.testing.assert_allclose(header.affine, affine, atol=1e-4)
    np.testing.assert_allclose(header.spacing, volume.spacing, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(shape=shapes, affine=affines())
def test_reorient_moves_no_voxel_in_the_world(shape, affine):
    volume, place = marked(shape, affine)
    for orientation in ("RAS", "LPS", "PIR"):
        turned = reorient(volume, orientation)
        np.testing.assert_allclose(mark_of(turned), place, atol=1e-6)
        assert np.linalg.det(turned.affine) * np.linalg.det(reorient(turned, "RAS").affine) != 0


@pytest.mark.parametrize("start", ORIENTATIONS)
def test_reorient_reaches_every_orientation(start):
    volume = Volume(np.arange(60.0).reshape(1, 3, 4, 5), np.diag([2.0, 3.0, 4.0, 1.0]))
    turned = reorient(volume, start)
    assert turned.orientation == start
    back = reorient(turned, "RAS")
    np.testing.assert_array_equal(back.array, volume.array)
    np.testing.assert_allclose(back.affine, volume.affine)


@pytest.mark.parametrize("axes", list(permutations(range(3))))
@pytest.mark.parametrize("flips", list(product((False, True), repeat=3)))
def test_turn_back_undoes_turn(axes, flips):
    array = np.arange(120).reshape(2, 3, 4, 5)
    np.testing.assert_array_equal(turn_back(turn(array, axes, flips), axes, flips), array)


def test_simpleitk_and_nibabel_agree_on_the_world(tmp_path):
    affine = np.array([[0, -2, 0, 5], [1, 0, 0, -7], [0, 0, 3, 11], [0, 0, 0, 1]], dtype=float)
    volume, place = marked(SHAPE, affine)
    write(volume, tmp_path / "a.nii.gz")
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "a.nii.gz")), str(tmp_path / "b.nrrd"))
    np.testing.assert_allclose(mark_of(read_image(tmp_path / "b.nrrd")), place, atol=1e-4)


@pytest.mark.parametrize("suffix", WRITE_SUFFIXES)
@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int16, np.int64, np.float64])
def test_labels_keep_their_values(tmp_path, suffix, dtype):
    labels = (np.arange(60).reshape(3, 4, 5) % 2).astype(dtype)
    write(Volume(labels, np.eye(4)), tmp_path / f"a{suffix}")
    back = read_labels(tmp_path / f"a{suffix}")
    assert back.array.dtype == np.uint8
    np.testing.assert_array_equal(back.array, labels)


@pytest.mark.parametrize("suffix", WRITE_SUFFIXES)
def test_channels_in_one_file_and_in_several(tmp_path, suffix):
    one = save_image(tmp_path / f"a{suffix}", channels=3)
    image = read_image(one)
    assert image.array.shape == (3, *SHAPE)
    assert image.array.dtype == np.float32
    assert read_header(one).channels == 3
    files = []
    for c in range(3):
        files.append(tmp_path / f"b_{c:04d}{suffix}")
        write(Volume(image.array[c], image.affine), files[-1])
    np.testing.assert_array_equal(read_image(files).array, image.array)


def test_slope_and_intercept_are_applied(tmp_path):
    stored = nib.Nifti1Image(np.full(SHAPE, 4, dtype=np.uint8), np.eye(4))
    stored.header.set_slope_inter(0.5, 10)
    nib.save(stored, tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[112:120] = np.array([0.5, 10], dtype="<f4").tobytes()
    raw[352:] = np.full(SHAPE, 4, dtype=np.uint8).tobytes()
    (tmp_path / "a.nii").write_bytes(bytes(raw))
    assert np.unique(read_image(tmp_path / "a.nii").array).tolist() == [12.0]


def test_a_vector_nifti_with_one_time_point_is_channels(tmp_path):
    nib.save(
        nib.Nifti1Image(np.zeros((*SHAPE, 1, 2), dtype=np.float32), np.eye(4)), tmp_path / "a.nii"
    )
    assert read_image(tmp_path / "a.nii").array.shape == (2, *SHAPE)


def test_hdf5_of_the_literature(tmp_path):
    with h5py.File(tmp_path / "mri_norm2.h5", "w") as file:
        file["image"] = np.ones(SHAPE, dtype=np.float32)
        file["label"] = np.ones(SHAPE, dtype=np.uint8)
    image = read_image(tmp_path / "mri_norm2.h5")
    assert image.array.shape == (1, *SHAPE)
    assert image.spacing == (0.625, 0.625, 0.625)
    assert read_labels(tmp_path / "mri_norm2.h5").array.sum() == np.prod(SHAPE)
    assert read_header(tmp_path / "mri_norm2.h5").shape == SHAPE


def test_mhd_keeps_its_voxels_in_a_second_file(tmp_path):
    image = sitk.GetImageFromArray(np.ones(SHAPE[::-1], dtype=np.float32))
    sitk.WriteImage(image, str(tmp_path / "a.mhd"))
    assert stored_files(tmp_path / "a.mhd") == (tmp_path / "a.mhd", tmp_path / "a.raw")
    assert read_image(tmp_path / "a.mhd").shape == SHAPE


@pytest.mark.parametrize("suffix", WRITE_SUFFIXES)
def test_a_truncated_file_is_named(tmp_path, suffix):
    path = save_image(tmp_path / f"a{suffix}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(DataError, match=r"a\.n|a\.m"):
        read_image(path)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha", ".h5"])
def test_garbage_is_named(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"no image at all" * 50)
    for read in (read_image, read_header, read_labels):
        with pytest.raises(DataError, match=f"a{suffix}.*cannot be read"):
            read(path)


def test_what_is_no_volume_is_refused(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((4, 5), dtype=np.float32), np.eye(4)), tmp_path / "flat.nii")
    sitk.WriteImage(sitk.Image(4, 5, sitk.sitkFloat32), str(tmp_path / "flat.mha"))
    (tmp_path / "a.txt").write_text("x")
    for name in ("flat.nii", "flat.mha", "a.txt", "missing.nii.gz"):
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name)


def test_an_affine_without_volume_is_refused(tmp_path):
    image = nib.Nifti1Image(np.zeros(SHAPE, dtype=np.float32), np.eye(4))
    image.header["sform_code"], image.header["qform_code"] = 1, 0
    image.header["srow_x"] = image.header["srow_y"] = [1, 0, 0, 0]
    nib.save(nib.Nifti1Image(image.dataobj, None, image.header), tmp_path / "a.nii")
    with pytest.raises(DataError, match="affine"):
        read_header(tmp_path / "a.nii")


def test_fractions_and_channels_are_no_labels(tmp_path):
    write(Volume(np.full(SHAPE, 0.5, dtype=np.float32), np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(DataError, match="not integers"):
        read_labels(tmp_path / "a.nii")
    write(Volume(np.zeros((2, *SHAPE), dtype=np.uint8), np.eye(4)), tmp_path / "b.nii")
    with pytest.raises(DataError, match="2 channels"):
        read_labels(tmp_path / "b.nii")


def test_channels_of_different_shape_are_refused(tmp_path):
    first = save_image(tmp_path / "a.nii")
    second = save_image(tmp_path / "b.nii", shape=(4, 4, 4))
    with pytest.raises(DataError, match=r"b\.nii"):
        read_image([first, second])


@pytest.mark.parametrize("name", ["a.mhd", "a.h5", "a.png", "a"])
def test_formats_that_are_not_written(tmp_path, name):
    with pytest.raises(UsageError, match=r"\.nii\.gz"):
        write(Volume(np.zeros(SHAPE), np.eye(4)), tmp_path / name)
    assert not list(tmp_path.iterdir())


def placed(path, *, sform=None, qform=None, unit="mm"):
    """A NIfTI file with its two places, each an affine and a code, or none."""
    image = nib.Nifti1Image(np.zeros(SHAPE, np.float32), None)
    image.header.set_xyzt_units(unit)
    image.set_qform(*(qform or (None, 0)))
    image.set_sform(*(sform or (None, 0)))
    nib.save(image, path)
    return path


TURNED = np.array([[0, -2.0, 0, 15], [2, 0, 0, -10], [0, 0, 3, 8], [0, 0, 0, 1]])
STRAIGHT = np.diag([2.0, 2, 3, 1])


@pytest.mark.parametrize("codes", [(1, 1), (2, 1), (4, 1), (0, 1), (1, 0), (0, 0)])
@pytest.mark.parametrize("unit", ["mm", "micron", "unknown"])
def test_a_mask_has_both_places_of_its_scan(tmp_path, codes, unit):
    """Programs choose differently where a coregistration left two; a mask is to go where its scan goes."""
    forms = [(TURNED, codes[0]) if codes[0] else None, (STRAIGHT, codes[1]) if codes[1] else None]
    scan = placed(tmp_path / "scan.nii.gz", sform=forms[0], qform=forms[1], unit=unit)
    image = read_image(scan)
    write(Volume(image.array[0].astype(np.uint8), image.affine), tmp_path / "m.nii.gz", like=scan)
    theirs, ours = nib.load(scan).header, nib.load(tmp_path / "m.nii.gz").header
    for read in ("get_sform", "get_qform"):
        (place, code), (expected, same_code) = (
            getattr(h, read)(coded=True) for h in (ours, theirs)
        )
        assert code == same_code
        assert place is expected is None or np.allclose(place, expected, atol=1e-5)
    assert ours.get_xyzt_units()[0] == unit
    assert np.allclose(read_labels(tmp_path / "m.nii.gz").affine, image.affine)
    first, second = (sitk.ReadImage(str(tmp_path / n)) for n in ("scan.nii.gz", "m.nii.gz"))
    assert np.allclose(first.GetOrigin(), second.GetOrigin(), atol=1e-4)
    assert np.allclose(first.GetDirection(), second.GetDirection(), atol=1e-5)
    assert np.allclose(first.GetSpacing(), second.GetSpacing())


@pytest.mark.parametrize(("unit", "factor"), [("micron", 1e-3), ("meter", 1e3), ("mm", 1)])
def test_lengths_are_mm_whatever_the_unit(tmp_path, unit, factor):
    path = placed(tmp_path / "a.nii", sform=(STRAIGHT, 1), unit=unit)
    for read in (read_header, read_image):
        assert np.allclose(read(path).spacing, np.array([2, 2, 3]) * factor)


def test_a_unit_that_there_is_not_is_no_error(tmp_path):
    path = placed(tmp_path / "a.nii", sform=(STRAIGHT, 1))
    image = nib.load(path)
    image.header["xyzt_units"] = 7
    nib.save(image, path)
    volume = read_image(path)
    assert np.allclose(volume.affine, STRAIGHT)
    write(volume, tmp_path / "b.nii", like=path)
    assert np.allclose(read_image(tmp_path / "b.nii").affine, STRAIGHT)


def test_only_nifti_is_placed_as_nifti(tmp_path):
    volume = Volume(np.ones(SHAPE, np.uint8), TURNED)
    for suffix, like in ((".nrrd", ".nii"), (".nii", ".nrrd")):
        other = save_image(tmp_path / f"like{like}")
        write(volume, tmp_path / f"a{suffix}", like=other)
        assert np.allclose(read_labels(tmp_path / f"a{suffix}").affine, TURNED)
