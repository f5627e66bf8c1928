plan ../../../examples/nsa.json --set T
