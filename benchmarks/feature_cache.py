"""The feature cache: bytes a clip, time to read one back, and what int8 and pooling cost.

Files are written at real size, with features of the scale that V-JEPA 2's last norm gives. The cosine between stored
and computed features is that of the worst token, of a random V-JEPA 2 as wide as ViT-L, and of the sample's. With
--score the sample's recipe is run from videos to scores on each kind of features, with several seeds.
"""

import argparse
import re
import shlex
import statistics
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import VJEPA2Config, VJEPA2Model

import dataset
import evaluate
import prepare_annotations
import preprocess_something_something_v2 as preprocess
import train
from benchmarks import measure
from features import cache
from features.reader import feature_batches
from models.vjepa2 import VideoEncoder
from runtime import cli, files
from runtime.files import UserError
from sample import world
from video.reader import Transform, read_clip

KINDS = {"float16": ("float16", 1), "int8": ("int8", 1), "int8, pool 2": ("int8", 2)}
WANTED = {"float16": "8.39 MB", "int8": "<= 4.21 MB", "int8, pool 2": "<= 1.06 MB"}
CLIPS = 8  # files of each kind that are read back
GRIDS = {"real": ((16, 16, 16), 1024), "small": ((4, 4, 4), 64)}  # ViT-L's, 32 frames of 256 x 256 pixels


def recipe(pattern: str) -> str:
    """The Makefile's line from `pattern` on, with the sample's models by their whole paths."""
    lines = re.sub(r"\\\n\s*", "", (measure.SAMPLE.parent / "Makefile").read_text())
    found = re.search(pattern, lines).group()
    return re.sub(r"(?<=\s)sample/(?=\w+2\b)", f"{measure.SAMPLE}/", found)


def files_of(kind: str, size: str, folder: Path, runs: int) -> list[str]:
    """A row of bytes and reading times, of files of `kind`."""
    grid, dim = GRIDS[size]
    dtype, pool = KINDS[kind]
    tokens = grid[0] * grid[1] * grid[2]
    names = [str(number) for number in range(CLIPS)]
    for name in names:
        cache.save(folder / f"{name}.pt", cache.quantize(torch.randn(tokens, dim), dtype, pool, grid))

    def read() -> None:
        for packed in feature_batches(folder, [[name] for name in names], workers=0):
            cache.dequantize(packed)

    seconds = measure.times({kind: read}, runs)[kind]
    size_of_file = (folder / "0.pt").stat().st_size
    return [kind, f"{size_of_file:,}", WANTED[kind], measure.spread(seconds, 2, 1000 / CLIPS)]


def wide_features(size: str, depth: int) -> tuple[Tensor, cache.Grid]:
    """Features (N, D) of a drawn clip from a random V-JEPA 2: as wide as ViT-L in real size, of few layers."""
    grid, dim = GRIDS[size]
    frames = 2 * grid[0]
    config = VJEPA2Config(
        crop_size=16 * grid[1],
        frames_per_clip=frames,
        hidden_size=dim,
        num_attention_heads=dim // 64,
        num_hidden_layers=depth,
        pred_hidden_size=12,
        pred_num_attention_heads=1,
        pred_num_hidden_layers=1,
    )
    torch.manual_seed(0)
    model = VJEPA2Model(config).eval()
    clip = world.render_clip(next(iter(world.choose_clips({"train": 1}, 0)["train"].values())), frames=frames)
    look = Transform(16 * grid[1])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (look.mean, look.std))
    pixels = (look.apply(clip).float() / 255 - mean) / std
    with torch.no_grad():
        return model.get_vision_features(pixels[None])[0], grid


def sample_features(data: Path, flags: str, clips: int) -> tuple[Tensor, cache.Grid]:
    """Features (B, N, D) of the sample's validation clips from its own encoder."""
    args = preprocess.parse(shlex.split(flags))
    encoder = VideoEncoder(args.encoder, "cpu", args.num_frames)
    layout = dataset.Layout(data)
    chosen = [layout.video(record["id"]) for record in dataset.read_split(data, "validation")[:clips]]
    frames = [read_clip(path, encoder.frames, encoder.transform)[0] for path in chosen]
    return encoder.encode(torch.stack(frames)), encoder.grid


def cosines(features: Tensor, grid: cache.Grid) -> list[list[str]]:
    """Rows: how like the computed tokens the stored ones are."""
    rows = []
    for kind, (dtype, pool) in KINDS.items():
        wanted = pooled(features, pool, grid)
        found = cache.dequantize(cache.quantize(features, dtype, pool, grid))
        alike = torch.cosine_similarity(found.double(), wanted.double().view_as(found), dim=-1)
        rows.append([kind, f"{alike.min():.6f}", f"{alike.mean():.6f}", ">= 0.9995"])
    return rows


def pooled(features: Tensor, pool: int, grid: cache.Grid) -> Tensor:
    """The mean over pool x pool patches, in float32: (..., N, D) -> (..., N / pool^2, D)."""
    steps, height, width = grid
    tiles = features.unflatten(-2, (steps, height // pool, pool, width // pool, pool))
    return tiles.mean(dim=(-4, -2)).flatten(-4, -2)


def scores(args: argparse.Namespace) -> list[list[str]]:
    """Rows: CIDEr of the whole recipe on each kind of features."""
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for kind, (dtype, pool) in KINDS.items():
            root = Path(work) / kind
            data = encoded(args.data, root / "data", f"{args.encode} --dtype {dtype} --pool {pool}")
            found = [score(data, root, args.train, seed, args.split) for seed in args.seeds]
            spread = f"{statistics.stdev(found):.3f}" if len(found) > 1 else ""
            size = cache.bytes_per_clip(cache.read_config(data / "features"))
            values = [f"{statistics.mean(found):.3f}", spread, " ".join(f"{value:.3f}" for value in found)]
            rows.append([kind, f"{size:,}", *values])
    return rows


def encoded(data: Path, folder: Path, flags: str) -> Path:
    """The dataset `data` in `folder` with features of its own, by links to its videos and labels."""
    layout = dataset.Layout(data)
    if not layout.videos.is_dir():
        raise UserError(f"there are no videos in {layout.videos}; make demo renders the sample")
    folder.mkdir(parents=True)
    for entry in data.iterdir():
        if entry.name not in (layout.features.name, layout.annotations.name):
            (folder / entry.name).symlink_to(entry.resolve())
    prepare_annotations.main(["--data", str(folder)])
    splits = [split for split in dataset.SPLITS if (dataset.Layout(folder).annotations / dataset.READY[split]).exists()]
    preprocess.main(["--data", str(folder), "--splits", *splits, *shlex.split(flags)])
    return folder


def score(data: Path, root: Path, flags: str, seed: int, split: str) -> float:
    """CIDEr on `split` of one run of training."""
    out = ["--data", data, "--checkpoint", root / f"{seed}.pt", "--results", root / f"{seed}"]
    out = list(map(str, out))
    if code := train.main([*out, *shlex.split(flags), "--seed", str(seed)]):
        raise SystemExit(code)  # interrupted: there is nothing to score
    evaluate.main([*out, "--split", split, "--no-meteor"])
    return files.read_json(root / f"{seed}" / "evaluation.json", "the scores")["metrics"]["CIDEr"]


def main(argv: list[str] | None = None) -> None:
    """Measure, and print the tables."""
    parser = measure.parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/sample"), help="the sample, rendered (make demo does it)")
    add("--encode", default=recipe("--encoder .*"), help="flags of preprocess_something_something_v2.py")
    add("--train", default=recipe("RECIPE := .*").split(":= ", 1)[1], help="flags of train.py")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="runs of each setting")
    add("--size", choices=GRIDS, default="real", help="of the files and of the random encoder")
    add("--depth", type=cli.count, default=2, help="layers of the random encoder")
    add("--clips", type=cli.count, default=50, help="of the sample, whose features are compared")
    add("--score", action="store_true", help="run the sample's recipe on each kind of features")
    add("--split", choices=dataset.SPLITS, default="test", help="what --score scores")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.score:
        title = f"CIDEr of the sample's recipe on the {args.split} split, seeds {args.seeds}"
        header = ("features", "bytes a clip", "mean", "standard deviation", "of each seed")
        measure.report(__file__, title, header, scores(args))
        return
    with tempfile.TemporaryDirectory() as work:
        rows = [files_of(kind, args.size, Path(work) / kind, args.runs) for kind in KINDS]
    header = ("features", "bytes a clip", "wanted at real size", "ms to read and unpack a clip")
    measure.report(__file__, f"The feature cache, {args.size} size, {CLIPS} files each", header, rows)
    encoders = {f"a random V-JEPA 2, {GRIDS[args.size][1]} wide": wide_features(args.size, args.depth)}
    if dataset.Layout(args.data).videos.is_dir():
        encoders["the sample's V-JEPA 2"] = sample_features(args.data, args.encode, args.clips)
    for name, (features, grid) in encoders.items():
        title = f"Cosine of stored to computed tokens (pooled ones to their float32 mean), {name}"
        header = ("features", "worst token", "mean", "wanted")
        measure.report(__file__, title, header, cosines(features, grid))


if __name__ == "__main__":
    cli.run(main)
