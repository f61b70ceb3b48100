"""What can be narrowed: a model folder is opened, or it is said why not."""

from __future__ import annotations

from pathlib import Path

from dotexport.errors import CheckpointError, UnsupportedModelError, UsageError
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.families import check_quantised
from dotexport.models.family import Family
from dotexport.models.shapes import Sizes, check_shapes, shapes


def open_source(folder: Path) -> Checkpoint:
    """A model that can be narrowed, or the reason why it cannot.

    Raises:
        CheckpointError, UnsupportedModelError.
    """
    if not (folder / "config.json").is_file() and (library := library_of(folder)):
        raise UnsupportedModelError(
            f"{folder} is a model of the library {library}; this verb narrows decoder LLMs of "
            "transformers (config.json and *.safetensors)"
        )
    checkpoint = Checkpoint.open(folder)
    check_quantised(checkpoint.config)
    checkpoint.companions()  # refuses links out of the model, which would travel with it
    return checkpoint


def library_of(folder: Path) -> str | None:
    """The library that a folder without config.json belongs to, if Optimum knows it."""
    from transformers.utils import logging as theirs

    verbosity = theirs.get_verbosity()
    theirs.set_verbosity_error()  # optimum imports all of diffusers, which tells what it lacks
    from optimum.exporters.tasks import TasksManager

    theirs.set_verbosity(verbosity)
    try:
        return str(TasksManager.infer_library_from_model(str(folder)))
    except ValueError:
        return None


def check_tensors(source: Checkpoint, family: Family, sizes: Sizes) -> None:
    found = {name: spec.shape for name, spec in source.specs.items()}
    check_shapes(family, sizes, found, source.folder)
    expected = {name for name, _ in shapes(family, sizes)}
    # Old Llama files store rotary frequencies, and some tied ones the shared table twice.
    harmless = (".rotary_emb.inv_freq", f"{family.head.name}.weight")
    foreign = [n for n in found if n not in expected and not n.endswith(harmless)]
    if foreign:
        raise CheckpointError(
            f"{source.folder} holds tensors that {family.architecture} has no place for "
            f"({len(foreign)}, first {foreign[0]}); merge adapters into the model first, or take "
            "the config.json that belongs to these weights"
        )


def check_apart(model: Path, out: Path) -> None:
    """Refuse to replace a model by what comes out of it.

    Raises:
        UsageError: the folder or the file lies inside the output.
    """
    if model.exists() and model.resolve().is_relative_to(out.expanduser().resolve()):
        raise UsageError(
            f"the model {model} lies inside the output {out}, which would replace it; "
            "give another output folder"
        )
