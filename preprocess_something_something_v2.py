"""Encode Something-Something V2's clips with a frozen V-JEPA 2, once: features/<split>/<id>.pt.

Worker processes decode, this process encodes, threads write. Interrupt it at any time: what is cached is skipped.
"""

import argparse
import json
import os
import random
import shutil
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import runtime.threads  # noqa: F401  how torch's threads wait
import torch

import dataset
from features import cache
from features.cache import CacheConfig, Packed
from models.vjepa2 import DEFAULT_ENCODER, VideoEncoder
from runtime import cli, files
from runtime.distributed import DistributedContext
from runtime.files import UserError
from runtime.progress import Progress
from runtime.signals import Interrupts
from video.workers import Workers, batches

NAMED = 20  # failures that the closing summary names; all of them are in failures.jsonl
WRITERS = 8  # threads; each waits for the disk most of its time

Clip = tuple[Path, Path]  # the file of its features, and its video
Failures = dict[Path, str]  # the reason, by the file of the features that there are not


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
    splits = "what to encode (default: train validation; of your own data set, all there is)"
    add("--splits", nargs="+", choices=dataset.SPLITS, help=splits)
    add("--limit", type=cli.count, metavar="N", help="a rehearsal: only the first N clips of each split")
    add("--encoder", default=DEFAULT_ENCODER, help="V-JEPA 2: a hub name or a local folder")
    add("--num-frames", "--frames", type=cli.count, default=32, help="frames sampled uniformly over a clip")
    add("--crop", action="store_true", help="resize the shortest edge and crop the centre: no squashed frames")
    add("--dtype", choices=list(cache.DTYPES), default="float16", help="what features are kept as; int8: half the disk")
    add("--pool", type=int, choices=cache.POOLS, default=1, help="keep the mean of POOL x POOL patches of a time step")
    add("--batch-size", type=cli.count, help="clips encoded at once (default: by the tokens of a clip, at most 16)")
    add("--workers", type=cli.count, default=cores(), help="processes that decode, for each process that encodes")
    add("--clip-timeout", type=cli.positive, default=60.0, help="seconds that decoding one clip may take")
    add("--device", help=cli.DEVICE)
    return parser.parse_args(argv)


def cores() -> int:
    """Processor cores for this process, among those of this machine that torchrun started."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def preprocess(args: argparse.Namespace, context: DistributedContext, workers: Workers) -> int:
    """The whole stage; returns the exit code."""
    layout = dataset.Layout(args.data)
    if layout.own and not layout.own["folder"]:
        raise UserError(f"{layout.name} has no videos to encode: {layout.video_advice}")
    names = args.splits or (layout.splits if layout.own else ["train", "validation"])
    splits = {name: [record["id"] for record in dataset.read_split(args.data, name)[: args.limit]] for name in names}
    encoder = VideoEncoder(args.encoder, context.device, args.num_frames, args.crop)
    if (side := encoder.grid[1]) % args.pool:
        raise UserError(f"--pool {args.pool} does not divide the {side} x {side} patches of this encoder; use --pool 1")
    config = encoder.cache_config(args.dtype, args.pool)
    plan = make_plan(splits, layout, config) if context.is_main else None
    clips, missing = context.gather(plan)[0]  # all ranks share one list, whatever other runs write meanwhile
    failures = dict(missing)
    try:
        with Interrupts(at_once=True):  # every file is whole or not there at any moment
            encode_clips(context, clips, failures, encoder, config, args.batch_size, workers)
            for others in context.gather(failures):
                failures |= others
    finally:
        if context.is_main:
            write_failures(failures, layout, splits)
    context.print_main(f"encoded {len(clips) + len(missing) - len(failures)} clips into {layout.features}")
    context.close()
    if missing and context.is_main:
        advice = f"add these ({layout.video_advice}), and run this once more"
        raise UserError(f"{len(missing)} clips of {layout.name} have no video in {layout.videos}; {advice}")
    return 0


def encode_clips(
    context: DistributedContext,
    clips: list[Clip],
    failures: Failures,
    encoder: VideoEncoder,
    config: CacheConfig,
    batch_size: int | None,
    workers: Workers,
) -> None:
    """Decode, encode and save this rank's share of `clips`; those that fail go into `failures`.

    Raises: OSError where a file cannot be written.
    """
    if not (clips := context.shard(clips)):
        return
    # Asked again when its turn comes: another run in this folder may have encoded it by now.
    jobs = (clip for clip in clips if not cache.is_cached(clip[0], config))
    decoded = workers.read_clips(jobs, encoder.transform, encoder.frames)
    writing: deque[Future] = deque()
    with (
        Progress(total=len(clips), desc="encoding", unit="clip", disable=not context.is_main) as bar,
        ThreadPoolExecutor(WRITERS) as writers,
    ):
        size = encoder.prepare(batch_size)
        for batch in batches(decoded, size):
            for path, _, error, warning, *_ in batch:
                if reason := error or (warning and f"{warning}; download it again"):
                    failures[path] = reason
            whole = [clip for clip in batch if clip.key not in failures]
            if whole:
                features = encoder.encode(torch.stack([clip.frames for clip in whole]))  # (B, N, D)
                for clip, tokens in zip(whole, features, strict=True):
                    packed = cache.quantize(tokens, config.dtype, config.pool, encoder.grid)
                    writing.append(writers.submit(save, clip.key, packed, failures))
            while len(writing) > 2 * size:  # a disk slower than the encoder must not fill the memory
                writing.popleft().result()
            bar.update(len(batch))
        for written in writing:
            written.result()
        bar.update(len(clips) - bar.n)  # what another run encoded


def save(path: Path, packed: Packed, failures: Failures) -> None:
    """Write one clip's features, or why they cannot be kept."""
    try:
        cache.save(path, packed)
    except ValueError as error:
        failures[path] = str(error)


def make_plan(splits: dict[str, list[str]], layout: dataset.Layout, config: CacheConfig) -> tuple[list[Clip], Failures]:
    """The clips to encode, and those that have no video; says what is to be written.

    Raises: UserError where there is no video at all, the cache is another one, or the disk cannot hold the features.
    """
    cache.check_config(layout.features, config)
    clips, missing, cached = [], {}, 0
    for split, ids in splits.items():
        for clip_id in Progress(ids, f"looking for {split}", unit="clip", leave=False):
            path = layout.features / split / f"{clip_id}.pt"
            if cache.is_cached(path, config):
                cached += 1
            elif (video := layout.video(clip_id)) is not None:
                clips.append((path, video))
            else:
                missing[path] = "there is no video"
    if missing and not clips and not cached:
        raise UserError(f"there is no video of any clip in {layout.videos}; {layout.video_advice}")
    size = cache.bytes_per_clip(config)
    needed = Progress.format_sizeof(len(clips) * size, "B")
    without = f", {len(missing)} without a video" if missing else ""
    print(f"{', '.join(splits)}: {cached} clips cached, {len(clips)} to encode{without}; {needed} to write", flush=True)
    free = shutil.disk_usage(layout.features if layout.features.exists() else layout.data).free
    if free < len(clips) * (size + 4096):  # disks give out whole blocks
        raise UserError(
            f"the disk of {layout.features} has {Progress.format_sizeof(free, 'B')} free, the features need {needed}; "
            "free some, give another --data, or keep them smaller with --dtype int8 or --pool 2"
        )
    if not cache.check_config(layout.features, config):  # asked again: another run may have begun meanwhile
        files.write_json(layout.features / "config.json", config.to_dict())
    files.remove_unfinished(layout.features)
    random.Random().shuffle(clips)  # two runs that meet in one folder work on different clips until few are left
    return clips, missing


def write_failures(failures: Failures, layout: dataset.Layout, splits: dict[str, list[str]]) -> None:
    """Write features/<split>/failures.jsonl, none where nothing failed, and name the first ones."""
    for split in splits:
        path = layout.features / split / "failures.jsonl"
        rows = [{"id": of.stem, "reason": failures[of]} for of in sorted(failures) if of.parent == path.parent]
        if not rows:
            path.unlink(missing_ok=True)
            continue
        files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{len(rows)} clips of {split} failed: {path}; they are tried again when this is run again")
        for row in rows[:NAMED]:
            print(files.printable(f"  {layout.source(row['id']) or row['id']}: {row['reason']}"))


if __name__ == "__main__":
    cli.run(main)
