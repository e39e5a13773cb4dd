"""How a live model attends: fewer, larger calls with the same result."""
