"""Measuring drafters and engines on prompts: accepted length, acceptance, throughput."""
