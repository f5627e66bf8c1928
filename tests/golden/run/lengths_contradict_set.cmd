run ../../../examples/nsa.json --set H=4 --set KH=2 --set D=16 --set DV=16 --set T=64 --set B=3 --in cu_seqlens=good.npy
