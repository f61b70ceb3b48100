"""Classes whose config says the feed-forward width: pruned models are of the stock class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dotexport.diffusion import saving, surgery, tables
from dotexport.diffusion.moments import Moments


def wan() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def prx() -> Any:
    from diffusers import PRXTransformer2DModel

    return PRXTransformer2DModel(
        patch_size=1,
        in_channels=4,
        context_in_dim=16,
        hidden_size=32,
        mlp_ratio=2.0,
        num_heads=4,
        depth=2,
        axes_dim=[4, 4],
    )


CLASSES = {"wan": wan, "prx": prx}


def pruned(model: nn.Module, keep: list[int]) -> list[Any]:
    """Cut the feed-forward layers to these widths; the layout."""
    before = surgery.widths(model)
    for site, width in zip(tables.find_sites(model), keep, strict=True):
        moments = {}
        for name in site.writers:
            moments[name] = Moments.zeros(tables.linear(model, name).in_features)
            moments[name].add(torch.randn(400, tables.linear(model, name).in_features))
        removal = surgery.choose(
            model, site, moments, site.units - width, method="obs", damping=1e-6
        )
        surgery.cut(model, site, removal.kept(site.units, width), moments, damping=1e-6)
    return surgery.layout_of(model, before)


@pytest.mark.parametrize("name", CLASSES)
def test_even_widths_are_a_stock_checkpoint(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CLASSES[name]()
    sites = tables.find_sites(model)
    assert [site.kind for site in sites] == ["ffn", "ffn"]  # heads share a norm or their keys
    source = written(model, tmp_path / "source")
    width = sites[0].units * 3 // 4 + 1  # not a multiple of anything
    layout = pruned(model, [width, width])
    saved = saving.save(model, "transformer", layout, source, tmp_path / "out")
    assert saved == type(model).__name__
    again = type(CLASSES[name]()).from_pretrained(tmp_path / "out" / "transformer")
    assert {site.units for site in tables.find_sites(again)} == {width}
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert not (tmp_path / "out" / "transformer" / "pruned.py").exists()


def test_uneven_widths_need_a_class_of_their_own(tmp_path: Path) -> None:
    model = wan()
    source = written(model, tmp_path / "source")
    layout = pruned(model, [24, 16])
    saved = saving.save(model, "transformer", layout, source, tmp_path / "out")
    assert saved == "PrunedWanTransformer3DModel"


def written(model: Any, folder: Path) -> Path:
    """A pipeline folder with nothing but this denoiser."""
    model.save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text(
        f'{{"_class_name": "X", "transformer": ["diffusers", "{type(model).__name__}"]}}'
    )
    return folder
