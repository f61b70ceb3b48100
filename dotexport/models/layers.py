"""One decoder layer of a stock class, with weights of our choosing and nothing else in memory.

The layer's code is that of transformers, so a narrowed layer computes here what it will compute
wherever the class is known.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as apply_linear

from dotexport.errors import CheckpointError
from dotexport.models.beside import Beside, KeysAndValues
from dotexport.models.families import find_family
from dotexport.models.family import EACH, Family, Linear, Sublayer
from dotexport.models.gating import gating_of
from dotexport.models.rope import stock_config
from dotexport.models.routing import SHARED, Routing

PARTS = ("weight", "bias")
"""Of a linear."""


@dataclass(frozen=True)
class Stock:
    """The classes of one stock model: what a layer and its rotary embedding are made with.

    Attributes:
        rotary: None where no layer rotates.
        rotary_local: of layers that attend to a window, where the class keeps two (Gemma 3 in
            transformers 4; later one is asked by the kind of layer).
        epsilon: of every norm.
        passes: dtype of the products of a pass through a layer; streams, norms and sums stay
            float32.
    """

    config: Any
    layer_class: Callable[..., nn.Module]
    norm_class: Callable[..., nn.Module]
    rotary: nn.Module | None
    rotary_local: nn.Module | None = None
    passes: torch.dtype = torch.float32
    epsilon: float = 1e-6

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        device: torch.device,
        passes: torch.dtype = torch.float32,
    ) -> Stock:
        """Look the classes up from a config.json; builds one layer without memory.

        Raises:
            CheckpointError: transformers can build no model of it.
        """
        stock = stock_config(config)
        model = _one_layer(stock)
        stock._attn_implementation = "sdpa" if _fused(model) else "eager"
        decoder, family = model.get_decoder(), find_family(config)
        rotary = decoder.rotary_emb
        if rotary is not None:
            rotary = type(rotary)(config=stock).to(device)
        local: Any = getattr(decoder, "rotary_emb_local", None)
        if local is not None:
            local = type(local)(config=local.config).to(device)
        norm = type(model.get_submodule(family.final_norm))
        epsilon: float = getattr(stock, family.epsilon_key)
        return cls(stock, type(decoder.layers[0]), norm, rotary, local, passes, epsilon)

    def layer(self, number: int) -> nn.Module:
        """A layer without memory behind its weights; assign them before use."""
        with torch.device("meta"):
            return self.layer_class(self.config, number).eval()

    def norm(self, device: torch.device) -> nn.Module:
        """The final norm, with a gamma of ones."""
        return self.norm_class(self.config.hidden_size, eps=self.epsilon).to(device)

    def norm_with(self, weight_P: Tensor) -> nn.Module:
        """A norm of the class over P features, as it is stored."""
        norm = self.norm_class(len(weight_P), eps=self.epsilon)
        norm.weight = nn.Parameter(weight_P, requires_grad=False)
        return norm

    def positions(self, example_BLD: Tensor, number: int = 0) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine of a layer's rotary embedding for positions 0 .. L - 1."""
        if self.rotary is None:
            return None
        steps = torch.arange(example_BLD.shape[1], device=example_BLD.device)[None]
        kinds: Any = getattr(self.config, "layer_types", None)
        rotary, asked = self.rotary, {}
        if self.rotary_local is not None and kinds[number] == "sliding_attention":
            rotary = self.rotary_local
        if "layer_type" in inspect.signature(rotary.forward).parameters:
            asked["layer_type"] = kinds[number]
        cos, sin = rotary(example_BLD, steps, **asked)
        return cos, sin

    def routing(self, logits_TE: Tensor) -> Routing:
        """As routers of the class have it; where config.json says nothing, gates sum to 1."""
        normalised = getattr(self.config, "norm_topk_prob", True)
        per_token: int = self.config.num_experts_per_tok
        return Routing.of(logits_TE, per_token, normalised=normalised)

    def mask(self, number: int, length: int) -> Tensor | None:
        """What positions of a text see, (1, 1, L, L), where a layer attends to a window.

        None: all before them. Texts are never padded here, and without a mask sdpa is causal; an
        attention that is not fused adds its mask to the scores, and always needs one.
        """
        fused = self.config._attn_implementation == "sdpa"
        kinds = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        if kinds and kinds[number] != "sliding_attention":
            window = None
        if fused and (window is None or window >= length):
            return None
        step_L = torch.arange(length)
        distance_LL = step_L[:, None] - step_L
        seen_LL: Tensor = (distance_LL >= 0) & (distance_LL < (window or length))
        if fused:
            return seen_LL[None, None]
        added_LL = torch.zeros(length, length).masked_fill(~seen_LL, torch.finfo().min)
        return added_LL[None, None]


def _one_layer(stock: Any) -> Any:
    """The whole class with its first layer alone, without memory."""
    from transformers import AutoModelForCausalLM

    single = copy.deepcopy(stock)
    single.num_hidden_layers = 1
    if hasattr(single, "num_kv_shared_layers"):  # of whom there is none that makes them
        single.num_kv_shared_layers = 0
    if getattr(single, "layer_types", None):
        single.layer_types = single.layer_types[:1]
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(single)
    except Exception as error:  # a class says in many ways that it has no use for a word
        raise CheckpointError(
            f"transformers builds no model of this config.json ({type(error).__name__}: {error}); "
            "take the config.json that belongs to these weights"
        ) from error


def _fused(model: Any) -> bool:
    """Whether torch's own attention computes this class: it has no cap for the scores."""
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    return bool(model._supports_sdpa) and not capped


class Layer:
    """A decoder layer run sublayer by sublayer, whose weights can be exchanged for narrower ones.

    Writers stand outside the module (an identity takes their place), so that what goes into a
    writer and what it adds are two separate questions. Of a mixture nothing is in the module:
    releases of transformers keep experts apart or fused, files keep them apart.

    Args:
        tensors: every parameter of the layer, by its name below the layer.
        dtypes: what each will be stored as. The layer computes with values rounded to it, so that
            what is fitted later sees the rounding too. None: no rounding.
    """

    def __init__(
        self,
        stock: Stock,
        family: Family,
        number: int,
        tensors: Mapping[str, Tensor],
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self.stock = stock
        self.family = family
        self.number = number
        self.module = stock.layer(number)
        kinds = family.kinds_in(stock.config)
        self.sublayers = family.in_layer(kinds[number] if kinds else "")
        self._dtypes = dtypes or {}
        self._tensors: dict[str, Tensor] = {}
        for sublayer in self.sublayers:
            if sublayer.router is None:
                owner, _, attribute = sublayer.writer.name.rpartition(".")
                setattr(self.module.get_submodule(owner), attribute, nn.Identity())
        for name, tensor in tensors.items():
            self.assign(name, tensor)

    def assign(self, name: str, tensor: Tensor) -> None:
        """Give the parameter `name` (below the layer) these values, of whatever width.

        They lie in memory as a file has them: in another order, products round differently.
        """
        stored = tensor.to(self._dtypes.get(name, tensor.dtype)).float().contiguous()
        self._tensors[name] = stored
        if (module := self._owner(name)) is not None:
            attribute = name.rpartition(".")[2]
            setattr(module, attribute, nn.Parameter(stored, requires_grad=False))
            if isinstance(module, nn.Conv1d):  # of each channel by itself
                module.groups = len(stored)

    def _owner(self, name: str) -> nn.Module | None:
        """What in the module has this parameter; None: it stands outside."""
        outside = [linear.name for s in self.sublayers if s.router for linear in s.linears]
        if any(name.startswith(one.partition(EACH)[0]) for one in outside):
            return None
        module = self.module.get_submodule(name.rpartition(".")[0])
        return None if isinstance(module, nn.Identity) else module

    def forget(self, sublayer: Sublayer) -> None:
        """Let go of the matrices of a sublayer that nothing passes through any more."""
        for linear in sublayer.linears:
            if linear != sublayer.router:  # of which rows are counted
                for name in self.names(linear):
                    self.assign(f"{name}.weight", torch.empty(0))

    def leaves(self, names: list[str]) -> list[Tensor]:
        """These parameters as leaves of a graph: an optimiser may move them in place."""
        for name in names:
            if (module := self._owner(name)) is None:
                self._tensors[name] = self._tensors[name].detach().clone().requires_grad_()
            else:
                self._tensors[name] = getattr(module, name.rpartition(".")[2]).requires_grad_()
        return [self._tensors[name] for name in names]

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._tensors)

    def gamma(self, norm: str) -> Tensor:
        """What a norm multiplies with."""
        return self._tensors[f"{norm}.weight"] + float(self.family.unit_offset)

    def assign_gamma(self, norm: str, gamma_D: Tensor) -> None:
        self.assign(f"{norm}.weight", gamma_D - float(self.family.unit_offset))

    def normalise(self, sublayer: Sublayer, stream_BLD: Tensor) -> Tensor:
        """What the readers of this sublayer see."""
        if sublayer.norm is None:
            return stream_BLD
        normed: Tensor = self.module.get_submodule(sublayer.norm)(stream_BLD)
        return normed

    def inside(
        self, sublayer: Sublayer, stream_BLD: Tensor, beside: Beside | None = None
    ) -> Tensor:
        """What the writer of this sublayer sees: attention outputs, or neurons.

        Args:
            beside: what some classes give their layers besides the stream.
        """
        normed_BLD = self.normalise(sublayer, stream_BLD)
        module = self.module.get_submodule(sublayer.module)
        if sublayer.module != "self_attn":
            with self._passing(normed_BLD):
                neurons_BLI: Tensor = module(normed_BLD)
            if not sublayer.given:
                return neurons_BLI.float()
            assert beside is not None
            activation = self.module.get_submodule("act_fn")
            gated_BLI: Tensor = activation(neurons_BLI.float()) * beside.input(self.number)
            return gated_BLI
        mask = self.stock.mask(self.number, normed_BLD.shape[1])
        positions = self.stock.positions(normed_BLD, self.number)
        asked: dict[str, Any] = {}
        if "position_ids" in inspect.signature(module.forward).parameters:
            asked["position_ids"] = torch.arange(normed_BLD.shape[1], device=normed_BLD.device)[
                None
            ]
        given: dict[str, KeysAndValues] = {}
        if beside is not None and sublayer.keys is None:
            given = beside.keys_on(normed_BLD.device)
        if "shared_kv_states" in inspect.signature(module.forward).parameters:
            asked["shared_kv_states"] = given  # in which some layers leave their own
        with self._passing(normed_BLD):
            heads_BLI: Tensor = module(
                hidden_states=normed_BLD,
                position_embeddings=positions,
                attention_mask=None if mask is None else mask.to(normed_BLD.device),
                **asked,
            )[0]
        if beside is not None and sublayer.keys and self._lends:
            beside.made = given
        return heads_BLI.float()

    @property
    def _lends(self) -> bool:
        """Whether later layers look at keys of earlier ones."""
        return bool(getattr(self.stock.config, "num_kv_shared_layers", None))

    def _passing(self, example: Tensor) -> AbstractContextManager[Any]:
        """Products in the dtype of passes."""
        dtype = self.stock.passes
        if dtype == torch.float32:
            return nullcontext()
        return torch.autocast(example.device.type, dtype)

    def write(self, sublayer: Sublayer, inside_BLI: Tensor) -> Tensor:
        """What the writer gives."""
        return self._through(sublayer.writer.name, inside_BLI).float()

    def unscaled(self, sublayer: Sublayer, stream_BLD: Tensor) -> Tensor:
        """A stream behind this sublayer before some classes multiply it with a number."""
        return stream_BLD / self._tensors[sublayer.scaled_by] if sublayer.scaled_by else stream_BLD

    def after(self, sublayer: Sublayer, stream_BLD: Tensor, beside: Beside | None = None) -> Tensor:
        """The stream behind this sublayer."""
        if sublayer.router:
            return stream_BLD + self._mixed(sublayer, self.normalise(sublayer, stream_BLD))
        written_BLD = self.write(sublayer, self.inside(sublayer, stream_BLD, beside))
        if sublayer.output_norm is not None:
            written_BLD = self.module.get_submodule(sublayer.output_norm)(written_BLD)
        behind_BLD = stream_BLD + written_BLD
        return behind_BLD * self._tensors[sublayer.scaled_by] if sublayer.scaled_by else behind_BLD

    def through(self, stream_BLD: Tensor, beside: Beside | None = None) -> Tensor:
        """The stream behind all of its sublayers."""
        for sublayer in self.sublayers:
            stream_BLD = self.after(sublayer, stream_BLD, beside)
        return stream_BLD

    def metric(self, sublayer: Sublayer) -> Tensor:
        """G = sum of W^T W over the readers: how an error in their input is felt.

        An expert counts by the share of tokens that would go to it if all were liked alike.
        """
        total_DD: Tensor | float = 0.0
        for linear in sublayer.all_readers:
            names = self.names(linear)
            share = self.stock.config.num_experts_per_tok / len(names) if linear.each else 1.0
            for name in names:
                weight = self._tensors[f"{name}.weight"].double()
                total_DD = total_DD + share * (weight.T @ weight)
        assert isinstance(total_DD, Tensor)
        return total_DD

    # A mixture of experts -----------------------------------------------------------------------

    def names(self, linear: Linear) -> list[str]:
        """Of a linear, or of those of all experts that the layer has."""
        return linear.names(self.num_experts) if linear.each else [linear.name]

    def _through(self, name: str, inputs_TX: Tensor) -> Tensor:
        """What the linear of this name gives, with its bias where it has one."""
        weight, bias = self._tensors[f"{name}.weight"], self._tensors.get(f"{name}.bias")
        with self._passing(inputs_TX):
            return apply_linear(inputs_TX, weight, bias)

    @property
    def num_experts(self) -> int:
        """As many as routers have rows."""
        routers = [s.router for s in self.sublayers if s.router]
        return max((len(self._tensors[f"{router.name}.weight"]) for router in routers), default=0)

    def route(self, sublayer: Sublayer, normed_TD: Tensor) -> Routing:
        """Where tokens go that the readers of a mixture see."""
        assert sublayer.router is not None
        routing = self.stock.routing(self._through(sublayer.router.name, normed_TD))
        if (shared := sublayer.shared) is None:
            return routing
        if shared.weight is None:
            return routing.sharing(None)
        return routing.sharing(self._through(shared.weight.name, normed_TD))

    def experts(self, sublayer: Sublayer) -> list[int]:
        """Numbers of all, a shared one first."""
        return [*([SHARED] if sublayer.shared else []), *range(self.num_experts)]

    def inside_expert(self, sublayer: Sublayer, expert: int, normed_TD: Tensor) -> Tensor:
        """What the writer of one expert sees, (T, I), of the tokens that go to it."""
        read = [self._through(name, normed_TD) for name in self._gate_and_up(sublayer, expert)]
        gate_TI, up_TI = read if len(read) == 2 else read[0].chunk(2, dim=-1)
        return gating_of(self.family, self.stock.config)(gate_TI, up_TI).float()

    def _gate_and_up(self, sublayer: Sublayer, expert: int) -> list[str]:
        """Names of what one expert reads with: two matrices, or one that is both."""
        if expert == SHARED:
            assert sublayer.shared is not None
            return [linear.name for linear in sublayer.shared.inner]
        names = {
            linear.name == self.family.gated: linear.name.format(expert)
            for linear in sublayer.readers
            if linear.each
        }
        return [names[True], names[False]]

    def writer_of(self, sublayer: Sublayer, expert: int) -> str:
        """Name of the writer of one expert."""
        if expert == SHARED:
            assert sublayer.shared is not None
            return sublayer.shared.writer.name
        return sublayer.writer.name.format(expert)

    def write_expert(self, sublayer: Sublayer, expert: int, inside_TI: Tensor) -> Tensor:
        """What the writer of one expert gives, (T, D)."""
        return self._through(self.writer_of(sublayer, expert), inside_TI).float()

    def _mixed(self, sublayer: Sublayer, normed_BLD: Tensor) -> Tensor:
        """What all experts add together."""
        normed_TD = normed_BLD.flatten(0, -2)
        routing = self.route(sublayer, normed_TD)
        mixed_TD = torch.zeros_like(normed_TD)
        for expert in self.experts(sublayer):
            tokens_T, gates_T1 = routing.to(expert)
            inside_TI = self.inside_expert(sublayer, expert, normed_TD[tokens_T])
            written_TD = self.write_expert(sublayer, expert, inside_TI) * gates_T1
            mixed_TD.index_add_(0, tokens_T, written_TD)
        return mixed_TD.view_as(normed_BLD)

    def keep_experts(self, sublayer: Sublayer, kept: Tensor) -> None:
        """Drop all other experts and their rows of the router."""
        router = sublayer.router
        assert router is not None
        for linear in sublayer.linears:
            if not linear.each:
                continue
            for part in PARTS:
                held = [self._tensors.pop(f"{name}.{part}", None) for name in self.names(linear)]
                for number, expert in enumerate(kept.tolist()):
                    if (tensor := held[expert]) is not None:
                        self.assign(f"{linear.name.format(number)}.{part}", tensor)
        for part in PARTS:
            if (rows := self._tensors.get(name := f"{router.name}.{part}")) is not None:
                self.assign(name, rows[kept])


def layer_tensors(
    family: Family, layer: int, read: Callable[[str], Tensor], names: Mapping[str, Any]
) -> dict[str, Tensor]:
    """All tensors of one layer, by their name below the layer, as `read` gives them."""
    prefix = family.layer_name(layer, "")
    return {name.removeprefix(prefix): read(name) for name in names if name.startswith(prefix)}
