"""A cluster of argon atoms: its potential, networks for its energy, and simulations that either of them drives."""
