"""Prompts made better, and motion scores, by any chat endpoint that speaks OpenAI's protocol."""
