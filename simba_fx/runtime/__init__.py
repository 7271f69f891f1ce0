"""What a transformed model runs as: its `program`, on a `clone` of the module tree, and what a call of it remembers."""
