"""Do the tests notice? Faults that a person could make, one at a time in a copy of the checkout.

python -m dotexport.bench mutations
python -m dotexport.bench mutations --only epsilon
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from dotexport.errors import DotexportError, UsageError

from .result_files import RESULTS, Out, save

CHECKOUT = Path(__file__).resolve().parents[2]
COPIED = ("dotexport", "targets", "bench", "tests", "pyproject.toml", "README.md")
WHOLE = "tests/test_whose_code_this_is.py"
LIVES = "LIVES"
LONGEST = 900  # seconds of one run of pytest

# A mutant that cannot be imported would be noticed by anybody: that is no merit of the tests.
NO_CATCH = ("ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError", "NameError")
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+?)::(.+?)(?: - (.*))?$", re.MULTILINE)


@dataclass(frozen=True)
class Mutation:
    """One fault.

    Attributes:
        file: below dotexport/.
        before: what is replaced; stands exactly once in the file.
        after: by what.
        what: is wrong then, in a sentence.
        tests: files that should notice.
    """

    file: str
    before: str
    after: str
    what: str
    tests: tuple[str, ...]

    def planted(self, source: str) -> str:
        """The source with the fault in it.

        Raises:
            MutationError: the text does not stand there once, or what comes out is no Python.
        """
        if (count := source.count(self.before)) != 1:
            raise MutationError(
                f"{self.file} holds {self.before!r} {count} times, expected once; adjust the table "
                "in bench/tables/mutations.py"
            )
        changed = source.replace(self.before, self.after)
        try:
            ast.parse(changed)
        except SyntaxError as error:
            raise MutationError(f"{self.file}: {self.after!r} is no Python ({error})") from error
        return changed

    def line(self, source: str) -> int:
        """Where the fault stands, from 1."""
        indent = len(self.before) - len(self.before.lstrip())
        return source[: source.index(self.before) + indent].count("\n") + 1


class MutationError(DotexportError):
    """The table itself is wrong, so that nothing can be said of the tests."""


def mutation(file: str, before: str, after: str, what: str, *tests: str) -> Mutation:
    """A row of the table, its tests below tests/."""
    return Mutation(file, before, after, what, tuple(f"tests/{name}" for name in tests))


MUTATIONS = (
    # models -------------------------------------------------------------------------------------
    mutation(
        "models/exact_norm.py",
        "math.sqrt(before / after)",
        "1.0",
        "Readers of a narrower stream are not scaled for its norm.",
        "models/test_exact_norm.py",
    ),
    mutation(
        "models/exact_norm.py",
        "epsilon * before / after)",
        "epsilon)",
        "The norm of a narrower stream keeps the epsilon of the wide one.",
        "models/test_exact_norm.py",
    ),
    mutation(
        "models/carriers.py",
        "torch.zeros(self.shapes[name]",
        "torch.ones(self.shapes[name]",
        "A bias that only the carrier has is one and not zero.",
        "models/test_carriers.py",
    ),
    mutation(
        "models/carriers.py",
        'scale = residual if linear.out == "residual" else 1.0',
        "scale = 1.0",
        "Granite's multiplier of what sublayers add is dropped.",
        "models/test_carriers.py",
    ),
    mutation(
        "models/carriers.py",
        "1 / (logits * (embedding if sizes.tied else 1.0))",
        "1 / logits",
        "A tied head is multiplied by Granite's embedding multiplier as well.",
        "models/test_carriers.py",
    ),
    mutation(
        "models/rope.py",
        'return {**top, "rope_scaling": scaling}',
        "return top",
        "Older releases of transformers are not told of a scaled rotary embedding.",
        "models/test_releases.py",
    ),
    mutation(
        "models/checkpoint.py",
        "bool(torch.isfinite(torch.stack(values.aminmax())).all())",
        "not bool(torch.isinf(torch.stack(values.aminmax())).any())",
        "NaN is not looked for in tensors that are read.",
        "models/test_checkpoint.py",
    ),
    mutation(
        "models/checkpoint.py",
        "for name, (file, _) in self._places.items()}",
        "for name, (file, _) in list(self._places.items())[:-1]}",
        "The index of shards leaves out the last tensor.",
        "models/test_checkpoint.py",
    ),
    mutation(
        "models/text_windows.py",
        "in order[options.skip :]])",
        "in order[: options.samples]])",
        "Windows that should be skipped are read.",
        "models/test_text_windows.py",
    ),
    mutation(
        "models/layers.py",
        "stored = tensor.to(self._dtypes.get(name, tensor.dtype)).float()",
        "stored = tensor.float()",
        "A narrowed layer computes with weights that are not rounded as they will be stored.",
        "narrowing/test_site.py",
    ),
    # axes ---------------------------------------------------------------------------------------
    mutation(
        "axes/num_key_value_heads.py",
        "num_attention_heads=queries * size",
        "num_attention_heads=sizes.num_attention_heads",
        "KV heads are cut without the query heads that read them.",
        "axes/test_axes.py",
    ),
    mutation(
        "axes/hidden_size.py",
        "after.hidden_size % math.lcm(grain, heads) == 0",
        "after.hidden_size % grain == 0",
        "A hidden size that the heads of Llama's class do not divide passes as legal.",
        "axes/test_axes.py",
    ),
    mutation(
        "axes/axis.py",
        "(1 - self.size(after) / self.size(before)) ** 2",
        "(1 - self.size(after) / self.size(before))",
        "The strain of a cut grows in proportion to its share, not with the square.",
        "axes/test_axes.py",
    ),
    # sizes --------------------------------------------------------------------------------------
    mutation(
        "sizes/plan_file.py",
        "hashlib.sha256(text.encode()).hexdigest()",
        "hashlib.sha256(b'config').hexdigest()",
        "Every config.json has the same fingerprint.",
        "sizes/test_plan_file.py",
    ),
    mutation(
        "sizes/plan_file.py",
        "if told != found:",
        "if told is None:",
        "The parameters that a plan file tells are not compared with those of its sizes.",
        "sizes/test_plan_file.py",
    ),
    mutation(
        "sizes/budget.py",
        "if cost(p) <= limit]",
        "if cost(p) >= limit]",
        "A budget is compared the wrong way round.",
        "sizes/test_allocation.py",
    ),
    mutation(
        "sizes/allocation.py",
        "taken = min(checked, key=lambda found: found[2])[0]",
        "taken = checked[0][0]",
        "Sizes are taken as predicted, whatever was measured of them together.",
        "sizes/test_allocation.py",
    ),
    mutation(
        "sizes/latency_table.py",
        "return max(times[near]",
        "return min(times[near]",
        "A size between two measured ones costs as much as the cheaper of them.",
        "sizes/test_latency_table.py",
    ),
    # merging ------------------------------------------------------------------------------------
    mutation(
        "merging/refit.py",
        "said_OI.neg_().add_(self.moments.cross_OI).T",
        "said_OI.neg_().add_(self.moments.cross_OI - self.prior_OI).T",
        "The ridge of a refit draws toward zero and not toward the analytic weights.",
        "merging/test_refit.py",
    ),
    mutation(
        "merging/refit.py",
        "Fit.unchanged(prior_OI, held_out), solver(train, prior_OI)",
        "Fit.unchanged(prior_OI, held_out), solver(train + held_out, prior_OI)",
        "Ridges are judged on windows that they were fitted on.",
        "merging/test_refit.py",
    ),
    mutation(
        "merging/obs.py",
        "        self.inverse_II.addmm_(self.inverse_II[:, columns], solved_CI, alpha=-1)\n",
        "",
        "OBS does not downdate the inverse when a group leaves.",
        "merging/test_obs.py",
    ),
    mutation(
        "merging/obs.py",
        "        self.weight_OI.addmm_(self.weight_OI[:, columns], solved_CI, alpha=-1)\n",
        "",
        "OBS does not let the other columns make up for a group that leaves.",
        "merging/test_obs.py",
    ),
    mutation(
        "merging/neurons.py",
        "self.share_M if signed else self.share_M.abs()",
        "self.share_M",
        "Gate rows take the signs that only up rows may have.",
        "merging/test_neurons.py",
    ),
    mutation(
        "merging/heads.py",
        "HeadMerge(groups.columns(kept), _blocks(kept, groups.head_dim), groups.head_dim)",
        "HeadMerge(groups.columns(kept), _blocks(kept.flip(0), groups.head_dim), groups.head_dim)",
        "Keys and values of kept groups stand in another order than their queries.",
        "merging/test_heads.py",
    ),
    mutation(
        "merging/ot/coupling.py",
        "self.sign_NK * self.plan_NK / total_K",
        "self.plan_NK / total_K",
        "A merge of axes forgets which of them stand upside down for their target.",
        "merging/test_transport.py",
    ),
    # narrowing ----------------------------------------------------------------------------------
    mutation(
        "narrowing/basis.py",
        "best_DK, least = basis_DK.detach().clone()",
        "best_DK, least = free_DK.detach().clone()",
        "A learned basis is not made orthonormal again.",
        "narrowing/test_basis.py",
    ),
    mutation(
        "narrowing/basis.py",
        "vectors_DD[:, ::-1][:, :width]",
        "vectors_DD[:, :width]",
        "The principal directions that are kept are the weakest.",
        "narrowing/test_basis.py",
    ),
    mutation(
        "narrowing/norm_statistics.py",
        "        quiet_BL[:, 0] = False\n",
        "",
        "The first position, an attention sink, counts in the moments that choose a basis.",
        "narrowing/test_norm_statistics.py",
    ),
    mutation(
        "narrowing/output_norm.py",
        "before_TS = stay_TS / size(given_TQ, self.epsilon)",
        "before_TS = stay_TS / size(stay_TS, self.epsilon)",
        "A norm over fewer queries is not scaled for those that left.",
        "narrowing/test_output_norm.py",
    ),
    mutation(
        "narrowing/site.py",
        "if not (self.options.refit and self.options.feedback):",
        "if not self.options.refit or self.options.feedback:",
        "With error feedback a writer is not asked to repair what has drifted before it.",
        "narrowing/test_site.py",
    ),
    mutation(
        "narrowing/site.py",
        "if fitted.error < best.error:",
        "if fitted.error < best.analytic_error:",
        "A merge is made although it is worse on held-out windows.",
        "narrowing/test_site.py",
    ),
    mutation(
        "narrowing/run.py",
        "analytic_DK = self.E_DK * self.scale\n",
        "analytic_DK = self.E_DK\n",
        "The head is not scaled for the narrower final norm.",
        "narrowing/test_site.py",
    ),
    mutation(
        "narrowing/run.py",
        "return (self.E_DK * fitted_DK).sum(0) / scaled",
        "return (self.E_DK * fitted_DK).sum(0)",
        "The final norm does not take back what a tied table was scaled by for the embedding.",
        "narrowing/test_output_norm.py",
    ),
    mutation(
        "narrowing/local.py",
        "torch.tensor([n for n in every if n not in apart])",
        "torch.arange(count)",
        "Local healing trains on the windows that judge it.",
        "narrowing/test_local.py",
    ),
    mutation(
        "narrowing/streams.py",
        "return JUDGING if window in self.judging else FITTED",
        "return FITTED",
        "Windows that judge a rehearsal are fitted on.",
        "narrowing/test_streams.py",
    ),
    mutation(
        "narrowing/local.py",
        "parameter.detach().copy_(kept)",
        "kept.copy_(parameter.detach())",
        "Local healing ends with its last weights and not with its best.",
        "narrowing/test_local.py",
    ),
    # healing ------------------------------------------------------------------------------------
    mutation(
        "healing/distil.py",
        'judgement.kl < course.curve[course.best]["kl"]',
        'judgement.kl < course.curve[0]["kl"]',
        "Distillation keeps the last step that is better than the start, not the best.",
        "healing/test_heal.py",
    ),
    mutation(
        "healing/distil_head.py",
        "log_q_RV.exp_().sub_(p_RV)",
        "p_RV.sub_(log_q_RV.exp_())",
        "Distillation climbs where it should descend.",
        "healing/test_distil_loss.py",
    ),
    mutation(
        "storage/workspace.py",
        "{_sha256(_json(identity))[:16]}",
        "{_sha256(_json(sorted(identity)))[:16]}",
        "Commands with other options go on from one another's unfinished work.",
        "storage/test_workspace.py",
    ),
    # exports ------------------------------------------------------------------------------------
    mutation(
        "exports/parity.py",
        'return alone | {"padded_prefill": prompts, "padded_decode": rest}',
        "return alone",
        "Parity does not ask for the padded batch.",
        "exports/test_parity.py",
    ),
    mutation(
        "exports/quality.py",
        "gap_N.std() / math.sqrt(num_windows)",
        "gap_N.std()",
        "The standard error of a perplexity ratio is the deviation of one window.",
        "exports/test_quality.py",
    ),
    mutation(
        "storage/manifest.py",
        'file.stat().st_size != entry["bytes"] or sha256(file) != entry["sha256"]',
        'file.stat().st_size != entry["bytes"]',
        "The hash of an artifact's files is not checked.",
        "exports/test_verifying.py",
    ),
    # storage, options, diffusion ----------------------------------------------------------------
    mutation(
        "storage/files.py",
        'partial = hidden(path, "partial")\n    try:\n        with partial.open(',
        "partial = path\n    try:\n        with partial.open(",
        "A file is written in its place and not renamed when it is complete.",
        "storage/test_output.py",
    ),
    mutation(
        "storage/manifest.py",
        "manifest = read(out) if is_output(out) else _fresh()",
        "manifest = _fresh()",
        "An update of the manifest drops its other sections.",
        "storage/test_manifest.py",
    ),
    mutation(
        "options.py",
        "given.get(flag.key, flag.default)",
        "given.get(flag.name, flag.default)",
        "A flag whose key is not the name of its field keeps its default, whatever is given.",
        "app/test_recipe.py",
    ),
    mutation(
        "diffusion/moments.py",
        "self.cross(centred=centred) + weight_OI @ ridge_II",
        "self.cross(centred=centred)",
        "The damping of a diffusion layer's refit draws toward zero.",
        "diffusion/test_moments.py",
    ),
)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def mutations(
    out: Out = RESULTS,
    only: Annotated[
        str, typer.Option(help="Those whose file or sentence holds this; writes no table.")
    ] = "",
) -> None:
    """Faults planted into the core, one at a time, and the test that catches each."""
    chosen = [m for m in MUTATIONS if only.lower() in f"{m.file} {m.what}".lower()]
    if not chosen:
        raise UsageError(f"--only {only}: no mutation holds that in its file or sentence")
    rows = list(judged(chosen))
    lives = [row for row in rows if row["caught by"] == LIVES]
    if only:
        for row in rows:
            typer.echo(" | ".join(row.values()))
    else:
        save(
            out / "mutations",
            f"Mutations: {len(rows) - len(lives)} of {len(rows)} caught",
            "Faults that a person could make, planted into a copy of the core one at a time. Each "
            "is answered by the test files that mirror its room; `caught by` is the first test "
            "that fails. All of these tests pass without a fault. Where a fault only stops a "
            "module from being imported, the command refuses it: that would be no catch.",
            rows,
        )
    if lives:
        raise typer.Exit(1)


def judged(chosen: Iterable[Mutation]) -> Iterator[dict[str, str]]:
    """A row of the table for each mutation, in a copy of this checkout."""
    chosen = list(chosen)
    with copied_checkout() as folder:
        _say(f"the tests of {len(chosen)} mutations without any")
        check_whole(folder, {name for m in chosen for name in m.tests})
        for number, each in enumerate(chosen, start=1):
            line = each.line((folder / "dotexport" / each.file).read_text(encoding="utf-8"))
            where = f"{each.file}:{line}"
            found = caught_by(folder, each) or LIVES
            _say(f"{number} of {len(chosen)}: {where}: {found}")
            yield {"what is wrong": each.what, "where": where, "caught by": found}


@contextmanager
def copied_checkout() -> Iterator[Path]:
    """A copy of this checkout that may be spoilt.

    Raises:
        UsageError: there is none, as where dotexport is installed.
    """
    if missing := [name for name in COPIED if not (CHECKOUT / name).exists()]:
        raise UsageError(
            f"{CHECKOUT} has no {missing[0]}; expected a checkout of dotexport with its tests"
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve() / "checkout"
        folder.mkdir()
        for name in COPIED:
            source = CHECKOUT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(source, folder / name)
        yield folder


def check_whole(folder: Path, tests: Iterable[str]) -> None:
    """Refuse to plant anything where tests fail already, or are of other code than this copy.

    Raises:
        MutationError.
    """
    (folder / WHOLE).write_text(
        "import dotexport, dotexport.bench, dotexport.targets\n\n\n"
        "def test_it_is_this_copy() -> None:\n"
        "    for package in (dotexport, dotexport.bench, dotexport.targets):\n"
        f"        assert package.__file__.startswith({str(folder)!r})\n",
        encoding="utf-8",
    )
    if (done := _pytest(folder, [WHOLE, *sorted(tests)])).returncode != 0:
        raise MutationError(
            "tests fail without any mutation; mend them first, then plant faults:\n" + _end_of(done)
        )


def caught_by(folder: Path, fault: Mutation) -> str | None:
    """The first test that fails with this fault in the copy; None: it lives.

    Raises:
        MutationError: pytest did not come to run the tests, or what failed is an import.
    """
    file = folder / "dotexport" / fault.file
    source = file.read_text(encoding="utf-8")
    file.write_text(fault.planted(source), encoding="utf-8")
    try:
        done = _pytest(folder, fault.tests)
    finally:
        file.write_text(source, encoding="utf-8")
    if done.returncode == 0:
        return None
    failure = FAILED.search(done.stdout)
    if done.returncode != 1 or failure is None or (failure[3] or "").startswith(NO_CATCH):
        raise MutationError(
            f"{fault.file}, {fault.after!r}: no test came to judge it (pytest ended with "
            f"{done.returncode}); adjust the table in bench/tables/mutations.py:\n{_end_of(done)}"
        )
    return failure[2]


def _pytest(folder: Path, tests: Iterable[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    changed: dict[str, Any] = {
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "1000",  # pytest shortens its summary to fit
        "PYTHONPATH": str(folder),  # for what the tests start elsewhere
        # A fault as long as what it replaces, planted within a second, would not be compiled again.
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    try:
        return subprocess.run(
            command,
            cwd=folder,
            env=inherited | changed,
            capture_output=True,
            text=True,
            timeout=LONGEST,
        )
    except subprocess.TimeoutExpired as error:
        raise MutationError(f"{' '.join(command[2:])} took longer than {LONGEST} s") from error


def _end_of(done: subprocess.CompletedProcess[str]) -> str:
    return re.sub(r"([=!_-])\1{9,}", r"\1\1\1", done.stdout + done.stderr)[-2000:]


def _say(text: str) -> None:
    typer.echo(text, err=True)
