"""Rollouts of a model in training: compiled, prefilled once a prompt, from weights that need no casting."""
