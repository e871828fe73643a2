"""FlashInfer's own tests, run against flashloom: `python -m flashloom.compat.conformance CHECKOUT`."""
