"""Pictures and video to patches, and where their tokens stand in a prompt."""
