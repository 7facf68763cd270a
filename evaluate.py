"""Score a checkpoint on a whole split: n-gram scores, SSv2's own actions and objects, and whether it looks."""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dataset
from evaluation import grounding, report, scores
from evaluation.captioning import SplitReader, gallery, shuffled
from evaluation.scores import Scorer
from evaluation.ssv2 import as_text, template_key
from features import cache
from qformer import VideoCaptioner
from runtime import cli, files, provenance
from runtime.distributed import DistributedContext
from runtime.files import UserError
from runtime.signals import Interrupts


def main(argv: list[str] | None = None) -> None:
    """Caption a split, score the captions, write evaluation.json and the page."""
    args = parse(argv)
    with Interrupts(at_once=True):  # files are written whole or not at all, so it may stop anywhere
        context = DistributedContext(str(cli.device(args.device)))
        layout = dataset.check_data(args.data)
        records = dataset.usable_records(layout, args.split, args.max_missing, context)
        captioner = VideoCaptioner.from_checkpoint(args.checkpoint, context.device, args.llm, args.encoder)
        config = captioner.config
        cache.check_same_features(config["features"], layout.features, args.checkpoint, config.get("published", False))
        planned = plan(args, records, layout)
        if context.is_main:
            files.check_writable(args.results)  # now, not after an hour's work
        context.check_equal([record["id"] for record in records], f"{args.split} clips")
        reader = SplitReader(captioner, records, layout.feature_folder(args.split), args.batch_size, context)
        result = evaluate(args, reader, layout, planned)
        if context.is_main:
            write(args, result, layout, captioner)
        context.close()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(__doc__)
    add = parser.group("data and models").add_argument
    add("--data", type=Path, default=dataset.DEFAULT_DATA, help="the dataset's folder, in SSv2's layout")
    add("--checkpoint", type=Path, default=Path("checkpoint.pt"), help="a file of train.py, or a folder made from one")
    add(
        "--split",
        default="validation",
        type=dataset.check_split,
        help="validation, train, or test where its answers are at hand",
    )
    add("--max-missing", type=cli.amount, default=1.0, help="percent of the clips that may lack features")
    add("--llm", help="where the language model is now, if not where the checkpoint says")
    add("--encoder", help="where the video encoder is now, if not where the checkpoint says (for --grounding)")
    add = parser.group("captions").add_argument
    add("--max-new-tokens", type=cli.count, default=50, help="longest caption, in tokens")
    add("--num-beams", type=cli.count, default=1, help="beams of the search; 1: greedy")
    add = parser.group("scores").add_argument
    add("--actions", action="store_true", help="also classify actions by the likelihood of all templates")
    add("--grounding", action="store_true", help="also score shuffled features, no features, and reversed clips")
    add("--reversed-clips", type=cli.whole, default=1000, help="clips that --grounding plays backwards, at most")
    add("--no-meteor", action="store_true", help="leave METEOR out, the slowest score by far")
    add("--seed", type=int, default=0, help="decides the shuffle and the bootstrap's samples")
    group = parser.group("running")
    add = group.add_argument
    add("--results", type=Path, default=Path("results"), help="folder for evaluation.json and the page")
    add("--copy-videos", action="store_true", help="copy the clips beside the page, to publish it")
    cli.add_device(group)
    add("--batch-size", type=cli.count, default=64, help="clips that are captioned at once")
    add("--clip-timeout", type=cli.positive, default=60.0, help="seconds that one clip may take to decode")
    add("--java-timeout", type=cli.positive, default=300.0, help="seconds that Java may take, beside 0.01 a caption")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Plan:
    """What the run will score with, all of it read before the first clip is captioned."""

    scorer: Scorer
    actions: list[str]  # the templates as a caption would say them, for --actions
    places: dict[str, int]  # template key -> its index in `actions`
    common: str  # the most common training caption, for --grounding
    pairs: dict[str, str]  # the opposite actions, for --grounding


def plan(args: argparse.Namespace, records: list[dataset.Record], layout: dataset.Layout) -> Plan:
    """Read what the scores need. Raises: UserError where some of it is not there, or not what it should be."""
    scorer = Scorer(records, layout, args.java_timeout, args.seed)
    trained = dataset.read_ready(args.data, "train") if args.actions or args.grounding else []
    actions, places = [], {}
    if args.actions:
        templates = dataset.read_templates(args.data)
        places = {template_key(template): place for place, template in enumerate(templates)}
        for record in records:
            if template_key(record.get("template") or "") not in places:
                lacking = f"clip {record['id']}'s {record.get('template')!r}"
                raise UserError(f"--actions: labels.json does not hold {lacking}")
        # SSv2's templates begin with a capital, its labels do not, and a capital alone costs a text its likelihood:
        # templates are scored as most training captions were written.
        lower = sum(record["label"][0][:1].islower() for record in trained) * 2 > len(trained)
        actions = [dataset.clean(as_text(template.lower() if lower else template)) for template in templates]
    common = grounding.most_common_caption(trained) if args.grounding else ""
    pairs = grounding.opposites(args.data) if args.grounding else {}
    return Plan(scorer, actions, places, common, pairs)


def evaluate(args: argparse.Namespace, reader: SplitReader, layout: dataset.Layout, plan: Plan) -> dict[str, Any]:
    """All that evaluation.json holds. All ranks caption; the main one scores."""
    if plan.actions:
        reader.context.print_main(_cost_of_actions(plan.actions, reader))
    settings = {"max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams}
    predictions = reader.captions(**settings)
    actions = _actions(plan, reader) if plan.actions else None
    other = None
    if args.grounding and len(reader.records) > 1:
        other = reader.captions(**settings, desc="shuffled", sources=shuffled(reader.records, args.seed))
    backwards = _reversed(args, reader, layout, plan.pairs) if args.grounding and args.reversed_clips else {}
    if not reader.context.is_main:
        return {}
    result = {"split": args.split, **plan.scorer.scores(predictions, meteor=not args.no_meteor)}
    if actions:
        result["actions"] = plan.scorer.accuracies(actions)
    if args.grounding:
        result["grounding"] = plan.scorer.grounding(predictions, other, plan.common, backwards, plan.pairs)
    return result


def _cost_of_actions(texts: list[str], reader: SplitReader) -> str:
    """What --actions will cost, before it is paid: two operations a weight and token (the language model's)."""
    captioner, clips = reader.captioner, len(reader.records)
    tokens = sum(len(captioner.caption_ids(text)) for text in texts) + captioner.prefix_length
    work = 2 * sum(parameter.numel() for parameter in captioner.lm.parameters()) * tokens * clips
    cost = f"{tokens:,} tokens a clip, {work / 1e12:,.3g} TFLOP in all"
    return f"actions: {len(texts)} templates for {clips:,} clips, {cost}"


def _actions(plan: Plan, reader: SplitReader) -> dict[str, dict[str, float]]:
    """Whether each clip's template is the most likely, or among the five most likely, of all: 0 or 1 by clip id."""
    found = {}
    for batch, features in reader.batches("actions"):
        likely = reader.captioner.log_likelihood(features, plan.actions)  # (B, T)
        for record, order in zip(batch, likely.argsort(dim=1, descending=True, stable=True).tolist(), strict=True):
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
    context = reader.context
    chosen = sorted(random.Random(args.seed).sample(sorted(videos), min(args.reversed_clips, len(videos))))
    if not chosen or reader.captioner.config["features"] is None:
        context.print_main("reversed: no clip with an opposite action is at hand as a video; left out")
        return {}
    if len(chosen) < len(videos):
        context.print_main(f"reversed: {len(chosen):,} of {len(videos):,} clips, drawn at random (--reversed-clips)")
    mine = {clip_id: videos[clip_id] for clip_id in context.shard(chosen)}
    settings = (args.batch_size, args.max_new_tokens, args.num_beams, args.clip_timeout)
    parts = context.gather(grounding.reversed_captions(reader.captioner, mine, *settings))
    found = {clip_id: text for part in parts for clip_id, text in part.items()}
    return {clip_id: found[clip_id] for clip_id in chosen if clip_id in found}  # in one order for any number of ranks


def write(args: argparse.Namespace, result: dict[str, Any], layout: dataset.Layout, captioner: VideoCaptioner) -> None:
    """evaluation.json, the page, and the table on the screen."""
    # The epoch is that of what was evaluated: training may have written the next checkpoint since.
    source = {"checkpoint": files.display_path(args.checkpoint), "epoch": captioner.epoch}
    result = {**source, **result, "made_by": provenance.made_by()}
    files.write_json(args.results / "evaluation.json", result)
    page = args.results / "index.html"
    rows = scores.table(result)
    report.write_page(
        page,
        f"Captions of the {args.split} split",
        gallery(result["predictions"], layout, page, args.results / "videos" if args.copy_videos else None),
        history=captioner.history,
        scores=rows,
        made_by=" at ".join(filter(None, result["made_by"].values())),
        confused=result.get("ssv2", {}).get("confused"),
    )
    for note in result["notes"]:
        print(note)
    print(f"{args.checkpoint}, epoch {captioner.epoch}, {args.split}: {result['clips']:,} clips, {result['tokenizer']}")
    for line in scores.lines(rows, result["notes"]):
        print(line)
    print(f"written: {args.results / 'evaluation.json'}, page: {page}")


if __name__ == "__main__":
    cli.run(main)
