"""Import of VAEs that others have trained, as versions of the model repository."""
