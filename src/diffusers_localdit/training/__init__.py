"""Training: data, precomputed latents and embeddings, objective, checkpoints. Imported only where it is asked for."""
