"""Fit the Q-Former between cached V-JEPA 2 features and a frozen language model (BLIP-2, second stage)."""

import argparse
import math
import signal
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import dataset
from dataset import Step, plan_epoch, usable_records
from evaluation import ngrams
from evaluation.captioning import SplitReader, dequantize_for
from features import cache
from features.reader import feature_batches
from models import checkpoint, language_model
from models.checkpoint import Checkpoint
from qformer import QFormer, VideoCaptioner
from runtime import cli, files
from runtime.distributed import DistributedContext, Lost
from runtime.files import UserError
from runtime.signals import Interrupted, Interrupts

# What a place within an epoch means depends on these: they may change between epochs, not within one.
FIXED_WITHIN_EPOCH = ("batch_size", "accumulate", "captions_per_clip", "seed")
MAY_CHANGE = ("lr", "schedule", "warmup", "weight_decay", "grad_clip", "epochs", "dropout", "mlp_dropout")


@dataclass
class Run:
    """A run: its data, models and optimizer, and how far it has come."""

    args: argparse.Namespace
    context: DistributedContext
    layout: dataset.Layout
    records: dict[str, list[dataset.Record]]  # by split
    captioner: VideoCaptioner
    optimizer: torch.optim.Optimizer
    interrupts: Interrupts
    epoch: int = 0  # epochs done
    step: int = 0  # optimizer steps done in the epoch after these
    total: float = 0.0  # the sum of the losses of the captions that it has seen
    captions: int = 0  # how many these are
    history: list[dict[str, Any]] = field(default_factory=list)  # a line an epoch

    @property
    def best(self) -> Path:
        """Where the checkpoint of the best epoch is."""
        return self.args.checkpoint.with_name(f"{self.args.checkpoint.stem}_best.pt")

    def state(self) -> Checkpoint:
        """All that a run needs to go on bit for bit."""
        settings = {key: getattr(self.args, key) for key in (*FIXED_WITHIN_EPOCH, *MAY_CHANGE)}
        progress = {
            "step": self.step,
            "total": self.total,
            "captions": self.captions,
            "run": {**settings, "clips": len(self.records["train"])},
            "history": self.history,
        }
        weights = self.captioner.qformer.state_dict()
        return Checkpoint(self.captioner.config, weights, self.epoch, self.optimizer.state_dict(), progress)

    def save(self) -> None:
        """Write the state of the last optimizer step; gradients gathered since are made again on resuming."""
        if self.context.is_main:
            checkpoint.write(self.args.checkpoint, self.state())


def main(argv: list[str] | None = None) -> int:
    """Train, or go on training from the checkpoint that is there."""
    args = parse(argv)
    run = set_up(args, DistributedContext(args.device and str(cli.device(args.device))))
    try:
        if args.eval_only:
            line = validate(run, run.epoch)
            run.context.print_main(f"epoch {run.epoch}: val_loss={line['val_loss']:.4f}, CIDEr={line['CIDEr']:.4f}")
        else:
            train(run)
    except (Interrupted, Lost) as stop:
        if not args.eval_only:
            run.save()
        if isinstance(stop, Lost):
            raise
        saved = f"saved {args.checkpoint}; the same command goes on from there"
        run.context.print_main(f"{stop}: {'nothing was written' if args.eval_only else saved}")
        return stop.code
    run.context.close()
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; the defaults are the published recipe."""
    parser = cli.Parser(__doc__)
    add = parser.group("data").add_argument
    add("--data", type=Path, default=dataset.DEFAULT_DATA, help="the dataset's folder, in SSv2's layout")
    add("--llm", default="Qwen/Qwen2-1.5B", help="the frozen language model: a hub name or a local folder")
    add("--captions-per-clip", type=cli.count, default=1, help="different captions that a clip is read once for")
    text = "tokenize captions without the space before them, as the published code does"
    add("--published-captions", action="store_true", help=text)
    add("--max-missing", type=cli.amount, default=1.0, help="percent of a split's clips that may lack features")
    add = parser.group("optimisation").add_argument
    add("--epochs", type=cli.count, default=10, help="passes over the training clips, in all")
    add("--batch-size", type=cli.count, default=8, help="clips in a forward pass, all processes together")
    text = "forward passes for one optimizer step"
    add("--gradient-accumulation-steps", "--accumulate", dest="accumulate", type=cli.count, default=16, help=text)
    add("--lr", type=cli.positive, default=5e-5, help="AdamW's learning rate, at its highest")
    add("--weight-decay", type=cli.amount, default=0.03, help="AdamW's weight decay")
    add("--schedule", choices=("constant", "cosine"), default="constant", help="the learning rate over all steps")
    add("--warmup", type=cli.amount, default=0.0, help="share of all steps over which the rate rises from 0")
    text = "longest gradient, as an L2 norm; 0: not clipped"
    add("--grad-clip", "--clip-norm", type=cli.amount, default=0.0, help=text)
    add("--seed", type=int, default=0, help="decides initial weights, order, captions and dropout")
    add = parser.group("Q-Former").add_argument
    add("--num-queries", type=cli.count, default=64, help="visual tokens that the language model reads")
    add("--num-heads", type=cli.count, default=4, help="attention heads")
    add("--depth", type=cli.count, default=1, help="blocks")
    add("--mlp-ratio", type=cli.count, default=4, help="the MLP's width, in embedding widths")
    add("--dropout", type=cli.probability, default=0.1, help="dropout on the attention")
    add("--mlp-dropout", type=cli.probability, default=0.3, help="dropout in the MLP")
    running = parser.group("running")
    add = running.add_argument
    add("--checkpoint", type=Path, default=Path("checkpoint.pt"), help="written here, and gone on from if there")
    add("--results", type=Path, default=Path("results"), help="folder for predictions, curves and the page")
    add("--eval-batch-size", type=cli.count, default=64, help="clips that are captioned at once for validation")
    add("--max-new-tokens", type=cli.count, default=50, help="longest caption, in tokens")
    add("--save-every", type=cli.count, default=50, help="optimizer steps between checkpoints within an epoch")
    add("--workers", type=cli.whole, default=2, help="processes that read features ahead; 0: this one reads")
    add("--eval-only", action="store_true", help="only validate the checkpoint that is there")
    cli.add_device(running)
    return parser.parse_args(argv)


def get_lr(step: int, total: int, highest: float, schedule: str, warmup: float) -> float:
    """The learning rate of an optimizer step (from 0) of `total`."""
    rising = round(warmup * total)
    if step < rising:
        return highest * (step + 1) / rising
    if schedule == "constant":
        return highest
    done = (step - rising) / max(1, total - rising)
    return highest * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def train(run: Run) -> None:
    """All epochs that are not done yet."""
    args, context, qformer = run.args, run.context, run.captioner.qformer
    clips = {split: f"{len(records):,}" for split, records in run.records.items()}
    context.print_main(
        f"{sum(parameter.numel() for parameter in qformer.parameters()):,} parameters train on {clips['train']} clips, "
        f"validated on {clips['validation']}; {context.world_size} process(es), {context.device}"
    )
    if run.epoch >= args.epochs:
        context.print_main(f"all {args.epochs} epochs are done: raise --epochs to train on")
    while run.epoch < args.epochs:
        train_epoch(run)
        run.save()  # a run that is stopped while it validates does not train the epoch again
        finish_epoch(run)
        run.save()
    if context.is_main and run.history:
        from evaluation.training_page import write_training_page  # its libraries: training needs none of them

        context.print_main(write_training_page(args.results, run.history, run.records["validation"], run.layout))


def train_epoch(run: Run) -> None:
    """The optimizer steps of an epoch, from where it stands: rate, micro-batches, clip, step, log, save."""
    args, context, captioner, optimizer = run.args, run.context, run.captioner, run.optimizer
    parameters = list(captioner.qformer.parameters())
    steps = plan(run)
    folder = run.layout.feature_folder("train")
    batches = read_features(run, steps[run.step :], folder)
    captioner.train()
    desc = f"epoch {run.epoch + 1}/{args.epochs}"
    with tqdm(total=len(steps), initial=run.step, desc=desc, unit="step", disable=not context.is_main) as bar:
        for step in steps[run.step :]:
            at, total = run.epoch * len(steps) + run.step, args.epochs * len(steps)
            for group in optimizer.param_groups:
                group["lr"] = get_lr(at, total, args.lr, args.schedule, args.warmup)

            # Dropout is a function of the place in the run, so that a resumed run draws what it would have drawn.
            torch.manual_seed(hash((args.seed, run.epoch, run.step, context.rank)) % 2**63)
            optimizer.zero_grad(set_to_none=True)
            loss = torch.zeros((), dtype=torch.float64, device=context.device)
            for batch in step.batches:
                if context.world_size == 1:  # many ranks stop together, at the end of a step
                    run.interrupts.check()
                if clips := context.shard(batch):
                    features = dequantize_for(captioner, next(batches), folder)  # (B, N, D)
                    captions = [captions for _, captions in clips]
                    part = captioner.loss(features, captions, [1 / step.captions] * sum(map(len, captions)))
                    part.backward()
                    loss += part.detach().double()
            loss = add_ranks(run, loss, parameters)

            norm = nn.utils.clip_grad_norm_(parameters, args.grad_clip or math.inf)
            if not math.isfinite(loss) or not math.isfinite(norm):
                ids = " ".join(clip_id for batch in step.batches for clip_id, _ in batch)
                raise UserError(
                    f"the loss is not finite ({loss}, gradient {norm:g}) at epoch {run.epoch + 1}, step "
                    f"{run.step + 1}, clips {ids}; {args.checkpoint} holds the last good state: check these clips' "
                    "features, lower --lr, or set --grad-clip"
                )
            optimizer.step()

            run.step += 1
            run.total += loss * step.captions
            run.captions += step.captions
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if run.step % args.save_every == 0 and run.step < len(steps):
                run.save()


def plan(run: Run) -> list[Step]:
    """What the steps of the epoch read: the same in every process, and in a run that is resumed."""
    args = run.args
    sizes = (args.batch_size, args.accumulate, args.captions_per_clip)
    return plan_epoch(run.records["train"], *sizes, args.seed, run.epoch)


def read_features(run: Run, steps: list[Step], folder: Path) -> Any:
    """This rank's features, micro-batch by micro-batch, read ahead."""
    shards = [run.context.shard(batch) for step in steps for batch in step.batches]
    ids = [[clip_id for clip_id, _ in shard] for shard in shards if shard]
    return iter(feature_batches(folder, ids, run.args.workers, run.context.device.type == "cuda"))


def add_ranks(run: Run, loss: torch.Tensor, parameters: list[nn.Parameter]) -> float:
    """The loss and, in place, the gradients of all ranks' parts together: sums, as one process would have them.

    Raises: Interrupted, on all ranks, where one was asked to stop.
    """
    context = run.context
    for parameter in parameters if context.world_size > 1 else ():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        context.all_reduce(parameter.grad)
    stop = torch.full_like(loss, run.interrupts.received or 0)
    loss, stop = context.all_reduce(torch.stack([loss, stop])).tolist()
    if stop and context.world_size > 1:
        run.interrupts.received = run.interrupts.received or signal.SIGTERM
        run.interrupts.check()
    return loss


def finish_epoch(run: Run) -> None:
    """Validate, count the epoch as done, and keep its checkpoint if it is the run's best by CIDEr."""
    line = {"epoch": run.epoch + 1, "train_loss": run.total / run.captions, **validate(run, run.epoch + 1)}
    best_before = max((past["CIDEr"] for past in run.history), default=-math.inf)
    run.history = [*run.history, line]
    run.epoch, run.step, run.total, run.captions = run.epoch + 1, 0, 0.0, 0
    if not run.context.is_main:
        return
    if line["CIDEr"] > best_before:
        state = run.state()
        state.optimizer = None
        checkpoint.write(run.best, state)
    lines = [
        f"Epoch {past['epoch']}: train_loss={past['train_loss']:.4f}, val_loss={past['val_loss']:.4f}"
        for past in run.history
    ]
    files.write_text(run.args.checkpoint.with_name("losses.txt"), "".join(f"{text}\n" for text in lines))
    run.context.print_main(f"{lines[-1]}, CIDEr={line['CIDEr']:.4f}")


def validate(run: Run, epoch: int) -> dict[str, float]:
    """Loss and CIDEr of the validation split; the captions are written by clip id."""
    args, records = run.args, run.records["validation"]
    folder = run.layout.feature_folder("validation")
    reader = SplitReader(run.captioner, records, folder, args.eval_batch_size, run.context, run.interrupts.check)
    loss, predictions = reader.loss_and_captions(args.max_new_tokens)
    score = 0.0
    if run.context.is_main:
        score = ngrams.cider(predictions, {record["id"]: record["label"] for record in records})
        content = {"epoch": epoch, "CIDEr": score, "val_loss": loss, "predictions": predictions}
        files.write_json(args.results / f"validation_epoch_{epoch}.json", content)
    return {"val_loss": loss, "CIDEr": run.context.gather(score)[0]}


def set_up(args: argparse.Namespace, context: DistributedContext) -> Run:
    """Everything that a run needs, checked before its first step. Raises: UserError for whatever does not fit."""
    layout = dataset.check_data(args.data)
    if args.checkpoint.is_dir() and not args.eval_only:
        raise UserError(f"--checkpoint {args.checkpoint} is a folder; give the file that is to be written")
    saved = checkpoint.read(args.checkpoint) if args.checkpoint.exists() else None
    if args.eval_only and saved is None:
        raise UserError(f"there is no checkpoint {args.checkpoint} to validate; train first, or give --checkpoint")
    made = saved.config["features"] if saved else None
    records = {s: usable_records(layout, s, args.max_missing, context, made) for s in ("train", "validation")}
    captioner = make_captioner(args, context, layout, records["train"][0]["id"], saved)
    if captioner.max_caption_tokens is not None:
        fitting, dropped = dataset.records_that_fit(
            records["train"], captioner.max_caption_tokens, captioner.caption_ids
        )
        if not fitting:
            raise UserError(f"{args.llm} has too few positions for --num-queries {args.num_queries}; use fewer")
        if dropped:
            context.print_main(f"train: {dropped:,} captions are longer than {args.llm} can read and are left out")
        records["train"] = fitting
    # Fused: the other forms hold copies of their largest parameters, at the moment when memory is fullest.
    parameters = captioner.qformer.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    run = Run(args, context, layout, records, captioner, optimizer, Interrupts())
    if saved is not None:
        resume(run, saved)
    if context.is_main:
        prepare_folders(run, saved)
    if context.world_size > 1:
        clips = zlib.crc32(repr([[record["id"] for record in records[split]] for split in records]).encode())
        weights = (
            [zlib.crc32(tensor.float().numpy().tobytes()) for _, tensor in sorted(saved.weights.items())]
            if saved
            else []
        )
        context.check_equal([clips, weights, run.epoch, run.step], "clips and checkpoint")
        # Processors of another make draw other initial weights.
        context.broadcast(parameter.data for parameter in captioner.qformer.parameters())
    return run


def make_captioner(
    args: argparse.Namespace,
    context: DistributedContext,
    layout: dataset.Layout,
    clip_id: str,
    saved: Checkpoint | None,
) -> VideoCaptioner:
    """The frozen language model with a new Q-Former, or a checkpoint's; a clip's features tell how wide they are."""
    lm, tokenizer = language_model.load(args.llm, context.device)
    made = cache.read_config(layout.features)
    torch.manual_seed(args.seed)
    sizes = {
        key: getattr(args, key) for key in ("num_queries", "num_heads", "depth", "mlp_ratio", "dropout", "mlp_dropout")
    }
    visual_dim = cache.load(layout.feature_folder("train") / f"{clip_id}.pt").values.shape[-1]
    try:
        qformer = QFormer(dim=lm.get_input_embeddings().embedding_dim, visual_dim=visual_dim, **sizes)
    except ValueError as error:
        raise UserError(f"{error}; choose another --num-heads") from None
    if saved is not None:
        config, path = saved.config, args.checkpoint
        cache.check_same_features(config["features"], layout.features, path, config.get("published", False))
        if note := checkpoint.check_llm(config, lm, args.llm, path):
            context.print_main(f"note: {note}")
        if args.published_captions and config["caption_space"]:
            raise UserError(f"{path} was trained with a space before captions: leave --published-captions out")
        checkpoint.load_weights(qformer, saved.weights, path)
    space = saved.config["caption_space"] if saved else not args.published_captions
    config = {"llm": args.llm, "features": made and made.to_dict(), "caption_space": space}
    return VideoCaptioner(lm, tokenizer, qformer.to(context.device), config=config)


def resume(run: Run, saved: Checkpoint) -> None:
    """Go to the place in the run that a checkpoint was saved at."""
    args, progress = run.args, saved.progress
    run.epoch, run.history = saved.epoch, list(progress.get("history", []))
    if progress.get("step"):
        before, now = progress["run"], run.state().progress["run"]
        fixed = [key for key in (*FIXED_WITHIN_EPOCH, "clips") if before.get(key) != now[key]]
        if fixed and not args.eval_only:
            raise UserError(
                f"{args.checkpoint} was saved within an epoch, with {flag(fixed[0])} at {before.get(fixed[0])!r:.80}, "
                f"now {now[fixed[0]]}; go on with the same, or start anew with another --checkpoint"
            )
        for key in MAY_CHANGE:  # older checkpoints do not hold them
            if key in before and before[key] != now[key]:
                run.context.print_main(
                    f"note: {flag(key)} was {before[key]} until here, and is {now[key]} from here on"
                )
        run.step, run.total, run.captions = progress["step"], progress["total"], progress["captions"]
        if not args.eval_only and run.step > len(plan(run)):
            raise UserError(f"{args.checkpoint} is damaged: it was saved at step {run.step} of a shorter epoch")
    if not checkpoint.load_optimizer(run.optimizer, saved.optimizer):
        run.context.print_main(f"{args.checkpoint} holds no optimizer state that fits: the optimizer starts anew")
    run.context.print_main(f"going on from {args.checkpoint}: epoch {run.epoch + 1}, step {run.step}")


def flag(key: str) -> str:
    """How the command line names a setting."""
    return "the number of training clips" if key == "clips" else f"--{key.replace('_', '-')}"


def prepare_folders(run: Run, saved: Checkpoint | None) -> None:
    """Find out now, not after an epoch, what cannot be written; another run's best checkpoint is moved aside."""
    args = run.args
    files.check_writable(args.results)
    if args.eval_only:
        return
    files.check_writable(args.checkpoint.parent)
    for path in (args.checkpoint, run.best):
        files.remove_unfinished(path)
    if saved is None and run.best.exists():
        aside = run.best.with_name(f"{run.best.stem}_before.pt")
        run.best.replace(aside)
        run.context.print_main(f"{run.best} is another run's: it is {aside} now, and this run starts its own")


if __name__ == "__main__":
    cli.run(main)
