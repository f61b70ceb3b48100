"""`python -m dotexport.bench`: the bench verb of the command line."""

from __future__ import annotations

import sys

from dotexport.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    main()
