"""What a GPU makes of the published sizes: encoding, a training step, validation; one table, with the card named.

Weights are random: V-JEPA 2 ViT-L at 32 x 256 x 256 pixels, Qwen2-1.5B in bfloat16, a Q-Former of 39.5 M. A training
step is train.py's own loop over 8 x 16 clips, features and all, beside the reference's step (tests/reference.py) and
beside the frozen language model's forward and backward pass alone; they run in turns, on files in the page cache.

Without a GPU, `--size small` runs every row on the CPU: what only CUDA can tell is then left out, and the row says so.
"""

import argparse
import contextlib
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import dataset
import preprocess_something_something_v2 as preprocess
import train
from benchmarks import measure, preprocessing, train_step
from dataset import plan_epoch
from features import cache
from features.reader import feature_batches
from models import language_model
from models.vjepa2 import VideoEncoder
from runtime import cli
from runtime.distributed import DistributedContext
from tests import reference

PARTS = ("encode", "train", "limit", "validate")
LIMIT = 12e9  # bytes that the step has to do with
ACTIONS = 174  # templates of SSv2
DRAWN = 8  # different clips' features; the rest are links to them
# Tera-operations a second in bfloat16, dense, summed in float32, as the makers print them.
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L4": 121, "RTX 4090": 165, "RTX 4070": 58}
NO_CUDA = "left out: no CUDA here"
Row = tuple[str, str, str]  # what, measured, wanted


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_rate(device: torch.device) -> tuple[float, str]:
    """The card's bfloat16 operations a second, and where that is from; of an unknown card, what a product reaches."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    for known, rate in PEAKS.items():
        if known in name:
            return 1e12 * rate, "its maker's"
    edge = 8192 if device.type == "cuda" else 512
    one = torch.randn(edge, edge, device=device, dtype=torch.bfloat16)

    def product() -> None:
        one @ one
        wait(device)

    return 2 * edge**3 / min(measure.times({"": product}, runs=10)[""]), f"a product of {edge} x {edge}"


class Reads(TorchDispatchMode):
    """Counts numbers that Python reads from tensors: where these are on a GPU, the host waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Count, and compute as usual."""
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def syncs(run: Callable[[], None], device: torch.device) -> Counter[str]:
    """How often the host waits for the GPU, by file; on a CPU how many numbers are read, which is most of it."""
    if device.type != "cuda":
        with Reads() as reads:
            run()
        return Counter({"numbers read": reads.count})
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    torch.cuda.set_sync_debug_mode("default")
    return Counter(Path(one.filename).name for one in caught if "synchronizing" in str(one.message))


# ---- encoding ----


def encoding(args: argparse.Namespace, device: torch.device, work: Path) -> Iterator[Row]:
    """Clips a second: eager, compiled, and from files."""
    sizes = train_step.ENCODER[args.size]
    layers, pixels = sizes["num_hidden_layers"], sizes["crop_size"]
    folder = preprocessing.make_encoder(work / "encoder", sizes["hidden_size"], layers, pixels, train_step.FRAMES)
    encoder = VideoEncoder(folder, device, train_step.FRAMES)
    batch = args.encode_batch or max(1, min(16, 65536 // encoder.tokens))
    clips = torch.randint(0, 255, (batch, train_step.FRAMES, 3, pixels, pixels), dtype=torch.uint8)
    operations, (peak, of) = train_step.encoder_flops(args.size), peak_rate(device)
    rates = {}

    def encode() -> None:
        encoder.encode(clips)
        wait(device)

    for name in ("eager", "compiled"):
        if name == "compiled":
            encoder.prepare(batch)
        rates[name] = batch / measure.median(measure.times({name: encode}, args.runs)[name])
        share = f"{rates[name] * operations / peak:.0%} of {peak / 1e12:.4g} TFLOP/s ({of})"
        note = "" if name == "eager" or device.type == "cuda" else "; a CPU does not compile"
        wanted = ">= 45 %" if name == "compiled" else ""
        yield f"encoding, {name}, batch {batch}", f"{rates[name]:.3g} clips/s, {share}{note}", wanted
    data, count = work / "videos", args.clips
    preprocessing.make_data(data, count)
    words = ["--data", str(data), "--splits", "train", "--encoder", str(folder), "--batch-size", str(batch)]
    begun = time.perf_counter()
    with contextlib.redirect_stdout(None):
        preprocess.main([*words, "--num-frames", str(train_step.FRAMES), "--device", str(device)])
    rate = count / (time.perf_counter() - begun)
    cores = f"{preprocess.cores()} cores"
    share = f"{rate / rates['compiled']:.0%} of encoding alone"
    yield f"preprocessing {count} files, models loaded and compiled, {cores}", f"{rate:.3g} clips/s, {share}", ""


# ---- training ----


def make_run(args: argparse.Namespace, device: torch.device, work: Path) -> Any:
    """What train.train_epoch reads of a run: the published recipe on made-up features of `args.steps` steps."""
    (work / "data").mkdir()
    size, layout = measure.SIZES[args.size], dataset.Layout(work / "data")
    captioner = measure.captioner(size)
    captioner.lm.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    captioner.to(device).train()
    words = ["--batch-size", str(args.batch), "--accumulate", str(args.accumulate), "--workers", str(args.workers)]
    count = args.steps * args.batch * args.accumulate
    folder = layout.features / "train"
    for number in range(min(DRAWN, count)):
        cache.save(folder / f"{number}.pt", cache.quantize(measure.features(size, 1)[0], "float16"))
    for number in range(DRAWN, count):
        os.link(folder / f"{number % DRAWN}.pt", folder / f"{number}.pt")
    texts = measure.captions(count, train_step.TOKENS)
    return SimpleNamespace(
        args=train.parse([*words, "--save-every", str(args.steps + 1)]),
        context=DistributedContext(str(device)),
        layout=layout,
        captioner=captioner,
        optimizer=torch.optim.AdamW(captioner.qformer.parameters(), lr=5e-5, weight_decay=0.03, fused=True),
        records={"train": [{"id": str(number), "label": [texts[number]]} for number in range(count)]},
        interrupts=SimpleNamespace(check=lambda: None, received=None),
        save=lambda: None,
        epoch=0,
    )


def our_epoch(run: Any) -> None:
    """All steps, by train.py."""
    run.step, run.total, run.captions = 0, 0.0, 0
    train.train_epoch(run)
    wait(run.context.device)


def reference_epoch(run: Any, textbook: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """All steps, by the reference."""
    captioner, device, folder = run.captioner, run.context.device, run.layout.features / "train"

    def loss(features: torch.Tensor, captions: list[str]) -> torch.Tensor:
        ids, eos = list(map(captioner.caption_ids, captions)), captioner.eos_id
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            return reference.textbook_loss(captioner.lm, textbook, features, captioner.prompt_ids, ids, eos, eos)

    for step in plan(run):
        reference.textbook_step(optimizer, step, lambda ids: reference.textbook_read(folder, ids, device), loss)
    wait(device)


def lm_epoch(run: Any) -> None:
    """The frozen language model's part of all steps: forward, logits of captions, backward to the visual tokens."""
    captioner, device = run.captioner, run.context.device
    width = captioner.lm.get_input_embeddings().embedding_dim
    for step in plan(run):
        for batch in step:
            ids = [captioner.caption_ids(captions[0]) for _, captions in batch]
            inputs, labels = (part.to(device) for part in language_model.build_inputs(ids, captioner.eos_id))
            prefix = torch.zeros(len(batch), captioner.prefix_length, width, device=device, dtype=captioner.lm.dtype)
            with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
                nll = language_model.mean_nll(captioner.lm, prefix.requires_grad_(), inputs, labels)
            nll.mean().backward()
    wait(device)


def plan(run: Any) -> list[list[dataset.Batch]]:
    """The steps of an epoch."""
    return plan_epoch(run.records["train"], run.args.batch_size, run.args.accumulate, 1, 0, 0)


def read_epoch(run: Any) -> None:
    """All features, as training reads them, and nothing else."""
    ids = [[clip_id for clip_id, _ in batch] for step in plan(run) for batch in step]
    pin = run.context.device.type == "cuda"
    for _ in feature_batches(run.layout.features / "train", ids, run.args.workers, pin):
        pass


def training(args: argparse.Namespace, device: torch.device, work: Path) -> Iterator[Row]:
    """A step of 8 x 16: time, memory, host syncs, and what the GPU waits for."""
    run, on_gpu = make_run(args, device, work), device.type == "cuda"
    textbook = reference.TextbookQFormer(**run.captioner.qformer.config).to(device).train()
    textbook.load_state_dict(run.captioner.qformer.state_dict())
    optimizer = torch.optim.AdamW(textbook.parameters(), lr=5e-5, weight_decay=0.03)
    sides = {
        "ours": lambda: our_epoch(run),
        "reference": lambda: reference_epoch(run, textbook, optimizer),
        "LM": lambda: lm_epoch(run),
        "reading": lambda: read_epoch(run),
    }
    peaks = {}
    for name, side in sides.items():
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        side()
        peaks[name] = f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB" if on_gpu else NO_CUDA
    seconds = measure.times(sides, args.runs)
    step = {name: measure.spread(values, 3, 1 / args.steps) for name, values in seconds.items()}
    title = f"training step {args.batch} x {args.accumulate}"
    yield title, f"{step['ours']} s, peak {peaks['ours']}", ""
    gain = measure.paired(seconds["reference"], seconds["ours"])
    yield (
        "... the reference's",
        f"{step['reference']} s, peak {peaks['reference']}; ours {gain:.2f} x as fast",
        ">= 1.5 x",
    )
    share = measure.paired(seconds["ours"], seconds["LM"])
    yield "... the frozen LM alone", f"{step['LM']} s, peak {peaks['LM']}; ours takes {share:.2f} x", "<= 1.10 x"
    share = measure.paired(seconds["reading"], seconds["ours"])
    name = f"... reading its features alone, {run.args.workers} workers, page cache"
    yield name, f"{step['reading']} s, {share:.0%} of the step's, beside it", ""
    yield "... the GPU idle", idle_share(sides["ours"], measure.median(seconds["ours"]), device), "< 5 %"
    found = syncs(sides["ours"], device)
    where = ", ".join(f"{file} {count / args.steps:.3g}" for file, count in found.most_common())
    yield "... host syncs a step", where or "none", "1"


def idle_share(run: Callable[[], None], seconds: float, device: torch.device) -> str:
    """How much of `seconds` the GPU has nothing to do in: what its kernels and copies take, seen by the profiler."""
    if device.type != "cuda":
        return NO_CUDA
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
    busy = sum(event.self_device_time_total for event in profiled.key_averages()) / 1e6
    return f"{max(0.0, 1 - busy / seconds):.1%}"


def limited(args: argparse.Namespace) -> str:
    """A step with 12 GB, in a process of its own."""
    device = cli.device(args.device)
    if device.type != "cuda":
        with tempfile.TemporaryDirectory() as work:  # the same lines, without their limit
            our_epoch(make_run(args, device, Path(work)))
        return NO_CUDA
    total = torch.cuda.get_device_properties(device).total_memory
    if total < LIMIT:
        return f"left out: the card has {total / 1e9:.1f} GB"
    torch.cuda.set_per_process_memory_fraction(LIMIT / total, device)
    try:
        with tempfile.TemporaryDirectory() as work:
            our_epoch(make_run(args, device, Path(work)))
    except torch.OutOfMemoryError:
        return "does not fit"
    return f"fits, {torch.cuda.max_memory_reserved(device) / 1e9:.2f} GB reserved at the peak"


# ---- validation ----


def validation(args: argparse.Namespace, device: torch.device, work: Path) -> Iterator[Row]:
    """Captions a second, and clips a second through all templates."""
    captioner = make_run(argparse.Namespace(**{**vars(args), "steps": 1}), device, work).captioner.eval()
    features = measure.features(measure.SIZES[args.size], args.eval_batch).to(device, captioner.lm.dtype)
    texts = measure.captions(ACTIONS, 8)

    def write() -> None:
        captioner.generate(features, train_step.TOKENS)

    def rank() -> None:
        captioner.log_likelihood(features, texts).tolist()

    seconds = measure.times({"captions": write, "actions": rank}, args.runs)
    rates = {name: args.eval_batch / measure.median(values) for name, values in seconds.items()}
    name = f"validation: captions of {train_step.TOKENS} tokens, batch {args.eval_batch}"
    yield name, f"{rates['captions']:.3g} captions/s", ""
    clips = train_step.CLIPS["validation"]
    hours = f"{clips / rates['actions'] / 3600:.2f} h for {clips:,} clips"
    yield f"--actions, {ACTIONS} templates", f"{rates['actions']:.3g} clips/s, {hours}", ""


def main(argv: list[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = measure.parser(__doc__, runs=3)
    add = parser.add_argument
    add("--size", choices=measure.SIZES, default="real", help="of the models")
    add("--only", choices=PARTS, nargs="+", default=PARTS, help="what to measure")
    add("--encode-batch", type=cli.count, help="clips encoded at once (default: as preprocessing chooses)")
    add("--clips", type=cli.count, default=512, help="files that preprocessing reads")
    add("--batch", type=cli.count, default=8, help="clips in a forward pass of training")
    add("--accumulate", type=cli.count, default=16, help="forward passes of a step")
    add("--steps", type=cli.count, default=10, help="of an epoch that is timed")
    add("--workers", type=cli.count, default=2, help="processes that read features")
    add("--eval-batch", type=cli.count, default=64, help="clips that are captioned at once")
    parser.add_argument("--device", help=cli.DEVICE)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device, rows = cli.device(args.device), []
    parts = {"encode": encoding, "train": training, "validate": validation}
    for part in args.only:
        if part == "limit":
            name = f"training step {args.batch} x {args.accumulate} within {LIMIT / 1e9:.0f} GB"
            rows.append((name, measure.in_child(limited, args), "fits"))
        else:
            with tempfile.TemporaryDirectory() as work:
                for row in parts[part](args, device, Path(work)):
                    print(": ".join(row[:2]), flush=True)
                    rows.append(row)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU: the CPU, which is no measurement"
    measure.report(__file__, f"{card}; {args.size} size, random weights", ("", "measured", "wanted"), rows)


if __name__ == "__main__":
    cli.run(main)
