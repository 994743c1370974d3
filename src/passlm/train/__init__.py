"""Training the look-ahead: configuration, data, loss and loop."""
