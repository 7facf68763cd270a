"""A video file opened by PyAV (FFmpeg): which frames are shown and when, and the frames themselves, in order.

Letters: H and W pixels as shown, N frames of a file, K key frames.
"""

import contextlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

STILL = ("avif", "heic", "heix", "mif1")  # brands of pictures in MP4's format
SMALL = 16 << 20  # bytes of a file whose packets are kept, so that it is opened and read once
HEAD = 4096  # bytes, in which a WebM file's segment begins
SEGMENT = b"\x18\x53\x80\x67"  # its id (Matroska, RFC 9559)
SEEK_EARLY = 3  # seconds: in some formats seeking lands too late
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

    def seconds(self, stamps: np.ndarray) -> np.ndarray:
        """From the start of the file."""
        return stamps * self.unit - self.zero if self.stamped else stamps / self.rate

    def before(self, stamps: np.ndarray | int, seconds: float) -> np.ndarray | bool:
        """Whether frames are shown before a time, in seconds from the start of the file."""
        return self.seconds(stamps) < seconds - EARLY

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
        is_cut = self.promised and decoded < self.promised
        return f"cut off: {decoded} of {self.promised} frames could be decoded" if is_cut else None


class Video(NamedTuple):
    """A file with its index, and a small file's packets."""

    path: Path | str
    index: Index
    packets: Sequence[Any] = ()
    decoder: Any = None

    def frames(self, first: int | None = None) -> Iterator[tuple[int, Any]]:
        """Stamps and frames in the order they are shown, from the last key frame at or before the stamp `first` on.

        Where a decoder needs more of a run-up, so that `first` itself is missing, it is given the key frame before.
        """
        if self.packets:
            self.decoder.flush_buffers()
            yield from _frames(self.decoder, self.packets, self.index.stamped)
            return
        keys = self.index.keys[self.index.keys <= first][:0:-1][:2].tolist() if first is not None else []
        for key in (*keys, None):
            with _open(self.path) as (container, stream):
                frames = _frames(stream.codec_context, _packets(container, stream, key), self.index.stamped)
                stamp, frame = next(frames, (None, None))
                if frame is not None and (key is None or stamp <= first):
                    yield stamp, frame
                    yield from frames
                    return


@contextlib.contextmanager
def opened(path: Path | str) -> Iterator[Video]:
    """A video, to be read in order. Raises: VideoError."""
    with expected_errors(), _open(path) as (container, stream):
        packets = _packets(container, stream)
        kept = list(packets) if os.path.getsize(path) <= SMALL else []
        yield Video(path, _index(path, container, stream, kept or packets), kept, stream.codec_context)


def read_index(path: Path | str) -> Index:
    """The index of a video. Raises: VideoError."""
    with opened(path) as video:
        return video.index


def _index(path: Path | str, container: Any, stream: Any, packets: Iterable[Any]) -> Index:
    told = [(_stamp(p), p.is_keyframe, p.is_discard, p.is_corrupt) for p in packets]
    if len(told) > 1 and told[-1][-1]:  # the file ends within this one
        told.pop()
    shown = [stamp for stamp, _, is_discard, _ in told if not is_discard]
    if not shown:
        raise VideoError("it holds no frames")
    stamped = None not in shown
    stamps = np.sort(np.array(shown, np.int64)) if stamped else np.arange(len(shown))
    keys = np.unique([stamp for stamp, is_key, *_ in told if is_key and stamped]).astype(np.int64)
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    zero = (container.start_time or 0) / 1e6
    index = Index(stamps, keys, stamped, float(stream.time_base), zero, rate, _promised(path, container, stream))
    if index.frame > 3600:
        raise VideoError("its frames have impossible times")
    return index


@contextlib.contextmanager
def expected_errors() -> Iterator[None]:
    """What FFmpeg, the disk and the allocators answer, told as a VideoError."""
    try:
        yield
    except MemoryError:
        raise VideoError("it needs more memory than decoding may use") from None
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"it does not open as a video ({error.strerror})") from None


@contextlib.contextmanager
def _open(path: Path | str) -> Iterator[tuple[Any, Any]]:
    """A container, and the one of its video streams that FFmpeg takes."""
    _check_file(path)
    try:  # "file:", or a colon in the name would make it a protocol
        container = av.open(f"file:{os.path.abspath(os.fsdecode(path))}")
    except av.FFmpegError as error:
        if isinstance(error, MemoryError) or b"\0" in _head(path):
            raise
        raise VideoError("it is a text file, not a video") from None
    with container:
        stream = _choose_stream(container)
        stream.codec_context.thread_count = 1  # processes run side by side
        yield container, stream


def missing(path: Path | str) -> str:
    """Why there is no file of this name."""
    is_url = re.search(r"(^|[/\\])[a-zA-Z][\w+.-]+:[/\\]", os.fsdecode(path))  # made absolute, it may be, too
    return "it is a URL: download the video and name the file" if is_url else "there is no such file"


def _check_file(path: Path | str) -> None:
    if not os.path.exists(path):
        raise VideoError(missing(path))
    if not os.path.isfile(path):
        raise VideoError("it is a folder or a device, not a file")
    if not os.path.getsize(path):
        raise VideoError("the file is empty")


def _choose_stream(container: Any) -> Any:
    """As the ffmpeg command: the most pixels, with a bonus for the default one. A cover picture is no video."""
    kind, flags = container.format.name, av.stream.Disposition
    if kind in ("image2", "tty") or kind.endswith("_pipe") or container.metadata.get("major_brand") in STILL:
        raise VideoError("it is a picture or a text, not a video: name a video, or an animated GIF")
    streams = [s for s in container.streams.video if s.codec_context and not s.disposition & flags.attached_pic]
    if not streams:
        raise VideoError("it holds no video stream")
    return max(streams, key=lambda s: (s.width * s.height + 5_000_000 * bool(s.disposition & flags.default), s.frames))


def _frames(decoder: Any, packets: Iterable[Any], stamped: bool) -> Iterator[tuple[int, Any]]:
    number = 0
    for packet in itertools.chain(packets, [None]):  # None: the decoder gives what it kept back
        try:
            frames = decoder.decode(packet)
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


def _packets(container: Any, stream: Any, key: int | None = None) -> Iterator[Any]:
    """The packets of a stream, from a key frame at or before the stamp `key` on, up to the end of what can be read."""
    begun = key is None
    with contextlib.suppress(av.FFmpegError):  # FFmpeg takes it for the end of the file
        if not begun:
            container.seek(key - int(SEEK_EARLY / stream.time_base), stream=stream)
        for packet in container.demux(stream):
            stamp = _stamp(packet)
            begun = begun or (packet.is_keyframe and stamp is not None and stamp <= key)
            if packet.size and begun:
                yield packet


def rgb(frame: Any, size: tuple[int, int], reformatter: Any) -> np.ndarray:
    """A frame as it is shown: turned, and in the `size` (width, height) of the first one. (H, W, 3)

    `reformatter`: PyAV's, one for all frames of a file: setting one up takes as long as the work itself.
    """
    pixels = reformatter.reformat(frame, *size, "rgb24").to_ndarray()
    return np.rot90(pixels, frame.rotation // 90) if frame.rotation else pixels


def _promised(path: Path | str, container: Any, stream: Any) -> int | None:
    """The frames that a file had before it was cut off, as its header tells; None for a whole file."""
    size = os.path.getsize(path)
    if "mp4" in container.format.name:
        entries = [entry for entry in stream.index_entries if not entry.is_discard]
        return len(entries) if entries and max(entry.pos + entry.size for entry in entries) > size else None
    is_cut = "webm" in container.format.name and _segment_end(_head(path)) > size
    told = is_cut and container.duration and stream.average_rate
    return round(container.duration / 1e6 * stream.average_rate) if told else None


def _head(path: Path | str) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD)


def _segment_end(head: bytes) -> int:
    """Where a WebM file's one segment ends, in bytes: its id is followed by its length, as EBML (RFC 8794) has it."""
    _, _, rest = head.partition(SEGMENT)
    length = 9 - rest[0].bit_length() if rest else 0
    return len(head) - len(rest) + length + (int.from_bytes(rest[:length], "big") & (1 << 7 * length) - 1)
