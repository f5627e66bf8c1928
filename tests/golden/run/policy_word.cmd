plan ../../../examples/nsa.json --set T=64 --policy alll
