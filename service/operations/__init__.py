"""The operations, one a file. Each declares its inputs, outputs, options, graphs and warm-up, and how it runs."""
