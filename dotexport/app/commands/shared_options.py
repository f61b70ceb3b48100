"""Options that several verbs share, each with its one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="Model folder (config.json, *.safetensors) or hub id.")]
Output = Annotated[Path, typer.Argument(help="Output of dotexport shrink, export or run.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Output folder; must be new or empty.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, logs on stderr.")]
Samples = Annotated[int, typer.Option(help="Windows of text, at most.")]
Seqlen = Annotated[
    int | None, typer.Option(help="Tokens per window; default: 2048 or the model's context.")
]
Skip = Annotated[int, typer.Option(help="Windows left out at the start of the text.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
TEXT_HELP = (
    "A .txt file (documents end in <|endoftext|>), a .jsonl file (field text), a folder of .txt, "
    "a dataset id, embedded:calibration or embedded:evaluation."
)
Params = Annotated[
    str | None, typer.Option(help="Parameter budget: 0.7x, 5.2M, 6e9. Sizes are then chosen.")
]
Size = Annotated[str | None, typer.Option(help="Budget of bytes as stored: 0.7x, 300MB, 1.5GB.")]
Latency = Annotated[
    str | None,
    typer.Option(
        help="Budget of time per decoded token: 0.8x of the original's, or 12ms; prefill:0.8x for "
        "prompts, 0.8x@4 for batches of 4."
    ),
]
LatencyTable = Annotated[
    str | None,
    typer.Option(
        help="What dotexport latency measured: its file, or the runtime (ort-cpu:int4) whose table "
        "is in the cache; default: the one in the cache, or torch timed on the spot."
    ),
]
ForceLatencyTable = Annotated[
    bool,
    typer.Option(
        "--force-latency-table", help="Take a table of another device, release or runtime."
    ),
]
Hidden = Annotated[int | None, typer.Option(help="Residual width (hidden_size).")]
Intermediate = Annotated[int | None, typer.Option(help="MLP width (intermediate_size).")]
KvHeads = Annotated[
    int | None,
    typer.Option(help="KV heads (num_key_value_heads); their query heads leave with them."),
]
Tied = Annotated[
    bool | None,
    typer.Option(
        "--tied/--untied",
        help="Whether a shared embedding and head stay shared when the residual width is cut.",
    ),
]
Bias = Annotated[
    bool,
    typer.Option("--bias/--no-bias", help="Give linears biases where the class has them."),
]
Square = Annotated[
    bool,
    typer.Option(
        "--square",
        help="Drop heads along with the width, so that hidden_size == heads x head_dim, for "
        "consumers that take head_dim to be hidden_size / heads.",
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", help="Take the sizes that dotexport plan MODEL --json printed to it."),
]


VLLM: Any = {"rich_help_panel": "With --target vllm"}
