"""The feature cache: bytes a clip, time to read one back, and what int8 and pooling cost.

Files are written at real size, with features of the scale that V-JEPA 2's last norm gives. The cosine between stored
and computed features is that of the worst token, of a random V-JEPA 2 as wide as ViT-L, and of the sample's. With
--score the sample's recipe is run from videos to scores on each kind of features, with several seeds.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shlex

import torch
from torch import Tensor
from transformers import VJEPA2Config, VJEPA2Model

import dataset
import evaluate
import train
from benchmarks import demo, measure
from features import cache
from features.loader import FeatureLoader
from models import vjepa2 as vjepa
from runtime import cli as arguments
from runtime import files
from sample import __main__ as sample
from video.reader import Transform, read_frames

KINDS = {"float16": ("float16", 1), "int8": ("int8", 1), "int8, pool 2": ("int8", 2)}
WANTED = {"float16": "8.39 MB", "int8": "<= 4.21 MB", "int8, pool 2": "<= 1.06 MB"}
CLIPS = 8  # files of each kind that are read back
GRIDS = {"real": ((16, 16, 16), 1024), "small": ((4, 4, 4), 64)}  # ViT-L's, 32 frames of 256 x 256 pixels


def files_of(kind: str, size: str, folder: Path, runs: int) -> list[str]:
    """A row of bytes and reading times, of files of `kind`."""
    grid, dim = GRIDS[size]
    dtype, pool = KINDS[kind]
    tokens = grid[0] * grid[1] * grid[2]
    names = [str(number) for number in range(CLIPS)]
    for name in names:
        cache.save(folder / f"{name}.pt", cache.quantize(torch.randn(tokens, dim), dtype, pool, grid))

    def read() -> None:
        for _, packed in FeatureLoader(folder, [[name] for name in names]):
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
    clip = sample.render_clip(next(iter(sample.choose_clips({"train": 1}, 0)["train"].values())), frames=frames)
    look = Transform(16 * grid[1], False, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (look.mean, look.std))
    pixels = (look.apply(clip).float() / 255 - mean) / std
    with torch.no_grad():
        return model.get_vision_features(pixels[None])[0], grid


def sample_features(data: Path, flags: str, clips: int) -> tuple[Tensor, cache.Grid]:
    """Features (B, N, D) of the sample's validation clips from its own encoder."""
    args = argparse.ArgumentParser()
    args.add_argument("--encoder"), args.add_argument("--frames", type=int)
    known, _ = args.parse_known_args(shlex.split(flags))
    encoder = vjepa.VideoEncoder(known.encoder, "cpu", known.frames)
    layout = dataset.check_data(data)
    chosen = [layout.video(record["id"]) for record in dataset.read_split(data, "validation")[:clips]]
    frames = [encoder.transform.apply(read_frames(path, encoder.frames)) for path in chosen]
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
            data = demo.encoded(args.data, root / "data", f"{args.encode} --dtype {dtype} --pool {pool}")
            found = [score(data, root, args.train, seed, args.split) for seed in args.seeds]
            spread = f"{statistics.stdev(found):.3f}" if len(found) > 1 else ""
            size = cache.bytes_per_clip(cache.read_config(data / "features"))
            values = [f"{statistics.mean(found):.3f}", spread, " ".join(f"{value:.3f}" for value in found)]
            rows.append([kind, f"{size:,}", *values])
    return rows


def score(data: Path, root: Path, flags: str, seed: int, split: str) -> float:
    """CIDEr on `split` of one run of training."""
    out = ["--data", data, "--checkpoint", root / f"{seed}.pt", "--results", root / f"{seed}"]
    out = list(map(str, out))
    if code := train.main([*out, *shlex.split(flags), "--seed", str(seed)]):
        sys.exit(code)  # interrupted: there is nothing to score
    evaluate.main([*out, "--split", split, "--no-meteor"])
    return files.read_json(root / f"{seed}" / "evaluation.json", "the scores")["metrics"]["CIDEr"]


def main(argv: list[str] | None = None) -> None:
    """Measure, and print the tables."""
    parser = measure.parser(__doc__.splitlines()[0])
    demo.add_flags(parser)
    parser.add_argument("--size", choices=GRIDS, default="real", help="of the files and of the random encoder")
    parser.add_argument("--depth", type=arguments.count, default=2, help="layers of the random encoder")
    parser.add_argument("--clips", type=arguments.count, default=50, help="of the sample, whose features are compared")
    parser.add_argument("--score", action="store_true", help="run the sample's recipe on each kind of features")
    parser.add_argument("--split", choices=dataset.SPLITS, default="test", help="what --score scores")
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
    files.run(main)
