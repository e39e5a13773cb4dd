"""An export's second folder, in FP8: quantised from file to file, and held against the export that it is made of."""
