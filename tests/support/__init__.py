"""Fakes and builders used by more than one test file."""
