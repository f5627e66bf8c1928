plan ../../../examples/nsa.json
