"""The stock checkpoint itself, run by transformers on torch: what vLLM and others load too.

Shapes: B sequences, L tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from dotexport.errors import CheckpointError, RuntimeMissingError, UsageError
from dotexport.models.checkpoint import Checkpoint, CheckpointWriter, read_config, stored_config
from dotexport.models.config_words import KERNELS
from dotexport.models.loading import capped_attention
from dotexport.models.memory import fits
from dotexport.models.multimodal import is_multimodal
from dotexport.models.rope import in_all_words, stock_config
from dotexport.models.shapes import EXPERTS
from dotexport.models.weight_files import INDEX, WEIGHTS
from dotexport.storage.files import write_json

from .torch_session import DTYPES, TorchSession


class HuggingFace:
    """Loads with `AutoModelForCausalLM.from_pretrained`, without remote code."""

    name = "hf"
    summary = "stock transformers checkpoint: torch, vLLM, SGLang, TGI"
    precisions = ("as-stored",)
    exact_rounding = ()
    weight_bits: Mapping[str, tuple[float, float]] = {}  # as stored
    run_options = ("device", "dtype", "compiled", "capacity", "lean")

    def missing(self) -> list[str]:
        return []  # torch and transformers are what dotexport itself stands on

    def problems(self, checkpoint: Checkpoint, precision: str) -> list[str]:
        if checkpoint.config.get("auto_map"):
            return [
                "config.json names remote code (auto_map), which dotexport does not run; "
                "take a model whose class is in transformers"
            ]
        try:
            AutoConfig.from_pretrained(
                checkpoint.folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever the config class objects to is the answer
            return [f"transformers refuses config.json: {_first_line(error)}"]
        return []

    def config_problems(self, config: Mapping[str, Any], precision: str) -> list[str]:
        try:
            stock_config(config)
        except Exception as error:  # whatever the config class objects to is the answer
            return [f"transformers refuses config.json: {_first_line(error)}"]
        return []

    def write(self, checkpoint: Checkpoint, folder: Path, precision: str) -> None:
        write_json(folder / "config.json", in_all_words(checkpoint.config))
        for file in checkpoint.companions():
            shutil.copyfile(file, folder / file.name)
        if is_multimodal(stored_config(checkpoint.folder)):  # its files hold more, by other names
            writer = CheckpointWriter(folder, checkpoint.specs)
            for name in checkpoint.specs:
                writer.write(name, checkpoint.tensor(name))
            writer.finish()
            return
        for file in set(checkpoint.files.values()):
            place = folder / file.relative_to(checkpoint.folder)  # shards may lie in folders below
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
        if not (folder / WEIGHTS).exists():
            stored = checkpoint.stored
            places = ((stored.get(n, n), file) for n, file in checkpoint.files.items())
            index = {n: file.relative_to(checkpoint.folder).as_posix() for n, file in places}
            total = {"total_size": checkpoint.num_bytes}  # transformers does not load without
            write_json(folder / INDEX, {"metadata": total, "weight_map": index})

    def open(
        self,
        folder: Path,
        *,
        threads: int | None = None,
        device: str = "cpu",
        dtype: str = "fp32",
        compiled: bool = False,
        capacity: int | None = None,
        lean: bool = False,
    ) -> TorchSession:
        """Load in float32 on the CPU, unless asked for something else.

        On the CPU, a model that does not fit as a whole stays on disk: every answer reads the files
        once, matrix by matrix, through transformers' own offloading (experts, which the class has
        fused, from a copy that ends with the session).

        Args:
            threads: torch's setting for the whole process.
            device: as torch names it: "cpu", "cuda", "cuda:1".
            dtype: one of DTYPES.
            compiled: decode through torch.compile over a cache of fixed size.
            capacity: tokens that this cache holds; None: 256 more than the prompt.
            lean: answer as a server needs it: logits of the last position alone, left on the device
                (a tensor there, once it is computed; an array on the CPU).

        Raises:
            CheckpointError: tensors that config.json calls for are missing, or others are left.
            UsageError: no such dtype or device.
            RuntimeMissingError: torch does not see this device.
        """
        place, number = find_device(device), find_dtype(dtype)
        if threads is not None:
            torch.set_num_threads(threads)
        loader: Any = AutoModelForCausalLM  # its stubs do not know output_loading_info
        if is_multimodal(stored_config(folder)):
            loader = AutoModelForImageTextToText
        offloaded = {} if compiled else _offloaded(folder, place, number)
        room = offloaded.get("offload_folder")
        try:
            with _no_progress_bar():
                model, report = loader.from_pretrained(
                    folder,
                    dtype=number,
                    local_files_only=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    **_attention(folder),
                    **offloaded,
                )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            if room:
                shutil.rmtree(room, ignore_errors=True)
            raise CheckpointError(
                f"transformers cannot load {folder}: {_first_line(error)}; export it again"
            ) from error
        if room:
            weakref.finalize(model, shutil.rmtree, room, ignore_errors=True)
        _check_complete(folder, report)
        _check_rope(folder, model.config.get_text_config(decoder=True))
        _check_head(folder, model)
        model = model.eval() if _on_disk(model) else model.eval().to(place)
        if not compiled:
            return TorchSession(model, lean=lean, device=place)
        from .compiled import CompiledSession

        return CompiledSession(model, lean=lean, capacity=capacity)


def find_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r} is unknown; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def find_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        UsageError: torch knows no such name.
        RuntimeMissingError: this torch does not see the device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r} is unknown to torch; expected cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RuntimeMissingError(
            f"torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices and {name} "
            "was asked for; install a build of torch for CUDA and look at `dotexport doctor`"
        )
    return device


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """A library does not print; transformers would."""
    switch: Any = transformers_logging
    shown = switch.is_progress_bar_enabled()
    switch.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            switch.enable_progress_bar()


def _check_complete(folder: Path, report: dict[str, Any]) -> None:
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {kind: sorted(map(str, report[kind])) for kind in kinds if report.get(kind)}
    if wrong:
        listed = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(v)}" for kind, v in wrong.items())
        raise CheckpointError(
            f"{folder} does not hold exactly the tensors its config.json calls for ({listed}); "
            "export it again"
        )


def _offloaded(folder: Path, place: torch.device, number: torch.dtype) -> dict[str, Any]:
    """Arguments of a class that leave its weights in their files; none where they fit."""
    num_bytes = Checkpoint.open(folder).num_parameters * number.itemsize
    if place.type != "cpu" or fits(num_bytes, place):
        return {}
    return {"device_map": {"": "disk"}, "offload_folder": _room(folder)}


def _room(folder: Path) -> str | None:
    """Where experts lie while such a model is open, which classes hold fused and files apart; None:
    files are as the class has them."""
    config = stored_config(folder)
    return tempfile.mkdtemp(prefix="dotexport-") if any(map(config.get, EXPERTS)) else None


def _on_disk(model: Any) -> bool:
    return "disk" in getattr(model, "hf_device_map", {}).values()


def _attention(folder: Path) -> dict[str, str]:
    """Arguments of a class: a kernel that config.json names may not be here."""
    named = stored_config(folder)
    stock = {"attn_implementation": "sdpa"} if any(named.get(key) for key in KERNELS) else {}
    return stock | capped_attention(read_config(folder))


def _check_head(folder: Path, model: Any) -> None:
    """Release 4.57 ties a head that the file holds with values of its own."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is table.weight
    if tied and not read_config(folder).get("tie_word_embeddings", True):
        raise CheckpointError(
            f"transformers {transformers.__version__} ties the head of {folder}, which its file "
            "holds with values of its own; dotexport export MODEL --target hf -o OUT says so in "
            "config.json"
        )


def _check_rope(folder: Path, read: Any) -> None:
    """Release 4.57 passes over the words of release 5 in silence."""
    meant = stock_config(read_config(folder))
    for key in ("rope_theta", "rope_scaling"):
        if getattr(read, key, None) != getattr(meant, key, None):
            raise CheckpointError(
                f"transformers {transformers.__version__} takes {key} = {getattr(read, key, None)} "
                f"for {folder}, whose config.json means {getattr(meant, key, None)} and says so in "
                "rope_parameters only; dotexport export MODEL --target hf -o OUT says it in words "
                "that every release reads"
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
