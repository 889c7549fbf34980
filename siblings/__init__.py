"""Papers that share the decoder or the aim: run as `python -m siblings.codec`, `.fit` or `.vin`, each with its own helpers."""
