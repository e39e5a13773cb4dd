"""`python -m grpo_toolkit.cli`."""

from grpo_toolkit.cli.main import main

main()
