"""Captioned GIFs: a clip with its caption drawn under it, small enough for a README.

Letters of shapes: T frames, H height, W width.
"""

import importlib.util
import io
import math
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from runtime import files

STRIP, INK, DIM = (17, 19, 22), (245, 245, 240), (160, 164, 170)  # under the clip: ground, caption, reference
LONGEST = 400  # characters of a caption that are drawn
MOST_FPS = 25.0  # browsers slow down a GIF whose frames stand for less than 20 ms
# (part of the width, colours, one frame in n): what is missed least goes first.
SIZES = [(1.0, 128, 1), (1.0, 64, 1), (1.0, 64, 2), (0.75, 64, 2), (0.75, 32, 3), (0.6, 32, 4), (0.5, 32, 4)]
SIZES += [(0.5, 16, 6), (0.4, 16, 8), (0.3, 16, 16), (0.2, 8, 32)]


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

    frames: (T, H, W, 3) uint8, shown at `fps` frames a second and `width` pixels wide. Where that takes more than
    `max_bytes`, colours, frames and width are reduced until it fits; the clip keeps its duration.
    Raises: UserError where nothing fits in max_bytes.
    """
    thinnest = math.ceil(fps / MOST_FPS - 1e-6)
    for part, colours, thinning in SIZES:
        step = thinnest * thinning
        picture = _gif(frames[::step], caption, reference, fps / step, max(48, round(width * part)), colours)
        if len(picture) <= max_bytes:
            files.write_atomic(path, lambda file, picture=picture: file.write(picture))
            return
    raise files.UserError(f"{path}: the smallest GIF of this clip has {len(picture):,} bytes, over {max_bytes:,}")


def _gif(frames: np.ndarray, caption: str, reference: str | None, fps: float, width: int, colours: int) -> bytes:
    height = max(1, round(frames.shape[1] * width / frames.shape[2]))
    strip = _strip(width, caption, reference)
    pictures = []
    for frame in frames:
        whole = Image.new("RGB", (width, height + strip.height))
        whole.paste(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
        whole.paste(strip, (0, height))
        pictures.append(whole)
    # One palette for all frames, so that what stands still has one colour and costs nothing in the next frame.
    palette = _palette([picture.crop((0, 0, width, height)) for picture in pictures], colours)
    first, *others = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    # A GIF counts in hundredths of a second. Rounding the ends keeps the sum right where 1 / fps is not whole.
    ends = np.round(np.arange(1, len(pictures) + 1) * 100 / fps).astype(int)
    delays = np.maximum(2, np.diff(ends, prepend=0)) * 10  # milliseconds
    out = io.BytesIO()
    first.save(out, "GIF", save_all=True, append_images=others, duration=delays.tolist(), loop=0, disposal=1)
    return out.getvalue()


def _palette(pictures: list[Image.Image], colours: int) -> Image.Image:
    """Colours of eight of the frames, and greys: many for a GIF of 16 colours, but the caption has to be read."""
    greys = max(3, min(8, colours // 4))
    some = np.concatenate(pictures[:: math.ceil(len(pictures) / 8)])
    found = Image.fromarray(some).quantize(colours - greys, Image.Quantize.MEDIANCUT).getpalette()
    ramp = np.linspace(STRIP, INK, greys).round().astype(int).ravel().tolist()
    palette = Image.new("P", (1, 1))
    palette.putpalette(ramp + found[: 3 * (colours - greys)])
    return palette


def _strip(width: int, caption: str, reference: str | None) -> Image.Image:
    """The caption, wrapped, in white on a dark ground; the reference under it in grey."""
    size = max(11, round(width / 20))
    margin = size // 2
    rows = []
    for text, scale, ink in ((caption, 1.0, INK), (f"reference: {reference}" if reference else "", 0.8, DIM)):
        font = _font(max(9, round(size * scale)))
        text = textwrap.shorten(files.printable(text), LONGEST, placeholder=" …")
        rows += [(line, font, ink) for line in _wrap(text, font, width - 2 * margin)]
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
    lines: list[str] = []
    for columns in range(len(text), 0, -1):
        lines = textwrap.wrap(text, columns)
        if all(font.getlength(line) <= width for line in lines):
            break
    return lines
