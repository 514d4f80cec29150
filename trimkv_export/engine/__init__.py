"""Engine builders, one module per target, and the package format they share."""
