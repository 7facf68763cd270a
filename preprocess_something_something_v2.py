"""Encode Something-Something V2's clips with a frozen V-JEPA 2, once: features/<split>/<id>.pt.

Worker processes decode, this process encodes, threads write. Interrupt it at any time: what is cached is skipped.
"""

import argparse
import json
import math
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import runtime.threads  # noqa: F401  how torch's threads wait

import torch
from tqdm import tqdm

import dataset
from features import cache
from features.cache import CacheConfig
from features.writer import Writer
from models.vjepa2 import DEFAULT_ENCODER, VideoEncoder
from runtime import cli, files
from runtime.distributed import DistributedContext
from runtime.files import UserError
from runtime.signals import Interrupted, Interrupts
from video.workers import Workers, batches

NAMED = 20  # failures that the closing summary names; all of them are in failures.jsonl


class Clip(NamedTuple):
    """One clip to encode."""

    split: str
    id: str
    video: Path


Failures = dict[tuple[str, str], str]  # (split, id): reason


def main(argv: list[str] | None = None) -> int:
    """Encode what is not cached yet. Raises: UserError at the end where clips have no video."""
    args = parse(argv)
    with Workers(args.workers, args.clip_timeout) as workers:  # they start while the encoder loads
        return preprocess(args, DistributedContext(args.device), workers)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; the defaults are the published recipe."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=dataset.DEFAULT_DATA, help="the dataset's folder, in SSv2's layout")
    add("--splits", nargs="+", choices=dataset.SPLITS, default=["train", "validation"], help="what to encode")
    add("--encoder", default=DEFAULT_ENCODER, help="V-JEPA 2: a hub name or a local folder")
    add("--num-frames", "--frames", type=cli.count, default=32, help="frames sampled uniformly over a clip")
    add("--crop", action="store_true", help="resize the shortest edge and crop the centre: no squashed frames")
    add("--dtype", choices=list(cache.DTYPES), default="float16", help="what features are kept as; int8: half the disk")
    add("--pool", type=int, choices=cache.POOLS, default=1, help="keep the mean of POOL x POOL patches of a time step")
    add("--batch-size", type=cli.count, help="clips encoded at once (default: by the tokens of a clip, at most 16)")
    add("--workers", type=cli.count, default=cores(), help="processes that decode, for each process that encodes")
    add("--clip-timeout", type=cli.positive, default=60.0, help="seconds that decoding one clip may take")
    cli.add_device(parser)
    return parser.parse_args(argv)


def cores() -> int:
    """Processor cores for this process, among those of this machine that torchrun started."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def preprocess(args: argparse.Namespace, context: DistributedContext, workers: Workers) -> int:
    """The whole stage; returns the exit code."""
    splits = {split: [r["id"] for r in dataset.read_split(args.data, split)] for split in dict.fromkeys(args.splits)}
    layout = dataset.Layout(args.data)
    encoder = VideoEncoder(args.encoder, context.device, args.num_frames, args.crop)
    cache.check_pool(encoder.grid, args.pool)
    config = encoder.cache_config(args.dtype, args.pool)
    plan = make_plan(splits, layout, config) if context.is_main else None
    clips, missing = context.gather(plan)[0]  # all ranks share one list, whatever other runs write meanwhile
    failures: Failures = {}
    try:
        with Interrupts(at_once=True):  # every file is whole or not there at any moment
            encode_clips(context, clips, failures, encoder, config, layout, args.batch_size, workers)
    except Interrupted as interrupted:
        write_failures(failures | missing, splits, layout)
        context.print_main(f"{interrupted}: what is encoded is kept; the same command goes on from there")
        return interrupted.code
    for others in context.gather(failures):
        failures |= others
    if context.is_main:
        write_failures(failures | missing, splits, layout)
        summarize(len(clips), failures, layout)
    context.close()
    if missing and context.is_main:
        split, clip_id = next(iter(missing))
        raise UserError(
            f"{len(missing)} clips of the labels have no video (the first: {clip_id} of {split}) in {layout.videos}; "
            "all others are done: add the videos and run this again, or take the ids out of the labels"
        )
    return 0


def encode_clips(
    context: DistributedContext,
    clips: list[Clip],
    failures: Failures,
    encoder: VideoEncoder,
    config: CacheConfig,
    layout: dataset.Layout,
    batch_size: int | None,
    workers: Workers,
) -> None:
    """Decode, encode and save this rank's share of `clips`; those that fail go into `failures`.

    Raises: OSError where a file cannot be written.
    """
    if not (clips := context.shard(clips)):
        return

    def path_of(clip: Clip) -> Path:
        return layout.feature_folder(clip.split) / f"{clip.id}.pt"

    # Asked again when its turn comes: another run in this folder may have encoded it by now.
    jobs = ((clip, clip.video) for clip in clips if not cache.is_cached(path_of(clip), config))
    decoded = workers.read_clips(jobs, encoder.transform, encoder.frames)
    size = encoder.prepare(batch_size)
    with (
        tqdm(total=len(clips), desc="encoding", unit="clip", disable=None if context.is_main else True) as bar,
        Writer(failures) as writer,
    ):
        for batch in batches(decoded, size):
            for clip, _, error, warning, *_ in batch:
                if reason := error or (warning and f"{warning}; download it again"):
                    failures[clip.split, clip.id] = reason
            whole = [clip for clip in batch if (clip.key.split, clip.key.id) not in failures]
            if whole:
                features = encoder.encode(torch.stack([clip.frames for clip in whole]))  # (B, N, D)
                keys = [((clip.key.split, clip.key.id), path_of(clip.key)) for clip in whole]
                writer.write(keys, cache.quantize(features, config.dtype, config.pool, encoder.grid))
            bar.update(len(batch))
        bar.update(len(clips) - bar.n)  # what another run encoded


def make_plan(splits: dict[str, list[str]], layout: dataset.Layout, config: CacheConfig) -> tuple[list[Clip], Failures]:
    """The clips to encode, and those that have no video; says what is to be written.

    Raises: UserError where there is no video at all, the cache is another one, or the disk cannot hold the features.
    """
    cache.check_config(layout.features, config)
    clips, missing, cached = [], {}, 0
    for split, ids in splits.items():
        folder = layout.feature_folder(split)
        for clip_id in ids:
            if cache.is_cached(folder / f"{clip_id}.pt", config):
                cached += 1
            elif (video := layout.video(clip_id)) is not None:
                clips.append(Clip(split, clip_id, video))
            else:
                missing[split, clip_id] = "there is no video"
    if missing and not clips and not cached:
        raise UserError(f"there is no video of any clip in {layout.videos}; put SSv2's <id>.webm files there")
    size = cache.bytes_per_clip(config)
    total = len(clips) + len(missing) + cached
    print(
        f"{total} clips ({', '.join(splits)}): {cached} cached, {len(clips)} to encode"
        + (f", {len(missing)} without a video" if missing else "")
        + f"; {size:,} bytes a clip, {human(size * len(clips))} to write, {human(size * total)} in all",
        flush=True,
    )
    disk = next(place for place in (layout.features, *layout.features.absolute().parents) if place.exists())
    free = shutil.disk_usage(disk).free
    if free < len(clips) * math.ceil(size / 4096) * 4096:  # disks give out whole blocks
        raise UserError(
            f"the disk of {layout.features} has {human(free)} free, the features need {human(size * len(clips))}; free "
            "some, give another --data, or keep them smaller with --dtype int8 or --pool 2"
        )
    cache.claim_config(layout.features, config)
    for folder in (layout.features, *map(layout.feature_folder, splits)):
        for unfinished in folder.glob(".*.tmp"):  # by a run that was killed
            unfinished.unlink(missing_ok=True)
    random.Random().shuffle(clips)  # two runs that meet in one folder work on different clips until few are left
    return clips, missing


def human(count: int) -> str:
    """Bytes as people say them: 8.39MB."""
    return tqdm.format_sizeof(count, "B")


def write_failures(failures: Failures, splits: dict[str, list[str]], layout: dataset.Layout) -> None:
    """features/<split>/failures.jsonl, in the labels' order; none where nothing failed."""
    for split, ids in splits.items():
        path = layout.feature_folder(split) / "failures.jsonl"
        rows = [{"id": clip_id, "reason": failures[split, clip_id]} for clip_id in ids if (split, clip_id) in failures]
        if rows:
            files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        else:
            path.unlink(missing_ok=True)


def summarize(count: int, failures: Failures, layout: dataset.Layout) -> None:
    """Say what was encoded, and name what was not."""
    print(f"encoded {count - len(failures)} clips into {layout.features}")
    if failures:
        print(f"{len(failures)} clips failed:")
        for reason, times in Counter(failures.values()).most_common(NAMED):
            print(f"  {times} x {files.printable(reason)}")
        for (split, clip_id), reason in sorted(failures.items())[:NAMED]:
            print(f"  {split}/{clip_id}: {files.printable(reason)}")
        print(f"all of them: {layout.features}/<split>/failures.jsonl; they are tried again when this is run again")


if __name__ == "__main__":
    cli.run(main)
