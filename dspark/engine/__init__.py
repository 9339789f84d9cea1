"""Running models: pages, sequences, the verifier's steps, draft sessions, the in-process LLM."""
