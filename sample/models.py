"""The sample's two frozen models, trained from scratch on its training split: a tiny V-JEPA 2 and a tiny Qwen2.

Both have their big brothers' architecture and files, so the product loads them as it loads those. What they know
is this world only: they are here to test the bridge between two frozen models, not vision or language.

Shapes: B clips, F frames, T tubelets, N patch tokens a clip (T times a square grid), D width.
"""

import random
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, VJEPA2Config, VJEPA2Model

import dataset
from models.language_model import PROMPT
from runtime import files
from sample import world
from video.reader import MEAN, STD, Transform, read_frames

FRAMES = 8
EOS = "<|endoftext|>"  # Qwen2's, which is its pad token too


# --- the encoder ---------------------------------------------------------------------------------------------------


def encoder_config() -> VJEPA2Config:
    """64 x 64 pixels, patches of 16, tubelets of 2 frames: 16 patch tokens a tubelet; under 2 MB."""
    return VJEPA2Config(
        crop_size=64,
        patch_size=16,
        tubelet_size=2,
        frames_per_clip=FRAMES,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_ratio=2,
        # Wider than usual: at 0.02 the rotary attention of two layers takes very long to leave the uniform.
        initializer_range=0.06,
        # The predictor is V-JEPA 2's own training aid; nothing here uses it.
        pred_hidden_size=16,
        pred_num_attention_heads=1,
        pred_num_hidden_layers=1,
        pred_num_mask_tokens=1,
        pred_mlp_ratio=1,
    )


def grid_of(config: VJEPA2Config) -> tuple[int, int, int]:
    """(T, S, S): the patch tokens of a clip, in time, height and width."""
    side = config.crop_size // config.patch_size
    return config.frames_per_clip // config.tubelet_size, side, side


class Answers(NamedTuple):
    """What is known of a clip from how it was drawn."""

    clip: Tensor  # (B, 5) action, then colour and shape of each thing; the last number: no such thing
    what: Tensor  # (B, T, S, S, 3) colour, shape and role of the thing at a patch; the last number: nothing there
    where: Tensor  # (B, T, S, S, 4) the thing's place relative to the patch, and its way, both (x, y) in patches


KINDS = (len(world.COLOURS) + 1, len(world.SHAPES) + 1)
CLIP_ANSWERS = (len(world.ACTIONS), *KINDS, *KINDS)
PATCH_ANSWERS = (*KINDS, 3)


class Questions(nn.Module):
    """What the encoder is asked in training: of each clip its action and things, of each token what its patch shows.

    The clip's questions are learned queries that attend to the patch tokens, as a Q-Former's are. Each token is also
    asked for its own t, h and w: rotary attention alone leaves no trace of them, and up and down would look the same.
    """

    def __init__(self, dim: int, grid: tuple[int, int, int]) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, len(CLIP_ANSWERS), dim) * 0.02)
        self.attention = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.of_clip = nn.ModuleList(nn.Linear(dim, number) for number in CLIP_ANSWERS)
        self.of_patch = nn.ModuleList(nn.Linear(dim, number) for number in (*PATCH_ANSWERS, *grid))
        self.where = nn.Linear(dim, 4)
        self.register_buffer("place", torch.cartesian_prod(*(torch.arange(number) for number in grid)))  # (N, 3)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Patch tokens (B, N, D) to the logits of each of the clip's questions."""
        queries = self.queries.expand(len(tokens), -1, -1)
        read = self.attention(queries, tokens, tokens, need_weights=False)[0]  # (B, 5, D)
        return [head(read[:, i]) for i, head in enumerate(self.of_clip)]

    def loss(self, tokens: Tensor, answers: Answers) -> Tensor:
        """The sum of all questions' losses."""
        asked = torch.cat([answers.what.flatten(1, 3), self.place.expand(len(tokens), -1, -1)], -1)  # (B, N, 6)
        losses = [F.cross_entropy(logits, answers.clip[:, i]) for i, logits in enumerate(self(tokens))]
        losses += [F.cross_entropy(head(tokens).mT, asked[..., i]) for i, head in enumerate(self.of_patch)]
        seen = answers.what[..., -1] < 2  # where there is nothing, nothing is anywhere
        errors = F.smooth_l1_loss(self.where(tokens).view_as(answers.where), answers.where, reduction="none")
        return sum(losses) + 4 * errors[seen].mean()


def clip_answers(clip: world.Clip) -> Tensor:
    """int64 (5,): action, then colour and shape of each thing."""
    answers = [sorted(world.ACTIONS).index(clip.template)]
    for colour, shape in clip.things:
        answers += [list(world.COLOURS).index(colour), world.SHAPES.index(shape)]
    return torch.tensor(answers + [number - 1 for number in CLIP_ANSWERS[len(answers) :]])


def patch_answers(clip: world.Clip, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """What each patch token could see: `what` and `where` of one clip."""
    tubelets, side, _ = grid
    scene_at = world.stage(clip)
    what = torch.tensor([len(world.COLOURS), len(world.SHAPES), 2]).repeat(tubelets, side, side, 1)
    where = torch.zeros(tubelets, side, side, 4)
    centres = torch.arange(side) + 0.5  # in patches
    stretch = side * torch.tensor([world.HEIGHT / world.WIDTH, 1.0])  # from frame heights to patches

    def places(time: float) -> list[tuple[int, Tensor, Tensor]]:
        zoom, things, _ = scene_at(time)
        return [
            (clip.things.index(thing), side / 2 + torch.tensor([x, y]) * zoom * stretch, radius * zoom * stretch)
            for thing, x, y, radius in things
        ]

    gap = 1 / (2 * tubelets - 1)  # between two frames of a tubelet, in lengths of the clip
    for t in range(tubelets):
        before, after = places(2 * t * gap), places((2 * t + 1) * gap)
        for (role, start, reach), (_, end, _) in zip(before, after, strict=True):
            middle = (start + end) / 2
            columns, rows = ((centres - middle[axis]).abs() < reach[axis] + 0.3 for axis in (0, 1))
            there = rows[:, None] & columns[None, :]
            colour, shape = clip.things[role]
            what[t][there] = torch.tensor([list(world.COLOURS).index(colour), world.SHAPES.index(shape), role])
            offset = torch.stack(
                [(middle[0] - centres).expand(side, -1), (middle[1] - centres)[:, None].expand(-1, side)], -1
            )
            where[t][there] = torch.cat([offset, (end - start).expand(side, side, 2)], -1)[there]
    return what, where


def read_clips(data: Path, split: str) -> tuple[Tensor, Answers]:
    """A split's clips as preprocessing sees them, uint8 (B, F, 3, S, S), and what is known of them."""
    settings = files.read_json(data / "sample.json", "the sample's settings")
    chosen = world.choose_clips({name: settings[name] for name in dataset.SPLITS}, settings["seed"])[split]
    config, layout = encoder_config(), dataset.check_data(data)
    transform = Transform(config.crop_size, False, MEAN, STD)
    names = tqdm(chosen, f"reading {split}", unit="clip")
    pixels = torch.stack([transform.apply(read_frames(layout.video(name), FRAMES)) for name in names])
    patches = [patch_answers(clip, grid_of(config)) for clip in chosen.values()]
    what, where = (torch.stack(part) for part in zip(*patches, strict=True))
    return pixels, Answers(torch.stack([clip_answers(clip) for clip in chosen.values()]), what, where)


def normalize(clips: Tensor) -> Tensor:
    """uint8 (B, F, 3, S, S) to what the encoder reads."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    return (clips.float() / 255 - mean) / std


def vary(pixels: Tensor, answers: Answers, generator: torch.Generator) -> tuple[Tensor, Answers]:
    """Mirror half of the clips, and play half of those backwards whose opposite has a name; the answers follow."""
    names = sorted(world.ACTIONS)
    right, left = (names.index(f"Pushing [something] from {way}") for way in ("left to right", "right to left"))
    opposite = {names.index(a): names.index(b) for a, b in world.OPPOSITES.items()}
    opposite |= {b: a for a, b in opposite.items()}
    pixels, (clip, what, where) = pixels.clone(), (answer.clone() for answer in answers)
    for i, (mirror, backwards) in enumerate((torch.rand(len(pixels), 2, generator=generator) < 0.5).tolist()):
        action = int(clip[i, 0])
        if mirror:
            pixels[i], what[i], where[i] = pixels[i].flip(-1), what[i].flip(-2), where[i].flip(-2)
            where[i] *= torch.tensor([-1, 1, -1, 1])
            action = {left: right, right: left}.get(action, action)
        if backwards and action in opposite:
            pixels[i], what[i], where[i] = pixels[i].flip(0), what[i].flip(0), where[i].flip(0)
            where[i] *= torch.tensor([1, 1, -1, -1])
            action = opposite[action]
        clip[i, 0] = action
    return pixels, Answers(clip, what, where)


def train_encoder(data: Path, out: Path, seed: int = 0, steps: int = 1200, batch: int = 32, rate: float = 2e-3) -> None:
    """Train the encoder on the training split, and save it as V-JEPA 2's own checkpoints are."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pixels, answers = read_clips(data, "train")
    config = encoder_config()
    model = VJEPA2Model(config).train()
    questions = Questions(config.hidden_size, grid_of(config))
    parameters = [*model.encoder.parameters(), *questions.parameters()]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    bar = tqdm(range(steps), "encoder", unit="step")
    for _ in bar:
        chosen = torch.randint(len(pixels), (batch,), generator=generator)
        clips, asked = vary(pixels[chosen], Answers(*(answer[chosen] for answer in answers)), generator)
        loss = questions.loss(model.get_vision_features(normalize(clips)), asked)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    report(model.eval(), questions.eval(), *read_clips(data, "validation"))
    model.save_pretrained(out)
    processor = {
        "video_processor_type": "VJEPA2VideoProcessor",
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "size": {"shortest_edge": round(config.crop_size * 292 / 256)},  # V-JEPA 2's own proportion
        "crop_size": {"height": config.crop_size, "width": config.crop_size},
        "rescale_factor": 1 / 255,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    files.write_json(out / "preprocessor_config.json", processor)


@torch.no_grad()
def report(model: VJEPA2Model, questions: Questions, pixels: Tensor, answers: Answers) -> None:
    """Print how many of the validation clips' questions are answered right."""
    logits = [questions(model.get_vision_features(normalize(part))) for part in pixels.split(100)]
    right = [
        (torch.cat(part).argmax(-1) == answers.clip[:, i]).float().mean().item()
        for i, part in enumerate(zip(*logits, strict=True))
    ]
    names = ("template", "first colour", "first shape", "second colour", "second shape")
    print("validation: " + ", ".join(f"{name} {share:.2f}" for name, share in zip(names, right, strict=True)))


# --- the language model --------------------------------------------------------------------------------------------


def lm_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    """Qwen2 of two layers; under 2 MB."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train_tokenizer(texts: list[str], size: int = 450) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as Qwen2's: every text has tokens, and a word has other tokens behind a space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[EOS], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def invent(record: dict, captions: list[str], rng: random.Random) -> tuple[list[str], str]:
    """One of a clip's captions with other things in it: (the words that it is about, the caption).

    Were the things left, the model would know which things an action never has in training, and refuse to name
    them in the test. One in ten is the label with "something" for each thing: so are actions scored by likelihood.
    """
    things = [f"{rng.choice(list(world.COLOURS))} {rng.choice(world.SHAPES)}" for _ in record["placeholders"]]
    vague = rng.random() < 0.1
    caption = captions[0] if vague else rng.choice(captions)
    for place, name in enumerate(record["placeholders"]):
        caption = caption.replace(name, f"[{place}]")
    for place, name in enumerate(things):
        caption = caption.replace(f"[{place}]", "something" if vague else name)
    action = " ".join(record["template"].lower().replace("[something]", "").split())
    hints = [action] + [f"{place} {name}" for place, name in zip(("first", "second"), things, strict=False)]
    return hints, caption


def fill(hints: list[str], room: int, rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """A context of `room` places or more, each with one or more tokens: the hints, in any order, again and again.

    A thing's hint is one place or two ("first red" and "first ball") that hold the sum of their tokens' embeddings,
    as a Q-Former's query can; an action's words have a place each, since their order counts.
    """
    places = []
    while not places or len(places) < room:
        for hint in rng.sample(hints, len(hints)):
            ids = tokenizer(f" {hint}").input_ids
            if hint == hints[0]:
                places += [[token] for token in ids]
            else:
                role, *parts = ids
                places += [ids] if rng.random() < 0.5 else [[role, part] for part in rng.sample(parts, len(parts))]
    return places


def train_lm(data: Path, out: Path, seed: int = 0, steps: int = 600, batch: int = 32, rate: float = 2e-3) -> None:
    """Train tokenizer and language model on the training split's captions: hints | prompt | caption EOS.

    The hints come as a Q-Former's visual tokens do. A language model that never learnt to use what stands before the
    prompt cannot be steered from there.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    records = dataset.read_split(data, "train")
    said = files.read_json(data / "ssv2_paraphrase.json", "the paraphrases")
    captions = {record["id"]: [record["label"], *said[record["id"]]] for record in records}
    texts = [f"{PROMPT} {caption} first second something" for some in captions.values() for caption in some]
    tokenizer = train_tokenizer(texts)
    model = Qwen2ForCausalLM(lm_config(tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    prompt = tokenizer(PROMPT).input_ids
    bar = tqdm(range(steps), "language model", unit="step")
    for _ in bar:
        rows, labels = [], []
        for record in rng.choices(records, k=batch):
            hints, caption = invent(record, captions[record["id"]], rng)
            caption = tokenizer(f" {caption}").input_ids + [tokenizer.eos_token_id]
            before = fill(hints, rng.randint(1, 64), rng, tokenizer) + [[token] for token in prompt]
            rows.append(before + [[token] for token in caption])
            labels.append([-100] * len(before) + caption)
        width = max(map(len, rows))
        targets = torch.tensor([row + [-100] * (width - len(row)) for row in labels])
        flat = torch.tensor([token for row in rows for place in row for token in place])
        starts = [len(place) for row in rows for place in row + [[]] * (width - len(row))]
        starts = torch.tensor([0, *starts[:-1]]).cumsum(0)
        # Empty places sum to zero. They come last, where the causal mask hides them from all that counts.
        embedded = F.embedding_bag(flat, model.get_input_embeddings().weight, starts, mode="sum")
        loss = model(inputs_embeds=embedded.view(batch, width, -1), labels=targets).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
