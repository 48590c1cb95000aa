"""Systems whose values and slopes are known: the teachers of `jacmatch reproduce` that are no networks."""
