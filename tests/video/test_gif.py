import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime import files
from video import gif


def test_captioning_does_not_load_matplotlib():
    # In its own process, for other tests load it; without runtime.files, for torch takes seconds to import.
    code = (
        "import sys; sys.modules['runtime'] = files = type(sys)('runtime'); files.files = None;"
        "from video import gif; gif._font(12); sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(gif.__file__).parents[1]).returncode == 0


def moving_square(count=12, height=84, width=112):
    frames = np.full((count, height, width, 3), (30, 60, 90), np.uint8)  # (T, H, W, 3)
    for i in range(count):
        frames[i, 20:50, 4 * i : 4 * i + 30] = (220, 60, 40)
    return frames


def read_gif(path):
    picture = Image.open(path)
    pictures, delays = [], []
    for i in range(picture.n_frames):
        picture.seek(i)
        pictures.append(np.asarray(picture.convert("RGB")))
        delays.append(picture.info["duration"])
    return np.stack(pictures), delays, picture.info.get("loop")


def test_gif_keeps_frames_colours_and_duration_and_loops(tmp_path):
    gif.write_gif(tmp_path / "a.gif", moving_square(), "moving a red square", fps=12, width=224)
    pictures, delays, loop = read_gif(tmp_path / "a.gif")
    assert len(pictures) == 12 and sum(delays) == 1000 and loop == 0
    assert pictures.shape[2] == 224 and pictures.shape[1] > 168
    for i, picture in enumerate(pictures):
        assert np.abs(picture[70, 8 * i + 30].astype(int) - (220, 60, 40)).max() <= 12
        assert np.abs(picture[10, 10].astype(int) - (30, 60, 90)).max() <= 12


def test_the_caption_is_drawn_under_the_clip_and_depends_on_the_text(tmp_path):
    strips = {}
    for name, caption in (("one", "moving a red square"), ("two", "pushing a blue cup"), ("none", "")):
        gif.write_gif(tmp_path / f"{name}.gif", moving_square(2), caption, fps=12, width=224)
        strips[name] = read_gif(tmp_path / f"{name}.gif")[0][:, 168:]
    bright = {name: (strip.min(-1) > 180).sum() for name, strip in strips.items()}
    assert bright["one"] > 100 and bright["two"] > 100 and bright["none"] == 0
    assert strips["one"].shape == strips["two"].shape and (strips["one"] != strips["two"]).any()


def test_a_reference_is_drawn_below_the_caption(tmp_path):
    gif.write_gif(tmp_path / "a.gif", moving_square(2), "caption", fps=12)
    gif.write_gif(tmp_path / "b.gif", moving_square(2), "caption", fps=12, reference="another")
    without, with_reference = read_gif(tmp_path / "a.gif")[0], read_gif(tmp_path / "b.gif")[0]
    assert with_reference.shape[1] >= without.shape[1] + 10
    assert (with_reference[0, without.shape[1] :].max(-1) > 100).sum() > 50


def test_long_captions_wrap_and_a_word_too_long_for_a_line_is_broken():
    font = gif._font(12)
    text = "pretending to put a very small bottle of water behind a cup " + "x" * 60
    lines = gif._wrap(text, font, 150)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "") and len(lines) > 4
    assert all(font.getlength(line) <= 150 for line in lines)
    assert gif._wrap(" \n ", font, 150) == []
    assert gif._wrap("ab", font, 1) == ["a", "b"]


def test_letters_beyond_latin_have_glyphs_of_their_own():
    missing = gif._font(16).getmask("\U0010fffe")
    for letter in "éжλﺏשñ→":
        assert bytes(gif._font(16).getmask(letter)) != bytes(missing)


def test_gif_of_noise_is_made_to_fit_and_keeps_its_duration(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (48, 60, 80, 3), np.uint8)  # nothing compresses it
    for limit in (400_000, 60_000):
        gif.write_gif(tmp_path / "noise.gif", noise, "noise", fps=12, max_bytes=limit, width=160)
        assert (tmp_path / "noise.gif").stat().st_size <= limit
        assert sum(read_gif(tmp_path / "noise.gif")[1]) == 4000


def test_gif_that_cannot_fit_says_so_and_writes_nothing(tmp_path):
    with pytest.raises(files.UserError, match="over 100"):
        gif.write_gif(tmp_path / "a.gif", moving_square(), "a caption", fps=12, max_bytes=100)
    assert list(tmp_path.iterdir()) == []
