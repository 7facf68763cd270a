"""The user's own videos: where they are, and what their copies are called."""

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
        if path.is_file():
            inside = [path]
        elif path.is_dir():
            inside = list(_videos_in(path, folder))
            if not inside:
                raise UserError(f"--video {path}: there is no video in this folder; name the files themselves")
        elif re.match(r"[A-Za-z][\w+.-]+:/", str(path)) and not path.exists():
            address = str(path).replace(":/", "://", 1)  # pathlib takes double slashes for one
            raise UserError(f"--video {address}: this is a URL: download the video first and give the file")
        else:
            what = "this is neither a file nor a folder" if path.exists() else "there is no such file or folder"
            raise UserError(f"--video {path}: {what}")
        for video in inside:
            found.setdefault(video.resolve(), video)
    return list(found.values())


def _videos_in(path: Path, folder: Path) -> Iterator[Path]:
    asked_for = path.resolve().is_relative_to(folder.resolve())
    for place, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if Path(place).resolve() == folder.resolve() and not asked_for:
            folders.clear()
            continue
        suffixes = SUFFIXES - {".gif"} if asked_for else SUFFIXES  # the GIFs in `folder` are infer.py's
        for name in sorted(names):
            video = Path(place, name)
            if video.suffix.lower() in suffixes and not name.startswith(".") and video.is_file():
                yield video


def output_names(paths: Sequence[Path], folder: Path) -> list[str]:
    """A file name for each video, its copy and what is written for it: safe in a page's links and on any disk.

    What is written for a video is named by its stem (.webm, .json, .srt, .gif), so stems differ, whatever their case.
    A video that lies in `folder` already keeps its name, so that no copy is written over it.
    """

    def stays(path: Path) -> bool:
        return path.name == _safe_name(path) and path.resolve().parent == folder.resolve()

    taken, names = set(RESERVED), {}
    for path in sorted(paths, key=lambda path: not stays(path)):
        name, number = Path(_safe_name(path)), 1
        stem = name.stem
        while stem.casefold() in taken:
            number += 1
            stem = f"{name.stem}-{number}"
        taken.add(stem.casefold())
        names[path] = stem + name.suffix
    return [names[path] for path in paths]


def _safe_name(path: Path) -> str:
    stem = re.sub(r"[^\w.-]", "_", path.stem).strip(".")
    stem = stem.encode()[:NAME_BYTES].decode(errors="ignore") or "video"
    # A suffix of another kind (a GIF, a .json that is a video) could be that of a file written for the clip.
    return stem + (path.suffix.lower() if path.suffix.lower() in SUFFIXES else ".video")
