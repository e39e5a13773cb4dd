"""`python -m grpo_toolkit.cli`: the command line without its console script."""

import sys

from grpo_toolkit.cli.main import main

sys.exit(main())
