"""Studies: the ablations of the paper, comparisons with other methods, and the validity of FVD."""
