"""Generation with a live model or one that is loaded: requests, inputs, loading, and what was answered."""
