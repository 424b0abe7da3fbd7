"""What the source of AEVB measured it against: other ways to train the same generative model."""
