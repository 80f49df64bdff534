"""Quality measurements: the same functions offline and behind the service."""
