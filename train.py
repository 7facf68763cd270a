"""Fit the Q-Former between cached V-JEPA 2 features and a frozen language model (BLIP-2, second stage)."""

import argparse
import math
import signal
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import dataset
from dataset import Step, feature_batches, plan_epoch, usable_records
from evaluation import ngrams as metrics
from evaluation import report, scores
from evaluation.captioning import SplitReader, gallery, to_device
from evaluation.scores import Scorer
from features import cache
from models import checkpoint
from models import language_model as language
from models.checkpoint import Checkpoint
from qformer import QFormer, VideoCaptioner
from runtime import cli as arguments
from runtime import files, provenance
from runtime.distributed import DistributedContext, Lost
from runtime.files import UserError
from runtime.signals import Interrupted, Interrupts

# What a place within an epoch means depends on these: they may change between epochs, not within one.
FIXED_WITHIN_EPOCH = ("batch_size", "accumulate", "captions_per_clip", "seed")


def main(argv: list[str] | None = None) -> int:
    """Train, or go on training from the checkpoint that is there."""
    args = parse(argv)
    group = DistributedContext()
    trainer = Trainer(args, group)
    try:
        trainer.evaluate() if args.eval_only else trainer.train()
    except (Interrupted, Lost) as stop:
        if args.eval_only:
            said = "nothing was written"
        else:
            trainer.save()
            said = f"saved {args.checkpoint}; the same command goes on from there"
        if isinstance(stop, Lost):
            raise
        group.print_main(f"{stop}: {said}")
        return stop.code
    group.close()
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; the defaults are the published recipe."""
    parser = arguments.Parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=dataset.DEFAULT_DATA, help="the dataset's folder, in SSv2's layout")
    add("--llm", default="Qwen/Qwen2-1.5B", help="the frozen language model: a hub name or a local folder")
    add("--checkpoint", type=Path, default=Path("checkpoint.pt"), help="written here, and gone on from if there")
    add("--results", type=Path, default=Path("results"), help="folder for predictions, curves and the page")
    add("--epochs", type=arguments.count, default=10, help="passes over the training clips, in all")
    add("--batch-size", type=arguments.count, default=8, help="clips in a forward pass, all processes together")
    add("--accumulate", type=arguments.count, default=16, help="forward passes for one optimizer step")
    add("--captions-per-clip", type=arguments.count, default=1, help="different captions of a clip that share one pass")
    add("--lr", type=arguments.positive, default=5e-5, help="AdamW's learning rate, at its highest")
    add("--weight-decay", type=arguments.amount, default=0.03, help="AdamW's weight decay")
    add("--schedule", choices=("constant", "cosine"), default="constant", help="the learning rate over all steps")
    add("--warmup", type=arguments.amount, default=0.0, help="share of all steps over which the rate rises from 0")
    add("--clip-norm", type=arguments.amount, default=0.0, help="longest gradient, as an L2 norm; 0: not clipped")
    add("--num-queries", type=arguments.count, default=64, help="visual tokens that the language model reads")
    add("--num-heads", type=arguments.count, default=4, help="attention heads of the Q-Former")
    add("--depth", type=arguments.count, default=1, help="blocks of the Q-Former")
    add("--mlp-ratio", type=arguments.count, default=4, help="the Q-Former's MLP width, in embedding widths")
    add("--dropout", type=arguments.probability, default=0.1, help="dropout on the Q-Former's attention")
    add("--mlp-dropout", type=arguments.probability, default=0.3, help="dropout in the Q-Former's MLP")
    add("--seed", type=int, default=0, help="decides initial weights, order, captions and dropout")
    add("--eval-batch-size", type=arguments.count, default=64, help="clips that are captioned at once for validation")
    add("--max-new-tokens", type=arguments.count, default=50, help="longest caption, in tokens")
    add("--save-every", type=arguments.count, default=50, help="optimizer steps between checkpoints within an epoch")
    add("--max-missing", type=arguments.amount, default=1.0, help="percent of a split's clips that may lack features")
    add("--workers", type=arguments.count, default=2, help="threads that read features ahead")
    add("--eval-only", action="store_true", help="only validate the checkpoint that is there")
    return parser.parse_args(argv)


class Trainer:
    """A run: its data, models and optimizer, and how far it has come."""

    def __init__(self, args: argparse.Namespace, group: DistributedContext) -> None:
        self.args, self.ranks = args, group
        self.layout = dataset.check_data(args.data)
        self.best = args.checkpoint.parent / f"{args.checkpoint.stem}_best.pt"
        self.records = {
            split: usable_records(self.layout, split, args.max_missing, group) for split in ("train", "validation")
        }
        if args.checkpoint.is_dir() and not args.eval_only:
            raise UserError(f"--checkpoint {args.checkpoint} is a folder; give the file that is to be written")
        saved = checkpoint.read(args.checkpoint) if args.checkpoint.exists() else None
        if args.eval_only and saved is None:
            raise UserError(f"there is no checkpoint {args.checkpoint} to validate; train first, or give --checkpoint")
        self.captioner = self._captioner(saved)
        self.records["train"] = self._with_room(self.records["train"])
        parameters = self.captioner.qformer.parameters()
        # Fused: the other forms hold copies of their largest parameters, at the moment when memory is fullest.
        self.optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)
        self.epoch, self.step, self.total, self.captions = 0, 0, 0.0, 0  # epochs done, steps and losses in the next
        self.history: list[dict[str, Any]] = []
        if saved is not None:
            self._resume(saved)
        if group.is_main:
            self._prepare_folders()
        if group.world_size > 1:
            group.check_equal(self._fingerprint(saved), "clips and checkpoint")
            # Processors of another make draw other initial weights.
            group.broadcast(parameter.data for parameter in self.captioner.qformer.parameters())
        self.interrupts = Interrupts()
        self.validation = SplitReader(
            self.captioner,
            self.records["validation"],
            self.layout.feature_folder("validation"),
            args.eval_batch_size,
            group,
            self.interrupts.check,
        )

    def _captioner(self, saved: Checkpoint | None) -> VideoCaptioner:
        args = self.args
        lm, tokenizer = language.load(args.llm, self.ranks.device)
        made = cache.read_config(self.layout.features)
        first = self.layout.feature_folder("train") / f"{self.records['train'][0]['id']}.pt"
        torch.manual_seed(args.seed)
        try:
            qformer = QFormer(
                num_queries=args.num_queries,
                dim=lm.get_input_embeddings().embedding_dim,
                visual_dim=cache.load(first).values.shape[-1],
                num_heads=args.num_heads,
                depth=args.depth,
                mlp_ratio=args.mlp_ratio,
                dropout=args.dropout,
                mlp_dropout=args.mlp_dropout,
            )
        except ValueError as error:
            raise UserError(f"{error}; choose another --num-heads") from None
        if saved is not None:
            cache.check_same_features(
                saved.config["features"], self.layout.features, args.checkpoint, saved.config.get("published", False)
            )
            checkpoint.load_weights(qformer, saved.weights, args.checkpoint)
        config = {"llm": args.llm, "features": None if made is None else made.to_dict()}
        return VideoCaptioner(lm, tokenizer, qformer.to(self.ranks.device), config=config)

    def _with_room(self, records: list[dataset.Record]) -> list[dataset.Record]:
        """Records without the captions that the language model has no positions for."""
        room = self.captioner.max_caption_tokens
        if room is None:
            return records
        if room < 1:
            raise UserError(
                f"{self.args.llm} has too few positions for --num-queries {self.args.num_queries}; use fewer"
            )
        dropped = 0
        for record in records:
            # A token is at least one byte: only long captions need to be counted in tokens.
            fits = [c for c in record["label"] if len(c.encode()) < room or len(self.captioner.caption_ids(c)) <= room]
            dropped += len(record["label"]) - len(fits)
            record["label"] = fits
        if dropped:
            self.ranks.print_main(f"train: {dropped:,} captions are longer than {room} tokens and are left out")
        kept = [record for record in records if record["label"]]
        if not kept:
            raise UserError(f"no caption fits into the {room} tokens that {self.args.llm} has left; use fewer queries")
        return kept

    def _resume(self, saved: Checkpoint) -> None:
        args, progress = self.args, saved.progress
        self.epoch, self.history = saved.epoch, list(progress.get("history", []))
        if progress.get("step"):
            now = {**{key: getattr(args, key) for key in FIXED_WITHIN_EPOCH}, "clips": len(self.records["train"])}
            for key, value in now.items():
                if (before := progress["run"].get(key)) != value and not args.eval_only:
                    flag = "the number of training clips" if key == "clips" else f"--{key.replace('_', '-')}"
                    raise UserError(
                        f"{args.checkpoint} was saved within an epoch, with {flag} at {before!r:.80}, now {value}; "
                        "go on with the same, or start anew with another --checkpoint"
                    )
            self.step, self.total, self.captions = progress["step"], progress["total"], progress["captions"]
            if not args.eval_only and self.step > len(self._plan()):
                raise UserError(
                    f"{args.checkpoint} is damaged: it was saved at step {self.step} of an epoch that has less"
                )
        if not checkpoint.load_optimizer(self.optimizer, saved.optimizer):
            self.ranks.print_main(f"{args.checkpoint} holds no optimizer state that fits: the optimizer starts anew")
        self.ranks.print_main(f"going on from {args.checkpoint}: epoch {self.epoch + 1}, step {self.step}")

    def _prepare_folders(self) -> None:
        """Find out now, not after an epoch, what cannot be written."""
        files.check_writable(self.args.results)
        if self.args.eval_only:
            return
        files.check_writable(self.args.checkpoint.parent)
        for path in (self.args.checkpoint, self.best):
            files.remove_unfinished(path)

    def _fingerprint(self, saved: Checkpoint | None) -> list[Any]:
        """Values that differ where ranks would train on other clips, or from another state."""
        clips = [[record["id"] for record in records] for records in self.records.values()]
        weights = sorted(saved.weights.items()) if saved else []
        sums = [zlib.crc32(tensor.float().numpy().tobytes()) for _, tensor in weights]
        return [zlib.crc32(repr(clips).encode()), *sums, self.epoch, self.step]

    def train(self) -> None:
        """All epochs that are not done yet."""
        self._say_plan()
        while self.epoch < self.args.epochs:
            self._train_epoch(self._plan())
            self.save()  # a run that is stopped while it validates does not train the epoch again
            self._finish_epoch()
            self.save()
        self.write_results()

    def _say_plan(self) -> None:
        trained = sum(parameter.numel() for parameter in self.captioner.qformer.parameters())
        clips = {split: f"{len(records):,}" for split, records in self.records.items()}
        self.ranks.print_main(
            f"{trained:,} parameters train on {clips['train']} clips, validated on {clips['validation']}; "
            f"{self.ranks.world_size} process(es), {self.ranks.device}"
        )
        if self.epoch >= self.args.epochs:
            self.ranks.print_main(f"all {self.args.epochs} epochs are done: raise --epochs to train on")

    def _plan(self) -> list[Step]:
        args = self.args
        sizes = (args.batch_size, args.accumulate, args.captions_per_clip)
        return plan_epoch(self.records["train"], *sizes, args.seed, self.epoch)

    def _train_epoch(self, steps: list[Step]) -> None:
        """The steps of an epoch from where it stands: set the rate, micro-batches, clip, step, log, save."""
        args = self.args
        self.captioner.train()
        loader = iter(self._loader(steps[self.step :]))
        said = f"epoch {self.epoch + 1}/{args.epochs}"
        with tqdm(total=len(steps), initial=self.step, desc=said, unit="step", disable=not self.ranks.is_main) as bar:
            for step in steps[self.step :]:
                rate = rate_at(
                    self.epoch * len(steps) + self.step, args.epochs * len(steps), args.lr, args.schedule, args.warmup
                )
                for parameters in self.optimizer.param_groups:
                    parameters["lr"] = rate
                # Dropout is a function of the place in the run, so that a resumed run draws what it would have drawn.
                torch.manual_seed(hash((args.seed, self.epoch, self.step, self.ranks.rank)) % 2**63)
                loss = self._gradients(step, loader)
                norm = nn.utils.clip_grad_norm_(self.captioner.qformer.parameters(), args.clip_norm or math.inf)
                if not math.isfinite(loss) or not math.isfinite(norm.item()):
                    raise UserError(
                        f"the loss is not finite ({loss}, gradient {norm.item()}) at epoch {self.epoch + 1}, step "
                        f"{self.step + 1}, clips {' '.join(clip_id for batch in step.batches for clip_id, _ in batch)}; {args.checkpoint} holds the last good state: "
                        "check these clips' features, lower --lr, or set --clip-norm"
                    )
                self.optimizer.step()
                self.step += 1
                self.total += loss * step.captions
                self.captions += step.captions
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
                if self.step % args.save_every == 0 and self.step < len(steps):
                    self.save()

    def _loader(self, steps: list[Step]) -> Any:
        shards = [self.ranks.shard(batch) for step in steps for batch in step.batches]
        batches = [[clip_id for clip_id, _ in shard] for shard in shards if shard]
        pin = self.ranks.device.type == "cuda"
        return feature_batches(self.layout.feature_folder("train"), batches, self.args.workers, pin)

    def _gradients(self, step: Step, loader: Any) -> float:
        """Sum the step's gradients over its micro-batches and ranks; the mean loss of its captions."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for batch in step.batches:
            if self.ranks.world_size == 1:  # many ranks stop together, at the end of a step
                self.interrupts.check()
            if not (clips := self.ranks.shard(batch)):
                continue
            features = to_device(self.captioner, next(loader), self.layout.feature_folder("train"))
            captions = [captions for _, captions in clips]
            loss = self.captioner(features, captions, [1 / step.captions] * sum(map(len, captions)))
            loss.backward()
            total += loss.detach().double()
        for parameter in self.captioner.qformer.parameters() if self.ranks.world_size > 1 else ():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self.ranks.all_reduce(parameter.grad)
        return self._summed(total)

    def _summed(self, loss: Tensor) -> float:
        """The loss of all ranks' parts. Raises: Interrupted, on all of them, where one was asked to stop."""
        asked = torch.full_like(loss, self.interrupts.received or 0)
        loss, asked = self.ranks.all_reduce(torch.stack([loss, asked])).tolist()
        if asked and self.ranks.world_size > 1:
            self.interrupts.received = self.interrupts.received or signal.SIGTERM
            self.interrupts.check()
        return loss

    def _finish_epoch(self) -> None:
        """Validate, and count the epoch as done."""
        line = {"epoch": self.epoch + 1, "train_loss": self.total / self.captions, **self._validate(self.epoch + 1)}
        self.history = [*self.history, line]
        self.epoch, self.step, self.total, self.captions = self.epoch + 1, 0, 0.0, 0
        if not self.ranks.is_main:
            return
        self._keep_best(line["CIDEr"])
        files.write_text(self.args.checkpoint.parent / "losses.txt", "".join(map(loss_line, self.history)))
        self.ranks.print_main(f"{loss_line(line).strip()}, CIDEr={line['CIDEr']:.4f}")

    def _validate(self, epoch: int) -> dict[str, float]:
        """Loss, captions and CIDEr of the validation split; the captions are written by clip id."""
        loss, predictions = self.validation.loss_and_captions(self.args.max_new_tokens)
        score = 0.0
        if self.ranks.is_main:
            references = {record["id"]: record["label"] for record in self.records["validation"]}
            score = metrics.cider(predictions, references)
            content = {"epoch": epoch, "CIDEr": score, "val_loss": loss, "predictions": predictions}
            files.write_json(self._predictions_file(epoch), content)
        return {"val_loss": loss, "CIDEr": self.ranks.gather(score)[0]}

    def _predictions_file(self, epoch: int) -> Path:
        return self.args.results / f"validation_epoch_{epoch}.json"

    def _keep_best(self, score: float) -> None:
        """Write checkpoint_best.pt unless a better one is there, of this run or of another in the same place."""
        if self.best.exists():
            there = checkpoint.read(self.best).progress.get("history") or [{}]
            if there[-1].get("CIDEr", -math.inf) >= score:
                return
        best = self._state()
        best.optimizer = None
        checkpoint.write(self.best, best)

    def _state(self) -> Checkpoint:
        run = {**{key: getattr(self.args, key) for key in FIXED_WITHIN_EPOCH}, "clips": len(self.records["train"])}
        place = {"step": self.step, "total": self.total, "captions": self.captions}
        progress = {**place, "run": run, "history": self.history}
        weights = self.captioner.qformer.state_dict()
        return Checkpoint(self.captioner.config, weights, self.epoch, self.optimizer.state_dict(), progress)

    def save(self) -> None:
        """Write the state of the last optimizer step; gradients gathered since are made again on resuming."""
        if self.ranks.is_main:
            checkpoint.write(self.args.checkpoint, self._state())

    def evaluate(self) -> None:
        """--eval-only: validate the checkpoint without touching it."""
        line = {"epoch": self.epoch, **self._validate(self.epoch)}
        self.ranks.print_main(f"epoch {line['epoch']}: val_loss={line['val_loss']:.4f}, CIDEr={line['CIDEr']:.4f}")

    def write_results(self) -> None:
        """The curves and the page."""
        if not self.ranks.is_main or not self.history:
            return
        report.save_curves(self.args.results / "losses.png", self.history)
        path = self._predictions_file(self.epoch)
        predictions = files.read_json(path, "the last predictions")["predictions"]
        records = [record for record in self.records["validation"] if record["id"] in predictions]
        predictions = {record["id"]: predictions[record["id"]] for record in records}
        result = Scorer(records, self.layout).scores(predictions, meteor=False)
        page = self.args.results / "training" / "index.html"
        report.write_page(
            page,
            f"Training, epoch {self.epoch}",
            gallery(result["predictions"], self.layout, page),
            history=self.history,
            scores=scores.table(result),
            made_by=" at ".join(filter(None, provenance.made_by().values())),
            confused=result.get("ssv2", {}).get("confused"),
        )
        self.ranks.print_main(f"curves: {self.args.results / 'losses.png'}, page: {page}")


def rate_at(step: int, total: int, highest: float, schedule: str, warmup: float) -> float:
    """The learning rate of an optimizer step (from 0) of `total`."""
    rising = round(warmup * total)
    if step < rising:
        return highest * (step + 1) / rising
    if schedule == "constant":
        return highest
    done = (step - rising) / max(1, total - rising)
    return highest * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def loss_line(line: dict[str, Any]) -> str:
    """An epoch's line of losses.txt."""
    return f"Epoch {line['epoch']}: train_loss={line['train_loss']:.4f}, val_loss={line['val_loss']:.4f}\n"


if __name__ == "__main__":
    arguments.run(main)
