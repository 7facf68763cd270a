"""Score a checkpoint on a whole split: n-gram scores, SSv2's own actions and objects, and whether it looks."""

import argparse
import itertools
import os
import random
from pathlib import Path
from typing import Any

from torch import Tensor

import dataset
from evaluation import grounding, report, scores
from evaluation.captioning import SplitReader, shuffled
from evaluation.ssv2 import as_text, template_key
from features.cache import check_same_features
from models import checkpoint
from qformer import VideoCaptioner
from runtime import cli, files, provenance
from runtime.distributed import DistributedContext
from runtime.signals import Interrupted, Interrupts


def main(argv: list[str] | None = None) -> int:
    """Caption a split, score the captions, write evaluation.json and the page."""
    args = parse(argv)
    context = DistributedContext(args.device)
    layout = dataset.Layout(args.data)
    made = checkpoint.read(args.checkpoint).config["features"] if args.checkpoint.exists() else None
    records = dataset.usable_records(layout, args.split, args.max_missing, context, made)  # before the models load
    if context.is_main:
        files.check_writable(args.results)  # now, not after an hour's work
    captioner = VideoCaptioner.from_checkpoint(args.checkpoint, context.device, args.llm, args.encoder)
    made = captioner.config["features"]  # --encoder may name it anew
    check_same_features(made, layout.features, args.checkpoint, captioner.config.get("published", False))
    plan = Plan(args, records, layout)
    try:
        with Interrupts(at_once=True) as interrupts:
            context.check_equal([record["id"] for record in records], f"{args.split} clips")
            folder = layout.features / args.split
            reader = SplitReader(captioner, records, folder, args.batch_size, context, interrupts.check)
            result = evaluate(plan, reader)
    except Interrupted as signal:
        context.print_main(f"{signal}: nothing was written")
        return signal.code
    if context.is_main:
        write(args, result, layout, captioner)
    context.close()
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(__doc__)
    add = parser.group("data").add_argument
    add("--data", type=Path, default=dataset.DEFAULT_DATA, help="the dataset's folder, in SSv2's layout")
    add("--checkpoint", type=Path, default=Path("checkpoint.pt"), help="a file of train.py, or a folder made from one")
    add("--split", default="validation", choices=dataset.SPLITS, help="test only where its answers are at hand")
    add("--max-missing", type=cli.amount, default=1.0, help="percent of the clips that may lack features")
    add("--results", type=Path, default=Path("results"), help="folder for evaluation.json and the page")
    add("--copy-videos", action="store_true", help="copy the clips beside the page, to publish it")
    add = parser.group("captions").add_argument
    add("--max-new-tokens", type=cli.count, default=50, help="longest caption, in tokens")
    add("--num-beams", type=cli.count, default=1, help="beams of the search; 1: greedy")
    add = parser.group("scores").add_argument
    add("--actions", action="store_true", help="also classify actions by the likelihood of all templates")
    add("--grounding", action="store_true", help="also score shuffled features, no features, and reversed clips")
    add("--reversed-clips", type=int, default=1000, help="clips that --grounding plays backwards, at most; 0: none")
    add("--no-meteor", action="store_true", help="leave METEOR out, the slowest score by far")
    add("--seed", type=int, default=0, help="decides the shuffle, the reversed clips and the bootstrap's samples")
    running = parser.group("running")
    add = running.add_argument
    add("--llm", help="where the language model is now, if not where the checkpoint says")
    add("--encoder", help="where the video encoder is now, if not where the checkpoint says (for --grounding)")
    cli.add_device(running)
    add("--batch-size", type=cli.count, default=64, help="clips that are captioned at once")
    add("--clip-timeout", type=cli.positive, default=60.0, help="seconds that one clip may take to decode")
    add("--java-timeout", type=cli.positive, default=300.0, help="seconds that Java may take, and 0.01 a caption")
    return parser.parse_args(argv)


class Plan:
    """What a split is scored with, all of it read before the first clip is captioned.

    Raises: UserError where some of it is not there, or not what it should be.
    """

    def __init__(self, args: argparse.Namespace, records: list[dataset.Record], layout: dataset.Layout) -> None:
        self.args, self.layout = args, layout
        self.settings = {"max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams}
        self.scorer = scores.Scorer(records, layout, args.java_timeout, args.seed)
        learnt = dataset.read_ready(args.data, "train") if args.actions or args.grounding else []
        self.common = grounding.most_common_caption(learnt) if args.grounding else ""
        self.pairs = grounding.opposites(args.data) if args.grounding else {}
        # SSv2's templates begin with a capital, its labels do not, and a capital alone costs a text its likelihood:
        # templates are scored as most training captions are written.
        lower = sum(record["label"][0][:1].islower() for record in learnt) * 2 > len(learnt)
        templates = dataset.read_templates(args.data) if args.actions else []
        texts = (as_text(template.lower() if lower else template) for template in templates)
        self.actions = dict(zip(map(template_key, templates), map(dataset.clean, texts), strict=True))
        unknown = [r for r in records if template_key(r.get("template") or "") not in self.actions]
        if args.actions and unknown:
            clip, template = unknown[0]["id"], unknown[0].get("template")
            raise files.UserError(f"--actions: labels.json does not hold clip {clip}'s template {template!r}")

    def rank_actions(self, reader: SplitReader) -> dict[str, int]:
        """By clip id: how many of all templates are likelier than the clip's own."""
        captioner, clips, texts = reader.captioner, len(reader.records), list(self.actions.values())
        tokens = sum(len(captioner.caption_ids(text)) for text in texts) + captioner.prefix_length
        weights = sum(parameter.numel() for parameter in captioner.lm.parameters())
        reader.context.print_main(
            f"actions: {len(texts)} templates for {clips:,} clips: {tokens:,} tokens a clip through "
            f"{weights / 1e6:,.3g} M parameters, {2 * weights * tokens * clips / 1e12:,.3g} TFLOP in all"
        )

        def ranks(part: list[dataset.Record], features: Tensor) -> list[int]:
            order = captioner.log_likelihood(features, texts).argsort(dim=1, descending=True, stable=True)
            own = [list(self.actions).index(template_key(record["template"])) for record in part]
            return order.argsort(dim=1)[range(len(own)), own].tolist()

        return reader.each(ranks, "actions")

    def caption_reversed(self, reader: SplitReader) -> dict[str, str]:
        """Captions of clips played backwards, where their videos are at hand and their action has an opposite."""
        from video.workers import Workers

        args, context, captioner = self.args, reader.context, reader.captioner
        moving = [r["id"] for r in reader.records if template_key(r.get("template") or "") in self.pairs]
        videos = {clip_id: path for clip_id in sorted(moving) if (path := self.layout.video(clip_id))}
        drawn = sorted(random.Random(args.seed).sample(list(videos), min(args.reversed_clips, len(videos))))
        if not drawn or captioner.config["features"] is None:
            context.print_main("reversed: no clip with an opposite action is at hand as a video; left out")
            return {}
        if len(drawn) < len(videos):
            context.print_main(f"reversed: {len(drawn):,} of {len(videos):,} clips, drawn at random (--reversed-clips)")
        mine = {clip_id: videos[clip_id] for clip_id in context.shard(drawn)}
        count = max(1, (os.cpu_count() or 1) // context.world_size)
        with Workers(count, args.clip_timeout) as workers:  # they start while the encoder loads
            found = grounding.reversed_captions(captioner, mine, workers, args.batch_size, **self.settings)
        merged = {clip_id: text for part in context.gather(found) for clip_id, text in part.items()}
        return {clip_id: merged[clip_id] for clip_id in drawn if clip_id in merged}


def evaluate(plan: Plan, reader: SplitReader) -> dict[str, Any]:
    """All that evaluation.json holds of the captions. All processes caption; the main one scores."""
    args, captions = plan.args, reader.captions(**plan.settings)
    ranks = plan.rank_actions(reader).values() if args.actions else []
    others, backwards = None, {}
    if args.grounding and len(reader.records) > 1:
        others = reader.captions(**plan.settings, sources=shuffled(reader.records, args.seed))
    if args.grounding and args.reversed_clips > 0:
        backwards = plan.caption_reversed(reader)
    if not reader.context.is_main:
        return {}
    result = {"split": args.split, **plan.scorer.scores(captions, meteor=not args.no_meteor)}
    if args.actions:
        result["actions"] = plan.scorer.means({f"top{n}": [rank < n for rank in ranks] for n in (1, 5)})
    if args.grounding:
        lies = {"shuffled": others, "most_common": dict.fromkeys(captions, plan.common), "reversed": backwards}
        # The reversed clips are some of all: their score stands beside the same clips' forwards.
        lies["forwards"] = {clip_id: captions[clip_id] for clip_id in backwards}
        result["grounding"] = plan.scorer.grounding(lies, plan.pairs)
        result["grounding"] |= {"most_common_caption": plan.common, "reversed_clips": len(backwards)}
    return result


def write(args: argparse.Namespace, result: dict[str, Any], layout: dataset.Layout, captioner: VideoCaptioner) -> None:
    """evaluation.json, the page, and the table on the screen."""
    epoch = captioner.epoch  # of what was evaluated: training may have written the next checkpoint since
    result = {"checkpoint": str(args.checkpoint), "epoch": epoch, **result, "made_by": provenance.made_by()}
    files.write_json(args.results / "evaluation.json", result)
    page, copies = args.results / "index.html", args.results / "videos" if args.copy_videos else None
    report.write_scored_page(page, f"Captions of the {args.split} split", result, layout, captioner.history, copies)
    for note in result["notes"]:
        print(files.printable(note))
    print(f"{args.checkpoint}, epoch {epoch}, {args.split}: {result['clips']:,} clips, {result['tokenizer']}")
    rows = scores.table(result)
    width = max(len(row["name"]) for row in rows)
    for group, members in itertools.groupby(rows, key=lambda row: row["group"]):
        print(group)
        for row in members:
            interval = "" if row["low"] is None else f"  [{row['low']:.4f}, {row['high']:.4f}]"
            value = "none" if row["value"] is None else f"{row['value']:.4f}"
            note = f"  ({row['note']})" if row["note"] and row["note"] not in result["notes"] else ""
            print(f"  {row['name']:<{width}}  {value:>8}{interval}{note}")
    print(f"written: {args.results / 'evaluation.json'}, page: {page}")


if __name__ == "__main__":
    cli.run(main)
