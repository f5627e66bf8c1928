check many.json --policy nowhere.json
