"""`python -m dotexport.bench`: the bench verb of the command line, and the tables of fidelity."""

from __future__ import annotations

import sys

from dotexport.app.cli import main

if __name__ == "__main__":
    if sys.argv[1:2] == ["fidelity"]:
        from .tables.fidelity import app

        del sys.argv[1]
        app(prog_name="python -m dotexport.bench fidelity")
    else:
        sys.argv.insert(1, "bench")
        main()
