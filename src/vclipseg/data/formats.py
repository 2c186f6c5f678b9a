"""The image files the project knows: NIfTI, NRRD, MHA, and the HDF5 of the literature.

Readers give a plain array with channels last, `(X, Y, Z)` or `(X, Y, Z, C)`, and its
affine to RAS+ mm; writers take the same. SimpleITK's LPS and its reversed axes end here.
NIfTI is read by nibabel, as SimpleITK refuses affines that are not orthonormal. All three libraries are
imported when a file needs them: an exported model runs with nibabel alone, training on prepared data with
none of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    import h5py
    import SimpleITK

NIFTI_SUFFIXES = (".nii.gz", ".nii")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
HDF5_SUFFIXES = (".h5",)
IMAGE_SUFFIXES = NIFTI_SUFFIXES + ITK_SUFFIXES + HDF5_SUFFIXES
WRITE_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")

HDF5_SPACING_MM = 0.625
"""The HDF5 files of the left atrium literature carry no geometry; all are this isotropic."""

_MM = {1: 1e3, 3: 1e-3}
"""Of NIfTI's codes: meter and micron. Files with 0, 2 or a code that there is not are in mm."""

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

Geometry = tuple[tuple[int, ...], np.ndarray]
Voxels = tuple[np.ndarray, np.ndarray]


def image_suffix(path: str | Path) -> str:
    """The suffix of an image file, `.nii.gz` counted as one; empty if it is no image file."""
    name = Path(path).name.lower()
    return next((s for s in IMAGE_SUFFIXES if name.endswith(s)), "")


def hidden(path: Path) -> bool:
    """Whether a file is one that people do not see, such as macOS's `._*`."""
    return path.name.startswith(".")


def is_series(path: Path) -> bool:
    """Whether a path stands for a DICOM series: that of a folder, or of a file of it."""
    if image_suffix(path):
        return False
    from vclipseg.data.dicom_headers import is_dicom

    return path.is_dir() or is_dicom(path)


def strip_suffix(path: str | Path) -> str:
    """The name of an image file without folder and suffix: `a/b.nii.gz` is `b`."""
    name = Path(path).name
    return name[: len(name) - len(image_suffix(path))]


def affine_spacing(affine: np.ndarray) -> tuple[float, float, float]:
    """The lengths in mm of an affine's three voxel steps."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    return float(x), float(y), float(z)


def read_geometry(path: Path) -> Geometry:
    """Shape `(X, Y, Z[, C])` and affine of a file, without its voxels."""
    suffix = image_suffix(path)
    if suffix in NIFTI_SUFFIXES:
        image = _open_nifti(path)
        return image.shape, _nifti_affine(image)
    if suffix in ITK_SUFFIXES:
        return _itk_geometry(path)
    import h5py

    with h5py.File(path, "r") as file:
        return cast("h5py.Dataset", file["image"]).shape, _hdf5_affine()


def read_voxels(path: Path, kind: str) -> Voxels:
    """Voxels `(X, Y, Z[, C])` and affine of a file; `kind` is `"image"` or `"label"`."""
    suffix = image_suffix(path)
    if suffix in NIFTI_SUFFIXES:
        return _read_nifti(path, kind)
    if suffix in ITK_SUFFIXES:
        return _read_itk(path)
    import h5py

    with h5py.File(path, "r") as file:
        return cast("h5py.Dataset", file[kind])[()], _hdf5_affine()


def write_voxels(
    array: np.ndarray, affine: np.ndarray, path: Path, like: Path | None = None
) -> None:
    """Write voxels `(X, Y, Z[, C])` in the format that the suffix names, placed as NIfTI's `like`."""
    if image_suffix(path) in NIFTI_SUFFIXES:
        placed_as = like if like and image_suffix(like) in NIFTI_SUFFIXES else None
        _write_nifti(array, affine, path, placed_as)
    else:
        _write_itk(array, affine, path)


def stored_files(path: Path) -> tuple[Path, ...]:
    """The files that hold a volume: `.mhd` and `.nhdr` keep their voxels in a second one.

    Those of a DICOM series are in an order that does not change with their names.
    """
    if is_series(path):
        from vclipseg.data.dicom import stored_series

        return stored_series(path)
    if image_suffix(path) not in (".mhd", ".nhdr") or not path.is_file():
        return (path,)
    text = path.read_bytes()[:65536].decode("latin-1")
    found = re.search(r"(?im)^(?:ElementDataFile\s*=|data ?file:)\s*(\S.*?)\s*$", text)
    if not found or found[1] in ("LOCAL", "LIST"):
        return (path,)
    return (path, path.parent / found[1])


def _open_nifti(path: Path) -> Any:
    import nibabel as nib

    return nib.load(path)  # typed as the base of all formats, without voxels


def _read_nifti(path: Path, kind: str) -> Voxels:
    image = _open_nifti(path)
    if kind == "image" and image.get_data_dtype().kind in "biuf":
        return image.get_fdata(dtype=np.float32, caching="unchanged"), _nifti_affine(image)
    return np.asanyarray(image.dataobj), _nifti_affine(image)


def _nifti_affine(image: Any) -> np.ndarray:
    """To mm: few files, those of microscopes, have another unit."""
    unit = int(image.header["xyzt_units"]) % 8  # the other bits are of time
    return np.diag([*[_MM.get(unit, 1.0)] * 3, 1.0]) @ image.affine


def _write_nifti(array: np.ndarray, affine: np.ndarray, path: Path, like: Path | None) -> None:
    import nibabel as nib

    image = nib.Nifti1Image(array, affine)
    if like:
        _place(image, _open_nifti(like))
    else:
        image.header.set_xyzt_units("mm")
        image.set_sform(affine, code="scanner")
        axes = affine[:3, :3] / affine_spacing(affine)
        if np.allclose(axes.T @ axes, np.eye(3), atol=1e-5):  # a qform cannot hold a shear
            image.set_qform(affine, code="scanner")
    nib.save(image, path)


def _place(image: Any, like: Any) -> None:
    """Both affines of another image on the same grid, their codes, and the unit."""
    image.header["xyzt_units"] = like.header["xyzt_units"]
    image.header["pixdim"][:4] = like.header["pixdim"][:4]
    for name in (
        "qform_code",
        "quatern_b",
        "quatern_c",
        "quatern_d",
        "qoffset_x",
        "qoffset_y",
        "qoffset_z",
    ):
        image.header[name] = like.header[name]
    image.set_sform(*like.get_sform(coded=True))


def itk_affine(
    spacing: Sequence[float], direction: Sequence[float], origin: Sequence[float]
) -> np.ndarray:
    """RAS+ affine from ITK's LPS geometry; a fourth axis is dropped."""
    dims = len(spacing)
    affine = np.eye(4)
    affine[:3, :3] = (np.reshape(direction, (dims, dims)) * np.asarray(spacing))[:3, :3]
    affine[:3, 3] = origin[:3]
    return _LPS_TO_RAS @ affine


def _itk_geometry(path: Path) -> Geometry:
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    size, components = reader.GetSize(), reader.GetNumberOfComponents()
    if len(size) < 3:
        raise ValueError(f"shape {size} is not that of a 3-D volume")
    affine = itk_affine(reader.GetSpacing(), reader.GetDirection(), reader.GetOrigin())
    return ((*size, components) if components > 1 else size), affine


def _read_itk(path: Path) -> Voxels:
    import SimpleITK as sitk

    image = sitk.ReadImage(str(path))
    if image.GetDimension() < 3:
        raise ValueError(f"shape {image.GetSize()} is not that of a 3-D volume")
    array = sitk.GetArrayFromImage(image)  # (Z, Y, X), (Z, Y, X, C) or (C, Z, Y, X)
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = np.moveaxis(array, -1, 0)
    affine = itk_affine(image.GetSpacing(), image.GetDirection(), image.GetOrigin())
    return array.T, affine


def _write_itk(array: np.ndarray, affine: np.ndarray, path: Path) -> None:
    import SimpleITK as sitk

    sitk.WriteImage(itk_image(array, affine), str(path), useCompression=True)


def itk_image(array: np.ndarray, affine: np.ndarray) -> SimpleITK.Image:
    """ITK's image of voxels `(X, Y, Z[, C])` and their affine to RAS+ mm: the way back of `itk_affine`."""
    import SimpleITK as sitk

    vector = array.ndim == 4
    data = np.moveaxis(array.T, 0, -1) if vector else array.T  # (Z, Y, X[, C])
    image = sitk.GetImageFromArray(np.ascontiguousarray(data), isVector=vector)
    lps = _LPS_TO_RAS @ affine
    spacing = affine_spacing(lps)
    image.SetSpacing(spacing)
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def _hdf5_affine() -> np.ndarray:
    return np.diag([HDF5_SPACING_MM] * 3 + [1.0])
