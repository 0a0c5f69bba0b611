"""Browser demo and HTTP API. Needs the extra `demo`; the rest of the package does not import it."""
