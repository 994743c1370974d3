"""Training of look-ahead files: configuration, data, loss and loop."""
