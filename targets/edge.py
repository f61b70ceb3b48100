"""LiteRT-LM: one .litertlm for Google's on-device runtime, tokenizer included.

Written by litert-torch from the stock folder. Signature `prefill_N` appends N tokens to a cache of
fixed size and says nothing, `decode` appends one and says its logits; the cache goes in and out.
So the logits of a prompt are those of decode steps, and the cache that later steps go on with is
the one that prefill made: both are held against torch.

Shapes: B sequences, L tokens of the longest prompt, N tokens of a call, T slots, V vocabulary.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import litert_lm
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from litert_lm_builder import litertlm_header_schema_py_generated as schema
from litert_lm_builder import litertlm_peek
from litert_lm_builder.runtime.proto import llm_metadata_pb2

from dotexport.errors import CheckpointError, DotexportError, UsageError
from dotexport.exports.nasty_texts import Conversation
from dotexport.exports.target import Logits, Tokens

if TYPE_CHECKING:  # a measuring process needs an adapter, and no torch
    from dotexport.exports.text_parity import TextSide
    from dotexport.models.checkpoint import Checkpoint

FILE = "model.litertlm"
DECODER = "tf_lite_prefill_decode"
CONTEXT = 2048  # slots of the cache at most: they are memory from the first token on
CHUNK = 128  # tokens of one prefill
RECIPES = {"fp32": "none", "int8": "weight_only_wi8_afp32"}
HIDDEN = -1e9  # added to the scores of slots that a token must not see
AT_NULL = "LiteRT-LM takes a text up to the first character that is 0"
CLASSES = ("llama", "mistral", "granite", "qwen3")


class LiteRt:
    """Writes by litert-torch; runs in LiteRT, its tokenizer in LiteRT-LM."""

    name = "litert"
    summary = "LiteRT-LM file (.litertlm) for Google's on-device runtime, tokenizer included"
    precisions = tuple(RECIPES)
    weight_bits: ClassVar = {"fp32": (32, 32), "int8": (8, 8)}
    exact_rounding = ()

    def missing(self) -> list[str]:
        if find_spec("litert_torch"):
            return []
        return ["litert-torch, which writes: pip install 'dotexport[litert]'"]

    def problems(self, checkpoint: Checkpoint, precision: str) -> list[str]:
        from .traced import trace_problems

        return trace_problems(checkpoint, precision) + _class_problems(checkpoint.config)

    def config_problems(self, config: Mapping[str, Any], precision: str) -> list[str]:
        from .traced import config_problems

        return config_problems(config, precision) + _class_problems(config)

    def write(self, checkpoint: Checkpoint, folder: Path, precision: str) -> None:
        context = min(checkpoint.config.get("max_position_embeddings") or CONTEXT, CONTEXT)
        with tempfile.TemporaryDirectory() as scratch:
            settings = {
                "model": str(checkpoint.folder.resolve()),
                "output_dir": scratch,
                "prefill_lengths": [min(CHUNK, context)],
                "cache_length": context,
                "quantization_recipe": RECIPES[precision],
            }
            _export(settings)
            shutil.move(Path(scratch) / FILE, folder / FILE)
        for companion in [checkpoint.folder / "config.json", *checkpoint.companions()]:
            shutil.copyfile(companion, folder / companion.name)

    def text(self, checkpoint: Checkpoint, folder: Path) -> TextSide | None:
        """Tokens as LiteRT-LM makes them; start, ends and template as its file says them."""
        from dotexport.exports.text_parity import TextSide, find_tokenizer, load_tokenizer

        if find_tokenizer(checkpoint.folder) is None:
            return None
        engine, said = _engine(folder), _metadata(folder / FILE)
        ends = [_tokens(engine, union) for union in said.stop_tokens]
        starts = _tokens(engine, said.start_token)
        named = load_tokenizer(folder).special_tokens_map
        return TextSide(
            encode=lambda text: starts[:1] + engine.tokenize(text),  # as its sessions do
            render=partial(_render, said.jinja_prompt_template, named),
            start=starts[0] if starts else None,
            stops=frozenset(tokens[0] for tokens in ends if len(tokens) == 1),
            excuse=lambda text: AT_NULL if "\0" in text else None,
        )

    def open(self, folder: Path, *, threads: int | None = None) -> LiteRtSession:
        return LiteRtSession(folder, threads=threads)


def _class_problems(config: Mapping[str, Any]) -> list[str]:
    kind = config.get("model_type")
    if kind in CLASSES:
        return []
    return [f"{kind} has not been tried in LiteRT, {', '.join(CLASSES)} have; take another target"]


def _export(settings: Mapping[str, Any]) -> None:
    script = Path(__file__).with_name("edge_export.py")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(settings)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise DotexportError(
            f"litert-torch ended with code {done.returncode}; its last lines:\n{last}\nExport with "
            "another target"
        )


def _engine(folder: Path) -> Any:
    litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
    return litert_lm.Engine(str(folder / FILE), cache_dir=":nocache")


def _tokens(engine: Any, union: Any) -> list[int]:
    """Of a start or an end, which the file names by numbers or by its text."""
    said = union.token_str
    return list(union.token_ids.ids) or (engine.tokenize(said) if said else [])


def _render(template: str, named: Mapping[str, Any], conversation: Conversation) -> str | None:
    from dotexport.exports.text_parity import render

    return render(template, conversation, **named) if template else None


def _metadata(file: Path) -> Any:
    return llm_metadata_pb2.LlmMetadata.FromString(_section(file, _is_metadata))


def _section(file: Path, wanted: Callable[[Any], bool]) -> bytes:
    """The bytes of the first section of a kind."""
    try:
        header = litertlm_peek.read_litertlm_header(str(file), io.StringIO())
    except (ValueError, OSError, struct.error) as error:
        raise CheckpointError(f"{file} is no LiteRT-LM file: {error}; export it again") from error
    sections = header.SectionMetadata()
    for section in map(sections.Objects, range(sections.ObjectsLength())):
        if wanted(section):
            with file.open("rb") as stream:
                stream.seek(section.BeginOffset())
                return stream.read(section.EndOffset() - section.BeginOffset())
    raise CheckpointError(f"{file} lacks a section; export it again")


def _is_decoder(section: Any) -> bool:
    return DECODER in str(litertlm_peek.get_model_type(section)).lower()


def _is_metadata(section: Any) -> bool:
    return bool(section.DataType() == schema.AnySectionDataType.LlmMetadataProto)


class LiteRtSession:
    """LiteRT's interpreter; every sequence has a cache of its own."""

    providers = ("XNNPACK",)

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        try:
            self.interpreter = Interpreter(
                model_content=_section(folder / FILE, _is_decoder), num_threads=threads
            )
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"LiteRT cannot load {folder / FILE}: {error}; export it again"
            ) from error
        [prefill] = (n for n in self.interpreter.get_signature_list() if n.startswith("prefill"))
        self.prefill = self.interpreter.get_signature_runner(prefill)
        self.decode = self.interpreter.get_signature_runner("decode")
        ports = self.prefill.get_input_details()
        self.empty = {n: p["shape"] for n, p in ports.items() if n.startswith("kv_cache")}
        (_, self.chunk), self.context = ports["tokens"]["shape"], ports["mask"]["shape"][-1]
        self.cache: list[dict[str, Any]] = []

    def start(self, tokens_BL: Tokens, lengths_B: Sequence[int] | None = None) -> Logits:
        B, L = tokens_BL.shape
        self.length_B = np.array([L] * B if lengths_B is None else lengths_B, dtype=np.int64)
        self._check_room(int(self.length_B.max()))
        self.cache, rows = [], []
        for tokens_L, length in zip(tokens_BL, self.length_B, strict=True):
            logits_LV = self._read_singly(tokens_L[:length])
            cache = self._read(tokens_L[: length - 1])
            logits_LV[-1], cache = self._append(cache, int(tokens_L[length - 1]), length - 1)
            self.cache.append(cache)
            rows.append(np.pad(logits_LV, ((0, L - length), (0, 0))))
        return np.stack(rows)

    def step(self, tokens_B: Tokens) -> Logits:
        self._check_room(int(self.length_B.max()) + 1)
        rows = []
        for row, token in enumerate(tokens_B):
            logits_V, self.cache[row] = self._append(
                self.cache[row], int(token), int(self.length_B[row])
            )
            rows.append(logits_V)
        self.length_B = self.length_B + 1
        return np.stack(rows)

    def _read_singly(self, tokens_L: Tokens) -> Logits:
        cache, rows = self._nothing(), []
        for position, token in enumerate(tokens_L):
            logits_V, cache = self._append(cache, int(token), position)
            rows.append(logits_V)
        return np.stack(rows)

    def _read(self, tokens_L: Tokens) -> dict[str, Any]:
        """A cache by prefill, whole chunks of it; what would not fit in one goes singly."""
        cache = self._nothing()
        for first in range(0, len(tokens_L), self.chunk):
            part_N = tokens_L[first : first + self.chunk]
            if first + self.chunk > self.context:
                for position, token in enumerate(part_N, start=first):
                    _, cache = self._append(cache, int(token), position)
            else:
                padded_N = np.pad(part_N, (0, self.chunk - len(part_N)))
                cache = self.prefill(**self._asked(padded_N, first), **cache)
        return cache

    def _append(self, cache: dict[str, Any], token: int, position: int) -> tuple[Logits, Any]:
        said = self.decode(**self._asked(np.array([token]), position), **cache)
        logits_V: Logits = said.pop("logits")[0, 0]
        return logits_V, said

    def _asked(self, tokens_N: Tokens, first: int) -> dict[str, Any]:
        position_N = np.arange(first, first + len(tokens_N), dtype=np.int32)
        seen_NT = np.arange(self.context) <= position_N[:, None]
        mask_NT = np.where(seen_NT, 0, HIDDEN).astype(np.float32)
        tokens = tokens_N.astype(np.int32)[None]
        return {"tokens": tokens, "input_pos": position_N, "mask": mask_NT[None, None]}

    def _nothing(self) -> dict[str, Any]:
        return {name: np.zeros(shape, dtype=np.float32) for name, shape in self.empty.items()}

    def _check_room(self, length: int) -> None:
        if length > self.context:
            raise UsageError(
                f"a sequence of {length} tokens does not fit the {self.context} slots of this "
                "file; use shorter prompts or decode fewer tokens"
            )
