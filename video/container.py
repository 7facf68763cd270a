"""A video file opened by PyAV (FFmpeg): which frames are shown and when, and the frames themselves, in order.

Letters: H and W pixels as shown, N frames of a file, K key frames.
"""

import contextlib
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from video import webm

MAX_PIXELS = 8192 * 4352  # a frame of 8K; a damaged header can claim far more
STILL = ("avif", "heic", "heix", "mif1")  # brands of pictures in MP4's format
NO_TEXT = {*range(9), *range(14, 32), 127}  # bytes
NO_MEMORY = "it needs more memory than decoding may use"
EARLY = 1e-6  # seconds: i * stride is not always the number that is meant


class VideoError(Exception):
    """A video that cannot be decoded; its text is the reason, without the file's name."""


class Index(NamedTuple):
    """The frames of a video as its packets tell; nothing is decoded for it."""

    stamps: np.ndarray  # int64 (N,), ascending: when frames are shown, in `unit`; their numbers if not `stamped`
    keys: np.ndarray  # int64 (K,), ascending: the stamps at which decoding can begin
    stamped: bool
    unit: float  # seconds
    zero: float  # seconds: the start of the file, which need not be the first frame's
    rate: float  # frames a second, as the file says
    promised: int | None  # frames that a file had before it was cut off
    total: int | None = None  # N of the whole file, where this is a part of its index

    def seconds(self, stamps: np.ndarray) -> np.ndarray:
        """From the start of the file."""
        return stamps * self.unit - self.zero if self.stamped else stamps / self.rate

    def before(self, stamps: np.ndarray | int, seconds: float) -> np.ndarray | bool:
        """Whether frames are shown before a time, in seconds from the start of the file."""
        return self.seconds(stamps) < seconds - EARLY

    def count(self, stamps: np.ndarray, start: float, end: float) -> int:
        """How many of these frames are shown from `start` to before `end`, in seconds."""
        return int((self.before(stamps, end) & ~self.before(stamps, start)).sum())

    @property
    def frame(self) -> float:
        """Seconds that a frame is shown, on average."""
        first, last = self.seconds(self.stamps[[0, -1]])
        return float((last - first) / (len(self.stamps) - 1)) if last > first else 1 / self.rate

    @property
    def start(self) -> float:
        """When the first frame is shown, in seconds from the start of the file."""
        return max(0.0, round(float(self.seconds(self.stamps[0])), 5))  # start_time is rounded, too

    @property
    def end(self) -> float:
        """When the last frame ends, in seconds from the start of the file."""
        return float(self.seconds(self.stamps[-1])) + self.frame

    def warning(self, decoded: int) -> str | None:
        """That the file is cut off, where it is: to be told beside its captions."""
        if self.promised and decoded < self.promised:
            return f"cut off: {decoded} of {self.promised} frames could be decoded"
        return None


def read_index(path: Path | str) -> Index:
    """The index of a video. Raises: VideoError."""
    with expected_errors(), _open(path) as (container, stream):
        packets = [(_stamp(p), p.is_keyframe, p.is_discard, p.is_corrupt) for p in _packets(container, stream)]
        if len(packets) > 1 and packets[-1][-1]:  # the file ends within this one
            packets.pop()
        shown = [stamp for stamp, _, discard, _ in packets if not discard]
        if not shown:
            raise VideoError("it holds no frames")
        stamped = None not in shown
        stamps = np.sort(np.array(shown, np.int64)) if stamped else np.arange(len(shown))
        keys = np.unique([stamp for stamp, key, *_ in packets if key and stamped]).astype(np.int64)
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        zero = (container.start_time or 0) / 1e6
        index = Index(stamps, keys, stamped, float(stream.time_base), zero, rate, _promised(path, container, stream))
    if index.frame > 3600:
        raise VideoError("its frames have impossible times")
    return index


def read_duration(path: Path | str) -> float:
    """Seconds as the header says, without reading on; where it does not, of all packets. Raises: VideoError."""
    with expected_errors(), _open(path) as (container, _):
        told = container.duration
    return told / 1e6 if told else read_index(path).end


@contextlib.contextmanager
def expected_errors() -> Iterator[None]:
    """What FFmpeg, the disk and the allocators answer, told as a VideoError."""
    import av

    try:
        yield
    except MemoryError:
        raise VideoError(NO_MEMORY) from None
    except av.FFmpegError as error:
        raise VideoError(f"it does not open as a video ({error.strerror})") from None
    except OSError as error:
        raise VideoError(f"the file cannot be read ({error.strerror})") from None


@contextlib.contextmanager
def _open(path: Path | str) -> Iterator[tuple[Any, Any]]:
    """A container, and the one of its video streams that FFmpeg takes."""
    import av

    _check_file(path)
    name = os.path.abspath(os.fsdecode(path))
    with contextlib.ExitStack() as stack:
        try:
            name.encode()
            source: Any = f"file:{name}"  # or a colon in the name would make it a protocol
        except UnicodeEncodeError:
            source = stack.enter_context(open(os.open(name, os.O_RDONLY | getattr(os, "O_BINARY", 0)), "rb"))
        try:
            container = stack.enter_context(av.open(source))
        except av.FFmpegError as error:
            if not isinstance(error, MemoryError) and _is_text(name):
                raise VideoError("it is a text file, not a video") from None
            raise
        stream = _choose_stream(container)
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise VideoError(f"a frame of {width}x{height} is too large")
        stream.codec_context.thread_count = 1  # processes run side by side
        yield container, stream


def is_url(name: str) -> bool:
    """Whether a name is an address on a network, and not that of a file which is called like one."""
    return re.match(r"[a-zA-Z][\w+.-]+://", name) is not None and not os.path.exists(name)


def _check_file(path: Path | str) -> None:
    """Raises: VideoError for what is no file that could hold a video."""
    if not os.path.exists(path):
        if is_url(os.fsdecode(path)):
            raise VideoError("it is a URL: download the file, and name that")
        raise VideoError("there is no such file")
    if os.path.isdir(path):
        raise VideoError("it is a folder, not a file: name the videos in it")
    if not os.path.isfile(path):
        raise VideoError("it is not a file")
    if not os.path.getsize(path):
        raise VideoError("the file is empty")


def _is_text(path: Path | str) -> bool:
    with open(path, "rb") as file:
        head = file.read(512)
    try:
        return head[:508].decode(errors="strict").isprintable() or not set(head) & NO_TEXT
    except UnicodeDecodeError:
        return False


def _choose_stream(container: Any) -> Any:
    """As the ffmpeg command: the most pixels, with a bonus for the default one. A cover picture is no video."""
    import av

    kind, flags = container.format.name, av.stream.Disposition
    if kind == "tty":
        raise VideoError("it is a text file, not a video")
    if kind == "image2" or kind.endswith("_pipe") or container.metadata.get("major_brand") in STILL:
        raise VideoError("it is a picture, not a video: name a video, or an animated GIF")
    streams = [s for s in container.streams.video if s.codec_context and not s.disposition & flags.attached_pic]
    if not streams:
        held = sorted({stream.type for stream in container.streams} - {"data", "attachment", "video"})
        raise VideoError(f"it holds no video stream{f', only {held[0]}' if held else ''}")

    def score(stream: Any) -> tuple[int, int]:
        return stream.width * stream.height + 5_000_000 * bool(stream.disposition & flags.default), stream.frames

    return max(streams, key=score)


def decoded(path: Path | str, index: Index, first: int | None = None) -> Iterator[tuple[int, Any]]:
    """Stamps and frames in the order they are shown, from the last key frame at or before the stamp `first` on.

    Frames that follow a key frame in an open group of pictures are right from that key frame on; where a decoder needs
    more of a run-up, so that `first` itself is missing, it is given the key frame before.
    """
    keys = index.keys[index.keys <= first][:0:-1][:2].tolist() if first is not None else []
    for key in (*keys, None):
        with _open(path) as (container, stream):
            packets = _packets(container, stream) if key is None else _packets_from(container, stream, key)
            if packets is None:  # seeking does not work in this file
                continue
            frames = _frames(stream, packets, index.stamped)
            stamp, frame = next(frames, (None, None))
            if key is None or (frame is not None and stamp <= first) or (len(keys) == 2 and key == keys[1]):
                if frame is not None:
                    yield stamp, frame
                    yield from frames
                return


def _frames(stream: Any, packets: Iterator[Any], stamped: bool) -> Iterator[tuple[int, Any]]:
    import av

    number = 0
    for packet in itertools.chain(packets, [None]):  # None: the decoder gives what it kept back
        try:
            frames = stream.codec_context.decode(packet)
        except av.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            continue  # a damaged packet: FFmpeg too goes on behind it
        for frame in frames:
            stamp = _stamp(frame) if stamped else number
            number += 1
            if stamp is not None:
                yield stamp, frame


def _stamp(timed: Any) -> int | None:
    return timed.dts if timed.pts is None else timed.pts


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """The packets of a stream, up to the end of what can be read."""
    import av

    with contextlib.suppress(av.FFmpegError):  # FFmpeg takes it for the end of the file
        for packet in container.demux(stream):
            if packet.size:
                yield packet


def _packets_from(container: Any, stream: Any, key: int) -> Iterator[Any] | None:
    """Packets from the key frame with the stamp `key`, or one before it; None where seeking only finds later ones."""
    import av

    for seconds in (0, 1, 10):  # by what some formats land too late
        try:
            container.seek(key - int(seconds / stream.time_base), stream=stream)
        except av.FFmpegError:
            continue
        packets = _packets(container, stream)
        packet = next((packet for packet in packets if packet.is_keyframe), None)
        if packet is not None and _stamp(packet) is not None and _stamp(packet) <= key:
            return itertools.chain([packet], packets)
    return None


def rgb(frame: Any, size: tuple[int, int]) -> np.ndarray:
    """A frame as it is shown: turned, and in the `size` (width, height) of the first one. (H, W, 3)"""
    if frame.width * frame.height > MAX_PIXELS:
        raise VideoError(f"a frame of {frame.width}x{frame.height} is too large")
    pixels = frame.to_ndarray(format="rgb24", width=size[0], height=size[1])
    return np.rot90(pixels, frame.rotation // 90) if frame.rotation else pixels


def _promised(path: Path | str, container: Any, stream: Any) -> int | None:
    """The frames that a file had before it was cut off, as its header tells; None for a whole file."""
    size = os.path.getsize(path)
    if "mp4" in container.format.name:
        entries = [entry for entry in stream.index_entries if not entry.is_discard]
        return len(entries) if entries and max(entry.pos + entry.size for entry in entries) > size else None
    if "webm" in container.format.name and webm.is_cut(path) and container.duration and stream.average_rate:
        return round(container.duration / 1e6 * stream.average_rate)
    return None
