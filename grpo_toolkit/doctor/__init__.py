"""The doctor: what is wrong with a model folder, said in plain words, and mended."""
