"""The model repository: finding, checking, opening and replacing versions."""
