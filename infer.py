"""Caption videos: clips of the test set, or any files and folders, of any length.

Writes results.json, subtitles of long videos and a page to look at into RESULTS/inference, as captions are made.
A video that cannot be captioned is listed with its reason, and the run goes on; when none could be, the exit code is 1.
"""

import argparse
import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import runtime.threads  # noqa: F401  how torch's threads wait

import dataset
from evaluation import report, scores
from models import checkpoint, pretrained
from models.video_files import VideoCaptions
from qformer import VideoCaptioner
from runtime import cli, files, provenance
from runtime.files import UserError
from runtime.progress import Progress
from runtime.signals import Interrupts
from video import gif, overlay, subtitles
from video import paths as videos
from video.reader import VideoError, probe, read_frames
from video.workers import Workers

GIF_FRAMES = 48  # at most; a clip of SSv2 has about as many
GIF_FPS = 25  # at most: browsers slow down a GIF whose frames stand for less than 20 ms
LONG = 30.0  # seconds: a longer video says more than one caption can
SAVE_EVERY = 5.0  # seconds between two writings of results.json


@dataclass
class Clip(VideoCaptions):
    """A video to caption, what came of it, and where that goes."""

    id: str = ""  # the test set's, or the name of what is written for it
    references: list[str] = field(default_factory=list)
    name: str = ""  # of its files in the results' folder


def main(argv: list[str] | None = None) -> int:
    """Caption what the command line names. Returns 1 where no video could be captioned. Raises: Interrupted."""
    args = parse(argv)
    folder = args.results / "inference"
    pretrained.tell(f"captions by {args.checkpoint}")
    if args.video:
        clips = [Clip(path) for path in videos.find(args.video, folder)]
    else:
        clips = choose_test_clips(args.data, args.num_samples, args.seed)
    for clip, name in zip(clips, videos.output_names([clip.path for clip in clips], folder), strict=True):
        clip.name, clip.id = name, clip.id or Path(name).stem
    files.check_writable(folder)  # now, not after an hour's work
    with Workers(args.workers, args.clip_timeout) as workers:  # they start while the models load
        captioner = VideoCaptioner.from_checkpoint(args.checkpoint, cli.device(args.device), args.llm, args.encoder)
        if args.attention:
            captioner.check_queries(args.attention, "--attention")
        models = {"checkpoint": args.checkpoint, "encoder": captioner.encoder.name, "llm": captioner.config["llm"]}
        results = Results(clips, folder, models, args, provenance.made_by(argv), report.recipe(captioner))
        with Interrupts(at_once=True):
            try:
                results.caption(captioner, workers)
                results.draw_overlays(captioner, workers)
            finally:
                results.write_texts()
            results.write_media()  # last: where it fills the disk, the captions are there
    return 1 if all(clip.error for clip in clips) else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises: UserError where window and stride cannot cover a video."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument_group("videos").add_argument
    add("--num-samples", type=cli.count, default=10, help="how many clips of the test set to caption")
    add("--video", nargs="+", type=Path, metavar="FILE_OR_FOLDER", help="caption these instead of the test set")
    add("--data", type=Path, default=dataset.DEFAULT_DATA, help="the dataset's folder, for --num-samples")
    add("--seed", type=int, default=0, help="decides which clips of the test set are taken")
    add("--window", type=cli.positive, help="caption long videos in windows of these seconds; writes .json, .srt, .vtt")
    add("--stride", type=cli.positive, help="seconds from one window to the next, at most the window (and without it)")
    add = parser.add_argument_group("models").add_argument
    add("--checkpoint", type=Path, default=checkpoint.default(), help=checkpoint.HELP)
    add("--llm", help="where the language model is, if not where the checkpoint says: a hub name or a folder")
    add("--encoder", help="where the video encoder is, if not where the checkpoint says: a hub name or a folder")
    add("--max-new-tokens", type=cli.count, default=50, help="longest caption, in tokens")
    add("--num-beams", type=cli.count, default=1, help="beams of the search for a caption; 1: greedy")
    add = parser.add_argument_group("results").add_argument
    add("--results", type=Path, default=Path("results"), help="everything is written to RESULTS/inference")
    add("--gif", action="store_true", help="also write each clip as an animated GIF with its caption under it")
    add("--copy-videos", action="store_true", help="copy the videos beside the page, to publish it")
    where = "also draw where the captioner looked over each clip: the mean of all queries, and each QUERY (0, 1, ...)"
    add("--attention", nargs="*", type=cli.whole, metavar="QUERY", help=where)
    add = parser.add_argument_group("running").add_argument
    add("--batch-size", type=cli.count, default=8, help="clips or windows that are captioned at once")
    spare = max(1, min(4, (os.cpu_count() or 1) - 1))  # one core is left to the models, where they have no GPU
    add("--workers", type=cli.whole, default=spare, help="processes that decode; 0: this one")
    add("--clip-timeout", type=cli.positive, default=60.0, help="seconds that decoding a clip or a window may take")
    add("--device", help=cli.DEVICE)
    args = parser.parse_args(argv)
    if args.stride and not args.window:
        raise UserError("--stride is the step between windows: give --window SECONDS as well")
    if args.window:
        args.stride = args.stride or args.window
        subtitles.check_window(args.window, args.stride)
        if args.gif:
            raise UserError("--gif draws one caption under a short clip; leave it out with --window")
        if args.attention is not None:
            raise UserError("--attention is drawn over clips with one caption; leave it out with --window")
    return args


def choose_test_clips(data: Path, count: int, seed: int) -> list[Clip]:
    """`count` clips of the test set, with their answers where there are any; a larger count adds to a smaller one's.

    Raises: UserError where there is no dataset, or no video of any of these clips.
    """
    ids = sorted(record["id"] for record in dataset.read_split(data, "test"))
    random.Random(seed).shuffle(ids)
    layout, answers, clips = dataset.Layout(data), dataset.read_references(data), []
    for clip_id in ids[:count]:
        path = layout.video(clip_id) or layout.videos / (layout.source(clip_id) or f"{clip_id}.webm")
        clips.append(Clip(path, id=clip_id, references=answers.get(clip_id, [])))
    if not any(clip.path.is_file() for clip in clips):
        raise UserError(f"{layout.name} has no video of the test clips that were drawn; {layout.video_advice}")
    return clips


def tell(clip: Clip) -> None:
    """What is new of a video's captions, or why there are none, on the screen; a window's only where it is another."""
    lines = []
    if clip.error:
        lines.append(f"failed: {clip.error}")
    elif clip.is_windowed:
        if (caption := clip.captions[-1]) and caption not in clip.captions[-2:-1]:
            lines.append(f"{clip.decoded[-1].start:.1f} s: {caption}")
    else:
        lines.append(clip.prediction + "".join(f"  (answer: {text})" for text in clip.references[:3]))
        if (seconds := clip.decoded[-1].end) >= LONG:
            lines.append(f"{seconds:.0f} s; --window 4 captions it in parts")
    if clip.warning and clip.is_done:
        lines.append(clip.warning)
    for line in lines:
        Progress.write(files.printable(f"{clip.id}: {line}"))


@dataclass
class Results:
    """The videos' captions, and what is written of them into the results' folder."""

    clips: list[Clip]
    folder: Path
    models: dict[str, Path | str]  # where the checkpoint and the two frozen models are
    args: argparse.Namespace
    made_by: dict[str, str | None]
    recipe: dict[str, Any]  # how the checkpoint was made
    overlays: dict[str, dict[str, str]] = field(default_factory=dict)  # by clip id: files by what they show
    saved: float = 0.0  # when results.json was written last

    def caption(self, captioner: VideoCaptioner, workers: Workers) -> None:
        """Decode in workers, caption in batches, and tell and save each video's captions as they are made."""
        args = self.args
        settings = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams}
        settings["queries"] = args.attention
        with Progress(total=len(self.clips), desc="captions", unit="window" if args.window else "clip") as bar:
            for clip in captioner.caption_files(self.clips, workers, args.window, args.stride, **settings):
                if len(clip.decoded) == 1:  # until a file is begun, it counts as one window
                    bar.total += clip.decoded[0].total - 1
                bar.update()
                tell(clip)
                if time.monotonic() - self.saved > SAVE_EVERY:
                    self.save()
        self.save()

    def draw_overlays(self, captioner: VideoCaptioner, workers: Workers) -> None:
        """Where the captioner looked, over each clip, where that is asked for."""
        clips = {Path(clip.name).stem: (clip.path, clip.maps) for clip in self.clips if clip.maps}
        drawn = overlay.write_all(workers, clips, self.folder, captioner.encoder.transform, captioner.encoder.frames)
        self.overlays.update(drawn)  # one by one: an interrupt keeps those that are drawn

    def save(self) -> None:
        """results.json: the captions of all clips so far."""
        result = {
            **{name: files.display_path(place) for name, place in self.models.items()},
            "max_new_tokens": self.args.max_new_tokens,
            "num_beams": self.args.num_beams,
            "clips": len(self.clips),
            "failed": sum(clip.error is not None for clip in self.clips),
            "predictions": [self.row(clip) for clip in self.clips],
            "made_by": self.made_by,
        }
        files.write_json(self.folder / "results.json", result)
        self.saved = time.monotonic()

    def row(self, clip: Clip) -> dict[str, Any]:
        """A clip as results.json and the page list it, with paths from there."""
        video = clip.name if self.args.copy_videos else report.relative(clip.path, self.folder / "index.html")
        row = {key: getattr(clip, key) for key in ("id", "prediction", "references", "error", "warning")}
        row |= {"video": None if clip.error else video, "source": files.display_path(clip.path)}
        if overlays := self.overlays.get(Path(clip.name).stem):
            row["overlays"] = overlays
        if clip.is_windowed:
            row["segments"] = [part._asdict() for part in clip.segments]
            row["links"] = [(kind, str(Path(clip.name).with_suffix(kind))) for kind in (".srt", ".vtt", ".json")]
            row["failed_windows"] = sum(part.error is not None for part in clip.decoded)
        return row

    def write_texts(self) -> None:
        """results.json, the subtitles and the page of what is captioned so far."""
        self.save()
        for clip in self.clips:
            if clip.is_windowed and not clip.error:
                self.write_subtitles(clip)
        answered = {c.id: (c.prediction, c.references) for c in self.clips if c.references and c.prediction is not None}
        outcomes = scores.outcomes(answered, self.args.data)
        rows = [self.row(clip) | outcomes.get(clip.id, {}) for clip in self.clips]
        page = self.folder / "index.html"
        links = [("results.json", "results.json")]
        recipe = {"checkpoint": files.display_path(self.models["checkpoint"]), **self.recipe}
        report.write_page(page, "Captions", rows, made_by=self.made_by, links=links, recipe=recipe)
        report.link_pages(self.args.results)
        done = sum(clip.is_done and not clip.error for clip in self.clips)
        print(f"{done:,} of {len(self.clips):,} videos captioned; see {page}")

    def write_subtitles(self, clip: Clip) -> None:
        """A windowed video's captions as .srt, .vtt and .json."""
        path = self.folder / clip.name
        files.write_text(path.with_suffix(".srt"), subtitles.srt(clip.segments))
        files.write_text(path.with_suffix(".vtt"), subtitles.vtt(clip.segments))
        content = {
            "video": clip.name,
            "duration": round(clip.decoded[-1].end, 3),
            "window": self.args.window,
            "stride": self.args.stride,
            "segments": [part._asdict() for part in clip.segments],
            "windows": [
                {"start": round(part.start, 3), "end": round(part.end, 3), "caption": caption, "error": part.error}
                for part, caption in zip(clip.decoded, clip.captions, strict=True)
            ],
        }
        files.write_json(path.with_suffix(".json"), content)

    def write_media(self) -> None:
        """The copies of the videos, and the GIFs, where they are asked for."""
        clips = [clip for clip in self.clips if not clip.error]
        for clip in Progress(clips, "media", unit="clip", disable=not (self.args.copy_videos or self.args.gif)):
            if self.args.copy_videos:
                files.copy(clip.path, self.folder / clip.name)
            if self.args.gif:
                try:
                    write_gif(clip, self.folder)
                except (VideoError, UserError) as error:
                    Progress.write(files.printable(f"{clip.id}: no GIF: {error}"))


def write_gif(clip: Clip, folder: Path) -> None:
    """Draw a clip's caption under it. Raises: VideoError, UserError where it gives no GIF."""
    video = probe(clip.path)
    count = min(GIF_FRAMES, video.frames, int(GIF_FPS * video.duration) + 1)
    suffix = ".captioned.gif" if clip.path.suffix.lower() == ".gif" else ".gif"  # its copy is a GIF, too
    target, frames = (folder / clip.name).with_suffix(suffix), read_frames(clip.path, count)  # (T, H, W, 3)
    gif.write_gif(target, frames, clip.prediction, count / video.duration, reference=next(iter(clip.references), None))


if __name__ == "__main__":
    cli.run(main)
