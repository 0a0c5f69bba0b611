"""A page for the browser and an HTTP interface. Needs the extra `demo`; nothing else of the package imports it."""
