"""Outputs appear whole or not at all."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dotexport.errors import DotexportError, UsageError
from dotexport.storage import manifest
from dotexport.storage.files import write_json, write_text
from dotexport.storage.output import new_folder, occupied


def fill(path: Path, text: str, *, overwrite: bool = False) -> None:
    with new_folder(path, overwrite=overwrite) as partial:
        write_text(partial / "recipe.yaml", text)
        write_json(partial / manifest.MANIFEST, {"dotexport": "0"})


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_folder_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "out") as partial:
        assert not (tmp_path / "deep" / "out").exists()
        (partial / "file").touch()
    assert names(tmp_path / "deep") == ["out"]
    assert names(tmp_path / "deep" / "out") == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_a_folder_that_failed(
    tmp_path: Path, error: type[BaseException]
) -> None:
    def interrupted() -> None:
        with new_folder(tmp_path / "out") as partial:
            (partial / "half").touch()
            raise error

    with pytest.raises(error):
        interrupted()
    assert names(tmp_path) == []


def test_what_a_killed_run_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from dotexport.storage.output import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'half').touch(); time.sleep(60)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")])
    while not list(tmp_path.glob(".out.partial-*/half")):
        assert run.poll() is None
        time.sleep(0.05)
    fill(tmp_path / "other", "")
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert len(names(tmp_path)) == 3  # beside `other` the half, and a lock that nobody holds
    fill(tmp_path / "out", "whole")
    assert names(tmp_path) == ["other", "out"]


def test_a_second_run_into_one_folder_is_told_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from dotexport.storage.output import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'half').touch(); time.sleep(60)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")])
    try:
        while not list(tmp_path.glob(".out.partial-*/half")):
            assert run.poll() is None
            time.sleep(0.05)
        with pytest.raises(UsageError, match=r"another run is writing .*out at this moment"):
            fill(tmp_path / "out", "", overwrite=True)
        assert len(list(tmp_path.glob(".out.partial-*/half"))) == 1
        fill(tmp_path / "other", "")
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    # Its number may be that of a living process by now, here or in another container.
    fill(tmp_path / "out", "whole")
    assert names(tmp_path) == ["other", "out"]


def test_what_a_reader_of_an_output_holds_keeps_it_from_being_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, "old")
    code = (
        "import sys; from pathlib import Path\n"
        "from dotexport.errors import UsageError\n"
        "from dotexport.storage.output import new_folder, occupied\n"
        "try:\n"
        "    with occupied(Path(sys.argv[1]), shared=sys.argv[2] == 'shared'): pass\n"
        "except UsageError: sys.exit(2)\n"
    )
    command = [sys.executable, "-c", code, str(out)]
    with occupied(out, shared=True):
        assert subprocess.run([*command, "shared"]).returncode == 0
        assert subprocess.run([*command, "alone"]).returncode == 2
        with occupied(out):  # of this process it is one
            pass
        assert subprocess.run([*command, "alone"]).returncode == 2
    assert subprocess.run([*command, "alone"]).returncode == 0
    assert names(tmp_path) == ["out"]


def stored(*files: str) -> dict[str, object]:
    digest = {"bytes": 1, "sha256": "ab" * 32}
    entry = {"target": "t", "precision": "p", "bytes": 1, "parity": None}
    return entry | {"files": dict.fromkeys(files, digest)}


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "README.md", "data/set.csv", "reports/thoughts.txt", "t-p/notes.txt", "t-q/x"],
)
def test_overwriting_deletes_nothing_that_dotexport_did_not_write(
    tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    fill(out, "old")
    manifest.update(out, artifacts={"t-p": stored("model.bin", "deep/er.bin")})
    for file in ("t-p/model.bin", "t-p/deep/er.bin", "reports/verify.json"):
        write_text(out / file, "mine")
    write_text(out / name, "of the user")
    said = name.partition("/")[0] if name.startswith(("data", "t-q")) else name
    with pytest.raises(UsageError, match=rf"did not write: {said}; --overwrite would delete it"):
        fill(out, "new", overwrite=True)
    assert (out / name).read_text() == "of the user"
    (out / name).unlink()
    if name.startswith(("data", "t-q")):
        (out / name).parent.rmdir()
    fill(out, "new", overwrite=True)
    assert (out / "recipe.yaml").read_text() == "new"


def test_what_came_there_while_a_run_worked_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, "old")
    with (
        pytest.raises(UsageError, match=r"did not write: letter\.txt"),
        new_folder(out, overwrite=True),
    ):
        write_text(out / "letter.txt", "dear")
    assert names(out) == [manifest.MANIFEST, "letter.txt", "recipe.yaml"]
    assert names(tmp_path) == ["out"]


def test_an_output_that_cannot_say_what_is_its_own_is_not_replaced(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    (tmp_path / "out" / manifest.MANIFEST).write_text("{")
    with pytest.raises(UsageError, match=r"nobody can say what .* remove it yourself"):
        fill(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "recipe.yaml").read_text() == "old"


def test_an_old_output_set_aside_by_a_killed_run_comes_back(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / ".out.old-999999999")
    with pytest.raises(ValueError, match="no"), new_folder(tmp_path / "out", overwrite=True):
        raise ValueError("no")
    assert (tmp_path / "out" / "recipe.yaml").read_text() == "old"


def test_a_name_is_no_pattern_for_the_names_of_others(tmp_path: Path) -> None:
    """`out[1]` as a pattern means `out1`, whose old content would come back in its place."""
    fill(tmp_path / "out1", "of another")
    (tmp_path / "out1").rename(tmp_path / ".out1.old-999999999")
    fill(tmp_path / "out[1]", "mine")
    assert names(tmp_path) == [".out1.old-999999999", "out[1]"]
    (tmp_path / "out[1]").rename(tmp_path / ".out[1].old-999999998")
    with pytest.raises(ValueError, match="no"), new_folder(tmp_path / "out[1]", overwrite=True):
        raise ValueError("no")
    assert (tmp_path / "out[1]" / "recipe.yaml").read_text() == "mine"


def test_overwriting_replaces_only_at_the_end(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    with new_folder(tmp_path / "out", overwrite=True) as partial:
        write_text(partial / "recipe.yaml", "new")
        assert (tmp_path / "out" / "recipe.yaml").read_text() == "old"
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "recipe.yaml").read_text() == "new"
    assert not (tmp_path / "out" / manifest.MANIFEST).exists()


def test_a_failed_overwrite_keeps_the_old_content(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    with pytest.raises(OSError, match="boom"), new_folder(tmp_path / "out", overwrite=True):
        raise OSError("boom")
    assert (tmp_path / "out" / "recipe.yaml").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_an_empty_folder_may_be_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "new")
    assert (tmp_path / "out" / "recipe.yaml").read_text() == "new"


def test_content_is_refused_without_overwrite(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    with pytest.raises(UsageError, match="--overwrite"):
        fill(tmp_path / "out", "new")


def test_foreign_content_is_never_overwritten(tmp_path: Path) -> None:
    write_text(tmp_path / "home" / "letter.txt", "dear")
    with pytest.raises(UsageError, match="not written by dotexport"):
        fill(tmp_path / "home", "new", overwrite=True)
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def test_an_artifact_inside_an_output_may_be_overwritten(tmp_path: Path) -> None:
    fill(tmp_path / "out", "")
    manifest.update(tmp_path / "out", artifacts={"ort-cpu-fp32": stored("model.onnx")})
    write_text(tmp_path / "out" / "ort-cpu-fp32" / "model.onnx", "old")
    fill(tmp_path / "out" / "ort-cpu-fp32", "new", overwrite=True)
    assert names(tmp_path / "out" / "ort-cpu-fp32") == [manifest.MANIFEST, "recipe.yaml"]


def test_a_file_is_refused_as_output(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UsageError, match="is a file"):
        fill(tmp_path / "out", "")
    with pytest.raises(UsageError, match="cannot be made"):
        fill(tmp_path / "out" / "below", "")


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "full"), RuntimeError("IoError: No space left on device (os error 28)")],
)
def test_a_full_disk_is_named_with_what_is_free(tmp_path: Path, error: Exception) -> None:
    with (
        pytest.raises(DotexportError, match=r"is full: .* GB are free now"),
        new_folder(tmp_path / "out"),
    ):
        raise error
    assert names(tmp_path) == []


def test_a_file_is_replaced_whole_or_kept(tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", {"figure": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "report.json", {"figure": float("nan")})
    with pytest.raises(UnicodeEncodeError):  # which shows only once the file is being written
        write_text(tmp_path / "report.json", "\ud800")
    assert json.loads((tmp_path / "report.json").read_text()) == {"figure": 1}
    assert names(tmp_path) == ["report.json"]
