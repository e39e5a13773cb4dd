"""A model on disk: its files, headers, families, names, defaults, and how a folder is published."""
