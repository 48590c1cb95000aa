"""Systems whose values and derivatives are known: teachers of `jacmatch reproduce` that are not networks."""
