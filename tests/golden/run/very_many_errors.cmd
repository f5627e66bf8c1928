plan very_many.json --set T=64
