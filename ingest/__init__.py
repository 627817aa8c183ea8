"""From a Kafka topic to versioned blocks: parse, validate, seal, commit."""
