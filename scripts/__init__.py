"""Commands of this repository."""
