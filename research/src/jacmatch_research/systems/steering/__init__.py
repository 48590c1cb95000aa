"""A car that steers with two or with four wheels, its best linear controller, and networks that replace it."""
