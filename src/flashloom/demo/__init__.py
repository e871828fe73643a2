"""The demo: sentence embeddings, continuous batching, a table of speeds, and pictures of variants."""
