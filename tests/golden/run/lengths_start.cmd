run ../../../examples/nsa.json --set H=4 --set KH=2 --set D=16 --set DV=16 --set T=64 --in cu_seqlens=starts_at_3.npy
