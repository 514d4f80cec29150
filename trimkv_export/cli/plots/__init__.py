"""Pictures of plans, of quality and of what a cache keeps, drawn with matplotlib."""
