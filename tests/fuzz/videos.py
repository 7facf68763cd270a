"""Damage videos at random and preprocess them: each must be cached or named, whatever decoding it does.

python tests/fuzz_videos.py --count 1000 --seed 0
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import preprocess_something_something_v2 as preprocess  # noqa: E402
from tests import videos  # noqa: E402

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


def mutate(content: bytes, random: np.random.Generator) -> bytes:
    """One kind of damage, at a random place."""
    data = bytearray(content)
    size = len(data)
    at, length = int(random.integers(size)), int(random.integers(1, max(2, size // 4)))
    match int(random.integers(9)):
        case 0:  # cut off
            return bytes(data[:at])
        case 1:  # a hole of zeros
            data[at : at + length] = bytes(len(data[at : at + length]))
        case 2:  # a stretch of noise
            data[at : at + length] = random.bytes(len(data[at : at + length]))
        case 3:  # bytes changed here and there
            for place in random.integers(size, size=int(random.integers(1, 40))):
                data[place] = int(random.integers(256))
        case 4:  # bytes changed among the headers, sizes and times among them
            for place in random.integers(min(size, 600), size=int(random.integers(1, 12))):
                data[place] = int(random.choice([0, 1, 0x7F, 0x80, 0xFF, int(random.integers(256))]))
        case 5:  # a part missing
            del data[at : at + length]
        case 6:  # a part twice
            data[at:at] = data[at : at + length]
        case 7:  # the beginning missing
            return bytes(data[at:])
        case 8:  # noise alone, or nothing
            return random.bytes(int(random.integers(0, 5000)))
    return bytes(data)


def fuzz(folder: Path, count: int, seed: int, timeout: float = 20.0, workers: int = 2) -> dict[str, str | None]:
    """Preprocess `count` damaged videos; each id's reason for failing, or None where it was encoded.

    Raises: AssertionError where a clip is neither cached nor named.
    """
    random = np.random.default_rng(seed)
    good = originals(folder / "good")
    data, encoder = folder / "data", videos.tiny_vjepa(folder / "vjepa")
    place = data / "20bn-something-something-v2"
    place.mkdir(parents=True)
    ids = [f"clip{number}" for number in range(count)]
    for clip in ids:
        suffix = random.choice([".webm", ".mp4"])
        (place / f"{clip}{suffix}").write_bytes(mutate(good[int(random.integers(len(good)))], random))
    (data / "labels").mkdir()
    (data / "labels" / "train.json").write_text(json.dumps([{"id": clip} for clip in ids]))
    words = f"--data {data} --encoder {encoder} --splits train --frames 4 --clip-timeout {timeout} --workers {workers}"
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


def main() -> None:
    """Run, and count what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="damaged videos")
    parser.add_argument("--seed", type=int, default=0, help="decides the damage")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = fuzz(Path(folder), args.count, args.seed)
    reasons = list(outcomes.values())
    killers = [r for r in reasons if r and ("worker" in r or "longer" in r)]
    print(
        f"{args.count} damaged videos: {reasons.count(None)} decoded, {len(reasons) - reasons.count(None)} named, of "
        f"these {len(killers)} ended or hung their worker; 0 lost, {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
