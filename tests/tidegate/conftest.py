"""Brokers for the tests of the whole path."""

from tests.kafka_servers import apache_kafka

__all__ = ["apache_kafka"]
