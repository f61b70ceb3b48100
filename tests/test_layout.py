"""The house: imports point one way, the package list is the tree, and starting is light."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import dotexport

ROOT = Path(__file__).resolve().parents[1]
CORE, TARGETS, BENCH = "dotexport", "targets", "bench"
# bench -> targets -> dotexport: a folder may import from itself and from those after it.
ALLOWED = {CORE: {CORE}, TARGETS: {CORE, TARGETS}, BENCH: {CORE, TARGETS, BENCH}}
# Those that tie a whole chain together may reach up, but only inside a function.
TIES = {
    ROOT / CORE / "pipeline.py",
    ROOT / CORE / "diffusion/cli.py",
    *(ROOT / CORE / "commands").glob("*.py"),
}
HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "scipy", "ot", "optimum", "numpy"}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_of(file: Path) -> str:
    """Under which name a file is imported."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != CORE:
        parts = [CORE, *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(node: ast.AST, file: Path) -> list[str]:
    """Full names of the modules that an import statement asks for."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = module_of(file).split(".")
        package = package if file.name == "__init__.py" else package[:-1]
        base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [base])])
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def statements(tree: ast.AST, *, inside_functions: bool) -> Iterator[ast.AST]:
    """All nodes that run; those under `if TYPE_CHECKING` never do."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if function and not inside_functions:
            continue
        yield node
        yield from statements(node, inside_functions=inside_functions)


def reached(file: Path) -> set[str]:
    """The folders that a file imports from."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = statements(tree, inside_functions=file not in TIES)
    found = {name for node in nodes for name in imported(node, file)}
    ours = {name.split(".")[1] if "." in name else "" for name in found if _is_ours(name)}
    return {part if part in (TARGETS, BENCH) else CORE for part in ours}


def _is_ours(name: str) -> bool:
    return name == CORE or name.startswith(f"{CORE}.")


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_point_one_way(folder: str) -> None:
    wrong = {
        str(file.relative_to(ROOT)): sorted(reached(file) - ALLOWED[folder])
        for file in sources(folder)
        if reached(file) - ALLOWED[folder]
    }
    assert not wrong


def test_the_walk_sees_what_it_should(tmp_path: Path) -> None:
    """The test above would pass with a walk that finds nothing."""
    assert reached(ROOT / BENCH / "measure.py") >= {CORE, BENCH}
    assert reached(ROOT / TARGETS / "growing.py") == {CORE}
    file = tmp_path / "pretended.py"
    file.write_text("def f():\n    from dotexport.bench import bench\n")
    assert reached(file) == {BENCH}
    verbs = ROOT / CORE / "commands/measuring.py"
    everything = statements(ast.parse(verbs.read_text(encoding="utf-8")), inside_functions=True)
    assert any("dotexport.bench.table" in imported(node, verbs) for node in everything)


def test_the_package_list_is_the_tree() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    packages = {
        module_of(file)
        for folder in ALLOWED
        for file in sources(folder)
        if file.name == "__init__.py"
    }
    assert set(setup["setuptools"]["packages"]) == packages
    directories = setup["setuptools"]["package-dir"]
    assert directories == {CORE: CORE, f"{CORE}.{TARGETS}": TARGETS, f"{CORE}.{BENCH}": BENCH}


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {file.parent for folder in ALLOWED for file in sources(folder)}
    assert [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").is_file()] == []


def test_every_version_is_the_same() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert setup["project"]["version"] == dotexport.__version__


def loaded_by(code: str) -> set[str]:
    """Top-level modules that are there after some code ran in a fresh interpreter."""
    tail = "\nimport sys; print('\\n'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {line.partition(".")[0] for line in done.stderr.splitlines()}


HELP = """
import sys
from dotexport.app import cli
sys.argv = ["dotexport", *{arguments!r}]
try:
    cli.main()
except SystemExit as end:
    assert not end.code, end.code
"""


@pytest.mark.parametrize(
    "code",
    [
        "import dotexport",
        HELP.format(arguments=["--help"]),
        HELP.format(arguments=["shrink", "--help"]),
        HELP.format(arguments=["--version"]),
        HELP.format(arguments=["demo", "--print-recipe"]),
    ],
    ids=["import", "help", "shrink help", "version", "print recipe"],
)
def test_starting_imports_nothing_heavy(code: str) -> None:
    loaded = loaded_by(code)
    assert "dotexport" in loaded
    assert not loaded & HEAVY


def test_the_public_names_are_sorted_and_there() -> None:
    assert dotexport.__all__ == sorted(dotexport.__all__)
    for name in dotexport.__all__:
        assert getattr(dotexport, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dotexport.nothing


@pytest.mark.parametrize("folder", ALLOWED)
def test_what_a_module_lists_it_has_in_order(folder: str) -> None:
    for file in sources(folder):
        if "__all__ = [" not in file.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(module_of(file))
        assert list(module.__all__) == sorted(module.__all__), module.__name__
        assert all(hasattr(module, name) for name in module.__all__), module.__name__


def test_no_file_reads_or_writes_pickle() -> None:
    for folder in ALLOWED:
        for file in sources(folder):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            names = {n for node in ast.walk(tree) for n in imported(node, file)}
            assert not names & {"pickle", "dill", "cloudpickle", "joblib"}, file
            calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
            # The training that is no verb keeps its own state, and torch reads it weights_only.
            assert file.name == "train.py" or not calls & {"torch.load", "torch.save"}, file
