"""The stock model of a checkpoint: whole in memory where it fits, else part by part from the files.

A part is a module with parameters of its own: one matrix, norm or table. Streamed, it is read when
it is called, over what had its name and shape before, and gone when it has answered: memory holds
one part of each shape, of which the table is the largest. All that runs is code of transformers, in
both ways the same, so both give the same bits.

Shapes: B sequences, L tokens of one, D hidden_size, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dotexport.errors import CheckpointError, UnsupportedModelError
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.families import is_buffer
from dotexport.models.fused import in_memory
from dotexport.models.memory import fits
from dotexport.models.rope import stock_config

CPU = torch.device("cpu")

Change = Callable[[nn.Module, Tensor], Tensor]
"""What becomes of a parameter of this module before it is used; a tied table is the head's."""


def load_float32(checkpoint: Checkpoint) -> Any:
    """As `load_model`, in the precision that everything is held against."""
    return load_model(checkpoint, torch.float32)


def load_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The stock class of config.json with this checkpoint's tensors, each read once.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape.
        UnsupportedModelError: transformers has no causal model for this config.
    """
    return Loaded(checkpoint, dtype, whole=True).model


class Loaded:
    """A stock model to ask for logits, of whatever size.

    Attributes:
        model: of transformers, on `device`.
        whole: whether all of it is in memory. Unless told, it is where it fits.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        *,
        device: torch.device = CPU,
        whole: bool | None = None,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.model = empty_model(checkpoint, dtype, device)
        self.checkpoint = in_memory(checkpoint, dict(self.model.named_parameters()))
        self._change: Change | None = None
        self._handles: list[Any] = []
        self._rooms: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        names = {id(p): name for name, p in self.model.named_parameters()}
        self._parts = {
            module: {key: names[id(p)] for key, p in module._parameters.items() if p is not None}
            for module in self.model.modules()
            if any(p is not None for p in module._parameters.values())
        }
        # A delta net multiplies with its convolution's weights itself and never calls that.
        self._callers = {
            child: module
            for module in self.model.modules()
            for child in module.children()
            if isinstance(child, nn.Conv1d)
        }
        self._owners = {name: m for m, owned in self._parts.items() for name in owned.values()}
        self._check_names()
        read_buffers(self.model, self.checkpoint.tensor)
        self.whole = fits(self.num_bytes, device) if whole is None else whole
        self._settle()

    @property
    def num_bytes(self) -> int:
        """Of all parameters, where they are in memory."""
        count = sum(int(p.numel()) for p in self.model.parameters())
        return count * self.dtype.itemsize

    @torch.inference_mode()
    def logits(self, tokens_BL: Tensor) -> Tensor:
        """Of every position, (B, L, V)."""
        logits_BLV: Tensor = self.model(input_ids=tokens_BL.to(self.device), use_cache=False).logits
        return logits_BLV

    @torch.inference_mode()
    def hidden(self, tokens_BL: Tensor) -> Tensor:
        """What the head reads, (B, L, D)."""
        decoder = self.model.get_decoder()
        said = decoder(input_ids=tokens_BL.to(self.device), use_cache=False)
        hidden_BLD: Tensor = said.last_hidden_state
        return hidden_BLD

    @torch.inference_mode()
    def head(self, hidden_BLD: Tensor) -> Tensor:
        """Logits (B, L, V) of some of what `hidden` gave, by the class's own code behind its
        decoder: scaled and capped where it does so."""
        from transformers.modeling_outputs import MoeModelOutputWithPast

        decoder = self.model.get_decoder()
        said = MoeModelOutputWithPast(last_hidden_state=hidden_BLD)
        said.shared_kv_states = None  # Gemma 4 hands these on
        decoder.forward = lambda *_, **__: said
        try:
            return self.logits(torch.zeros(1, 1, dtype=torch.long))
        finally:
            del decoder.forward

    @contextmanager
    def changed(self, change: Change, *, times: int = 1) -> Iterator[None]:
        """In this block, parameters are what `change` makes of them.

        Args:
            times: how much larger it makes them; what does not fit then is streamed.
        """
        whole = self.whole
        self.whole = whole and (times == 1 or fits(times * self.num_bytes, self.device))
        self._change = change
        try:
            self._settle()
            yield
        finally:
            self.whole, self._change = whole, None
            self._settle()

    def _settle(self) -> None:
        """Fill every part, or leave all empty until they are called."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._rooms = [], {}
        if self.whole:
            self._fill_all()
            return
        for module in self._parts:
            self._leave(module)
            caller = self._callers.get(module, module)
            enter, leave = partial(self._enter, module), partial(self._leave, module)
            self._handles += [
                caller.register_forward_pre_hook(enter),
                caller.register_forward_hook(leave, always_call=True),
            ]

    def _fill_all(self) -> None:
        """A tied table is read once, and stays one parameter of two modules."""
        known: dict[str, nn.Parameter] = {}
        for module, owned in self._parts.items():
            for key, name in owned.items():
                if name not in known:
                    shape = self.checkpoint.specs[name].shape
                    room = torch.empty(shape, dtype=self.dtype, device=self.device)
                    known[name] = nn.Parameter(self._read(name, room))
                module._parameters[key] = known[name]

    def _enter(self, module: nn.Module, *_: Any) -> None:
        for key, name in self._parts[module].items():
            shape = self.checkpoint.specs[name].shape
            room = key, shape
            if room not in self._rooms:  # fresh memory costs more than what is read into it
                self._rooms[room] = torch.empty(shape, dtype=self.dtype, device=self.device)
            values = self._read(name, self._rooms[room])
            module._parameters[key] = nn.Parameter(values, requires_grad=False)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        for key, name in self._parts[module].items():
            shape = self.checkpoint.specs[name].shape
            module._parameters[key] = nn.Parameter(
                torch.empty(shape, dtype=self.dtype, device="meta"), requires_grad=False
            )

    def _read(self, name: str, room: Tensor) -> Tensor:
        # A copy: what is mapped from a file changes with it, and lies anywhere in memory.
        values = room.copy_(self.checkpoint.tensor(name))
        return values if self._change is None else self._change(self._owners[name], values)

    def _check_names(self) -> None:
        specs, folder = self.checkpoint.specs, self.checkpoint.folder
        # A persistent buffer that old files still carry (rotary frequencies) is computed, not read.
        unknown = {n for n in specs if not n.endswith("rotary_emb.inv_freq")}
        unknown -= set(self.model.state_dict())
        if unknown:
            raise CheckpointError(
                f"{folder} holds tensors that {type(self.model).__name__} does not know: "
                f"{', '.join(sorted(unknown))}; does config.json belong to these weights?"
            )
        for name, parameter in self.model.named_parameters():
            if name not in specs:
                self.checkpoint.tensor(name)  # raises
            if parameter.shape != specs[name].shape:
                raise CheckpointError(
                    f"{name} is stored as {specs[name].shape} where config.json calls for "
                    f"{tuple(parameter.shape)}; does config.json belong to these weights?"
                )


def empty_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """The stock model without memory behind its parameters; buffers are computed."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    classes: Any = AutoModelForCausalLM
    try:
        config = stock_config(checkpoint.config)
        with no_initial_values(), init_empty_weights(include_buffers=False):
            exact = capped_attention(checkpoint.config)
            model: Any = classes.from_config(config, dtype=dtype, **exact)
        model.tie_weights()  # skipping the initial values skips this too
    except (ValueError, KeyError, OSError) as error:
        raise UnsupportedModelError(
            f"transformers cannot build the model of {checkpoint.folder} ({error}); "
            "expected the config.json of a causal language model, without remote code"
        ) from error
    if hasattr(model.config, "_experts_implementation"):  # the one that computes in every dtype
        model.config._experts_implementation = "eager"
    for module in model.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device)
    return model.eval()


def read_buffers(model: Any, read: Callable[[str], Tensor]) -> None:
    """Fill those that files hold as they hold a parameter."""
    for name, buffer in model.named_buffers():
        if is_buffer(name):
            buffer.copy_(read(name))


def capped_attention(config: Mapping[str, Any]) -> dict[str, str]:
    """Arguments of a class that make it cap attention scores where config.json says so (Gemma 2).

    transformers 4.57 would take torch's own attention, which has no cap, without an error.
    """
    return {"attn_implementation": "eager"} if config.get("attn_logit_softcapping") else {}


def no_initial_values() -> Any:
    """A context in which transformers builds modules without drawing weights for them."""
    try:
        place = importlib.import_module("transformers.initialization")
    except ImportError:  # before transformers 5
        place = importlib.import_module("transformers.modeling_utils")
    return place.no_init_weights()
