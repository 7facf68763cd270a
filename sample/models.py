"""The sample's two frozen models, trained from scratch on its training split: a tiny V-JEPA 2 and a tiny Qwen2.

Their sizes are those of the config.json in vjepa2/ and qwen2/. (The initializer's range is wider than usual: at 0.02
the rotary attention of two layers takes very long to leave the uniform.)

Shapes: B clips, F frames, T tubelets, S rows and columns of patches, N = T * S * S patch tokens a clip, D width.
"""

import random
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, VJEPA2Config, VJEPA2Model

import dataset
from models.language_model import PROMPT
from runtime import files
from sample import world
from video.reader import MEAN, STD, Transform, read_clip

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
REVERSED = torch.tensor([NAMES.index((world.OPPOSITES | world.FORWARDS).get(name, name)) for name in NAMES])
MIRRORED = torch.tensor([int(REVERSED[i]) if name.startswith("Pushing") else i for i, name in enumerate(NAMES)])
THINGS = {(colour, shape): (i, j) for i, colour in enumerate(world.COLOURS) for j, shape in enumerate(world.SHAPES)}
KINDS = (len(world.COLOURS) + 1, len(world.SHAPES) + 1)
CLIP_ANSWERS = (len(world.ACTIONS), *KINDS, *KINDS)
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
        self.of_clip = nn.ModuleList(nn.Linear(dim, number) for number in CLIP_ANSWERS)
        self.of_patch = nn.ModuleList(nn.Linear(dim, number) for number in (*PATCH_ANSWERS, *GRID))
        self.where = nn.Linear(dim, 4)
        self.register_buffer("place", torch.cartesian_prod(*(torch.arange(number) for number in GRID)))  # (N, 3)

    def forward(self, tokens: Tensor, answers: Answers) -> Tensor:
        """The sum of all questions' losses, from patch tokens (B, N, D)."""
        queries = self.queries.expand(len(tokens), -1, -1)
        read = self.attention(queries, tokens, tokens, need_weights=False)[0]  # (B, 5, D)
        asked = torch.cat([answers.what.flatten(1, 3), self.place.expand(len(tokens), -1, -1)], -1)  # (B, N, 6)
        losses = [F.cross_entropy(head(read[:, i]), answers.clip[:, i]) for i, head in enumerate(self.of_clip)]
        losses += [F.cross_entropy(head(tokens).mT, asked[..., i]) for i, head in enumerate(self.of_patch)]
        seen = answers.what[..., -1] < 2  # where there is nothing, nothing is anywhere
        errors = F.smooth_l1_loss(self.where(tokens).view_as(answers.where), answers.where, reduction="none")
        return sum(losses) + 4 * errors[seen].mean()


def answers_of(clip: world.Clip) -> Answers:
    """What is asked of one clip, without the batch dimension."""
    answers = [NAMES.index(clip.template), *chain(*(THINGS[thing] for thing in clip.things))]
    answers += [number - 1 for number in CLIP_ANSWERS[len(answers) :]]
    what = torch.tensor([number - 1 for number in PATCH_ANSWERS]).repeat(*GRID, 1)
    where = torch.zeros(*GRID, 4)
    side = GRID[1]
    patches = torch.stack(torch.meshgrid(2 * [torch.arange(side) + 0.5], indexing="xy"), -1)  # (S, S, 2) centres
    stretch = side * torch.tensor([world.HEIGHT / world.WIDTH, 1.0])  # from frame heights to patches
    scenes = [world.scene(clip, frame / (FRAMES - 1)) for frame in range(FRAMES)]
    for t, (first, second) in enumerate(zip(scenes[::2], scenes[1::2], strict=True)):  # a tubelet's two frames
        for (thing, *begin, radius), (_, *finish, _) in zip(first.things, second.things, strict=True):
            start = side / 2 + torch.tensor(begin) * first.zoom * stretch
            end = side / 2 + torch.tensor(finish) * second.zoom * stretch
            middle = (start + end) / 2
            there = ((patches - middle).abs() < radius * first.zoom * stretch + 0.3).all(-1)
            what[t][there] = torch.tensor([*THINGS[thing], clip.things.index(thing)])
            where[t][there] = torch.cat([middle - patches, (end - start).expand_as(patches)], -1)[there]
    return Answers(torch.tensor(answers), what, where)


def read_clips(data: Path, split: str) -> tuple[Tensor, Answers]:
    """A split's clips as preprocessing sees them, uint8 (B, F, 3, S, S), and what is known of them."""
    settings = files.read_json(data / "sample.json", "the sample's settings")
    chosen = world.choose_clips({name: settings[name] for name in dataset.SPLITS}, settings["seed"])[split]
    paths = map(dataset.Layout(data).video, tqdm(chosen, f"reading {split}", unit="clip"))
    pixels = torch.stack([read_clip(path, FRAMES, Transform(PIXELS, False))[0] for path in paths])
    return pixels, Answers(*map(torch.stack, zip(*map(answers_of, chosen.values()), strict=True)))


def normalize(clips: Tensor) -> Tensor:
    """uint8 (B, F, 3, S, S) to what the encoder reads."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    return (clips.float() / 255 - mean) / std


def vary(pixels: Tensor, answers: Answers, generator: torch.Generator) -> tuple[Tensor, Answers]:
    """Mirror half of the clips, and play half of those backwards whose opposite has a name; the answers follow."""
    pixels, (clip, what, where) = pixels.clone(), (answer.clone() for answer in answers)
    mirror, backwards = (torch.rand(len(pixels), 2, generator=generator) < 0.5).unbind(1)
    clip[mirror, 0] = MIRRORED[clip[mirror, 0]]
    backwards &= REVERSED[clip[:, 0]] != clip[:, 0]
    clip[backwards, 0] = REVERSED[clip[backwards, 0]]
    for chosen, of_pixels, of_patches, signs in ((mirror, -1, -2, (-1, 1, -1, 1)), (backwards, 1, 1, (1, 1, -1, -1))):
        pixels[chosen] = pixels[chosen].flip(of_pixels)
        what[chosen] = what[chosen].flip(of_patches)
        where[chosen] = where[chosen].flip(of_patches) * torch.tensor(signs)
    return pixels, Answers(clip, what, where)


def train_encoder(data: Path, out: Path, seed: int = 0, steps: int = 1200, batch: int = 32) -> None:
    """Train the encoder on the training split, and save it as V-JEPA 2's own checkpoints are."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pixels, answers = read_clips(data, "train")
    model = VJEPA2Model(VJEPA2Config.from_pretrained(HERE / "vjepa2")).train()
    questions = Questions(model.config.hidden_size)

    def loss() -> Tensor:
        chosen = torch.randint(len(pixels), (batch,), generator=generator)
        clips, asked = vary(pixels[chosen], Answers(*(answer[chosen] for answer in answers)), generator)
        return questions(model.get_vision_features(normalize(clips)), asked)

    fit([*model.encoder.parameters(), *questions.parameters()], loss, "encoder", steps, decay=0.05)
    model.eval().save_pretrained(out)
    files.copy(HERE / "vjepa2" / "preprocessor_config.json", out / "preprocessor_config.json")


def fit(parameters: list[nn.Parameter], loss_of: Callable[[], Tensor], name: str, steps: int, decay: float) -> None:
    """Minimize `loss_of()`, which draws a batch each time."""
    rate = 2e-3
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    bar = tqdm(range(steps), name, unit="step")
    for _ in bar:
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
    usual = str(HERE / "qwen2" / "tokenizer.json")  # byte-level BPE, as Qwen2's: every text has tokens
    untrained = PreTrainedTokenizerFast(tokenizer_file=usual, eos_token=EOS, pad_token=EOS)
    tokenizer = untrained.train_new_from_iterator(texts, 450, show_progress=False)
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
        starts = torch.tensor([0, *map(len, places[:-1])]).cumsum(0)
        tokens = torch.tensor(list(chain(*places)))
        embedded = F.embedding_bag(tokens, model.get_input_embeddings().weight, starts, mode="sum")
        inputs = pad_sequence(embedded.split(lengths), batch_first=True)
        targets = pad_sequence(labels, batch_first=True, padding_value=-100)
        return model(inputs_embeds=inputs, labels=targets).loss

    fit(list(model.parameters()), loss, "language model", steps, decay=0.01)
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
