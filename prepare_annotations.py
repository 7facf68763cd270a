"""Turn SSv2's labels and their paraphrases into the caption lists that training and scoring read."""

import argparse
from pathlib import Path

import runtime.threads  # noqa: F401  how torch's threads wait

import dataset
from evaluation.ssv2 import TemplateReader, template_key
from runtime import cli, files


def main(argv: list[str] | None = None) -> None:
    """Write annotations/train_ready.json, val_ready.json and, where its answers are at hand, test_ready.json."""
    args = parse(argv)
    layout = dataset.Layout(args.data)
    paraphrases = dataset.read_paraphrases(args.paraphrases, args.data)
    labelled = {split: dataset.read_split(args.data, split) for split in ("train", "validation")}
    if answers := dataset.read_answers(args.data):
        # labels.json has no brackets; the records' templates say where the placeholders are.
        written = [record["template"] for record in labelled["train"] if record.get("template")]
        labelled["test"] = test_records(answers, [*dataset.read_templates(args.data), *written])
    for split, records in labelled.items():
        ready = caption_lists(records, paraphrases if split == "train" else {})
        if not ready:
            raise files.UserError(f"the {split} labels hold no clip with a caption; download them again")
        files.write_json(path := layout.annotations / dataset.READY[split], ready)
        captions, left_out = sum(len(record["label"]) for record in ready), len(records) - len(ready)
        print(f"{path}: {len(ready):,} clips, {captions:,} captions; {left_out:,} clips have none")
    if not paraphrases:
        print("no paraphrases were found: each training clip has its label alone")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=dataset.DEFAULT_DATA, help="the dataset's folder, in SSv2's layout")
    add("--paraphrases", type=Path, help="a file or a folder of parts (default: those under --data, if any)")
    return parser.parse_args(argv)


def caption_lists(records: list[dataset.Record], paraphrases: dict[str, list[str]]) -> list[dataset.Record]:
    """Records whose label is a list: the label, then its paraphrases, each once. Clips without any are left out."""
    ready = []
    for record in records:
        label = record.get("label")
        texts = [label if isinstance(label, str) else "", *paraphrases.get(record["id"], [])]
        captions = list(dict.fromkeys(text for text in map(dataset.clean, texts) if text))
        known = {"template": record.get("template"), "placeholders": record.get("placeholders") or []}
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


if __name__ == "__main__":
    cli.run(main)
