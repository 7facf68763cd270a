"""The user's own videos: where they are, and what their copies are called."""

import itertools
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from runtime.files import UserError
from video.container import missing

SUFFIXES = {".webm", ".mp4", ".m4v", ".mov", ".mkv", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".3gp"}
SUFFIXES |= {".ts", ".mts", ".m2ts", ".gif"}
RESERVED = {"results", "index"}  # results.json and index.html are infer.py's own
NAME_BYTES = 120  # file systems count bytes, up to 255; suffixes and a number follow


def find(named: Iterable[Path], folder: Path) -> list[Path]:
    """The files that are named and the videos in the folders that are named, each once, in order.

    The copies that earlier runs left in `folder` are taken only where it is named itself.
    Raises: UserError where a path does not exist, or a folder holds no video.
    """
    found: dict[Path, Path] = {}
    for path in named:
        if not path.exists():
            raise UserError(f"--video {path}: {missing(path)}")
        inside = list(_videos_in(path, folder)) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"--video {path}: there is no video in this folder; name the files themselves")
        for video in inside:
            found.setdefault(video.resolve(), video)
    return list(found.values())


def _videos_in(path: Path, folder: Path) -> Iterator[Path]:
    entered = {folder.resolve(), path.resolve()}  # each once, the folder itself before a link: links lead in circles
    for place, folders, names in os.walk(path, followlinks=True):
        links_first = sorted(folders, key=lambda name: not Path(place, name).is_symlink())
        inside = {Path(place, name).resolve(): name for name in links_first if not name.startswith(".")}
        folders[:] = sorted(name for real, name in inside.items() if real not in entered)
        entered |= set(inside)
        videos = [Path(place, name) for name in sorted(names) if not name.startswith(".")]
        yield from (video for video in videos if video.suffix.lower() in SUFFIXES and video.is_file())


def match(names: Iterable[str], folder: Path, data: Path) -> tuple[dict[str, str], list[str]]:
    """Which video each name means, as its path within `folder`, and all videos of the folder, without those in `data`.

    A name may lack folders or suffix, begin with the folder's own, and differ in case or in how its accents are
    written (macOS takes them apart). Names that no video has are left out.
    Raises: UserError where a name fits several videos, or there is no video at all.
    """
    places = [path.relative_to(folder).as_posix() for path in _videos_in(folder, data)]
    known = defaultdict(set)  # by the whole path and its ends, with and without suffix
    for place in places:
        parts = plain(place).casefold().split("/")
        for tail in ("/".join(parts[start:]) for start in range(len(parts))):
            known[tail].add(place)
            known[without_suffix(tail)].add(place)
    starts = ("", *(f"{plain(str(at))}/" for at in (folder, folder.resolve(), folder.name)))
    found = {}
    for name in names:
        forms = [plain(name).removeprefix(start) for start in starts]
        forms += list(map(without_suffix, forms))
        places_of = next((known[form.casefold()] for form in forms if form.casefold() in known), set())
        whole = {place for place in places_of if {plain(place), without_suffix(plain(place))} & {*forms}}
        fits = {place for place in whole if plain(place) in forms} or whole or places_of
        lone, known_suffix = name.strip(), Path(name.strip()).suffix.lower() in SUFFIXES
        if not (fits and known_suffix) and os.path.isfile(folder / lone):  # of a suffix that no video has, or elsewhere
            fits = {lone}
        if len(fits) > 1:
            raise UserError(f"{name!r} fits {', '.join(sorted(fits)[:3])}: name it with its folder and suffix")
        found.update((name, place) for place in fits)
    if not places and not found:
        raise UserError(f"--videos {folder}: there is no {'video in this' if folder.is_dir() else 'such'} folder")
    return found, places


def plain(name: str) -> str:
    """A name's one form: composed accents, forward slashes, no blanks around it."""
    return unicodedata.normalize("NFC", name.strip()).replace("\\", "/").removeprefix("./")


def without_suffix(name: str) -> str:
    """A name without its video suffix, or that of features; another dot is part of the name."""
    stem, _, suffix = name.rpartition(".")
    return stem if stem and f".{suffix.lower()}" in SUFFIXES | {".pt"} else name


def output_names(paths: Sequence[Path], folder: Path) -> list[str]:
    """A file name for each video, its copy and what is written for it: safe in a page's links and on any disk.

    What is written for a video is named by its stem (.webm, .json, .srt, .gif), so stems differ, whatever their case.
    Videos that lie in `folder` already come first and keep their names, so that no copy is written over them.
    """
    taken, names = set(RESERVED), {}
    for path in sorted(paths, key=lambda path: path.resolve().parent != folder.resolve()):
        safe = re.sub(r"[^\w.-]|\.(?=(attention|query-\d+)$)", "_", path.stem).strip(".")  # x.attention: x's overlay
        stem = safe.encode()[:NAME_BYTES].decode(errors="ignore") or "video"
        numbered = (f"{stem}-{number}" for number in itertools.count(2))
        free = next(name for name in itertools.chain([stem], numbered) if name.casefold() not in taken)
        taken.add(free.casefold())
        # A suffix of another kind (a .json that is a video) could be that of a file written for the clip.
        names[path] = free + (path.suffix.lower() if path.suffix.lower() in SUFFIXES else ".video")
    return [names[path] for path in paths]
