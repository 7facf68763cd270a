"""The captions files that people have: CSV, a JSON of names with their captions, and MSR-VTT's JSON."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runtime.files import UserError

FORMS = 'a CSV with the header video,caption[,split], a JSON of {"name": ["caption", ...]}, or MSR-VTT\'s JSON'
SPLITS = {"": "", **dict.fromkeys(("train", "training"), "train"), **dict.fromkeys(("test", "testing"), "test")}
SPLITS |= dict.fromkeys(("validation", "validate", "valid", "val", "dev"), "validation")
Row = tuple[str, str, str]  # a clip's name, one caption, and its split, "" where the file does not say


def read(path: Path) -> list[Row]:
    """All captions of a file, in its order.

    Raises: UserError where it is missing, not UTF-8, of no form that is known, or names an unknown split.
    """
    if not path.is_file():
        raise UserError(f"--captions: there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        is_json = path.suffix.lower() == ".json" or text.lstrip()[:1] in ("{", "[")
        rows = [(str(name), text, split) for name, text, split in (_from_json if is_json else _from_csv)(text)]
        if not rows or not all(isinstance(part, str) for row in rows for part in row):
            raise ValueError("it holds no captions, or captions that are not text")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}): save it as UTF-8; Excel's name is 'CSV UTF-8'") from None
    except KeyError as error:
        raise UserError(f"{path}: an entry has no {error}; it is to be {FORMS}") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: {error}; it is to be {FORMS}") from None
    for name, _, split in rows:
        if split.strip().lower() not in SPLITS:
            raise UserError(f"{path}: {name!r} is of the split {split!r:.80}; use train, validation or test")
    return [(name, text, SPLITS[split.strip().lower()]) for name, text, split in rows]


def _from_csv(text: str) -> Iterable[Row]:
    """Rows of fields between commas, semicolons (Excel's, in many countries) or tabs."""
    first, rest = text.partition("\n")[::2]
    delimiter = max(",;\t", key=first.count)
    settings = {"delimiter": delimiter, "skipinitialspace": True, "strict": True, "restval": ""}
    reader = csv.DictReader(io.StringIO(f"{first.lower()}\n{rest}"), **settings)
    reader.fieldnames = names = [name.strip() for name in reader.fieldnames or ()]
    if [names.count("video"), names.count("caption"), max(names.count("split"), 1)] != [1, 1, 1]:
        raise ValueError(f"it begins with {first!r:.80}, not with the header")
    try:
        for row in reader:
            if None in row:  # where DictReader puts fields beyond the header's
                raise ValueError(f"line {reader.line_num} has too many fields: quote captions that hold {delimiter!r}")
            if any(row.values()):  # spreadsheets end in rows of nothing
                yield row["video"], row["caption"], row.get("split", "")
    except csv.Error as error:
        reason = f'{error}; a quote within quotes is written as ""'
        raise ValueError(f"the row after line {reader.line_num}: {reason}") from None


def _from_json(text: str) -> Iterable[tuple[Any, ...]]:
    content = json.loads(text, object_pairs_hook=_each_once)
    if not isinstance(content, dict):
        raise ValueError("it is a list (Something-Something V2's own labels go into labels/ under --data)")
    if isinstance(content.get("sentences"), list) and all(isinstance(row, dict) for row in content["sentences"]):
        splits = {clip["video_id"]: clip.get("split", "") for clip in content.get("videos", [])}
        return [(row["video_id"], row["caption"], splits.get(row["video_id"], "")) for row in content["sentences"]]
    lists = {name: texts if isinstance(texts, list) else [texts] for name, texts in content.items()}
    return [(name, text, "") for name, texts in lists.items() for text in texts]


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises: ValueError for a name that is there twice: only its last captions would be kept."""
    name, count = Counter(name for name, _ in pairs).most_common(1)[0] if pairs else ("", 0)
    if count > 1:
        raise ValueError(f"{name!r:.80} is there twice: give it one list of captions")
    return dict(pairs)
