"""Interest clusters: from a catalogue of titles to the registry snapshot that workers map into memory."""
