"""The parts of the recipe: data, rewards, planning, training."""
