"""The export verb for text encoders: a folder per artifact, in the layout its readers expect.

Beside the graph lies what the original's folder holds: config.json, tokenizer, and what
sentence-transformers keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dotexport.encoders import encoder_card
from dotexport.encoders.encoder_folder import (
    Encoder,
    artifact,
    check_apart,
    copy_beside,
    describe_source,
    open_encoder,
    save_encoder,
)
from dotexport.encoders.encoder_verifying import Parity, check, graph_of, write_report
from dotexport.encoders.encoder_walk import Progress
from dotexport.encoders.kinds import STOCK
from dotexport.errors import ParityError
from dotexport.exports.encoder_target import EncoderTarget, resolve_encoder
from dotexport.exports.exporting import home_of
from dotexport.exports.verifying import artifact_name, require
from dotexport.storage import manifest
from dotexport.storage.output import check_free, new_folder, occupied
from dotexport.storage.ownership import is_unfinished

NOT_KEPT = "; it was not kept"


def export(
    folder: Path,
    specs: Sequence[str],
    *,
    out: Path | None = None,
    verify: bool = True,
    overwrite: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> list[str]:
    """Write one artifact per spec (NAME or NAME:PRECISION), kept only if it agrees with torch.

    An output of dotexport takes its artifacts into itself; a plain folder needs `out`, which
    becomes such an output with a copy of the model in hf/.

    Returns: names of their folders.

    Raises:
        UsageError: what was asked for cannot be done.
        RuntimeMissingError: a target's runtime is not installed.
        ParityError: an artifact does not compute what torch computes; it is not kept.
    """
    wanted = {}
    for spec in specs:
        target, precision = resolve_encoder(spec)
        wanted[artifact_name(target, precision)] = (target, precision)
    home = home_of(folder, out, overwrite=overwrite)
    if home is None:
        assert out is not None  # home_of saw to it
        home = out.expanduser().resolve()
        check_free(home, overwrite=overwrite)
        check_apart(folder, home)
        encoder = open_encoder(folder)
        with new_folder(home, overwrite=overwrite) as partial:
            save_encoder(encoder, encoder.model, partial / STOCK)
            manifest.update(
                partial,
                kind="encoder",
                source=describe_source(encoder),
                artifacts={STOCK: artifact(partial / STOCK, STOCK, "as-stored")},
                environment=manifest.environment(),
            )
            failed = _write_all(partial, encoder, wanted, progress, verify=verify, overwrite=False)
            if len(failed) == len(wanted):  # of an output with nothing in it nothing stays
                require(failed, note=NOT_KEPT)
    else:
        encoder = open_encoder(home)
        with occupied(home, shared=True):
            failed = _write_all(home, encoder, wanted, progress, verify=verify, overwrite=overwrite)
        if "shrink" in manifest.read(home):
            encoder_card.write(home)
    require(failed, note=NOT_KEPT)
    return list(wanted)


def _write_all(
    home: Path,
    encoder: Encoder,
    wanted: dict[str, tuple[EncoderTarget, str]],
    progress: Progress,
    *,
    verify: bool,
    overwrite: bool,
) -> list[Parity]:
    """Write what holds; returns what does not."""
    failed = []
    for name in wanted:
        check_free(home / name, overwrite=overwrite or is_unfinished(home / name))
    for number, (name, (target, precision)) in enumerate(wanted.items()):
        progress(f"exporting: {name}", number, len(wanted))
        replaces = overwrite or is_unfinished(home / name)
        parity = None
        try:
            with occupied(home / name), new_folder(home / name, overwrite=replaces) as partial:
                parity = _write(target, encoder, partial, name, precision, verify=verify)
                require([parity] if parity else [])
                entry = artifact(partial, target.name, precision)
        except ParityError:
            assert parity is not None
            failed.append(parity)
        else:
            entry["parity"] = parity.as_dict() if parity else None
            manifest.merge(home, artifacts={name: entry})
        write_report(home, [parity] if parity else [])
    progress("exporting", len(wanted), len(wanted))
    return failed


def write_artifact(
    target: EncoderTarget, encoder: Encoder, folder: Path, name: str, precision: str
) -> None:
    """Write one into a folder and hold it against torch.

    Raises:
        ParityError: it does not compute what torch computes.
    """
    parity = _write(target, encoder, folder, name, precision, verify=True)
    require([parity] if parity else [])


def _write(
    target: EncoderTarget,
    encoder: Encoder,
    folder: Path,
    name: str,
    precision: str,
    *,
    verify: bool,
) -> Parity | None:
    copy_beside(encoder, folder)
    place = folder / encoder.home.relative_to(encoder.root)
    target.write_encoder(graph_of(encoder), place, precision)
    return check(target, precision, encoder, place, name) if verify else None
