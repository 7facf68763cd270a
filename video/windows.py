"""Windows of long videos: every file is decoded once, from its first frame to its last, in bounded memory.

Reading each window by itself would open and index the file, and seek in it, thousands of times; a file with few key
frames would be decoded again and again. Here a process beside the caller's decodes a file straight through and sends
each window's frames as it has them. It may hang or crash over a damaged file: then the file is named with the reason.

Letters of shapes: T frames, H and W pixels as they are in the file, S pixels as the encoder sees them.
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from video import nursery
from video import subtitles as timeline
from video import workers as decoding
from video.reader import MAX_PIXELS, Transform, VideoError, frame_indices
from video.workers import Failure

AHEAD = 8  # windows that wait to be captioned
START = 60.0  # seconds that a process may take to come up, on a machine that is busy
EARLY = 1e-6  # seconds: i * stride is not always the number that is meant


# ---- in the process that decodes ----


class Index(NamedTuple):
    """When a video's frames are shown, ascending."""

    stamps: np.ndarray  # int64 (frames,): in the file's own units, or the frames' numbers where it has no stamps
    times: np.ndarray  # float64 (frames,): seconds from the first frame
    stamped: bool

    @property
    def duration(self) -> float:
        """Seconds, the last frame's own among them."""
        frame = self.times[-1] / (len(self.times) - 1) if self.times[-1] > 0 else 0.04
        return float(self.times[-1] + frame)


def read_index(path: Path | str) -> Index:
    """A video's frames, as its packets tell: nothing is decoded. Raises: VideoError where it is no video."""
    import av

    try:
        if not os.path.getsize(path):
            raise VideoError("the file is empty")
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            unit, rate = stream.time_base, float(stream.average_rate or 25)
            packets = (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)
            stamps = [packet.pts for packet in packets]
    except IndexError:
        raise VideoError("it holds no pictures") from None
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"it does not open as a video ({_words(error)})") from None
    if not stamps:
        raise VideoError("it holds no frames")
    if None in stamps:
        numbers = np.arange(len(stamps))
        return Index(numbers, numbers / rate, stamped=False)
    stamps = np.sort(np.array(stamps, dtype=np.int64))
    times = (stamps - stamps[0]) * unit.numerator / unit.denominator
    if times[-1] > 3600 * len(times):
        raise VideoError("its frames have impossible times")
    return Index(stamps, times, stamped=True)


def choose_frames(times: np.ndarray, spans: Sequence[tuple[float, float]], count: int) -> list[np.ndarray]:
    """For each window [start, end), `count` frames of it by the one sampler: indices into `times`, (count,) each."""
    chosen = []
    for start, end in spans:
        first, after = np.searchsorted(times, (start - EARLY, end - EARLY)).tolist()
        if after <= first:  # a window between two frames shows the one before it
            first = max(0, min(first, len(times)) - 1)
            after = first + 1
        chosen.append(first + frame_indices(after - first, count))
    return chosen


def read_windows(
    path: Path | str, index: Index, spans: Sequence[tuple[float, float]], count: int, transform: Transform
) -> Iterator[Tensor | Failure]:
    """Each window's frames, uint8 (T, 3, S, S), in order; a Failure where none of it decodes.

    In place of a frame that damage has made unreadable stands its neighbour in the window.
    Raises: VideoError where the file as a whole cannot be decoded.
    """
    chosen = [indices.tolist() for indices in choose_frames(index.times, spans, count)]
    last_window = {frame: number for number, frames in enumerate(chosen) for frame in frames}
    wanted = deque(
        sorted(last_window)
    )  # windows overlap: a later one may need frames that come before an earlier's last
    decoded = _decode(path, index.stamped)
    stamp, picture = next(decoded, (None, None))
    ready: dict[int, Tensor] = {}  # frames that are decoded and still needed
    for number, frames in enumerate(chosen):
        while wanted and wanted[0] <= frames[-1]:
            frame = wanted.popleft()
            while stamp is not None and stamp < index.stamps[frame]:
                stamp, picture = next(decoded, (None, None))
            if stamp == index.stamps[frame]:
                ready[frame] = _square(picture, transform)
        if got := [frame for frame in frames if frame in ready]:
            nearest = [min(got, key=lambda other, frame=frame: abs(other - frame)) for frame in frames]
            yield torch.stack([ready[frame] for frame in nearest])
        else:
            yield Failure("no frame of this window could be decoded")
        ready = {frame: square for frame, square in ready.items() if last_window[frame] > number}


def _decode(path: Path | str, stamped: bool) -> Iterator[tuple[int, Any]]:
    """Stamps and pictures in the order they are shown, going on behind packets that are damaged."""
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            number = 0
            for packet in container.demux(stream):
                with contextlib.suppress(av.InvalidDataError):
                    for picture in packet.decode():
                        stamp = picture.pts if stamped else number
                        number += 1
                        if stamp is not None:
                            yield stamp, picture
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"it cannot be decoded to its end ({_words(error)})") from None


def _square(picture: Any, transform: Transform) -> Tensor:
    if picture.width * picture.height > MAX_PIXELS:
        raise VideoError(f"a frame of {picture.width}x{picture.height} is too large")
    return transform.apply(picture.to_ndarray(format="rgb24")[None])[0]  # (3, S, S)


def _words(error: Exception) -> str:
    return (getattr(error, "strerror", None) or type(error).__name__)[:100]


def _answers(path: str, window: float, stride: float, count: int, transform: Transform) -> Iterator[Any]:
    """The file's windows, a list; the frames of each, or its Failure; and, where it ends early, the reason, a text."""
    try:
        index = read_index(path)
        spans = timeline.windows(index.duration, window, stride)
        yield spans
        for frames in read_windows(path, index, spans, count, transform):
            yield frames if isinstance(frames, Failure) else frames.numpy()
    except VideoError as error:
        yield str(error)
    except MemoryError:
        yield "it needs more memory than decoding may use"
    except Exception as error:
        yield f"it cannot be decoded ({type(error).__name__})"


def _work(pipe: Connection) -> None:
    """Answer each order, until the pipe closes; None ends an answer."""
    nursery.end_with_parent()
    nursery.limit_memory()
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):
        pipe.send("ready")
        while True:
            timeout, *order = pipe.recv()
            answers = _answers(*order)
            answer = True
            while answer is not None:
                # Not handled, so the kernel ends the process on time, wherever in whoever's code it hangs.
                signal.setitimer(signal.ITIMER_REAL, timeout)
                answer = next(answers, None)
                signal.setitimer(signal.ITIMER_REAL, 0)
                pipe.send(answer)


# ---- in the process that captions ----


class WindowDecoder:
    """Iterate over ((key, None), windows) for each file, followed by ((key, i), frames) for each of its windows.

    Windows are a list of (start, end) in seconds, or the Failure of the file: then no more comes of it. Frames are
    uint8 (T, 3, S, S), or the Failure of a window; those behind the place where a file's decoding ended are Failures.
    A file is decoded by one process, and at most `workers` files are at hand; at most AHEAD windows wait.
    """

    def __init__(
        self,
        paths: Iterable[tuple[Any, Path]],
        window: float,
        stride: float,
        transform: Transform,
        frames: int,
        workers: int = 1,
        timeout: float = 60.0,
    ) -> None:
        """Decode `paths`, each (key, path). In seconds: `window`, `stride` and `timeout`, the most one may take."""
        self.paths = deque(paths)
        self.order = (window, stride, frames, transform)
        self.timeout = timeout
        self.out: queue.Queue = queue.Queue(maxsize=AHEAD)
        self.closing = threading.Event()
        self.processes: set[_Process] = set()
        self.threads = [
            threading.Thread(target=self._run, name="windows", daemon=True)
            for _ in range(max(1, min(workers, len(self.paths))))
        ]

    def __enter__(self) -> "WindowDecoder":
        """Start the processes, so that they come up while the caller loads its encoder."""
        for thread in self.threads:
            if thread.ident is None:
                thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes, whatever they are at."""
        self.closing.set()
        for process in list(self.processes):
            process.end()
        for thread in self.threads:
            thread.join()

    def __iter__(self) -> Iterator[tuple[tuple[Any, int | None], Any]]:
        """Each window once, those of one file in order."""
        with self:
            running = len(self.threads)
            while running:
                item = self.out.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item

    def _run(self) -> None:
        end: BaseException | None = None
        process = None
        try:
            while not self.closing.is_set() and self.paths:
                with contextlib.suppress(IndexError):  # another thread took the last one
                    key, path = self.paths.popleft()
                    process = process or self._start()
                    if not self._pass_on(process, key, path):
                        process = self._end(process)
        except BaseException as error:
            end = error
        finally:
            if process:
                self._end(process)
            self._put(end)

    def _start(self) -> "_Process":
        process = _Process()
        self.processes.add(process)
        return process

    def _end(self, process: "_Process") -> None:
        self.processes.discard(process)
        process.end()

    def _put(self, item: Any) -> None:
        while not self.closing.is_set():
            try:
                return self.out.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _pass_on(self, process: "_Process", key: Any, path: Path) -> bool:
        """Everything that a file gives; whether the process can take another."""
        spans, number, reason, alive = None, 0, None, True
        try:
            process.pipe.send((self.timeout, str(path), *self.order))
            while not self.closing.is_set() and (answer := process.answer(self.timeout)) is not None:
                if isinstance(answer, str):
                    reason = answer
                elif isinstance(answer, list):
                    spans = answer
                    self._put(((key, None), spans))
                else:
                    frames = answer if isinstance(answer, Failure) else torch.from_numpy(answer)
                    self._put(((key, number), frames))
                    number += 1
        except (EOFError, OSError):
            late = process.exit_code() in (None, -signal.SIGALRM)
            reason = f"it took longer than {self.timeout:g} s" if late else "it ended the process that decoded it"
            alive = False
        if reason and spans is None:
            self._put(((key, None), Failure(reason)))
        elif reason:
            for left in range(number, len(spans)):
                self._put(((key, left), Failure(reason)))
        return alive


class _Process:
    """A process that decodes files, one at a time."""

    def __init__(self) -> None:
        self.pipe, theirs = Pipe()
        command = [sys.executable, "-m", "video.windows", str(theirs.fileno())]
        with theirs:
            self.process = subprocess.Popen(
                command,
                cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},  # a decoder has no use for a GPU
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # FFmpeg writes about every damaged byte; the file is named instead
                start_new_session=True,  # Ctrl-C is the caller's to answer
            )
        if not self.pipe.poll(START):
            self.end()
            raise OSError("the process that decodes videos did not start")
        self.pipe.recv()

    def answer(self, timeout: float) -> Any:
        """Its next answer. Raises: EOFError where it died, or had to be ended after `timeout` seconds."""
        if not self.pipe.poll(timeout + decoding.GRACE):
            raise EOFError
        return self.pipe.recv()

    def exit_code(self) -> int | None:
        """How it ended; None where it did not end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(decoding.GRACE)

    def end(self) -> None:
        """End it, whatever it is at."""
        self.process.kill()
        self.process.wait()
        self.pipe.close()


if __name__ == "__main__":
    _work(Connection(int(sys.argv[1])))
