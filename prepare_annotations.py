"""Turn labels and their paraphrases into the caption lists that training and scoring read.

Something-Something V2's labels lie in its folder; with --captions, those of a data set of your own are made first.
"""

import argparse
import hashlib
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import runtime.threads  # noqa: F401  how torch's threads wait

import dataset
from evaluation import report
from evaluation.ssv2 import TemplateReader, template_key
from runtime import cli, files
from runtime.files import UserError
from runtime.progress import Progress
from video import captions, paths


def main(argv: list[str] | None = None) -> None:
    """Write annotations/train_ready.json, val_ready.json and, where its captions are at hand, test_ready.json."""
    args = parse(argv)
    if args.captions:
        make_own(args)
    layout = dataset.Layout(args.data)
    found = dataset.paraphrase_files(args.paraphrases, layout)
    paraphrases = dataset.read_paraphrases(found)
    for split, records in labelled(layout, args.limit).items():
        ready = caption_lists(records, paraphrases if split == "train" else {})
        if not ready:
            raise UserError(f"the {split} labels hold no clip with a caption; download them again")
        files.write_json(path := layout.annotations / dataset.READY[split], ready)
        count, left_out = sum(len(record["label"]) for record in ready), len(records) - len(ready)
        print(f"{path}: {len(ready):,} clips, {count:,} captions; {left_out:,} clips have none")
    tell(list(map(str, found)), f"files of paraphrases, of {len(paraphrases):,} clips by id, were taken")
    if not found and not layout.own:
        print("no paraphrases were found: each training clip has its label alone")
    if args.limit:
        print(f"a rehearsal on the first {args.limit:,} clips of each split; run this again without --limit for all")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises: UserError for --videos without --captions, and these without a folder to make."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=dataset.DEFAULT_DATA, help="the data set's folder; --captions makes it")
    add("--captions", type=Path, nargs="+", metavar="FILE", help=f"captions of your own: {captions.FORMS}")
    add("--videos", type=Path, metavar="FOLDER", help="the videos that --captions names (without: it names features)")
    add("--seed", type=int, default=0, help="draws the splits that --captions does not give")
    add("--paraphrases", type=Path, help="a file or a folder of parts (default: under --data, then, for SSv2, here)")
    add("--limit", type=cli.count, metavar="N", help="a rehearsal: only the first N clips of each split")
    args = parser.parse_args(argv)
    if args.videos and not args.captions:
        raise UserError(f"--videos needs --captions FILE, {captions.FORMS}")
    if args.captions and args.data == dataset.DEFAULT_DATA:
        raise UserError("--captions makes a data set of your own: name a folder for it, as in --data data/mine")
    return args


def labelled(layout: dataset.Layout, limit: int | None) -> dict[str, list[dataset.Record]]:
    """The records of each split that has captions, at most `limit` of each: those that preprocessing takes, too."""
    splits = layout.splits if layout.own else ["train", "validation"]
    found = {split: dataset.read_split(layout.data, split)[:limit] for split in splits}
    if answers := dataset.read_answers(layout.data):
        if limit:
            first = [record["id"] for record in dataset.read_split(layout.data, "test")[:limit]]
            answers = {clip_id: answers[clip_id] for clip_id in first if clip_id in answers}
        # labels.json has no brackets; the records' templates say where the placeholders are.
        written = [record["template"] for record in found["train"] if record.get("template")]
        found["test"] = test_records(answers, [*dataset.read_templates(layout.data), *written])
    return found


def caption_lists(records: list[dataset.Record], paraphrases: dict[str, list[str]]) -> list[dataset.Record]:
    """Records whose label is a list: the label or labels, then paraphrases, each once. Clips without are left out."""
    ready = []
    for record in Progress(records, "captions", unit="clip", leave=False):
        label = record.get("label")
        texts = label if isinstance(label, list) else [label if isinstance(label, str) else ""]
        texts = [*texts, *paraphrases.get(record["id"], [])]
        known = {"template": record.get("template"), "placeholders": record.get("placeholders") or []}
        captions = list(dict.fromkeys(text for text in map(dataset.clean, texts) if text))
        ready.append({"id": record["id"], "label": captions, **known})
    return [record for record in ready if record["label"]]


def test_records(answers: dict[str, str], templates: list[str]) -> list[dataset.Record]:
    """The test split's records; template and placeholders are read out of the answer's own words."""
    reader, records = TemplateReader(templates), []
    for clip_id, label in answers.items():
        template, placeholders = reader.read(label)
        # SSv2's own answers are templates ("Moving something up"): no object can be scored then.
        objects = placeholders if template_key(label) != template_key(template) else []
        records.append({"id": clip_id, "label": label, "template": template, "placeholders": objects})
    return records


def make_own(args: argparse.Namespace) -> None:
    """Write labels/ for the clips of captions files, and labels/videos.json, which says where their videos lie.

    Raises: UserError where --data holds another data set, or no caption is of a clip that is there.
    """
    rows = [row for path in args.captions for row in captions.read(path)]
    layout = own_layout(args)
    earlier = layout.own["clips"] if layout.own else {}
    names, videos = list(dict.fromkeys(name for name, *_ in rows)), []
    if args.videos:
        found, videos = paths.match(names, args.videos, args.data)
    else:
        found = {name: paths.without_suffix(paths.plain(name)) for name in names}
    clips, splits = gather(rows, found)
    missing = f"without a video in {args.videos}" if args.videos else "without a name"
    if not clips:
        raise UserError(f"{args.captions[0]}: all captions are empty, or of clips {missing}, as {names[0]!r:.80}")
    tell([name for name in names if not found.get(name)], f"clips of the captions are {missing}, and left out")
    tell(sorted(set(videos) - set(found.values())), "videos have no captions, and are left out")
    ids = clip_ids(clips, earlier)
    splits = settle_splits(layout, ids, splits, args.seed)
    files_of = {place: layout.features / splits[place] / f"{ids[place]}.pt" for place in clips if not args.videos}
    without = [str(path) for path in files_of.values() if not path.is_file()]
    tell(without, "clips have no features (N, D) yet, to be written by you")
    file = layout.labels.resolve() / "videos.json"
    folder = args.videos and report.relative(args.videos.resolve(), file)
    # A clip that is left out now keeps its id: its features are never taken for those of another.
    files.write_json(file, {"folder": folder, "clips": earlier | {ids[place]: place for place in clips}})
    for split, ready in dataset.READY.items():
        records = [{"id": ids[place], "label": texts} for place, texts in clips.items() if splits[place] == split]
        if records:
            files.write_json(layout.labels / f"{split}.json", records)
        else:
            print(f"no clip is in the {split} split" + ("" if split == "test" else ", and train.py needs some"))
            for stale in (layout.labels / f"{split}.json", layout.annotations / ready):
                stale.unlink(missing_ok=True)


def own_layout(args: argparse.Namespace) -> dataset.Layout:
    """Where the own data set lies; without --videos, an earlier run's are taken.

    Raises: UserError where --data holds a data set of another kind.
    """
    if args.data.is_file():
        raise UserError(f"--data {args.data} is a file: name a folder, which is made where there is none")
    args.data.mkdir(parents=True, exist_ok=True)
    layout = dataset.Layout(args.data)
    if layout.own is None and (layout.splits or layout.labels_file("labels.json") or layout.videos.exists()):
        raise UserError(f"{args.data} holds another data set ({layout.name}): name a new folder with --data")
    before = layout.videos if layout.own and layout.own["folder"] else None
    args.videos = args.videos or before
    if before and args.videos.resolve() != before:
        print(f"note: the videos were in {before}; if those in {args.videos} are others, name another --data")
    return layout


def gather(rows: list[captions.Row], found: dict[str, str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Each found clip's captions, without empty ones and each once, and the splits of those that have one.

    Raises: UserError where a clip is of two splits.
    """
    texts, splits = defaultdict(list), {}
    for name, text, split in rows:
        if place := found.get(name):
            texts[place].append(dataset.clean(text))
            if split and splits.setdefault(place, split) != split:
                raise UserError(f"{name!r} is in two splits, {splits[place]} and {split}: leave it in one")
    kept = {place: list(dict.fromkeys(filter(None, some))) for place, some in texts.items()}
    if dropped := sum(map(len, texts.values())) - sum(map(len, kept.values())):
        print(f"{dropped:,} captions are empty or a clip's twice, and are left out")
    tell([place for place in kept if not kept[place]], "clips have empty captions only, and are left out")
    return {place: some for place, some in kept.items() if some}, splits


def tell(names: list[str], what: str) -> None:
    """How many they are, and the first ones."""
    if names:
        print(files.printable(f"{len(names):,} {what}: {', '.join(names[:5])}{', ...' * (len(names) > 5)}"))


def clip_ids(places: Iterable[str], earlier: dict[str, str]) -> dict[str, str]:
    """An id for each clip: its earlier one, its name where that is safe and free, else a readable one with a hash."""
    ids = {paths.plain(place): clip_id for clip_id, place in earlier.items()}
    taken = set(map(str.casefold, earlier))  # many disks make no difference between a.pt and A.pt
    for place in sorted(set(map(paths.plain, places)) - set(ids)):
        stem = paths.without_suffix(place.rpartition("/")[2])
        if not dataset.SAFE_ID.fullmatch(stem) or stem.casefold() in taken:
            letters = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
            readable = re.sub("[^A-Za-z0-9]+", "_", letters).strip("_")[:60] or "clip"
            stem = f"{readable}-{hashlib.sha256(place.encode(errors='backslashreplace')).hexdigest()[:8]}"
        ids[place] = stem
        taken.add(stem.casefold())
    return {place: ids[paths.plain(place)] for place in places}


def settle_splits(layout: dataset.Layout, ids: dict[str, str], given: dict[str, str], seed: int) -> dict[str, str]:
    """Each clip's split: as given, else that of its features, else that of an earlier run, else drawn.

    Features that lie elsewhere in features/, under the clip's id or name, move into their split's folder.
    """
    lying = {paths.plain(path.stem): path for path in layout.features.rglob("*.pt")}
    taken = {*ids.values(), *(layout.own["clips"] if layout.own else ())}  # a clip's name may be another's id
    names = {place: name for place in ids if (name := paths.plain(place)) not in taken}
    found = {place: path for place in ids if (path := lying.get(ids[place]) or lying.get(names.get(place, "")))}
    before = {record["id"]: split for split in layout.splits for record in dataset.read_split(layout.data, split)}
    before |= {ids[place]: path.parent.name for place, path in found.items() if path.parent.name in dataset.SPLITS}
    splits = {place: before[ids[place]] for place in ids if ids[place] in before} | given
    drawn = draw_splits([ids[place] for place in ids if place not in splits], splits.values(), seed)
    splits = {place: splits.get(place) or drawn[ids[place]] for place in ids}
    for place, path in found.items():
        target = layout.features / splits[place] / f"{ids[place]}.pt"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    return splits


def draw_splits(ids: Iterable[str], others: Iterable[str], seed: int) -> dict[str, str]:
    """Splits for clips that have none, so that with the `others` a tenth each is validation and test.

    That is one at least, as long as one is left to train.
    """
    left = sorted(ids, key=lambda clip_id: random.Random(f"{seed} {clip_id}").random())
    count, drawn = Counter(others), {}
    wanted = max(1, round((len(left) + count.total()) / 10))
    for split in ("validation", "test"):
        for _ in range(min(wanted - count[split], len(left) - (count["train"] == 0))):
            drawn[left.pop()] = split
    return drawn | dict.fromkeys(left, "train")


if __name__ == "__main__":
    cli.run(main)
