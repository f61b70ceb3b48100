"""The house: imports point one way, the package list is the tree, and starting is light."""

from __future__ import annotations

import ast
import importlib
import re
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
# The verbs may ask targets by name, but only inside a function.
TIES = set((ROOT / CORE / "app/commands").glob("*.py"))
# The core reaches the bench through this one door.
DOOR = ROOT / CORE / "app/door.py"
# Rooms of the core, by stage: each imports from itself and from those before it alone.
ROOMS = (
    *(
        "processes",
        "storage",
        "embedded",
        "models",
        "vocabulary",
        "merging",
        "axes",
        "narrowing",
        "exports",
    ),
    *("generation", "tasks", "healing", "sizes", "outputs", "diffusion", "encoders", "app"),
)
LEAVES = {"errors", "options", "version"}
# What stands before the rooms: the package itself, and names that other packages import.
FRONT = {"__init__", "__main__", "adapter", "calibrate"}
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


def modules() -> dict[str, Path]:
    return {module_of(file): file for folder in ALLOWED for file in sources(folder)}


def neighbours(file: Path, known: dict[str, Path]) -> set[str]:
    """Modules of ours that a file imports, inside functions and for types alone as well."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        # Of `from package import module` the module is meant, and no more than that.
        names = imported(node, file)
        inner = [name for name in names[1:] if name in known]
        found |= set(inner or names[:1]) & set(known)
    return found - {module_of(file)}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """What is left of a graph when everything that leads nowhere has been taken away, again and
    again: the circles, and what leads into them."""
    left = dict(graph)
    while leaves := [name for name, after in left.items() if not after & set(left)]:
        for name in leaves:
            del left[name]
    return [[name, *sorted(left[name] & set(left))] for name in sorted(left)]


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_point_one_way(folder: str) -> None:
    wrong = {
        str(file.relative_to(ROOT)): sorted(reached(file) - ALLOWED[folder])
        for file in sources(folder)
        if reached(file) - ALLOWED[folder]
    }
    assert not wrong


def test_no_import_leads_back_to_where_it_came_from() -> None:
    known = modules()
    assert circles({name: neighbours(file, known) for name, file in known.items()}) == []


def test_a_circle_is_seen_however_long_it_is() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"a"}}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["a", "b"], ["b", "c"], ["c", "b"]]


def test_rooms_import_from_earlier_rooms_alone() -> None:
    known = modules()
    wrong = []
    for name, file in known.items():
        room = _room(file)
        for other in neighbours(file, known):
            there = _room(known[other])
            if room in ROOMS and there in FRONT:
                wrong.append(f"{name} -> {other}")
            if room in ROOMS and there in ROOMS and ROOMS.index(there) > ROOMS.index(room):
                wrong.append(f"{name} -> {other}")
            if room in LEAVES and there in {*ROOMS, *FRONT}:
                wrong.append(f"{name} -> {other}")
    assert wrong == []


def _room(file: Path) -> str:
    parts = file.relative_to(ROOT).parts
    return Path(parts[1]).stem if parts[0] == CORE else parts[0]


def test_every_folder_of_the_core_is_a_room() -> None:
    rooms = {_room(file) for file in sources(CORE)}
    assert rooms == {*ROOMS, *LEAVES, *FRONT}


def test_the_core_calls_the_bench_through_one_door() -> None:
    asking = [
        file
        for file in sources(CORE)
        if f"{CORE}.{BENCH}" in code_of(file) and file != ROOT / CORE / "__init__.py"
    ]
    assert asking == [DOOR]


def test_what_the_door_offers_is_there() -> None:
    from dotexport.bench import for_core

    # Ask for all of it: a name that has moved would else be missed by one verb in one case.
    assert all(callable(getattr(for_core, name)) for name in for_core.HOMES)
    with pytest.raises(AttributeError, match="offers the core no 'nothing'"):
        _ = for_core.nothing


def code_of(file: Path) -> str:
    """What a file says besides its comments and docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    return ast.unparse(tree)


def test_no_two_files_have_one_name() -> None:
    names = [f.name for d in ALLOWED for f in sources(d) if not f.name.startswith("__")]
    assert sorted(names) == sorted(set(names))


# What knows one axis by its name, and why: its own file; the sizes of a model and the tables of its
# shapes; what is said of the residual stream, whose basis and norm are one axis' own; the pair of
# --square; the depth of models that are timed; the parts of runtimes and results that read a
# config.json.
def test_budgets_tables_and_reports_name_no_axis() -> None:
    from dotexport.axes import AXES

    walking = [
        *(file for file in sources(CORE) if _room(file) in ("sizes", "outputs", "app")),
        *(ROOT / BENCH / f"latency_{part}.py" for part in ("sizes", "measuring")),
        *sources(f"{BENCH}/report"),
    ]
    names = {axis.name for axis in AXES}
    naming = [str(f.relative_to(ROOT)) for f in walking if any(n in code_of(f) for n in names)]
    assert naming == ["dotexport/sizes/square.py", f"{BENCH}/latency_sizes.py"]


def test_the_walk_sees_what_it_should(tmp_path: Path) -> None:
    """The test above would pass with a walk that finds nothing."""
    assert reached(ROOT / BENCH / "measure.py") >= {CORE, BENCH}
    assert reached(ROOT / TARGETS / "growing.py") == {CORE}
    file = tmp_path / "pretended.py"
    file.write_text("def f():\n    from dotexport.bench import bench\n")
    assert reached(file) == {BENCH}
    verbs = ROOT / CORE / "app/commands/machine.py"
    everything = statements(ast.parse(verbs.read_text(encoding="utf-8")), inside_functions=True)
    assert any("dotexport.targets.doctor" in imported(node, verbs) for node in everything)


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


# What an extra brings, and who asks for it: the rooms and targets that say so where it is missing.
EXTRAS = {
    *("PIL", "datasets", "diffusers", "executorch", "gguf", "lm_eval", "mlx", "mlx_lm"),
    *("ai_edge_litert", "litert_lm", "litert_lm_builder"),
    *("onnxscript", "openvino", "pyarrow", "sklearn", "torchao"),
}
# Modules whose wheels have other names, and those that come with another.
WHEELS = {"ot": "pot", "yaml": "pyyaml", "pydantic_core": "pydantic", "tokenizers": "transformers"}


def test_all_that_is_imported_comes_with_a_plain_install() -> None:
    """An environment with every extra hides what a user's lacks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wheels = (one.lower().replace("_", "-") for one in project["dependencies"])
    declared = {re.split(r"[^a-z0-9-]", wheel, maxsplit=1)[0] for wheel in wheels}
    missing = set()
    for file in (file for folder in ALLOWED for file in sources(folder)):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            tops = {name.partition(".")[0] for name in imported(node, file)}
            for top in tops - EXTRAS - {CORE, ""} - set(sys.stdlib_module_names):
                wheel = WHEELS.get(top, top).replace("_", "-")
                if not {wheel, f"{wheel}-gpu", f"{wheel}-cuda"} & declared:
                    missing.add(f"{top} in {file.relative_to(ROOT)}")
    assert missing == set()
