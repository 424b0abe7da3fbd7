"""Models: the VAE, and recognition models of corrupted images."""
