"""How far each run of a grid had come when its pseudo-labels began, beside the Dice that it ended with.

    python benchmarks/starts.py GRID RUNS --method vclipseg --step 430 --record FILE.csv

GRID is the record of a grid, RUNS the folder in which its runs lie. A row a run of the method that logged
pseudo-labels: `supervised`, the loss on the labels at STEP, and `dice` of the test cases. Spearman's
correlation of the two is printed. Runs that have no folder there are left out, and counted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from scipy.stats import spearmanr

from vclipseg.errors import UsageError
from vclipseg.records import RunRecord, read_runs
from vclipseg.runlog import read_log
from vclipseg.runs import Run
from vclipseg.scores import write_rows

COLUMNS = ("settings_hash", "method", "preset", "seed", "step", "supervised", "dice", "commit")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("grid", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--method", required=True)
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--record", type=Path, required=True)
    arguments = parser.parse_args()
    logs = logs_of(arguments.runs)
    strict = [r for r in read_runs(arguments.grid) if r.protocol == "strict" and not r.lcc]
    recorded = [r for r in strict if r.method == arguments.method]
    found = [r for r in recorded if r.settings_hash in logs]
    rows = [of for r in found if (of := row(r, logs[r.settings_hash], arguments.step))]
    write_rows(arguments.record, COLUMNS, rows)
    rho = spearmanr([r["supervised"] for r in rows], [r["dice"] for r in rows]).statistic
    print(f"{len(rows)} runs, Spearman {rho:.2f}; {len(recorded) - len(found)} without a folder")


def logs_of(folder: Path) -> dict[str, Path]:
    """Settings' hash -> log, of each run in a folder."""
    runs = (Run.open(log.parent) for log in sorted(folder.glob("*/log.csv")))
    return {run.settings_hash: run.folder / "log.csv" for run in runs}


def row(record: RunRecord, log: Path, step: int) -> dict | None:
    """None if the method makes no pseudo-labels.

    Raises:
        UsageError: nothing was logged at this step.
    """
    lines = {int(line["step"]): line for line in read_log(log)}
    if step not in lines:
        raise UsageError(f"{log} has no line of step {step}: choose one that it has")
    if not any(float(line.get("pseudo_share") or 0) for line in lines.values()):
        return None
    about = {c: getattr(record, c) for c in COLUMNS if c not in ("step", "supervised")}
    return {**about, "step": step, "supervised": lines[step]["supervised"]}


if __name__ == "__main__":
    main()
