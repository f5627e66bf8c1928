check ../../../examples/nsa.json --plugin ./no_such.so
