"""Caption videos: clips of the test set, or any files and folders, of any length.

Writes results.json, copies of the videos, subtitles of long ones and a page to look at into RESULTS/inference.
A video that cannot be captioned is listed with its reason, and the run goes on; when none could be, the exit code is 1.
"""

import argparse
import contextlib
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import dataset
from evaluation import ngrams as metrics
from evaluation import report
from evaluation.ssv2 import TemplateReader
from qformer import VideoCaptioner
from runtime import cli as arguments
from runtime import files, provenance
from runtime.files import UserError
from video import gif
from video import paths as videos
from video import subtitles as timeline
from video.nursery import Nursery
from video.reader import VideoError, probe, read_frames
from video.windows import WindowDecoder
from video.workers import ClipDecoder, Failure

GIF_FRAMES = 48  # at most; a clip of SSv2 has about as many
GIF_FPS = 12.0
GIF_BYTES = 512 << 20  # of decoded frames that are in memory at once
LINES_SHOWN = 20  # of a long video's captions, on the screen


@dataclass
class Clip:
    """A video to caption and, as the run goes on, what came of it."""

    id: str  # the test set's, or its copy's name without the suffix
    path: Path
    name: str = ""  # of its copy
    references: list[str] = field(default_factory=list)
    windows: list[tuple[float, float]] = field(default_factory=list)  # seconds; none: the whole clip at once
    captions: list[str | None] = field(default_factory=lambda: [None])  # one a window, or one
    errors: list[str | None] = field(default_factory=lambda: [None])  # why that caption is missing
    error: str | None = None  # why there is no caption at all

    @property
    def segments(self) -> list[timeline.Segment]:
        """The captions of a windowed video, merged."""
        return timeline.segments(self.windows, self.captions) if self.windows and self.captions else []

    @property
    def prediction(self) -> str | None:
        """The clip's caption; a windowed video has one where all its windows say the same."""
        captions = [part.caption for part in self.segments] if self.windows else self.captions
        return captions[0] if len(captions) == 1 and not self.error else None


def main(argv: list[str] | None = None) -> int:
    """Caption what the command line names. Returns 1 where no video could be captioned."""
    args = parse(argv)
    folder = args.results / "inference"
    if args.video:
        clips = [Clip("", path) for path in videos.find(args.video, folder)]
    else:
        clips = choose_test_clips(args.data, args.num_samples, args.seed)
    for clip, name in zip(clips, videos.copy_names([clip.path for clip in clips], folder), strict=True):
        clip.name, clip.id = name, clip.id or Path(name).stem
    files.check_writable(folder)  # now, not after an hour's work
    starting = contextlib.nullcontext() if args.window else contextlib.closing(Nursery())
    with starting as nursery:  # the processes that decode start while the models load
        captioner = load_captioner(args)
        caption_clips(captioner, clips, args, nursery)
    made_by = provenance.made_by(argv)
    write_results(clips, folder, captioner.config, args, made_by)
    for clip in clips:
        if not clip.error:
            write_beside(clip, folder, args)
    write_page(clips, folder, args.data, made_by)
    return report_on_screen(clips, folder)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises: UserError where window and stride cannot cover a video."""
    parser = arguments.Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, default=Path("checkpoint.pt"), help="a checkpoint of train.py, file or folder")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--num-samples", type=arguments.count, default=10, help="how many clips of the test set to caption"
    )
    chosen.add_argument(
        "--video", nargs="+", type=Path, metavar="FILE_OR_FOLDER", help="caption these instead of the test set"
    )
    add("--data", type=Path, default=dataset.DEFAULT_DATA, help="the dataset's folder, for --num-samples")
    add("--seed", type=int, default=0, help="decides which clips of the test set are taken")
    add("--results", type=Path, default=Path("results"), help="everything is written to RESULTS/inference")
    add("--llm", help="where the language model is, if not where the checkpoint says: a hub name or a folder")
    add("--encoder", help="where the video encoder is, if not where the checkpoint says: a hub name or a folder")
    add("--window", type=float, help="caption long videos in windows of this many seconds; writes .json, .srt, .vtt")
    add("--stride", type=float, help="seconds from one window to the next, at most the window (without it: the window)")
    add("--gif", action="store_true", help="also write each clip as an animated GIF with its caption under it")
    add("--max-new-tokens", type=arguments.count, default=50, help="longest caption, in tokens")
    add("--num-beams", type=arguments.count, default=1, help="beams of the search for a caption; 1: greedy")
    add("--batch-size", type=arguments.count, default=8, help="clips or windows that are captioned at once")
    add("--workers", type=arguments.count, default=min(4, os.cpu_count() or 1), help="processes that decode videos")
    add("--clip-timeout", type=arguments.positive, default=60.0, help="seconds that decoding one clip may take")
    args = parser.parse_args(argv)
    if args.window is None and args.stride is not None:
        raise UserError("--stride is the step between windows: give --window SECONDS as well")
    if args.window is not None:
        args.stride = args.window if args.stride is None else args.stride
        timeline.check_window(args.window, args.stride)
        if args.gif:
            raise UserError("--gif draws one caption under a short clip; leave it out with --window")
    return args


# ---- which videos ----


def choose_test_clips(data: Path, count: int, seed: int) -> list[Clip]:
    """`count` clips of the test set, with their answers where there are any; a larger count adds to a smaller one's.

    Raises: UserError where there is no dataset, or no video of any of these clips.
    """
    ids = sorted(record["id"] for record in dataset.read_split(data, "test"))
    random.Random(seed).shuffle(ids)
    layout, answers = dataset.Layout(data), dataset.read_answers(data)
    clips = []
    for clip_id in ids[:count]:
        path = layout.video(clip_id) or layout.videos / f"{clip_id}.webm"
        clip = Clip(clip_id, path)
        clip.references = [answers[clip_id]] if clip_id in answers else []
        clip.error = None if path.is_file() else f"there is no video {path} (or .mp4)"
        clips.append(clip)
    if all(clip.error for clip in clips):
        raise UserError(f"{clips[0].error}, nor of the other test clips that were drawn; download SSv2's videos")
    return clips


# ---- captions ----


def load_captioner(args: argparse.Namespace) -> VideoCaptioner:
    """The captioner and the encoder that made its features. Raises: UserError where one does not load."""
    captioner = VideoCaptioner.from_checkpoint(args.checkpoint, llm=args.llm, encoder=args.encoder)
    if captioner.config["features"] is None:
        raise UserError(f"{args.checkpoint} does not say what made its features; train it with this project's train.py")
    return captioner


def caption_clips(
    captioner: VideoCaptioner, clips: list[Clip], args: argparse.Namespace, nursery: Nursery | None
) -> None:
    """Decode in processes of their own, caption in batches, and note each clip's captions or why there are none."""
    encoder, workers, timeout = captioner.encoder, args.workers, args.clip_timeout
    jobs = [(number, clip.path) for number, clip in enumerate(clips) if not clip.error]
    if args.window:
        decoder = WindowDecoder(jobs, args.window, args.stride, encoder.transform, encoder.frames, workers, timeout)
    else:
        jobs = [((number, 0), path) for number, path in jobs]
        decoder = ClipDecoder(jobs, encoder.transform, encoder.frames, workers, timeout, nursery=nursery)
    total, unit = (0, "window") if args.window else (len(jobs), "clip")
    with decoder, tqdm(total=total, desc="captions", unit=unit, disable=None) as bar:
        for keys, frames in batches(decoder, clips, args.batch_size, bar):
            texts = captioner.generate(captioner.encode(frames), args.max_new_tokens, args.num_beams)
            for (number, i), text in zip(keys, texts, strict=True):
                clips[number].captions[i] = text
            bar.update(len(keys))
    for clip in clips:
        if not clip.error and all(caption is None for caption in clip.captions):
            clip.error = next(error for error in clip.errors if error)


def batches(
    decoded: Iterable[tuple[tuple[int, int | None], Any]], clips: list[Clip], size: int, bar: tqdm
) -> Iterator[tuple[list[tuple[int, int]], torch.Tensor]]:
    """Keys (clip, window) and frames (B, T, 3, S, S) of what could be decoded; what could not is noted in `clips`."""
    keys, frames = [], []
    for (number, i), item in decoded:
        clip = clips[number]
        if i is None:
            if isinstance(item, Failure):
                clip.error = item.reason
            else:
                clip.windows, clip.captions, clip.errors = item, [None] * len(item), [None] * len(item)
                bar.total += len(item)
            continue
        if isinstance(item, Failure):
            clip.errors[i] = item.reason
            bar.update()
            continue
        keys.append((number, i))
        frames.append(item)
        if len(keys) == size:
            yield keys, torch.stack(frames)
            keys, frames = [], []
    if keys:
        yield keys, torch.stack(frames)


# ---- results ----


def write_beside(clip: Clip, folder: Path, args: argparse.Namespace) -> None:
    """Write a clip's subtitles, and copy the video beside them; then its GIF.

    The captions first: a disk that a long video fills has them already.
    """
    copy = folder / clip.name
    if clip.windows:
        write_timeline(clip, copy, args)
    if copy.resolve() != clip.path.resolve():
        files.copy(clip.path, copy)
    if args.gif:
        try:
            write_gif(clip, copy)
        except (VideoError, UserError) as error:
            print(f"{files.printable(clip.id)}: no GIF: {files.printable(str(error))}")


def write_timeline(clip: Clip, copy: Path, args: argparse.Namespace) -> None:
    """A windowed video's captions as .srt, .vtt and .json, named as its copy."""
    files.write_text(copy.with_suffix(".srt"), timeline.srt(clip.segments))
    files.write_text(copy.with_suffix(".vtt"), timeline.vtt(clip.segments))
    windows = zip(clip.windows, clip.captions, clip.errors, strict=True)
    content = {
        "video": clip.name,
        "duration": round(clip.windows[-1][1], 3),
        "window": args.window,
        "stride": args.stride,
        "segments": [part._asdict() for part in clip.segments],
        "windows": [
            {"start": round(start, 3), "end": round(end, 3), "caption": caption, "error": error}
            for (start, end), caption, error in windows
        ],
    }
    files.write_json(copy.with_suffix(".json"), content)


def write_gif(clip: Clip, copy: Path) -> None:
    """Draw a clip's caption under it. Raises: VideoError, UserError where it gives no GIF."""
    video = probe(copy)
    most = min(GIF_FRAMES, max(2, GIF_BYTES // (video.width * video.height * 3)))
    count = min(most, max(1, round(video.duration * GIF_FPS)))
    reference = clip.references[0] if clip.references else None
    frames = read_frames(copy, count)  # (T, H, W, 3)
    gif.write_gif(copy.with_suffix(".gif"), frames, clip.prediction, count / video.duration, reference=reference)


def write_results(
    clips: list[Clip], folder: Path, config: dict[str, Any], args: argparse.Namespace, made_by: dict[str, str | None]
) -> None:
    """Write results.json, the captions of all clips."""
    result = {
        "checkpoint": text_of(args.checkpoint),
        "encoder": config["features"]["encoder"],
        "llm": config["llm"],
        "max_new_tokens": args.max_new_tokens,
        "num_beams": args.num_beams,
        "clips": len(clips),
        "failed": sum(clip.error is not None for clip in clips),
        "predictions": [row_of(clip) for clip in clips],
        "made_by": made_by,
    }
    files.write_json(folder / "results.json", result)


def write_page(clips: list[Clip], folder: Path, data: Path, made_by: dict[str, str | None]) -> None:
    """Write the page that shows the same, with the videos playing."""
    outcomes = judge(clips, data)
    shown = [{**row_of(clip), **outcomes.get(clip.id, {})} for clip in clips]
    for row, clip in zip(shown, clips, strict=True):
        row["tracks"] = Path(clip.name).with_suffix(".vtt").name if clip.segments else None
    made = " at ".join(filter(None, made_by.values()))
    report.write_page(folder / "index.html", "Captions", shown, made_by=made)


def row_of(clip: Clip) -> dict[str, Any]:
    """A clip as results.json lists it."""
    row: dict[str, Any] = {
        "id": clip.id,
        "prediction": clip.prediction,
        "references": clip.references,
        "video": None if clip.error else clip.name,
        "source": text_of(clip.path),
        "error": clip.error,
    }
    if clip.windows:
        row["segments"] = [part._asdict() for part in clip.segments]
        row["failed_windows"] = sum(error is not None for error in clip.errors)
    return row


def judge(clips: list[Clip], data: Path) -> dict[str, dict[str, str | None]]:
    """How the captions of test clips relate to their answers, for the page's colours: template and outcome by id."""
    answered = {clip.id: clip for clip in clips if clip.references and clip.prediction is not None}
    if not answered:
        return {}
    try:
        reader = TemplateReader(dataset.read_templates(data))
    except UserError:  # without labels.json the captions are as good, and have no colour
        return {}
    records = {
        key: {"label": clip.references, "template": reader.read(clip.references[0]).template}
        for key, clip in answered.items()
    }
    scores = metrics.ssv2_scores({key: clip.prediction for key, clip in answered.items()}, records, reader)
    return {
        key: {"template": records[key]["template"], "outcome": clip["outcome"]}
        for key, clip in scores["per_clip"].items()
    }


def text_of(path: Path) -> str:
    """A path as text: names on a disk may hold bytes that are no UTF-8."""
    return os.fsencode(path).decode(errors="replace")


def report_on_screen(clips: list[Clip], folder: Path) -> int:
    """Print every caption or reason, and where the results are. Returns the exit code."""
    for clip in clips:
        name = files.printable(clip.id)
        if clip.error:
            print(f"{name}: failed: {files.printable(clip.error)}")
            continue
        for part in clip.segments[:LINES_SHOWN]:
            print(f"{name} {part.start:.1f}-{part.end:.1f} s: {files.printable(part.caption)}")
        if (more := len(clip.segments) - LINES_SHOWN) > 0:
            print(f"{name}: {more:,} more in {Path(clip.name).with_suffix('.srt')}")
        if not clip.windows:
            answer = "".join(f"  (answer: {files.printable(text)})" for text in clip.references)
            print(f"{name}: {files.printable(clip.prediction)}{answer}")
    failed = sum(clip.error is not None for clip in clips)
    print(f"{len(clips) - failed:,} of {len(clips):,} videos captioned; see {folder / 'index.html'}")
    return 1 if failed == len(clips) else 0


if __name__ == "__main__":
    arguments.run(main)
