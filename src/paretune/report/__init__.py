"""Reports: what a run directory holds, as one page, as CSV files and in the terminal; and what other commands print."""
