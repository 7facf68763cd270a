"""The sample's two frozen models, trained from scratch: a tiny V-JEPA 2 on fresh clips, a tiny Qwen2 on captions.

Their sizes are those of the config.json in vjepa2/ and qwen2/. (The initializer's range is wider than usual: at 0.02
the rotary attention of two layers takes very long to leave the uniform.)

Shapes: B clips, F frames, T tubelets, S rows and columns of patches, N = T * S * S patch tokens a clip, D width.
"""

import random
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import av
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, VJEPA2Config, VJEPA2Model

import dataset
from models.language_model import PROMPT
from runtime import files
from runtime.progress import Progress
from sample import world
from video.reader import MEAN, STD, Transform, frame_indices, read_clip

HERE = Path(__file__).parent
FRAMES, PIXELS = 8, 64  # of a clip, as the encoder's config has them
GRID = (4, 4, 4)  # a clip's patch tokens: tubelets, rows, columns
EOS = "<|endoftext|>"  # Qwen2's, which is its pad token too


class Answers(NamedTuple):
    """What is known of a clip from how it was drawn."""

    clip: Tensor  # (B, 5) action, then colour and shape of each thing; the last number: no such thing
    what: Tensor  # (B, T, S, S, 3) colour, shape and role of the thing at a patch; the last number: nothing there
    where: Tensor  # (B, T, S, S, 4) the thing's place relative to the patch, and its way, both (x, y) in patches


NAMES = sorted(world.ACTIONS)
THINGS = {(colour, shape): (i, j) for i, colour in enumerate(world.COLOURS) for j, shape in enumerate(world.SHAPES)}
KINDS = (len(world.COLOURS) + 1, len(world.SHAPES) + 1)
CLIP_NAMES = ("action", "first colour", "first shape", "second colour", "second shape")
CLIP_ANSWERS = dict(zip(CLIP_NAMES, (len(NAMES), *KINDS, *KINDS), strict=True))
PATCH_ANSWERS = (*KINDS, 3)


class Questions(nn.Module):
    """What the encoder is asked in training: of each clip its action and things, of each token what its patch shows.

    The clip's questions are learned queries that attend to the patch tokens, as a Q-Former's are. Each token is also
    asked for its own t, h and w: rotary attention alone leaves no trace of them, and up and down would look the same.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, len(CLIP_ANSWERS), dim) * 0.02)
        self.attention = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.of_clip = nn.ModuleList(nn.Linear(dim, number) for number in CLIP_ANSWERS.values())
        self.of_patch = nn.ModuleList(nn.Linear(dim, number) for number in (*PATCH_ANSWERS, *GRID, len(NAMES)))
        self.where = nn.Linear(dim, 4)
        self.register_buffer("place", torch.cartesian_prod(*(torch.arange(number) for number in GRID)))  # (N, 3)

    def read(self, tokens: Tensor) -> list[Tensor]:
        """The clip's answers, five times (B, classes) logits, from patch tokens (B, N, D)."""
        queries = self.queries.expand(len(tokens), -1, -1)
        read = self.attention(queries, tokens, tokens, need_weights=False)[0]  # (B, 5, D)
        return [head(read[:, i]) for i, head in enumerate(self.of_clip)]

    def forward(self, tokens: Tensor, answers: Answers) -> Tensor:
        """The sum of all questions' losses, from patch tokens (B, N, D)."""
        shown, action = answers.what.flatten(1, 3), answers.clip[:, None, :1]
        asked = torch.cat([shown, *(x.expand(*shown.shape[:2], -1) for x in (self.place, action))], -1)  # (B, N, 7)
        losses = [F.cross_entropy(logits, answers.clip[:, i]) for i, logits in enumerate(self.read(tokens))]
        losses += [F.cross_entropy(head(tokens).mT, asked[..., i]) for i, head in enumerate(self.of_patch)]
        seen = answers.what[..., -1] < 2  # where there is nothing, nothing is anywhere
        errors = F.smooth_l1_loss(self.where(tokens).view_as(answers.where), answers.where, reduction="none")
        return sum(losses) + 4 * errors[seen].mean()


def answers_of(clip: world.Clip) -> Answers:
    """What is asked of one clip, without the batch dimension."""
    answers = [NAMES.index(clip.template), *chain(*(THINGS[thing] for thing in clip.things))]
    answers += [number - 1 for number in list(CLIP_ANSWERS.values())[len(answers) :]]
    what = torch.tensor([number - 1 for number in PATCH_ANSWERS]).repeat(*GRID, 1)
    where = torch.zeros(*GRID, 4)
    side = GRID[1]
    patches = torch.stack(torch.meshgrid(2 * [torch.arange(side) + 0.5], indexing="xy"), -1)  # (S, S, 2) centres
    stretch = side * torch.tensor([world.HEIGHT / world.WIDTH, 1.0])  # from frame heights to patches
    scenes = [world.scene(clip, time) for time in sampled_times(clip)]
    for t, (first, second) in enumerate(zip(scenes[::2], scenes[1::2], strict=True)):  # a tubelet's two frames
        for (thing, *begin, radius), (_, *finish, _) in zip(first.things, second.things, strict=True):
            both = (begin, first.zoom), (finish, second.zoom)
            start, end = (side / 2 + torch.tensor(place) * zoom * stretch for place, zoom in both)
            middle = (start + end) / 2
            there = ((patches - middle).abs() < radius * first.zoom * stretch + 0.3).all(-1)
            what[t][there] = torch.tensor([*THINGS[thing], clip.things.index(thing)])
            where[t][there] = torch.cat([middle - patches, (end - start).expand_as(patches)], -1)[there]
    return Answers(torch.tensor(answers), what, where)


def sampled_times(clip: world.Clip) -> list[float]:
    """When preprocessing looks at a clip, in [0, 1]."""
    return [number / (clip.length - 1) for number in frame_indices(clip.length, FRAMES).tolist()]


def choose_clips(data: Path, fresh: int = 0) -> dict[str, dict[str, world.Clip]]:
    """The sample's splits, and about so many "fresh" clips that training could hold: nothing of the other splits."""
    settings = files.read_json(data / "sample.json", "the sample's settings")
    splits = world.choose_clips({name: settings[name] for name in dataset.SPLITS}, settings["seed"])
    held_out = {clip.seed for split in ("validation", "test") for clip in splits[split].values()}
    more = world.choose_clips({"train": fresh}, settings["seed"])["train"]
    return splits | {"fresh": {i: clip for i, clip in more.items() if clip.seed not in held_out}}


def draw(clip: world.Clip) -> Tensor:
    """What preprocessing would read from a clip's file, but for the codec's noise: uint8 (F, 3, S, S)."""
    frames = world.render_clip(clip, frames=sampled_times(clip))
    column = av.VideoFrame.from_ndarray(frames.reshape(-1, *frames.shape[2:]), format="rgb24")
    frames = column.reformat(format="yuv420p").to_ndarray(format="rgb24").reshape(frames.shape)  # colours are halved
    return Transform(PIXELS).apply(frames)


def load_clips(clips: dict[str, world.Clip], data: Path | None = None) -> tuple[Tensor, Answers]:
    """Clips drawn, or from their files in `data`, uint8 (B, F, 3, S, S), and what is known of them."""
    pixels = torch.empty(len(clips), FRAMES, 3, PIXELS, PIXELS, dtype=torch.uint8)
    for place, (clip_id, clip) in enumerate(Progress(clips.items(), "clips", unit="clip")):
        video = data and dataset.Layout(data).video(clip_id)
        pixels[place] = read_clip(video, FRAMES, Transform(PIXELS))[0] if data else draw(clip)
    answers = [answers_of(clip) for clip in Progress(clips.values(), "what they show", unit="clip")]
    return pixels, Answers(*map(torch.stack, zip(*answers, strict=True)))


def normalize(clips: Tensor) -> Tensor:
    """uint8 (B, F, 3, S, S) to what the encoder reads."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    return (clips.float() / 255 - mean) / std


def train_encoder(data: Path, out: Path, seed: int = 0, steps: int = 6000, batch: int = 32, clips: int = 16000) -> dict:
    """Train the encoder, and save it as V-JEPA 2's checkpoints are; returns what its questions read in validation."""
    torch.manual_seed(seed)
    splits = choose_clips(data, clips)
    pixels, answers = load_clips(splits["fresh"])
    model = VJEPA2Model(VJEPA2Config.from_pretrained(HERE / "vjepa2")).train()
    questions = Questions(model.config.hidden_size)

    def loss() -> Tensor:
        chosen = torch.randint(len(pixels), (batch,))
        noise = 1.5 * torch.randn(batch, *pixels.shape[1:])  # as large as what the codec adds, in 255ths
        tokens = model.get_vision_features(normalize(pixels[chosen] + noise))
        return questions(tokens, Answers(*(answer[chosen] for answer in answers)))

    fit([*model.encoder.parameters(), *questions.parameters()], loss, "encoder", steps, decay=0.05)
    model.eval().save_pretrained(out)
    files.copy(HERE / "vjepa2" / "preprocessor_config.json", out / "preprocessor_config.json")
    asked, known = load_clips(splits["validation"], data)
    with torch.no_grad():
        logits = questions.read(model.get_vision_features(normalize(asked)))
    right = torch.stack([one.argmax(-1) for one in logits], -1) == known.clip  # (B, 5)
    return dict(zip(CLIP_ANSWERS, right.double().mean(0).round(decimals=3).tolist(), strict=True))


def fit(parameters: list[nn.Parameter], loss_of: Callable[[], Tensor], name: str, steps: int, decay: float) -> None:
    """Minimize `loss_of()`, which draws a batch each time."""
    optimizer = torch.optim.AdamW(parameters, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.05)
    for _ in (bar := Progress(range(steps), name, unit="step")):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def invent(record: dict, captions: list[str], rng: random.Random) -> tuple[list[str], str]:
    """One of a clip's captions with other things in it: (the words that it is about, the caption).

    Were the things left, the model would know which things an action never has in training, and refuse to name
    them in the test. One in ten is the label with "something" for each thing: so are actions scored by likelihood.
    """
    things = [f"{rng.choice(list(world.COLOURS))} {rng.choice(world.SHAPES)}" for _ in record["placeholders"]]
    vague = rng.random() < 0.1
    caption = captions[0] if vague else rng.choice(captions)
    for place, name in enumerate(record["placeholders"]):
        caption = caption.replace(name, f"{{{place}}}")
    caption = caption.format(*(["something"] * len(things) if vague else things))
    action = " ".join(record["template"].lower().replace("[something]", "").split())
    hints = [action] + [f"{place} {name}" for place, name in zip(("first", "second"), things, strict=False)]
    return hints, caption


def fill(hints: list[str], room: int, rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """A context of `room` places or more, each with one or more tokens: the hints, in any order, again and again.

    A thing's hint is one place or two ("first red" and "first ball") that hold the sum of their tokens' embeddings,
    as a Q-Former's query can; an action's words have a place each, since their order counts.
    """
    places = []
    while len(places) < room:
        for hint in rng.sample(hints, len(hints)):
            ids = tokenizer(f" {hint}").input_ids
            if hint == hints[0]:
                places += [[token] for token in ids]
            elif rng.random() < 0.5:
                places.append(ids)
            else:
                places += [[ids[0], part] for part in rng.sample(ids[1:], len(ids) - 1)]
    return places


def train_lm(data: Path, out: Path, seed: int = 0, steps: int = 600, batch: int = 32) -> None:
    """Train tokenizer and language model on the training split's captions: hints | prompt | caption EOS.

    The hints come as a Q-Former's visual tokens do. A language model that never learnt to use what stands before the
    prompt cannot be steered from there.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    records = dataset.read_split(data, "train")
    paraphrases = files.read_json(data / "ssv2_paraphrase.json", "the paraphrases")
    captions = {record["id"]: [record["label"], *paraphrases[record["id"]]] for record in records}
    texts = [f"{PROMPT} {caption} first second something" for some in captions.values() for caption in some]
    # Byte-level BPE, as Qwen2's: every text has tokens.
    usual = PreTrainedTokenizerFast(tokenizer_file=str(HERE / "qwen2/tokenizer.json"), eos_token=EOS, pad_token=EOS)
    tokenizer = usual.train_new_from_iterator(texts, 450, show_progress=False)
    model = Qwen2ForCausalLM(Qwen2Config.from_pretrained(HERE / "qwen2", vocab_size=len(tokenizer))).train()
    prompt = [[token] for token in tokenizer(PROMPT).input_ids]

    def loss() -> Tensor:
        places, lengths, labels = [], [], []
        for record in rng.choices(records, k=batch):
            hints, caption = invent(record, captions[record["id"]], rng)
            caption = tokenizer(f" {caption}").input_ids + [tokenizer.eos_token_id]
            before = fill(hints, rng.randint(1, 64), rng, tokenizer) + prompt
            places += before + [[token] for token in caption]
            lengths.append(len(before) + len(caption))
            labels.append(torch.tensor([-100] * len(before) + caption))
        tokens, starts = torch.tensor(list(chain(*places))), torch.tensor([0, *map(len, places[:-1])]).cumsum(0)
        embedded = F.embedding_bag(tokens, model.get_input_embeddings().weight, starts, mode="sum")
        inputs = pad_sequence(embedded.split(lengths), batch_first=True)
        targets = pad_sequence(labels, batch_first=True, padding_value=-100)
        return model(inputs_embeds=inputs, labels=targets).loss

    fit(list(model.parameters()), loss, "language model", steps, decay=0.01)
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
