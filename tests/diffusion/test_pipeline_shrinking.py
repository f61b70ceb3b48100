"""Pruning whole pipelines: what must change nothing, what is saved, and what is refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dotexport.diffusion import pruning, saving, surgery, tables
from dotexport.diffusion.calibration import Calibration
from dotexport.diffusion.layout import Curve, by_loss, num_parameters, uniform
from dotexport.diffusion.pipeline_options import (
    METHODS,
    LayoutOptions,
    PruneOptions,
    SampleOptions,
    ShrinkOptions,
    TimestepWeights,
)
from dotexport.diffusion.pipeline_shrinking import shrink
from dotexport.diffusion.sampling import component_of, load, read_prompts, sample
from dotexport.errors import (
    CalibrationError,
    CheckpointError,
    SizeError,
    UnsupportedModelError,
    UsageError,
)
from dotexport.merging import obs
from dotexport.storage import manifest

Tiny = Callable[[str], Path]
NAMES = ("sd3", "flux", "dit", "unet", "pixart", "sdxl")


@pytest.fixture
def sampling(prompts: Path, calls: dict[str, Any]) -> Callable[[str], SampleOptions]:
    def make(name: str) -> SampleOptions:
        size = None if name == "dit" else 16
        if name == "dit":
            prompts.write_text("1\n3\n\n7\n", encoding="utf-8")
        return SampleOptions(
            prompts=str(prompts), steps=2, batch=2, height=size, width=size, extra=calls[name]
        )

    return make


def calibration(folder: Path, options: SampleOptions) -> Calibration:
    pipe = load(folder)
    return Calibration(
        pipe=pipe, prompts=read_prompts(pipe, options), options=options, weights=TimestepWeights()
    )


def answer(model: nn.Module, pipe: Any, options: SampleOptions) -> torch.Tensor:
    """Latents of two prompts with this denoiser."""
    setattr(pipe, component_of(pipe), model)
    return sample(pipe, read_prompts(pipe, options)[:2], 0, options)


def cut_all(
    cal: Calibration, keep: Callable[[tables.Site], int], moments: Any, damping: float = 1e-6
) -> None:
    for site in tables.find_sites(cal.model):
        removal = surgery.choose(
            cal.model, site, moments, site.units - keep(site), method="obs", damping=damping
        )
        kept = removal.kept(site.units, keep(site))
        surgery.cut(cal.model, site, kept, moments, damping=damping)


@pytest.mark.parametrize("name", NAMES)
def test_removing_nothing_is_bit_identical(name: str, tiny: Tiny, sampling: Any) -> None:
    cal = calibration(tiny(name), sampling(name))
    before = copy.deepcopy(cal.model.state_dict())
    cut_all(cal, lambda site: site.units, {})
    after = cal.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", NAMES)
def test_silent_units_leave_every_class_without_a_trace(
    name: str, tiny: Tiny, sampling: Any
) -> None:
    """Half of the heads and neurons are made silent; what is left says the same."""
    options = sampling(name)
    cal = calibration(tiny(name), options)
    sites = tables.find_sites(cal.model)
    for site in sites:
        silence(cal.model, site, range(0, site.units, 2))
    before = answer(cal.model, cal.pipe, options)
    moments = cal.moments(pruning.writers(sites), "all")
    cut_all(cal, lambda site: site.units - len(range(0, site.units, 2)), moments)
    after = answer(cal.model, cal.pipe, options)
    # The same sums in another order, in float32, through two steps.
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def silence(model: nn.Module, site: tables.Site, units: Any) -> None:
    """Heads whose values are zero, and neurons that read nothing."""
    with torch.no_grad():
        for name in site.readers:
            if site.kind == "ffn" or name.endswith(("to_v", "add_v_proj")):
                layer = tables.linear(model, name)
                rows = site.rows(model, name)[list(units)].flatten()
                layer.weight[rows] = 0
                if layer.bias is not None:
                    layer.bias[rows] = 0


@pytest.mark.parametrize("name", NAMES)
def test_of_two_copies_one_leaves_without_loss(name: str, tiny: Tiny, sampling: Any) -> None:
    options = sampling(name)
    cal = calibration(tiny(name), options)
    sites = tables.find_sites(cal.model)
    with torch.no_grad():
        for site in sites:
            for reader in site.readers:
                layer, rows = tables.linear(cal.model, reader), site.rows(cal.model, reader)
                layer.weight[rows[1]] = layer.weight[rows[0]]
                if layer.bias is not None:
                    layer.bias[rows[1]] = layer.bias[rows[0]]
    before = answer(cal.model, cal.pipe, options)
    moments = cal.moments(pruning.writers(sites), "all")
    cut_all(cal, lambda site: site.units - 1, moments, damping=1e-9)
    after = answer(cal.model, cal.pipe, options)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def shrunk(tiny: Tiny, name: str, out: Path, options: SampleOptions, **layout: Any) -> Path:
    layout = layout or {"heads": "0.5x", "ffn": "0.5x"}
    shrink(tiny(name), out, ShrinkOptions(sampling=options, layout=LayoutOptions(**layout)))
    return out


@pytest.mark.parametrize("name", NAMES)
def test_an_output_loads_with_diffusers_and_says_the_same(
    name: str, tiny: Tiny, sampling: Any, tmp_path: Path
) -> None:
    from diffusers import AutoModel, DiffusionPipeline

    options = sampling(name)
    out = shrunk(tiny, name, tmp_path / "out", options)
    pipe = load(out / "pipeline")
    component = component_of(pipe)
    model = getattr(pipe, component)
    assert type(model).__name__.startswith("Pruned")
    record = manifest.read(out)
    assert num_parameters(model) == record["sizes"]["parameters"][1]
    assert num_parameters(model) < record["sizes"]["parameters"][0]

    # The file beside the weights serves those who have no dotexport.
    alone = AutoModel.from_pretrained(str(out / "pipeline" / component), trust_remote_code=True)
    assert type(alone).__module__ != type(model).__module__
    torch.testing.assert_close(
        answer(alone, pipe, options), answer(model, pipe, options), rtol=0, atol=0
    )

    # A second round: what is loaded is saved and loaded again.
    pipe.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            model.state_dict().values(),
            getattr(again, component).state_dict().values(),
            strict=True,
        )
    )
    assert not [file for file in out.rglob("*") if file.suffix in saving.PICKLES]


def test_stock_classes_refuse_a_pruned_model(tiny: Tiny, sampling: Any, tmp_path: Path) -> None:
    from diffusers import AutoModel, SD3Transformer2DModel

    out = shrunk(tiny, "sd3", tmp_path / "out", sampling("sd3"))
    folder = out / "pipeline" / "transformer"
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModel.from_pretrained(folder)
    with pytest.raises((ValueError, RuntimeError), match=r"size|shape"):
        SD3Transformer2DModel.from_pretrained(folder)


def test_the_rest_of_a_pipeline_is_carried_over_byte_by_byte(
    tiny: Tiny, sampling: Any, tmp_path: Path
) -> None:
    source = tiny("unet")
    out = shrunk(tiny, "unet", tmp_path / "out", sampling("unet")) / "pipeline"
    before, after = manifest.hash_files(source), manifest.hash_files(out)
    ours = {"model_index.json"} | {name for name in after if name.startswith("unet/")}
    assert {n: v for n, v in before.items() if n not in ours} == {
        n: v for n, v in after.items() if n not in ours
    }


def test_a_pruned_pipeline_can_be_pruned_again(tiny: Tiny, sampling: Any, tmp_path: Path) -> None:
    options = sampling("flux")
    first = shrunk(tiny, "flux", tmp_path / "first", options, ffn="0.5x")
    layout = LayoutOptions(heads="0.5x")
    second = shrink(first, tmp_path / "second", ShrinkOptions(sampling=options, layout=layout))
    assert second.parameters[0] == manifest.read(first)["sizes"]["parameters"][1]
    model = load(tmp_path / "second" / "pipeline").transformer
    assert num_parameters(model) == second.parameters[1]


def test_the_same_seed_gives_the_same_bytes(tiny: Tiny, sampling: Any, tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        out = shrunk(tiny, "dit", tmp_path / name, sampling("dit"), params="0.9x")
        files.append(manifest.hash_files(out / "pipeline"))
    assert files[0] == files[1]


def test_an_interrupted_run_goes_on_with_the_package_it_was_at(
    tiny: Tiny, sampling: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = LayoutOptions(ffn="0.5x", heads="0.5x", allocation="uniform")
    options = ShrinkOptions(sampling=sampling("dit"), layout=layout)
    whole = shrink(tiny("dit"), tmp_path / "whole", options)
    calls: list[str] = []
    real = Calibration.moments

    def moments(self: Calibration, layers: Any, stage: str) -> Any:
        calls.append(stage)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, layers, stage)

    monkeypatch.setattr(Calibration, "moments", moments)
    with pytest.raises(KeyboardInterrupt):
        shrink(tiny("dit"), tmp_path / "out", options, resume=True)
    assert not (tmp_path / "out").exists()
    shrink(tiny("dit"), tmp_path / "out", options, resume=True)
    assert calls == [f"package {n} of 4" for n in (1, 2, 3, 3, 4)]
    assert manifest.hash_files(tmp_path / "out" / "pipeline") == manifest.hash_files(
        whole.out / "pipeline"
    )
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_packages_of_another_run_are_not_taken(
    tiny: Tiny, sampling: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = LayoutOptions(ffn="0.5x")
    options = ShrinkOptions(sampling=sampling("dit"), layout=layout)
    real = pruning.Stored.save

    def save_and_stop(self: Any, *args: Any) -> None:
        real(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pruning.Stored, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            shrink(tiny("dit"), tmp_path / "out", options, resume=True)
    other = replace(options, layout=LayoutOptions(ffn="0.75x", allocation="uniform"))
    made = shrink(tiny("dit"), tmp_path / "out", other, resume=True)
    assert {site.kept / site.units for site in made.sites if site.kind == "ffn"} == {0.75}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_answers_the_same_door(
    method: str, tiny: Tiny, sampling: Any, tmp_path: Path
) -> None:
    options = ShrinkOptions(
        sampling=sampling("unet"),
        layout=LayoutOptions(params="0.9x"),
        prune=PruneOptions(method=method, packages=2),
    )
    made = shrink(tiny("unet"), tmp_path / "out", options)
    assert made.parameters[1] <= 0.9 * made.parameters[0]
    model = load(tmp_path / "out" / "pipeline").unet
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_zeros_keep_the_stock_class(
    sparsity: str, tiny: Tiny, sampling: Any, tmp_path: Path
) -> None:
    options = ShrinkOptions(sampling=sampling("dit"), sparsity=sparsity)
    made = shrink(tiny("dit"), tmp_path / "out", options)
    assert made.parameters[0] == made.parameters[1]
    model = load(tmp_path / "out" / "pipeline").transformer
    assert type(model).__name__ == "DiTTransformer2DModel"
    weight = model.get_submodule("transformer_blocks.0.ff.net.2").weight
    assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_feedback_and_allocation_run_through(tiny: Tiny, sampling: Any, tmp_path: Path) -> None:
    options = ShrinkOptions(
        sampling=sampling("sd3"),
        layout=LayoutOptions(params="0.8x"),
        prune=PruneOptions(feedback=True, packages=3),
    )
    made = shrink(tiny("sd3"), tmp_path / "out", options)
    assert made.parameters[1] <= 0.8 * made.parameters[0]
    assert len({site.kept / site.units for site in made.sites}) > 2


def test_the_cheapest_site_gives_first(tiny: Tiny) -> None:
    model = load(tiny("dit")).transformer
    sites = [site for site in tables.find_sites(model) if site.kind == "ffn"]
    even = uniform(model, tables.find_sites(model), LayoutOptions(ffn="0.5x"))
    curves = {
        site.name: Curve(tuple((n + 1) * cost for n in range(site.units - 1)))
        for site, cost in zip(sites, (1.0, 5.0), strict=True)
    }
    kept = by_loss(model, sites, curves, {site.name: even[site.name] for site in sites}, True)
    assert kept[sites[0].name] < even[sites[0].name] < kept[sites[1].name]
    assert sum(kept.values()) >= sum(even[site.name] for site in sites)


def test_predicted_losses_are_those_of_the_answer(tiny: Tiny, sampling: Any) -> None:
    """Each curve passes through what was measured with a share of one site gone."""
    cal = calibration(tiny("dit"), sampling("dit"))
    sites = tables.find_sites(cal.model)
    curves = pruning.predict(cal, sites, 0.5, PruneOptions())
    for site in sites:
        losses = curves[site.name].losses
        assert len(losses) == site.units - 1
        assert all(a <= b + 1e-12 for a, b in pairwise(losses))
        assert losses[-1] > 0


def refused(tmp_path: Path, error: type[Exception], match: str, make: Callable[[], object]) -> None:
    """The error comes, and nothing is left beside what was there."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(error, match=match):
        make()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_folder_that_is_no_pipeline_is_refused(sampling: Any, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    options = ShrinkOptions(sampling=sampling("dit"), layout=LayoutOptions(params="0.5x"))
    refused(
        tmp_path,
        CheckpointError,
        "model_index.json",
        lambda: shrink(folder, tmp_path / "out", options),
    )


def test_a_class_without_a_table_is_refused(
    tiny: Tiny, sampling: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(tables.TABLES, "DiTTransformer2DModel")
    options = ShrinkOptions(sampling=sampling("dit"), layout=LayoutOptions(params="0.5x"))
    refused(
        tmp_path,
        UnsupportedModelError,
        "DiTTransformer2DModel",
        lambda: shrink(tiny("dit"), tmp_path / "out", options),
    )


@pytest.mark.parametrize("share", ["1x", "1.0", "0x", "2"])
def test_a_share_that_leaves_all_or_nothing_is_refused(share: str) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        LayoutOptions(heads=share)


def test_a_budget_of_all_parameters_is_refused(tiny: Tiny, sampling: Any, tmp_path: Path) -> None:
    options = ShrinkOptions(sampling=sampling("dit"), layout=LayoutOptions(params="1x"))
    refused(
        tmp_path, UsageError, "everything", lambda: shrink(tiny("dit"), tmp_path / "out", options)
    )


def test_a_budget_below_what_cannot_be_cut_is_refused(
    tiny: Tiny, sampling: Any, tmp_path: Path
) -> None:
    options = ShrinkOptions(sampling=sampling("dit"), layout=LayoutOptions(params="0.01x"))
    refused(
        tmp_path, SizeError, "cannot be met", lambda: shrink(tiny("dit"), tmp_path / "out", options)
    )


def test_prompts_that_are_empty_missing_or_unknown_are_refused(
    tiny: Tiny, sampling: Any, tmp_path: Path
) -> None:
    file = tmp_path / "list.txt"
    for text, match in (("\n \n", "no prompts"), (None, "cannot be read"), ("a cat", "no class")):
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text, encoding="utf-8")
        asked = replace(sampling("dit"), prompts=str(file))
        options = ShrinkOptions(sampling=asked, layout=LayoutOptions(params="0.9x"))
        refused(
            tmp_path,
            CalibrationError,
            match,
            lambda options=options: shrink(tiny("dit"), tmp_path / "out", options),
        )


@pytest.mark.parametrize(
    "layout",
    [{"blocks.0.attn": 2}, {"transformer_blocks.0.attn1": 5}, {"transformer_blocks.0.attn1": 0}],
)
def test_a_layout_that_does_not_fit_is_refused(
    layout: dict[str, int], tiny: Tiny, sampling: Any, tmp_path: Path
) -> None:
    file = tmp_path / "layout.json"
    file.write_text(json.dumps(layout), encoding="utf-8")
    options = ShrinkOptions(sampling=sampling("dit"), layout=LayoutOptions(file=str(file)))
    refused(
        tmp_path,
        SizeError,
        "layout.json",
        lambda: shrink(tiny("dit"), tmp_path / "out", options),
    )


def test_a_layout_of_ones_own_is_followed(tiny: Tiny, sampling: Any, tmp_path: Path) -> None:
    file = tmp_path / "layout.json"
    file.write_text(json.dumps({"transformer_blocks.1.attn1": 1}), encoding="utf-8")
    options = ShrinkOptions(sampling=sampling("dit"), layout=LayoutOptions(file=str(file)))
    shrink(tiny("dit"), tmp_path / "out", options)
    model = load(tmp_path / "out" / "pipeline").transformer
    assert [block.attn1.heads for block in model.transformer_blocks] == [4, 1]


def test_arguments_that_a_pipeline_does_not_take_are_refused(
    tiny: Tiny, sampling: Any, tmp_path: Path
) -> None:
    asked = replace(sampling("dit"), extra={"negative_prompt": "no"})
    options = ShrinkOptions(sampling=asked, layout=LayoutOptions(params="0.9x"))
    refused(
        tmp_path,
        UsageError,
        "takes no negative_prompt",
        lambda: shrink(tiny("dit"), tmp_path / "out", options),
    )


def test_without_diffusers_the_command_says_what_to_install(tiny: Tiny, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from dotexport.app import cli\n"
        f"sys.argv = ['dotexport', 'shrink', {str(tiny('dit'))!r}, '-o', {str(tmp_path / 'out')!r},"
        " '--params', '0.5x', '--calib', 'x.txt']\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 6
    assert "dotexport[diffusion]" in done.stderr
    assert not (tmp_path / "out").exists()


def test_units_leave_in_the_order_of_their_loss() -> None:
    removal = obs.Removal((2, 0), (0.1, 0.3))
    assert removal.kept(4, 2).tolist() == [1, 3]
    assert removal.kept(4, 3).tolist() == [0, 1, 3]
    assert removal.kept(4, 4).tolist() == [0, 1, 2, 3]


def test_merging_copies_loses_nothing_and_is_judged(tiny: Tiny, sampling: Any) -> None:
    """Near copies merge: their barycentre says what both said, better than one of them alone."""
    options = replace(sampling("dit"), batch=3)
    cal = calibration(tiny("dit"), options)
    site = next(site for site in tables.find_sites(cal.model) if site.kind == "ffn")
    layer = tables.linear(cal.model, site.readers[0])
    half = site.units // 2
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        noise = torch.randn(layer.weight[:half].shape, generator=rng)
        layer.weight[half:] = layer.weight[:half] + 1e-3 * noise
        layer.bias[half:] = layer.bias[:half]
    options_dot = PruneOptions(method="dot", packages=1, damping=1e-6)
    before = answer(cal.model, cal.pipe, options)
    kept = {s.name: s.units for s in tables.find_sites(cal.model)} | {site.name: half}
    pruning.prune(cal, tables.find_sites(cal.model), kept, options_dot, pruning.Stored())
    after = answer(cal.model, cal.pipe, options)
    torch.testing.assert_close(after, before, rtol=0.02, atol=0.02)
