"""A real Kafka for tests: its jars, its brokers, a network that can be cut."""
