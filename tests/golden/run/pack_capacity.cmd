pack small.csv --capacity 7
