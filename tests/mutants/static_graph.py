"""Ways to trust a promise about the graph too early, or too far."""

from riemannian_modules import recorder

# What to put in the place of which part of the recorder.
WRONG = {
    "settles at once": ("_SURE", 0),
    "all passes look alike": ("_at_a_glance", lambda uses, outputs, loss: "alike"),
}
assert all(hasattr(recorder, part) for part, _ in WRONG.values())
