"""The output for people and trackers: terminal, charts, report, model card, trackers."""
