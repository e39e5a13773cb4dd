"""The oracle: the doctor held against what real readers do with good folders that a machine has mutated."""
