"""What people look at: the page of a comparison, and the per-layer page inside an artifact."""
