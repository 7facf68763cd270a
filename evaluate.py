"""Score a checkpoint on a whole split: n-gram scores, SSv2's own actions and objects, and whether it looks."""

import argparse
import math
import random
from pathlib import Path
from typing import Any

import arguments
import dataset
import files
import grounding
import metrics
import provenance
import ranks
import report
import validation
from files import UserError
from interrupts import Interrupted, Interrupts
from qformer import VideoCaptioner
from templates import TemplateReader, template_key
from validation import SplitReader


def main(argv: list[str] | None = None) -> int:
    """Caption a split, score the captions, write evaluation.json and the page."""
    args = parse(argv)
    group = ranks.start()
    layout = dataset.check_data(args.data)
    records = dataset.without_empty(dataset.read_ready(args.data, args.split), layout.ready(args.split))
    records, missing = validation.with_features(records, layout, args.split, args.max_missing)
    if missing:
        group.say(f"{args.split}: {missing:,} clips have no features and are left out")
    captioner = VideoCaptioner.from_checkpoint(args.checkpoint, group.device, args.llm, args.encoder)
    validation.check_features(captioner.config, layout, args.checkpoint)
    if group.is_main:
        files.check_writable(args.results)  # now, not after an hour's work
    interrupts = Interrupts()
    folder = layout.feature_folder(args.split)
    reader = SplitReader(captioner, records, folder, args.batch_size, group, interrupts.check)
    try:
        with ranks.together(interrupts.check):
            group.agree([record["id"] for record in records], f"{args.split} clips")
            result = evaluate(args, reader, layout)
    except Interrupted as signal:
        group.say(f"{signal}: nothing was written")
        return signal.code
    if group.is_main:
        write(args, result, layout, captioner)
    group.close()
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = arguments.Parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=dataset.DEFAULT_DATA, help="the dataset's folder, in SSv2's layout")
    add("--checkpoint", type=Path, default=Path("checkpoint.pt"), help="a file of train.py, or a folder made from one")
    add("--split", default="validation", type=_split, help="validation, train, or test where its answers are at hand")
    add("--results", type=Path, default=Path("results"), help="folder for evaluation.json and the page")
    add("--llm", help="where the language model is now, if not where the checkpoint says")
    add("--encoder", help="where the video encoder is now, if not where the checkpoint says (for --grounding)")
    add("--batch-size", type=arguments.count, default=64, help="clips that are captioned at once")
    add("--max-new-tokens", type=arguments.count, default=50, help="longest caption, in tokens")
    add("--num-beams", type=arguments.count, default=1, help="beams of the search; 1: greedy")
    add("--max-missing", type=arguments.amount, default=1.0, help="percent of the clips that may lack features")
    add("--actions", action="store_true", help="also classify actions by the likelihood of all templates")
    add("--grounding", action="store_true", help="also score shuffled features, no features, and reversed clips")
    add("--reversed-clips", type=int, default=1000, help="clips that --grounding plays backwards, at most; 0: none")
    add("--clip-timeout", type=arguments.positive, default=60.0, help="seconds that one clip may take to decode")
    add("--java-timeout", type=arguments.positive, default=1800.0, help="seconds for METEOR, and for the tokenizer")
    add(
        "--copy-videos",
        action="store_true",
        help="copy the clips beside the page, to publish it",
    )
    add("--no-meteor", action="store_true", help="leave METEOR out, the slowest score by far")
    add("--seed", type=int, default=0, help="decides the shuffle and the bootstrap's samples")
    return parser.parse_args(argv)


def _split(text: str) -> str:
    try:
        return dataset.check_split(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def evaluate(args: argparse.Namespace, reader: SplitReader, layout: dataset.Layout) -> dict[str, Any]:
    """All that evaluation.json holds. All ranks caption; the main one scores."""
    settings = {"max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams}
    predictions = reader.captions(**settings)
    actions = _actions(args, reader, layout) if args.actions else None
    shuffled = None
    if args.grounding and len(reader.records) > 1:
        moved = validation.shuffled(reader.records, args.seed)
        shuffled = reader.captions(**settings, said="shuffled", moved=moved)
    backwards = _reversed(args, reader, layout) if args.grounding and args.reversed_clips > 0 else {}
    if not reader.ranks.is_main:
        return {}
    scorer = Scorer(args, reader.records, layout)
    result = scorer.scores(predictions)
    if actions:
        result["actions"] = scorer.accuracies(actions)
    if args.grounding:
        result["grounding"] = scorer.grounding(shuffled, backwards)
    return result


def _actions(args: argparse.Namespace, reader: SplitReader, layout: dataset.Layout) -> dict[str, dict[str, float]]:
    """Whether each clip's template is the most likely, or among the five most likely, of all: 0 or 1 by clip id."""
    templates = dataset.read_templates(args.data)
    places = {template_key(template): place for place, template in enumerate(templates)}
    for record in reader.records:
        if template_key(record.get("template") or "") not in places:
            raise UserError(f"--actions: labels.json does not hold clip {record['id']}'s {record.get('template')!r}")
    # In the case of the training captions: SSv2's test answers begin with a capital, its labels do not.
    learnt = dataset.read_ready(args.data, "train")[:1000]
    plain = all(caption == caption.lower() for record in learnt for caption in record["label"])
    texts = [_as_caption(template.lower() if plain else template) for template in templates]
    captioner = reader.captioner
    tokens = sum(len(captioner.caption_ids(text)) for text in texts) + captioner.prefix_length
    weights = sum(parameter.numel() for parameter in captioner.lm.parameters())
    clips = len(reader.records)
    reader.ranks.say(
        f"actions: {len(texts)} templates for {clips:,} clips, {tokens:,} tokens a clip through {weights / 1e6:,.3g} M "
        f"parameters: {2 * weights * tokens * clips / 1e12:,.3g} TFLOP in all"
    )
    found = {}
    for batch, features in reader.batches("actions"):
        ranked = captioner.score(features, texts).argsort(dim=1, descending=True, stable=True)
        for record, order in zip(batch, ranked.tolist(), strict=True):
            place = order.index(places[template_key(record["template"])])
            found[record["id"]] = {"top1": float(place == 0), "top5": float(place < 5)}
    return reader.gathered(found)


def _as_caption(template: str) -> str:
    """A template as a caption would say it: "[something]" as "something"."""
    return dataset.clean(template.replace("[", "").replace("]", ""))


def _reversed(args: argparse.Namespace, reader: SplitReader, layout: dataset.Layout) -> dict[str, str]:
    """Captions of clips played backwards, where their videos are at hand and their action has an opposite."""
    pairs = grounding.opposites(args.data)
    videos = {
        record["id"]: path
        for record in reader.records
        if template_key(record.get("template") or "") in pairs and (path := layout.video(record["id"]))
    }
    chosen = sorted(random.Random(args.seed).sample(sorted(videos), min(args.reversed_clips, len(videos))))
    if not chosen or reader.captioner.config["features"] is None:
        reader.ranks.say("reversed: no clip with an opposite action is at hand as a video; left out")
        return {}
    mine = {clip_id: videos[clip_id] for clip_id in reader.ranks.share(chosen)}
    settings = (args.max_new_tokens, args.num_beams, args.clip_timeout)
    found = grounding.reversed_captions(reader.captioner, mine, args.batch_size, *settings, reader.check)
    return {clip_id: text for part in reader.ranks.gather(found) for clip_id, text in part.items()}


class Scorer:
    """Scores of captions against a split's references, each with its 95 % interval."""

    def __init__(self, args: argparse.Namespace, records: list[dataset.Record], layout: dataset.Layout) -> None:
        self.args, self.records = args, records
        self.references = {record["id"]: record["label"] for record in records}
        self.reader = None
        if layout.labels_file("labels.json"):
            # labels.json has no brackets; the records' templates say where the placeholders are.
            written = [record["template"] for record in records if record.get("template")]
            self.reader = TemplateReader([*dataset.read_templates(args.data), *written])

    def scores(self, predictions: dict[str, str]) -> dict[str, Any]:
        """The real captions' scores."""
        args = self.args
        ngram = self._ngram(predictions, meteor=not args.no_meteor)
        for note in ngram.notes:
            print(note)
        result = {
            "split": args.split,
            "clips": len(predictions),
            "tokenizer": ngram.tokenizer,
            "metrics": ngram.metrics,
            "intervals": dict(ngram.intervals),
        }
        per_clip = {}
        if self.reader is not None:
            by_id = {record["id"]: record for record in self.records}
            ssv2 = metrics.ssv2_scores(predictions, by_id, self.reader, seed=args.seed)
            per_clip = ssv2.pop("per_clip")
            result["ssv2"] = ssv2
        result["predictions"] = [
            {
                "id": record["id"],
                "prediction": predictions[record["id"]],
                "references": record["label"],
                "template": record.get("template"),
                "CIDEr": ngram.per_clip["CIDEr"][record["id"]],
                "outcome": per_clip.get(record["id"], {}).get("outcome"),
            }
            for record in self.records
        ]
        return result

    def _ngram(self, predictions: dict[str, str], meteor: bool) -> metrics.NgramScores:
        references = {clip_id: self.references[clip_id] for clip_id in predictions}
        return metrics.ngram_scores(
            predictions, references, meteor=meteor, timeout=self.args.java_timeout, seed=self.args.seed
        )

    def accuracies(self, actions: dict[str, dict[str, float]]) -> dict[str, Any]:
        """Top-1 and top-5 with their intervals."""
        found: dict[str, Any] = {"intervals": {}}
        for name in ("top1", "top5"):
            self._mean(found, name, [clip[name] for clip in actions.values()])
        return found

    def _mean(self, found: dict[str, Any], name: str, values: list[float]) -> None:
        found[name] = math.fsum(values) / len(values)
        found["intervals"][name] = list(metrics.bootstrap(values, seed=self.args.seed))

    def grounding(self, shuffled: dict[str, str] | None, backwards: dict[str, str]) -> dict[str, Any]:
        """What the scores are when the captioner is lied to, or does not look."""
        found: dict[str, Any] = {"intervals": {}}
        common = grounding.most_common_caption(dataset.read_ready(self.args.data, "train"))
        rows = {"shuffled": shuffled, "most_common": dict.fromkeys(self.references, common), "reversed": backwards}
        for name, captions in rows.items():
            if captions:
                ngram = self._ngram(captions, meteor=False)
                found[f"CIDEr_{name}"] = ngram.metrics["CIDEr"]
                found["intervals"][f"CIDEr_{name}"] = list(ngram.intervals["CIDEr"])
        found["most_common_caption"] = common
        if backwards and self.reader is not None:
            pairs = grounding.opposites(self.args.data)
            flipped = list(grounding.flips(backwards, self.records, pairs, self.reader).values())
            found["reversed_clips"] = len(flipped)
            self._mean(found, "reversal_flips", flipped)
        return found


TABLE = {  # section of evaluation.json: (group, {score: how the table names it})
    "grounding": (
        "does it look?",
        {
            "CIDEr_shuffled": "CIDEr, features shuffled between clips",
            "CIDEr_most_common": "CIDEr, the most common training caption",
            "CIDEr_reversed": "CIDEr, clips played backwards",
            "reversal_flips": "reversed clips captioned with the opposite action",
        },
    ),
    "ssv2": (
        "SSv2",
        {
            "exact_match": "exact match",
            "template_accuracy": "template accuracy",
            "object_accuracy": "object accuracy",
            "no_template": "captions that fit no template",
        },
    ),
    "actions": ("SSv2", {"top1": "action by likelihood, top 1", "top5": "action by likelihood, top 5"}),
}


def score_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The table: a row a score, with its 95 % interval."""

    def row(group: str, name: str, value: Any, interval: Any) -> dict[str, Any]:
        low, high = interval or (None, None)
        return {"group": group, "name": name, "value": value, "low": low, "high": high}

    rows = [row("n-gram", name, value, result["intervals"].get(name)) for name, value in result["metrics"].items()]
    for section, (group, names) in TABLE.items():
        scores = result.get(section, {})
        if section == "grounding" and scores:  # the real score beside those that it has to beat
            rows.append(row(group, "CIDEr", result["metrics"]["CIDEr"], result["intervals"]["CIDEr"]))
        intervals = scores.get("intervals", {})
        rows += [row(group, said, scores[key], intervals.get(key)) for key, said in names.items() if key in scores]
    return rows


def write(args: argparse.Namespace, result: dict[str, Any], layout: dataset.Layout, captioner: VideoCaptioner) -> None:
    """evaluation.json, the page, and the table on the screen."""
    epoch = captioner.epoch  # of what was evaluated: training may have written the next checkpoint since
    result = {"checkpoint": str(args.checkpoint), "epoch": epoch, **result, "made_by": provenance.made_by()}
    files.write_json(args.results / "evaluation.json", result)
    page = args.results / "index.html"
    copies = args.results / "videos" if args.copy_videos else None
    clips = validation.gallery(result["predictions"], layout, page, copies)
    made = " at ".join(filter(None, result["made_by"].values()))
    title = f"Captions of the {args.split} split"
    confused = result.get("ssv2", {}).get("confused")
    rows = score_rows(result)
    report.write_page(page, title, clips, history=captioner.history, scores=rows, made_by=made, confused=confused)
    width = max(len(row["name"]) for row in rows)
    print(f"{args.checkpoint}, epoch {epoch}, {args.split}: {result['clips']:,} clips, {result['tokenizer']}")
    for row in rows:
        interval = "" if row["low"] is None else f"  [{row['low']:.4f}, {row['high']:.4f}]"
        value = "none" if row["value"] is None else f"{row['value']:.4f}"
        print(f"  {row['name']:<{width}}  {value:>8}{interval}")
    print(f"written: {args.results / 'evaluation.json'}, page: {page}")


if __name__ == "__main__":
    ranks.run(main)
