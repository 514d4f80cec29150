"""Training of retention gates next to a frozen backbone: the only room that imports PyTorch."""
