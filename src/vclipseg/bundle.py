"""A trained model as a MONAI bundle, and what the bundle's configuration builds.

The bundle needs this package where it runs: its network, its preprocessing and its windows are those of
`vclipseg predict`, so that the masks are the same.
"""

from __future__ import annotations

import io
import json
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from monai.inferers import Inferer
from torch import Tensor, nn
from torch.utils.data import Dataset

from vclipseg import __version__
from vclipseg.data.plan import Plan
from vclipseg.data.preprocess import Trace, prepare_image, restore_mask
from vclipseg.data.volume import Volume, note_on_values, read_image, with_values, write
from vclipseg.errors import UsageError
from vclipseg.export import UNSTATED, Probabilities, describe, without_folders
from vclipseg.files import replacing
from vclipseg.inference import Predictor, build_method
from vclipseg.networks.folding import fold_batchnorm
from vclipseg.scans import Scan, find_scans, refuse_scans

SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)
FILES = (
    "LICENSE",
    "configs/metadata.json",
    "configs/inference.json",
    "models/model.pt",
    "docs/README.md",
)
PACKAGES = {"monai_version": "monai", "pytorch_version": "torch", "numpy_version": "numpy"}
RANGES = {"rescale": [0, 1], "window": [-1, 1]}  # after preparing; the others have no bounds


def export_bundle(
    predictor: Predictor,
    run: Path,
    path: Path,
    *,
    licence: str = UNSTATED,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a model as a MONAI bundle: a folder, or a .zip that holds one.

    Returns:
        What metadata.json says.

    Raises:
        UsageError: there is something of that name; a bundle is replaced if nothing was put into it.
    """
    zipped = path.suffix == ".zip"
    name = path.stem if zipped else path.name
    replaceable = path.is_file() if zipped else (path / "configs" / "metadata.json").is_file()
    if path.exists() and not (overwrite and replaceable):
        hint = "give --overwrite, or another name" if replaceable else "give another name"
        raise UsageError(f"{path}: exists already; {hint}")
    if not zipped:
        refuse_foreign(path)
    described = describe(predictor, run, licence)
    content = metadata_json(described)
    contents = (
        f"{json.dumps(described['licence'], indent=2)}\n".encode(),
        to_json(content),
        to_json(inference_json(predictor)),
        weights_file(predictor),
        readme(name, described).encode(),
    )
    files = dict(zip(FILES, contents, strict=True))
    (_write_zip if zipped else _write_folder)(path, name, files)
    return content


def refuse_foreign(bundle: Path) -> None:
    """A bundle that somebody put scans, masks or anything else into is not replaced.

    Raises:
        UsageError: it holds something besides what the export writes.
    """
    found = sorted(file.relative_to(bundle) for file in bundle.rglob("*") if not file.is_dir())
    foreign = [file for file in found if file.as_posix() not in FILES]
    if foreign:
        raise UsageError(
            f"{bundle}: holds {foreign[0]}"
            + (f" and {len(foreign) - 1} more files" if len(foreign) > 1 else "")
            + " that no export wrote; move them away, or give another name"
        )


def _write_zip(path: Path, name: str, files: dict[str, bytes]) -> None:
    with replacing(path) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
        for file, content in files.items():
            archive.writestr(f"{name}/{file}", content, zipfile.ZIP_DEFLATED)


def _write_folder(path: Path, name: str, files: dict[str, bytes]) -> None:
    """Beside its place first, so that a bundle is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{name}.") as folder:
        fresh, old = Path(folder) / "fresh", Path(folder) / "old"
        for file, content in files.items():
            (fresh / file).parent.mkdir(parents=True, exist_ok=True)
            (fresh / file).write_bytes(content)
        if path.exists():
            path.rename(old)
        fresh.rename(path)


def to_json(content: Any) -> bytes:
    """As the bytes of a JSON file."""
    return (json.dumps(content, indent=2) + "\n").encode()


def weights_file(predictor: Predictor) -> bytes:
    """The state dict of `network`, as torch saves it."""
    network = Probabilities(predictor.method)
    state = {key: value.cpu().contiguous() for key, value in network.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def metadata_json(described: dict[str, Any]) -> dict[str, Any]:
    """configs/metadata.json: what MONAI asks for, and under "vclipseg" all that the model says."""
    classes = described["class_names"]
    ranges = {tuple(RANGES.get(kind, ())) for kind in described["plan"]["intensity"]}
    image = {
        "type": "image",
        "format": "magnitude",
        "modality": ", ".join(described["channel_names"]),
        "num_channels": len(described["channel_names"]),
        "spatial_shape": described["window"],
        "dtype": "float32",
        "value_range": list(ranges.pop()) if len(ranges) == 1 else [],
        "is_patch_data": True,
        "channel_def": {str(i): channel for i, channel in enumerate(described["channel_names"])},
    }
    pred = {
        "type": "probabilities",
        "format": "segmentation",
        "num_channels": len(classes),
        "spatial_shape": described["window"],
        "dtype": "float32",
        "value_range": [0, 1],
        "is_patch_data": True,
        "channel_def": {str(i): name for i, name in enumerate(classes)},
    }
    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": "as exported"},
        **{key: metadata.version(package) for key, package in PACKAGES.items()},
        "required_packages_version": {
            "vclipseg": __version__,
            "nibabel": metadata.version("nibabel"),
        },
        "name": described["name"],
        "task": f"segmentation of {', '.join(classes[1:])}",
        "description": f"Trained with vclipseg {described['provenance']['trained_with']['vclipseg']} "
        f"by the method {described['provenance']['settings']['method']['name']}.",
        "authors": UNSTATED,
        "copyright": described["licence"]["model"],
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": pred}},
        "vclipseg": described,
    }


def inference_json(predictor: Predictor) -> dict[str, Any]:
    """configs/inference.json: masks of the scans in `dataset_dir` into `output_dir`."""
    d = predictor.description
    keys = ("method", "channel_names", "class_names", "label_values", "plan", "patch", "steps")
    description = {key: d[key] for key in keys}
    description["predict"] = predictor.settings.model_dump(mode="json")
    description["text_dim"] = d["text"]["dim"] if d["text"] else None
    return {
        "imports": ["$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/data'",
        "output_dir": "$@bundle_root + '/predictions'",
        "overwrite": False,
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "description": without_folders(description),
        "network_def": {"_target_": "vclipseg.bundle.network", "description": "@description"},
        "weights": "$torch.load(@bundle_root + '/models/model.pt', weights_only=True)",
        "load": "$@network_def.load_state_dict(@weights)",
        "network": "$@network_def.to(@device)",
        "dataset": {
            "_target_": "vclipseg.bundle.Scans",
            "folder": "@dataset_dir",
            "description": "@description",
        },
        "inferer": {"_target_": "vclipseg.bundle.VolumeInferer", "description": "@description"},
        "evaluator": {
            "_target_": "vclipseg.bundle.Evaluator",
            "dataset": "@dataset",
            "network": "@network",
            "inferer": "@inferer",
            "label_values": "$@description['label_values']",
            "output_dir": "@output_dir",
            "overwrite": "@overwrite",
        },
        "run": ["$@load", "$@evaluator.run()"],
    }


def readme(name: str, described: dict[str, Any]) -> str:
    """docs/README.md of a bundle."""
    return f"""# {name}

Segmentation of {", ".join(described["class_names"][1:])} in images with the channels
{", ".join(described["channel_names"])}. Class probabilities of patches of {described["window"]} voxels of
{described["plan"]["spacing"]} mm; `configs/inference.json` prepares scans and restores masks.

    pip install vclipseg=={__version__} fire
    python -m monai.bundle run --config_file configs/inference.json --bundle_root . \\
        --dataset_dir SCANS --output_dir MASKS

Licence of the model: {described["licence"]["model"]}.
"""


# What the configuration builds


def network(description: dict[str, Any]) -> Probabilities:
    """The network (B, C, X, Y, Z) -> probabilities (B, K, X, Y, Z), its weights those of chance."""
    classes, dim = len(description["class_names"]), description["text_dim"]
    text = torch.zeros(classes, dim) if dim else None
    return Probabilities(fold_batchnorm(build_method(description, text).eval())).eval()


class Scans(Dataset):
    """The scans in a folder, prepared; masks that were predicted beside them are left out.

    An item has `scan`, `image` (C, x, y, z) float32 and `trace`, the way back to the scan's grid.
    """

    def __init__(self, folder: str, description: dict[str, Any]) -> None:
        self.plan = Plan.model_validate(description["plan"])
        self.channels = len(description["channel_names"])
        self.folder = Path(folder)

    def __len__(self) -> int:
        return len(self._scans())

    def __getitem__(self, index: int) -> dict[str, Any]:
        scan = self._scans()[index]
        image = read_image(scan.files)
        if note := note_on_values(image, scan.files[0]):
            warnings.warn(f"{scan.name}: {note}", stacklevel=2)
        prepared, trace = prepare_image(image, self.plan)
        return {"scan": scan, "image": torch.from_numpy(prepared.array), "trace": trace}

    def _scans(self) -> list[Any]:
        return find_scans([self.folder], self.channels)


class VolumeInferer(Inferer):
    """A network over prepared volumes of any size, as `vclipseg predict` runs it."""

    def __init__(self, description: dict[str, Any]) -> None:
        super().__init__()
        self.description = description

    def __call__(
        self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """(B, C, x, y, z) -> probabilities (B, K, x, y, z)."""
        predictor = Predictor(_Forward(network), self.description)  # type: ignore[arg-type]
        return torch.stack([predictor.prepared(image) for image in inputs])


class _Forward(nn.Module):
    """A network in the place of a method."""

    def __init__(self, network: Callable[..., Any]) -> None:
        super().__init__()
        self.network = network

    def predict(self, images: Tensor) -> Tensor:
        return self.network(images)


class Evaluator:
    """Masks of all scans of a data set, on the scans' own grids, with the data set's label values."""

    def __init__(
        self,
        dataset: Scans,
        network: nn.Module,
        inferer: Inferer,
        label_values: list[int],
        output_dir: str,
        overwrite: bool = False,
    ) -> None:
        self.dataset, self.network, self.inferer = dataset, network, inferer
        self.label_values, self.folder, self.overwrite = label_values, Path(output_dir), overwrite

    def run(self) -> list[Path]:
        """Write the masks; gives their files.

        Raises:
            UsageError: a mask is there already and `overwrite` is off, or a scan is where it would go.
        """
        return [self._predict(self.dataset[i]) for i in range(len(self.dataset))]

    def _predict(self, item: dict[str, Any]) -> Path:
        scan: Scan = item["scan"]
        path = self.folder / f"{scan.name}.nii.gz"
        refuse_scans([path] if path.exists() else [], [scan])
        if path.exists() and not self.overwrite:
            raise UsageError(
                f"{path}: exists already; give --overwrite True, or another output_dir"
            )
        trace: Trace = item["trace"]
        probs = self.inferer(item["image"][None], self.network)[0]
        mask = restore_mask(probs, trace)
        values = with_values(mask.array, self.label_values)
        write(Volume(values, mask.affine), path, like=scan.files[0])
        return path
