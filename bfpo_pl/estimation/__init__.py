"""What a run will need, from its config alone: memory of each device, and time."""
