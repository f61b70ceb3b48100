"""One GGUF file in llama.cpp's own library: used by llama_session.py, and asked through pipes when
run as a program, by llamacpp.py.

    python llama_library.py LIBRARY [MODEL CONTEXT THREADS]

Without a model, it only says whether the library loads. Reads one JSON object per line:
{"start": [[token, ...], ...]} empties the cache and reads a prompt for each sequence,
{"step": [token, ...]} appends one to each, {"tokenize": text} asks the tokenizer inside,
{"spell": [token, ...]} what they say, {"vocabulary": null} its start, ends and template. Answers
with a line of JSON and, for logits, their float32 bytes. A process of its own, because a library
that dislikes a file may end the process it lives in.

Structures of parameters grow with every release of llama.cpp. They are filled by the library's own
`..._default_params`, handed back unread, and large enough for releases to come: by the calling
conventions of x86-64 and AArch64 such a structure lies in memory, where nobody minds its end. Only
the first four numbers of the context's are set, and it is asked whether it understood them.

Shapes: T tokens of all sequences, V vocabulary.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterable, Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

CELLS = 256  # llama.cpp gives every sequence a multiple of this
LONGEST_PIECE = 4096
MOST_AT_ONCE = 512  # tokens of one pass through the layers: llama.cpp's own default


class Parameters(ctypes.Structure):
    _fields_: ClassVar = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("unread", c_uint32 * 252),
    ]


class Batch(ctypes.Structure):
    _fields_: ClassVar = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


# Function -> what it returns, what it takes.
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_model_default_params": (Parameters, []),
    "llama_context_default_params": (Parameters, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, Parameters]),
    "llama_init_from_model": (c_void_p, [c_void_p, Parameters]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_bos": (c_int32, [c_void_p]),
    "llama_vocab_eos": (c_int32, [c_void_p]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_model_chat_template": (c_char_p, [c_void_p, c_char_p]),
    "llama_token_to_piece": (
        c_int32,
        [c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool],
    ),
    "llama_n_batch": (c_uint32, [c_void_p]),
    "llama_n_seq_max": (c_uint32, [c_void_p]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_free": (None, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_supports_gpu_offload": (c_bool, []),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_tokenize": (
        c_int32,
        [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool],
    ),
}


class Library:
    """The functions of libllama; an OSError or AttributeError says what is wrong with it."""

    def __init__(self, file: Path) -> None:
        self.loaded = ctypes.CDLL(str(file))
        for name, (returned, taken) in FUNCTIONS.items():
            function = getattr(self.loaded, name)
            function.restype, function.argtypes = returned, taken
        # Builds for many processors keep the code for each in a file of its own.
        load_all = getattr(self.loaded, "ggml_backend_load_all_from_path", None)
        if load_all is not None:
            load_all.restype, load_all.argtypes = None, [c_char_p]
            load_all(str(file.parent).encode())
        self.loaded.llama_backend_init()

    @property
    def build(self) -> str:
        """The commit of ggml that it was built from; empty where it does not say."""
        tell = getattr(self.loaded, "ggml_commit", None)
        if tell is None:
            return ""
        tell.restype, tell.argtypes = c_char_p, []
        return (tell() or b"").decode()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loaded, name)


class Model:
    def __init__(self, library: Library, file: str, context: int, threads: int) -> None:
        self.library, self.context, self.threads = library, context, threads
        model = library.llama_model_load_from_file(
            str(file).encode(), library.llama_model_default_params()
        )
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {file}")
        self.model = c_void_p(model)
        self.vocab = c_void_p(library.llama_model_get_vocab(self.model))
        self.num_tokens = library.llama_vocab_n_tokens(self.vocab)
        self.state: c_void_p | None = None
        self.made_for = (0, 0)
        self.lengths: list[int] = []

    def start(
        self, prompts: Sequence[Sequence[int]], *, last_only: bool = False
    ) -> NDArray[np.float32]:
        """Empty the cache and read a prompt for each sequence."""
        wanted = len(prompts), self.context
        if wanted == self.made_for:
            memory = c_void_p(self.library.llama_get_memory(self.state))
            self.library.llama_memory_clear(memory, False)
        else:
            if self.state is not None:
                self.library.llama_free(self.state)
                self.state, self.made_for = None, (0, 0)
            self.state, self.made_for = self.new_state(len(prompts)), wanted
        self.lengths = [0] * len(prompts)
        return self.decode(prompts, last_only=last_only)

    def step(self, tokens: Iterable[int]) -> NDArray[np.float32]:
        return self.decode([[token] for token in tokens])

    def new_state(self, sequences: int) -> c_void_p:
        """An empty cache for so many sequences."""
        cells = -(-self.context // CELLS) * CELLS * sequences
        asked = self.library.llama_context_default_params()
        asked.n_ctx = asked.n_batch = cells
        asked.n_ubatch = min(cells, MOST_AT_ONCE)
        asked.n_seq_max = sequences
        state = self.library.llama_init_from_model(self.model, asked)
        if not state:
            raise RuntimeError("llama.cpp makes no context for this model")
        state = c_void_p(state)
        given = self.library.llama_n_batch(state), self.library.llama_n_seq_max(state)
        if given != (cells, sequences):
            raise RuntimeError(
                f"this release of llama.cpp has other parameters: asked for a batch of {cells} and "
                f"{sequences} sequences, it says {given}"
            )
        self.library.llama_set_n_threads(state, self.threads, self.threads)
        return state

    def decode(
        self, parts: Sequence[Sequence[int]], *, last_only: bool = False
    ) -> NDArray[np.float32]:
        """Append tokens to every sequence; logits_TV of all of them, in order, or of the last of
        each sequence alone."""
        counts = np.array([len(tokens) for tokens in parts])
        pairs = list(zip(self.lengths, counts.tolist(), strict=True))
        token_T = np.concatenate(parts).astype(np.int32)
        position_T = np.concatenate([np.arange(at, at + n, dtype=np.int32) for at, n in pairs])
        sequence_S = np.arange(len(parts), dtype=np.int32)
        # Where each token finds the one sequence that it belongs to.
        place_T = np.repeat(np.arange(len(parts), dtype=np.uintp), counts)
        sequence_T = sequence_S.ctypes.data + sequence_S.itemsize * place_T
        one_T = np.ones(len(token_T), dtype=np.int32)
        answered = np.cumsum(counts) - 1 if last_only else np.arange(len(token_T))
        answered_T = np.zeros(len(token_T), dtype=np.int8)
        answered_T[answered] = 1
        numbers, names = POINTER(c_int32), POINTER(POINTER(c_int32))
        batch = Batch(
            len(token_T),
            token_T.ctypes.data_as(numbers),
            None,
            position_T.ctypes.data_as(numbers),
            one_T.ctypes.data_as(numbers),
            sequence_T.ctypes.data_as(names),
            answered_T.ctypes.data_as(POINTER(c_int8)),
        )
        code = self.library.llama_decode(self.state, batch)
        if code:
            raise RuntimeError(f"llama_decode ended with code {code}")
        self.lengths = [at + n for at, n in pairs]
        rows = [self.library.llama_get_logits_ith(self.state, int(row)) for row in answered]
        return np.stack([np.ctypeslib.as_array(row, (self.num_tokens,)) for row in rows])

    def tokenize(self, text: str) -> list[int]:
        encoded = text.encode()
        found = (c_int32 * (len(encoded) + 8))()
        number = self.library.llama_tokenize(
            *(self.vocab, encoded, len(encoded), found, len(found)),
            *(True, True),  # what stands around every text, and tokens that the text names
        )
        if number < 0:
            raise RuntimeError(f"llama_tokenize ended with code {number}")
        return list(found[:number])

    def spell(self, tokens: Iterable[int]) -> list[int]:
        """The bytes that tokens stand for, those of special ones as well."""
        spelled = bytearray()
        piece = ctypes.create_string_buffer(LONGEST_PIECE)
        for token in tokens:
            length = self.library.llama_token_to_piece(
                self.vocab, token, piece, LONGEST_PIECE, 0, True
            )
            if length < 0:
                raise RuntimeError(f"token {token} is spelled in {-length} bytes")
            spelled += piece.raw[:length]
        return list(spelled)

    def vocabulary(self, _: None) -> list[Any]:
        """The start and the end that it knows, every token at which it stops, the template."""
        ends = (self.library.llama_vocab_is_eog(self.vocab, n) for n in range(self.num_tokens))
        template = self.library.llama_model_chat_template(self.model, None)
        return [
            self.library.llama_vocab_bos(self.vocab),
            self.library.llama_vocab_eos(self.vocab),
            [number for number, ends_here in enumerate(ends) if ends_here],
            None if template is None else template.decode(),
        ]


def main() -> None:
    library = Library(Path(sys.argv[1]).resolve())
    if not sys.argv[2:]:
        return
    file, context, threads = sys.argv[2:]
    loaded = Model(library, file, int(context), int(threads))
    out = sys.stdout.buffer
    for line in sys.stdin:
        [(verb, value)] = json.loads(line).items()
        answer = getattr(loaded, verb)(value)
        if isinstance(answer, list):
            out.write(json.dumps(answer).encode() + b"\n")
        else:
            out.write(json.dumps(answer.shape).encode() + b"\n" + answer.tobytes())
        out.flush()


if __name__ == "__main__":
    try:
        main()
    except (OSError, AttributeError, RuntimeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
