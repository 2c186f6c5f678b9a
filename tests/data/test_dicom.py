"""A folder of DICOM slices becomes one volume, or is refused with the reason."""

from __future__ import annotations

import itertools
import pickle
import shutil

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_made import (
    AXIAL,
    edit,
    oblique,
    write_enhanced,
    write_object,
    write_series,
    write_slice,
)
from hypothesis import HealthCheck, given, settings
from made import affines, world_grid

from vclipseg.data.dicom import is_dicom, read_series, series_folders, tilt
from vclipseg.data.dicom_headers import SeriesError, read_file
from vclipseg.data.formats import stored_files
from vclipseg.data.splits import hash_file
from vclipseg.data.volume import Volume, read_header, read_image, reorient
from vclipseg.errors import DataError, UsageError

SHAPE = (9, 7, 5)


def hounsfield(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).integers(-1000, 1500, shape).astype(np.float32)


@pytest.fixture
def array():
    return hounsfield()


@pytest.fixture
def folder(tmp_path, array):
    return write_series(tmp_path / "series", array, oblique())


def assert_same_in_the_world(volume: Volume, array, affine):
    """Every voxel has its value and its place; axes may run the other way."""
    expected = reorient(Volume(array[None], affine), volume.orientation)
    np.testing.assert_array_equal(volume.array, expected.array)
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-6)


# ---- where voxels are --------------------------------------------------------------------


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(affine=affines(shear=False))
def test_every_voxel_keeps_its_place(affine, tmp_path_factory):
    array = hounsfield()
    folder = write_series(tmp_path_factory.mktemp("series"), array, affine)
    volume = read_series(folder)
    assert volume.array.dtype == np.float32
    normal = np.cross(volume.affine[:3, 0], volume.affine[:3, 1])
    assert volume.affine[:3, 2] @ normal > 0
    if affine[:3, 2] @ np.cross(affine[:3, 0], affine[:3, 1]) < 0:  # slices were written downwards
        array = array[:, :, ::-1]
        affine = affine.copy()
        affine[:3, 3] += 4 * affine[:3, 2]
        affine[:3, 2] *= -1
    np.testing.assert_array_equal(volume.array[0], array)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)


def test_names_and_instance_numbers_say_nothing(tmp_path, array):
    names = ["e", "b.dcm", "d.IMA", "a", "c.dcm"]
    folder = write_series(tmp_path, array, oblique(), names=names, numbers=[5, 4, 3, 2, 1])
    assert_same_in_the_world(read_series(folder), array, oblique())


def test_slices_from_head_to_foot_are_the_same_volume(tmp_path, array):
    down = AXIAL @ np.diag([1.0, 1.0, -1.0, 1.0])
    down[2, 3] = 8.0
    volume = read_series(write_series(tmp_path, array[:, :, ::-1], down))
    np.testing.assert_array_equal(volume.array[0], array)
    np.testing.assert_allclose(volume.affine, AXIAL)


def test_spacing_is_that_of_positions_and_pixels(folder):
    np.testing.assert_allclose(read_series(folder).spacing, (0.7, 0.9, 2.0))


def test_each_file_has_its_own_rescaling(tmp_path, array):
    folder = write_series(tmp_path, array, AXIAL)
    file = folder / "1-002.dcm"
    file.write_bytes(file.read_bytes().replace(b"-1024 ", b"-1000 "))
    difference = read_series(folder).array[0] - array
    assert difference[:, :, 1] == pytest.approx(24)
    difference[:, :, 1] = 0
    assert not difference.any()


def test_other_files_are_not_looked_at(folder, array):
    (folder / "LICENSE").write_text("CC BY 3.0")
    (folder / "._1-001.dcm").write_bytes(b"\0" * 200)
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (folder / "older").mkdir()
    assert_same_in_the_world(read_series(folder), array, oblique())


# ---- refusals ----------------------------------------------------------------------------


def refused(folder, *words):
    with pytest.raises(DataError) as refusal:
        read_series(folder)
    message = str(refusal.value)
    assert str(folder) in message
    assert "secret" not in message.lower()
    for word in words:
        assert word in message


def test_no_files(tmp_path):
    refused(tmp_path, "no DICOM files")
    refused(tmp_path / "nowhere", "no DICOM files")


def test_several_series(folder, array):
    more = {"series": "1.2.99.77", "description": "Scout"}
    write_slice(folder / "scout.dcm", array[:, :, 0], AXIAL, **more)
    assert read_series(folder).shape == SHAPE  # a single slice is no volume
    write_slice(folder / "scout2.dcm", array[:, :, 0], oblique(), **more)
    refused(folder, "2 series", "Pancreas (...1.2.3.4)", "Scout (....2.99.77)", "folder of its own")


def test_a_missing_slice(tmp_path, array):
    folder = write_series(tmp_path, array, oblique(), slices=[0, 1, 3, 4])
    refused(
        folder, "about 1 slice(s) are missing", "from 1-002.dcm to 1-004.dcm it is 4 mm", "2 mm"
    )


def test_uneven_slices(tmp_path, array):
    folder = write_series(tmp_path, array, AXIAL)
    moved = AXIAL.copy()
    moved[2, 3] = 8.5
    write_slice(folder / "1-005.dcm", array[:, :, 4], moved)
    refused(folder, "not evenly spaced", "it is 2.5 mm")


def test_two_slices_in_one_place(folder, array):
    moved = oblique()
    moved[:3, 3] += 2 * moved[:3, 2]
    write_slice(folder / "again.dcm", array[:, :, 2], moved)
    refused(folder, "same place", "1-003.dcm", "again.dcm")


def test_slices_of_several_grids(folder, array):
    place = oblique()
    place[:3, 3] += 5 * place[:3, 2]
    extra = folder / "extra.dcm"
    write_slice(extra, array[:8, :, 0], place)
    refused(folder, "extra.dcm has 8 x 7 pixels, not 9 x 7")
    wide = place.copy()
    wide[:3, 0] *= 1.1
    write_slice(extra, array[:, :, 0], wide)
    refused(folder, "pixels of 0.77 x 0.9 mm, not of 0.7 x 0.9 mm")
    write_slice(extra, array[:, :, 0], oblique((8.0, -5.0, 13.0)))
    refused(folder, "not the same orientation", "overview image")


def test_slices_that_are_shifted_this_way_and_that(tmp_path, array):
    folder = write_series(tmp_path, array, AXIAL)
    moved = AXIAL.copy()
    moved[:3, 3] += 2 * moved[:3, 2] + [1.4, 0, 0]
    write_slice(folder / "1-003.dcm", array[:, :, 2], moved)
    refused(folder, "shifted sideways, unevenly", "2 pixels")


def test_one_slice(tmp_path, array):
    refused(write_series(tmp_path, array, AXIAL, slices=[2]), "single slice")


def test_a_file_that_cannot_be_read(folder):
    file = folder / "1-004.dcm"
    file.write_bytes(file.read_bytes()[:300])
    refused(folder, f"{file}: cannot be read as a DICOM image", "fresh copy")


def test_pixels_that_are_cut_off(folder):
    file = folder / "1-004.dcm"
    file.write_bytes(file.read_bytes()[:-60])
    refused(folder, f"{file}: cannot be read as a DICOM image")


@pytest.mark.parametrize("element", [b"\x20\x00\x32\x00", b"\x20\x00\x37\x00", b"\x28\x00\x30\x00"])
def test_an_image_that_does_not_say_where_it_lies(folder, element):
    """Position, orientation and spacing; GDCM would make them up."""
    file = folder / "1-003.dcm"
    other = element[:2] + b"\x33\x00"
    assert element in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(element, other))
    refused(folder, f"{file}: does not say where its slice lies")


@pytest.mark.parametrize("color", [False, True])
def test_screen_shots(tmp_path, color):
    array = np.zeros((1, 7, 9, 3) if color else (3, 7, 9), dtype=np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=color), str(tmp_path / "frames.dcm"))
    refused(tmp_path, "holds no slices of a scan, only: secondary capture")


def test_colors(folder):
    file = edit(folder / "1-002.dcm", SamplesPerPixel=3)
    refused(folder, f"{file}: is a color image", "original series")


def test_what_is_wrong_has_a_code_and_a_file(folder):
    edit(folder / "1-002.dcm", SamplesPerPixel=3)
    with pytest.raises(SeriesError) as refusal:
        read_series(folder)
    assert (refusal.value.code, refusal.value.file) == ("dicom-color", folder / "1-002.dcm")
    again = pickle.loads(pickle.dumps(refusal.value))  # as from a process that checks a case
    assert (str(again), again.code) == (str(refusal.value), "dicom-color")


# ---- what is handled ---------------------------------------------------------------------


@pytest.mark.parametrize("sideways_mm", [0.3, -0.9])
def test_a_tilted_gantry(tmp_path, sideways_mm):
    """A ramp in the world is the same ramp on the upright grid."""
    affine = oblique()
    shift = sideways_mm * affine[:3, 1] / 0.9
    tilted = affine.copy()
    tilted[:3, 2] += shift
    ramp = np.rint(300 + 10 * np.einsum("d,dxyz->xyz", [1.0, -2.0, 1.5], world_grid(SHAPE, tilted)))
    folder = write_series(tmp_path, ramp, affine, sideways_mm=sideways_mm)
    volume = read_series(folder)
    added = int(np.ceil(4 * abs(sideways_mm) / 0.9 - 1e-6))
    assert volume.shape == (9, 7 + added, 5) == read_header(folder).shape
    np.testing.assert_allclose(volume.affine[:3, :3], affine[:3, :3], atol=1e-5)
    expected = 300 + 10 * np.einsum(
        "d,dxyz->xyz", [1.0, -2.0, 1.5], world_grid(volume.shape, volume.affine)
    )
    shifts = np.arange(5) * sideways_mm / 0.9
    rows = np.arange(volume.shape[1])[:, None] - (shifts - np.floor(shifts.min() + 1e-3))
    known = np.broadcast_to((rows > -1e-3) & (rows < 6 + 1e-3), volume.shape)  # between pixels
    np.testing.assert_allclose(volume.array[0][known], expected[known], atol=1.1)
    assert "tilted gantry" in tilt(folder)


def test_an_upright_gantry(folder):
    assert tilt(folder) == ""


@pytest.mark.parametrize("compressor", ["JPEG2000", "JPEG"])
def test_compressed_files(tmp_path, compressor):
    array = hounsfield((32, 32, 3))
    folder = write_series(tmp_path, array, oblique(), compressor=compressor)
    syntax = pydicom.dcmread(folder / "1-001.dcm").file_meta.TransferSyntaxUID
    assert syntax.is_compressed
    assert_same_in_the_world(read_series(folder), array, oblique())


def test_run_lengths(tmp_path):
    array = hounsfield((10, 8, 3))
    folder = write_series(tmp_path, array, oblique())
    for file in folder.iterdir():
        object_ = pydicom.dcmread(file)
        object_.compress(pydicom.uid.RLELossless)
        object_.save_as(file)
    assert_same_in_the_world(read_series(folder), array, oblique())


def test_an_enhanced_file(tmp_path, array):
    file = write_enhanced(tmp_path / "all.dcm", array, oblique(), order=[2, 0, 1, 4, 3])
    for path in (file, tmp_path):
        assert_same_in_the_world(read_series(path), array, oblique())


def test_frames_have_their_own_rescaling(tmp_path, array):
    steps = np.rint((array + 1024) / 4) * 4 - 1024
    slopes = [1.0, 2.0, 0.5, 4.0, 1.0]
    file = write_enhanced(tmp_path / "all.dcm", steps, AXIAL, slopes=slopes)
    assert_same_in_the_world(read_series(file), steps, AXIAL)


def test_a_compressed_enhanced_file(tmp_path, array):
    steps = np.rint((array + 1024) / 2) * 2 - 1024
    file = write_enhanced(tmp_path / "all.dcm", steps, AXIAL, slopes=[1, 2, 2, 1, 2])
    object_ = pydicom.dcmread(file)
    object_.compress(pydicom.uid.RLELossless)
    object_.save_as(file)
    assert_same_in_the_world(read_series(file), steps, AXIAL)


def test_two_frames_in_one_place(tmp_path, array):
    twice = AXIAL.copy()
    twice[:3, 2] = 0
    write_enhanced(tmp_path / "all.dcm", array, twice)
    refused(tmp_path, "all.dcm (frame 1) and all.dcm (frame 2) lie in the same place", "phases")


def test_frames_without_a_place(tmp_path, array):
    file = write_enhanced(tmp_path / "all.dcm", array, AXIAL)
    edit(file, PerFrameFunctionalGroupsSequence=None)
    refused(tmp_path, "has 5 frames, of which 0 say where they lie")


def test_copies_of_a_slice(folder):
    shutil.copy(folder / "1-002.dcm", folder / "copy.dcm")
    refused(folder, "1-002.dcm and copy.dcm are copies of one slice")


def test_overviews_and_reports_are_not_slices(folder, array):
    write_slice(
        folder / "scout.dcm", array[:3, :, 0], AXIAL, t0008_0008="ORIGINAL\\PRIMARY\\LOCALIZER"
    )
    write_object(folder / "report.dcm")
    assert_same_in_the_world(read_series(folder), array, oblique())


def test_a_file_stands_for_its_series(folder, array):
    other = hounsfield(seed=1)
    write_series(folder, other, AXIAL, names=list("abcde"), series="1.2.99.77")
    assert_same_in_the_world(read_series(folder / "1-003.dcm"), array, oblique())
    assert_same_in_the_world(read_image(folder / "c"), other, AXIAL)
    assert len(stored_files(folder / "c")) == 5


def test_the_hash_of_a_series_is_of_all_its_files(folder):
    before = hash_file(folder)
    (folder / "1-003.dcm").rename(folder / "0.dcm")
    assert hash_file(folder) == before
    edit(folder / "1-005.dcm", WindowCenter="40")
    assert hash_file(folder) != before


def test_the_patient_is_not_named(tmp_path, array):
    for n in range(2):
        where = tmp_path / str(n)
        write_series(where, array, AXIAL, series=f"1.2.{n}", description="Somebody Secret, abdomen")
    refused(tmp_path, "unnamed (...1.2.1)")
    assert "SECRET" not in repr(read_file(tmp_path / "0" / "1-001.dcm"))


# ---- folders -----------------------------------------------------------------------------


def test_folders_of_series_are_found(tmp_path, array):
    for name in ("b/study/series 2", "a/study/series 1"):
        write_series(tmp_path / name, array, AXIAL, slices=[0])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").write_text("nothing")
    found = [str(folder.relative_to(tmp_path)) for folder in series_folders(tmp_path)]
    assert found == ["a/study/series 1", "b/study/series 2"]
    with pytest.raises(UsageError, match="no such folder"):
        series_folders(tmp_path / "nowhere")


def test_dicom_files_are_known_by_content_or_name(tmp_path, array):
    plain = write_slice(tmp_path / "plain.dcm", array[:, :, 0], AXIAL).rename(tmp_path / "IM0001")
    (tmp_path / "short").write_bytes(b"DICM")
    (tmp_path / "named.DCM").write_bytes(b"")
    assert [is_dicom(tmp_path / name) for name in ("IM0001", "short", "named.DCM")] == [1, 0, 1]
    assert plain.is_file()
    assert not is_dicom(tmp_path)


def test_all_orders_of_slices_are_one_volume(tmp_path):
    array = hounsfield((4, 4, 3))
    for order in itertools.permutations("abc"):
        folder = write_series(tmp_path / "".join(order), array, AXIAL, names=order)
        assert_same_in_the_world(read_series(folder), array, AXIAL)
