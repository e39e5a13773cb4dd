"""Rules about what turns a question into a model's inputs, held against what the installed classes ask for."""
