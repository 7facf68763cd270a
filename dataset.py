"""A data set: where things lie on disk, what the annotations say, and what a training step reads.

Layout under one folder, Something-Something V2's (SSv2): 20bn-something-something-v2/<id>.webm, labels/,
ssv2_paraphrase.json, annotations/<split>_ready.json, features/<split>/<id>.pt. A data set of the user's own, made by
prepare_annotations.py, has the same, but for its videos: they stay where they are, and labels/videos.json names them.
"""

import csv
import random
import re
import shlex
from collections.abc import Callable
from functools import cached_property
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
SSV2 = "Something-Something V2"
OWN = "python prepare_annotations.py --videos FOLDER --captions FILE --data"  # makes an own data set, there
ROOT = Path(__file__).parent  # of the project
PARAPHRASES = ("ssv2_paraphrase.json", "ssv2_paraphrase/**/*.json", "ssv2_paraphrase_*.json")  # whole, or its parts
PARAPHRASES += ("train/ssv2_paraphrase_*.json",)
CAPTION_LIMIT = 2000  # characters; SSv2's longest label has about 200
SAFE_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")

Record = dict[str, Any]  # {"id", "label", "template", "placeholders"}
Batch = list[tuple[str, list[str]]]  # clip ids, each with the captions to learn from


class Layout:
    """Where everything of a data set lies under its folder, and what it is called."""

    def __init__(self, data: Path | str) -> None:
        """Raises: UserError where there is no such folder."""
        self.data = Path(data)
        if not self.data.is_dir():
            advice = f"give --data the folder of a data set, or make one of your own: {OWN} {shlex.quote(str(data))}"
            if self.data == DEFAULT_DATA:
                sample = "the sample (python -m sample render, then --data data/sample)"
                advice = f"put {SSV2} there, or take {sample}, or videos of your own ({OWN} data/mine)"
            raise UserError(f"there is no data set at {data}: {advice}")
        self.labels = self.data / "labels"
        self.annotations = self.data / "annotations"
        self.features = self.data / "features"

    @cached_property
    def own(self) -> dict[str, Any] | None:
        """What makes this a data set of the user's own, labels/videos.json; None for SSv2.

        "folder": the videos', as seen from that file, None where there are only features; "clips": paths in it by id.
        """
        if not (path := self.labels / "videos.json").is_file():
            return None
        own = files.read_json(path, "the places of the videos")
        if not isinstance(own, dict) or not isinstance(own.get("clips"), dict):
            raise UserError(f"{path} does not say where the clips lie; delete it, and run {OWN} {self.data}")
        return {"folder": None, **own}

    @property
    def name(self) -> str:
        """What the data set is called: its folder's name where it is an own one, or the sample."""
        if self.own is not None:
            return self.data.resolve().name
        return "sample" if (self.data / "sample.json").is_file() else SSV2

    @property
    def splits(self) -> list[str]:
        """The splits that there are labels of."""
        return [split for split in SPLITS if self.labels_file(f"{split}.json")]

    @cached_property
    def videos(self) -> Path:
        """The folder of the videos."""
        own = self.own and (self.labels.resolve() / (self.own["folder"] or "")).resolve()
        return own or self.data / "20bn-something-something-v2"

    @property
    def video_advice(self) -> str:
        """What to do where videos are missing, for an error."""
        if self.own and not self.own["folder"]:
            return "it is made of features, without videos: train.py and evaluate.py read it"
        return f"run {OWN} {shlex.quote(str(self.data))} again" if self.own else "put SSv2's <id>.webm files there"

    def source(self, clip_id: str) -> str | None:
        """The name under which the user knows an own clip, its path within the folder of videos; None for SSv2's."""
        return self.own["clips"].get(clip_id) if self.own else None

    def video(self, clip_id: str) -> Path | None:
        """The clip's file (SSv2's webm or mp4, an own one of any kind), or None."""
        names = (f"{clip_id}.webm", f"{clip_id}.mp4") if self.own is None else (self.source(clip_id),)
        return next((path for name in names if name and (path := self.videos / name).is_file()), None)

    def labels_file(self, name: str) -> Path | None:
        """A file of the labels folder by its new name or its older one (something-something-v2-<name>), or None."""
        folders = (self.labels, self.data)
        paths = (folder / f"{before}{name}" for folder in folders for before in ("", "something-something-v2-"))
        return next((path for path in paths if path.is_file()), None)


def read_split(data: Path | str, split: str) -> list[Record]:
    """A split's records as the labels give them: SSv2's test split's hold ids only, an own one's a list of captions.

    Raises: UserError where the labels are missing, not JSON or of another form, an id is unsafe or there twice.
    """
    return _read_records(_labels_file(data, f"{split}.json"), f"the {split} labels")


def read_ready(data: Path | str, split: str) -> list[Record]:
    """A split's records with their caption lists, as prepare_annotations.py wrote them; clips without one are left out.

    Raises: UserError where the file is missing (prepare_annotations.py makes it), of another form, or without captions.
    """
    path = (layout := Layout(data)).annotations / READY[split]
    if not path.is_file():
        if layout.own:
            _labels_file(data, f"{split}.json")  # raises where there is no such split
        command = f"python prepare_annotations.py --data {shlex.quote(str(data))}"
        answers = ", which takes labels/test-answers.csv" if split == "test" and not layout.own else ""
        raise UserError(f"the {split} captions: there is no {path}; run {command}{answers}")
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
    if path := layout.labels_file(name):
        return path
    if layout.own is None:
        own = f"or make a data set of your own: {OWN} {shlex.quote(str(data))}"
        raise UserError(f"there is no {layout.labels / name}; download SSv2's labels into that folder, {own}")
    splits = f"its clips are all of {' and '.join(layout.splits)}; its captions file may give them other splits"
    reason = splits if name.removesuffix(".json") in SPLITS else f"action templates are {SSV2}'s own; do without them"
    raise UserError(f"{layout.name} has no {layout.labels / name}: {reason}")


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
    if not SAFE_ID.fullmatch(text):
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


def read_references(data: Path | str) -> dict[str, list[str]]:
    """The test clips' captions by id, where they are at hand: SSv2's answers, or all those of an own data set."""
    if Layout(data).own:
        return {record["id"]: record["label"] for record in read_split(data, "test")}
    return {clip_id: [answer] for clip_id, answer in read_answers(data).items()}


def read_paraphrases(parts: list[Path]) -> dict[str, list[str]]:
    """Paraphrases by clip id, from all these JSON files.

    Raises: UserError where a file is not {"<id>": ["...", ...]}.
    """
    merged: dict[str, list[str]] = {}
    for part in parts:
        content = files.read_json(part, "the paraphrases")
        if not isinstance(content, dict) or not all(map(_is_texts, content.values())):
            raise UserError(f"the paraphrases: {part} does not map clip ids to lists of captions")
        for clip_id, texts in content.items():
            merged.setdefault(clip_id, []).extend(texts)
    return merged


def paraphrase_files(path: Path | str | None, layout: Layout) -> list[Path]:
    """The file, or all files of the folder, at `path`; None: ssv2_paraphrase.json, or its parts, where they lie.

    That is the data set's folder or, for SSv2, else the working directory or the project's root.
    Raises: UserError where there is none at a `path`.
    """
    if path is None:
        folders = [layout.data, *([Path(), ROOT] if layout.name == SSV2 else [])]
        found = ([part for form in PARAPHRASES for part in sorted(folder.glob(form))] for folder in folders)
        return next(filter(None, found), [])
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
            + (f"read {why} (what failed), or " if (why := folder / "failures.jsonl").exists() else "")
            + _features_advice(layout, split, made)
        )
    if missing:
        context.print_main(f"{split}: {len(missing):,} clips have no features and are left out")
    return found


def _features_advice(layout: Layout, split: str, made: dict[str, Any] | None) -> str:
    """The command that makes a split's features like those that are there, or like a checkpoint's (`made`)."""
    if layout.own and not layout.own["folder"]:
        return "put each clip's own features, a tensor (N, D), there as <id>.pt"
    words = ["python", "preprocess_something_something_v2.py", "--data", layout.data]
    words += [] if layout.own else ["--splits", split]  # all splits of an own data set are encoded
    if config := cache.read_config(layout.features) or (made and CacheConfig.from_dict(made)):
        words += ["--encoder", config.encoder, "--num-frames", config.frames, *["--crop"] * config.crop]
        words += ["--dtype", config.dtype, "--pool", config.pool]
    return f"run {shlex.join(map(str, words))}"


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
