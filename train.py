"""Fit the Q-Former between cached V-JEPA 2 features and a frozen language model (BLIP-2, second stage)."""

import argparse
import math
from pathlib import Path
from typing import Any

import runtime.threads  # noqa: F401  how torch's threads wait
import torch
from torch import nn

import dataset
from dataset import plan_epoch, records_that_fit, usable_records
from evaluation import ngrams
from evaluation.captioning import SplitReader, dequantize_for
from features import cache
from features.reader import feature_batches
from models import checkpoint, language_model
from qformer import QFormer, VideoCaptioner
from runtime import cli, files, provenance
from runtime.distributed import DistributedContext, Lost
from runtime.files import UserError
from runtime.progress import Progress
from runtime.signals import Interrupted, Interrupts

# What a place within an epoch means depends on these: they may change between epochs, not within one.
FIXED_WITHIN_EPOCH = ("batch_size", "accumulate", "captions_per_clip", "seed")
MAY_CHANGE = ("lr", "schedule", "warmup", "weight_decay", "grad_clip", "epochs", "dropout", "mlp_dropout")
ORIGIN = ("data", "trained_by", "init_from")  # of a run: in the config of its checkpoints
QFORMER = ("num_queries", "num_heads", "depth", "mlp_ratio", "dropout", "mlp_dropout")  # its own defaults hold, too


class Run:
    """A run: its data, models and optimizer, and how far it has come."""

    def __init__(self, args: argparse.Namespace, context: DistributedContext) -> None:
        """Whatever a run needs, checked before its first step. Raises: UserError for what does not fit."""
        self.args, self.context, self.layout = args, context, dataset.Layout(args.data)
        self.best = args.checkpoint.with_name(f"{args.checkpoint.stem}_best.pt")
        self.epoch, self.step = 0, 0  # epochs done, and optimizer steps since
        self.total, self.captions = 0.0, 0  # the sum of the losses of the captions of these steps, and how many
        self.history: list[dict[str, Any]] = []  # a line an epoch
        if args.checkpoint.is_dir() and not args.eval_only:
            raise UserError(f"--checkpoint {args.checkpoint} is a folder; give the file that is to be written")
        saved = checkpoint.read(args.checkpoint) if args.checkpoint.exists() else None
        if args.eval_only and saved is None:
            raise UserError(f"there is no checkpoint {args.checkpoint} to validate; train first, or give --checkpoint")
        if saved is not None and args.init_from:
            context.print_main(f"--init-from {args.init_from} is not read: the run goes on from {args.checkpoint}")
        path = args.init_from if saved is None and args.init_from else args.checkpoint
        start = checkpoint.read(path) if saved is None and args.init_from else saved
        made, splits = start and start.config["features"], ("train", "validation")
        self.records = {s: usable_records(self.layout, s, args.max_missing, context, made) for s in splits}
        args.llm = args.llm or (start.config["llm"] if start else language_model.DEFAULT)
        self.captioner = self.make_captioner(start, path, is_new=saved is None)
        if start is not None:
            self.captioner.restore(start, path)
        if start is not saved:
            self.captioner.config["init_from"] = {"checkpoint": files.display_path(path), "epoch": start.epoch}
            context.print_main(f"a new run begins with the weights of {path}, epoch {start.epoch}")
        fits = self.captioner.max_caption_tokens, self.captioner.caption_ids
        self.records["train"], dropped = records_that_fit(self.records["train"], *fits)
        if dropped:
            context.print_main(f"train: {dropped:,} captions are longer than {args.llm} can read and are left out")
        # Fused: the other forms hold copies of their largest parameters, at the moment when memory is fullest.
        parameters = list(self.captioner.qformer.parameters())
        self.optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)
        self.interrupts = Interrupts()
        if saved is not None:
            self.resume(saved)
        if context.is_main:
            self.prepare_folders(is_new=saved is None)
        clips = [[record["id"] for record in records] for records in self.records.values()]
        context.check_equal([clips, self.epoch, self.step, self.total], "clips and checkpoint")
        # Processors of another make draw other initial weights.
        context.broadcast(parameter.data for parameter in parameters)

    def make_captioner(self, start: checkpoint.Checkpoint | None, path: Path, is_new: bool) -> VideoCaptioner:
        """The frozen language model with a Q-Former: new, or the one that was read from the checkpoint `path`."""
        args, made = self.args, cache.read_config(self.layout.features)
        lm, tokenizer = language_model.load(args.llm, self.context.device)
        torch.manual_seed(args.seed)
        first = cache.load(self.layout.features / "train" / f"{self.records['train'][0]['id']}.pt")
        sizes = {"dim": lm.get_input_embeddings().embedding_dim, "visual_dim": first.values.shape[-1]}
        sizes |= {key: value for key in QFORMER if (value := getattr(args, key)) is not None}
        config = {"features": made and made.to_dict(), "caption_space": not args.published_captions}
        config |= {"data": self.layout.name, "trained_by": provenance.made_by()}
        if start is not None:
            before = start.config
            checkpoint.check_sizes(before, sizes, path)
            cache.check_same_features(before["features"], self.layout.features, path, before.get("published", False))
            if args.published_captions and before["caption_space"]:
                raise UserError(f"{path} was trained with a space before captions: leave --published-captions out")
            sizes = before["qformer"] | sizes
            config |= {key: before[key] for key in ("caption_space", *([] if is_new else ORIGIN)) if key in before}
        return VideoCaptioner(lm, tokenizer, QFormer(**sizes), config=config)

    def settings(self) -> dict[str, Any]:
        """What must, and what should, be the same when the run goes on."""
        flags = (*FIXED_WITHIN_EPOCH, *MAY_CHANGE)
        return {key: getattr(self.args, key) for key in flags} | {"clips": len(self.records["train"])}

    def save(self, path: Path | None = None, optimizer: bool = True) -> None:
        """Write all that a run needs to go on bit for bit, as of its last optimizer step."""
        progress = {"step": self.step, "total": self.total, "captions": self.captions}
        progress |= {"run": self.settings(), "history": self.history}
        weights, state = self.captioner.qformer.state_dict(), self.optimizer.state_dict() if optimizer else None
        if self.context.is_main and not self.args.eval_only:
            saved = checkpoint.Checkpoint(self.captioner.config, weights, self.epoch, state, progress)
            checkpoint.write(path or self.args.checkpoint, saved)

    def resume(self, saved: checkpoint.Checkpoint) -> None:
        """Go to the place in the run that a checkpoint was saved at."""
        args, progress, now = self.args, saved.progress, self.settings()
        self.epoch, self.history = saved.epoch, list(progress.get("history", []))
        if progress.get("step"):
            self.step, self.total, self.captions = progress["step"], progress["total"], progress["captions"]
            before = {key: value for key, value in progress["run"].items() if value != now.get(key, value)}
            for key, value in before.items():  # older checkpoints hold only some
                flag = f"--{key.replace('_', '-')}" if key != "clips" else "the number of training clips"
                if key not in MAY_CHANGE and not args.eval_only:
                    place = f"{args.checkpoint} was saved within an epoch, with {flag} at {value!r:.80}, now {now[key]}"
                    raise UserError(f"{place}; go on with the same, or start anew with another --checkpoint")
                self.context.print_main(f"note: {flag} was {value} until here, and is {now[key]} from here on")
        if not checkpoint.load_optimizer(self.optimizer, saved.optimizer):
            self.context.print_main(f"{args.checkpoint} holds no optimizer state that fits: the optimizer starts anew")
        self.context.print_main(f"going on from {args.checkpoint}: epoch {self.epoch + 1}, step {self.step}")
        was = saved.config.get("data", self.layout.name), progress.get("run", {}).get("clips", now["clips"])
        if was != (self.layout.name, now["clips"]):
            now_from = f"{now['clips']:,} clips of {self.layout.name}; to start anew, name another --checkpoint"
            self.context.print_main(f"note: it has learnt from {was[1]:,} clips of {was[0]}, and now from {now_from}")

    def prepare_folders(self, is_new: bool) -> None:
        """Find out now, not after an epoch, what cannot be written; another run's best checkpoint is moved aside."""
        files.check_writable(self.args.results)
        if self.args.eval_only:
            return
        files.check_writable(self.args.checkpoint.parent)
        for path in (self.args.checkpoint, self.best):
            files.remove_unfinished(path)
        if is_new and self.best.exists():
            aside = self.best.replace(self.best.with_name(f"{self.best.stem}_before.pt"))
            self.context.print_main(f"{self.best} is another run's: it is {aside} now, and this run starts its own")


def main(argv: list[str] | None = None) -> None:
    """Train, or go on training from the checkpoint that is there."""
    args = parse(argv)
    run = Run(args, DistributedContext(args.device))
    try:
        if args.eval_only:
            line = validate(run, run.epoch)
            run.context.print_main(f"epoch {run.epoch}: val_loss={line['val_loss']:.4f}, CIDEr={line['CIDEr']:.4f}")
        else:
            train(run)
    except (Interrupted, Lost):
        run.save()
        run.context.print_main(f"the same command goes on from {args.checkpoint}")
        raise
    run.context.close()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; the defaults are the published recipe."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, default=dataset.DEFAULT_DATA, help="the dataset's folder, in SSv2's layout")
    add("--llm", help=f"language model: hub name or folder (default: a checkpoint's, or {language_model.DEFAULT})")
    add("--captions-per-clip", type=cli.count, default=1, help="different captions that a clip is read once for")
    add("--published-captions", action="store_true", help="no space before captions, as in the published code")
    add("--max-missing", type=cli.amount, default=1.0, help="percent of a split's clips that may lack features")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=cli.count, default=10, help="passes over the training clips, in all")
    add("--batch-size", type=cli.count, default=8, help="clips in a forward pass, all processes together")
    add("--accumulate", "--gradient-accumulation-steps", type=cli.count, default=16, help="forward passes for one step")
    add("--lr", type=cli.positive, default=5e-5, help="AdamW's learning rate, at its highest")
    add("--weight-decay", type=cli.amount, default=0.03, help="AdamW's weight decay")
    add("--schedule", choices=("constant", "cosine"), default="constant", help="the learning rate over all steps")
    add("--warmup", type=cli.amount, default=0.0, help="share of all steps over which the rate rises from 0")
    add("--grad-clip", "--clip-norm", type=cli.amount, default=0.0, help="longest gradient (L2); 0: not clipped")
    add("--seed", type=int, default=0, help="decides initial weights, order, captions and dropout")
    add = parser.add_argument_group("Q-Former (by default a checkpoint's sizes, or else these)").add_argument
    add("--num-queries", type=cli.count, help="visual tokens that the language model reads (default: 64)")
    add("--num-heads", type=cli.count, help="attention heads (default: 4)")
    add("--depth", type=cli.count, help="blocks (default: 1)")
    add("--mlp-ratio", type=cli.count, help="the MLP's width, in embedding widths (default: 4)")
    add("--dropout", type=cli.probability, default=0.1, help="dropout on the attention")
    add("--mlp-dropout", type=cli.probability, default=0.3, help="dropout in the MLP")
    add = parser.add_argument_group("running").add_argument
    add("--checkpoint", type=Path, default=Path("checkpoint.pt"), help="written here, and gone on from if there")
    add("--init-from", type=Path, metavar="CHECKPOINT", help="a new run begins with the weights of this file or folder")
    add("--results", type=Path, default=Path("results"), help="folder for predictions, curves and the page")
    add("--eval-batch-size", type=cli.count, default=64, help="clips that are captioned at once for validation")
    add("--max-new-tokens", type=cli.count, default=50, help="longest caption, in tokens")
    add("--save-every", type=cli.count, default=50, help="optimizer steps between checkpoints within an epoch")
    add("--workers", type=cli.whole, help="processes that read features ahead (default: 2 for a GPU, else none)")
    add("--eval-only", action="store_true", help="only validate the checkpoint that is there")
    add("--device", help=cli.DEVICE)
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
    args, context, records = run.args, run.context, run.records
    count = sum(parameter.numel() for parameter in run.captioner.qformer.parameters())
    clips, ranks = len(records["train"]), context.world_size
    context.print_main(f"{count:,} parameters train on {clips:,} clips; {ranks} process(es), {context.device}")
    if run.epoch >= args.epochs:
        context.print_main(f"all {args.epochs} epochs are done: raise --epochs to train on")
    while run.epoch < args.epochs:
        train_epoch(run)
        run.save()  # a run that is stopped while it validates does not train the epoch again
        finish_epoch(run)
        run.save()
    if context.is_main and run.history and (args.results / f"validation_epoch_{run.epoch}.json").exists():
        words = f"{args.checkpoint}: epoch {run.epoch}"
        if (best := best_epoch(run)) and run.best.exists():
            words += f"; {run.best}: epoch {best['epoch']}, the best by CIDEr in validation ({best['CIDEr']:.4f})"
        print(words, flush=True)
        from evaluation.report import write_training_page  # its libraries: training needs none of them

        page = write_training_page(args.results, run.captioner, args.checkpoint, records["validation"], run.layout)
        context.print_main(page)


def train_epoch(run: Run) -> None:
    """The optimizer steps of an epoch, from where it stands: rate, micro-batches, clip, step, log, save."""
    args, context, captioner, optimizer = run.args, run.context, run.captioner, run.optimizer
    parameters = list(captioner.qformer.parameters())
    sizes = (args.batch_size, args.accumulate, args.captions_per_clip)
    steps = plan_epoch(run.records["train"], *sizes, args.seed, run.epoch)  # the same in every process
    folder = run.layout.features / "train"
    shards = [context.shard(batch) for step in steps[run.step :] for batch in step]
    ids = [[clip_id for clip_id, _ in shard] for shard in shards if shard]
    batches = iter(feature_batches(folder, ids, args.workers, context.device.type == "cuda"))
    captioner.train()
    desc = f"epoch {run.epoch + 1}/{args.epochs}"
    with Progress(total=len(steps), initial=run.step, desc=desc, unit="step", disable=not context.is_main) as bar:
        for step in steps[run.step :]:
            at, total = run.epoch * len(steps) + run.step, args.epochs * len(steps)
            for group in optimizer.param_groups:
                group["lr"] = get_lr(at, total, args.lr, args.schedule, args.warmup)

            # Dropout is a function of the place in the run, so that a resumed run draws what it would have drawn.
            torch.manual_seed(hash((args.seed, run.epoch, run.step, context.rank)) % 2**63)
            optimizer.zero_grad(set_to_none=True)
            loss = torch.zeros((), dtype=torch.float64, device=context.device)
            count = sum(len(captions) for batch in step for _, captions in batch)  # each of them counts the same
            for batch in step:
                if context.world_size == 1:  # many ranks stop together, at the end of a step
                    run.interrupts.check()
                if clips := context.shard(batch):
                    features = dequantize_for(captioner, next(batches), folder)  # (B, N, D)
                    captions = [captions for _, captions in clips]
                    part = captioner.loss(features, captions, [1 / count] * sum(map(len, captions)))
                    part.backward()
                    loss += part.detach().double()
            context.sum_gradients(parameters)
            norm = nn.utils.clip_grad_norm_(parameters, args.grad_clip or math.inf)
            sums = context.all_reduce(torch.stack([loss, torch.full_like(loss, run.interrupts.received or 0)]))
            loss, stop, norm = torch.cat([sums, norm.double().view(1)]).tolist()  # the step's one wait for a GPU
            if stop:
                run.interrupts.check(others=True)
            if not math.isfinite(loss) or not math.isfinite(norm):
                ids = " ".join(clip_id for batch in step for clip_id, _ in batch)
                place = f"epoch {run.epoch + 1}, step {run.step + 1}, clips {ids}"
                advice = f"{args.checkpoint} is as before: check these clips, lower --lr, or set --grad-clip"
                raise UserError(f"the loss is not finite ({loss}, gradient {norm:g}) at {place}; {advice}")
            optimizer.step()

            run.step += 1
            run.total += loss * count
            run.captions += count
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if run.step % args.save_every == 0 and run.step < len(steps):
                run.save()


def finish_epoch(run: Run) -> None:
    """Validate, count the epoch as done, and keep its checkpoint if it is the run's best by CIDEr."""
    line = {"epoch": run.epoch + 1, "train_loss": run.total / run.captions, **validate(run, run.epoch + 1)}
    before, run.history = best_epoch(run), [*run.history, line]
    run.epoch, run.step, run.total, run.captions = run.epoch + 1, 0, 0.0, 0
    captioner = run.captioner  # which says how it was made, as one that was read from a checkpoint does
    captioner.epoch, captioner.history, captioner.recipe = run.epoch, run.history, run.settings()
    if before is None or line["CIDEr"] > before["CIDEr"]:
        run.save(run.best, optimizer=False)
    losses = "Epoch {epoch}: train_loss={train_loss:.4f}, val_loss={val_loss:.4f}"
    if run.context.is_main:
        lines = [losses.format(**past) + "\n" for past in run.history]
        files.write_text(run.args.checkpoint.with_name("losses.txt"), "".join(lines))
    run.context.print_main(f"{losses.format(**line)}, CIDEr={line['CIDEr']:.4f}")


def best_epoch(run: Run) -> dict[str, Any] | None:
    """The epoch of the highest CIDEr, of those with as many validation clips as now: a rehearsal had few."""
    clips = len(run.records["validation"])
    alike = [line for line in run.history if line.get("clips", clips) == clips]
    return max(alike, key=lambda line: line["CIDEr"], default=None)


def validate(run: Run, epoch: int) -> dict[str, float]:
    """Loss and CIDEr of the validation split; the captions are written by clip id."""
    args, records = run.args, run.records["validation"]
    folder = run.layout.features / "validation"
    reader = SplitReader(run.captioner, records, folder, args.eval_batch_size, run.context, run.interrupts.check)
    loss, predictions = reader.loss_and_captions(args.max_new_tokens)
    score = 0.0
    if run.context.is_main:
        score = ngrams.cider(predictions, {record["id"]: record["label"] for record in records})
        content = {"epoch": epoch, "CIDEr": score, "val_loss": loss, "predictions": predictions}
        files.write_json(args.results / f"validation_epoch_{epoch}.json", content)
    return {"val_loss": loss, "CIDEr": run.context.gather(score)[0], "clips": len(records)}


if __name__ == "__main__":
    cli.run(main)
