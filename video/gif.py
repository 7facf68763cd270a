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

_STRIP, _INK, _DIM = (17, 19, 22), (245, 245, 240), (160, 164, 170)  # under the clip: ground, caption, reference
_LONGEST = 400  # characters of a caption that are drawn
_MOST_FPS = 25.0  # browsers slow down a GIF whose frames stand for less than 20 ms


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
    Raises: ValueError where the frames have another shape or type; UserError where nothing fits in max_bytes.
    """
    frames = np.asarray(frames)  # (T, H, W, 3)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames must be uint8 of shape (T, H, W, 3), got {frames.dtype} {frames.shape}")
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be a positive number, got {fps}")
    thinnest = math.ceil(fps / _MOST_FPS - 1e-6)
    for part, colours, thinning in _GIF_SIZES:
        step = thinnest * thinning
        picture = _gif(frames[::step], caption, reference, fps / step, max(48, round(width * part)), colours)
        if len(picture) <= max_bytes:
            files.write_atomic(path, lambda file, picture=picture: file.write(picture))
            return
    raise files.UserError(f"{path}: the smallest GIF of this clip has {len(picture):,} bytes, over {max_bytes:,}")


# (part of the width, colours, one frame in n): what is missed least goes first.
_GIF_SIZES = (
    *((1.0, 128, 1), (1.0, 64, 1), (1.0, 64, 2), (0.75, 64, 2), (0.75, 32, 3), (0.6, 32, 4), (0.5, 32, 4)),
    *((0.5, 16, 6), (0.4, 16, 8), (0.3, 16, 16), (0.2, 8, 32)),
)


def _gif(
    frames: np.ndarray, caption: str, reference: str | None, fps: float, width: int, colours: int
) -> bytes:  # frames (T, H, W, 3)
    height = max(1, round(frames.shape[1] * width / frames.shape[2]))
    strip = _strip(width, caption, reference)
    pictures = [Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in frames]

    # One palette for all frames, so that what stands still has one colour and costs nothing in the next frame.
    # A third of the colours of a 16-colour GIF for the caption is much, but it has to be read.
    greys = max(3, min(8, colours // 4))
    some = pictures[:: math.ceil(len(pictures) / 8)]
    sheet = Image.new("RGB", (width, height * len(some)))
    for row, picture in enumerate(some):
        sheet.paste(picture, (0, row * height))
    found = sheet.quantize(colours - greys, Image.Quantize.MEDIANCUT).getpalette()[: 3 * (colours - greys)]
    ramp = np.linspace(_STRIP, _INK, greys).round().astype(int).ravel().tolist()
    palette = Image.new("P", (1, 1))
    palette.putpalette(ramp + found)

    composed = []
    for picture in pictures:
        whole = Image.new("RGB", (width, height + strip.height))
        whole.paste(picture, (0, 0))
        whole.paste(strip, (0, height))
        composed.append(whole.quantize(palette=palette, dither=Image.Dither.NONE))
    # A GIF counts in hundredths of a second. Rounding the ends keeps the sum right where 1 / fps is not whole.
    ends = np.round(np.arange(1, len(composed) + 1) * 100 / fps).astype(int)
    delays = np.maximum(2, np.diff(ends, prepend=0)) * 10  # milliseconds
    out = io.BytesIO()
    composed[0].save(
        out, "GIF", save_all=True, append_images=composed[1:], duration=delays.tolist(), loop=0, disposal=1
    )
    return out.getvalue()


def _strip(width: int, caption: str, reference: str | None) -> Image.Image:
    """The caption, wrapped, in white on a dark ground; the reference under it in grey."""
    size = max(11, round(width / 20))
    margin = size // 2
    rows = []
    for text, scale, ink in ((caption, 1.0, _INK), (f"reference: {reference}" if reference else "", 0.8, _DIM)):
        font = _font(max(9, round(size * scale)))
        text = textwrap.shorten(files.shown(text), _LONGEST, placeholder=" …")
        rows += [(line, font, ink) for line in _wrap(text, font, width - 2 * margin)]
    strip = Image.new("RGB", (width, 2 * margin + sum(round(font.size * 1.3) for _, font, _ in rows)), _STRIP)
    draw, top = ImageDraw.Draw(strip), margin
    for line, font, ink in rows:
        draw.text((margin, top), line, fill=ink, font=font)
        top += round(font.size * 1.3)
    return strip


def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow's own font knows Latin only. matplotlib brings one with Greek, Cyrillic, Arabic and many signs; it is
    # found without importing matplotlib. Chinese, Japanese and Korean are drawn as boxes.
    found = importlib.util.find_spec("matplotlib")
    file = Path(found.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf" if found and found.origin else None
    return ImageFont.truetype(str(file), size) if file and file.is_file() else ImageFont.load_default(size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels; a word that is wider is broken. Empty text gives no line."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        if line and font.getlength(f"{line} {word}") > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}" if line else word
        while len(line) > 1 and font.getlength(line) > width:
            fits = next(n for n in range(len(line) - 1, 0, -1) if n == 1 or font.getlength(line[:n]) <= width)
            lines.append(line[:fits])
            line = line[fits:]
    return [*lines, line] if line else lines
