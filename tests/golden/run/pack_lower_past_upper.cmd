pack bad_interval.csv
