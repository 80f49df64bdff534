"""The page at ``/``: how the server is doing, and a playground. Static files, and what answers for them."""
