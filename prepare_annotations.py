"""Turn SSv2's labels and their paraphrases into the caption lists that training and scoring read."""

import argparse
from collections import Counter
from pathlib import Path

import dataset
from evaluation.ssv2 import TemplateReader, template_key
from runtime import cli, files
from runtime.files import UserError


def main(argv: list[str] | None = None) -> None:
    """Write annotations/train_ready.json, val_ready.json and, where its answers are at hand, test_ready.json."""
    args = parse(argv)
    layout = dataset.Layout(args.data)
    paraphrases = dataset.read_paraphrases(args.paraphrases, args.data)
    train, dropped = caption_lists(dataset.read_split(args.data, "train"), paraphrases)
    ready = {"train": train}
    ready["validation"], more = caption_lists(dataset.read_split(args.data, "validation"), {})
    dropped += more
    if answers := dataset.read_answers(args.data):
        # labels.json has no brackets; the records' templates say where the placeholders are.
        written = [record["template"] for record in train if record["template"]]
        ready["test"] = test_lists(answers, [*dataset.read_templates(args.data), *written])
    for split, records in ready.items():
        if not records:
            raise UserError(f"the {split} labels hold no clip with a caption; nothing was written")
    for split, records in ready.items():
        files.write_json(layout.ready(split), records)
        print(f"{layout.ready(split)}: {len(records):,} clips")
    for line in summary(train, paraphrases):
        print(line)
    if dropped:
        print(f"left out: {len(dropped):,} clips without a caption, such as {dropped[0]}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=dataset.DEFAULT_DATA, help="the dataset's folder, in SSv2's layout")
    parts = "a file or a folder of parts; without it ssv2_paraphrase.json, or parts, under --data where there are any"
    add("--paraphrases", type=Path, help=parts)
    return parser.parse_args(argv)


def caption_lists(
    records: list[dataset.Record], paraphrases: dict[str, list[str]]
) -> tuple[list[dataset.Record], list[str]]:
    """Records whose label is a list (the label, then its paraphrases, each once), and the ids left without any."""
    ready, dropped = [], []
    for record in records:
        label = record.get("label")
        texts = [label if isinstance(label, str) else "", *paraphrases.get(record["id"], [])]
        captions = list(dict.fromkeys(text for text in map(dataset.clean, texts) if text))
        known = {"template": record.get("template"), "placeholders": record.get("placeholders") or []}
        if captions:
            ready.append({"id": record["id"], "label": captions, **known})
        else:
            dropped.append(record["id"])
    return ready, dropped


def test_lists(answers: dict[str, str], templates: list[str]) -> list[dataset.Record]:
    """The test split's records; template and placeholders are read out of the answer's own words."""
    reader = TemplateReader(templates)
    records = []
    for clip_id, label in answers.items():
        reading = reader.read(label)
        # SSv2's own answers are templates ("Moving something up"): no object can be scored then.
        named = template_key(label) != template_key(reading.template or "")
        found = {"template": reading.template, "placeholders": list(reading.placeholders) if named else []}
        records.append({"id": clip_id, "label": [label], **found})
    return records


def summary(train: list[dataset.Record], paraphrases: dict[str, list[str]]) -> list[str]:
    """How many clips have how many captions, and paraphrases that belong to no clip."""
    counts = Counter(len(record["label"]) for record in train)
    lines = ["captions a training clip: " + ", ".join(f"{n} ({counts[n]:,} clips)" for n in sorted(counts))]
    unknown = paraphrases.keys() - {record["id"] for record in train}
    if unknown:
        lines.append(f"paraphrases of {len(unknown):,} clips that are not in the training labels were passed over")
    if not paraphrases:
        lines.append("no paraphrases were found: each training clip has its label alone")
    return lines


if __name__ == "__main__":
    cli.run(main)
