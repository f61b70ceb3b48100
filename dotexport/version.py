"""The release, for all that says who made it; a leaf, so that nothing imports the front door."""

__version__ = "0.1.0"
