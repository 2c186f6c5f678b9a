"""Masks to DICOM objects and back, compared by their places in the world."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from dicom_made import AXIAL, RAS_TO_LPS, oblique, write_series

from vclipseg.data import dicom_planes
from vclipseg.data.dicom import read_series
from vclipseg.data.dicom_codes import coded, load_codes
from vclipseg.data.dicom_objects import (
    KINDS,
    dicom_writer,
    read_labels,
    referenced_series,
    segment_names,
)
from vclipseg.data.dicom_seg import write_seg
from vclipseg.data.volume import Volume, reorient
from vclipseg.errors import DataError, UsageError

hd = pytest.importorskip("highdicom", reason="the extra `dicom` is not installed")
pydicom = pytest.importorskip("pydicom", reason="the extra `dicom` is not installed")

CLASSES = ("background", "left atrium", "tumor", "spleen")
SHAPE = (13, 10, 6)
REVERSED = AXIAL @ np.diag([1.0, 1.0, -1.0, 1.0])
SAGITTAL = np.array([[0, 0, 1.5, 3], [-0.8, 0, 0, 9], [0, -1.1, 0, 40], [0, 0, 0, 1.0]])
GRIDS = {"axial": AXIAL, "oblique": oblique(), "reversed": REVERSED, "sagittal": SAGITTAL}
SHUFFLED = ["e.dcm", "b.dcm", "f.dcm", "a.dcm", "c.dcm", "d.dcm"]
KINDS_AND_ONE_SLICE = [(kind, alone) for kind in KINDS for alone in (False, True)]


def classes(shape=SHAPE, alone=False):
    """A block with a hole, one in two pieces, and scattered voxels; or what one slice has of it."""
    labels = np.zeros(shape, np.uint8)
    labels[2:9, 1:8, 1:5] = 1
    labels[4:6, 3:5, 2:4] = 0
    labels[7:12, 5:9, 2] = labels[0:2, 0:2, 2] = 2
    labels[np.random.default_rng(0).random(shape) < 0.05] = 3
    if alone:
        labels[..., np.arange(shape[2]) != 2] = 0
    return labels


@pytest.fixture(scope="module", params=GRIDS)
def series(request, tmp_path_factory):
    return made_series(tmp_path_factory.mktemp(request.param), GRIDS[request.param])


@pytest.fixture
def oblique_series(tmp_path):
    return made_series(tmp_path / "series", oblique())


def made_series(folder: Path, affine: np.ndarray) -> tuple[list[Path], Volume]:
    array = np.random.default_rng(1).integers(-1000, 1000, SHAPE)
    write_series(folder, array, affine, names=SHUFFLED)
    return sorted(folder.iterdir()), read_series(folder)


def write(kind, files, mask, path, **about):
    dicom_writer(kind, files, CLASSES, **about)(mask, path)
    return path


# ---- there and back ----------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "alone"), KINDS_AND_ONE_SLICE)
def test_a_mask_comes_back(series, tmp_path, kind, alone):
    files, image = series
    mask = Volume(classes(alone=alone), image.affine)
    path = write(kind, files, mask, tmp_path / "mask.dcm")
    found = read_labels(path, image, CLASSES)
    assert np.array_equal(found.array, mask.array)
    assert found.array.dtype == np.uint8
    assert np.array_equal(found.affine, image.affine)
    assert segment_names(path) == list(CLASSES[1:])
    assert referenced_series(path) == "1.2.3.4"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", ["RAS", "PIL"])
def test_axes_may_run_otherwise(oblique_series, tmp_path, kind, orientation):
    """A mask, and the image that it is read for, may each have their own order of axes."""
    files, image = oblique_series
    mask = Volume(classes(), image.affine)
    path = write(kind, files, reorient(mask, orientation), tmp_path / "mask.dcm")
    assert np.array_equal(read_labels(path, image, CLASSES).array, mask.array)
    turned = reorient(image, "SAR" if orientation == "RAS" else "RAS")
    found = read_labels(path, turned, CLASSES)
    expected = reorient(mask, turned.orientation)
    assert np.array_equal(found.array, expected.array)
    np.testing.assert_allclose(found.affine, expected.affine)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_mask(oblique_series, tmp_path, kind):
    files, image = oblique_series
    path = write(kind, files, Volume(np.zeros(SHAPE, np.uint8), image.affine), tmp_path / "m.dcm")
    assert not read_labels(path, image, CLASSES).array.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_series_of_one_slice(tmp_path, kind):
    files = [write_series(tmp_path, np.zeros(SHAPE), oblique(), slices=[0]) / "1-001.dcm"]
    mask = Volume(classes()[..., 2:3], oblique())
    path = write(kind, files, mask, tmp_path / "mask.dcm")
    assert np.array_equal(read_labels(path, mask, CLASSES).array, mask.array)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [True, False])
def test_an_enhanced_file_of_many_frames(tmp_path, kind, shared):
    file = write_enhanced(tmp_path / "enhanced.dcm", REVERSED, shared)
    mask = Volume(classes(), REVERSED)
    path = write(kind, [file], mask, tmp_path / "mask.dcm")
    assert np.array_equal(read_labels(path, mask, CLASSES).array, mask.array)
    if kind == "rtstruct":
        contour = pydicom.dcmread(path).ROIContourSequence[0].ContourSequence[0]
        assert contour.ContourImageSequence[0].ReferencedFrameNumber == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shown", [slice(1, 5), slice(4, 5)], ids=["slices", "one slice"])
def test_slices_of_a_tilted_gantry(tmp_path, kind, shown):
    """A mask on the upright grid goes to the nearest pixels of the slices as they were taken, and back."""
    folder = write_series(tmp_path / "ct", np.zeros(SHAPE), oblique(), sideways_mm=0.37)
    files, image = sorted(folder.iterdir()), read_series(folder)
    assert image.shape == (13, 13, 6)
    labels = np.zeros(image.shape, np.uint8)
    labels[2:9, 3:9, shown], labels[4:6, 5:7, shown] = 1, 2
    path = write(kind, files, Volume(labels, image.affine), tmp_path / "mask.dcm")
    assert np.array_equal(read_labels(path, image, CLASSES).array, labels)
    if kind == "seg":
        made = pydicom.dcmread(path)
        for n, plane in enumerate(dicom_planes.planes(made)):
            voxels = np.linalg.inv(image.affine) @ plane.affine
            x, y = np.indices(plane.shape)
            at = np.tensordot(voxels, [x, y, np.zeros_like(x), np.ones_like(x)], axes=1)
            i, j, k = np.rint(at[:3]).astype(int)
            owner = made.PerFrameFunctionalGroupsSequence[n].SegmentIdentificationSequence[0]
            expected = labels[i, j, k] == owner.ReferencedSegmentNumber
            assert np.array_equal(made.pixel_array[n].T, expected)
            assert np.ptp(at[2]) < 1e-3  # one slice


def write_enhanced(path: Path, affine: np.ndarray, shared: bool) -> Path:
    """A CT of one file. Not shared: each frame has its orientation and spacing."""
    lps = RAS_TO_LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    orientation = item(
        ImageOrientationPatient=[*(lps[:3, 0] / spacing[0]), *(lps[:3, 1] / spacing[1])]
    )
    measures = item(PixelSpacing=[spacing[1], spacing[0]], SliceThickness=2.0)
    common = {"PlaneOrientationSequence": [orientation], "PixelMeasuresSequence": [measures]}
    frames = []
    for k in range(SHAPE[2]):
        position = item(ImagePositionPatient=list((lps @ [0, 0, k, 1])[:3]))
        frames.append(item(PlanePositionSequence=[position], **({} if shared else common)))
    made = item(
        SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1",
        SOPInstanceUID="1.2.3.4.6",
        StudyInstanceUID="1.2.3",
        SeriesInstanceUID="1.2.3.4",
        FrameOfReferenceUID="1.2.3.4.5",
        Modality="CT",
        Rows=SHAPE[1],
        Columns=SHAPE[0],
        NumberOfFrames=SHAPE[2],
        SharedFunctionalGroupsSequence=[item(**(common if shared else {}))],
        PerFrameFunctionalGroupsSequence=frames,
    )
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    made.save_as(path, enforce_file_format=True)
    return path


def item(**elements):
    made = pydicom.Dataset()
    for keyword, value in elements.items():
        if keyword.endswith(("Patient", "Spacing")):
            value = [pydicom.valuerep.DSfloat(v, auto_format=True) for v in value]
        setattr(made, keyword, value)
    return made


# ---- what stands in them -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["seg", "seg-labelmap"])
def test_highdicom_finds_the_mask_at_its_place(series, tmp_path, kind):
    files, image = series
    mask = Volume(classes(), image.affine)
    seg = hd.seg.segread(write(kind, files, mask, tmp_path / "m.dcm", method="vclipseg (robust)"))
    volume = seg.get_volume(combine_segments=True)
    found = Volume(volume.array, RAS_TO_LPS @ volume.affine)
    expected, found = reorient(mask), reorient(found)
    where = np.rint(np.linalg.inv(expected.affine) @ found.affine[:, 3])[:3].astype(int)
    whole = np.zeros_like(expected.array)  # empty slices at the ends are left out
    whole[tuple(slice(i, i + n) for i, n in zip(where, found.shape, strict=True))] = found.array
    assert np.array_equal(whole, expected.array)
    np.testing.assert_allclose(found.affine[:3, :3], expected.affine[:3, :3], atol=1e-5)


def test_a_seg_says_what_it_is_of(oblique_series, tmp_path):
    files, image = oblique_series
    mask = Volume(classes(), image.affine)
    seg = hd.seg.segread(write("seg", files, mask, tmp_path / "m.dcm", method="vclipseg (robust)"))
    source = pydicom.dcmread(files[0])
    for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert seg[keyword].value == source[keyword].value
    assert seg.SeriesInstanceUID != source.SeriesInstanceUID
    assert {u for _, _, u in seg.get_source_image_uids()} == {
        pydicom.dcmread(file).SOPInstanceUID for file in files
    }
    places = {pydicom.dcmread(f).SOPInstanceUID: pydicom.dcmread(f) for f in files}
    for frame in seg.PerFrameFunctionalGroupsSequence:
        referred = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert (
            frame.PlanePositionSequence[0].ImagePositionPatient
            == places[referred].ImagePositionPatient
        )
    first = seg.get_segment_description(1)
    assert first.segment_label == "left atrium"
    assert first.segmented_property_type.value == "82471001"
    assert first.algorithm_identification.name == "vclipseg"
    assert "vclipseg (robust)" in str(first.algorithm_identification.parameters)
    rgb = hd.color.CIELabColor.from_dicom_value(list(first.RecommendedDisplayCIELabValue)).to_rgb()
    np.testing.assert_allclose(rgb, (0xD9, 0x8E, 0x6E), atol=1)


def test_an_rtstruct_has_what_its_definition_asks_for(oblique_series, tmp_path):
    files, image = oblique_series
    path = write("rtstruct", files, Volume(classes(), image.affine), tmp_path / "m.dcm")
    made = pydicom.dcmread(path)
    filled = ("SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID Modality "
              "StructureSetLabel StructureSetDate StructureSetTime StructureSetROISequence "
              "ROIContourSequence RTROIObservationsSequence FrameOfReferenceUID")  # fmt: skip
    there = ("PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime StudyID "
             "AccessionNumber ReferringPhysicianName SeriesNumber OperatorsName Manufacturer "
             "InstanceNumber ApprovalStatus")  # fmt: skip
    assert all(made[keyword].value for keyword in filled.split())
    assert all(keyword in made for keyword in there.split())
    uids = {pydicom.dcmread(f).SOPInstanceUID: pydicom.dcmread(f) for f in files}
    reference = made.ReferencedFrameOfReferenceSequence[0]
    assert reference.FrameOfReferenceUID == "1.2.3.4.5"
    referred = reference.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert {i.ReferencedSOPInstanceUID for i in referred.ContourImageSequence} == set(uids)
    for number, roi in enumerate(made.StructureSetROISequence, start=1):
        assert (roi.ROINumber, roi.ROIName) == (number, CLASSES[number])
        assert roi.ReferencedFrameOfReferenceUID == "1.2.3.4.5"
        assert roi.ROIGenerationAlgorithm == "AUTOMATIC"
        assert "ROIInterpreter" in made.RTROIObservationsSequence[number - 1]
    for contours in made.ROIContourSequence:
        for contour in contours.ContourSequence:
            points = np.reshape(np.array(contour.ContourData, float), (-1, 3))
            assert len(points) == contour.NumberOfContourPoints
            of = uids[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
            x, y = np.reshape(np.array(of.ImageOrientationPatient, float), (2, 3))
            off = (points - np.array(of.ImagePositionPatient, float)) @ np.cross(x, y)
            np.testing.assert_allclose(off, 0, atol=1e-3)


def test_names_in_any_script(oblique_series, tmp_path):
    files, image = oblique_series
    for file in files:
        source = pydicom.dcmread(file)
        source.SpecificCharacterSet, source.PatientName = "ISO_IR 100", "Müller^Jürgen"
        source.save_as(file)
    names = ("background", "左心房")
    mask = Volume((classes() == 1).astype(np.uint8), image.affine)
    for kind in KINDS:
        path = tmp_path / f"{kind}.dcm"
        dicom_writer(kind, files, names)(mask, path)
        assert np.array_equal(read_labels(path, image, names).array, mask.array)
        assert str(pydicom.dcmread(path).PatientName) == "Müller^Jürgen"


def test_headers_that_break_the_standard_are_taken_over_in_silence(oblique_series, tmp_path):
    files, image = oblique_series
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file in files:
            source = pydicom.dcmread(file)
            source.PatientBirthDate, source.PatientID = "about 1950", "x" * 90
            del source.StudyID
            source.save_as(file)
    for kind in KINDS:  # pydicom's warnings would fail the test
        write(kind, files, Volume(classes(), image.affine), tmp_path / f"{kind}.dcm")


def test_codes(tmp_path):
    assert coded("left atrium").type.meaning == "Left atrium"
    assert coded("Left_Kidney").type.meaning == "Kidney"
    assert coded("tumor").category.meaning == "Morphologically Abnormal Structure"
    assert coded("something").type.meaning == "Organ"
    file = tmp_path / "codes.json"
    own = {"category": ["1", "99ME", "Mine"], "type": ["2", "99ME", "My own"]}
    file.write_text(json.dumps({"spleen": own}))
    codes = load_codes(file, CLASSES)
    assert coded("spleen", codes).type == pydicom.sr.coding.Code("2", "99ME", "My own")
    assert coded("tumor", codes).type.meaning == "Neoplasm"
    for wrong in ({"heart": own}, {"spleen": {"type": ["2", "99ME", "x"]}}, [], {"spleen": "x"}):
        file.write_text(json.dumps(wrong))
        with pytest.raises(UsageError, match=r"codes\.json"):
            load_codes(file, CLASSES)
    with pytest.raises(UsageError, match=r"none\.json: cannot be read as JSON"):
        load_codes(tmp_path / "none.json", CLASSES)


# ---- objects of others -------------------------------------------------------------------


def test_classes_that_overlap_go_to_the_later_one(oblique_series, tmp_path):
    files, image = oblique_series
    organ, tumor = np.zeros((2, *SHAPE), np.uint8)
    organ[2:9, 2:9, 1:5] = 1
    tumor[4:12, 4:6, 2:4] = 1
    frames = np.stack([tumor, organ], axis=-1)  # segment 1 is the tumor
    path = other_seg(files, image, frames, ["Tumor", "left_atrium"], tmp_path / "seg.dcm")
    names = ("background", "left atrium", "tumor")
    found = read_labels(path, image, names).array
    assert np.array_equal(found, np.where(tumor, 2, organ))
    reverse = read_labels(path, image, ("background", "tumor", "left atrium")).array
    assert np.array_equal(reverse, np.where(organ, 2, tumor))


def test_half_a_fraction_is_inside(oblique_series, tmp_path):
    files, image = oblique_series
    share = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    share[0, 0, 0] = 0.5
    path = other_seg(files, image, share[..., None], ["spleen"], tmp_path / "seg.dcm", "FRACTIONAL")
    found = read_labels(path, image, ("background", "spleen")).array
    assert np.array_equal(found, np.rint(share * 255) >= 127.5)


def other_seg(files, image, frames, labels, path, kind="BINARY"):
    """A SEG of segments (X, Y, Z, N)."""
    sources = sorted(map(pydicom.dcmread, files), key=lambda s: place_of(s, image))
    for source in sources:
        source.SliceThickness = 2.0
    what = coded("spleen")
    segments = [
        hd.seg.SegmentDescription(n, label, what.category, what.type, "MANUAL")
        for n, label in enumerate(labels, start=1)
    ]
    seg = hd.seg.Segmentation(
        sources, np.ascontiguousarray(frames.transpose(2, 1, 0, 3)), kind, segments,
        hd.UID(), 1, hd.UID(), 1, "someone", "x", "1", "1",
    )  # fmt: skip
    seg.save_as(path)
    return path


def place_of(source, image) -> float:
    position = [*np.array(source.ImagePositionPatient, float) * (-1, -1, 1), 1]
    return float((np.linalg.inv(image.affine) @ position)[2])


def test_contours_of_other_software(oblique_series, tmp_path):
    """Round contours, with a hole that is a contour of its own; points and other structures beside."""
    files, image = oblique_series
    path = write("rtstruct", files, Volume(classes(), image.affine), tmp_path / "m.dcm")
    made = pydicom.dcmread(path)
    template = made.ROIContourSequence[0].ContourSequence[0]
    turns = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    contours = []
    for radius in (4.3, 1.8):
        circle = np.stack([radius * np.cos(turns) + 6, radius * np.sin(turns) + 5], axis=1)
        world = np.c_[circle, np.full(90, 3.02), np.ones(90)] @ (RAS_TO_LPS @ image.affine).T
        contours.append(item(**{e.keyword: e.value for e in template}))
        contours[-1].ContourData = [f"{v:.2f}" for v in world[:, :3].ravel()]
    point = item(ContourGeometricType="POINT", ContourData=["0", "0", "0"])
    made.ROIContourSequence[0].ContourSequence = [*contours, point]
    made.StructureSetROISequence[0].ROIName = "LEFT-ATRIUM"
    made.save_as(path)
    found = read_labels(path, image, ("background", "left atrium")).array
    x, y = np.indices(SHAPE[:2])
    square = (x - 6) ** 2 + (y - 5) ** 2
    assert np.array_equal(found[..., 3], (square < 4.3**2) & (square > 1.8**2))
    assert not np.delete(found, 3, axis=2).any()
    contours[0].ContourGeometricType = "OPEN_PLANAR"
    made.save_as(path)
    with pytest.raises(DataError, match="OPEN_PLANAR"):
        read_labels(path, image, ("background", "left atrium"))


@pytest.mark.parametrize("kind", KINDS)
def test_smooth_shapes_keep_their_volume(oblique_series, tmp_path, kind):
    files, image = oblique_series
    x, y, z = np.indices(SHAPE)
    ball = (((x - 6) / 5) ** 2 + ((y - 5) / 4) ** 2 + ((z - 2.5) / 2.4) ** 2 < 1).astype(np.uint8)
    path = write(kind, files, Volume(ball, image.affine), tmp_path / "m.dcm")
    assert np.array_equal(read_labels(path, image, CLASSES).array, ball)


# ---- refusals ----------------------------------------------------------------------------


def test_names_that_are_not_there(oblique_series, tmp_path):
    files, image = oblique_series
    for kind in KINDS:
        path = write(kind, files, Volume(classes(), image.affine), tmp_path / f"{kind}.dcm")
        with pytest.raises(DataError, match="no segment liver; it has left atrium, tumor, spleen"):
            read_labels(path, image, ("background", "liver", "spleen"))
        found = read_labels(path, image, ("background", "liver", "spleen"), allow_missing=True)
        assert np.array_equal(found.array, 2 * (classes() == 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["moved", "beside", "other spacing", "turned", "too small"])
def test_another_grid(oblique_series, tmp_path, kind, how):
    if (kind, how) == ("rtstruct", "beside"):
        pytest.skip("contours lie anywhere in a slice")
    files, image = oblique_series
    path = write(kind, files, Volume(classes(), image.affine), tmp_path / "m.dcm")
    affine, array = image.affine.copy(), image.array
    if how == "moved":
        affine[:3, 3] += 0.5 * affine[:3, 2]
    elif how == "beside":
        affine[:3, 3] += 0.4 * affine[:3, 0]
    elif how == "other spacing":
        affine[:3, 2] *= 1.3
    elif how == "turned":
        affine = oblique((20.0, 0.0, 0.0))
    else:
        array = array[..., :3]
    other = Volume(array, affine)
    with pytest.raises(DataError, match=r"lies (on|in) no slice of the image"):
        read_labels(path, other, CLASSES)
    with pytest.raises(DataError, match="mask's grid is not that of the series"):
        write(kind, files, Volume(np.ones(other.shape, np.uint8), other.affine), tmp_path / "n.dcm")
    assert not (tmp_path / "n.dcm").exists()


def test_what_is_no_object(oblique_series, tmp_path):
    files, image = oblique_series
    with pytest.raises(DataError, match="is neither a DICOM segmentation"):
        read_labels(files[0], image, CLASSES)
    (tmp_path / "text.dcm").write_text("hello")
    with pytest.raises(DataError, match=r"text\.dcm: cannot be read as a DICOM file"):
        segment_names(tmp_path / "text.dcm")
    with pytest.raises(UsageError, match="no such file"):
        referenced_series(tmp_path / "none.dcm")
    with pytest.raises(UsageError, match=r"nrrd: no kind.*seg, seg-labelmap, rtstruct"):
        dicom_writer("nrrd", files, CLASSES)


def test_a_series_without_a_frame_of_reference(oblique_series, tmp_path):
    files, image = oblique_series
    source = pydicom.dcmread(files[2])
    del source.FrameOfReferenceUID
    source.save_as(files[2])
    with pytest.raises(DataError, match=r"f\.dcm|c\.dcm: has no FrameOfReferenceUID") as refusal:
        write_seg(Volume(classes(), image.affine), files, tmp_path / "m.dcm", CLASSES)
    assert "SECRET" not in str(refusal.value)


def test_without_the_extra(oblique_series, tmp_path, monkeypatch):
    files, image = oblique_series
    monkeypatch.setattr(dicom_planes, "find_spec", lambda name: None)
    for kind in KINDS:
        with pytest.raises(UsageError, match=r"pip install 'vclipseg\[dicom\]'"):
            dicom_writer(kind, files, CLASSES)
    with pytest.raises(UsageError, match=r"pydicom: not installed"):
        read_labels(tmp_path / "x.dcm", image, CLASSES)
