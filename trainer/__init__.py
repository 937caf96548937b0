"""The torch side: models, data, training, evaluation, export. Importing this package imports no torch."""
