"""Half an hour of abuse: producers, connections, readers, files and signals that do a service no good."""
