"""The command line: one file a verb."""

from grpo_toolkit.cli.main import build_parser, main

__all__ = ["build_parser", "main"]
