"""Label engines: one file an engine, foreign imports inside it."""
