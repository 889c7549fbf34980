"""Whether it pays: the ablations of the paper, and what FVD can tell."""
