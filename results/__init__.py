"""Read the records of runs, test differences, write tables and figures."""
