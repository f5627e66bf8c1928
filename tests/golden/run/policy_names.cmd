plan ../../../examples/nsa.json --set T=64 --policy policy_names.json
