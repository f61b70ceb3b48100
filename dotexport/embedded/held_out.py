"""What is kept out of training: standard-library modules, named here once and for all.

Both lists were drawn by lot (one shuffle with seed 0) from the readable modules of 5 to 95 KB that
every CPython from 3.11 to 3.14 ships, so that whoever installs dotexport also has this text.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from pathlib import Path

from dotexport.errors import CalibrationError

EVALUATION: tuple[str, ...] = (
    "asyncio/base_subprocess.py",
    "codecs.py",
    "email/contentmanager.py",
    "filecmp.py",
    "gzip.py",
    "json/encoder.py",
    "mailbox.py",
    "multiprocessing/forkserver.py",
    "multiprocessing/process.py",
    "os.py",
    "pickle.py",
    "poplib.py",
    "posixpath.py",
    "selectors.py",
    "zoneinfo/_common.py",
)

CALIBRATION: tuple[str, ...] = (
    "_collections_abc.py",
    "_pyio.py",
    "asyncio/protocols.py",
    "asyncio/queues.py",
    "asyncio/selector_events.py",
    "asyncio/staggered.py",
    "asyncio/taskgroups.py",
    "asyncio/tasks.py",
    "asyncio/timeouts.py",
    "codeop.py",
    "collections/__init__.py",
    "email/_parseaddr.py",
    "email/feedparser.py",
    "email/parser.py",
    "email/policy.py",
    "email/utils.py",
    "getopt.py",
    "heapq.py",
    "hmac.py",
    "html/parser.py",
    "http/client.py",
    "http/cookiejar.py",
    "http/cookies.py",
    "json/decoder.py",
    "multiprocessing/context.py",
    "multiprocessing/resource_tracker.py",
    "multiprocessing/sharedctypes.py",
    "multiprocessing/spawn.py",
    "operator.py",
    "pickletools.py",
    "pkgutil.py",
    "pstats.py",
    "pyclbr.py",
    "random.py",
    "re/__init__.py",
    "re/_constants.py",
    "smtplib.py",
    "socket.py",
    "ssl.py",
    "statistics.py",
    "types.py",
    "xml/dom/pulldom.py",
    "xml/sax/expatreader.py",
    "xmlrpc/client.py",
    "xmlrpc/server.py",
)


def standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def read_modules(modules: Iterable[str]) -> list[str]:
    return [_read(standard_library() / module) for module in modules]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CalibrationError(
            f"{path} is missing: dotexport measures on the sources of the standard library; "
            "install Python with its .py files (some systems split them into extra packages)"
        ) from None
