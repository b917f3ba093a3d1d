"""One module per embodiment: native observation -> Observation, a row of an ActionChunk -> native command."""
