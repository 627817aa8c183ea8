"""Engines, the hot swap and the OpenAI-compatible API."""
