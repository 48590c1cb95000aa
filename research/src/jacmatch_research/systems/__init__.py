"""Systems whose values and derivatives are known: the teachers of `jacmatch reproduce` that are no networks."""
