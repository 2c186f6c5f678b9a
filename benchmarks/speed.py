"""Speed and memory beside the way of the literature (`reference.py`), both in one run.

    python benchmarks/speed.py                                   # every row at the paper's size
    python benchmarks/speed.py --only step --only metrics
    python benchmarks/speed.py --small                           # does it run? a minute, no figures
    python benchmarks/speed.py --record results/speed-cpu.json

Inputs are made up; volumes have the sizes of the 20 test cases of the Left Atrium. A figure is a median,
and a ratio is of two figures of this run: machines differ and are noisy, so compare nothing else. Each row
is measured in a process of its own, the reference first: how ours keeps memory would speed it up too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import measures
from measures import Figures, Sizes

from vclipseg.device import default_device
from vclipseg.environment import commit, cpu_name


@dataclass(frozen=True)
class Row:
    """A line of the table: what is measured, in which unit, and what it has to reach."""

    name: str
    measure: Callable[[Sizes], Figures]
    unit: str
    target: float
    at_least: bool = True  # else at most


ROWS = {
    "step": Row("training step, VCLIPSeg, batch of 4", measures.step, "s", 3),
    "data": Row("share of a step that waits for data", measures.waiting, "%", 2, at_least=False),
    "predict": Row("predicting 20 scans, whole volumes", measures.predict_whole, "s", 60),
    "default": Row("predicting 20 scans, as by default", measures.predict_default, "s", 60),
    "windows": Row("predicting 20 scans, the paper's windows", measures.predict_windows, "s", 3),
    "export": Row("an exported model, one window", measures.exported, "s", 2),
    "metrics": Row("Dice, Jaccard, 95HD, ASD of 20 scans", measures.metrics, "s", 15),
    "ct": Row("peak memory, CT of 512 x 512 x 400", measures.ct_memory, "GiB", 6, at_least=False),
    "memory": Row("peak memory, training step", measures.step_memory, "GiB", 0.6, at_least=False),
    "help": Row(
        "vclipseg --help beside a bare start", measures.help_start, "s", 10, at_least=False
    ),
    "info": Row("vclipseg info beside a bare start", measures.info_start, "s", 10, at_least=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=list(ROWS), default=[])
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", type=Path, help="JSON to write; rows not measured are kept")
    parser.add_argument("--child", choices=list(measures.CHILDREN), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = measures.SMALL if arguments.small else measures.PAPER
    sizes = replace(sizes, threads=arguments.threads)
    if arguments.child:
        print(json.dumps(measures.CHILDREN[arguments.child](sizes)))
        return
    rows = []
    for key in arguments.only or ROWS:
        began = time.monotonic()
        print(f"{ROWS[key].name} ...", end=" ", flush=True, file=sys.stderr)
        rows.append(line(ROWS[key], in_own_process(key, sizes), arguments.threads))
        print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
        print(describe(rows[-1]), flush=True)
    if arguments.record:
        write(arguments.record, rows, [row.name for row in ROWS.values()])


def in_own_process(key: str, sizes: Sizes) -> Figures:
    """The figures of a row."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, key, sizes).result()


def measure(key: str, sizes: Sizes) -> Figures:
    """The figures of a row, in this process."""
    torch.set_num_threads(sizes.threads)
    return ROWS[key].measure(sizes)


def line(row: Row, figures: Figures, threads: int) -> dict:
    """What the record says of a row: `value` is the ratio where there is a reference."""
    device = default_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    return {
        "name": row.name,
        "unit": row.unit,
        **asdict(figures),
        "target": row.target,
        "holds": bool(figures.value >= row.target if row.at_least else figures.value <= row.target),
        "device": f"{name}, {threads} thread(s)",
        "commit": commit(),
    }


def describe(row: dict) -> str:
    """A row for people."""
    beside = "" if row["reference"] is None else f"reference {row['reference']:.4g} {row['unit']}, "
    verdict = "holds" if row["holds"] else "MISSED"
    return (
        f"{row['name']}: {beside}ours {row['ours']:.4g} {row['unit']} -> {row['value']:.4g} "
        f"(target {row['target']:g}: {verdict}){'; ' if row['note'] else ''}{row['note']}"
    )


def write(path: Path, rows: list[dict], order: list[str]) -> None:
    """Put rows into the record, in that order of names."""
    known = (
        {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))}
        if path.is_file()
        else {}
    )
    known |= {row["name"]: row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps([known[name] for name in order if name in known], indent=2) + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
