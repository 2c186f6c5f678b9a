"""What is made of several sections: how much the test set flatters, and what labels are worth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vclipseg.statistics import Comparison
from vclipseg.tables.budgets import Curve, Saved, labels_saved
from vclipseg.tables.groups import BASELINE, Group, compare_groups, group_key
from vclipseg.tables.published import Figure
from vclipseg.tables.sections import Row, Section


@dataclass(frozen=True)
class Flattery:
    """What choosing the checkpoint on the test set adds to one method's Dice."""

    name: str
    dataset: str
    labeled: int
    runs: int
    comparison: Comparison
    figure: Figure | None


def flatteries(sections: Iterable[Section]) -> list[Flattery]:
    """Strict and paper protocol side by side, for each method that has both."""
    found = []
    rows = {(s.first.protocol, *_row_key(row)): row for s in sections for row in s.rows}
    for (protocol, *key), row in rows.items():
        strict = rows.get(("strict", *key))
        if protocol != "paper" or strict is None or row.group.first.lcc:
            continue
        chosen, last = row.group.shared_with(strict.group), strict.group.shared_with(row.group)
        if chosen.records:
            run = row.group.first
            names = f"{row.group.name}, best on test", f"{row.group.name}, {run.weights}"
            found.append(
                Flattery(
                    row.group.name,
                    run.dataset,
                    run.labeled,
                    len(chosen.records),
                    compare_groups(chosen, last, names),
                    row.figure,
                )
            )
    return found


def budget_curves(sections: Iterable[Section]) -> dict[str, list[Curve]]:
    """Title -> the curves of Dice against labels, of methods measured at two budgets at least."""
    found: dict[str, list[Curve]] = {}
    for title, rows in _budget_rows(sections).items():
        curves = [
            Curve(
                name,
                tuple(of_budget),
                tuple(row.interval("dice") for row in of_budget.values()),
                next(iter(of_budget.values())).group.first.method == BASELINE,
            )
            for name, of_budget in rows.items()
            if len(of_budget) > 1
        ]
        if curves:
            found[title] = curves
    return found


def saved_labels(sections: Sequence[Section]) -> list[Saved]:
    """Labels that each method saves against its supervised baseline, where that has two budgets."""
    found = []
    for rows in _budget_rows(sections).values():
        for name, of_budget in rows.items():
            for labeled, row in of_budget.items():
                baseline = rows.get(row.to_baseline.name_b, {}) if row.to_baseline else {}
                budgets = {n: base.group for n, base in baseline.items()}
                if saved := _saved(name, labeled, row.group, budgets):
                    found.append(saved)
    return found


def _saved(name: str, labeled: int, group: Group, baseline: Mapping[int, Group]) -> Saved | None:
    """By the seeds, draws and folds that the method and all budgets have; None with less than two."""
    common = group.replicates.intersection(*(base.replicates for base in baseline.values()))
    if len(baseline) < 2 or not common:
        return None
    means = {n: base.only(common).case_means("dice") for n, base in baseline.items()}
    own = group.only(common).case_means("dice")
    ids = sorted(set(own).intersection(*means.values()))
    scores = {n: [values[i] for i in ids] for n, values in means.items()}
    return labels_saved(name, labeled, [own[i] for i in ids], scores)


def _row_key(row: Row) -> tuple:
    run = row.group.first
    return run.dataset, run.labeled, run.filters, run.fold is None, run.lcc, *group_key(run)


def _budget_rows(sections: Iterable[Section]) -> dict[str, dict[str, dict[int, Row]]]:
    """Data set and width -> name of the method -> labels, ascending -> its row."""
    found: dict[str, dict[str, dict[int, Row]]] = {}
    for section in sorted(sections, key=lambda s: s.first.labeled):
        if section.is_main:
            of_size = found.setdefault(section.size, {})
            for row in section.rows:
                of_size.setdefault(row.group.name, {})[section.first.labeled] = row
    return found
