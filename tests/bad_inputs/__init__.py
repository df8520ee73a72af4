"""Bad inputs by generators, one module a kind of input; `draw` makes others of each kind from a seed."""
