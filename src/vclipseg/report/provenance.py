"""What was run on what, what to beware of, and how to repeat it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vclipseg.report.reading import Run, as_dict, as_list, number
from vclipseg.report.results import interval, show, show_seconds

CONTROLS = ("orthogonal", "random")
ABSENT = "–"


@dataclass(frozen=True)
class Banner:
    """Something a reader has to know before any number."""

    title: str
    text: str
    mark: str
    """The same in a few words, beside every number it is about."""


@dataclass(frozen=True)
class Fact:
    """One thing known of every run; a dash where a run does not have it."""

    key: str
    values: tuple[str, ...]  # one a run

    @property
    def differs(self) -> bool:
        """The runs do not agree on it."""
        return len(set(self.values)) > 1


def lead(run: Run) -> str:
    """What was run on what, and how well it did, in a sentence."""
    data = run.setting("data", "name") or "unnamed data"
    text = f"{method_name(run)} was trained on {_split(run)} of {data}"
    steps = number(run.setting("settings", "train", "steps"))
    if steps > 0:
        text += f" for {steps:,.0f} steps"
    if not run.scores:
        return f"{text}; it is not evaluated yet."
    values = list(run.per_case("dice").values())
    dice = interval(run, values)
    bounds = "" if dice.low is None else f" (95% interval {dice.low:.3f} to {dice.high:.3f})"
    cases = f"{len(values)} test {'case' if len(values) == 1 else 'cases'}"
    return f"{text}; on {cases} its mean Dice is {show(dice.mean, 3)}{bounds}."


def method_name(run: Run) -> str:
    """`vclipseg (preset robust)`."""
    preset = run.setting("settings", "preset") or run.setting("settings", "method", "preset")
    return f"{run.method or run.name} (preset {preset})" if preset else run.method or run.name


def banners(run: Run) -> list[Banner]:
    """Everything that makes a run's numbers mean less than it seems."""
    found = []
    if run.transductive:
        title = "Test images were used in training"
        text = (
            "Without their labels, as unlabeled cases. The scores do not tell how well the model "
            "does on new cases."
        )
        found.append(Banner(title, text, "trained on test images"))
    if run.protocol == "paper":
        title = "The checkpoint was chosen on the test list"
        text = (
            "As the literature does (protocol “paper”). The scores are too good for new cases and "
            "compare with published figures only."
        )
        found.append(Banner(title, text, "chosen on the test list"))
    return found + _data_banner(run) + _text_banner(as_dict(run.experiment.get("text")))


def _data_banner(run: Run) -> list[Banner]:
    remarks = as_list(run.setting("data", "remarks"))
    text = " ".join(map(str, remarks))
    return [Banner("About the data", text, "see the note about the data")] if remarks else []


def _text_banner(origin: Mapping[str, Any]) -> list[Banner]:
    source, made_as = origin.get("source"), origin.get("made_as")
    for kind in CONTROLS:
        if kind in (source, made_as):
            title = f"The text vectors are a control ({kind}), not CLIP"
            text = "They know nothing of the words: CLIP had no part in these scores."
            return [Banner(title, text, f"{kind} text vectors")]
    if source == "file" and made_as != "clip":
        title = "The text vectors come from a file that does not say how they were made"
        text = f"Nothing in {origin.get('file')} shows that they are CLIP’s."
        return [Banner(title, text, "text vectors of unknown making")]
    return []


def facts(runs: Sequence[Run]) -> list[Fact]:
    """The table at the end of the report; what no run has is left out."""
    columns = [_facts(run) for run in runs]
    table = [Fact(key, tuple(_text(column[key]) for column in columns)) for key in columns[0]]
    return [fact for fact in table if set(fact.values) != {ABSENT}]


def command(run: Run) -> str:
    """What to type to run it again."""
    return shlex.join(str(part) for part in as_list(run.experiment.get("command")))


def settings(runs: Sequence[Run]) -> list[tuple[str, list[Fact]]]:
    """Every section of the settings, and the plan."""
    trees = [_sections(run) for run in runs]
    table = []
    for section in dict.fromkeys(name for tree in trees for name in tree):
        flat = [_flat(tree.get(section, {})) for tree in trees]
        keys = dict.fromkeys(key for part in flat for key in part)
        rows = [Fact(key, tuple(part.get(key, ABSENT) for part in flat)) for key in keys]
        table.append((section, rows))
    return [(section, rows) for section, rows in table if rows]


def _facts(run: Run) -> dict[str, Any]:
    data, environment = as_dict(run.experiment.get("data")), run.environment
    origin = as_dict(run.experiment.get("text"))
    return {
        "Method": method_name(run),
        "Run folder": run.folder,
        "Created": run.experiment.get("created"),
        "Data": " · ".join(str(data[key]) for key in ("name", "layout", "root") if data.get(key)),
        "Hash of data and split": run.splits.get("hash") or data.get("hash"),
        "Split": f"{_split(run)}, {len(run.case_list('test'))} test cases",
        "Labeled cases drawn with seed": run.splits.get("seed"),
        "Text vectors": _origin(origin) if origin else "none used",
        "Prompts": " | ".join(map(str, as_list(origin.get("prompts")))),
        "Hash of the text vectors": origin.get("sha256"),
        "Seed": run.experiment.get("seed"),
        "Settings hash": run.experiment.get("settings_hash"),
        "Weights evaluated": run.metrics.get("weights"),
        "Protocol": run.metrics.get("protocol"),
        "NSD tolerance in mm": run.metrics.get("nsd_tolerance_mm"),
        "Training time": show_seconds(run.train_seconds),
        "Evaluation time": show_seconds(number(run.metrics.get("seconds"))),
        "Device": environment.get("device"),
        "Commit": environment.get("commit"),
        **{key: value for key, value in environment.items() if key not in ("device", "commit")},
    }


def _sections(run: Run) -> dict[str, Any]:
    """Settings by section; what stands alone comes first, under `run`."""
    tree = as_dict(run.experiment.get("settings"))
    alone = {key: value for key, value in tree.items() if not isinstance(value, dict)}
    parts = {key: value for key, value in tree.items() if isinstance(value, dict)}
    return {"run": alone, **parts, "plan": as_dict(run.experiment.get("plan"))}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings -> dotted keys and JSON text."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return found


def _split(run: Run) -> str:
    if not run.splits:
        return "an unrecorded split"
    labeled, unlabeled = len(run.case_list("labeled")), len(run.case_list("unlabeled"))
    rest = "no unlabeled cases" if run.method == "supervised" else f"{unlabeled} unlabeled cases"
    return f"{labeled} labeled and {rest}"


def _origin(origin: Mapping[str, Any]) -> str:
    keys = ("source", "file", "made_as", "model", "revision", "template", "seed", "transformers")
    return " · ".join(f"{key} {origin[key]}" for key in keys if origin.get(key) is not None)


def _text(value: Any) -> str:
    return ABSENT if value in (None, "") else str(value)
