"""Operations, one a file: inputs, outputs, options, the graphs each needs, how it runs."""
