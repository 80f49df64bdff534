"""Side by side: a grid of recipes built from one checkpoint, evaluated alike, and shown in one report."""
