"""Generation with a live model or a loaded one: requests, their inputs, answers."""
