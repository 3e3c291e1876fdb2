"""Small wrong classes, each of which a named law must reject."""
