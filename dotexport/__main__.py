"""`python -m dotexport`, for where the script of that name is not on the path."""

from __future__ import annotations

from dotexport.app.cli import main

if __name__ == "__main__":
    main()
