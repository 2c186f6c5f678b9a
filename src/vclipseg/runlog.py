"""`log.csv` of a run: a row every few steps, each term with its weight, means since the last row.

Of several ranks all keep the log, for its rows are their mean, and the first one writes.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vclipseg.files import write_text
from vclipseg.methods.base import Loss
from vclipseg.ranks import is_first, mean


class RunLog:
    """Collects steps and writes rows, to CSV and, if asked, TensorBoard.

    Args:
        folder: the run folder.
        first_step: rows after it are dropped: they are of a stretch that a resumed run repeats.
        tensorboard: also write `tensorboard/`.
    """

    def __init__(self, folder: Path, first_step: int = 0, tensorboard: bool = False) -> None:
        self.path = folder / "log.csv"
        self.rows = [r for r in read_log(self.path) if int(r["step"]) <= first_step]
        self.seconds_before = float(self.rows[-1]["seconds"]) if self.rows else 0.0
        self.began = time.monotonic()
        self.sums: dict[str, Any] = {}
        self.count = 0
        self.board = _summary_writer(folder, first_step) if tensorboard and is_first() else None

    @property
    def seconds(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.seconds_before + time.monotonic() - self.began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within it takes no time of the training's."""
        since = time.monotonic()
        try:
            yield
        finally:
            self.began += time.monotonic() - since

    def add(self, loss: Loss) -> None:
        """Take one step in."""
        values = {"total": loss.total, **{name: term.value for name, term in loss.items()}}
        for name, value in {**values, **loss.facts}.items():
            self.sums[name] = self.sums.get(name, 0.0) + torch.as_tensor(value).detach()
        for name, term in loss.items():
            self.sums[f"{name}_weight"] = self.sums.get(f"{name}_weight", 0.0) + term.weight
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        """The stretch that no row has closed yet, for a checkpoint; every rank must ask for it."""
        return {"sums": {k: mean(v) for k, v in self.sums.items()}, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.sums, self.count = dict(state.get("sums", {})), state.get("count", 0)

    def row(self, step: int, lr: float) -> dict[str, float]:
        """Close the stretch that ends with `step` steps done; every rank must ask for it."""
        means = {name: float(mean(total)) / self.count for name, total in self.sums.items()}
        row = {"step": step, "seconds": round(self.seconds, 3), "lr": lr, **means}
        self.rows.append(
            {k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in row.items()}
        )
        self.sums, self.count = {}, 0
        if self.board:
            for name, value in row.items():
                self.board.add_scalar(name.replace(" ", "_"), value, step)
        return row

    def write(self) -> None:
        """Put all rows on disk, atomically."""
        if not is_first():
            return
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())

    def close(self) -> None:
        """Write what is left."""
        self.write()
        if self.board:
            self.board.close()


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a log, none if there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _summary_writer(folder: Path, first_step: int):  # noqa: ANN202  (imported on use)
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
