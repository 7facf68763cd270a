"""The sample's two frozen models, trained from scratch on its training split: a tiny V-JEPA 2 and a tiny Qwen2.

Both have their big brothers' architecture and files, so the product loads them as it loads those. What they know
is this world only: they are here to test the bridge between two frozen models, not vision or language.

Shapes: B clips, F frames, T tubelets, N patch tokens a clip (T times a square grid), D width.
"""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, VJEPA2Config, VJEPA2Model
from vjepa import Transform, read_frames

import dataset
import files
import sample
from language import PROMPT

FRAMES = 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as V-JEPA 2 has them
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


class Questions(nn.Module):
    """What the encoder is asked in training: action, colours and shapes of a clip, and each token's own place.

    The clip's questions are learned queries that attend to the patch tokens, as a Q-Former's are. The place is asked
    because rotary attention alone leaves no trace of where a token is: up and down would look the same.
    """

    def __init__(self, dim: int, answers: list[int], grid: tuple[int, int, int]) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, len(answers), dim) * 0.02)
        self.attention = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.heads = nn.ModuleList(nn.Linear(dim, count) for count in answers)
        self.places = nn.ModuleList(nn.Linear(dim, count) for count in grid)
        places = torch.cartesian_prod(*(torch.arange(count) for count in grid))  # (N, 3): t, h, w
        self.register_buffer("place", places)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Patch tokens (B, N, D) to the logits of each question."""
        read = self.attention(self.queries.expand(len(tokens), -1, -1), tokens, tokens, need_weights=False)[0]
        return [head(read[:, i]) for i, head in enumerate(self.heads)]

    def place_loss(self, tokens: Tensor) -> Tensor:
        """Cross entropy of each token's t, h and w."""
        losses = [
            F.cross_entropy(head(tokens).flatten(0, 1), self.place[:, axis].repeat(len(tokens)))
            for axis, head in enumerate(self.places)
        ]
        return torch.stack(losses).mean()


def answers_of(record: dict) -> list[int]:
    """A clip's answers: template, then colour and shape of each of its things (the last number: no such thing)."""
    answers = [sorted(sample.ACTIONS).index(record["template"])]
    things = [name.split() for name in record["placeholders"]]
    for thing in range(2):
        colour, shape = things[thing] if thing < len(things) else (None, None)
        answers.append(list(sample.COLOURS).index(colour) if colour else len(sample.COLOURS))
        answers.append(sample.SHAPES.index(shape) if shape else len(sample.SHAPES))
    return answers


def read_clips(data: Path, split: str, frames: int = FRAMES) -> tuple[Tensor, Tensor]:
    """A split's clips as preprocessing would see them, uint8 (B, F, 3, S, S), and their answers (B, 5)."""
    transform = Transform(encoder_config().crop_size, False, MEAN, STD)
    layout, records = dataset.check_data(data), dataset.read_split(data, split)
    clips = [transform.apply(read_frames(layout.video(r["id"]), frames)) for r in tqdm(records, "reading", unit="clip")]
    return torch.stack(clips), torch.tensor([answers_of(record) for record in records])


def normalize(clips: Tensor) -> Tensor:
    """uint8 (B, F, 3, S, S) to what the encoder reads."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    return (clips.float() / 255 - mean) / std


def vary(clips: Tensor, answers: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirror half of the clips, and play half of those backwards whose opposite has a name; answers follow."""
    names = sorted(sample.ACTIONS)
    right, left = (names.index(f"Pushing [something] from {way}") for way in ("left to right", "right to left"))
    opposite = {names.index(a): names.index(b) for a, b in sample.OPPOSITES.items()}
    opposite |= {b: a for a, b in opposite.items()}
    clips, answers = clips.clone(), answers.clone()
    coins = torch.rand(len(clips), 2, generator=generator) < 0.5
    for i, (mirror, backwards) in enumerate(coins.tolist()):
        template = int(answers[i, 0])
        if mirror:
            clips[i] = clips[i].flip(-1)
            template = {left: right, right: left}.get(template, template)
        if backwards and template in opposite:
            clips[i] = clips[i].flip(0)
            template = opposite[template]
        answers[i, 0] = template
    return clips, answers


def train_encoder(data: Path, out: Path, seed: int = 0, steps: int = 1500, batch: int = 32, rate: float = 1e-3) -> None:
    """Train the encoder on the training split, and save it as V-JEPA 2's own checkpoints are."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    clips, answers = read_clips(data, "train")
    config = encoder_config()
    model = VJEPA2Model(config).train()
    side = config.crop_size // config.patch_size
    counts = [len(sample.ACTIONS), *2 * [len(sample.COLOURS) + 1, len(sample.SHAPES) + 1]]
    questions = Questions(config.hidden_size, counts, (FRAMES // config.tubelet_size, side, side))
    optimizer = torch.optim.AdamW([*model.encoder.parameters(), *questions.parameters()], rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    bar = tqdm(range(steps), "encoder", unit="step")
    for _ in bar:
        chosen = torch.randint(len(clips), (batch,), generator=generator)
        pixels, asked = vary(clips[chosen], answers[chosen], generator)
        tokens = model.get_vision_features(normalize(pixels))  # (B, N, D)
        loss = sum(F.cross_entropy(logits, asked[:, i]) for i, logits in enumerate(questions(tokens)))
        loss = loss + questions.place_loss(tokens)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
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
def report(model: VJEPA2Model, questions: Questions, clips: Tensor, answers: Tensor) -> None:
    """Print how many of the validation clips' questions are answered right."""
    logits = [questions(model.get_vision_features(normalize(part))) for part in clips.split(100)]
    right = [
        (torch.cat(part).argmax(-1) == answers[:, i]).float().mean().item()
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
    them in the test.
    """
    things = [f"{rng.choice(list(sample.COLOURS))} {rng.choice(sample.SHAPES)}" for _ in record["placeholders"]]
    caption = rng.choice(captions)
    for place, name in enumerate(record["placeholders"]):
        caption = caption.replace(name, f"[{place}]")
    for place, name in enumerate(things):
        caption = caption.replace(f"[{place}]", name)
    action = " ".join(record["template"].lower().replace("[something]", "").split())
    return [action] + [f"{place} {name}" for place, name in zip(("first", "second"), things, strict=False)], caption


def fill(hints: list[str], room: int, rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens of all hints, in any order, again and again until there are `room` or more.

    A Q-Former's queries are such a context: a bag of hints in no known order. A language model that never learnt to
    use what stands before the prompt cannot be steered from there.
    """
    ids = []
    while not ids or len(ids) < room:
        for hint in rng.sample(hints, len(hints)):
            ids += tokenizer(f" {hint}").input_ids
    return ids


def train_lm(data: Path, out: Path, seed: int = 0, steps: int = 1000, batch: int = 48, rate: float = 2e-3) -> None:
    """Train tokenizer and language model on the training split's captions: keywords | prompt | caption EOS."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    records = dataset.read_split(data, "train")
    said = files.read_json(data / "ssv2_paraphrase.json", "the paraphrases")
    captions = {record["id"]: [record["label"], *said[record["id"]]] for record in records}
    texts = [f"{PROMPT} {caption} first second" for some in captions.values() for caption in some]
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
            before = fill(hints, rng.randint(1, 64), rng, tokenizer) + prompt
            rows.append(before + caption)
            labels.append([-100] * len(before) + caption)
        width = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        targets = torch.tensor([row + [-100] * (width - len(row)) for row in labels])
        loss = model(input_ids=ids, labels=targets).loss  # pads come last: the causal mask hides them
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
