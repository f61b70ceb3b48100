"""What a verb does where several processes were started."""

from __future__ import annotations

import pytest

from dotexport.app.cli import main, one_process


def test_several_processes_of_torchrun_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["dotexport", "targets"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "torchrun started 2" in said
    assert "without torchrun" in said


@pytest.mark.parametrize("world", [{}, {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "1"}])
def test_one_process_is_let_through(world: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is a size that others than torchrun have set."""
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (world or {"WORLD_SIZE": "4"}).items():
        monkeypatch.setenv(name, value)
    one_process()
