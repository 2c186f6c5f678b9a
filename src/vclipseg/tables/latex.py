"""table.tex: a `table` for each section, for a document that loads booktabs."""

from __future__ import annotations

from collections.abc import Sequence

from vclipseg.statistics import Comparison, Interval, format_p
from vclipseg.tables.footnotes import Footnotes
from vclipseg.tables.sections import Row, Section


def latex(sections: Sequence[Section], title: str) -> str:
    """A `table` for each section, for a document that loads booktabs; Dice and Jaccard in percent."""
    head = f"% {title}: made by `vclipseg benchmark`; needs \\usepackage{{booktabs}}\n"
    return "\n".join([head, *(latex_section(section) for section in sections)])


def latex_section(section: Section) -> str:
    """One section as a `table`."""
    notes = Footnotes()
    compared = any(row.to_baseline for row in section.rows)
    quoted = any(row.figure for row in section.rows)
    rows = [_latex_row(row, notes, compared, quoted) for row in section.rows]
    headings = ["Method", r"Dice (\%)", r"Jaccard (\%)", "95HD", "ASD", "NSD", "Fail.", "s"]
    headings += [r"$\Delta$ base", "$p$", r"$\Delta$ best", "$p$"] if compared else []
    headings += ["Published", "Gap"] if quoted else []
    marked = r" \textbf{Chosen on the test set.}" if section.first.protocol == "paper" else ""
    size = "" if section.facts.full_size or not quoted else " Published figures are of full size."
    marked_notes = [f"$^{{{mark}}}$ {_escape(note)}" for mark, note in notes]
    of_all = [
        *section.facts.remarks,
        *([section.uneven.removesuffix(".")] if section.uneven else []),
    ]
    remarks = "; ".join([*marked_notes, *map(_escape, of_all)])
    label = "-".join(section.title.replace(",", "").replace(".", "").split())
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escape(section.title)}. 95\% intervals over cases; distances in voxels; "
            rf"$p$ of Wilcoxon's test after Holm.{size}{marked}}}",
            rf"\label{{tab:{label}}}",
            r"\begin{tabular}{l" + "r" * (len(headings) - 1) + "}",
            r"\toprule",
            " & ".join(headings) + r" \\",
            r"\midrule",
            *(" & ".join(cells) + r" \\" for cells in rows),
            r"\bottomrule",
            r"\end{tabular}",
            *([rf"\par\footnotesize {remarks}"] if remarks else []),
            r"\end{table}",
            "",
        ]
    )


def _latex_row(row: Row, notes: Footnotes, compared: bool, quoted: bool) -> list[str]:
    dice = _latex_interval(row.interval("dice"), 100, ".2f")
    marks = notes.mark(*row.notes)
    cells = [
        _escape(row.group.name) + (f"$^{{{marks}}}$" if marks else ""),
        rf"\textbf{{{dice}}}" if row.is_best else dice,
        _latex_interval(row.interval("jaccard"), 100, ".2f"),
        _latex_interval(row.interval("hd95_voxel"), 1, ".2f"),
        _latex_interval(row.interval("asd_voxel"), 1, ".2f"),
        _latex_interval(row.interval("nsd"), 100, ".2f"),
        f"{row.failures}/{row.scored}",
        f"{row.seconds:.0f}",
    ]
    if compared:
        against = notes.mark(f"against {row.against}") if row.against else ""
        cells += [_latex_difference(row.to_baseline, against), _latex_p(row.to_baseline)]
        cells += [_latex_difference(row.to_best), _latex_p(row.to_best)]
    if quoted and row.figure:
        mark = notes.mark(f"published: {row.figure.origin}")
        gap = "" if row.gap is None else f"${100 * row.gap:+.2f}$"
        cells += [f"{100 * row.figure.dice:.2f}$^{{{mark}}}$", gap]
    elif quoted:
        cells += ["", ""]
    return cells


def _latex_interval(interval: Interval, scale: float, form: str) -> str:
    if interval.mean is None:
        return "--"
    mean = format(interval.mean * scale, form)
    if interval.low is None or interval.high is None:
        return mean
    low, high = (format(end * scale, form) for end in (interval.low, interval.high))
    return rf"{mean} {{\scriptsize ({low}--{high})}}"


def _latex_difference(comparison: Comparison | None, mark: str = "") -> str:
    difference = None if comparison is None else comparison.difference
    return (
        ""
        if difference is None
        else f"${100 * difference:+.2f}" + (f"^{{{mark}}}$" if mark else "$")
    )


def _latex_p(comparison: Comparison | None) -> str:
    text = "" if comparison is None else format_p(comparison.p_adjusted)
    return f"$<${text.removeprefix('< ')}" if text.startswith("<") else text


def _escape(text: str) -> str:
    for special in ("\\", "&", "%", "$", "#", "_", "{", "}"):
        text = text.replace(special, rf"\{special}" if special != "\\" else r"\textbackslash ")
    return text.replace("<", "$<$").replace("~", r"\textasciitilde ")
