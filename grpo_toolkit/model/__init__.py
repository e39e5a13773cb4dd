"""A model in memory: what is done to it while it trains and answers."""
