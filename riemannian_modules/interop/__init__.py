"""The layer metric in other libraries, each of them optional."""
