"""Training a drafter from text that its target writes itself."""
