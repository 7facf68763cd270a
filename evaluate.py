"""Score a checkpoint on a whole split: n-gram scores, SSv2's own actions and objects, and whether it looks."""

import argparse
import itertools
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dataset
from evaluation import captioning as validation
from evaluation import grounding, report, scores
from evaluation.captioning import SplitReader
from evaluation.scores import Scorer
from evaluation.ssv2 import template_key
from features import cache
from qformer import VideoCaptioner
from runtime import cli as arguments
from runtime import files, provenance
from runtime.distributed import DistributedContext
from runtime.files import UserError
from runtime.signals import Interrupted, Interrupts


def main(argv: list[str] | None = None) -> int:
    """Caption a split, score the captions, write evaluation.json and the page."""
    args = parse(argv)
    group = DistributedContext()
    layout = dataset.check_data(args.data)
    records = dataset.usable_records(layout, args.split, args.max_missing, group)
    captioner = VideoCaptioner.from_checkpoint(args.checkpoint, group.device, args.llm, args.encoder)
    cache.check_same_features(
        captioner.config["features"], layout.features, args.checkpoint, captioner.config.get("published", False)
    )
    planned = plan(args, records, layout)
    if group.is_main:
        files.check_writable(args.results)  # now, not after an hour's work
    interrupts = Interrupts()
    folder = layout.feature_folder(args.split)
    reader = SplitReader(captioner, records, folder, args.batch_size, group, interrupts.check)
    try:
        group.check_equal([record["id"] for record in records], f"{args.split} clips")
        result = evaluate(args, reader, layout, planned)
    except Interrupted as signal:
        group.print_main(f"{signal}: nothing was written")
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
    add("--java-timeout", type=arguments.positive, default=300.0, help="seconds that Java may be silent")
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


@dataclass(frozen=True)
class Plan:
    """What the run will score with, all of it read before the first clip is captioned."""

    scorer: Scorer
    actions: list[str] | None  # the templates as a caption would say them, for --actions
    places: dict[str, int]  # of each template key among them
    common: str  # the most common training caption, for --grounding
    pairs: dict[str, str]  # the opposite actions, for --grounding


def plan(args: argparse.Namespace, records: list[dataset.Record], layout: dataset.Layout) -> Plan:
    """Read what the scores need. Raises: UserError where some of it is not there, or not what it should be."""
    scorer = Scorer(records, layout, args.java_timeout, args.seed)
    learnt = dataset.read_ready(args.data, "train") if args.actions or args.grounding else []
    actions, places = None, {}
    if args.actions:
        templates = dataset.read_templates(args.data)
        places = {template_key(template): place for place, template in enumerate(templates)}
        for record in records:
            if template_key(record.get("template") or "") not in places:
                lacking = f"clip {record['id']}'s {record.get('template')!r}"
                raise UserError(f"--actions: labels.json does not hold {lacking}")
        plain = _begins_small(learnt)
        actions = [_as_caption(template.lower() if plain else template) for template in templates]
    common = grounding.most_common_caption(learnt) if args.grounding else ""
    pairs = grounding.opposites(args.data) if args.grounding else {}
    return Plan(scorer, actions, places, common, pairs)


def _begins_small(records: list[dataset.Record]) -> bool:
    """Whether most labels begin with a small letter: templates are scored as the training captions were written.

    SSv2's templates begin with a capital, its labels do not, and a capital alone costs a text its likelihood.
    """
    small = sum(record["label"][0][:1].islower() for record in records)
    return small * 2 > len(records)


def _as_caption(template: str) -> str:
    """A template as a caption would say it: "[something]" as "something"."""
    return dataset.clean(template.replace("[", "").replace("]", ""))


def evaluate(args: argparse.Namespace, reader: SplitReader, layout: dataset.Layout, plan: Plan) -> dict[str, Any]:
    """All that evaluation.json holds. All ranks caption; the main one scores."""
    if plan.actions:
        reader.context.print_main(_cost_of_actions(plan.actions, reader))
    settings = {"max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams}
    predictions = reader.captions(**settings)
    actions = _actions(plan, reader) if plan.actions else None
    shuffled = None
    if args.grounding and len(reader.records) > 1:
        sources = validation.shuffled(reader.records, args.seed)
        shuffled = reader.captions(**settings, desc="shuffled", sources=sources)
    backwards = _reversed(args, reader, layout, plan.pairs) if args.grounding and args.reversed_clips > 0 else {}
    if not reader.context.is_main:
        return {}
    result = {"split": args.split, **plan.scorer.scores(predictions, meteor=not args.no_meteor)}
    if actions:
        result["actions"] = plan.scorer.accuracies(actions)
    if args.grounding:
        result["grounding"] = plan.scorer.grounding(predictions, shuffled, plan.common, backwards, plan.pairs)
    return result


def _cost_of_actions(texts: list[str], reader: SplitReader) -> str:
    """What --actions will cost, in tokens, operations and time at the rate of this machine's matrix products."""
    captioner, clips = reader.captioner, len(reader.records)
    tokens = sum(len(captioner.caption_ids(text)) for text in texts) + captioner.prefix_length
    weights = sum(parameter.numel() for parameter in captioner.lm.parameters())
    work = 2 * weights * tokens * clips
    minutes = work / (_rate(captioner) * reader.context.world_size) / 60
    return (
        f"actions: {len(texts)} templates for {clips:,} clips, {tokens:,} tokens a clip through {weights / 1e6:,.3g} M "
        f"parameters: {work / 1e12:,.3g} TFLOP in all, {minutes:,.1f} min or more on this machine"
    )


def _rate(captioner: VideoCaptioner, size: int = 1024) -> float:
    """Operations a second of a matrix product as the language model's own, at its best."""
    dtype = torch.bfloat16 if captioner.device.type == "cuda" else torch.float32
    matrix = torch.ones(size, size, device=captioner.device, dtype=dtype)
    took = []
    for _ in range(4):
        began = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        took.append(time.perf_counter() - began)
    return 2 * size**3 / min(took)


def _actions(plan: Plan, reader: SplitReader) -> dict[str, dict[str, float]]:
    """Whether each clip's template is the most likely, or among the five most likely, of all: 0 or 1 by clip id."""
    found = {}
    for batch, features in reader.batches("actions"):
        ranked = reader.captioner.log_likelihood(features, plan.actions).argsort(dim=1, descending=True, stable=True)
        for record, order in zip(batch, ranked.tolist(), strict=True):
            place = order.index(plan.places[template_key(record["template"])])
            found[record["id"]] = {"top1": float(place == 0), "top5": float(place < 5)}
    return reader.gathered(found)


def _reversed(
    args: argparse.Namespace, reader: SplitReader, layout: dataset.Layout, pairs: dict[str, str]
) -> dict[str, str]:
    """Captions of clips played backwards, where their videos are at hand and their action has an opposite."""
    videos = {
        record["id"]: path
        for record in reader.records
        if template_key(record.get("template") or "") in pairs and (path := layout.video(record["id"]))
    }
    chosen = sorted(random.Random(args.seed).sample(sorted(videos), min(args.reversed_clips, len(videos))))
    if not chosen or reader.captioner.config["features"] is None:
        reader.context.print_main("reversed: no clip with an opposite action is at hand as a video; left out")
        return {}
    if len(chosen) < len(videos):
        reader.context.print_main(
            f"reversed: {len(chosen):,} of {len(videos):,} clips, drawn at random (--reversed-clips)"
        )
    mine = {clip_id: videos[clip_id] for clip_id in reader.context.shard(chosen)}
    settings = (args.max_new_tokens, args.num_beams, args.clip_timeout)
    found = grounding.reversed_captions(reader.captioner, mine, args.batch_size, *settings, reader.check)
    return {clip_id: text for part in reader.context.gather(found) for clip_id, text in part.items()}


def write(args: argparse.Namespace, result: dict[str, Any], layout: dataset.Layout, captioner: VideoCaptioner) -> None:
    """evaluation.json, the page, and the table on the screen."""
    epoch = captioner.epoch  # of what was evaluated: training may have written the next checkpoint since
    result = {"checkpoint": str(args.checkpoint), "epoch": epoch, **result, "made_by": provenance.made_by()}
    files.write_json(args.results / "evaluation.json", result)
    page = args.results / "index.html"
    copies = args.results / "videos" if args.copy_videos else None
    clips = scores.gallery(result["predictions"], layout, page, copies)
    made = " at ".join(filter(None, result["made_by"].values()))
    title = f"Captions of the {args.split} split"
    confused = result.get("ssv2", {}).get("confused")
    rows = scores.table(result)
    report.write_page(page, title, clips, history=captioner.history, scores=rows, made_by=made, confused=confused)
    width = max(len(row["name"]) for row in rows)
    for note in result["notes"]:
        print(note)
    print(f"{args.checkpoint}, epoch {epoch}, {args.split}: {result['clips']:,} clips, {result['tokenizer']}")
    for group, members in itertools.groupby(rows, key=lambda row: row["group"]):
        print(group)
        for row in members:
            interval = "" if row["low"] is None else f"  [{row['low']:.4f}, {row['high']:.4f}]"
            value = "none" if row["value"] is None else f"{row['value']:.4f}"
            note = f"  ({row['note']})" if row["note"] and row["note"] not in result["notes"] else ""
            print(f"  {row['name']:<{width}}  {value:>8}{interval}{note}")
    print(f"written: {args.results / 'evaluation.json'}, page: {page}")


if __name__ == "__main__":
    arguments.run(main)
