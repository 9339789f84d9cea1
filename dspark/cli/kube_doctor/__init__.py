"""`dspark doctor --kube`: is this cluster ready for the chart, and is what it made healthy."""
