"""What a check of a data set found: problems, a summary, and both as text and JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from vclipseg.data.datasets import Dataset

Severity = Literal["error", "warning"]
MAX_LISTED = 5
"""Problems of one kind that the text lists one by one; the JSON has them all."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and what to do about it.

    Attributes:
        code: Its kind, in kebab-case.
        case_id: Empty if it concerns the data set as a whole.
        file: The file to look at; None if there is not one.
        message: What differs, by how much (distances in mm), and what to do.
        severity: An error makes results worthless; a warning wants a look.
        fixable: Whether `fix_copy` mends it.
    """

    code: str
    case_id: str
    file: Path | None
    message: str
    severity: Severity = "error"
    fixable: bool = False


@dataclass(frozen=True)
class ClassSummary:
    """How often and how large a class is in the labeled training cases; volumes in ml."""

    name: str
    cases: int
    smallest_ml: float
    median_ml: float
    largest_ml: float


@dataclass(frozen=True)
class Summary:
    """A data set in numbers. Triples are along R, A and S, whatever way a file is stored."""

    name: str
    layout: str
    labeled: int
    unlabeled: int
    test: int
    channels: tuple[str, ...] = ()
    orientations: dict[str, int] = field(default_factory=dict)
    spacing_mm: dict[str, tuple[float, ...]] = field(default_factory=dict)  # min, median, max
    shape: dict[str, tuple[int, ...]] = field(default_factory=dict)
    classes: tuple[ClassSummary, ...] = ()


@dataclass(frozen=True)
class Findings:
    """The result of `check_dataset`.

    Attributes:
        root: The folder that was checked.
        dataset: None if its cases could not be listed.
        problems: Errors first.
        summary: None if its cases could not be listed.
    """

    root: Path
    dataset: Dataset | None
    problems: tuple[Problem, ...]
    summary: Summary | None

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that make results worthless."""
        return tuple(p for p in self.problems if p.severity == "error")

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """The problems that want a look."""
        return tuple(p for p in self.problems if p.severity == "warning")

    @property
    def trustworthy(self) -> bool:
        """Whether there is no error; warnings do not count."""
        return not self.errors

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for `json.dump`; file names are relative to the folder."""
        problems = [{**asdict(p), "file": _relative(p.file, self.root)} for p in self.problems]
        return {
            "version": 1,
            "root": str(self.root),
            "trustworthy": self.trustworthy,
            "errors": len(self.errors),
            "warnings": len(self.warnings),
            "fixable": sum(p.fixable for p in self.problems),
            "summary": asdict(self.summary) if self.summary else None,
            "problems": problems,
        }

    def lines(self) -> list[str]:
        """Everything as plain text; of many problems of one kind only the first few."""
        lines = list(_summary_lines(self.summary)) if self.summary else [str(self.root)]
        lines += [line for p in self.listed() for line in self._problem_lines(p)]
        lines += [f"... and {n} more {code}" for code, n in self.unlisted().items()]
        return [*lines, self.verdict()]

    def listed(self) -> tuple[Problem, ...]:
        """The problems to show a person: the first few of each kind."""
        seen: Counter[str] = Counter()
        listed = []
        for problem in self.problems:
            seen[problem.code] += 1
            if seen[problem.code] <= MAX_LISTED:
                listed.append(problem)
        return tuple(listed)

    def unlisted(self) -> dict[str, int]:
        """How many problems of each kind `listed` leaves out."""
        counts = Counter(p.code for p in self.problems)
        return {code: n - MAX_LISTED for code, n in counts.items() if n > MAX_LISTED}

    def verdict(self) -> str:
        """The last line: whether results on this data can be trusted, and what to do if not."""
        fixable = sum(p.fixable for p in self.problems)
        counts = f"{_count(len(self.errors), 'error')}, {_count(len(self.warnings), 'warning')}"
        if self.trustworthy:
            return f"{counts}: the data can be used."
        help_ = f"; {fixable} can be mended in a copy (--fix)" if fixable else ""
        return f"{counts}{help_}: results on this data could not be trusted."

    def _problem_lines(self, problem: Problem) -> Iterator[str]:
        fixable = ", fixable" if problem.fixable else ""
        where = problem.case_id or "data set"
        yield f"{problem.severity}: {where}: {problem.message} [{problem.code}{fixable}]"
        if problem.file:
            yield f"    {_relative(problem.file, self.root)}"


def _summary_lines(summary: Summary) -> Iterator[str]:
    s = summary
    yield f"{s.name} ({s.layout}): {s.labeled} labeled, {s.unlabeled} unlabeled, {s.test} test"
    if s.shape:
        shape = {k: " x ".join(map(str, v)) for k, v in s.shape.items()}
        spacing = {k: " x ".join(f"{n:.4g}" for n in v) for k, v in s.spacing_mm.items()}
        yield f"  voxels   {_range(shape)}"
        yield f"  spacing  {_range(spacing)} mm"
        axes = ", ".join(f"{axes} ({n})" for axes, n in s.orientations.items())
        yield f"  axes     {axes}"
    for c in s.classes:
        volume = {"min": c.smallest_ml, "median": c.median_ml, "max": c.largest_ml}
        ml = _range({k: f"{v:.3g}" for k, v in volume.items()})
        yield f"  {c.name}: in {c.cases} of {s.labeled} labeled cases, {ml} ml"


def _range(texts: dict[str, str]) -> str:
    if texts["min"] == texts["max"]:
        return texts["median"]
    return f"{texts['median']} (from {texts['min']} to {texts['max']})"


def _relative(file: Path | None, root: Path) -> str | None:
    if file is None:
        return None
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"
