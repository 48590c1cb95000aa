"""A cluster of argon atoms: its potential, networks for its energy, and simulations with either of them."""
