"""The runtime: source -> ring -> batch -> step -> decode -> track -> sink. Knows no torch and no trainer."""
