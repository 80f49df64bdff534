"""Serving half of qerve: engine, HTTP, metrics, settings."""
