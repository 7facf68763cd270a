"""Damage videos at random and preprocess them: each must be cached or named, whatever decoding it does."""

import contextlib
import io
import json
import tempfile
import traceback
from pathlib import Path

import numpy as np

import preprocess_something_something_v2 as preprocess
from tests import tiny, videos
from tests.fuzz.cases import Outcome
from tests.fuzz.damage import damage_bytes

FORMATS = {  # codec, suffix, pixels
    "vp9": ("libvpx-vp9", ".webm", "yuv420p"),
    "vp8": ("libvpx", ".webm", "yuv420p"),
    "h264": ("libx264", ".mp4", "yuv420p"),
    "hevc": ("libx265", ".mp4", "yuv420p"),
    "mpeg4": ("mpeg4", ".avi", "yuv420p"),
    "mjpeg": ("mjpeg", ".avi", "yuvj420p"),
}


def originals(folder: Path) -> list[bytes]:
    """Good videos in several formats, one frame and audio alone among them, as bytes."""
    paths = [videos.write_audio(folder / "audio.webm")]
    for name, (codec, suffix, pixels) in FORMATS.items():
        for count in (1, 12, 40):
            if (name, count) == ("hevc", 1):
                continue  # its encoder does not always finish one frame
            options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
            path = folder / f"{name}-{count}{suffix}"
            paths.append(videos.write(path, videos.moving(count, 96, 64), codec, pixels=pixels, **options))
    return [path.read_bytes() for path in paths]


def fuzz(folder: Path, count: int, seed: int, timeout: float = 20.0, workers: int = 2) -> dict[str, str | None]:
    """Preprocess `count` damaged videos; each id's reason for failing, or None where it was encoded.

    Raises: AssertionError where a clip is neither cached nor named.
    """
    random = np.random.default_rng(seed)
    good = originals(folder / "good")
    data, encoder = folder / "data", tiny.save_encoder(folder / "vjepa")
    place = data / "20bn-something-something-v2"
    place.mkdir(parents=True)
    ids = [f"clip{number}" for number in range(count)]
    for clip in ids:
        suffix = random.choice([".webm", ".mp4"])
        (place / f"{clip}{suffix}").write_bytes(damage_bytes(good[int(random.integers(len(good)))], random))
    (data / "labels").mkdir()
    (data / "labels" / "train.json").write_text(json.dumps([{"id": clip} for clip in ids]))
    words = (
        f"--data {data} --encoder {encoder} --splits train --num-frames 4 --clip-timeout {timeout} --workers {workers}"
    )
    code = preprocess.main(words.split())
    assert code == 0, f"exit code {code}"
    failures = data / "features" / "train" / "failures.jsonl"
    rows = [json.loads(line) for line in failures.read_text().splitlines()] if failures.exists() else []
    outcomes: dict[str, str | None] = {row["id"]: row["reason"] for row in rows}
    for clip in ids:
        cached = (data / "features" / "train" / f"{clip}.pt").exists()
        assert cached != (clip in outcomes), f"{clip} is {'both' if cached else 'neither'} cached and named"
        outcomes.setdefault(clip, None)
    return outcomes


def fuzz_all(count: int, seed: int, at_once: int = 50) -> list[Outcome]:
    """The outcomes of `count` damaged videos or a few more, preprocessed `at_once` at a time."""
    outcomes = []
    for number in range(-(-count // at_once)):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            try:
                reasons = list(fuzz(Path(folder), at_once, seed * 1000 + number).values())
            except BaseException:
                outcomes.append(Outcome(number, "videos", "traceback", traceback.format_exc()))
                continue
        outcomes += [Outcome(number, "videos", "refused" if reason else "used", reason or "") for reason in reasons]
    return outcomes
