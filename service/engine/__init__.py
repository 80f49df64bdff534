"""The engine: schedule, run, sample, collect; one thread, any number of clients."""
