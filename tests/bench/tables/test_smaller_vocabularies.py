"""The table of smaller vocabularies, tried on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dotexport.bench.tables import smaller_vocabularies
from dotexport.embedded import MODEL_DIR


@pytest.mark.assets
def test_a_cut_is_told_by_size_by_reading_and_by_quality(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOTEXPORT_ASSETS", str(assets))
    monkeypatch.setattr(smaller_vocabularies, "CUTS", (("valid", 1024), ("valid", None)))
    smaller_vocabularies.main(MODEL_DIR, tmp_path, samples=1, seqlen=64)
    table = json.loads((tmp_path / "vocabulary.json").read_text())
    sizes, everything, wikitext, stories, *_, quality, _ = table["rows"]
    assert 0 < sizes["expected, %"] < 100
    assert everything["expected, %"] == ""
    assert (sizes["rows"], sizes["over"]) == (1024, "0.647x")
    assert all(row["after"] >= row["tokens/byte"] > 0.2 for row in (wikitext, stories))
    # Python sources are what it was trained on: of English both are bad.
    assert min(quality["perplexity"], quality["original"]) > 10
    assert quality["KL"] > 0
    assert 0 < quality["probability, %"] < 100
    assert "--samples 1 --seqlen 64" in table["command"]
    monkeypatch.delenv("DOTEXPORT_ASSETS")
    with pytest.raises(SystemExit, match="set DOTEXPORT_ASSETS"):
        smaller_vocabularies.main(MODEL_DIR, tmp_path, samples=1, seqlen=64)
