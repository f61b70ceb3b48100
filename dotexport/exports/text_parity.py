"""Does an artifact read text as transformers reads it? Tokens, chat template, start and stops.

The yardstick is the tokenizer that transformers makes of the stock checkpoint, and the tokens at
which its `generate` stops. Tokens of TEXTS and of texts that name special tokens, CONVERSATIONS
through the chat template, the token that begins a text and those that end one are held against what
the artifact's own reader makes of them: `text(checkpoint, folder)` of its target, or, for a folder
with a tokenizer, transformers again.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dotexport.exports.nasty_texts import CONVERSATIONS, TEXTS, Conversation
from dotexport.exports.target import Target
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.multimodal import language_config
from dotexport.storage.reading import read_json

logger = logging.getLogger(__name__)

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")
GENERATION = "generation_config.json"
NUM_SHOWN = 2  # examples of one kind of difference


def _never(text: str) -> str | None:
    return None


@dataclass(frozen=True)
class TextSide:
    """What some reader makes of text.

    Attributes:
        encode: the tokens of a text, what every text begins and ends with included.
        render: a conversation through the chat template, ready for an answer; None: there is no
            template, or it refuses such a conversation.
        start: the token that begins a text.
        stops: tokens that end a generation.
        own_stops: tokens at which a runtime may stop in any model, whatever the file says.
        excuse: why no artifact could hold this text's tokens; None: it should. Told in a warning,
            and never asked for conversations.
        pieces: its vocabulary and merges as tokenizers stores them, for a piece that no text of
            ours needs; None: it is of another form.
    """

    encode: Callable[[str], list[int]]
    render: Callable[[Conversation], str | None]
    start: int | None
    stops: frozenset[int]
    own_stops: frozenset[int] = frozenset()
    excuse: Callable[[str], str | None] = _never
    pieces: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class TextVerdict:
    """What came out: problems, and what was looked at."""

    problems: tuple[str, ...] = ()
    num_texts: int = 0
    num_conversations: int = 0
    excused: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "texts": self.num_texts,
            "conversations": self.num_conversations,
            "problems": list(self.problems),
            "excused": list(self.excused),
        }


def check_text(target: Target, folder: Path, checkpoint: Checkpoint) -> TextVerdict | None:
    """Hold the text side of an artifact against that of the stock checkpoint; None: one of them has
    none."""
    tokenizer = find_tokenizer(checkpoint.folder)
    if tokenizer is None:
        return None
    wanted = _text_side(tokenizer, checkpoint.folder)
    ask = getattr(target, "text", None)
    try:
        found: TextSide | None = ask(checkpoint, folder) if ask else read_folder(folder)
    except Exception as error:  # each reader has its own; all of them mean "does not read"
        logger.debug("text of %s cannot be read", folder, exc_info=True)
        return TextVerdict((f"text: its tokenizer cannot be read: {error}; export it again",))
    if found is None:
        return None
    verdict = hold(found, wanted, special=special_tokens(tokenizer))
    return replace(verdict, problems=(*verdict.problems, *_told_ends(folder, wanted)))


def _told_ends(folder: Path, wanted: TextSide) -> Iterator[str]:
    """What a generation_config.json beside the artifact says, whoever reads it."""
    if wanted.stops and (folder / GENERATION).is_file():
        said = set(stops_of(folder))
        if said != wanted.stops:
            yield (
                f"stop tokens: {GENERATION} beside it says {_listed(said) or 'none'}, and "
                f"transformers has {_listed(wanted.stops)}"
            )


def hold(found: TextSide, wanted: TextSide, *, special: Iterable[str] = ()) -> TextVerdict:
    """Compare two readers; `special` are tokens that texts name."""
    texts = [*TEXTS, *_naming(special)]
    excused: Counter[str] = Counter()
    different = []
    for text in texts:
        if found.encode(text) != wanted.encode(text):
            reason = found.excuse(text)
            if reason:
                excused[reason] += 1
            else:
                different.append(text)
    told = tuple(f"{reason} ({number} of {len(texts)} texts)" for reason, number in excused.items())
    for reason in told:
        logger.warning("tokens differ from transformers': %s", reason)
    problems = [
        *_token_problems(found, wanted, different, len(texts)),
        *_piece_problems(found.pieces, wanted.pieces),
        *_conversation_problems(found, wanted),
        *_end_problems(found, wanted),
    ]
    conversations = sum(wanted.render(one) is not None for one in CONVERSATIONS)
    return TextVerdict(tuple(problems), len(texts), conversations, told)


def _naming(special: Iterable[str]) -> Iterator[str]:
    """Texts that name tokens: alone, between words, beside spaces, and one after another."""
    named = list(special)
    for token in named:
        yield token
        yield f"a{token}b"
        yield f" {token} \n{token}x 1"
    yield "".join(named)


def _token_problems(
    found: TextSide, wanted: TextSide, different: list[str], number: int
) -> Iterator[str]:
    if different:
        shown = "; ".join(
            f"{_short(text)} is {_short(found.encode(text))} where transformers has "
            f"{_short(wanted.encode(text))}"
            for text in different[:NUM_SHOWN]
        )
        yield f"text: tokens of {len(different)} of {number} texts differ: {shown}"


def _piece_problems(
    found: Mapping[str, Any] | None, wanted: Mapping[str, Any] | None
) -> Iterator[str]:
    if found is None or wanted is None:
        return
    other = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if other:
        yield f"text: {', '.join(other)} of its tokenizer.json are not the checkpoint's"


def _conversation_problems(found: TextSide, wanted: TextSide) -> Iterator[str]:
    for number, conversation in enumerate(CONVERSATIONS, start=1):
        mine, theirs = found.render(conversation), wanted.render(conversation)
        if mine != theirs:
            yield (
                f"chat template: conversation {number} becomes {_short(mine)} where transformers "
                f"makes {_short(theirs)}"
            )
        elif mine is not None and found.encode(mine) != wanted.encode(mine):
            excuse = found.excuse(mine)
            yield (
                f"chat template: tokens of conversation {number} differ"
                + (f": {excuse}" if excuse else "")
            )


def _end_problems(found: TextSide, wanted: TextSide) -> Iterator[str]:
    if wanted.start is not None and found.start != wanted.start:
        yield f"start token: {found.start} where transformers has {wanted.start}"
    if not wanted.stops:
        return  # transformers does not stop by itself
    if missing := wanted.stops - found.stops:
        yield f"stop tokens: {_listed(missing)} of transformers' {_listed(wanted.stops)} missing"
    if more := found.stops - wanted.stops - found.own_stops:
        yield f"stop tokens: {_listed(more)} beside transformers' {_listed(wanted.stops)}"


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 80 else f"{said[:77]}..."


# What transformers reads --------------------------------------------------------------------------


def read_folder(
    folder: Path, *, start: int | None = None, stops: Iterable[int] | None = None
) -> TextSide | None:
    """The text side of a folder as transformers reads it; None: it holds no tokenizer.

    Args:
        start, stops: what another file of the folder says of them.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return None
    side = _text_side(tokenizer, folder)
    start = side.start if start is None else start
    return replace(side, start=start, stops=side.stops if stops is None else frozenset(stops))


def _text_side(tokenizer: Any, folder: Path) -> TextSide:
    return TextSide(
        encode=lambda text: list(tokenizer(text)["input_ids"]),
        render=partial(_rendered, tokenizer),
        start=start_of(folder, tokenizer),
        stops=frozenset(stops_of(folder)),
        pieces=_pieces(tokenizer),
    )


def _pieces(tokenizer: Any) -> Mapping[str, Any] | None:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return None if fast is None else json.loads(fast.to_str())["model"]


def find_tokenizer(folder: Path) -> Any:
    """As `load_tokenizer`; one that transformers cannot read is none, and a warning."""
    try:
        return load_tokenizer(folder)
    except Exception as error:  # each tokenizer has its own
        logger.warning("transformers cannot read the tokenizer of %s: %s", folder, error)
        return None


def load_tokenizer(folder: Path) -> Any:
    """What transformers makes of a folder, without remote code; None: it holds no tokenizer."""
    if not any(any(folder.glob(name)) for name in TOKENIZERS):
        return None
    from transformers import AutoTokenizer

    loader: Any = AutoTokenizer
    found = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    found.model_max_length = int(1e30)  # what a config says of it cuts nothing here
    return found


def added_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that every text begins and ends with.

    A post-processor may come in many forms (templates, sequences of them, BERT's own); this asks
    what it does.
    """
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for at in range(len(whole) - len(bare) + 1):
        if whole[at : at + len(bare)] == bare:
            return whole[:at], whole[at + len(bare) :]
    return [], []


def start_of(folder: Path, tokenizer: Any) -> int | None:
    """The token that begins a text: the one which the tokenizer puts there, or the one that is
    named."""
    before = added_around(tokenizer)[0] if tokenizer is not None else []
    named = [_named(folder, "bos_token_id"), [getattr(tokenizer, "bos_token_id", None)]]
    numbers = [*before, *(n for group in named for n in group if isinstance(n, int) and n >= 0)]
    return numbers[0] if numbers else None


def stops_of(folder: Path) -> list[int]:
    """The tokens at which `generate` ends: of generation_config.json, else of config.json."""
    return [n for n in _named(folder, "eos_token_id") if isinstance(n, int) and n >= 0]


def _named(folder: Path, key: str) -> list[Any]:
    for name in (GENERATION, "config.json"):
        file = folder / name
        said = read_json(file, advice="take a fresh copy") if file.is_file() else {}
        value = language_config(said).get(key)
        if value is not None:
            return value if isinstance(value, list) else [value]
    return []


def special_tokens(tokenizer: Any) -> list[str]:
    """Texts of tokens that are no words: the first few, and the last."""
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    texts = [str(token) for _, token in sorted(added.items())]
    return [*texts[:8], *texts[8:][-2:]]


def render(template: str, conversation: Conversation, **tokens: str | None) -> str | None:
    """A conversation through a template that stands in a file of another kind."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare: Any = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    return _rendered(bare, conversation, chat_template=template, **tokens)


def _rendered(tokenizer: Any, conversation: Conversation, **more: Any) -> str | None:
    if not (more.get("chat_template") or tokenizer.chat_template):
        return None
    from jinja2.exceptions import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True, **more
        )
    except (TemplateError, ValueError):  # some take no system role, or have only named templates
        return None
    return text
