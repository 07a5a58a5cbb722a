"""Rate rules: what multiplies the learning rate of each unit."""
