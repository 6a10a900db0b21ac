"""Models of other toolkits as epsilon-models."""
