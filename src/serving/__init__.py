"""Answers over HTTP: OpenAI's interface in front of MAX's model worker and scheduler."""
