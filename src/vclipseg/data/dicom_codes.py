"""What classes are, in the codes of DICOM (SNOMED CT): a category and a type for each name.

Names that DICOM's own lists of segmentation property types hold (context groups 7192, 7191 and 7194), as
"pancreas", "left atrium" or "necrosis", get their codes; others are called an organ, unless a file says
what they are:

    {"tumor": {"category": ["49755003", "SCT", "Morphologically Abnormal Structure"],
               "type": ["108369006", "SCT", "Neoplasm"]}}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vclipseg.errors import UsageError

if TYPE_CHECKING:
    from pydicom.sr.coding import Code

_LISTS = (  # context groups of types, and their category in context group 7150
    ("cid7192", "AnatomicalStructure"),
    ("cid7194", "MorphologicallyAbnormalStructure"),
    ("cid7191", "Tissue"),
)
_OTHER_WORDS = {"tumor": "neoplasm", "tumour": "neoplasm", "cancer": "neoplasm"}
_SIDE = re.compile(r"(?i)^(left|right)\b[ _-]*|[ _-]*\b(left|right)$")


class Coded(NamedTuple):
    """What a class is."""

    category: Code
    type: Code


Codes = Mapping[str, Mapping[str, Sequence[str]]]
"""Class name -> `category` and `type`, each (value, scheme, meaning)."""


def coded(name: str, codes: Codes | None = None) -> Coded:
    """The codes of a class."""
    from pydicom.sr.codedict import codes as known
    from pydicom.sr.coding import Code

    if codes and name in codes:
        return Coded(*(Code(*codes[name][key]) for key in Coded._fields))
    for word in (name, _SIDE.sub("", name.replace("_", " "))):
        wanted = _letters(_OTHER_WORDS.get(word.lower(), word))
        for group, category in _LISTS:
            concepts = getattr(known, group)
            for keyword in concepts.dir():
                if _letters(keyword) == wanted:
                    return Coded(getattr(known.cid7150, category), getattr(concepts, keyword))
    return Coded(known.cid7150.AnatomicalStructure, known.SCT.Organ)


def load_codes(path: Path, class_names: Sequence[str]) -> Codes:
    """Codes of classes from a JSON file; those it leaves out have their usual ones.

    Raises:
        UsageError: it is no such file, or has other names.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as JSON") from error
    for name, entry in content.items() if isinstance(content, dict) else [("", None)]:
        if name not in class_names[1:]:
            raise UsageError(
                f"{path}: has no class {name!r} to code; classes are {', '.join(class_names[1:])}"
            )
        words = [entry.get(key) for key in Coded._fields] if isinstance(entry, dict) else []
        if len(words) != 2 or not all(
            isinstance(w, list) and len(w) == 3 and all(isinstance(t, str) and t for t in w)
            for w in words
        ):
            raise UsageError(
                f'{path}: {name}: must have "category" and "type", each ["value", "scheme", "meaning"]'
            )
    return content


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold()
