"""Captioned GIFs: a clip with its caption drawn under it, small enough for a README."""

import importlib.util
import io
import math
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from runtime import files

STRIP, INK, DIM = (17, 19, 22), (245, 245, 240), (160, 164, 170)  # under the clip: ground, caption, reference
# (part of the width, colours, one frame in n): what is missed least goes first.
SIZES = [(1.0, 128, 1), (1.0, 64, 1), (0.75, 64, 2), (0.6, 32, 4), (0.4, 32, 8), (0.2, 16, 32)]


def write_gif(
    path: Path | str,
    frames: np.ndarray,
    caption: str,
    fps: float,
    max_bytes: int = 1_000_000,
    reference: str | None = None,
    width: int = 320,
) -> None:
    """Write an endless GIF of a clip with its caption (and a reference, dimmed) drawn under it.

    frames: uint8 (frames, height, width, 3), shown at `fps` a second and `width` pixels wide. Where that takes more
    than `max_bytes`, colours, frames and width are reduced until it fits; the clip keeps its duration.
    Raises: UserError where nothing fits in max_bytes.
    """
    for part, colours, step in SIZES:
        picture = _gif(frames[::step], caption, reference, fps / step, max(48, round(width * part)), colours)
        if len(picture) <= max_bytes:
            files.write_atomic(path, lambda file, picture=picture: file.write(picture))
            return
    raise files.UserError(f"{path}: the smallest GIF of this clip has {len(picture):,} bytes, over {max_bytes:,}")


def _gif(frames: np.ndarray, caption: str, reference: str | None, fps: float, width: int, colours: int) -> bytes:
    height = max(1, round(frames.shape[1] * width / frames.shape[2]))
    strip = _strip(width, caption, reference)
    resized = (Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in frames)
    pictures = [Image.fromarray(np.concatenate([picture, strip])) for picture in resized]
    # One palette for all frames, so that what stands still has one colour and costs nothing in the next frame.
    some = Image.fromarray(np.concatenate(pictures[:: math.ceil(len(pictures) / 8)]))
    palette = some.quantize(colours, Image.Quantize.MEDIANCUT)
    first, *others = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    # A GIF counts in hundredths of a second. Rounding the ends keeps the sum right where 1 / fps is not whole.
    delays = np.diff(np.round(np.arange(len(pictures) + 1) * 100 / fps)).astype(int) * 10  # milliseconds
    out = io.BytesIO()
    first.save(out, "GIF", save_all=True, append_images=others, duration=delays.tolist(), loop=0, disposal=1)
    return out.getvalue()


def _strip(width: int, caption: str, reference: str | None) -> Image.Image:
    """The caption, wrapped, in white on a dark ground; the reference under it in grey."""
    size = max(11, round(width / 20))
    margin = size // 2
    rows = []
    for text, scale, ink in ((caption, 1.0, INK), (f"reference: {reference}" if reference else "", 0.8, DIM)):
        font = _font(max(9, round(size * scale)))
        rows += [(line, font, ink) for line in _wrap(files.printable(text), font, width - 2 * margin)]
    strip = Image.new("RGB", (width, 2 * margin + sum(round(font.size * 1.3) for _, font, _ in rows)), STRIP)
    draw, top = ImageDraw.Draw(strip), margin
    for line, font, ink in rows:
        draw.text((margin, top), line, fill=ink, font=font)
        top += round(font.size * 1.3)
    return strip


def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow's own font knows Latin only. matplotlib brings one with Greek, Cyrillic, Arabic and many signs; it is
    # found without importing matplotlib. Chinese, Japanese and Korean are drawn as boxes.
    folder = Path(importlib.util.find_spec("matplotlib").origin).parent
    return ImageFont.truetype(str(folder / "mpl-data/fonts/ttf/DejaVuSans.ttf"), size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels, and of letters alike in number; a word that is wider is broken."""
    for columns in range(len(text), 1, -1):
        lines = textwrap.wrap(text, columns)
        if all(font.getlength(line) <= width for line in lines):
            return lines
    return textwrap.wrap(text, 1)
