"""Write what the docs repeat from the code: settings, options, equations and presets.

    python docs/make_reference.py

In every page, what stands between `<!-- made:WHAT -->` and `<!-- /made -->` is replaced.
tests/test_docs.py fails where a page says anything else than this script would write.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from vclipseg.benchmark.grids import Entry, GridSettings, Pretrain
from vclipseg.cli import app
from vclipseg.config import Experiment, build_experiment
from vclipseg.data.plan import Plan
from vclipseg.methods import METHODS, method_class, presets
from vclipseg.settings import Settings

DOCS = Path(__file__).parent
NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "none"}
LIMITS = {
    Ge: ("ge", "from {}"),
    Gt: ("gt", "above {}"),
    Le: ("le", "to {}"),
    Lt: ("lt", "to below {}"),
}


def main() -> None:
    """Rewrite the pages that changed."""
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (new := fill(text)) != text:
            page.write_text(new, encoding="utf-8")


def fill(text: str) -> str:
    """A page with everything that is made from the code made anew."""
    return re.sub(
        r"(<!-- made:(\S+) -->\n).*?(<!-- /made -->)",
        lambda found: found[1] + "\n" + make(found[2]) + "\n" + found[3],
        text,
        flags=re.DOTALL,
    )


def make(what: str) -> str:
    """What stands between the markers, such as `presets:vclipseg`."""
    kind, _, name = what.partition(":")
    makers = {
        "settings": settings_tables,
        "verbs": verbs,
        "equation": lambda: equation(name),
        "presets": lambda: presets_table(name),
    }
    return makers[kind]().rstrip("\n") + "\n"


# ---- settings ------------------------------------------------------------------------------


def sections() -> dict[str, type[Settings]]:
    """Heading -> settings class, in the order of the page."""
    found: dict[str, type[Settings]] = {"The experiment": Experiment}
    for key, field in Experiment.model_fields.items():
        if key == "method":
            for name in METHODS:
                found[f"[method] of {name}"] = method_class(name).Settings
        elif inspect.isclass(field.annotation) and issubclass(field.annotation, Settings):
            found[f"[{key}]"] = field.annotation
    grid = {"[grid]": GridSettings, "[[grid.methods]]": Entry, "pretrain": Pretrain}
    return {**found, **grid, "plan.json": Plan}


def settings_tables() -> str:
    """A table for each class of settings."""
    return "\n".join(settings_table(title, cls) for title, cls in sections().items())


def settings_table(title: str, cls: type[Settings]) -> str:
    """Key, value, default and meaning of each setting of a class."""
    lines = [f"## `{title}`" if title.startswith(("[", "pretrain")) else f"## {title}", ""]
    lines += [first_line(cls.__doc__), "", *header("key", "value", "default", "meaning")]
    for key, field in cls.model_fields.items():
        if cls is Experiment and key not in ("name", "preset"):
            continue  # a table of its own
        lines.append(cells(f"`{key}`", kind(field), default(field), text(field.description)))
    return "\n".join([*lines, ""])


def kind(field: FieldInfo) -> str:
    """The values that a field takes, in words."""
    return spell(field.annotation) + bounds(field.metadata)


def spell(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return spell(arguments[0]) + bounds(arguments[1:])
    if origin is Literal:
        return " or ".join(value(argument) for argument in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(spell(argument) for argument in arguments))
    if origin is tuple:
        first = spell(arguments[0])
        return f"list ({first})" if arguments[-1] is ... else f"{len(arguments)} times {first}"
    if origin is dict:
        return "table"
    if inspect.isclass(annotation) and issubclass(annotation, Settings):
        return "table"
    return NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def bounds(metadata: Iterable[Any]) -> str:
    """Limits of a number, in words."""
    words: list[str] = []
    for entry in metadata:
        for rule in getattr(entry, "metadata", [entry]):  # a nested Field has a list of them
            if type(rule) in LIMITS:
                attribute, form = LIMITS[type(rule)]
                words.append(form.format(f"{getattr(rule, attribute):g}"))
    return " " + " ".join(words) if words else ""


def default(field: FieldInfo) -> str:
    """The default of a field."""
    if field.is_required():
        return "must be given"
    found = field.get_default(call_default_factory=True)
    return "none" if found is None or found is PydanticUndefined else value(found)


def value(found: Any) -> str:
    """A value as a recipe writes it."""
    return f"`{json.dumps(found)}`"


# ---- methods -------------------------------------------------------------------------------


def equation(name: str) -> str:
    """The indented block of a method's module docstring."""
    module = importlib.import_module(f"vclipseg.methods.{name}")
    lines = inspect.cleandoc(module.__doc__ or "").splitlines()
    block = [line[4:] for line in lines if line.startswith("    ")]
    return "\n".join(["```text", *block, "```"])


def presets_table(name: str) -> str:
    """Every setting that a preset of a method changes: its default, and its value in each preset."""
    table = presets(name)
    names = sorted(table, key=lambda preset: (preset != "robust", preset != "faithful"))
    experiments = [
        build_experiment({"method": {"name": name, "preset": preset}}, {}) for preset in names
    ]
    changed: dict[tuple[str, str], None] = {}
    for layers in table.values():
        changed |= {(section, key): None for section, keys in layers.items() for key in keys}
    lines = header("setting", "default", *(f"`{preset}`" for preset in names))
    for section, key in sorted(changed):
        plain = getattr(type(getattr(experiments[0], section))(), key)
        row = [getattr(getattr(experiment, section), key) for experiment in experiments]
        shown = [value(v) if v == plain else f"**{value(v)}**" for v in row]
        lines.append(cells(f"`{section}.{key}`", value(plain), *shown))
    return "\n".join(lines)


# ---- command line --------------------------------------------------------------------------


def verbs() -> str:
    """Usage, arguments and options of every verb."""
    found = verbs_of("", typer.main.get_command(app))
    return "\n".join(verb(name, command) for name, command in found)


def verbs_of(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Name and command of a verb, or of those in a group of verbs."""
    if hasattr(command, "commands"):
        for word, inner in command.commands.items():
            yield from verbs_of(f"{name} {word}".strip(), inner)
    else:
        yield name, command


def verb(name: str, command: Any) -> str:
    """One verb."""
    lines = [f"## {name}", "", text(command.help), "", *header("", "default", "meaning")]
    for parameter in command.params:
        if parameter.name == "help":
            continue
        option = parameter.opts[0].startswith("-")
        names = ", ".join([*sorted(parameter.opts, key=len), *parameter.secondary_opts])
        usual = parameter.default
        known = not (usual is None or usual is False or usual == [] or callable(usual))
        meaning = text(parameter.help) + (
            " May be given several times." if repeats(parameter) else ""
        )
        lines.append(
            cells(f"`{names if option else names.upper()}`", f"`{usual}`" if known else "", meaning)
        )
    return "\n".join([*lines, ""])


def repeats(parameter: Any) -> bool:
    """Whether an option may be given several times."""
    return bool(getattr(parameter, "multiple", False))


# ---- Markdown ------------------------------------------------------------------------------


def header(*names: str) -> list[str]:
    """The first two lines of a table."""
    return [cells(*names), "|" + " --- |" * len(names)]


def cells(*texts: str) -> str:
    """A line of a table."""
    return "| " + " | ".join(entry.replace("|", "\\|") for entry in texts) + " |"


def text(words: str | None) -> str:
    """A docstring on one line."""
    return " ".join((words or "").split())


def first_line(doc: str | None) -> str:
    """What a class says of itself."""
    return inspect.cleandoc(doc or "").split("\n\n", maxsplit=1)[0]


def stale(pages: Sequence[Path] | None = None) -> list[Path]:
    """Pages that this script would change."""
    pages = pages if pages is not None else sorted(DOCS.rglob("*.md"))
    return [page for page in pages if fill(old := page.read_text(encoding="utf-8")) != old]


if __name__ == "__main__":
    main()
