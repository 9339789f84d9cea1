"""How many replicas there should be: signals, hysteresis, forecast, policies."""
