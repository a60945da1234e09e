"""The network: features, cost volume, aggregation, regression, and their assembly."""
