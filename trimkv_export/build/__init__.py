"""Build a package from a checkpoint: weights, graphs, plan, and the engines of each target."""
