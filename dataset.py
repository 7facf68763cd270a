"""Something-Something V2: where things lie on disk, what the annotations say, and what a training step reads.

Layout under one folder: 20bn-something-something-v2/<id>.webm, labels/, ssv2_paraphrase.json,
annotations/<split>_ready.json, features/<split>/<id>.pt.
"""

import csv
import random
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from features import cache
from features.cache import CacheConfig
from runtime import files
from runtime.distributed import DistributedContext
from runtime.files import UserError

DEFAULT_DATA = Path("data/something-something-v2")
READY = {"train": "train_ready.json", "validation": "val_ready.json", "test": "test_ready.json"}
SPLITS = tuple(READY)
PARAPHRASE_PARTS = ("ssv2_paraphrase/**/*.json", "ssv2_paraphrase_*.json", "train/ssv2_paraphrase_*.json")
CAPTION_LIMIT = 2000  # characters; SSv2's longest label has about 200
_SAFE_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")

Record = dict[str, Any]  # {"id", "label", "template", "placeholders"}
Batch = list[tuple[str, list[str]]]  # clip ids, each with the captions to learn from


class Layout:
    """Where everything of a dataset lies under its folder."""

    def __init__(self, data: Path | str) -> None:
        """Raises: UserError where there is no such folder."""
        self.data = Path(data)
        if not self.data.is_dir():
            raise UserError(f"there is no dataset at {data}; give --data the folder that holds labels/ and the videos")
        self.videos = self.data / "20bn-something-something-v2"
        self.labels = self.data / "labels"
        self.annotations = self.data / "annotations"
        self.features = self.data / "features"

    def video(self, clip_id: str) -> Path | None:
        """The clip's file, webm or mp4, or None."""
        paths = (self.videos / f"{clip_id}{suffix}" for suffix in (".webm", ".mp4"))
        return next((path for path in paths if path.is_file()), None)

    def labels_file(self, name: str) -> Path | None:
        """A file of the labels folder by its new name or its older one (something-something-v2-<name>), or None."""
        folders = (self.labels, self.data)
        paths = (folder / f"{before}{name}" for folder in folders for before in ("", "something-something-v2-"))
        return next((path for path in paths if path.is_file()), None)


def read_split(data: Path | str, split: str) -> list[Record]:
    """A split's records as SSv2's labels give them; the test split's hold ids only.

    Raises: UserError where the labels are missing, not JSON or of another form, an id is unsafe or there twice.
    """
    return _read_records(_labels_file(data, f"{split}.json"), f"the {split} labels")


def read_ready(data: Path | str, split: str) -> list[Record]:
    """A split's records with their caption lists, as prepare_annotations.py wrote them; clips without one are left out.

    Raises: UserError where the file is missing (prepare_annotations.py makes it), of another form, or without captions.
    """
    path = Layout(data).annotations / READY[split]
    if not path.is_file():
        raise UserError(f"the {split} captions: there is no {path}; run prepare_annotations.py --data {data}")
    records = _read_records(path, f"the {split} captions")
    for record in records:
        if not _is_texts(record.get("label")):
            raise UserError(f"{path}: the label of clip {record['id']} is not a list of captions")
        record["label"] = [caption for caption in map(clean, record["label"]) if caption]
    if not (kept := [record for record in records if record["label"]]):
        raise UserError(f"{path} holds no caption that is not empty; run prepare_annotations.py again")
    return kept


def _labels_file(data: Path | str, name: str) -> Path:
    layout = Layout(data)
    if (path := layout.labels_file(name)) is None:
        raise UserError(f"there is no {layout.labels / name}; download SSv2's labels into that folder")
    return path


def _read_records(path: Path, what: str) -> list[Record]:
    """Records with safe ids, each once, and templates and placeholders of the right kind."""
    records = files.read_json(path, what)
    if not records or not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path} holds no clips (it is to be a list of records); download or prepare it again")
    seen = set()
    for record in records:
        record["id"] = clip_id = _check_id(record.get("id"), path)
        if clip_id in seen:
            raise UserError(f"{path}: the clip {clip_id} is there twice; remove one")
        seen.add(clip_id)
        if not _is_texts([record.get("template") or ""]) or not _is_texts(record.get("placeholders") or []):
            raise UserError(f"{path}: the template or the placeholders of clip {clip_id} are not text")
    return records


def _check_id(clip_id: Any, path: Path) -> str:
    """A clip id as text. Raises: UserError for one that is not a plain file name (it could leave the folder)."""
    text = str(clip_id) if type(clip_id) in (int, str) else ""
    if not _SAFE_ID.fullmatch(text):
        raise UserError(f"{path}: the clip id {clip_id!r:.80} is not a plain name of letters, digits, '_', '-' and '.'")
    return text


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def read_templates(data: Path | str) -> list[str]:
    """The action templates, in the order of their numbers. Raises: UserError where labels.json does not hold them."""
    path = _labels_file(data, "labels.json")
    numbers = files.read_json(path, "the templates")
    try:
        return sorted(numbers, key=lambda template: int(numbers[template]))
    except (TypeError, ValueError, KeyError, OverflowError):  # JSON has infinite numbers
        raise UserError(f"the templates: {path} does not map templates to numbers; download it again") from None


def read_answers(data: Path | str) -> dict[str, str]:
    """The test split's labels by clip id (lines `id;label`); empty where there is no such file."""
    if (path := Layout(data).labels_file("test-answers.csv")) is None:
        return {}
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines(), delimiter=";"))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"the test answers: {path} is no table in UTF-8 ({error}); download it again") from None
    return {_check_id(row[0].strip(), path): clean(";".join(row[1:])) for row in rows if row}


def read_paraphrases(path: Path | str | None, data: Path | str = DEFAULT_DATA) -> dict[str, list[str]]:
    """Paraphrases by clip id, from one JSON file or all those of a folder; {} where there are none at all.

    `path` is a file or folder; None looks for ssv2_paraphrase.json, then for its parts, under the dataset's folder.
    Raises: UserError where a named path is missing, or a file is not {"<id>": ["...", ...]}.
    """
    merged: dict[str, list[str]] = {}
    for part in _paraphrase_files(path, Path(data)):
        content = files.read_json(part, "the paraphrases")
        if not isinstance(content, dict) or not all(map(_is_texts, content.values())):
            raise UserError(f"the paraphrases: {part} does not map clip ids to lists of captions")
        for clip_id, texts in content.items():
            merged.setdefault(clip_id, []).extend(texts)
    return merged


def _paraphrase_files(path: Path | str | None, data: Path) -> list[Path]:
    if path is None:
        whole = data / "ssv2_paraphrase.json"
        return [whole] if whole.is_file() else [part for parts in PARAPHRASE_PARTS for part in sorted(data.glob(parts))]
    found = [Path(path)] if Path(path).is_file() else sorted(Path(path).rglob("*.json"))
    if not found:
        raise UserError(f"the paraphrases: there is no file or folder of .json parts at {path}")
    return found


def clean(text: str) -> str:
    """A caption on one line, without control characters and with single spaces."""
    kept = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(kept.split())[:CAPTION_LIMIT]


def usable_records(
    layout: Layout, split: str, max_missing: float, context: DistributedContext, made: dict[str, Any] | None = None
) -> list[Record]:
    """A split's records that have a caption and features; says how many are left out.

    `made`: what made a checkpoint's features, for the command in the error where there are no features at all.
    Raises: UserError as `read_ready`, and where more than `max_missing` percent of the clips have no features.
    """
    records, folder = read_ready(layout.data, split), layout.features / split
    cached = {path.stem for path in folder.glob("*.pt")}
    found = [record for record in records if record["id"] in cached]
    missing = [record["id"] for record in records if record["id"] not in cached]
    if not found or len(missing) > len(records) * max_missing / 100:
        clips = f"{len(missing):,} of {len(records):,}" if found else f"all {len(missing):,}"
        raise UserError(
            f"{clips} {split} clips have no features in {folder} (the first is {missing[0]}); "
            + ("allow more with --max-missing, or " if found else "")
            + f"run {_preprocess_command(layout, split, made)}"
        )
    if missing:
        context.print_main(f"{split}: {len(missing):,} clips have no features and are left out")
    return found


def _preprocess_command(layout: Layout, split: str, made: dict[str, Any] | None) -> str:
    """The command that makes a split's features like those that are there, or like a checkpoint's (`made`)."""
    words = ["python", "preprocess_something_something_v2.py", "--data", layout.data, "--splits", split]
    if config := cache.read_config(layout.features) or (made and CacheConfig.from_dict(made)):
        words += ["--encoder", config.encoder, "--num-frames", config.frames, *["--crop"] * config.crop]
        words += ["--dtype", config.dtype, "--pool", config.pool]
    return shlex.join(map(str, words))


def plan_epoch(
    records: list[Record], batch_size: int, accumulate: int, captions_per_clip: int, seed: int, epoch: int
) -> list[list[Batch]]:
    """An epoch's optimizer steps, each of up to `accumulate` batches.

    The same in every process, so that any number of them can resume anywhere: the clips' order depends on run and
    epoch only, a clip's captions on run, epoch and clip.
    """
    order = sorted(records, key=lambda record: record["id"])
    random.Random(f"{seed} {epoch}").shuffle(order)
    drawn = [(record["id"], draw_captions(record, captions_per_clip, seed, epoch)) for record in order]
    batches = [drawn[start : start + batch_size] for start in range(0, len(drawn), batch_size)]
    return [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]


def draw_captions(record: Record, count: int, seed: int, epoch: int) -> list[str]:
    """`count` distinct captions of a clip for an epoch, fewer where it has fewer."""
    captions = list(dict.fromkeys(record["label"]))
    chooser = random.Random(f"{seed} {epoch} {record['id']}")
    return chooser.sample(captions, min(count, len(captions)))


def records_that_fit(
    records: list[Record], room: int | None, tokenize: Callable[[str], list[int]]
) -> tuple[list[Record], int]:
    """Records without the captions of more than `room` tokens, and how many captions were left out.

    `room`: what a language model has positions for. Raises: UserError where no caption is left.
    """
    dropped = 0
    for record in records if room is not None else ():
        # A token is at least one byte: only long captions need to be counted in tokens.
        fits = [text for text in record["label"] if len(text.encode()) < room or len(tokenize(text)) <= room]
        dropped += len(record["label"]) - len(fits)
        record["label"] = fits
    if not any(record["label"] for record in records):
        raise UserError(f"the language model has positions for {room} tokens of a caption: use fewer --num-queries")
    return [record for record in records if record["label"]], dropped
