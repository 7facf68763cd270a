"""Score a checkpoint on a whole split: n-gram scores, SSv2's own actions and objects, and whether it looks."""

import argparse
import random
import statistics
from pathlib import Path
from typing import Any

import runtime.threads  # noqa: F401  how torch's threads wait
from torch import Tensor

import dataset
from evaluation import attention, comparison, report, scores
from evaluation.captioning import SplitReader, reversed_captions, shuffled
from evaluation.ssv2 import as_text, opposites, template_key
from features.cache import check_same_features
from models import checkpoint, pretrained
from qformer import VideoCaptioner
from runtime import cli, files, provenance
from runtime.distributed import DistributedContext
from runtime.signals import Interrupts


def main(argv: list[str] | None = None) -> int:
    """Caption a split, score the captions, write evaluation.json and the page."""
    args = parse(argv)
    context = DistributedContext(args.device)
    pretrained.tell(f"captions by {args.checkpoint}")
    layout = dataset.Layout(args.data)
    made = checkpoint.read(args.checkpoint).config["features"] if args.checkpoint.exists() else None
    records = dataset.usable_records(layout, args.split, args.max_missing, context, made)  # before the models load
    other = args.compare and comparison.read(args.compare, args.split, records, args.results / "evaluation.json")
    if context.is_main:
        files.check_writable(args.results)  # now, not after an hour's work
    captioner = VideoCaptioner.from_checkpoint(args.checkpoint, context.device, args.llm, args.encoder)
    config = captioner.config  # --encoder may name the features' encoder anew
    check_same_features(config["features"], layout.features, args.checkpoint, config.get("published", False))
    with Interrupts(at_once=True):
        context.check_equal([record["id"] for record in records], f"{args.split} clips")
        folder = layout.features / args.split
        reader = SplitReader(captioner, records, folder, args.batch_size, context)
        where = None
        if args.attention is not None:
            where = attention.Attention(reader, layout, args.attention, args.seed, args.queries)
        result = evaluate(args, layout, reader, where, other)
        if context.is_main:
            write(args, result, layout, captioner, where)
            tell(args, result, captioner.epoch)
    context.close()
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, default=dataset.DEFAULT_DATA, help="the dataset's folder, in SSv2's layout")
    add("--checkpoint", type=Path, default=checkpoint.default(), help=checkpoint.HELP)
    add("--split", default="validation", choices=dataset.SPLITS, help="test only where its answers are at hand")
    add("--max-missing", type=cli.amount, default=1.0, help="percent of the clips that may lack features")
    add("--results", type=Path, default=Path("results"), help="folder for evaluation.json and the page")
    add("--copy-videos", action="store_true", help="copy the clips beside the page, to publish it")
    add = parser.add_argument_group("captions").add_argument
    add("--max-new-tokens", type=cli.count, default=50, help="longest caption, in tokens")
    add("--num-beams", type=cli.count, default=1, help="beams of the search; 1: greedy")
    add = parser.add_argument_group("scores").add_argument
    add("--actions", action="store_true", help="also classify actions by the likelihood of all templates")
    add("--grounding", action="store_true", help="also score shuffled features, no features, and reversed clips")
    add("--reversed-clips", type=cli.whole, default=1000, help="clips that --grounding plays backwards, at most")
    where = "also score where it looks, given labels/boxes.json, and draw that over so many clips, taken at random"
    add("--attention", type=cli.whole, metavar="CLIPS", help=where)
    add("--queries", type=cli.whole, nargs="+", default=[], help="with --attention: draw these queries, too, from 0")
    add("--compare", type=Path, metavar="JSON", help="another run's evaluation.json: also score the differences to it")
    add("--no-meteor", action="store_true", help="leave METEOR out, the slowest score by far")
    add("--seed", type=cli.whole, default=0, help="decides the shuffle, which clips are taken, and the bootstrap")
    add = parser.add_argument_group("running").add_argument
    add("--llm", help="where the language model is now, if not where the checkpoint says")
    add("--encoder", help="where the video encoder is now, if not where the checkpoint says (for --grounding)")
    add("--device", help=cli.DEVICE)
    add("--batch-size", type=cli.count, default=64, help="clips that are captioned at once")
    add("--clip-timeout", type=cli.positive, default=60.0, help="seconds that one clip may take to decode")
    add("--java-timeout", type=cli.positive, default=300.0, help="seconds that Java may take, and 0.01 a caption")
    args = parser.parse_args(argv)
    if args.queries and args.attention is None:
        raise files.UserError("--queries are drawn with --attention: give --attention CLIPS as well")
    return args


def evaluate(
    args: argparse.Namespace,
    layout: dataset.Layout,
    reader: SplitReader,
    where: attention.Attention | None = None,
    other: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """All that evaluation.json holds of the captions; what that needs is read before the first clip is captioned.

    `where`: scores where the captioner looks. `other`: the evaluation.json of a run to compare with.
    """
    scorer = scores.Scorer(reader.records, layout, args.java_timeout, args.seed)
    pairs = opposites(layout) if args.grounding else {}
    learnt = dataset.read_ready(args.data, "train") if args.actions or args.grounding else []
    labels = sorted(record["label"][0] for record in learnt)
    ranks = rank_actions(args, labels, reader) if args.actions else {}
    captions, lies = reader.captions(args.max_new_tokens, args.num_beams), {}
    if args.grounding:
        lies["shuffled"] = reader.captions(args.max_new_tokens, args.num_beams, shuffled(reader.records, args.seed))
        common = statistics.mode(labels)  # what a captioner that sees nothing had best say
        lies["most_common"] = dict.fromkeys(captions, common)
        lies["reversed"] = caption_reversed(args, layout, pairs, reader)
        # The reversed clips are some of all: their score stands beside the same clips' forwards.
        lies["forwards"] = {clip_id: captions[clip_id] for clip_id in lies["reversed"]}
    looked = where.look() if where else {}  # all processes take part
    if not reader.context.is_main:
        return {}
    result = {"split": args.split, **scorer.scores(captions, meteor=not args.no_meteor)}
    if args.actions:
        result["actions"] = scores.action_scores(list(ranks.values()), args.seed).summary()
    if args.grounding:
        counts = {"most_common_caption": common, "reversed_clips": len(lies["reversed"])}
        result["grounding"] = {**scorer.grounding(lies, pairs).summary(), **counts}
    if where:
        result["attention"] = where.scores(looked)
    per_clip = {"rank": ranks, "shuffled": lies.get("shuffled", {}), "reversed": lies.get("reversed", {})}
    whole = ("on_objects", "area", "ratio", "on_others")  # each query's share would be most of the file
    attended = {clip_id: {name: shares[name] for name in whole} for clip_id, (_, shares) in looked.items() if shares}
    per_clip["attention"] = attended
    for row in result["predictions"]:
        row |= {name: found[row["id"]] for name, found in per_clip.items() if row["id"] in found}
    if other:
        result["compared"] = comparison.compare(result, other, scorer, pairs)
    return result


def rank_actions(args: argparse.Namespace, labels: list[str], reader: SplitReader) -> dict[str, int]:
    """By clip id: the rank of its template, 1 if it is the likeliest of all. Raises: UserError where it has none."""
    # SSv2's templates begin with a capital, its labels do not, and a capital alone costs a text its likelihood:
    # templates are scored as most training labels are written.
    lower = sum(label[:1].islower() for label in labels) * 2 > len(labels)
    templates = (template.lower() if lower else template for template in dataset.read_templates(args.data))
    actions = {template_key(template): dataset.clean(as_text(template)) for template in templates}
    for clip, template in [(record["id"], record.get("template")) for record in reader.records]:
        if template_key(template) not in actions:
            raise files.UserError(f"--actions: labels.json does not hold clip {clip}'s template {template!r}")

    def ranks(part: list[dataset.Record], features: Tensor) -> list[int]:
        likelihoods = reader.captioner.log_likelihood(features, list(actions.values()))
        order = likelihoods.argsort(dim=1, descending=True, stable=True)
        own = [list(actions).index(template_key(record["template"])) for record in part]
        return (order.argsort(dim=1)[range(len(own)), own] + 1).tolist()

    return reader.each(ranks, "actions")


def caption_reversed(
    args: argparse.Namespace, layout: dataset.Layout, pairs: dict[str, str], reader: SplitReader
) -> dict[str, str]:
    """Captions of clips played backwards, where their videos are at hand and their action has an opposite (`pairs`)."""
    can_encode = reader.captioner.config["features"] is not None
    moving = sorted(r["id"] for r in reader.records if can_encode and template_key(r.get("template")) in pairs)
    videos = {clip_id: path for clip_id in moving if (path := layout.video(clip_id))}
    drawn = random.Random(args.seed).sample(list(videos), min(args.reversed_clips, len(videos)))
    clips = f"{len(drawn):,} of {len(videos):,} clips that have a video and an action with an opposite"
    reader.context.print_main(f"reversed: {clips} (--reversed-clips, drawn at random)")
    if not drawn:
        return {}
    drawn = {clip_id: videos[clip_id] for clip_id in sorted(drawn)}
    return reversed_captions(reader, drawn, args.clip_timeout, args.max_new_tokens, args.num_beams)


def write(
    args: argparse.Namespace,
    result: dict[str, Any],
    layout: dataset.Layout,
    captioner: VideoCaptioner,
    where: attention.Attention | None,
) -> None:
    """evaluation.json, the overlays and the page."""
    epoch = captioner.epoch  # of what was evaluated: training may have written the next checkpoint since
    made = {"recipe": report.recipe(captioner), "made_by": provenance.made_by()}
    result = {"checkpoint": str(args.checkpoint), "epoch": epoch, **result, **made}
    files.write_json(args.results / "evaluation.json", result)
    if where:  # drawn when the scores are safe: an interrupt does not lose them
        where.draw(args.results, args.clip_timeout, result["predictions"])
        files.write_json(args.results / "evaluation.json", result)
    page, copies = args.results / "index.html", args.results / "videos" if args.copy_videos else None
    title, links = f"Captions of the {args.split} split", [("evaluation.json", "evaluation.json")]
    report.write_scored_page(page, title, result, layout, captioner.history, copies, links)
    report.link_pages(args.results)


def tell(args: argparse.Namespace, result: dict[str, Any], epoch: int) -> None:
    """The table on the screen."""
    print(f"{args.checkpoint}, epoch {epoch}, {args.split}: {result['clips']:,} clips, {result['tokenizer']}")
    if compared := result.get("compared"):
        counts = ", ".join(f"{compared[change]:,} {change}" for change in ("better", "same", "worse"))
        other = f"{compared['path']}, {compared['checkpoint']}, epoch {compared['epoch']}"
        print(files.printable(f"compared with {other}, on {compared['clips']:,} clips: {counts} (by CIDEr)"))
    for row in scores.table(result):
        value = "none" if row["value"] is None else f"{row['value']:.4f}"
        interval = "" if row["low"] is None else f"  [{row['low']:.4f}, {row['high']:.4f}]"
        note = f"  ({row['note']})" if row["note"] else ""
        gain = "" if row["difference"] is None else f"  difference {row['difference']:+.4f}"
        gain += "" if row["gain_low"] is None else f" [{row['gain_low']:+.4f}, {row['gain_high']:+.4f}]"
        print(files.printable(f"{row['group']:<14}  {row['name']:<50}  {value:>8}{interval}{gain}{note}"))
    print(f"written: {args.results / 'evaluation.json'}, page: {args.results / 'index.html'}")


if __name__ == "__main__":
    cli.run(main)
