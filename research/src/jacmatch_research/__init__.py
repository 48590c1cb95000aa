"""Studies with jacmatch: the tables of the paper, six worked systems, and benchmarks."""
