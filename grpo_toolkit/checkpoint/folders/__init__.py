"""Folders on disk: a model's, its base's, a run's checkpoints, other trainers' layouts, and what lies around one."""
