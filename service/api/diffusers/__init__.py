"""`/diffusers`: the remote VAE of diffusers, whose tensors are those of the model's own code, in [-1, 1]."""
