"""What runs a bundle: the manifest and the sessions. Knows neither torch nor where frames come from."""
