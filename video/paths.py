"""The user's own videos: where they are, and what their copies are called."""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from runtime.files import UserError

SUFFIXES = {".webm", ".mp4", ".m4v", ".mov", ".mkv", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".3gp"}
SUFFIXES |= {".ts", ".mts", ".m2ts", ".gif"}
RESERVED = {"results", "index"}  # results.json and index.html are infer.py's own
NAME_BYTES = 120  # file systems count bytes, up to 255; suffixes and a number follow


def find(named: Iterable[Path], folder: Path) -> list[Path]:
    """The files that are named and the videos in the folders that are named, each once, in order.

    The copies that earlier runs left in `folder` are taken only where they are asked for, GIFs by their own names.
    Raises: UserError where a path does not exist, or a folder holds no video.
    """
    found: dict[Path, Path] = {}
    for path in named:
        if not path.exists():
            url = re.match(r"([A-Za-z][\w+.-]+):/(.+)", str(path))  # pathlib takes double slashes for one
            if url is None:
                raise UserError(f"--video {path}: there is no such file or folder")
            raise UserError(f"--video {url[1]}://{url[2]}: this is a URL: download the video first and give the file")
        inside = list(_videos_in(path, folder)) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"--video {path}: there is no video in this folder; name the files themselves")
        for video in inside:
            found.setdefault(video.resolve(), video)
    return list(found.values())


def _videos_in(path: Path, folder: Path) -> Iterator[Path]:
    asked_for = path.resolve().is_relative_to(folder.resolve())
    suffixes = SUFFIXES - {".gif"} if asked_for else SUFFIXES  # the GIFs in `folder` are infer.py's
    for place, folders, names in os.walk(path):
        shown = sorted(name for name in folders if not name.startswith("."))
        folders[:] = [name for name in shown if asked_for or Path(place, name).resolve() != folder.resolve()]
        videos = [Path(place, name) for name in sorted(names) if not name.startswith(".")]
        yield from (video for video in videos if video.suffix.lower() in suffixes and video.is_file())


def output_names(paths: Sequence[Path], folder: Path) -> list[str]:
    """A file name for each video, its copy and what is written for it: safe in a page's links and on any disk.

    What is written for a video is named by its stem (.webm, .json, .srt, .gif), so stems differ, whatever their case.
    A video that lies in `folder` already keeps its name, so that no copy is written over it.
    """
    safe = {path: Path(_safe_name(path)) for path in paths}
    stay = [path for path in paths if path.name == safe[path].name and path.resolve().parent == folder.resolve()]
    taken, names = set(RESERVED), {}
    for path in dict.fromkeys([*stay, *paths]):
        stem = safe[path].stem
        numbered = (f"{stem}-{number}" for number in itertools.count(2))
        free = next(name for name in itertools.chain([stem], numbered) if name.casefold() not in taken)
        taken.add(free.casefold())
        names[path] = free + safe[path].suffix
    return [names[path] for path in paths]


def _safe_name(path: Path) -> str:
    stem = re.sub(r"[^\w.-]", "_", path.stem).strip(".")
    stem = stem.encode()[:NAME_BYTES].decode(errors="ignore") or "video"
    # A suffix of another kind (a GIF, a .json that is a video) could be that of a file written for the clip.
    return stem + (path.suffix.lower() if path.suffix.lower() in SUFFIXES else ".video")
