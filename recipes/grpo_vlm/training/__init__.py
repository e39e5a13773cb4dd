"""TRL's trainer with evaluation, baselines and figures of a run."""
