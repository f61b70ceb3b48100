"""What torch computes: the yardstick that every artifact of a model is held against.

The model is built from config.json and filled through our own reader, in float32, and every
sequence is computed alone, in one pass and without a cache: nothing here shares code with a
runtime's loading, padding or caching, so their faults cannot cancel out. Where the model does not
fit as a whole, each pass reads all of its files (models/loading.py): it is asked less then, and the
sequences share passes, filled up behind their ends, which nothing before can see.

Shapes: B sequences, L tokens of one, V vocabulary; O, I outputs and inputs of a matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from dotexport.exports.noise import HALVES, Noise, measured
from dotexport.exports.target import QUANTISED_BLOCK, Logits, Tokens
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.loading import Loaded
from dotexport.models.memory import head_width

# Text sampled from the model is what it will meet in use; random ids are far from it and drive
# activations to extremes, where overflow and wrong constants show. One prompt has a single token:
# runtimes tell prefill from decode by counting tokens, and that is their smallest case.
TEXT_LENGTHS = (24, 17, 9)
RANDOM_LENGTHS = (40, 6, 1)
NUM_STEPS = 8
# Of a model that is read again for every token that is sampled.
STREAMED_TEXT_LENGTHS = (10, 7, 5)
STREAMED_STEPS = 3
# The long sequence is as long as the context, or as a pass of so many multiplications allows; at
# least this many tokens, or past the sliding window where that is not much longer. Its logits and
# the scores of one layer are held once.
WORK, LONGEST, LONGEST_WINDOW = 1 << 36, 1280, 4096
MOST_LOGITS, MOST_SCORES = 1 << 27, 1 << 28
NUM_POSITIONS = 24
PRECISIONS = ("fp32", *HALVES)


@dataclass(frozen=True)
class LongText:
    """One long sequence, judged at few positions: past sliding windows, past the half of a rotary
    table, at the end of the context where that is within reach.

    Attributes:
        tokens: of the sequence.
        positions: that are judged, ascending; the last of all, `Reference.num_steps` of them, are
            decoded one by one.
        context: that config.json states; what lies behind the sequence is not asked.
        logits, rounded, rounded_twice: as of `Reference`, at these positions.
    """

    tokens: Tokens
    positions: tuple[int, ...]
    logits: Logits
    context: int = 0
    rounded: Logits | None = None
    rounded_twice: Logits | None = None

    def reach(self) -> dict[str, Any]:
        """How far it goes, and of what."""
        return {"tokens": len(self.tokens), "context": self.context, "positions": self.positions}


@dataclass(frozen=True)
class Reference:
    """Sequences (a prompt and its greedy continuation) and torch's logits at every position.

    Attributes:
        sequences: tokens_L of each.
        prompt_lengths: how many of them are prompt.
        is_text: whether the prompt was sampled from the model itself.
        logits: logits_LV of each.
        rounded: the same after rounding the weights to 4 bits in blocks: what int4 costs by itself.
        rounded_twice: with the inputs of every product rounded to 8 bits as well, as runtimes do.
        peak: largest magnitude that goes into or comes out of a product or norm.
        noise: precision -> what its rounding costs in torch (noise.py).
        long: a sequence that goes far into the context; None: the others do already.
    """

    sequences: tuple[Tokens, ...]
    prompt_lengths: tuple[int, ...]
    is_text: tuple[bool, ...]
    logits: tuple[Logits, ...]
    rounded: tuple[Logits, ...]
    rounded_twice: tuple[Logits, ...]
    peak: float = 0.0
    noise: Mapping[str, Noise] = field(default_factory=dict)
    long: LongText | None = None

    @property
    def num_steps(self) -> int:
        return len(self.sequences[0]) - self.prompt_lengths[0]


@torch.inference_mode()
def compute_reference(
    checkpoint: Checkpoint, *, rounded: bool = True, precisions: Iterable[str] = PRECISIONS
) -> Reference:
    """Run the model on a few short prompts and a long one; memory holds it once, in float32, where
    it fits, and else no more than a matrix of it.

    Args:
        rounded: what rounding weights to 4 bits costs as well.
        precisions: what these cost as well (noise.py): that of a name like `as-stored` is
            float32's, and integers are held to `rounded`.
    """
    loaded = Loaded(checkpoint)
    config = loaded.model.config
    steps, texts, randoms = _lengths(config, whole=loaded.whole)
    prompts = [
        *_sampled_prompts(loaded, texts, seed=0),
        *_random_prompts(config.vocab_size, randoms, seed=0),
    ]
    sequences = _continued_greedily(loaded, prompts, steps)
    tokens, positions = _long_text(config, sequences, steps, _reach(loaded.model))
    with _watched(loaded.model) as magnitudes:
        logits = _logits_alone(loaded, sequences)
        far = _at(loaded, tokens, positions)
    joined = np.concatenate(logits)

    def run() -> Logits:
        return np.concatenate(_logits_alone(loaded, sequences))

    floats = (name for name in precisions if not name.startswith("int"))
    asked = {name if name in PRECISIONS else "fp32" for name in floats}
    noise = {name: measured(name, loaded, run, joined) for name in sorted(asked)}
    twice = _rounded_logits(loaded, sequences, tokens, positions) if rounded else None
    return Reference(
        sequences=tuple(sequences),
        prompt_lengths=tuple(map(len, prompts)),
        is_text=(True,) * len(texts) + (False,) * len(randoms),
        logits=logits,
        rounded=twice[0][0] if twice else (),
        rounded_twice=twice[1][0] if twice else (),
        peak=max(magnitudes),
        noise=noise,
        long=None
        if far is None
        else LongText(
            tokens,
            positions,
            far,
            getattr(config, "max_position_embeddings", None) or 0,
            twice[0][1] if twice else None,
            twice[1][1] if twice else None,
        ),
    )


@torch.inference_mode()
def held_to(
    reference: Reference, checkpoint: Checkpoint, values: Mapping[str, torch.Tensor]
) -> Reference:
    """The same yardstick for an artifact with these values in the place of some weights: what torch
    says with them and with inputs rounded to 8 bits is `rounded_twice`. Memory holds both whole."""
    loaded = Loaded(checkpoint, whole=True)
    for name, parameter in loaded.model.named_parameters():
        if name in values:
            parameter.data.copy_(values[name])
    long = reference.long
    where = (long.tokens, long.positions) if long else (np.empty(0, np.int64), ())
    twice, far = _with_rounded_inputs(loaded, reference.sequences, *where)
    return replace(
        reference,
        rounded_twice=twice,
        long=long and replace(long, rounded_twice=far),
    )


def _long_text(
    config: Any, sequences: Sequence[Tokens], steps: int, reach: int
) -> tuple[Tokens, tuple[int, ...]]:
    """All sequences one after another, again and again, and the positions to judge.

    Args:
        steps: how many of them are decoded one by one.
        reach: tokens that a pass can have (`_reach`).
    """
    context = getattr(config, "max_position_embeddings", None) or LONGEST
    window = getattr(config, "sliding_window", None) or 0
    beyond = window + 2 * NUM_STEPS if window < LONGEST_WINDOW else 0
    length = min(context, max(LONGEST, beyond, reach), MOST_LOGITS // config.vocab_size)
    joined = np.concatenate(list(sequences))
    tokens = np.resize(joined, length)
    if length <= max(map(len, sequences)):
        return tokens, ()
    last = set(range(length - steps, length))
    edges = (edge + step for edge in (window, context // 2) for step in (-1, 0, 1))
    near = {at for at in edges if 0 < at < length}
    spaced = {round(at) for at in np.linspace(NUM_STEPS, length - 1, NUM_POSITIONS)}
    return tokens, tuple(sorted(last | near | spaced))


def _reach(model: Any) -> int:
    """Tokens L of a pass of WORK multiplications, whose scores can be held.

    One takes W multiplications, and A for each token that it attends to: W L + A L^2 = WORK.
    """
    config = model.config
    heads = int(config.num_attention_heads)
    width = heads * head_width(config)
    linears = (m for m in model.modules() if isinstance(m, torch.nn.Linear))
    each, pair = sum(m.weight.numel() for m in linears), 2 * config.num_hidden_layers * width
    within = (math.sqrt(each * each + 4 * pair * WORK) - each) / (2 * pair)
    return min(int(within), math.isqrt(MOST_SCORES // heads))


def _at(loaded: Loaded, tokens: Tokens, positions: Sequence[int]) -> Logits | None:
    if not positions:
        return None
    return _logits_alone(loaded, [tokens])[0][list(positions)]


def _lengths(config: Any, *, whole: bool) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Steps and prompt lengths that fit the context of the model."""
    context = getattr(config, "max_position_embeddings", None) or 1 << 20
    steps = min(NUM_STEPS if whole else STREAMED_STEPS, context // 2)
    room = context - steps
    wanted = TEXT_LENGTHS if whole else STREAMED_TEXT_LENGTHS
    texts = tuple(min(length, room) for length in wanted)
    return steps, texts, tuple(min(length, room) for length in RANDOM_LENGTHS)


def _random_prompts(vocab: int, lengths: Iterable[int], *, seed: int) -> list[Tokens]:
    rng = np.random.default_rng(seed)
    return [rng.integers(vocab, size=length) for length in lengths]


def _sampled_prompts(loaded: Loaded, lengths: tuple[int, ...], *, seed: int) -> list[Tokens]:
    """Sample at temperature 1 from the start token; the expected log-perplexity ratio of another
    model on such text is exactly its KL divergence."""
    random = torch.Generator().manual_seed(seed)
    start = loaded.model.config.bos_token_id
    known = isinstance(start, int) and 0 <= start < loaded.model.config.vocab_size
    tokens_BL = torch.full((len(lengths), 1), start if known else 0)
    while tokens_BL.shape[1] < max(lengths):
        probability_BV = loaded.logits(tokens_BL)[:, -1].softmax(-1)
        next_B1 = torch.multinomial(probability_BV, 1, generator=random)
        tokens_BL = torch.cat([tokens_BL, next_B1], dim=1)
    return [row[:length].numpy() for row, length in zip(tokens_BL, lengths, strict=True)]


def _continued_greedily(loaded: Loaded, prompts: list[Tokens], steps: int) -> list[Tokens]:
    """Append the most likely token `steps` times.

    Tokens right of a position cannot reach it through causal attention, so the prompts share one
    batch without any mask.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens_BL = torch.zeros(len(prompts), int(lengths.max()) + steps, dtype=torch.long)
    for row, prompt in zip(tokens_BL, prompts, strict=True):
        row[: len(prompt)] = torch.from_numpy(prompt)
    rows = torch.arange(len(prompts))
    for step in range(steps):
        logits_BLV = loaded.logits(tokens_BL)
        tokens_BL[rows, lengths + step] = logits_BLV[rows, lengths + step - 1].argmax(-1)
    ends = (lengths + steps).tolist()
    return [row[:end].numpy() for row, end in zip(tokens_BL, ends, strict=True)]


@contextmanager
def _watched(model: Any) -> Iterator[list[float]]:
    """Largest magnitudes that modules without modules in them read and say, but for ids."""
    found: list[float] = []

    def look(_: Any, inputs: Any, output: Any) -> None:
        values = [v for v in (*inputs, output) if isinstance(v, torch.Tensor)]
        found.extend(v.abs().max().item() for v in values if v.is_floating_point())

    leaves = [module for module in model.modules() if not any(module.children())]
    handles = [module.register_forward_hook(look) for module in leaves]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _logits_alone(loaded: Loaded, sequences: Sequence[Tokens]) -> tuple[Logits, ...]:
    """Of each sequence, from a pass of its own; of a streamed model, from one for all."""
    if loaded.whole:
        passes = [loaded.logits(torch.from_numpy(tokens)[None])[0] for tokens in sequences]
    else:
        longest = max(map(len, sequences))
        filled_BL = np.stack([np.resize(tokens, longest) for tokens in sequences])
        passes = list(loaded.logits(torch.from_numpy(filled_BL)))
    each = zip(passes, sequences, strict=True)
    return tuple(logits_LV[: len(tokens)].float().numpy() for logits_LV, tokens in each)


Far = tuple[tuple[Logits, ...], Logits | None]


def _rounded_logits(
    loaded: Loaded, sequences: Sequence[Tokens], tokens: Tokens, positions: Sequence[int]
) -> tuple[Far, Far]:
    """Weights rounded, then inputs as well: logits of the sequences and of the long one."""
    with loaded.changed(_product_to_4_bits):
        once = _logits_alone(loaded, sequences), _at(loaded, tokens, positions)
        return once, _with_rounded_inputs(loaded, sequences, tokens, positions)


def _product_to_4_bits(module: torch.nn.Module, values: torch.Tensor) -> torch.Tensor:
    is_matrix = isinstance(module, torch.nn.Linear) and values.ndim > 1
    return rounded_to_4_bits(values) if is_matrix else values


def _with_rounded_inputs(
    loaded: Loaded, sequences: Sequence[Tokens], tokens: Tokens, positions: Sequence[int]
) -> Far:
    """The model is of no use for anything else afterwards."""
    for product in loaded.model.modules():
        if isinstance(product, torch.nn.Linear):
            product.register_forward_pre_hook(lambda _, inputs: rounded_to_8_bits(inputs[0]))
    return _logits_alone(loaded, sequences), _at(loaded, tokens, positions)


def rounded_to_4_bits(weight_OI: torch.Tensor) -> torch.Tensor:
    """Nearest of 16 levels per block of inputs; the largest entry of a block is exact.

    Follows ONNX Runtime's quantiser in its choices: the largest entry becomes level -8, the
    negative one of two equal ones, and halves go up. Weights in bfloat16 meet both quite often.
    """
    blocks = _blocks(weight_OI)
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    largest = torch.where(high > -low, high, low)
    scale = torch.where(largest == 0, 1, largest / -8)
    level = (blocks * (1 / scale) + 8.5).floor().clamp(0, 15)
    return _unblocked((level - 8) * scale, weight_OI)


def rounded_to_8_bits(x_LI: torch.Tensor) -> torch.Tensor:
    """Nearest of 255 levels per block of one position's features."""
    blocks = _blocks(x_LI)
    largest = blocks.abs().amax(-1, keepdim=True)
    scale = torch.where(largest == 0, 1, largest / 127)
    return _unblocked((blocks / scale).round() * scale, x_LI)


def _blocks(x_LI: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(x_LI, (0, -x_LI.shape[-1] % QUANTISED_BLOCK))
    return padded.reshape(*x_LI.shape[:-1], -1, QUANTISED_BLOCK)


def _unblocked(blocks: torch.Tensor, like_LI: torch.Tensor) -> torch.Tensor:
    padded = blocks.reshape(*like_LI.shape[:-1], -1)
    return padded[..., : like_LI.shape[-1]]
