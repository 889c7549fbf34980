"""Papers that share the decoder or the goal: run as `python -m siblings.codec`, `.fit` or `.vin`; the rest are helpers."""
