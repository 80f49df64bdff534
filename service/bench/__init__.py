"""What ``qerve bench`` measures of the engine and of the HTTP server."""
