"""Charts of latency rows: `gallery` lists them, the other modules draw them, `style` says how they look."""
