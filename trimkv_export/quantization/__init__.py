"""int4 and int8: rounding, calibration on a text, and checkpoints that are quantised already."""
