"""Brokers for the tests of ingest."""

from tests.kafka_servers import apache_kafka, apache_kafka_tls, broker, embedded_broker, topic

__all__ = ["apache_kafka", "apache_kafka_tls", "broker", "embedded_broker", "topic"]
