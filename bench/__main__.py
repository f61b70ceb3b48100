"""`python -m dotexport.bench`: the bench verb, and behind a name the tables of docs/results."""

from __future__ import annotations

import sys
from importlib import import_module

from dotexport.app.cli import main
from dotexport.app.endings import ended
from dotexport.app.hearing import listen

TABLES = {
    "axes": "axes",
    "core": "core_tables",
    "diffusion": "pruned_pipelines",
    "encoders": "encoder_ways",
    "faults": "faults",
    "fidelity": "fidelity",
    "heads": "task_heads",
    "healing": "healing_steps",
    "matrix": "matrix",
    "mutations": "mutations",
    "optimum": "optimum",
    "pairs": "pairs",
    "rounding": "rounded_for_text",
    "specials": "special_tokens",
    "targets": "artifacts_written",
    "trust": "trust",
    "vocabulary": "smaller_vocabularies",
}
"""What a table is called -> its file in tables/, whose `app` takes the rest of the line."""

if __name__ == "__main__":
    if (name := next(iter(sys.argv[1:]), "")) in TABLES:
        listen(verbose=False)
        app = import_module(f"dotexport.bench.tables.{TABLES[name]}").app
        ended(lambda: app(sys.argv[2:], prog_name=f"python -m dotexport.bench {name}"))
    else:
        sys.argv.insert(1, "bench")
        main()
