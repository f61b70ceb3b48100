"""What reaches the user's stderr: words of dotexport, and errors of anybody.

Other libraries warn programmers (of deprecations, of kernels that are not built), and users can do
nothing about it. `--verbose` lets everything through.
"""

from __future__ import annotations

import logging
import sys

# torch gives its loggers a handler of their own, so nothing of it passes by ours.
HAVE_HANDLERS = ("torch.utils._pytree", "torch.onnx", "torch.export")


def listen(*, verbose: bool) -> None:
    """Set up logging and warnings for a command."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        stream=sys.stderr,
    )
    logging.captureWarnings(True)
    if verbose:
        return
    for handler in logging.getLogger().handlers:
        handler.addFilter(is_for_users)
    for name in HAVE_HANDLERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def is_for_users(record: logging.LogRecord) -> bool:
    """Ours, or an error."""
    ours = record.name.partition(".")[0] in ("dotexport", "__main__")
    return ours or record.levelno >= logging.ERROR
