check no_such_file.json
