"""The worker's page: one HTML file, its style and its script, and the JSON they show."""
